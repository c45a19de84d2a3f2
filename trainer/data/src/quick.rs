//! The ids that the `tokenizers` crate gives, sooner: for byte-level BPE tokenizers, words that were met before are looked
//! up, and text that was encoded before is not encoded again.
//!
//! - Q-1: equal to the plain pipeline, id by id. A tokenizer with a part that is not known here gets no quick encoder.
//! - Q-2: added tokens cut a text into pieces that are encoded on their own, so two texts that agree beyond the end of such
//!   a token have the same ids up to there.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use aho_corasick::{AhoCorasick, AhoCorasickBuilder, MatchKind};
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::split::SplitPattern;
use tokenizers::utils::SysRegex;
use tokenizers::{Model, NormalizedString, Normalizer, Result, SplitDelimiterBehavior, Tokenizer};

/// The split that a `ByteLevel` pre-tokenizer makes unless told not to.
const GPT2_SPLIT: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// Words that one thread remembers, and bytes of the longest.
const WORDS: usize = 1 << 16;
const WORD_BYTES: usize = 64;

/// Encodes like the tokenizer that it was made from.
pub(crate) struct QuickEncoder {
    added: AhoCorasick,
    /// By pattern of `added`.
    added_ids: Vec<u32>,
    /// Bytes of the longest added token.
    longest_added: usize,
    /// A piece is cut by the first, what comes out by the next, and so on.
    splits: Vec<SysRegex>,
    /// How the vocabulary writes each byte.
    letters: [char; 256],
    /// One for each thread that encodes; taken out while it does.
    words: Mutex<Vec<Words>>,
}

impl fmt::Debug for QuickEncoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QuickEncoder").field("added", &self.added_ids.len()).finish_non_exhaustive()
    }
}

/// Ids of words.
#[derive(Debug, Default)]
struct Words {
    places: HashMap<Box<str>, Range<u32>>,
    ids: Vec<u32>,
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
    start: usize,
    end: usize,
    /// Ids up to its end.
    ids: usize,
}

impl Encoded {
    /// Of a text that was encoded some other way; nothing can be taken from it.
    pub(crate) fn plain(ids: Vec<u32>) -> Self {
        Self { ids, ..Self::default() }
    }

    /// Q-2: what a text can take from this one. A token is the same in both if all that could have made it another is.
    fn shared(&self, text: &str, longest_added: usize) -> &[Mark] {
        let agree = self.text.bytes().zip(text.bytes()).take_while(|(a, b)| a == b).count();
        &self.marks[..self.marks.partition_point(|mark| mark.start + longest_added <= agree)]
    }
}

impl QuickEncoder {
    /// For a tokenizer whose every part is known here.
    pub(crate) fn of(tokenizer: &Tokenizer) -> Option<Self> {
        bpe(tokenizer)?;
        let mut tokens: Vec<_> = tokenizer.get_added_tokens_decoder().into_values().collect();
        tokens.sort_unstable_by(|a, b| a.content.cmp(&b.content));
        // Tokens that are sought in normalised text would need a second search, those that take spaces a wider one.
        let simple = |token: &tokenizers::AddedToken| {
            let sought_in_raw_text = !token.normalized || tokenizer.get_normalizer().is_none();
            sought_in_raw_text
                && token.normalized == tokens[0].normalized
                && !(token.single_word || token.lstrip || token.rstrip)
        };
        if !tokens.iter().all(simple) {
            return None;
        }
        let quick = Self {
            added: AhoCorasickBuilder::new()
                .match_kind(MatchKind::LeftmostLongest)
                .build(tokens.iter().map(|token| &token.content))
                .ok()?,
            added_ids: tokens
                .iter()
                .map(|token| tokenizer.token_to_id(&token.content))
                .collect::<Option<_>>()?,
            longest_added: tokens.iter().map(|token| token.content.len()).max().unwrap_or(0),
            splits: splits(tokenizer.get_pre_tokenizer()?)?,
            letters: letters(),
            words: Mutex::default(),
        };
        quick.agrees(tokenizer).then_some(quick)
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
        let marks = like.map_or(&[][..], |like| like.shared(&text, self.longest_added)).to_vec();
        let known = marks.last().map_or(0, |mark| mark.ids);
        let ids = like.map_or_else(Vec::new, |like| like.ids[..known].to_vec());
        let mut encoded = Encoded { text: String::new(), ids, marks };
        let done = self.encode_rest(tokenizer, &text, &mut encoded, &mut words);
        self.lock().push(words);
        encoded.text = text;
        done.map(|()| encoded)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Words>> {
        self.words.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Goes on after the last mark.
    fn encode_rest(
        &self,
        tokenizer: &Tokenizer,
        text: &str,
        out: &mut Encoded,
        words: &mut Words,
    ) -> Result<()> {
        let from = out.marks.last().map_or(0, |mark| mark.end);
        let mut piece = from;
        for found in self.added.find_iter(&text[from..]) {
            let (start, end) = (from + found.start(), from + found.end());
            self.encode_piece(tokenizer, &text[piece..start], &mut out.ids, words)?;
            out.ids.push(self.added_ids[found.pattern().as_usize()]);
            out.marks.push(Mark { start, end, ids: out.ids.len() });
            piece = end;
        }
        self.encode_piece(tokenizer, &text[piece..], &mut out.ids, words)
    }

    /// Text without added tokens.
    fn encode_piece(
        &self,
        tokenizer: &Tokenizer,
        piece: &str,
        ids: &mut Vec<u32>,
        words: &mut Words,
    ) -> Result<()> {
        let model = bpe(tokenizer).ok_or("no BPE model")?;
        let mut word = |word: &str| words.append(word, ids, || self.model_ids(model, word));
        match tokenizer.get_normalizer().filter(|normalizer| !keeps(normalizer, piece)) {
            None => self.cut(piece, 0, &mut word),
            Some(normalizer) => {
                let mut normalized = NormalizedString::from(piece);
                // The plain pipeline goes on with what it has, too.
                let _ = normalizer.normalize(&mut normalized);
                self.cut(normalized.get(), 0, &mut word)
            }
        }
    }

    fn cut(&self, text: &str, level: usize, word: &mut dyn FnMut(&str) -> Result<()>) -> Result<()> {
        let Some(split) = self.splits.get(level) else {
            return if text.is_empty() { Ok(()) } else { word(text) };
        };
        let mut last = 0;
        for (start, end) in split.find_iter(text) {
            if last < start {
                self.cut(&text[last..start], level + 1, word)?;
            }
            self.cut(&text[start..end], level + 1, word)?;
            last = end;
        }
        self.cut(&text[last..], level + 1, word)
    }

    fn model_ids(&self, model: &BPE, word: &str) -> Result<Vec<u32>> {
        let letters: String = word.bytes().map(|byte| self.letters[usize::from(byte)]).collect();
        Ok(model.tokenize(&letters)?.into_iter().map(|token| token.id).collect())
    }
}

impl Words {
    /// Appends the ids of a word, made if it is new.
    fn append(
        &mut self,
        word: &str,
        ids: &mut Vec<u32>,
        make: impl FnOnce() -> Result<Vec<u32>>,
    ) -> Result<()> {
        if let Some(place) = self.places.get(word) {
            ids.extend_from_slice(&self.ids[place.start as usize..place.end as usize]);
            return Ok(());
        }
        let made = make()?;
        ids.extend_from_slice(&made);
        if word.len() <= WORD_BYTES {
            if self.places.len() == WORDS {
                *self = Self::default();
            }
            let start = self.ids.len() as u32;
            self.ids.extend_from_slice(&made);
            self.places.insert(word.into(), start..self.ids.len() as u32);
        }
        Ok(())
    }
}

/// The model, if a word always has the same ids.
fn bpe(tokenizer: &Tokenizer) -> Option<&BPE> {
    match tokenizer.get_model() {
        ModelWrapper::BPE(bpe) if bpe.dropout.is_none() => Some(bpe),
        _ => None,
    }
}

/// Whether a normaliser leaves a text as it is. ASCII has neither composed letters nor compatibility forms.
fn keeps(normalizer: &NormalizerWrapper, text: &str) -> bool {
    use NormalizerWrapper::{NFC, NFD, NFKC, NFKD};
    matches!(normalizer, NFC(_) | NFD(_) | NFKC(_) | NFKD(_)) && text.is_ascii()
}

/// What cuts text into words; the last pre-tokenizer must be the one that writes bytes as letters.
fn splits(pre_tokenizer: &PreTokenizerWrapper) -> Option<Vec<SysRegex>> {
    let one = std::slice::from_ref(pre_tokenizer);
    let parts = if let PreTokenizerWrapper::Sequence(parts) = pre_tokenizer { parts.as_ref() } else { one };
    let (last, first) = parts.split_last()?;
    let PreTokenizerWrapper::ByteLevel(bytes) = last else { return None };
    if bytes.add_prefix_space {
        return None;
    }
    let pattern = |part: &PreTokenizerWrapper| match part {
        PreTokenizerWrapper::Split(split) if !split.invert => match &split.pattern {
            SplitPattern::Regex(regex) if split.behavior == SplitDelimiterBehavior::Isolated => {
                SysRegex::new(regex).ok()
            }
            _ => None,
        },
        _ => None,
    };
    let mut splits = first.iter().map(pattern).collect::<Option<Vec<_>>>()?;
    if bytes.use_regex {
        splits.push(SysRegex::new(GPT2_SPLIT).ok()?);
    }
    Some(splits)
}

/// Printable bytes stand for themselves, the others for the letters from U+0100 on: GPT-2's table.
fn letters() -> [char; 256] {
    let printable = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 0x100;
    let mut letters = ['\0'; 256];
    for (byte, letter) in (0..).zip(&mut letters) {
        let code = if printable(byte) { byte } else { next };
        next += u32::from(!printable(byte));
        *letter = char::from_u32(code).unwrap_or_default();
    }
    letters
}

#[cfg(test)]
#[path = "quick_tests.rs"]
mod tests;
