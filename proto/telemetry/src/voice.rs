//! How words leave a process: over a queue of bounded size, on a thread of their own.
//!
//! - V-1: nobody who speaks waits for whoever listens. A pipe that is not read or a terminal that stands still (Ctrl-S, a pager, a
//!   hung ssh) stops no run and delays no signal.
//! - V-2: what nobody reads is dropped, the oldest first, and once somebody reads again a line says how many lines that were.
//! - V-3: the end of a process waits for its last words as long as they leave, and no longer than [`PATIENCE`].

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use dyad_proto::plain;

use crate::LogFormat;
use crate::logs::json_line;

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
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    ahead: VecDeque<Words>,
    bytes: usize,
    /// Lines that nobody will read.
    dropped: u64,
    /// Something is on its way.
    writing: bool,
    /// How often something has left.
    left: u64,
}

#[derive(Debug)]
struct Words {
    text: Vec<u8>,
    /// Lines that are lost with these words: their own, none for a picture of a bar, and those a notice tells of.
    lines: u64,
}

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
        let shared = Arc::new(Shared::default());
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
        self.shared.add(Words { text: cut(text), lines });
    }

    /// Shows what the next picture takes the place of.
    pub fn show(&self, picture: Vec<u8>) {
        self.shared.add(Words { text: picture, lines: 0 });
    }

    /// Waits until all has left, while something leaves now and then, and no longer than `patience`. Says whether all has.
    pub fn flush(&self, patience: Duration) -> bool {
        self.shared.wait(patience)
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, words: Words) {
        let mut state = self.state();
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
            state.ahead.push_front(Words { text, lines });
        }
        drop(state);
        self.changed.notify_all();
    }

    /// The thread of its own: lives as long as the process.
    fn write_to(&self, stream: &File) {
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
            let _ = write_all(stream, &words.text);
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
    let words = format!("{dropped} lines are left out here: nobody read them in time");
    let line = match crate::last_words::format() {
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
        let shared = Shared::default();
        shared.add(Words { text: b"before".to_vec(), lines: 1 });
        shared.add(Words { text: many, lines: 2000 });
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
            match text.split_once(" lines are left out here") {
                Some((count, _)) => left_out += count.parse::<usize>().unwrap(),
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
        let shared = Shared::default();
        let add = |count: usize| {
            (0..count).for_each(|_| shared.add(Words { text: vec![b'x'; ROOM / 4], lines: 1 }));
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
