//! What Dyad's processes share: the wire types, the run configuration, the data format and the closed set of errors.
//!
//! - [`wire`]: generated from `proto/dyad/v1/dyad.proto`; the only types that cross process borders.
//! - [`run_config`]: one file, one check; the launcher reads it, the coordinator keeps it, trainers get it at join.
//! - [`pairs`]: preference pairs, the forms of data that say them, and the files that hold them.
//! - [`ownership`]: one run at a time in an output folder.
//! - [`inputs`]: what a run reads must not lie where it writes.
//! - [`files`]: regular files, and nothing that has no end.
//! - [`folder`]: the output folder, told from another one that took its place.
//! - [`run_folder`]: what a run leaves in its output folder.
//! - [`removal`]: folders that go or are replaced, without what is not Dyad's.
//! - [`manifest`]: size and checksum of every file of a checkpoint.
//! - [`fingerprint`]: what a run computes, kept in its checkpoints so that a resume is the same run.
//! - [`finished`]: a run that is complete.
//! - [`counted`]: counts with nouns that agree with them.
//! - [`plain`]: text of somebody else's, as it may be shown.
//! - [`safe_file`]: files that are written without following anybody's links.
//! - [`security`]: certificates, keys and tokens of a process, and the way to the coordinator.
//! - [`signals`]: those that stay ignored.
//! - [`fault`]: an error with a hint, its code and its exit status.
// Tests read what they wrote; all else goes through `dyad_proto::files`.
#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

pub mod called;
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

/// Raised whenever the wire changes in a way that an older process would misread.
pub const PROTOCOL_VERSION: u32 = 6;

/// How long a coordinator waits, after its run, for one last scrape of its metrics, unless it is told otherwise: a little more than the
/// 30 s that many installations of Prometheus leave between two.
pub const LAST_SCRAPE_SECONDS: u64 = 35;

/// Largest gRPC message either side accepts: a measure request of a few thousand long pairs fits.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// Longest line of a preference file: a message that carries one pair alone must take it.
pub const MAX_PAIR_BYTES: usize = MAX_MESSAGE_BYTES - (64 << 10);

/// Largest gRPC message that a trainer may send. Its longest answers a message of [`MAX_MESSAGE_BYTES`] with a score for each
/// pair in it: under 30 bytes for a pair whose text takes more than 150.
pub const MAX_REPORT_BYTES: usize = 16 << 20;
