//! How a process of a run ends, and how many of its lines may wait.

use dyad_proto::Fault;

/// Lines on their way from a process to its log. A process that writes faster waits: nothing piles up here.
pub const LINES: usize = 256;

/// How a process ended.
#[derive(Clone, Debug)]
pub enum End {
    /// With this status, as wait(2) has it.
    Status(i32),
    /// Nobody knows: its host is lost, or it could not be started there.
    Lost(Fault),
}
