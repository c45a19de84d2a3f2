//! Runs on another date: a preloaded library shifts `clock_gettime` of every process.

use std::path::PathBuf;
use std::process::Command;

use crate::Workspace;

const SOURCE: &str = r#"
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>
extern "C" int clock_gettime(clockid_t clock, timespec* time) noexcept {
  static auto real = reinterpret_cast<int (*)(clockid_t, timespec*)>(dlsym(RTLD_NEXT, "clock_gettime"));
  int status = real(clock, time);
  if (const char* shift = getenv("SHIFT_SECONDS"); shift && clock == CLOCK_REALTIME) time->tv_sec += atol(shift);
  return status;
}
"#;

/// Compiles the library into a workspace and returns its path.
pub fn shim(workspace: &Workspace) -> PathBuf {
    workspace.write("clock.cpp", SOURCE);
    let library = workspace.path("clock.so");
    let mut compiler = Command::new("g++");
    compiler.args(["-D_GNU_SOURCE", "-std=c++17", "-shared", "-fPIC", "-o"]).arg(&library);
    let output = compiler.arg(workspace.path("clock.cpp")).output().unwrap();
    assert!(output.status.success(), "{}", crate::text(&output));
    library
}

/// Shifts the clock of a command and of its child processes forward by `seconds`.
pub fn later(command: &mut Command, shim: &std::path::Path, seconds: i64) {
    command.env("LD_PRELOAD", shim).env("SHIFT_SECONDS", seconds.to_string());
}
