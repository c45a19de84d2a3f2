//! Starts the processes of a run, follows them, and shows what they do.
//!
//! - [`cli`]: the command line. [`train`]: a run from its options to its end. [`node`], [`quickstart`], [`doctor`], [`slurm`],
//!   [`kubernetes`], [`predict`] (`launcher plan`): the other commands.
//! - [`hosts`]: processes here and on other hosts. [`agent`]: this program on another host, and what it finds there.
//! - [`placement`]: which trainer computes where. [`process`]: Dyad's programs as processes. [`security`]: certificates and join token.
//! - [`show`]: terminal, summary, plot.
// Tests read what they wrote; all else goes through `dyad_proto::files`.
#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

pub mod agent;
pub mod cli;
pub mod doctor;
pub mod hosts;
pub mod kubernetes;
pub mod node;
pub mod placement;
pub mod predict;
pub mod process;
pub mod quickstart;
pub mod security;
pub mod show;
pub mod slurm;
pub mod train;
