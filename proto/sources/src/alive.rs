//! Progress signals of long work, so that a watchdog can tell slow work from a hang.

use std::sync::OnceLock;

use dyad_proto::reading;

static MARK: OnceLock<fn()> = OnceLock::new();

/// Registers a function that is called after every piece of long work, from any thread. Only the first registration counts.
pub fn tell(mark: fn()) {
    let _ = MARK.set(mark);
}

/// Signals that a piece of work is done.
pub fn advance() {
    reading::goes_on();
    if let Some(mark) = MARK.get() {
        mark();
    }
}
