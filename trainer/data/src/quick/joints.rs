//! Extra cuts of a text, where no pre-tokenizer cuts it: between characters that no merge can join.
//!
//! - DAT-J1: a BPE model gives the same ids with these cuts as without.
//!
//! Proof: a BPE model starts with one symbol per character (or one per byte, if the character is not in the vocabulary and
//! `byte_fallback` is on). It merges neighbours, the lowest rank first and the leftmost among equal ranks, until `merges` has no
//! neighbouring pair. Let x and y be neighbouring characters that stand side by side in no entry of the vocabulary. A merge across
//! their border would make an entry whose text is the left symbol's text followed by the right one's. If both symbols stand for
//! their own text, that entry contains x next to y: a contradiction. The other symbols are bytes and the unknown token;
//! [`Joints::of`] makes sure that no entry contains one of these and more. So no merge crosses the border. The queue of merges
//! splits into two that share no symbols, and running one after the other gives the same result as running them mixed.
//!
//! Two other things look across borders. With `ignore_merges`, a whole text that is an entry is one token: such models get no
//! joints. A pending unknown token is written when the next known character comes, after bytes that came in between, and joined
//! with further unknown ones. So cuts are made only before characters in the vocabulary, where it is written anyway, unless the
//! vocabulary has all 256 bytes and no character is unknown.

use std::array::from_fn;
use std::collections::{HashMap, HashSet};

use tokenizers::Result;
use tokenizers::models::bpe::BPE;

/// SentencePiece's space, the most frequent character that is not ASCII.
const SPACE: char = '▁';
const COMMON: usize = 129;

/// Pairs of characters between which no text is cut.
pub(super) struct Joints {
    /// The same as [`Self::slow`], precomputed for common characters: ASCII and [`SPACE`].
    common: Box<[[bool; COMMON]; COMMON]>,
    /// Neighbours inside an entry of the vocabulary.
    pairs: HashSet<(char, char)>,
    /// Characters that a piece may start with; `None` for any.
    starts: Option<HashSet<char>>,
}

impl std::fmt::Debug for Joints {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Joints").field("pairs", &self.pairs.len()).finish_non_exhaustive()
    }
}

impl Joints {
    /// Builds the joints of a model; `None` if its text cannot be cut safely.
    pub(super) fn of(bpe: &BPE) -> Option<Self> {
        let affix = |affix: &Option<String>| affix.as_ref().is_some_and(|affix| !affix.is_empty());
        if bpe.ignore_merges || affix(&bpe.continuing_subword_prefix) || affix(&bpe.end_of_word_suffix) {
            return None;
        }
        let vocabulary = bpe.get_vocab();
        let ids: HashSet<u32> = vocabulary.values().copied().collect();
        let bytes: Vec<String> = (0..=255u8)
            .map(|byte| format!("<0x{byte:02X}>"))
            .filter(|token| bpe.byte_fallback && vocabulary.contains_key(token))
            .collect();
        // Two entries with one id could stand for each other.
        if ids.len() != vocabulary.len() || is_within(&vocabulary, &bytes, bpe.unk_token.as_deref()) {
            return None;
        }
        let starts = match (bytes.len() == 256, &bpe.unk_token) {
            (true, _) => None,
            (false, Some(unknown)) if vocabulary.contains_key(unknown) => {
                Some(vocabulary.keys().filter_map(|token| single(token)).collect())
            }
            // The model would skip unknown characters, and their neighbours could merge.
            (false, _) => return None,
        };
        let pairs = vocabulary.keys().flat_map(|token| token.chars().zip(token.chars().skip(1))).collect();
        let mut joints = Self { common: Box::new([[false; COMMON]; COMMON]), pairs, starts };
        let row = |before| from_fn(|after| joints.slow(character(before), character(after)));
        joints.common = Box::new(from_fn(row));
        Some(joints)
    }

    fn slow(&self, before: char, after: char) -> bool {
        self.pairs.contains(&(before, after))
            || self.starts.as_ref().is_some_and(|starts| !starts.contains(&after))
    }

    /// Whether a text must not be cut between these two characters.
    fn joined(&self, before: char, after: char) -> bool {
        match (number(before), number(after)) {
            (Some(before), Some(after)) => self.common[before][after],
            _ => self.slow(before, after),
        }
    }

    /// Cuts a text wherever possible and calls `word` for each piece.
    pub(super) fn cut(&self, text: &str, word: &mut dyn FnMut(&str) -> Result<()>) -> Result<()> {
        let mut last = 0;
        let mut characters = text.char_indices();
        let Some((_, mut before)) = characters.next() else { return Ok(()) };
        for (at, after) in characters {
            if !self.joined(before, after) {
                word(&text[last..at])?;
                last = at;
            }
            before = after;
        }
        word(&text[last..])
    }
}

/// Whether an entry contains a byte token or the unknown token together with other text.
fn is_within(vocabulary: &HashMap<String, u32>, bytes: &[String], unknown: Option<&str>) -> bool {
    let has = |token: &str, part: &str| token != part && token.contains(part);
    vocabulary.keys().any(|token| {
        unknown.is_some_and(|unknown| has(token, unknown))
            || token.contains("<0x") && bytes.iter().any(|byte| has(token, byte))
    })
}

fn single(token: &str) -> Option<char> {
    let mut characters = token.chars();
    characters.next().filter(|_| characters.next().is_none())
}

fn number(character: char) -> Option<usize> {
    match character {
        SPACE => Some(COMMON - 1),
        _ => Some(character as usize).filter(|&code| code < COMMON - 1),
    }
}

fn character(number: usize) -> char {
    u8::try_from(number).ok().filter(u8::is_ascii).map_or(SPACE, char::from)
}
