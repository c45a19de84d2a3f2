//! A terminal: a pseudo-terminal of the kernel, and an emulator that renders the output as a real terminal does.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use alacritty_terminal::Term;
use alacritty_terminal::event::VoidListener;
use alacritty_terminal::grid::Dimensions;
use alacritty_terminal::index::{Column, Line};
use alacritty_terminal::term::Config;
use alacritty_terminal::term::cell::Flags;
use alacritty_terminal::term::test::TermSize;
use alacritty_terminal::vte::ansi::Processor;

/// How a terminal treats long lines when it becomes narrower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Narrowing {
    /// Wraps them over more rows, as most terminals do.
    Reflows,
    /// Drops the text beyond the new width, as xterm does.
    Cuts,
}

/// A terminal with its current screen.
#[derive(Debug)]
pub struct Terminal {
    screen: Arc<Mutex<Screen>>,
    master: File,
    reader: JoinHandle<()>,
}

struct Screen {
    term: Term<VoidListener>,
    parser: Processor,
}

impl std::fmt::Debug for Screen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Screen")
    }
}

const LINES: usize = 24;

fn window(columns: usize) -> libc::winsize {
    libc::winsize { ws_row: LINES as u16, ws_col: columns as u16, ws_xpixel: 0, ws_ypixel: 0 }
}

impl Terminal {
    /// Sends Ctrl-S: writes of the program block from now on.
    pub fn stop_output(&mut self) {
        self.master.write_all(b"\x13").unwrap();
    }

    /// Starts a program whose stdout and stderr are a terminal of this width.
    pub fn run(mut command: Command, columns: usize, narrowing: Narrowing) -> (Self, Child) {
        let (master, slave) = open(columns);
        command.env("TERM", "xterm-256color").env_remove("NO_COLOR");
        command.stdout(Stdio::from(slave.try_clone().unwrap())).stderr(Stdio::from(slave));
        let child = command.spawn().unwrap();
        // Close our last handle of the slave, so that reading ends when the program does.
        drop(command);
        let term = Term::new(Config::default(), &TermSize::new(columns, LINES), VoidListener);
        let screen = Arc::new(Mutex::new(Screen { term, parser: Processor::new() }));
        if narrowing == Narrowing::Cuts {
            // The emulator cuts lines on its alternate screen.
            screen.lock().unwrap().write(b"\x1b[?1049h");
        }
        // Start at the bottom, as on a terminal in use: rows that rewrapping scrolls off the top cannot be erased.
        screen.lock().unwrap().write("\r\n".repeat(LINES).as_bytes());
        let (mut from, to) = (master.try_clone().unwrap(), Arc::clone(&screen));
        let reader = std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            // Reading fails once the slave is closed.
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                to.lock().unwrap().write(&bytes[..count]);
            }
        });
        (Self { screen, master, reader }, child)
    }

    /// Changes the width of the pseudo-terminal and of the emulator.
    #[expect(unsafe_code, reason = "ioctl")]
    pub fn resize(&self, columns: usize) {
        let mut screen = self.screen();
        let size = window(columns);
        // SAFETY: one live structure of the kind that the call reads.
        let done = unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        assert_eq!(done, 0);
        screen.term.resize(TermSize::new(columns, LINES));
    }

    fn screen(&self) -> MutexGuard<'_, Screen> {
        self.screen.lock().unwrap()
    }

    /// Returns all rows that are not empty, with the rows that have scrolled away.
    pub fn rows(&self) -> Vec<String> {
        self.screen().filled()
    }

    /// Returns all lines as they were written: the rows of a wrapped line are joined.
    pub fn lines(&self) -> Vec<String> {
        self.screen().lines()
    }

    /// Waits until all output is on the screen, and returns the screen. The program must have ended.
    pub fn settle(self) -> Settled {
        let Self { screen, reader, master: _master } = self;
        reader.join().unwrap();
        let screen = screen.lock().unwrap();
        Settled { rows: screen.filled(), lines: screen.lines() }
    }
}

/// The final contents of the screen.
#[derive(Debug)]
pub struct Settled {
    /// As [`Terminal::rows`].
    pub rows: Vec<String>,
    /// As [`Terminal::lines`].
    pub lines: Vec<String>,
}

impl Screen {
    fn write(&mut self, bytes: &[u8]) {
        self.parser.advance(&mut self.term, bytes);
    }

    fn filled(&self) -> Vec<String> {
        self.rows().into_iter().map(|(text, _)| text).filter(|text| !text.is_empty()).collect()
    }

    fn lines(&self) -> Vec<String> {
        let mut lines = vec![String::new()];
        for (text, goes_on) in self.rows() {
            lines.last_mut().unwrap().push_str(&text);
            if !goes_on {
                lines.push(String::new());
            }
        }
        lines.retain(|line| !line.is_empty());
        lines
    }

    /// Returns all rows, oldest first, each with whether its line continues in the next row.
    fn rows(&self) -> Vec<(String, bool)> {
        let grid = self.term.grid();
        let (first, end) = (-(grid.history_size() as i32), grid.screen_lines() as i32);
        let last = Column(grid.columns() - 1);
        let row = |line: i32| {
            let row = &grid[Line(line)];
            let cells = (0..grid.columns()).map(|column| &row[Column(column)]);
            let seen = cells.filter(|cell| !cell.flags.contains(Flags::WIDE_CHAR_SPACER));
            let goes_on = row[last].flags.contains(Flags::WRAPLINE);
            let text: String = seen.map(|cell| cell.c).collect();
            let text = if goes_on { text } else { text.trim_end().to_owned() };
            (text, goes_on)
        };
        (first..end).map(row).collect()
    }
}

/// Opens a pseudo-terminal and returns its master and slave.
#[expect(unsafe_code, reason = "openpty")]
fn open(columns: usize) -> (File, OwnedFd) {
    let (mut master, mut slave) = (0, 0);
    let mut size = window(columns);
    let null = std::ptr::null_mut();
    // SAFETY: out-pointers to live integers, a live size; name and settings may be null.
    let opened =
        unsafe { libc::openpty(&raw mut master, &raw mut slave, null, std::ptr::null_mut(), &raw mut size) };
    assert_eq!(opened, 0);
    // SAFETY: both descriptors are new and ours.
    unsafe {
        libc::fcntl(master, libc::F_SETFD, libc::FD_CLOEXEC);
        libc::fcntl(slave, libc::F_SETFD, libc::FD_CLOEXEC);
        (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave))
    }
}
