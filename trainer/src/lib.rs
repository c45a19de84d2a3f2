//! Libraries of the trainer process.
//!
//! - [`model`], [`lora`], [`batch`], [`cost`], [`objective`]: what a pass computes.
//! - [`engine`], [`parameters`], [`layout`], [`unit_weights`], [`optimizer`], [`schedule`], [`memory`]: one optimizer step.
//! - [`rendezvous`]: how ranks meet. Everything of libtorch beyond tch, collectives included, is in `dyad_torch`.
//! - [`load`], [`loading`], [`checkpoint`], [`generate`], [`check`], [`facts`]: models in and out, and what a start is held against.
//! - [`profile`], [`timing`], [`trace`], [`utilisation`], [`gpu_meter`], [`progress`]: measurements.
//! - [`connect`], [`session`], [`feed`], [`drain`], [`start`], [`run`], [`signals`]: the process, and its stream to the
//!   coordinator.
// Tests read what they wrote; all else goes through `dyad_proto::files`.
#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

pub mod batch;
pub mod check;
pub mod checkpoint;
pub mod cli;
pub mod connect;
pub mod cost;
pub mod drain;
pub mod engine;
pub mod error;
pub mod facts;
pub mod feed;
pub mod generate;
pub mod gpu_meter;
pub mod layout;
pub mod load;
pub mod loading;
pub mod lora;
pub mod memory;
pub mod model;
pub mod objective;
pub mod optimizer;
pub mod parameters;
pub mod profile;
pub mod progress;
pub mod rendezvous;
pub mod run;
pub mod schedule;
pub mod session;
pub mod signals;
pub mod start;
pub mod timing;
pub mod trace;
pub mod unit_weights;
pub mod utilisation;
