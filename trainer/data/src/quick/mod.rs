//! A faster encoder with the same ids as the `tokenizers` crate: it caches the ids of words, and reuses the ids of a text with the same
//! start.
//!
//! - DAT-Q1: equal to the plain pipeline, id by id. A tokenizer with an unsupported part gets no quick encoder.
//! - DAT-Q2: the pieces between added tokens are encoded on their own. So two texts that are equal up to some bytes after an added token
//!   have the same ids up to that token.

mod added;
mod cuts;
mod joints;
mod normal;
mod words;

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use tokenizers::models::ModelWrapper;
use tokenizers::{Result, Tokenizer};

use added::Added;
use cuts::Cuts;
use normal::Normal;
use words::Words;

/// Gives the same ids as the tokenizer that it was made from.
#[derive(Debug)]
pub(crate) struct QuickEncoder {
    added: Added,
    normal: Normal,
    cuts: Cuts,
    /// One cache per encoding thread; a thread takes it out while it encodes.
    words: Mutex<Vec<Words>>,
}

/// A text, its ids, and the marks up to which a text with the same start can reuse the ids.
#[derive(Clone, Debug, Default)]
pub(crate) struct Encoded {
    text: String,
    pub(crate) ids: Vec<u32>,
    marks: Vec<Mark>,
}

/// The end of an added token in a text.
#[derive(Clone, Copy, Debug)]
struct Mark {
    /// Byte position.
    end: usize,
    /// Number of ids up to here.
    ids: usize,
    /// Length of the prefix that decides this token and the ids before it, in bytes.
    decided: usize,
}

impl Encoded {
    /// Ids from the plain pipeline; no other text can reuse them.
    pub(crate) fn plain(ids: Vec<u32>) -> Self {
        Self { ids, ..Self::default() }
    }

    /// DAT-Q2: marks that `text` shares with this one. A mark is shared if all bytes that decide it are equal.
    fn shared(&self, text: &str) -> Vec<Mark> {
        let agree = self.text.bytes().zip(text.bytes()).take_while(|(a, b)| a == b).count();
        self.marks.iter().take_while(|mark| mark.decided <= agree).copied().collect()
    }
}

impl QuickEncoder {
    /// `None` if a part of the tokenizer is not supported.
    pub(crate) fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let quick = Self {
            added: Added::of(tokenizer)?,
            normal: Normal::of(tokenizer.get_normalizer()),
            cuts: Cuts::of(tokenizer.get_pre_tokenizer(), model(tokenizer)?)?,
            words: Mutex::default(),
        };
        // The crate looks up the position of the first piece in the text before normalisation.
        let known = !quick.cuts.treats_first()
            || quick.normal.is_identity()
            || quick.normal.keeps_start() && quick.added.normalized.is_empty();
        (known && quick.agrees(tokenizer)).then_some(quick)
    }

    /// Encodes a sample both ways; this finds parts that change every text, such as a post-processor.
    fn agrees(&self, tokenizer: &Tokenizer) -> bool {
        let text = "Don't  panic:\n\n\tthe 12345 naïve cafés of 東京 cost 5€ — e\u{301} ﬁne!  🙂\r\n ";
        let plain = tokenizer.encode_fast(text, false).ok();
        let quick = self.encode(tokenizer, text.to_owned(), None).ok();
        plain.zip(quick).is_some_and(|(plain, quick)| plain.get_ids() == quick.ids)
    }

    /// Encodes a text; `like` is an earlier text that probably has the same start.
    pub(crate) fn encode(
        &self,
        tokenizer: &Tokenizer,
        text: String,
        like: Option<&Encoded>,
    ) -> Result<Encoded> {
        let mut words = self.lock().pop().unwrap_or_default();
        let marks = like.map_or_else(Vec::new, |like| like.shared(&text));
        let known = marks.last().map_or(0, |mark| mark.ids);
        let ids = like.map_or_else(Vec::new, |like| like.ids[..known].to_vec());
        let mut work = WorkBuffers { quick: self, tokenizer, text: &text, words: &mut words, ids, marks };
        let done = work.encode_rest();
        let (ids, marks) = (work.ids, work.marks);
        self.lock().push(words);
        done.map(|()| Encoded { text, ids, marks })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Words>> {
        self.words.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A text that is being encoded.
struct WorkBuffers<'w> {
    quick: &'w QuickEncoder,
    tokenizer: &'w Tokenizer,
    text: &'w str,
    words: &'w mut Words,
    ids: Vec<u32>,
    marks: Vec<Mark>,
}

impl WorkBuffers<'_> {
    /// Encodes the text after the last mark.
    fn encode_rest(&mut self) -> Result<()> {
        let (text, raw) = (self.text, &self.quick.added.raw);
        let from = self.marks.last().map_or(0, |mark| mark.end);
        let mut last = from;
        for (start, end, id) in raw.find(&text[from..]) {
            let (start, end) = (from + start, from + end);
            self.encode_part(last..start)?;
            self.ids.push(id);
            // Only a token that starts here or earlier could replace this one.
            self.marks.push(Mark { end, ids: self.ids.len(), decided: start + raw.longest });
            last = end;
        }
        self.encode_part(last..text.len())
    }

    /// Encodes text between two added tokens of the original text.
    fn encode_part(&mut self, part: Range<usize>) -> Result<()> {
        if part.is_empty() {
            return Ok(());
        }
        let QuickEncoder { added, normal, .. } = self.quick;
        let normalized = normal.apply(self.tokenizer.get_normalizer(), &self.text[part.clone()]);
        let mut last = 0;
        for (start, end, id) in added.normalized.find(&normalized) {
            self.encode_piece(&normalized[last..start], part.start + last == 0)?;
            self.ids.push(id);
            if normal.is_identity() {
                let end = part.start + end;
                // A token of the original text that starts within this one would have cut it.
                let decided = end + added.raw.longest.max(added.normalized.longest);
                self.marks.push(Mark { end, ids: self.ids.len(), decided });
            }
            last = end;
        }
        self.encode_piece(&normalized[last..], part.start + last == 0)
    }

    /// Encodes normalised text without added tokens.
    fn encode_piece(&mut self, piece: &str, first: bool) -> Result<()> {
        if piece.is_empty() {
            return Ok(());
        }
        let (model, cuts, ids) = (self.tokenizer.get_model(), &self.quick.cuts, &mut self.ids);
        let words = &mut *self.words;
        cuts.cut(piece, first, &mut |word| words.append(word, ids, || cuts.ids(model, word)))
    }
}

/// The model, if a word always has the same ids.
fn model(tokenizer: &Tokenizer) -> Option<&ModelWrapper> {
    match tokenizer.get_model() {
        ModelWrapper::BPE(bpe) if bpe.dropout.is_some() => None,
        model @ (ModelWrapper::BPE(_) | ModelWrapper::Unigram(_)) => Some(model),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
