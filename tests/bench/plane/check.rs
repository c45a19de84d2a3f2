//! `launcher check` on a large file.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use dyad_tests::binary;

/// Largest resident set so far, in MiB; `None` for a process that has ended.
fn resident(pid: u32) -> Option<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().trim_end_matches(" kB").parse::<f64>().ok()? / 1024.0)
}

/// Measures how `launcher check` reads every record of a file, beside `cat` reading it.
pub(crate) fn measure(data: &Path, pairs: usize) -> Vec<(String, String)> {
    let mib = std::fs::metadata(data).unwrap().len() as f64 / f64::from(1 << 20);
    let start = Instant::now();
    let read = Command::new("cat").arg(data).stdout(Stdio::null()).status().unwrap();
    assert!(read.success());
    let reading = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let mut child =
        Command::new(binary("launcher")).arg("check").arg(data).stdout(Stdio::null()).spawn().unwrap();
    let mut peak = 0.0_f64;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        peak = peak.max(resident(child.id()).unwrap_or(0.0));
        std::thread::sleep(Duration::from_millis(20));
    };
    let checking = start.elapsed().as_secs_f64();
    assert!(status.success(), "launcher check found errors");
    vec![
        (
            format!("launcher check, {pairs} pairs, {mib:.0} MiB"),
            format!("{checking:.2} s, {:.0} MiB/s (cat: {reading:.2} s)", mib / checking),
        ),
        ("its peak memory".into(), format!("{peak:.0} MiB")),
    ]
}
