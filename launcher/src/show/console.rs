//! The terminal: a progress view at the bottom, log lines above it. Plain lines if standard error is no terminal.
//!
//! Everything except [`print`] is written through a [`voice`], so a slow or absent reader never blocks the run.

use std::io::{IsTerminal, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dyad_proto::{Fault, called, plain};
use dyad_telemetry::{LogFormat, has_colours, voice};

use crate::show::collapse::Collapse;
pub use crate::show::collapse::Speaker;
use crate::show::live::{self, Count, Passed, View};

/// Without a terminal, a run prints about this many progress lines.
const PLAIN_REPORTS: u64 = 20;
/// How long a log line is held back because other ranks may print the same.
const HOLD: Duration = Duration::from_millis(200);

/// The view at the bottom of the terminal, and its times.
#[derive(Debug)]
struct Shown {
    view: View,
    begun: Instant,
    /// End of the last step.
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
    /// Log lines that other ranks may still repeat.
    held: Arc<Mutex<Collapse>>,
    /// Lines are JSON objects.
    json: bool,
}

impl Console {
    /// A console on standard error.
    #[must_use]
    pub fn new(verbose: bool, format: LogFormat) -> Self {
        let json = format == LogFormat::Json;
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let terminal = !json && !dumb && std::io::stderr().is_terminal();
        let colour = has_colours(terminal, std::env::var_os("NO_COLOR").as_deref());
        let held = Arc::new(Mutex::new(Collapse::new(colour)));
        Self { shown: Arc::default(), terminal, verbose, held, json }
    }

    /// Prints a line, after all held lines.
    pub fn line(&self, text: &str) {
        self.flush(None);
        self.print(text);
    }

    /// Until the task is dropped: prints log lines whose hold time is over, and redraws the view. Each redraw reads the terminal's width,
    /// so nothing of the old view is left after a resize.
    pub async fn show_held(self) {
        let mut ticks = tokio::time::interval(HOLD / 2);
        loop {
            ticks.tick().await;
            self.flush(Instant::now().checked_sub(HOLD));
            self.draw();
        }
    }

    /// Prints log lines held since `before` or longer; all lines if it is `None`.
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

    /// Shows a child's log line if it is a warning or error, or with --verbose. Equal lines of several ranks are shown once.
    pub fn log(&self, speaker: &Speaker, line: &str) {
        if !self.shows(line) {
            return;
        }
        match self.json {
            false => {
                let line = plain::line(line);
                self.held.lock().unwrap_or_else(PoisonError::into_inner).add(Instant::now(), speaker, &line);
            }
            // The line is a JSON object already; its target names the process.
            true => {
                voice::stderr().line(line);
            }
        }
    }

    /// Whether [`Self::log`] shows a child's line.
    #[must_use]
    pub fn shows(&self, line: &str) -> bool {
        let json = |level: &str| line.contains(level) && line.starts_with('{');
        let bad = match self.json {
            false => line.contains(" WARN ") || line.contains(" ERROR "),
            true => json("\"level\":\"WARN\"") || json("\"level\":\"ERROR\""),
        };
        self.verbose || bad
    }

    /// Shows what the run does while no steps are counted.
    pub fn status(&self, text: &str) {
        if !self.terminal {
            return self.line(text);
        }
        let text = plain::line(text).into_owned();
        let mut shown = self.shown();
        match shown.as_mut().map(|shown| &mut shown.view) {
            // Steps are counted already: phases may be reported late.
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

    /// Shows that `step` is done, with the estimated time left, if known.
    pub fn step(&self, step: u64, total: u64, left: Option<Duration>, message: &str) {
        let mut held = self.shown();
        let shown = held.get_or_insert_with(|| Shown::new(View::Doing(String::new())));
        let message = plain::line(message).into_owned();
        shown.view = View::Counting(Count { done: step, total, left, message: message.clone() });
        shown.step = Instant::now();
        let clock = live::clock(shown.begun.elapsed(), left);
        drop(held);
        // The next tick of `show_held` draws the view: steps may come faster than a person can read.
        let every = total.div_ceil(PLAIN_REPORTS).max(1);
        if !self.terminal && (step == 1 || step == total || step.is_multiple_of(every)) {
            self.line(&format!("step {step}/{total}  {clock}  {message}"));
        }
    }

    /// Prints all held lines and removes the progress view.
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

/// Writes a command's result to standard output.
pub fn print(text: &str) -> Result<(), Fault> {
    let mut out = std::io::stdout();
    out.write_all(called::commands(&plain::lines(text)).as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| Fault::failed(format!("cannot write to standard output: {error}")))
}

/// Writes a heading to standard error, between empty lines.
pub fn heading(text: &str) {
    voice::stderr().line(&format!("\n{}\n", called::commands(&plain::lines(text))));
}

/// Writes the summary of a complete run to standard output; never fails or blocks for long, even without a reader. With JSON logs the
/// lines go to the log.
pub async fn tell(text: &str) {
    if dyad_telemetry::format() == LogFormat::Json {
        text.lines().filter(|line| !line.is_empty()).for_each(|line| tracing::info!("{line}"));
        return;
    }
    let text = called::commands(&plain::lines(text)).into_owned();
    let told = tokio::task::spawn_blocking(move || {
        // Flush standard error first: both streams may be the same terminal.
        voice::stderr().flush(voice::PATIENCE);
        voice::stdout().say(text.into_bytes());
        voice::stdout().flush(voice::PATIENCE)
    });
    let _ = told.await;
}

/// Writes a warning to standard error, or to the log if it is JSON.
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
    fn a_late_phase_report_keeps_the_step_count() {
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
