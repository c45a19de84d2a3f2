//! Progress line at the bottom of a terminal. It is rendered anew for every draw, for the terminal's current width. Pure except for
//! `width`.

use std::io;
use std::time::Duration;

use dyad_proto::noun;
use unicode_width::UnicodeWidthChar;

/// Width in columns if the terminal does not report one.
const USUAL_WIDTH: usize = 80;
/// Columns of the bar: maximum and minimum. With less room there is no bar.
const BAR: (usize, usize) = (30, 10);
const SPINNER: [&str; 8] = ["⠋", "⠙", "⠹", "⠸", "⠼", "⠴", "⠦", "⠧"];
const SPIN: Duration = Duration::from_millis(120);

/// Content of the progress line.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum View {
    /// An activity without a count.
    Doing(String),
    /// Optimizer steps.
    Counting(Count),
}

/// How far the steps have come.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Count {
    pub(crate) done: u64,
    pub(crate) total: u64,
    /// Time left at the end of the last step, if known.
    pub(crate) left: Option<Duration>,
    /// Metrics of the last step, or the current activity.
    pub(crate) message: String,
}

/// Elapsed times.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Passed {
    /// Since the view was created.
    pub(crate) all: Duration,
    /// Since the end of the last step.
    pub(crate) step: Duration,
}

/// Columns of the terminal on standard error.
pub(crate) fn width() -> usize {
    match rustix::termios::tcgetwinsize(io::stderr()) {
        Ok(size) if size.ws_col > 0 => size.ws_col.into(),
        _ => USUAL_WIDTH,
    }
}

/// Renders the line, at most `width` columns wide.
pub(crate) fn line(view: &View, passed: Passed, width: usize) -> String {
    match view {
        View::Doing(text) => {
            let turn = (passed.all.as_millis() / SPIN.as_millis()) as usize % SPINNER.len();
            cut(&format!("{} {text}", SPINNER[turn]), width)
        }
        View::Counting(count) => {
            let text = count.text(passed);
            // The numbers get their room first; the bar gets the rest.
            let room = width.saturating_sub(columns(&text) + 2).min(BAR.0);
            if room < BAR.1 {
                return cut(&text, width);
            }
            format!("{}  {text}", bar(count.done, count.total, room))
        }
    }
}

impl Count {
    fn text(&self, passed: Passed) -> String {
        let left = self.left.map(|left| left.saturating_sub(passed.step));
        let Self { done, total, message, .. } = self;
        format!("{done}/{total} {}  {}  {message}", noun(*total, "step"), clock(passed.all, left))
    }
}

/// Elapsed time and time left, in tqdm's format: `[01:12<08:48]`.
pub(crate) fn clock(passed: Duration, left: Option<Duration>) -> String {
    format!("[{}<{}]", digits(passed), left.map_or_else(|| "?".into(), digits))
}

fn digits(time: Duration) -> String {
    let (hours, minutes, seconds) = (time.as_secs() / 3600, time.as_secs() / 60 % 60, time.as_secs() % 60);
    match hours {
        0 => format!("{minutes:02}:{seconds:02}"),
        hours => format!("{hours}:{minutes:02}:{seconds:02}"),
    }
}

fn bar(done: u64, total: u64, room: usize) -> String {
    let full = (done.min(total) as f64 / total.max(1) as f64 * room as f64) as usize;
    "█".repeat(full) + &"░".repeat(room - full)
}

fn columns(text: &str) -> usize {
    text.chars().map(|c| c.width().unwrap_or(0)).sum()
}

/// Cuts `text` to `width` columns; a cut text ends with `…`.
fn cut(text: &str, width: usize) -> String {
    if columns(text) <= width {
        return text.to_owned();
    }
    let mut room = width.saturating_sub(1);
    let fits = |c: &char| {
        let left = room.checked_sub(c.width().unwrap_or(0));
        room = left.unwrap_or(0);
        left.is_some()
    };
    let kept: String = text.chars().take_while(fits).collect();
    kept + if width > 0 { "…" } else { "" }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn counting(done: u64, total: u64, message: &str) -> View {
        View::Counting(Count { done, total, left: Some(seconds(528)), message: message.into() })
    }

    #[test]
    fn the_bar_shrinks_before_the_numbers_are_cut() {
        let view = counting(12, 100, "loss 0.6931");
        let passed = Passed { all: seconds(72), step: seconds(0) };
        let text = "12/100 steps  [01:12<08:48]  loss 0.6931";
        assert_eq!(line(&view, passed, 40), text);
        assert_eq!(line(&view, passed, 51), text, "no bar of nine columns");
        assert_eq!(line(&view, passed, 52), format!("█░░░░░░░░░  {text}"));
        assert_eq!(line(&view, passed, 200), format!("███{}  {text}", "░".repeat(27)));
        assert_eq!(line(&view, passed, 20), "12/100 steps  [01:1…");
        assert_eq!((line(&view, passed, 1), line(&view, passed, 0)), ("…".into(), String::new()));
        assert!(line(&counting(1, 1, ""), passed, 12).starts_with("1/1 step  "));
    }

    #[test]
    fn the_clock_advances_between_two_steps() {
        let view = counting(12, 100, "");
        assert!(line(&view, Passed { all: seconds(80), step: seconds(8) }, 80).contains("[01:20<08:40]"));
        let late = Passed { all: seconds(3700), step: seconds(999) };
        assert!(line(&view, late, 80).contains("[1:01:40<00:00]"));
        assert_eq!(clock(seconds(5), None), "[00:05<?]");
        assert_eq!(clock(seconds(0), Some(seconds(100 * 3600 + 61))), "[00:00<100:01:01]");
    }

    #[test]
    fn wide_characters_take_two_columns() {
        let view = View::Doing("漢字漢字".into());
        assert_eq!(line(&view, Passed::default(), 10), "⠋ 漢字漢字");
        assert_eq!(line(&view, Passed::default(), 9), "⠋ 漢字漢…");
        assert_eq!(line(&view, Passed::default(), 8), "⠋ 漢字…");
    }

    proptest! {
        #[test]
        fn no_line_is_wider_than_the_terminal(text in "\\PC*", width in 0_usize..200, done in 0_u64..2000, total in 0_u64..1000) {
            for view in [View::Doing(text.clone()), counting(done, total, &text)] {
                let line = line(&view, Passed::default(), width);
                prop_assert!(columns(&line) <= width, "{line}");
            }
        }
    }
}
