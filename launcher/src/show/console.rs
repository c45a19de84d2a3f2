//! The terminal: one progress view at the bottom, log lines above it; plain lines where standard error is no terminal.
//!
//! All but what a command was asked for leaves by a [`voice`]: nobody who reads slowly, or not at all, stops the run.

use std::io::{IsTerminal, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dyad_proto::{Fault, called, plain};
use dyad_telemetry::{LogFormat, voice};

use crate::show::collapse::Collapse;
pub use crate::show::collapse::Speaker;
use crate::show::live::{self, Count, Passed, View};

/// Lines between two progress reports are spaced so that a run prints about this many.
const PLAIN_REPORTS: u64 = 20;
/// How long a log line waits for other ranks to say the same.
const HOLD: Duration = Duration::from_millis(200);

/// What stands at the bottom of the terminal, and since when.
#[derive(Debug)]
struct Shown {
    view: View,
    begun: Instant,
    /// When the last step was done.
    step: Instant,
}

impl Shown {
    fn new(view: View) -> Self {
        let now = Instant::now();
        Self { view, begun: now, step: now }
    }

    fn passed(&self) -> Passed {
        Passed { all: self.begun.elapsed(), step: self.step.elapsed() }
    }
}

/// Shared by everything that prints; cheap to clone.
#[derive(Clone, Debug)]
pub struct Console {
    shown: Arc<Mutex<Option<Shown>>>,
    terminal: bool,
    verbose: bool,
    /// Log lines that others may still repeat.
    held: Arc<Mutex<Collapse>>,
    /// Lines are JSON objects.
    json: bool,
}

impl Console {
    /// On standard error.
    #[must_use]
    pub fn new(verbose: bool, format: LogFormat) -> Self {
        let json = format == LogFormat::Json;
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let terminal = !json && !dumb && std::io::stderr().is_terminal();
        let colour = terminal && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty());
        let held = Arc::new(Mutex::new(Collapse::new(colour)));
        Self { shown: Arc::default(), terminal, verbose, held, json }
    }

    /// A line for the reader, after all that was said before.
    pub fn line(&self, text: &str) {
        self.flush(None);
        self.print(text);
    }

    /// Shows log lines that nobody has repeated for a while, and the view as it is now, until the task is dropped. The view is drawn for
    /// the width that the terminal has at that moment, so that nothing is left of what was there before it was resized.
    pub async fn show_held(self) {
        let mut ticks = tokio::time::interval(HOLD / 2);
        loop {
            ticks.tick().await;
            self.flush(Instant::now().checked_sub(HOLD));
            self.draw();
        }
    }

    /// Shows log lines that are held since then, or all.
    fn flush(&self, before: Option<Instant>) {
        let lines = self.held.lock().unwrap_or_else(PoisonError::into_inner).take(before);
        lines.iter().for_each(|line| self.print(line));
    }

    fn print(&self, text: &str) {
        if self.json {
            return tracing::info!("{text}");
        }
        voice::stderr().line(&plain::coloured(text));
        self.draw();
    }

    /// A log line of a child: shown when it warns, or always with --verbose; once where several say the same.
    pub fn log(&self, speaker: &Speaker, line: &str) {
        if !self.shows(line) {
            return;
        }
        match self.json {
            false => {
                let line = plain::line(line);
                self.held.lock().unwrap_or_else(PoisonError::into_inner).add(Instant::now(), speaker, &line);
            }
            // Already an object; its target says whose it is.
            true => {
                voice::stderr().line(line);
            }
        }
    }

    /// Whether a child's line is for a reader here.
    #[must_use]
    pub fn shows(&self, line: &str) -> bool {
        let json = |level: &str| line.contains(level) && line.starts_with('{');
        let bad = match self.json {
            false => line.contains(" WARN ") || line.contains(" ERROR "),
            true => json("\"level\":\"WARN\"") || json("\"level\":\"ERROR\""),
        };
        self.verbose || bad
    }

    /// What is going on while there is nothing to count.
    pub fn status(&self, text: &str) {
        if !self.terminal {
            return self.line(text);
        }
        let text = plain::line(text).into_owned();
        let mut shown = self.shown();
        match shown.as_mut().map(|shown| &mut shown.view) {
            // Steps are counted already: phases and data are reported independently.
            Some(View::Counting(count)) => count.message = text,
            Some(View::Doing(doing)) => *doing = text,
            None => *shown = Some(Shown::new(View::Doing(text))),
        }
        drop(shown);
        self.draw();
    }

    /// Starts counting optimizer steps.
    pub fn count(&self, done: u64, total: u64) {
        let count = Count { done, total, left: None, message: String::new() };
        *self.shown() = Some(Shown::new(View::Counting(count)));
        self.draw();
    }

    /// One more step is done; so much time is left, where that is known.
    pub fn step(&self, step: u64, total: u64, left: Option<Duration>, message: &str) {
        let mut held = self.shown();
        let shown = held.get_or_insert_with(|| Shown::new(View::Doing(String::new())));
        let message = plain::line(message).into_owned();
        shown.view = View::Counting(Count { done: step, total, left, message: message.clone() });
        shown.step = Instant::now();
        let clock = live::clock(shown.begun.elapsed(), left);
        drop(held);
        // The view is drawn at the next tick: steps may be faster than eyes.
        let every = total.div_ceil(PLAIN_REPORTS).max(1);
        if !self.terminal && (step == 1 || step == total || step.is_multiple_of(every)) {
            self.line(&format!("step {step}/{total}  {clock}  {message}"));
        }
    }

    /// Takes the progress view away.
    pub fn clear(&self) {
        self.flush(None);
        self.shown().take();
        self.draw();
    }

    fn shown(&self) -> MutexGuard<'_, Option<Shown>> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn draw(&self) {
        if self.terminal {
            let shown = self.shown();
            let line = shown.as_ref().map(|shown| live::line(&shown.view, shown.passed(), live::width()));
            voice::stderr().show(&line.unwrap_or_default());
        }
    }
}

/// To standard output: what a command was asked for.
pub fn print(text: &str) -> Result<(), Fault> {
    let mut out = std::io::stdout();
    out.write_all(called::commands(&plain::lines(text)).as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| Fault::failed(format!("cannot write to standard output: {error}")))
}

/// What comes next, between empty lines on standard error.
pub fn heading(text: &str) {
    voice::stderr().line(&format!("\n{}\n", called::commands(&plain::lines(text))));
}

/// What there is to say of a run that is complete, to standard output: whether somebody reads it changes nothing. Where log lines are
/// JSON it is among them.
pub async fn tell(text: &str) {
    if dyad_telemetry::format() == LogFormat::Json {
        text.lines().filter(|line| !line.is_empty()).for_each(|line| tracing::info!("{line}"));
        return;
    }
    let text = called::commands(&plain::lines(text)).into_owned();
    let told = tokio::task::spawn_blocking(move || {
        // What came before comes first, also where both streams are one.
        voice::stderr().flush(voice::PATIENCE);
        voice::stdout().say(text.into_bytes());
        voice::stdout().flush(voice::PATIENCE)
    });
    let _ = told.await;
}

/// To standard error: what may matter, and ends nothing.
pub fn warn(text: &str) {
    match dyad_telemetry::format() {
        LogFormat::Json => tracing::warn!("{text}"),
        LogFormat::Text => {
            voice::stderr().line(&called::commands(&format!("warning: {}", plain::line(text))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_that_is_reported_late_does_not_take_the_count_away() {
        let console = Console { terminal: true, ..Console::new(false, LogFormat::Text) };
        console.status("loading the model");
        console.count(3, 10);
        console.status("connecting the trainers");
        let counting = |done, left, message: &str| {
            let count = Count { done, total: 10, left, message: message.to_owned() };
            Some(View::Counting(count))
        };
        let view = || console.shown().as_ref().map(|shown| shown.view.clone());
        assert_eq!(view(), counting(3, None, "connecting the trainers"));
        let left = Some(Duration::from_secs(5));
        console.step(4, 10, left, "loss 0.5");
        assert_eq!(view(), counting(4, left, "loss 0.5"));
        console.clear();
        assert_eq!(view(), None);
    }
}
