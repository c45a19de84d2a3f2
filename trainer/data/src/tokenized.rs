//! A record as token ids.

use std::ops::Range;

use sha2::{Digest, Sha256};

/// Token ids of a record. The full sequences are `prompt + chosen` and `prompt + rejected`.
#[derive(Clone, Debug, PartialEq)]
pub struct Tokenized {
    /// Ids of the prompt, which both answers continue.
    pub prompt: Vec<u32>,
    /// The preferred answer, and everything that the template puts after it.
    pub chosen: Vec<u32>,
    /// The rejected answer; empty if the record has only one.
    pub rejected: Vec<u32>,
    /// Tokens of `chosen` that are not trained.
    pub chosen_untrained: Untrained,
    /// Tokens of `rejected` that are not trained.
    pub rejected_untrained: Untrained,
    /// Factor of the pair's loss, from the record's `weight`; finite and at least 0.
    pub weight: f64,
    /// KTO: whether the answer is desirable.
    pub label: Option<bool>,
}

impl Tokenized {
    /// A pair of weight 1, of whose answers all tokens are trained.
    #[must_use]
    pub fn new(prompt: Vec<u32>, chosen: Vec<u32>, rejected: Vec<u32>) -> Self {
        Self {
            prompt,
            chosen,
            rejected,
            chosen_untrained: Untrained::default(),
            rejected_untrained: Untrained::default(),
            weight: 1.0,
            label: None,
        }
    }

    /// All ids of the three parts.
    pub fn tokens(&self) -> impl Iterator<Item = u32> {
        [&self.prompt, &self.chosen, &self.rejected].into_iter().flatten().copied()
    }

    /// The same record with its partner's answer in the place of the rejected one, cut to `max_len` tokens with the prompt. KTO scores it
    /// to estimate the KL divergence.
    #[must_use]
    pub fn with_partner(mut self, partner: &Self, max_len: usize) -> Self {
        self.rejected.clone_from(&partner.chosen);
        self.rejected_untrained.clone_from(&partner.chosen_untrained);
        let most = max_len.saturating_sub(self.prompt.len());
        self.rejected.truncate(most);
        self.rejected_untrained.truncate(most);
        self
    }

    /// Number of trained tokens of the chosen and of the rejected side. A labelled answer has one side: chosen if it is desirable.
    #[must_use]
    pub fn side_tokens(&self) -> (usize, usize) {
        match self.label {
            None => (self.chosen_trained(), self.rejected_trained()),
            Some(true) => (self.chosen_trained(), 0),
            Some(false) => (0, self.chosen_trained()),
        }
    }

    /// Number of trained tokens of the preferred answer.
    #[must_use]
    pub fn chosen_trained(&self) -> usize {
        self.chosen.len() - self.chosen_untrained.count()
    }

    /// Number of trained tokens of the rejected answer.
    #[must_use]
    pub fn rejected_trained(&self) -> usize {
        self.rejected.len() - self.rejected_untrained.count()
    }

    /// Keeps at most `most` tokens of each answer.
    pub(crate) fn truncate(&mut self, most: usize) {
        self.chosen.truncate(most);
        self.chosen_untrained.truncate(most);
        self.rejected.truncate(most);
        self.rejected_untrained.truncate(most);
    }

    /// First 16 bytes of the SHA-256 over the ids, the length of each part, and the ranges that are not trained, as two numbers. Weight
    /// and label are not part of it: a reference score does not depend on them.
    #[must_use]
    pub fn hash(&self) -> (u64, u64) {
        let mut hash = Sha256::new();
        let mut bytes = Vec::new();
        for part in [&self.prompt, &self.chosen, &self.rejected] {
            hash.update((part.len() as u64).to_be_bytes());
            bytes.clear();
            bytes.extend(part.iter().flat_map(|id| id.to_be_bytes()));
            hash.update(&bytes);
        }
        let untrained = [&self.chosen_untrained, &self.rejected_untrained];
        // So that the hashes of pairs without such ranges stay what they were.
        if untrained.iter().any(|untrained| untrained.count() > 0) {
            for Untrained(ranges) in untrained {
                hash.update((ranges.len() as u64).to_be_bytes());
                for range in ranges {
                    hash.update(range.start.to_be_bytes());
                    hash.update(range.end.to_be_bytes());
                }
            }
        }
        let digest = hash.finalize();
        let number =
            |at: usize| digest[at..at + 8].iter().fold(0, |number, &byte| number << 8 | u64::from(byte));
        (number(0), number(8))
    }
}

/// Tokens of an answer that are not trained: ascending ranges that do not touch each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Untrained(Vec<Range<u32>>);

impl Untrained {
    /// The tokens that `trained` does not select.
    #[must_use]
    pub fn of(trained: &[bool]) -> Self {
        let mut ranges: Vec<Range<u32>> = Vec::new();
        for (at, _) in (0..).zip(trained).filter(|(_, trained)| !**trained) {
            match ranges.last_mut() {
                Some(range) if range.end == at => range.end += 1,
                _ => ranges.push(at..at + 1),
            }
        }
        Self(ranges)
    }

    /// Number of tokens.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.iter().map(ExactSizeIterator::len).sum()
    }

    /// Places of the trained tokens among the first `length` tokens, ascending.
    pub fn trained(&self, length: usize) -> impl Iterator<Item = usize> + '_ {
        let starts = std::iter::once(0).chain(self.0.iter().map(|range| range.end as usize));
        let ends = self.0.iter().map(|range| range.start as usize).chain([length]);
        starts.zip(ends).flat_map(|(start, end)| start..end)
    }

    fn truncate(&mut self, most: usize) {
        let most = u32::try_from(most).unwrap_or(u32::MAX);
        self.0.retain(|range| range.start < most);
        if let Some(last) = self.0.last_mut() {
            last.end = last.end.min(most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(prompt: &[u32], chosen: &[u32], rejected: &[u32]) -> Tokenized {
        Tokenized::new(prompt.to_vec(), chosen.to_vec(), rejected.to_vec())
    }

    #[test]
    fn hashes_depend_on_every_token_on_the_part_boundaries_and_on_what_is_trained() {
        let partly = |chosen: &[bool], rejected: &[bool]| Tokenized {
            chosen_untrained: Untrained::of(chosen),
            rejected_untrained: Untrained::of(rejected),
            ..pair(&[1, 2], &[3], &[4])
        };
        let hashes = [
            pair(&[1, 2], &[3], &[4]),
            pair(&[1], &[2, 3], &[4]),
            pair(&[1, 2], &[3], &[5]),
            pair(&[1, 2], &[4], &[3]),
            pair(&[1, 2], &[3, 4], &[]),
            partly(&[false], &[true]),
            partly(&[true], &[false]),
        ]
        .map(|pair| pair.hash());
        let different: std::collections::HashSet<_> = hashes.iter().collect();
        assert_eq!(different.len(), hashes.len());
        // python3 -c 'import hashlib,struct; print(hashlib.sha256(struct.pack(">QIIQIQI",2,1,2,1,3,1,4)).hexdigest()[:32])'
        assert_eq!(format!("{:016x}{:016x}", hashes[0].0, hashes[0].1), "429d382db28e128ae5cf25465e45f610");
        let weighed = Tokenized { weight: 3.0, label: Some(true), ..pair(&[1, 2], &[3], &[4]) };
        assert_eq!(weighed.hash(), hashes[0]);
    }

    #[test]
    fn untrained_tokens_are_ranges() {
        let places = |untrained: &Untrained, length| untrained.trained(length).collect::<Vec<_>>();
        let mut untrained = Untrained::of(&[true, false, false, true, false, true]);
        assert_eq!(untrained, Untrained(vec![1..3, 4..5]));
        assert_eq!((untrained.count(), places(&untrained, 6)), (3, vec![0, 3, 5]));
        untrained.truncate(5);
        assert_eq!((untrained.count(), places(&untrained, 5)), (3, vec![0, 3]));
        untrained.truncate(2);
        assert_eq!((untrained.count(), places(&untrained, 2)), (1, vec![0]));
        assert_eq!(places(&Untrained::default(), 3), [0, 1, 2]);
        assert_eq!(places(&Untrained::of(&[false]), 1), [] as [usize; 0]);
    }
}
