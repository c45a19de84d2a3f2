//! Starts the processes of a run on this machine, follows them, and shows what they do.
//!
//! - [`plan`]: what to start, purely from options and machine.
//! - [`gpus`]: which GPUs are visible.
//! - [`numa`]: which cores each trainer keeps to.
//! - [`predict`]: what a run would need and cost, purely from sizes and published rates.
//! - [`node`]: the trainers of one node that a scheduler has placed.
//! - [`kubernetes`]: objects of a run, and what is done with them on a cluster.
//! - [`preflight`]: what can be checked before anything starts.
//! - [`security`]: the run's own authority, certificates and join token.
//! - [`supervise`], [`fleet`], [`children`]: processes that end together. [`allowance`]: how much they may say. [`processes`], [`programs`]: what each of them is.
//! - `events`: what the coordinator tells of the run.
//! - [`restart`]: whether a run that failed is started again.
//! - [`hosts`], [`agent`], [`slurm`]: the same on other machines. [`doctor`]: whether they are fit for it.
//! - [`console`], `live`, [`progress`], [`pace`], [`summary`], [`plot`], [`live_plot`]: what a person sees.
// Tests read what they wrote; all else goes through `dyad_proto::files`.
#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

pub mod agent;
pub mod allowance;
pub mod children;
pub mod cli;
pub mod collapse;
pub mod console;
pub mod doctor;
pub mod dry_run;
mod events;
pub mod fit;
pub mod fleet;
pub mod gpus;
pub mod hosts;
pub mod interrupt;
pub mod kubernetes;
mod live;
pub mod live_plot;
pub mod look;
pub mod node;
pub mod numa;
pub mod pace;
pub mod plan;
pub mod plot;
pub mod predict;
pub mod preflight;
pub mod processes;
pub mod programs;
pub mod progress;
pub mod quickstart;
pub mod restart;
pub mod rows;
pub mod security;
pub mod slurm;
pub mod summary;
pub mod supervise;
