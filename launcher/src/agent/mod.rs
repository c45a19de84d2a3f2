//! The node agent: `launcher agent` on each host starts and watches processes for a launcher on another machine.
//!
//! - LNC-A1: when its standard input closes, or the launcher is silent for too long, it kills all processes that it started.
//! - LNC-A2: its standard output holds only protocol lines.
//!
//! [`protocol`]: messages. [`machine`]: resources of the host. [`facts`]: facts for `launcher doctor`. [`ports`]: reachability of
//! addresses. [`run_files`]: checks of a run's files. [`serve`]: the agent itself.

pub mod facts;
pub mod machine;
pub mod ports;
pub mod protocol;
pub mod run_files;
pub mod serve;
