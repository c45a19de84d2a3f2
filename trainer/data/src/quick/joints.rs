//! Where a text may be cut although no pre-tokenizer cuts it: between characters that no merge can bring together.
//!
//! - DAT-J1: a BPE model with these cuts gives the ids that it gives without.
//!
//! Why. A BPE model starts from one symbol a character (or one a byte, where a character is not in the vocabulary and
//! `byte_fallback` is on) and merges neighbours, the lowest rank first and among equal ranks the leftmost, until none is left
//! that `merges` knows. Take neighbouring characters x and y that stand side by side in no entry of the vocabulary. A merge
//! across the border between them would make an entry that is written as the left symbol's entry followed by the right one's.
//! Symbols that are entries of their own text would put x beside y in it, which no entry has. Symbols that are not are bytes
//! and the unknown token; [`Joints::of`] makes sure that no entry contains one of those and more. So no merge ever crosses the
//! border; the queue of merges falls into two that do not touch each other's symbols, and running them one after the other
//! gives what running them mixed gives.
//!
//! Two things beside merges look across borders. A whole text that is an entry is one token under `ignore_merges`: such models
//! have no joints. A pending unknown token is written when the next known character comes, after bytes that came before that
//! and joined with unknown ones: cuts are made only before characters that are in the vocabulary, where it is written anyway,
//! unless bytes can stand for everything and nothing is ever unknown.

use std::array::from_fn;
use std::collections::{HashMap, HashSet};

use tokenizers::Result;
use tokenizers::models::bpe::BPE;

/// SentencePiece's space, beside ASCII the most frequent character of a text.
const SPACE: char = '▁';
const COMMON: usize = 129;

/// Pairs of characters between which no text is cut.
pub(super) struct Joints {
    /// By the numbers of two common characters.
    common: Box<[[bool; COMMON]; COMMON]>,
    pairs: HashSet<(char, char)>,
    /// What a piece may start with; `None`: anything.
    starts: Option<HashSet<char>>,
}

impl std::fmt::Debug for Joints {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Joints").field("pairs", &self.pairs.len()).finish_non_exhaustive()
    }
}

impl Joints {
    /// Of a model that has any.
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
        // Entries of one id could stand for each other.
        if ids.len() != vocabulary.len() || is_within(&vocabulary, &bytes, bpe.unk_token.as_deref()) {
            return None;
        }
        let starts = match (bytes.len() == 256, &bpe.unk_token) {
            (true, _) => None,
            (false, Some(unknown)) if vocabulary.contains_key(unknown) => {
                Some(vocabulary.keys().filter_map(|token| single(token)).collect())
            }
            // Unknown characters would be left out, and their neighbours meet.
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

    /// Whether these two stay together.
    fn joined(&self, before: char, after: char) -> bool {
        match (number(before), number(after)) {
            (Some(before), Some(after)) => self.common[before][after],
            _ => self.slow(before, after),
        }
    }

    /// Cuts wherever that is possible.
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

/// Whether an entry is made of one that does not stand for its own text, and more.
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
