//! Progress of this process in reading files. Lets a watchdog distinguish a slow disk from a hanging one.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

static PARTS: AtomicU64 = AtomicU64::new(0);
static LAST: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Notes that a file is about to be opened.
pub fn opens(path: &Path) {
    *LAST.lock().unwrap_or_else(PoisonError::into_inner) = Some(path.to_owned());
    goes_on();
}

/// Notes that one more part of a file was read or processed.
pub fn goes_on() {
    PARTS.fetch_add(1, Ordering::Relaxed);
}

/// Number of parts so far. It grows as long as reading goes on.
#[must_use]
pub fn parts() -> u64 {
    PARTS.load(Ordering::Relaxed)
}

/// The file that was opened last.
#[must_use]
pub fn last_opened() -> Option<PathBuf> {
    LAST.lock().unwrap_or_else(PoisonError::into_inner).clone()
}
