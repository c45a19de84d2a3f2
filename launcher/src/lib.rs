//! Starts the processes of a run on this machine, follows them, and shows what they do.
//!
//! - [`plan`]: what to start, purely from options and machine.
//! - [`numa`]: which cores each trainer keeps to.
//! - [`predict`]: what a run would need and cost, purely from sizes and published rates.
//! - [`preflight`]: what can be checked before anything starts.
//! - [`security`]: the run's own authority, certificates and join token.
//! - [`supervise`], [`children`]: processes that end together.
//! - [`console`], [`progress`], [`summary`], [`plot`]: what a person sees.

pub mod children;
pub mod cli;
pub mod console;
pub mod dry_run;
pub mod interrupt;
pub mod numa;
pub mod plan;
pub mod plot;
pub mod predict;
pub mod preflight;
pub mod progress;
pub mod rows;
pub mod security;
pub mod summary;
pub mod supervise;
