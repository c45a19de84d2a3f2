//! Starts the processes of a run, follows them, and shows what they do.
//!
//! - [`cli`]: the command line. [`train`]: a training run. [`node`], [`quickstart`], [`doctor`], [`slurm`], [`kubernetes`],
//!   [`evaluate`],
//!   [`predict`] (`launcher plan`): the other commands.
//! - [`hosts`]: processes on this machine and on other hosts. [`agent`]: the node agent on each host, and its protocol.
//! - [`placement`]: device, cores and threads of each trainer. [`process`]: Dyad's programs as processes. [`security`]: certificates
//!   and join token.
//! - [`show`]: terminal, summary, plot.
// Only tests may use `std::fs` to read; other code uses `dyad_proto::files`.
#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

pub mod agent;
pub mod cli;
pub mod doctor;
pub mod evaluate;
pub mod hosts;
pub mod inspect;
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
