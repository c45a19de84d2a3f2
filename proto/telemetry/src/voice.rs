//! How words leave a process: over a queue of bounded size, on a thread of their own.
//!
//! - TEL-V1: nobody who speaks waits for whoever listens. A pipe that is not read or a terminal that stands still (Ctrl-S, a pager, a
//!   hung ssh) stops no run and delays no signal.
//! - TEL-V2: what nobody reads is dropped, the oldest first, and once somebody reads again a line says how many lines that were.
//! - TEL-V3: lines stand above the picture at the bottom of a terminal, and nothing of an earlier picture is left.
//! - TEL-V4: the end of a process waits for its last words as long as they leave, and no longer than [`PATIENCE`].

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use dyad_proto::{agrees, counted, plain};

use crate::log_format::{LogFormat, format, json_line};

/// Bytes that wait at most, beside the words that came last.
const ROOM: usize = 1 << 20;
/// Longest line of words that are long.
const LONGEST_LINE: usize = 64 << 10;
/// Longest that somebody waits for words to leave.
pub const PATIENCE: Duration = Duration::from_secs(3);
/// As long may pass without any of them leaving.
const STANDSTILL: Duration = Duration::from_secs(1);
/// Between two tries where the stream is one that does not wait.
const PAUSE: Duration = Duration::from_millis(20);

/// One stream that words leave on.
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
    /// Lines that nobody will read.
    dropped: u64,
    /// Something is on its way.
    writing: bool,
    /// How often something has left.
    left: u64,
}

#[derive(Debug, PartialEq, Eq)]
struct QueuedText {
    text: Vec<u8>,
    /// Lines that are lost with these words: their own, none for a picture, and those a notice tells of.
    lines: u64,
    /// What the next picture takes the place of.
    picture: bool,
}

impl QueuedText {
    fn lines(text: Vec<u8>, lines: u64) -> Self {
        Self { text, lines, picture: false }
    }

    /// As they go to the stream, where a picture is up or not.
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

/// From the cursor's row on, the terminal is empty. The cursor waits at the picture's first column: where a terminal that has become
/// narrower breaks the picture over several rows, the cursor stays before all of it.
const ERASE: &[u8] = b"\r\x1b[J";
/// What does not fit is cut off, not wrapped: a terminal may become narrower while the picture is on its way.
const CLIPPED: &[u8] = b"\x1b[?7l";
const PARKED: &[u8] = b"\r\x1b[?7h";

/// Standard error of this process.
pub fn stderr() -> &'static Voice {
    static VOICE: OnceLock<Voice> = OnceLock::new();
    VOICE.get_or_init(|| Voice::over(io::stderr().as_fd().try_clone_to_owned().ok().map(File::from)))
}

/// Standard output of this process, for what may be dropped.
pub fn stdout() -> &'static Voice {
    static VOICE: OnceLock<Voice> = OnceLock::new();
    VOICE.get_or_init(|| Voice::over(io::stdout().as_fd().try_clone_to_owned().ok().map(File::from)))
}

impl Voice {
    /// Over a stream; without one, words vanish.
    fn over(stream: Option<File>) -> Self {
        let shared = Arc::new(SharedQueue::default());
        if let Some(stream) = stream {
            let of_thread = Arc::clone(&shared);
            // Where no thread can be started, words wait and are dropped in turn.
            let _ =
                std::thread::Builder::new().name("words".into()).spawn(move || of_thread.write_to(&stream));
        }
        Self { shared }
    }

    /// Says a line; its end is added.
    pub fn line(&self, text: &str) {
        self.say(format!("{text}\n").into_bytes());
    }

    /// Says whole lines.
    pub fn say(&self, text: Vec<u8>) {
        let lines = text.iter().filter(|byte| **byte == b'\n').count() as u64;
        self.shared.add(QueuedText::lines(cut(text), lines));
    }

    /// Shows a line at the bottom of a terminal, no wider than that, until the next one takes its place; an empty one takes it away.
    pub fn show(&self, picture: &str) {
        self.shared.add(QueuedText { text: picture.into(), lines: 0, picture: true });
    }

    /// Waits until all has left, while something leaves now and then, and no longer than `patience`. Says whether all has.
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
        // Of pictures that nobody has seen yet the last one is enough.
        if words.picture && state.ahead.back().is_some_and(|last| last.picture) {
            let unseen = state.ahead.pop_back().map_or(0, |unseen| unseen.text.len());
            state.bytes -= unseen;
        }
        state.bytes += words.text.len();
        state.ahead.push_back(words);
        // The last one stays, however long it is: it may be all that a process says.
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

    /// Words have left: only now is it known that somebody reads, and what was dropped is told. A notice that is dropped in its turn
    /// gives its count back.
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

    /// The thread of its own: lives as long as the process.
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
            // A stream that is closed, or a full disk: these words are lost, the next ones may not be.
            let up = words.picture && !words.text.is_empty();
            let _ = write_all(stream, &words.on_top_of(std::mem::replace(&mut picture, up)));
            self.written();
        }
    }
}

/// Whole lines, without the middle of one that nobody would read to its end.
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
    let words = format!("{lines} {are} left out here: nobody read in time");
    let line = match format() {
        LogFormat::Text => words,
        LogFormat::Json => {
            let fields = [("message".to_owned(), words.into())];
            json_line("WARN", "dyad_telemetry", fields.into_iter().collect())
        }
    };
    (line + "\n").into_bytes()
}

/// Also where another process has made the stream one that does not wait.
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

/// For `tracing`: every event is one write.
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
    fn a_line_without_measure_loses_its_middle_and_never_itself() {
        let line = |length: usize| format!("error: {}: the end\n", "x".repeat(length)).into_bytes();
        let kept = cut([line(3 * ROOM), line(5)].concat());
        let text = String::from_utf8(kept).unwrap();
        assert!(text.starts_with("error: xxx") && text.ends_with(": the end\nerror: xxxxx: the end\n"));
        assert!(text.contains(" more bytes] ") && text.len() < 2 * LONGEST_LINE);
        // Many lines are not one long line; nor are they dropped when they come at once.
        let many = line(1000).repeat(2000);
        assert_eq!(cut(many.clone()), many);
        let shared = SharedQueue::default();
        shared.add(QueuedText::lines(b"before".to_vec(), 1));
        shared.add(QueuedText::lines(many, 2000));
        let state = shared.state();
        assert_eq!((state.ahead.len(), state.dropped), (1, 1));
    }

    #[test]
    fn words_arrive_in_order_and_the_end_waits_for_them() {
        let (mut reader, voice) = pipe();
        (0..50).for_each(|number| voice.line(&number.to_string()));
        assert!(voice.flush(PATIENCE));
        let mut text = vec![0; 140];
        reader.read_exact(&mut text).unwrap();
        let expected: Vec<String> = (0..50).map(|number| number.to_string()).collect();
        assert_eq!(String::from_utf8(text).unwrap(), expected.join("\n") + "\n");
    }

    #[test]
    fn a_picture_goes_before_whatever_comes_next_and_only_the_last_one_is_kept() {
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
    fn a_pipe_that_nobody_reads_stops_nobody_and_what_was_dropped_is_counted() {
        let (reader, voice) = pipe();
        let line = "x".repeat(1023);
        let said = 4096;
        (0..said).for_each(|_| voice.line(&line));
        voice.line("the last words");
        assert!(!voice.flush(Duration::from_millis(10)));
        // Somebody reads again.
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
    fn a_notice_that_is_dropped_itself_gives_its_count_back() {
        let shared = SharedQueue::default();
        let add = |count: usize| {
            (0..count).for_each(|_| shared.add(QueuedText::lines(vec![b'x'; ROOM / 4], 1)));
        };
        add(6);
        assert_eq!(shared.state().dropped, 2);
        shared.written();
        assert_eq!(shared.state().dropped, 0, "the notice waits");
        add(1);
        // The notice and the line behind it made room.
        assert_eq!(shared.state().dropped, 2 + 1);
    }

    #[test]
    fn a_stream_that_is_closed_ends_nothing() {
        let (reader, voice) = pipe();
        drop(reader);
        voice.line("to nobody");
        assert!(voice.flush(PATIENCE));
        let nowhere = Voice::over(None);
        nowhere.line("to nobody");
        assert!(!nowhere.flush(Duration::from_millis(10)));
    }
}
