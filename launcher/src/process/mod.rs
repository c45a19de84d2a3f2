//! Processes of this machine: Dyad's programs, how they end, how much they may log.

pub mod end;
pub mod log_allowance;
pub mod os;
pub mod programs;
pub mod trainer_check;
