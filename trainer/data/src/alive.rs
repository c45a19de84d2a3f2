//! Signs that long work in this crate gets on, for whoever watches over the process: what only takes long must not look like what
//! stands still.

use std::sync::OnceLock;

static MARK: OnceLock<fn()> = OnceLock::new();

/// From now on this is called with every piece of long work that is done, from any thread. Who comes first is told.
pub fn tell(mark: fn()) {
    let _ = MARK.set(mark);
}

/// A piece is done.
pub(crate) fn advance() {
    if let Some(mark) = MARK.get() {
        mark();
    }
}
