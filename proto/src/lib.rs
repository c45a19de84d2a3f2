//! Code that Dyad's processes share: wire types, run configuration, data format, files of a run, errors.
//!
//! - [`wire`]: gRPC types, generated from `proto/dyad/v1/dyad.proto`.
//! - [`run_config`]: the run configuration and its checks. The launcher reads it, the coordinator keeps it, trainers get it at join.
//! - [`pairs`]: preference pairs, the supported forms of JSON, and the files that hold them.
//! - [`ownership`]: the lock of an output folder; one run at a time.
//! - [`inputs`]: refuses inputs that lie where the run writes.
//! - [`files`]: reading regular files; pipes and devices are refused.
//! - [`folder`]: detects that the output folder was moved or replaced.
//! - [`run_folder`]: names of the files that a run leaves in its output folder.
//! - [`removal`]: removes and replaces folders of a run; keeps files that Dyad did not write.
//! - [`manifest`]: size and checksum of every file of a checkpoint.
//! - [`fingerprint`]: settings that decide a run's numbers; a resume compares them with the checkpoint.
//! - [`finished`]: recognises a complete run.
//! - [`counted`]: counts with nouns in the right number.
//! - [`plain`]: escapes untrusted text before it is shown.
//! - [`safe_file`]: writing files without following links.
//! - [`security`]: certificates, keys and tokens; connecting to the coordinator.
//! - [`signals`]: ignored signals.
//! - [`fault`]: the error type: code, message, hint, exit status.
// Tests may use `std::fs` directly; other code reads through `dyad_proto::files`.
#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

pub mod called;
pub mod checkpoint_state;
pub mod counted;
pub mod fault;
pub mod files;
pub mod fingerprint;
pub mod finished;
pub mod folder;
pub mod host_memory;
pub mod inputs;
pub mod left_out;
pub mod lfs;
pub mod manifest;
pub mod names;
pub mod ownership;
pub mod pairs;
pub mod plain;
pub mod reading;
pub mod removal;
pub mod run_config;
pub mod run_flags;
pub mod run_folder;
pub mod safe_file;
pub mod security;
pub mod signals;
pub mod silence;

pub use counted::{agrees, counted, grouped, noun, thousands};
pub use fault::{ErrorCode, Fault, ReportLine};
pub use run_config::RunConfig;

/// Generated gRPC types of package `dyad.v1`.
#[allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    rust_2018_idioms,
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::too_many_lines,
    clippy::expect_used,
    reason = "generated code"
)]
pub mod wire {
    tonic::include_proto!("dyad.v1");
}

/// Increase whenever the wire format changes incompatibly.
pub const PROTOCOL_VERSION: u32 = 7;

/// Largest gRPC message either side accepts: a measure request of a few thousand long pairs fits.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// Longest line of a preference file in bytes. One pair must fit into one gRPC message.
pub const MAX_PAIR_BYTES: usize = MAX_MESSAGE_BYTES - (64 << 10);

/// Largest gRPC message that a trainer may send. Its longest message holds a score for each pair of a message of
/// [`MAX_MESSAGE_BYTES`]: less than 30 bytes for a pair that took more than 150.
pub const MAX_REPORT_BYTES: usize = 16 << 20;
