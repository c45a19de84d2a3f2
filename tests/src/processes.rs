//! Finds, signals and watches the processes of a run.

use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// Upper bound on every wait, so that a test fails instead of hanging.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A process of a run.
#[derive(Clone, Debug)]
pub struct Process {
    /// Process id.
    pub pid: i32,
    /// Command line, joined by spaces.
    pub command: String,
}

/// Kills the process when the test's thread ends, even if it panics: leftover processes would slow later tests.
#[expect(unsafe_code, reason = "prctl between fork and exec")]
pub fn die_with_me(command: &mut Command) {
    // SAFETY: two async-signal-safe calls between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            // nohup ignores SIGHUP; tests of a closed terminal need the default.
            libc::signal(libc::SIGHUP, libc::SIG_DFL);
            Ok(())
        });
    }
}

/// Waits until `condition` returns a value, and returns it. Panics after [`PATIENCE`].
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Direct children of a process.
pub fn children(parent: &Child) -> Vec<Process> {
    let parent = parent.id().to_string();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        // Fields after the parenthesised name: state, parent.
        let ppid = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1));
        if ppid == Some(parent.as_str()) {
            let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            found.push(Process { pid, command });
        }
    }
    found
}

/// Sends a signal. Panics if the process is gone.
#[expect(unsafe_code, reason = "kill")]
fn signal(pid: i32, signal: i32) {
    // SAFETY: a plain system call.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0, "process {pid} is gone already");
}

/// Sends SIGKILL.
pub fn kill_9(pid: i32) {
    signal(pid, libc::SIGKILL);
}

/// Sends SIGINT, as Ctrl-C does.
pub fn interrupt(pid: i32) {
    signal(pid, libc::SIGINT);
}

/// Sends SIGTERM.
pub fn terminate(pid: i32) {
    signal(pid, libc::SIGTERM);
}

/// Sends SIGQUIT; Dyad's processes then end at once.
pub fn quit(pid: i32) {
    signal(pid, libc::SIGQUIT);
}

/// Sends SIGHUP, as a terminal does that closes.
pub fn hang_up(pid: i32) {
    signal(pid, libc::SIGHUP);
}

/// Suspends a process with SIGSTOP.
pub fn stop(pid: i32) {
    signal(pid, libc::SIGSTOP);
}

/// Resumes a process suspended by [`stop`].
pub fn go_on(pid: i32) {
    signal(pid, libc::SIGCONT);
}

/// Stops the main thread of a process, or the thread called `name`, while the other threads run. Returns once it is stopped. The
/// returned thread ends when the process does.
#[expect(unsafe_code, reason = "ptrace")]
pub fn hold_thread(pid: i32, name: Option<&str>) -> std::thread::JoinHandle<()> {
    let thread = name.map_or(pid, |name| thread_of(pid, name));
    let (stands, stood) = std::sync::mpsc::channel();
    // Only the tracing thread gets its stop events. It must reap the thread's end before the parent can reap the process.
    let holder = std::thread::spawn(move || {
        let null = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: plain system calls on a thread of a process of this test's.
        unsafe {
            assert_eq!(libc::ptrace(libc::PTRACE_SEIZE, thread, null, null), 0);
            assert_eq!(libc::ptrace(libc::PTRACE_INTERRUPT, thread, null, null), 0);
        }
        let mut status = 0;
        // SAFETY: as above, with an out-pointer.
        while unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL) } == thread
            && libc::WIFSTOPPED(status)
        {
            let _ = stands.send(());
        }
    });
    stood.recv().unwrap();
    holder
}

/// Returns the id of the thread called `name`.
fn thread_of(pid: i32, name: &str) -> i32 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let is = |path: &std::path::Path| {
        std::fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim() == name)
    };
    let task = tasks.map(|task| task.path()).find(|path| is(path)).unwrap();
    task.file_name().unwrap().to_string_lossy().parse().unwrap()
}

/// Waits until a process with piped stderr ends. Returns its exit status and its stderr.
pub fn outcome(process: &mut Child) -> (Option<i32>, String) {
    let mut error = String::new();
    process.stderr.take().unwrap().read_to_string(&mut error).unwrap();
    (process.wait().unwrap().code(), error)
}

/// A handle to wait for the end of a process that need not be a child.
#[derive(Debug)]
pub struct Watch {
    fd: OwnedFd,
    process: Process,
}

impl Watch {
    /// Opens a handle. Panics if the process is gone.
    #[expect(unsafe_code, reason = "pidfd_open")]
    pub fn on(process: &Process) -> Self {
        // SAFETY: returns a new file descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, process.pid, 0) };
        assert!(fd >= 0, "{process:?} is gone already");
        // SAFETY: the descriptor is new and ours.
        Self { fd: unsafe { OwnedFd::from_raw_fd(fd as i32) }, process: process.clone() }
    }

    /// Waits until the process is gone. Panics after [`PATIENCE`].
    #[expect(unsafe_code, reason = "poll")]
    pub fn wait_gone(&self) {
        let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one live pollfd.
        let ready = unsafe { libc::poll(&raw mut poll, 1, PATIENCE.as_millis() as i32) };
        assert_eq!(ready, 1, "still there: {:?}", self.process);
    }
}
