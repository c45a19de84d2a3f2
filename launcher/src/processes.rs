//! What is done to every process that is started here, by the launcher as by an agent.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use dyad_proto::ownership::Ownership;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::Command;

/// Keeps the process that the command starts, and all its threads, to some cores.
#[expect(unsafe_code, reason = "sched_setaffinity between fork and exec")]
pub fn keep_to(command: &mut Command, cores: &[usize]) {
    if cores.is_empty() {
        return;
    }
    // SAFETY: a zeroed set is a valid one; CPU_SET ignores what lies beyond it.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        cores.iter().for_each(|&core| libc::CPU_SET(core, &mut set));
        set
    };
    // SAFETY: one async-signal-safe call between fork and exec. Where the kernel refuses, the process runs anywhere.
    unsafe {
        command.pre_exec(move || {
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
            Ok(())
        });
    }
}

/// Makes the process that the command starts end with this one, however that ends, and with its own handle. It gets a group of its
/// own: Ctrl-C in the terminal reaches the launcher alone, which then stops everything in order.
#[expect(unsafe_code, reason = "prctl between fork and exec")]
pub fn die_with_me(command: &mut Command) {
    command.kill_on_drop(true).process_group(0);
    let parent = std::process::id();
    // SAFETY: only async-signal-safe calls between fork and exec.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            // The launcher may have died before the line above.
            if libc::getppid() as u32 != parent { Err(std::io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
        });
    }
}

/// Lets the process that the command starts keep a file open that is open here, and sets a variable that tells of it.
#[expect(unsafe_code, reason = "fcntl between fork and exec")]
pub fn hand_over(command: &mut Command, owner: &Ownership) {
    let Some((fd, variable)) = owner.to_hand_over() else { return };
    command.envs([variable]);
    // SAFETY: one async-signal-safe call between fork and exec, on a descriptor that is copied by the fork. The owner outlives the
    // command's start; where it did not, the call would fail and the process would take the folder itself.
    unsafe {
        command.pre_exec(move || {
            libc::fcntl(fd, libc::F_SETFD, 0);
            Ok(())
        });
    }
}

/// Hands lines on until the stream ends. By bytes: a line that is no UTF-8 must not end the log.
pub async fn each_line<R: AsyncRead + Unpin>(stream: R, mut take: impl FnMut(String)) {
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line).await.is_ok_and(|read| read > 0) {
        take(String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']).to_owned());
        line.clear();
    }
}

/// A process's end as wait(2) has it; where the kernel does not tell, it failed.
#[must_use]
pub fn raw_status(ended: std::io::Result<ExitStatus>) -> i32 {
    ended.map_or(1 << 8, ExitStatusExt::into_raw)
}

/// `killed by signal 9 (SIGKILL)` or `exit status 1`.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_told_in_words() {
        assert_eq!(end(ExitStatus::from_raw(11)), "killed by signal 11 (SIGSEGV)");
        assert_eq!(end(ExitStatus::from_raw(7 << 8)), "exit status 7");
    }
}
