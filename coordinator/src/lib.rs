//! The coordinator: owns one run, holds no tensor.
//!
//! - [`run`]: decisions. A state machine without network, clock and threads: events in, commands out.
//! - [`files`]: the output folder, the store of reference log-probabilities, TensorBoard's file.
//! - [`wire`]: who may connect and call.
//! - [`observe`]: metrics for Prometheus, traces of steps.
//! - [`engine`]: owns the state machine; hands it events and carries out its commands. [`complete`] takes its place where a run is
//!   complete already.
//! - [`handle`]: a run as those see it who serve it: watch, status, send, end.
//! - [`server`], [`service`], [`health`], [`watch`], [`print`]: gRPC, and the events of a run for watchers and logs.
//! - [`cli`] reads flags.
// Tests read what they wrote; all else goes through `dyad_proto::files`.
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
