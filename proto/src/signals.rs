//! Ignored signals.

/// Whether this process ignores a signal, as `nohup` makes it ignore SIGHUP; such a signal should stay ignored. Call this before
/// installing a handler.
#[must_use]
pub fn is_ignored(signal: i32) -> bool {
    crate::files::of_kernel("/proc/self/status").is_ok_and(|status| ignores(&status, signal))
}

/// Ignores SIGXFSZ: a write beyond the file size limit (`ulimit -f`) then returns an error instead of killing the process.
#[expect(unsafe_code, reason = "signal")]
pub fn ignore_size_limit() {
    // SAFETY: ignoring a signal installs no handler.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

fn ignores(status: &str, signal: i32) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    (1..=64).contains(&signal) && mask >> (signal - 1) & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signal_of_the_file_size_limit_is_ignored() {
        ignore_size_limit();
        assert!(is_ignored(libc::SIGXFSZ));
    }

    #[test]
    fn the_mask_of_ignored_signals_is_read_bit_by_bit() {
        let status =
            "Name:\tx\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000001001\nSigCgt:\t00000000000004e8\n";
        assert!(ignores(status, 1) && ignores(status, 13));
        assert!(!ignores(status, 2) && !ignores(status, 15) && !ignores(status, 0) && !ignores("", 1));
        // Rust's own start ignores SIGPIPE.
        assert!(is_ignored(13) && !is_ignored(15));
    }
}
