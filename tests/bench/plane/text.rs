//! Generated English-like text: words by Zipf's law, sentences, now and then a number or a line break.

use std::io::{self, BufWriter, Write};
use std::path::Path;

use serde_json::json;

const WORDS: usize = 50_000;
const ONSETS: [&str; 16] = ["b", "c", "d", "f", "g", "h", "l", "m", "n", "p", "r", "s", "t", "st", "tr", "w"];
const VOWELS: [&str; 8] = ["a", "e", "i", "o", "u", "ea", "ou", "ai"];
const CODAS: [&str; 8] = ["", "", "n", "r", "s", "t", "nd", "ly"];

/// A source of text; the same seed gives the same text.
#[derive(Debug)]
pub(crate) struct Writer {
    state: u64,
    words: Vec<String>,
}

impl Writer {
    /// Creates the vocabulary; frequent words are short.
    pub(crate) fn new(seed: u64) -> Self {
        let mut writer = Self { state: seed | 1, words: Vec::new() };
        for rank in 0..WORDS {
            let syllables = 1 + rank.ilog2_or_zero() / 6 + writer.below(2);
            let word = (0..syllables).map(|_| writer.syllable()).collect();
            writer.words.push(word);
        }
        writer
    }

    /// Returns one line of a preference file: about 150 tokens of prompt and 65 of each output.
    pub(crate) fn pair(&mut self) -> String {
        let mut messages = Vec::new();
        if self.below(4) == 0 {
            messages.push(json!({ "role": "system", "content": self.text(10) }));
        }
        if self.below(4) == 0 {
            messages.push(json!({ "role": "user", "content": self.text(15) }));
            messages.push(json!({ "role": "assistant", "content": self.text(20) }));
        }
        messages.push(json!({ "role": "user", "content": self.text(80) }));
        let (chosen, rejected) = (self.text(36), self.text(36));
        json!({
            "input": { "messages": messages },
            "preferred_output": [{ "role": "assistant", "content": chosen }],
            "non_preferred_output": [{ "role": "assistant", "content": rejected }],
        })
        .to_string()
    }

    /// Returns sentences of about `words` words in all.
    fn text(&mut self, words: usize) -> String {
        let words = words / 2 + self.below(words);
        let (mut text, mut sentence) = (String::new(), 0);
        for at in 0..words {
            let word = self.word();
            if sentence == 0 {
                text.push_str(&word[..1].to_uppercase());
                text.push_str(&word[1..]);
            } else {
                text.push_str(&word);
            }
            sentence += 1;
            let ends = at + 1 == words || sentence > 5 && self.below(8) == 0;
            text.push_str(match (ends, self.below(40)) {
                (true, 0..8) => ".\n\n",
                (true, 8..12) => "? ",
                (true, _) => ". ",
                (false, 0) => ", ",
                (false, 1) => "'s ",
                (false, 2) => " (",
                (false, _) => " ",
            });
            if ends {
                sentence = 0;
            }
        }
        text.truncate(text.trim_end().len());
        text
    }

    fn word(&mut self) -> String {
        if self.below(50) == 0 {
            return self.below(3000).to_string();
        }
        // The logarithm of a rank is uniform: Zipf's law with exponent 1.
        let uniform = self.below(1 << 24) as f64 / f64::from(1 << 24);
        let rank = (WORDS as f64).powf(uniform) as usize - 1;
        self.words[rank].clone()
    }

    fn syllable(&mut self) -> String {
        let mut pick = |from: &[&'static str]| from[self.below(from.len())];
        [pick(&ONSETS), pick(&VOWELS), pick(&CODAS)].concat()
    }

    /// Returns a random number below `bound` (xorshift64*).
    fn below(&mut self, bound: usize) -> usize {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        (self.state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % bound
    }
}

trait Log {
    fn ilog2_or_zero(self) -> usize;
}

impl Log for usize {
    fn ilog2_or_zero(self) -> usize {
        self.checked_ilog2().map_or(0, |log| log as usize)
    }
}

/// Writes a preference file; returns its size in bytes.
pub(crate) fn write_pairs(path: &Path, pairs: usize) -> io::Result<u64> {
    // Lines repeat, and a number makes each of them unique.
    let mut writer = Writer::new(7);
    let lines: Vec<String> = (0..pairs.min(20_000)).map(|_| writer.pair()).collect();
    let mut file = BufWriter::new(std::fs::File::create(path)?);
    for at in 0..pairs {
        let line = &lines[at % lines.len()];
        let (head, tail) = line.split_once("\"content\":\"").unwrap_or((line, ""));
        writeln!(file, "{head}\"content\":\"{at}: {tail}")?;
    }
    file.into_inner()?.sync_all()?;
    Ok(std::fs::metadata(path)?.len())
}
