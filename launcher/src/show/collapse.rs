//! Log lines of many ranks, each with its speaker; a line that several ranks print is shown once. Pure: the time is an argument.

use std::collections::HashMap;
use std::time::Instant;

/// Source of a log line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Speaker {
    /// Node or host, or `coordinator`.
    pub node: String,
    /// Rank of a trainer; `None` for the coordinator.
    pub rank: Option<usize>,
}

/// Lines that are held back for a moment because other ranks may repeat them.
#[derive(Debug)]
pub struct Collapse {
    held: Vec<Held>,
    /// Index of each node's colour, in the order of first lines; `None` without colours.
    colours: Option<HashMap<String, usize>>,
}

#[derive(Debug)]
struct Held {
    since: Instant,
    /// Line of the first speaker.
    line: String,
    speakers: Vec<Speaker>,
}

/// ANSI codes of colours that are readable on light and dark backgrounds.
const COLOURS: [u8; 6] = [36, 33, 35, 32, 34, 31];

impl Collapse {
    /// Holds no lines.
    #[must_use]
    pub fn new(colour: bool) -> Self {
        Self { held: Vec::new(), colours: colour.then(HashMap::new) }
    }

    /// Adds a line. If other ranks' held line is equal apart from the time, `speaker` is added to that line.
    pub fn add(&mut self, now: Instant, speaker: &Speaker, line: &str) {
        let same = |held: &&mut Held| {
            message(&held.line) == message(line) && !held.speakers.iter().any(|before| before == speaker)
        };
        match self.held.iter_mut().find(same) {
            Some(held) => held.speakers.push(speaker.clone()),
            None => {
                let (line, speakers) = (line.to_owned(), vec![speaker.clone()]);
                self.held.push(Held { since: now, line, speakers });
            }
        }
    }

    /// Removes and formats the lines that were added at or before `before`; all lines if it is `None`.
    pub fn take(&mut self, before: Option<Instant>) -> Vec<String> {
        let due =
            self.held.iter().take_while(|held| before.is_none_or(|before| held.since <= before)).count();
        let held: Vec<Held> = self.held.drain(..due).collect();
        held.iter().map(|held| format!("{} {}", self.prefix(&held.speakers), held.line)).collect()
    }

    fn prefix(&mut self, speakers: &[Speaker]) -> String {
        let first = &speakers[0];
        let text = match (speakers.len(), first.rank) {
            (1, Some(rank)) if first.node.is_empty() => format!("[rank {rank}]"),
            (1, Some(rank)) => format!("[{}/{rank}]", first.node),
            (1, None) => format!("[{}]", first.node),
            _ => format!("[ranks {}]", ranges(speakers.iter().filter_map(|speaker| speaker.rank))),
        };
        let Some(colours) = &mut self.colours else { return text };
        let next = colours.len();
        let colour = *colours.entry(first.node.clone()).or_insert(next);
        format!("\u{1b}[{}m{text}\u{1b}[0m", COLOURS[colour % COLOURS.len()])
    }
}

/// The line without its leading time.
fn message(line: &str) -> &str {
    match line.split_once(' ') {
        Some((time, rest)) if time.starts_with(|c: char| c.is_ascii_digit()) && time.contains(':') => rest,
        _ => line,
    }
}

/// Ranks as ranges, such as `0-2,5`.
fn ranges(ranks: impl Iterator<Item = usize>) -> String {
    let mut ranks: Vec<usize> = ranks.collect();
    ranks.sort_unstable();
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for rank in ranks {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == rank => *last = rank,
            _ => runs.push((rank, rank)),
        }
    }
    let shown = runs.iter().map(|(first, last)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    });
    shown.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn rank(node: &str, rank: usize) -> Speaker {
        Speaker { node: node.into(), rank: Some(rank) }
    }

    #[test]
    fn the_same_line_from_several_ranks_is_shown_once() {
        let now = Instant::now();
        let mut collapse = Collapse::new(false);
        for (index, node) in ["a", "a", "b"].into_iter().enumerate() {
            collapse.add(now, &rank(node, index), &format!("2026-01-01T00:00:0{index}Z  WARN slow disk"));
        }
        collapse.add(now, &rank("b", 5), "2026-01-01T00:00:09Z  WARN slow disk");
        collapse.add(now, &rank("b", 3), "WARN other");
        collapse.add(now, &Speaker { node: "coordinator".into(), rank: None }, "hello");
        // One rank prints it twice: two lines.
        collapse.add(now, &rank("a", 0), "2026-01-01T00:00:10Z  WARN slow disk");
        assert_eq!(collapse.take(now.checked_sub(Duration::from_secs(1))), [] as [String; 0]);
        assert_eq!(
            collapse.take(Some(now)),
            [
                "[ranks 0-2,5] 2026-01-01T00:00:00Z  WARN slow disk",
                "[b/3] WARN other",
                "[coordinator] hello",
                "[a/0] 2026-01-01T00:00:10Z  WARN slow disk"
            ]
        );
        assert!(collapse.take(None).is_empty());
    }

    #[test]
    fn a_node_keeps_its_colour() {
        let now = Instant::now();
        let mut collapse = Collapse::new(true);
        collapse.add(now, &rank("a", 0), "x");
        collapse.add(now, &rank("b", 1), "y");
        collapse.add(now, &rank("a", 2), "z");
        let lines = collapse.take(None);
        assert_eq!(
            lines,
            ["\u{1b}[36m[a/0]\u{1b}[0m x", "\u{1b}[33m[b/1]\u{1b}[0m y", "\u{1b}[36m[a/2]\u{1b}[0m z"]
        );
    }
}
