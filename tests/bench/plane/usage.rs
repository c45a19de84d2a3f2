//! What a process or thread has used, as the kernel tells it.

use std::path::Path;

/// Ticks of a second in `/proc/*/stat` on Linux.
const TICKS: f64 = 100.0;

/// Processor seconds, user and system, of a `stat` file below `/proc`.
pub(crate) fn cpu_seconds(stat: &Path) -> f64 {
    let text = std::fs::read_to_string(stat).unwrap();
    let fields: Vec<&str> = text.rsplit(')').next().unwrap().split_whitespace().collect();
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / TICKS
}

/// Largest resident set so far, in MiB.
pub(crate) fn peak_memory(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1024.0
}
