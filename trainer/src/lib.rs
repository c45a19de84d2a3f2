//! Libraries of the trainer process.
//!
//! - [`start`], [`run`], [`session`]: the process, and its stream to the coordinator.
//! - [`load`], [`checkpoint`], [`check`], [`facts`], [`generate`]: models in and out, and comparisons of what runs start from.
//! - [`engine`], [`zero`], [`optimizer`]: one optimizer step.
//! - [`model`], [`batch`], [`objective`], [`cost`]: what a pass computes, and what that costs.
//! - [`observe`]: measurements of the process.
//!
//! Everything of libtorch beyond tch, collectives included, is in `dyad_torch`.
// Tests may read files directly; all other code goes through `dyad_proto::files`.
#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

pub mod batch;
pub mod check;
pub mod checkpoint;
pub mod cli;
pub mod cost;
pub mod engine;
pub mod error;
pub mod facts;
pub mod generate;
pub mod load;
pub mod model;
pub mod objective;
pub mod observe;
pub mod optimizer;
pub mod run;
pub mod session;
pub mod start;
pub mod zero;
