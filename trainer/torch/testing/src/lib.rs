//! What GPUs run, on CPUs: plain kernels behind the operators that libtorch has on CUDA devices alone, and the bridge's kernels for GPUs
//! compiled for the host. Shows that they compute what they should and how they are called; not that a GPU runs them.
//!
//! A crate of its own, which only tests depend on: none of it is in a program.
#![expect(unsafe_code, reason = "foreign functions of the test kernels")]

use std::ffi::{CStr, c_char};
use std::sync::Once;

unsafe extern "C" {
    fn dyad_fake_gpu() -> *mut c_char;
    fn dyad_host_kernels();
}

/// Puts the kernels in place, once, for the rest of the process.
///
/// # Panics
/// Where libtorch refuses to register them.
pub fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: registers kernels; a message is NUL-terminated, and may leak in a test that fails.
        let message = unsafe { dyad_fake_gpu() };
        // SAFETY: as above.
        let text = |message| unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned();
        assert!(message.is_null(), "{}", text(message));
        // SAFETY: nothing is computed yet.
        unsafe { dyad_host_kernels() };
    });
}
