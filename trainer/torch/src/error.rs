//! Errors of libtorch.
#![expect(unsafe_code, reason = "messages that the bridge allocates")]

use std::ffi::CStr;

use crate::ffi::{RawError, free};

/// An error message of libtorch, without its C++ backtrace.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct TorchError(pub String);

/// Turns the bridge's error convention into a `Result` and frees the message.
pub(crate) fn check(raw: RawError) -> Result<(), TorchError> {
    if raw.is_null() {
        return Ok(());
    }
    // SAFETY: the bridge returns null or a malloc'ed, NUL-terminated string that the caller frees once.
    unsafe {
        let message = CStr::from_ptr(raw).to_string_lossy().trim().to_owned();
        free(raw.cast());
        Err(TorchError(message))
    }
}
