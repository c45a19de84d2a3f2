//! The ids that the `tokenizers` crate gives, sooner: words that were met before are looked up, and text that was encoded
//! before is not encoded again.
//!
//! - DAT-Q1: equal to the plain pipeline, id by id. A tokenizer with a part that is not known here gets no quick encoder.
//! - DAT-Q2: added tokens cut a text into pieces that are encoded on their own, so two texts that agree beyond the end of such
//!   a token have the same ids up to there.

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

/// Encodes like the tokenizer that it was made from.
#[derive(Debug)]
pub(crate) struct QuickEncoder {
    added: Added,
    normal: Normal,
    cuts: Cuts,
    /// One for each thread that encodes; taken out while it does.
    words: Mutex<Vec<Words>>,
}

/// A text, its ids, and where other texts that start alike may take over.
#[derive(Clone, Debug, Default)]
pub(crate) struct Encoded {
    text: String,
    pub(crate) ids: Vec<u32>,
    marks: Vec<Mark>,
}

/// An added token in a text.
#[derive(Clone, Copy, Debug)]
struct Mark {
    end: usize,
    /// Ids up to its end.
    ids: usize,
    /// Bytes that decide that it is there, and what is before it.
    decided: usize,
}

impl Encoded {
    /// Of a text that was encoded some other way; nothing can be taken from it.
    pub(crate) fn plain(ids: Vec<u32>) -> Self {
        Self { ids, ..Self::default() }
    }

    /// DAT-Q2: what a text can take from this one. A token is the same in both if all that could have made it another is.
    fn shared(&self, text: &str) -> Vec<Mark> {
        let agree = self.text.bytes().zip(text.bytes()).take_while(|(a, b)| a == b).count();
        self.marks.iter().take_while(|mark| mark.decided <= agree).copied().collect()
    }
}

impl QuickEncoder {
    /// For a tokenizer whose every part is known here.
    pub(crate) fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let quick = Self {
            added: Added::of(tokenizer)?,
            normal: Normal::of(tokenizer.get_normalizer()),
            cuts: Cuts::of(tokenizer.get_pre_tokenizer(), model(tokenizer)?)?,
            words: Mutex::default(),
        };
        // The crate asks where the first piece was in the text before it was normalised.
        let known = !quick.cuts.treats_first()
            || quick.normal.is_identity()
            || quick.normal.keeps_start() && quick.added.normalized.is_empty();
        (known && quick.agrees(tokenizer)).then_some(quick)
    }

    /// Shows parts that act on every text, such as a post-processor that adds to it.
    fn agrees(&self, tokenizer: &Tokenizer) -> bool {
        let text = "Don't  panic:\n\n\tthe 12345 naïve cafés of 東京 cost 5€ — e\u{301} ﬁne!  🙂\r\n ";
        let plain = tokenizer.encode_fast(text, false).ok();
        let quick = self.encode(tokenizer, text.to_owned(), None).ok();
        plain.zip(quick).is_some_and(|(plain, quick)| plain.get_ids() == quick.ids)
    }

    /// Encodes a text; `like` is one that probably starts alike.
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
    /// Goes on after the last mark.
    fn encode_rest(&mut self) -> Result<()> {
        let (text, raw) = (self.text, &self.quick.added.raw);
        let from = self.marks.last().map_or(0, |mark| mark.end);
        let mut last = from;
        for (start, end, id) in raw.find(&text[from..]) {
            let (start, end) = (from + start, from + end);
            self.encode_part(last..start)?;
            self.ids.push(id);
            // Only tokens that start here or before could have been found in its place.
            self.marks.push(Mark { end, ids: self.ids.len(), decided: start + raw.longest });
            last = end;
        }
        self.encode_part(last..text.len())
    }

    /// Text between added tokens that are sought in the text as it is.
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
                // A token of the other kind that starts within this one would have cut it.
                let decided = end + added.raw.longest.max(added.normalized.longest);
                self.marks.push(Mark { end, ids: self.ids.len(), decided });
            }
            last = end;
        }
        self.encode_piece(&normalized[last..], part.start + last == 0)
    }

    /// Normalised text without added tokens.
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
