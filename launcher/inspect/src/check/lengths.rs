//! Lengths in tokens: exact counts of every length, and a histogram of them.

use std::collections::BTreeMap;

use serde::Serialize;

/// How often each length occurs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lengths(BTreeMap<usize, u64>);

/// Bars of a histogram.
const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// What a table shows of lengths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Shortest.
    pub min: usize,
    /// Half are at most this long.
    pub median: usize,
    /// 95 of 100 are at most this long.
    pub p95: usize,
    /// Longest.
    pub max: usize,
    /// Sum.
    pub total: u64,
}

impl Lengths {
    /// Counts a length.
    pub fn add(&mut self, length: usize) {
        *self.0.entry(length).or_default() += 1;
    }

    /// Adds the counts of other records.
    pub fn join(&mut self, other: Self) {
        for (length, count) in other.0 {
            *self.0.entry(length).or_default() += count;
        }
    }

    fn count(&self) -> u64 {
        self.0.values().sum()
    }

    /// The summary; `None` without any length.
    #[must_use]
    pub fn summary(&self) -> Option<Summary> {
        let (min, max) = (*self.0.keys().next()?, *self.0.keys().next_back()?);
        let total = self.0.iter().map(|(length, count)| *length as u64 * count).sum();
        Some(Summary { min, median: self.quantile(50), p95: self.quantile(95), max, total })
    }

    /// The least length that so many of 100 do not exceed.
    fn quantile(&self, percent: u64) -> usize {
        let wanted = (self.count() * percent).div_ceil(100).max(1);
        let mut seen = 0;
        let reached = |(_, count): &(&usize, &u64)| {
            seen += **count;
            seen >= wanted
        };
        self.0.iter().find(reached).map_or(0, |(length, _)| *length)
    }

    /// Counts of the lengths from `edges[i - 1]` (0 for the first) up to, not including, `edges[i]`.
    #[must_use]
    pub fn buckets(&self, edges: &[usize]) -> Vec<u64> {
        let starts = std::iter::once(0).chain(edges.iter().copied());
        starts
            .zip(edges)
            .map(|(start, &end)| self.0.range(start..end).map(|(_, count)| count).sum())
            .collect()
    }
}

/// Edges of a histogram up to a longest length: powers of two.
pub(super) fn edges(longest: usize) -> Vec<usize> {
    let mut edges = vec![16];
    while edges[edges.len() - 1] <= longest {
        edges.push(edges[edges.len() - 1] * 2);
    }
    edges
}

/// Counts as bars: every bucket that is not empty shows.
pub(super) fn bars(buckets: &[u64]) -> String {
    let most = buckets.iter().copied().max().unwrap_or(0).max(1);
    let height = |count: u64| (count * 8).div_ceil(most) as usize;
    buckets.iter().map(|&count| BARS[height(count)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_and_buckets_are_exact() {
        let mut lengths = Lengths::default();
        (1..=100).for_each(|length| lengths.add(length));
        let expected = Summary { min: 1, median: 50, p95: 95, max: 100, total: 5050 };
        assert_eq!(lengths.summary(), Some(expected));
        assert_eq!(edges(100), [16, 32, 64, 128]);
        assert_eq!(lengths.buckets(&edges(100)), [15, 16, 32, 37]);
        assert_eq!(bars(&[0, 1, 500, 1000]), " ▁▄█");
        assert_eq!((Lengths::default().summary(), edges(0), bars(&[0])), (None, vec![16], " ".into()));
    }
}
