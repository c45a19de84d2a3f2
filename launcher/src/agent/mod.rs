//! The node agent: `launcher agent` on each host starts and watches processes there for a launcher somewhere else.
//!
//! - LNC-A1: when its standard input closes, or the launcher is silent for too long, everything that it started is killed.
//! - LNC-A2: its standard output holds protocol lines alone.
//!
//! [`protocol`]: what is said. [`machine`]: what the host offers. [`ports`]: who reaches whom. [`serve`]: the agent itself.

pub mod facts;
pub mod machine;
pub mod ports;
pub mod protocol;
pub mod run_files;
pub mod serve;
