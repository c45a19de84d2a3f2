//! Signals that whoever started this process wants it to ignore.

/// Whether a signal was ignored when this process began, as `nohup` does with SIGHUP: then it stays ignored. To be asked before
/// anything listens for the signal.
#[must_use]
pub fn is_ignored(signal: i32) -> bool {
    crate::files::of_kernel("/proc/self/status").is_ok_and(|status| ignores(&status, signal))
}

/// From now on a file that grows beyond the limit of its size (`ulimit -f`) is an error of whoever writes it, and kills nobody.
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
    fn a_file_that_may_not_grow_is_an_error() {
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
