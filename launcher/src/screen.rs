//! Where the progress view is drawn: into pictures that leave by a [`voice`], so that a terminal which stands still stops nobody.

use std::io;
use std::sync::{Mutex, PoisonError};

use dyad_telemetry::voice;
use indicatif::{ProgressDrawTarget, TermLike};

/// Pictures a second, as indicatif has it for terminals.
const RATE: u8 = 20;
/// Where the terminal does not tell its size.
const SIZE: (u16, u16) = (24, 80);

/// What is drawn until it is shown.
#[derive(Debug, Default)]
pub(crate) struct Screen(Mutex<Vec<u8>>);

impl Screen {
    /// Standard error, which must be a terminal.
    pub(crate) fn target() -> ProgressDrawTarget {
        ProgressDrawTarget::term_like_with_hz(Box::new(Self::default()), RATE)
    }

    fn draw(&self, text: &str) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(text.as_bytes());
        Ok(())
    }

    fn go(&self, steps: usize, direction: char) -> io::Result<()> {
        if steps == 0 { Ok(()) } else { self.draw(&format!("\u{1b}[{steps}{direction}")) }
    }
}

/// Rows and columns.
fn size() -> (u16, u16) {
    match rustix::termios::tcgetwinsize(io::stderr()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => (size.ws_row, size.ws_col),
        _ => SIZE,
    }
}

impl TermLike for Screen {
    fn width(&self) -> u16 {
        size().1
    }

    fn height(&self) -> u16 {
        size().0
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        self.go(n, 'A')
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.go(n, 'B')
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        self.go(n, 'C')
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        self.go(n, 'D')
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.draw(text)?;
        self.draw("\n")
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        self.draw(text)
    }

    fn clear_line(&self) -> io::Result<()> {
        self.draw("\r\u{1b}[2K")
    }

    fn flush(&self) -> io::Result<()> {
        let picture = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        if !picture.is_empty() {
            voice::stderr().show(picture);
        }
        Ok(())
    }
}
