//! Errors of libtorch.
#![expect(unsafe_code, reason = "messages that the bridge allocates")]

use std::ffi::CStr;

use crate::ffi::{RawError, free};

/// What libtorch said, without its backtrace.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct TorchError(pub String);

/// Turns the bridge's error convention into a `Result`, freeing the message.
pub(crate) fn check(raw: RawError) -> Result<(), TorchError> {
    if raw.is_null() {
        return Ok(());
    }
    // SAFETY: the bridge hands out either null or a malloc'ed, NUL-terminated string that is ours to free, once.
    unsafe {
        let message = CStr::from_ptr(raw).to_string_lossy().trim().to_owned();
        free(raw.cast());
        Err(TorchError(message))
    }
}
