//! How a process of a run ended, and how many of its lines are buffered.

use dyad_proto::Fault;

/// Buffered lines between a process and its log. If the buffer is full, the process blocks.
pub const LINES: usize = 256;

/// How a process ended.
#[derive(Clone, Debug)]
pub enum End {
    /// With this status, as wait(2) returns it.
    Status(i32),
    /// Without a known status: its host is lost, or it could not be started there.
    Lost(Fault),
}
