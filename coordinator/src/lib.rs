//! The coordinator: owns the state of one run; holds no tensor.
//!
//! - [`run`]: decisions. A state machine without network, clock or threads: events in, commands out.
//! - [`files`]: the output folder, the store of reference log-probabilities, TensorBoard's file.
//! - [`wire`]: who may connect and call.
//! - [`observe`]: metrics for Prometheus, traces of steps.
//! - [`engine`]: owns the state machine; hands it events and carries out its commands. [`complete`] replaces it if the run is
//!   complete already.
//! - [`handle`]: the interface to a run for gRPC, HTTP, signals and the printer: watch, status, send, end.
//! - [`server`], [`service`], [`health`], [`watch`], [`print`]: gRPC, and the events of a run for watchers and logs.
//! - [`cli`]: the command line.
// Tests read files directly; all other code goes through `dyad_proto::files`.
#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

pub mod cli;
pub mod complete;
pub mod engine;
pub mod files;
pub mod handle;
pub mod health;
pub mod observe;
pub mod print;
pub mod run;
pub mod server;
pub mod service;
pub mod watch;
pub mod wire;
