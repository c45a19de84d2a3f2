//! Non-blocking output to standard error and standard output: a bounded queue, written by a thread of its own.
//!
//! - TEL-V1: writing to the queue never waits for the reader. A pipe that is not read or a blocked terminal (Ctrl-S, a pager, a hung ssh)
//!   stops no run and delays no signal.
//! - TEL-V2: if the queue is full, the oldest text is dropped. When the reader continues, a line tells the number of dropped lines.
//! - TEL-V3: lines appear above the picture (the progress line at the bottom of a terminal); earlier pictures are erased.
//! - TEL-V4: before a process ends, it waits for queued text while some is being written, and no longer than [`PATIENCE`].

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use dyad_proto::{agrees, counted, plain};

use crate::log_format::{LogFormat, format, json_line};

/// Maximum bytes in the queue; the newest text may exceed it.
const ROOM: usize = 1 << 20;
/// Maximum bytes of a line in a text that is longer than this.
const LONGEST_LINE: usize = 64 << 10;
/// Maximum time that [`Voice::flush`] waits at the end of a process.
pub const PATIENCE: Duration = Duration::from_secs(3);
/// [`Voice::flush`] gives up if nothing was written for this long.
const STANDSTILL: Duration = Duration::from_secs(1);
/// Time between two tries on a non-blocking stream.
const PAUSE: Duration = Duration::from_millis(20);

/// Non-blocking output to one stream.
#[derive(Debug)]
pub struct Voice {
    shared: Arc<SharedQueue>,
}

#[derive(Debug, Default)]
struct SharedQueue {
    state: Mutex<QueueState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct QueueState {
    ahead: VecDeque<QueuedText>,
    bytes: usize,
    /// Number of dropped lines, not reported yet.
    dropped: u64,
    /// The thread is writing a text.
    writing: bool,
    /// Number of texts written.
    left: u64,
}

#[derive(Debug, PartialEq, Eq)]
struct QueuedText {
    text: Vec<u8>,
    /// Dropped lines to report if this text is dropped: its own lines; 0 for a picture; for a notice, the number that it reports.
    lines: u64,
    /// The text is a picture: the next text erases it.
    picture: bool,
}

impl QueuedText {
    fn lines(text: Vec<u8>, lines: u64) -> Self {
        Self { text, lines, picture: false }
    }

    /// Bytes for the stream; `picture` says whether a picture is on the terminal now.
    fn on_top_of(self, picture: bool) -> Vec<u8> {
        let mut out = if picture { ERASE.to_vec() } else { Vec::new() };
        match self.picture && !self.text.is_empty() {
            true => {
                [CLIPPED, self.text.as_slice(), PARKED].iter().for_each(|part| out.extend_from_slice(part))
            }
            false => out.extend(self.text),
        }
        out
    }
}

/// Clears the terminal from the cursor on. The cursor rests at the picture's first column, so it stays before the whole picture even if
/// a narrower terminal wraps it over several rows.
const ERASE: &[u8] = b"\r\x1b[J";
/// Turns wrapping off: the terminal may become narrower before the picture arrives.
const CLIPPED: &[u8] = b"\x1b[?7l";
const PARKED: &[u8] = b"\r\x1b[?7h";

/// Standard error of this process.
pub fn stderr() -> &'static Voice {
    static VOICE: OnceLock<Voice> = OnceLock::new();
    VOICE.get_or_init(|| Voice::over(io::stderr().as_fd().try_clone_to_owned().ok().map(File::from)))
}

/// Standard output of this process, for text that may be dropped.
pub fn stdout() -> &'static Voice {
    static VOICE: OnceLock<Voice> = OnceLock::new();
    VOICE.get_or_init(|| Voice::over(io::stdout().as_fd().try_clone_to_owned().ok().map(File::from)))
}

impl Voice {
    /// Output to a stream; without a stream, all text is dropped.
    fn over(stream: Option<File>) -> Self {
        let shared = Arc::new(SharedQueue::default());
        if let Some(stream) = stream {
            let of_thread = Arc::clone(&shared);
            // If the thread cannot be started, text is queued and finally dropped.
            let _ =
                std::thread::Builder::new().name("words".into()).spawn(move || of_thread.write_to(&stream));
        }
        Self { shared }
    }

    /// Queues a line; adds the line end.
    pub fn line(&self, text: &str) {
        self.say(format!("{text}\n").into_bytes());
    }

    /// Queues whole lines.
    pub fn say(&self, text: Vec<u8>) {
        let lines = text.iter().filter(|byte| **byte == b'\n').count() as u64;
        self.shared.add(QueuedText::lines(cut(text), lines));
    }

    /// Shows a line at the bottom of a terminal, cut at its width, until the next call replaces it; an empty one removes it.
    pub fn show(&self, picture: &str) {
        self.shared.add(QueuedText { text: picture.into(), lines: 0, picture: true });
    }

    /// Waits until the queue is written, at most `patience`; gives up earlier if nothing is written for a second. Returns whether all
    /// text was written.
    pub fn flush(&self, patience: Duration) -> bool {
        self.shared.wait(patience)
    }
}

impl SharedQueue {
    fn state(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, words: QueuedText) {
        let mut state = self.state();
        // Replace a picture that was not written yet.
        if words.picture && state.ahead.back().is_some_and(|last| last.picture) {
            let unseen = state.ahead.pop_back().map_or(0, |unseen| unseen.text.len());
            state.bytes -= unseen;
        }
        state.bytes += words.text.len();
        state.ahead.push_back(words);
        // Keep the newest text, whatever its length: it may be the error that ends the process.
        while state.bytes > ROOM && state.ahead.len() > 1 {
            let Some(oldest) = state.ahead.pop_front() else { break };
            state.bytes -= oldest.text.len();
            state.dropped += oldest.lines;
        }
        self.changed.notify_all();
    }

    fn wait(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut state = self.state();
        let mut seen = (state.left, Instant::now());
        while state.writing || !state.ahead.is_empty() {
            let now = Instant::now();
            if state.left != seen.0 {
                seen = (state.left, now);
            }
            let until = deadline.min(seen.1 + STANDSTILL);
            if now >= until {
                return false;
            }
            state = self.changed.wait_timeout(state, until - now).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Called after each write. A completed write shows that the stream is being read, so this queues the notice about dropped lines. If
    /// the notice is dropped too, its count is reported later.
    fn written(&self) {
        let mut state = self.state();
        (state.writing, state.left) = (false, state.left + 1);
        if state.dropped > 0 {
            let lines = std::mem::take(&mut state.dropped);
            let text = notice(lines);
            state.bytes += text.len();
            state.ahead.push_front(QueuedText::lines(text, lines));
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Body of the writing thread; never returns.
    fn write_to(&self, stream: &File) {
        let mut picture = false;
        loop {
            let mut state = self.state();
            while state.ahead.is_empty() {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            let Some(words) = state.ahead.pop_front() else { continue };
            state.bytes -= words.text.len();
            state.writing = true;
            drop(state);
            // Ignore errors (closed stream, full disk): this text is lost, but later writes may succeed.
            let up = words.picture && !words.text.is_empty();
            let _ = write_all(stream, &words.on_top_of(std::mem::replace(&mut picture, up)));
            self.written();
        }
    }
}

/// Cuts the middle out of overlong lines.
fn cut(text: Vec<u8>) -> Vec<u8> {
    if text.len() <= LONGEST_LINE {
        return text;
    }
    let mut kept = Vec::with_capacity(text.len().min(ROOM));
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        if line.len() <= LONGEST_LINE {
            kept.extend_from_slice(line);
            continue;
        }
        let line = String::from_utf8_lossy(line);
        kept.extend_from_slice(plain::cut(&line, LONGEST_LINE).as_bytes());
    }
    kept
}

fn notice(dropped: u64) -> Vec<u8> {
    let (lines, are) = (counted(dropped, "line"), agrees(dropped, "is", "are"));
    let words = format!("{lines} {are} left out here: the output was not read in time");
    let line = match format() {
        LogFormat::Text => words,
        LogFormat::Json => {
            let fields = [("message".to_owned(), words.into())];
            json_line("WARN", "dyad_telemetry", fields.into_iter().collect())
        }
    };
    (line + "\n").into_bytes()
}

/// Writes everything, also if another process has made the stream non-blocking.
fn write_all(mut stream: &File, mut text: &[u8]) -> io::Result<()> {
    while !text.is_empty() {
        match stream.write(text) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => text = &text[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(PAUSE),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Writer for `tracing`, which writes every event in one call.
#[derive(Debug)]
pub(crate) struct Lines;

impl Write for Lines {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        stderr().say(text.to_vec());
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::OwnedFd;

    use super::*;

    fn pipe() -> (io::PipeReader, Voice) {
        let (reader, writer) = io::pipe().unwrap();
        (reader, Voice::over(Some(File::from(OwnedFd::from(writer)))))
    }

    #[test]
    fn an_overlong_line_loses_only_its_middle() {
        let line = |length: usize| format!("error: {}: the end\n", "x".repeat(length)).into_bytes();
        let kept = cut([line(3 * ROOM), line(5)].concat());
        let text = String::from_utf8(kept).unwrap();
        assert!(text.starts_with("error: xxx") && text.ends_with(": the end\nerror: xxxxx: the end\n"));
        assert!(text.contains(" more bytes] ") && text.len() < 2 * LONGEST_LINE);
        // A long text of short lines is neither cut nor dropped.
        let many = line(1000).repeat(2000);
        assert_eq!(cut(many.clone()), many);
        let shared = SharedQueue::default();
        shared.add(QueuedText::lines(b"before".to_vec(), 1));
        shared.add(QueuedText::lines(many, 2000));
        let state = shared.state();
        assert_eq!((state.ahead.len(), state.dropped), (1, 1));
    }

    #[test]
    fn text_arrives_in_order_and_flush_waits_for_it() {
        let (mut reader, voice) = pipe();
        (0..50).for_each(|number| voice.line(&number.to_string()));
        assert!(voice.flush(PATIENCE));
        let mut text = vec![0; 140];
        reader.read_exact(&mut text).unwrap();
        let expected: Vec<String> = (0..50).map(|number| number.to_string()).collect();
        assert_eq!(String::from_utf8(text).unwrap(), expected.join("\n") + "\n");
    }

    #[test]
    fn the_next_text_erases_a_picture_and_only_the_last_picture_is_kept() {
        let shared = SharedQueue::default();
        let picture = |text: &str| QueuedText { text: text.into(), lines: 0, picture: true };
        for words in
            [picture("1"), picture("2"), QueuedText::lines(b"line\n".to_vec(), 1), picture("3"), picture("")]
        {
            shared.add(words);
        }
        let ahead: Vec<QueuedText> = shared.state().ahead.drain(..).collect();
        assert_eq!(ahead, [picture("2"), QueuedText::lines(b"line\n".to_vec(), 1), picture("")]);
        assert_eq!(shared.state().bytes, 6);
        assert_eq!(picture("2").on_top_of(false), b"\x1b[?7l2\r\x1b[?7h");
        assert_eq!(picture("").on_top_of(true), ERASE);
        assert_eq!(QueuedText::lines(b"line\n".to_vec(), 1).on_top_of(true), b"\r\x1b[Jline\n");
        assert_eq!(QueuedText::lines(b"line\n".to_vec(), 1).on_top_of(false), b"line\n");
    }

    #[test]
    fn an_unread_pipe_does_not_block_and_dropped_lines_are_counted() {
        let (reader, voice) = pipe();
        let line = "x".repeat(1023);
        let said = 4096;
        (0..said).for_each(|_| voice.line(&line));
        voice.line("the last words");
        assert!(!voice.flush(Duration::from_millis(10)));
        // The pipe is read again.
        let mut lines = io::BufRead::lines(io::BufReader::new(reader)).map_while(Result::ok);
        let (mut whole, mut left_out) = (0, 0);
        for text in lines.by_ref() {
            match text.split_once(" left out here") {
                Some((words, _)) => left_out += words.split(' ').next().unwrap().parse::<usize>().unwrap(),
                None if text == line => whole += 1,
                None => {
                    assert_eq!(text, "the last words");
                    break;
                }
            }
        }
        assert!(left_out > 0 && whole > 0);
        assert_eq!(whole + left_out, said);
    }

    #[test]
    fn a_dropped_notice_gives_its_count_back() {
        let shared = SharedQueue::default();
        let add = |count: usize| {
            (0..count).for_each(|_| shared.add(QueuedText::lines(vec![b'x'; ROOM / 4], 1)));
        };
        add(6);
        assert_eq!(shared.state().dropped, 2);
        shared.written();
        assert_eq!(shared.state().dropped, 0, "the notice waits");
        add(1);
        // The notice (for 2 lines) and one line were dropped.
        assert_eq!(shared.state().dropped, 2 + 1);
    }

    #[test]
    fn writing_to_a_closed_stream_does_not_fail() {
        let (reader, voice) = pipe();
        drop(reader);
        voice.line("to nobody");
        assert!(voice.flush(PATIENCE));
        let nowhere = Voice::over(None);
        nowhere.line("to nobody");
        assert!(!nowhere.flush(Duration::from_millis(10)));
    }
}
