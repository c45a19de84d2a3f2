//! Processes on this machine: finding Dyad's programs, starting them, their ends, limits of their logs.

pub mod end;
pub mod log_allowance;
pub mod os;
pub mod programs;
pub mod trainer_check;
