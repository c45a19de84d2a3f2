//! Runs GPU code paths on CPUs: plain CPU kernels for operators that libtorch has on CUDA devices only, and the bridge's GPU kernels
//! compiled for the host. Tests check with it how kernels are called and what they compute, but not that a GPU runs them.
//!
//! A separate crate that only tests depend on, so that programs contain none of it.
#![expect(unsafe_code, reason = "foreign functions of the test kernels")]

use std::ffi::{CStr, c_char};
use std::sync::Once;

unsafe extern "C" {
    fn dyad_fake_gpu() -> *mut c_char;
    fn dyad_host_kernels();
}

/// Registers the kernels once, for the rest of the process.
///
/// # Panics
/// If libtorch cannot register them.
pub fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: registers kernels; a message is NUL-terminated, and may leak because the test fails.
        let message = unsafe { dyad_fake_gpu() };
        // SAFETY: as above.
        let text = |message| unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned();
        assert!(message.is_null(), "{}", text(message));
        // SAFETY: nothing is computed yet.
        unsafe { dyad_host_kernels() };
    });
}

/// Runs these unit tests of the calling test program again, once for each older instruction set that the kernels have loops for.
///
/// # Panics
/// If one of them fails, or if there is no test of that name.
pub fn run_with_older_instruction_sets(tests: &[&str]) {
    for capability in ["avx2", "default"] {
        let output = std::process::Command::new(std::env::current_exe().unwrap_or_default())
            .arg("--exact")
            .args(tests)
            .env("DYAD_CPU_CAPABILITY", capability)
            .output();
        let output = output.unwrap_or_else(|error| panic!("the test program cannot be started: {error}"));
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{capability}: {said}");
        assert!(
            said.contains(&format!(" {} passed", tests.len())),
            "{capability}: some have other names: {said}"
        );
    }
}
