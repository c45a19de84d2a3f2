//! The error for a data file of which every pair was left out.

use crate::wire::PairVerdict;
use crate::{Fault, counted};

/// Verdicts that leave a pair out, each with the message for one pair, the message for several, and the hint.
const FATES: [(PairVerdict, &str, &str, &str); 4] = [
    (
        PairVerdict::DroppedTooLong,
        "is too long (its prompt fills max_seq_length)",
        "are too long (their prompts fill max_seq_length)",
        "raise max_seq_length, or shorten the prompts",
    ),
    (
        PairVerdict::DroppedEmpty,
        "has a side without tokens",
        "have a side without tokens",
        "give both outputs of each pair some text",
    ),
    (
        PairVerdict::DroppedIdentical,
        "has the same tokens on both sides (up to max_seq_length)",
        "have the same tokens on both sides (up to max_seq_length)",
        "use pairs whose two outputs differ, within max_seq_length",
    ),
    (PairVerdict::DroppedWeight, "has weight 0", "have weight 0", "give some pairs a weight above 0"),
];

/// Error for a file without a usable pair. `key` is the config key that names the file; `count` returns the pairs per verdict.
#[must_use]
pub fn none_is_left(key: &str, path: &str, count: &dyn Fn(PairVerdict) -> u64) -> Fault {
    let met: Vec<_> =
        FATES.iter().map(|fate| (count(fate.0), fate)).filter(|(count, _)| *count > 0).collect();
    let counts = met.iter().map(|(count, (_, one, several, _))| {
        format!("{} {}", counted(*count, "pair"), if *count == 1 { one } else { several })
    });
    let counts: Vec<String> = counts.collect();
    let hints: Vec<&str> = met.iter().map(|(_, (.., hint))| *hint).collect();
    Fault::input(format!("no pair of {key} {path} is left: {}", counts.join(", "))).hint(hints.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hint_is_about_the_pairs_that_were_left_out() {
        let fault = none_is_left("training_file", "a.jsonl", &|verdict| {
            u64::from(verdict == PairVerdict::DroppedIdentical)
        });
        assert!(
            fault.message.ends_with("1 pair has the same tokens on both sides (up to max_seq_length)"),
            "{fault}"
        );
        assert!(!fault.hint.contains("raise"), "{}", fault.hint);
        let several = none_is_left("training_file", "a.jsonl", &|verdict| match verdict {
            PairVerdict::DroppedTooLong => 2,
            PairVerdict::DroppedEmpty => 1,
            _ => 0,
        });
        assert!(
            several.message.contains("2 pairs are too long") && several.message.contains("1 pair has a side")
        );
        assert!(several.hint.starts_with("raise max_seq_length"), "{}", several.hint);
    }
}
