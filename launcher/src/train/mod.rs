//! A training run: options, checks, start, supervision, restarts.

pub mod dry_run;
pub mod events;
pub mod fit;
pub mod fleet;
pub mod interrupt;
pub mod options;
pub mod restart;
pub mod supervise;
