//! Processor time and memory of a process or thread, read from `/proc`.

use std::path::Path;

/// Ticks per second in `/proc/*/stat` on Linux.
const TICKS: f64 = 100.0;

/// Returns processor seconds, user and system, from a `stat` file below `/proc`.
pub(crate) fn cpu_seconds(stat: &Path) -> f64 {
    let text = std::fs::read_to_string(stat).unwrap();
    let fields: Vec<&str> = text.rsplit(')').next().unwrap().split_whitespace().collect();
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / TICKS
}

/// Returns the largest resident set so far, in MiB.
pub(crate) fn peak_memory(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1024.0
}
