//! Pre-tokenizers as cuts of a text, without copies and offsets.

use std::borrow::Cow;
use std::ops::Range;

use tokenizers::models::ModelWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::utils::SysRegex;
use tokenizers::{
    Model, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Result, SplitDelimiterBehavior,
};

use super::joints::Joints;

/// The default split of a `ByteLevel` pre-tokenizer.
const GPT2_SPLIT: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

type Word<'w> = &'w mut dyn FnMut(&str) -> Result<()>;

/// Cuts normalised text into words, and turns words into ids.
#[derive(Debug)]
pub(super) struct Cuts {
    /// The first cuts the text, the next cuts the resulting pieces, and so on.
    cuts: Vec<Cut>,
    joints: Option<Joints>,
    /// The character for each byte, for byte-level vocabularies; `None` if the vocabulary holds characters.
    letters: Option<[char; 256]>,
    /// Pre-tokenizers that cut a word after its bytes were replaced by `letters`.
    after: Vec<PreTokenizerWrapper>,
}

#[derive(Debug)]
enum Cut {
    Split { at: CutSpans, behavior: SplitDelimiterBehavior },
    Spaces { by: char, scheme: PrependScheme, split: bool },
}

impl Cut {
    fn treats_first(&self) -> bool {
        matches!(self, Self::Spaces { scheme: PrependScheme::First, .. })
    }
}

/// Pattern of a split.
#[derive(Debug)]
enum CutSpans {
    Regex { regex: SysRegex, invert: bool },
    Numeric,
    Whitespace,
}

impl Cuts {
    /// Builds the cuts; `None` if a pre-tokenizer is not supported. The model must give a word the same ids at every position.
    pub(super) fn of(pre_tokenizer: Option<&PreTokenizerWrapper>, model: &ModelWrapper) -> Option<Self> {
        let mut parts = Vec::new();
        flatten(pre_tokenizer, &mut parts);
        let bytes = parts.iter().position(|part| matches!(part, PreTokenizerWrapper::ByteLevel(_)));
        match bytes {
            Some(at) => Self::of_bytes(&parts[..at], parts[at], &parts[at + 1..]),
            None => Self::of_characters(&parts, model),
        }
    }

    fn of_bytes(
        before: &[&PreTokenizerWrapper],
        bytes: &PreTokenizerWrapper,
        after: &[&PreTokenizerWrapper],
    ) -> Option<Self> {
        let PreTokenizerWrapper::ByteLevel(bytes) = bytes else { return None };
        use PreTokenizerWrapper::{Digits, Punctuation, Split};
        // These depend only on the word itself.
        if bytes.add_prefix_space
            || !after.iter().all(|part| matches!(part, Digits(_) | Punctuation(_) | Split(_)))
        {
            return None;
        }
        let mut cuts = before.iter().map(|part| cut(part)).collect::<Option<Vec<_>>>()?;
        if cuts.iter().any(|cut| matches!(cut, Cut::Spaces { .. })) {
            return None;
        }
        if bytes.use_regex {
            let regex = SysRegex::new(GPT2_SPLIT).ok()?;
            cuts.push(Cut::Split {
                at: CutSpans::Regex { regex, invert: false },
                behavior: SplitDelimiterBehavior::Isolated,
            });
        }
        let after = after.iter().map(|&part| part.clone()).collect();
        Some(Self { cuts, joints: None, letters: Some(letters()), after })
    }

    fn of_characters(parts: &[&PreTokenizerWrapper], model: &ModelWrapper) -> Option<Self> {
        let cuts = parts.iter().map(|part| cut(part)).collect::<Option<Vec<_>>>()?;
        let joints = if let ModelWrapper::BPE(bpe) = model { Joints::of(bpe) } else { None };
        let splits = |cut: &Cut| matches!(cut, Cut::Spaces { split: true, .. });
        // Without cuts, each whole text would be a word, and the cache of words would be useless.
        let worthwhile = joints.is_some() || cuts.iter().any(splits);
        let found = Self { cuts, joints, letters: None, after: Vec::new() };
        // After another cut, the first piece may not be at the start of the text.
        let known = !found.cuts.iter().skip(1).any(Cut::treats_first);
        (worthwhile && known).then_some(found)
    }

    /// Whether the first piece of a text is treated differently from the others.
    pub(super) fn treats_first(&self) -> bool {
        self.cuts.iter().any(Cut::treats_first)
    }

    /// Cuts a text that is not empty; `first`: it is at the start of the whole text.
    pub(super) fn cut(&self, text: &str, first: bool, word: Word<'_>) -> Result<()> {
        match &self.joints {
            None => self.cut_from(0, text, first, word),
            Some(joints) => self.cut_from(0, text, first, &mut |part| joints.cut(part, word)),
        }
    }

    fn cut_from(&self, level: usize, text: &str, first: bool, word: Word<'_>) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        match self.cuts.get(level) {
            None => word(text),
            Some(Cut::Split { at, behavior }) => {
                let mut piece = |range: Range<usize>| {
                    let first = first && range.start == 0;
                    self.cut_from(level + 1, &text[range], first, word)
                };
                split(at, *behavior, text, &mut piece)
            }
            Some(Cut::Spaces { by, scheme, split }) => {
                let text = spaces(text, *by, *scheme, first);
                if !split {
                    return self.cut_from(level + 1, &text, first, word);
                }
                let mut last = 0;
                for (at, _) in text.match_indices(*by) {
                    self.cut_from(level + 1, &text[last..at], first && last == 0, word)?;
                    last = at;
                }
                self.cut_from(level + 1, &text[last..], first && last == 0, word)
            }
        }
    }

    /// Ids of a word.
    pub(super) fn ids(&self, model: &ModelWrapper, word: &str) -> Result<Vec<u32>> {
        let ids = |word: &str| Ok(model.tokenize(word)?.into_iter().map(|token| token.id).collect());
        let Some(letters) = &self.letters else { return ids(word) };
        let written: String = word.bytes().map(|byte| letters[usize::from(byte)]).collect();
        if self.after.is_empty() {
            return ids(&written);
        }
        let mut parts = PreTokenizedString::from(written);
        for part in &self.after {
            part.pre_tokenize(&mut parts)?;
        }
        let parts = parts.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
        let ids: Result<Vec<Vec<u32>>> = parts.into_iter().map(|(part, _, _)| ids(part)).collect();
        Ok(ids?.concat())
    }
}

fn flatten<'p>(pre_tokenizer: Option<&'p PreTokenizerWrapper>, parts: &mut Vec<&'p PreTokenizerWrapper>) {
    match pre_tokenizer {
        Some(PreTokenizerWrapper::Sequence(sequence)) => {
            sequence.as_ref().iter().for_each(|part| flatten(Some(part), parts));
        }
        other => parts.extend(other),
    }
}

fn cut(part: &PreTokenizerWrapper) -> Option<Cut> {
    use SplitDelimiterBehavior::{Contiguous, Isolated, Removed};
    let (at, behavior) = match part {
        PreTokenizerWrapper::Metaspace(metaspace) => return Some(metaspace_cut(metaspace)),
        PreTokenizerWrapper::Split(split) => (regex(split)?, split.behavior),
        PreTokenizerWrapper::Digits(digits) => {
            (CutSpans::Numeric, if digits.individual_digits { Isolated } else { Contiguous })
        }
        PreTokenizerWrapper::WhitespaceSplit(_) => (CutSpans::Whitespace, Removed),
        _ => return None,
    };
    Some(Cut::Split { at, behavior })
}

fn metaspace_cut(metaspace: &Metaspace) -> Cut {
    Cut::Spaces {
        by: metaspace.get_replacement(),
        scheme: metaspace.get_prepend_scheme(),
        split: metaspace.get_split(),
    }
}

/// Supports regular expressions, and of string patterns only the space, which needs no escape.
fn regex(split: &Split) -> Option<CutSpans> {
    let regex = match &split.pattern {
        SplitPattern::Regex(regex) => regex,
        SplitPattern::String(text) => Some(text).filter(|text| *text == " ")?,
    };
    Some(CutSpans::Regex { regex: SysRegex::new(regex).ok()?, invert: split.invert })
}

/// SentencePiece: replaces spaces by `by` (`▁`), and prepends one if the scheme asks for it and the text does not start with it.
fn spaces(text: &str, by: char, scheme: PrependScheme, first: bool) -> Cow<'_, str> {
    let mut written = Cow::Borrowed(text);
    if text.contains(' ') {
        written = text.replace(' ', by.encode_utf8(&mut [0; 4])).into();
    }
    let wanted = scheme == PrependScheme::Always || scheme == PrependScheme::First && first;
    if wanted && !written.starts_with(by) {
        written.to_mut().insert(0, by);
    }
    written
}

type Take<'t> = &'t mut dyn FnMut(Range<usize>) -> Result<()>;

fn split(at: &CutSpans, behavior: SplitDelimiterBehavior, text: &str, take: Take<'_>) -> Result<()> {
    use SplitDelimiterBehavior::{Contiguous, Isolated, MergedWithNext, MergedWithPrevious, Removed};
    match behavior {
        Isolated => at.find(text, &mut |range, _| take(range)),
        Removed => at.find(text, &mut |range, matches| if matches { Ok(()) } else { take(range) }),
        _ => {
            let mut spans = Vec::new();
            at.find(text, &mut |range, matches| {
                spans.push((range, matches));
                Ok(())
            })?;
            let joins: fn(bool, bool) -> bool = match behavior {
                Contiguous => |before, matches| before == matches,
                _ => |before, matches| matches && !before,
            };
            if behavior == MergedWithNext {
                spans.reverse();
            }
            debug_assert!(matches!(behavior, Contiguous | MergedWithPrevious | MergedWithNext));
            let mut pieces = joined(spans, joins);
            if behavior == MergedWithNext {
                pieces.reverse();
            }
            pieces.into_iter().try_for_each(take)
        }
    }
}

/// Joins each span to the previous one if `joins(previous matches, this matches)`.
fn joined(spans: Vec<(Range<usize>, bool)>, joins: fn(bool, bool) -> bool) -> Vec<Range<usize>> {
    let mut pieces: Vec<Range<usize>> = Vec::new();
    let mut before = false;
    for (span, matches) in spans {
        match pieces.last_mut().filter(|_| joins(before, matches)) {
            Some(last) => *last = last.start.min(span.start)..last.end.max(span.end),
            None => pieces.push(span),
        }
        before = matches;
    }
    pieces
}

impl CutSpans {
    /// Calls `take` for every part of a text in order, and tells whether it matches the pattern.
    fn find(&self, text: &str, take: &mut dyn FnMut(Range<usize>, bool) -> Result<()>) -> Result<()> {
        match self {
            Self::Regex { regex, invert } => {
                each(text, regex.find_iter(text), &mut |range, matches| take(range, matches != *invert))
            }
            Self::Numeric => each(text, characters(text, char::is_numeric), take),
            Self::Whitespace => each(text, characters(text, char::is_whitespace), take),
        }
    }
}

fn characters(text: &str, is: fn(char) -> bool) -> impl Iterator<Item = (usize, usize)> + '_ {
    text.match_indices(is).map(|(at, found)| (at, at + found.len()))
}

fn each(
    text: &str,
    found: impl Iterator<Item = (usize, usize)>,
    take: &mut dyn FnMut(Range<usize>, bool) -> Result<()>,
) -> Result<()> {
    let mut last = 0;
    for (start, end) in found {
        if last < start {
            take(last..start, false)?;
        }
        take(start..end, true)?;
        last = end;
    }
    if last < text.len() { take(last..text.len(), false) } else { Ok(()) }
}

/// GPT-2's table: printable bytes map to themselves, other bytes to characters from U+0100 on.
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
