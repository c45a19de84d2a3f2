//! Process setup (pinning, parent death, lock), reading of output and exit statuses, for launcher and agent.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use dyad_proto::ownership::Ownership;
use dyad_proto::{agrees, counted};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::Command;
use tokio::sync::mpsc;

use crate::process::log_allowance::LONGEST_LINE;

/// Pins the command's process and all its threads to these cores; does nothing if the list is empty.
#[expect(unsafe_code, reason = "sched_setaffinity between fork and exec")]
pub fn keep_to(command: &mut Command, cores: &[usize]) {
    if cores.is_empty() {
        return;
    }
    // SAFETY: zeroes are a valid set; CPU_SET ignores cores beyond its size.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        cores.iter().for_each(|&core| libc::CPU_SET(core, &mut set));
        set
    };
    // SAFETY: one async-signal-safe call between fork and exec. If it fails, the process runs on all cores.
    unsafe {
        command.pre_exec(move || {
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
            Ok(())
        });
    }
}

/// The kernel kills the command's process when the thread that started it ends; dropping its handle kills it too. It gets its own process
/// group: Ctrl-C in the terminal reaches only the launcher, which then stops all processes in order.
#[expect(unsafe_code, reason = "prctl between fork and exec")]
pub fn die_with_me(command: &mut Command) {
    command.kill_on_drop(true).process_group(0);
    let parent = std::process::id();
    // SAFETY: only async-signal-safe calls between fork and exec.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            // The parent may have died before the line above.
            if libc::getppid() as u32 != parent { Err(std::io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
        });
    }
}

/// Lets the command's process inherit the open lock file, and sets the variable that names its descriptor.
#[expect(unsafe_code, reason = "fcntl between fork and exec")]
pub fn hand_over(command: &mut Command, owner: &Ownership) {
    let Some((fd, variable)) = owner.to_hand_over() else { return };
    command.envs([variable]);
    // SAFETY: one async-signal-safe call between fork and exec. The owner outlives the start, so the descriptor is open; if it were not,
    // the call would fail and the process would take the lock itself.
    unsafe {
        command.pre_exec(move || {
            libc::fcntl(fd, libc::F_SETFD, 0);
            Ok(())
        });
    }
}

/// Sends each line of the stream until it ends. Stops reading while the channel is full, which blocks the writing process. If the channel
/// is closed, it reads on and drops the lines, so that the process never blocks. Invalid UTF-8 is replaced; it must not end the log.
pub async fn each_line<R: AsyncRead + Unpin, T>(stream: R, to: &mpsc::Sender<T>, wrap: impl Fn(String) -> T) {
    let mut reader = BufReader::new(stream);
    let mut lines = OutputLines::default();
    while let Ok(bytes) = reader.fill_buf().await
        && !bytes.is_empty()
    {
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let used = end.map_or(bytes.len(), |end| end + 1);
        let done = [lines.add(&bytes[..end.unwrap_or(used)]), end.map(|_| lines.end())];
        reader.consume(used);
        for line in done.into_iter().flatten() {
            let _ = to.send(wrap(line)).await;
        }
    }
    if !lines.is_empty() {
        let _ = to.send(wrap(lines.end())).await;
    }
}

/// Splits bytes into lines. For a line above [`LONGEST_LINE`] it returns the beginning at once, and at its end the number of dropped bytes.
#[derive(Debug, Default)]
struct OutputLines {
    line: Vec<u8>,
    /// Dropped bytes of a line that is too long; `None` while the line fits.
    missing: Option<usize>,
}

impl OutputLines {
    /// Adds bytes of the current line. Returns its beginning when it becomes too long.
    fn add(&mut self, bytes: &[u8]) -> Option<String> {
        if let Some(missing) = &mut self.missing {
            *missing += bytes.len();
            return None;
        }
        let room = bytes.len().min(LONGEST_LINE - self.line.len());
        self.line.extend_from_slice(&bytes[..room]);
        if room == bytes.len() {
            return None;
        }
        self.missing = Some(bytes.len() - room);
        Some(format!("{} [the line goes on]", self.text()))
    }

    /// Ends the line; returns it, or the number of dropped bytes.
    fn end(&mut self) -> String {
        match self.missing.take() {
            Some(missing) => left_out(missing),
            None => self.text(),
        }
    }

    fn is_empty(&self) -> bool {
        self.line.is_empty() && self.missing.is_none()
    }

    fn text(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.line).trim_end_matches('\r').to_owned();
        self.line.clear();
        text
    }
}

/// Status as wait(2) returns it; exit status 1 if waiting failed.
#[must_use]
pub fn raw_status(ended: std::io::Result<ExitStatus>) -> i32 {
    ended.map_or(1 << 8, ExitStatusExt::into_raw)
}

/// Text for messages: `killed by signal 9 (SIGKILL), …` or `exit status 1`.
#[must_use]
pub fn end(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(libc::SIGKILL), _) => {
            "killed by signal 9 (SIGKILL), for example by the kernel when memory runs out".into()
        }
        (Some(libc::SIGSEGV), _) => "killed by signal 11 (SIGSEGV)".into(),
        (Some(signal), _) => format!("killed by signal {signal}"),
        (None, code) => format!("exit status {}", code.unwrap_or(-1)),
    }
}

fn left_out(bytes: usize) -> String {
    format!("[{} of that line {} left out]", counted(bytes, "more byte"), agrees(bytes, "was", "were"))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn lines_of(bytes: &[u8]) -> Vec<String> {
        let (to, mut lines) = mpsc::channel(100);
        each_line(bytes, &to, |line| line).await;
        drop(to);
        let mut all = Vec::new();
        while let Some(line) = lines.recv().await {
            all.push(line);
        }
        all
    }

    #[tokio::test]
    async fn all_lines_arrive_even_empty_or_invalid_utf8() {
        assert_eq!(lines_of(b"a\r\n\nb\xff\nlast").await, ["a", "", "b\u{fffd}", "last"]);
        assert_eq!(lines_of(b"").await, [] as [&str; 0]);
    }

    #[tokio::test]
    async fn long_lines_are_cut_and_dropped_bytes_are_counted() {
        let long =
            [vec![b'x'; 3 * LONGEST_LINE + 5], b"\nnext\n".to_vec(), vec![b'y'; LONGEST_LINE + 1]].concat();
        let lines = lines_of(&long).await;
        let beginning = |letter: &str| format!("{} [the line goes on]", letter.repeat(LONGEST_LINE));
        let expected =
            [beginning("x"), left_out(2 * LONGEST_LINE + 5), "next".into(), beginning("y"), left_out(1)];
        assert_eq!(lines, expected);
        assert_eq!(left_out(1), "[1 more byte of that line was left out]");
        assert_eq!(left_out(2), "[2 more bytes of that line were left out]");
        let just = [b'z'; LONGEST_LINE];
        assert_eq!(lines_of(&just).await, ["z".repeat(LONGEST_LINE)]);
    }

    #[test]
    fn exit_statuses_are_described() {
        assert_eq!(end(ExitStatus::from_raw(11)), "killed by signal 11 (SIGSEGV)");
        assert_eq!(end(ExitStatus::from_raw(7 << 8)), "exit status 7");
    }
}
