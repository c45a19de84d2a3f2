//! Libraries of the trainer process.
//!
//! - [`cli`], [`start`], [`run`], [`session`]: the command line, the life of the process, and its stream to the coordinator.
//! - [`load`], [`checkpoint`], [`generate`], [`sampler`]: loading, saving and asking models.
//! - [`check`], [`facts`]: checks of a run's inputs, and facts by which ranks are compared.
//! - [`engine`], [`zero`], [`optimizer`], [`error`]: one optimizer step.
//! - [`model`], [`batch`], [`objective`], [`cost`]: what a pass computes, and what that costs.
//! - [`observe`]: measurements of the process.
//!
//! `dyad_torch` holds everything of libtorch that tch lacks, and the collectives.
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
pub mod sampler;
pub mod session;
pub mod start;
pub mod zero;
