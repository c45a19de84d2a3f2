//! Finds added tokens as the crate does: some in the original text, the others in the normalised rest.

use aho_corasick::{AhoCorasick, AhoCorasickBuilder, MatchKind};
use tokenizers::{AddedToken, NormalizedString, Normalizer, Tokenizer};

/// Tokens that one search finds.
#[derive(Debug)]
pub(super) struct Search {
    automaton: AhoCorasick,
    /// Ids by pattern number.
    ids: Vec<u32>,
    /// Length of the longest token in bytes.
    pub(super) longest: usize,
}

/// All added tokens of a tokenizer.
#[derive(Debug)]
pub(super) struct Added {
    pub(super) raw: Search,
    pub(super) normalized: Search,
}

impl Added {
    /// `None` if a token strips spaces or depends on its neighbours.
    pub(super) fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let mut tokens: Vec<_> = tokenizer.get_added_tokens_decoder().into_values().collect();
        tokens.sort_unstable_by(|a, b| a.content.cmp(&b.content));
        if tokens.iter().any(|token| token.single_word || token.lstrip || token.rstrip) {
            return None;
        }
        let (normalized, raw): (Vec<_>, Vec<_>) = tokens.into_iter().partition(|token| token.normalized);
        Some(Self { raw: Search::of(tokenizer, &raw)?, normalized: Search::of(tokenizer, &normalized)? })
    }
}

impl Search {
    fn of(tokenizer: &Tokenizer, tokens: &[AddedToken]) -> Option<Self> {
        let pattern = |token: &AddedToken| {
            let mut content = NormalizedString::from(token.content.as_str());
            if let (true, Some(normalizer)) = (token.normalized, tokenizer.get_normalizer()) {
                normalizer.normalize(&mut content).ok()?;
            }
            // An empty pattern would match everywhere.
            Some(content.get().to_owned()).filter(|content| !content.is_empty())
        };
        let patterns = tokens.iter().map(pattern).collect::<Option<Vec<_>>>()?;
        let id = |token: &AddedToken| tokenizer.token_to_id(&token.content);
        Some(Self {
            ids: tokens.iter().map(id).collect::<Option<_>>()?,
            longest: patterns.iter().map(String::len).max().unwrap_or(0),
            automaton: AhoCorasickBuilder::new()
                .match_kind(MatchKind::LeftmostLongest)
                .build(patterns)
                .ok()?,
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Start, end and id of each token in a text.
    pub(super) fn find<'s>(&'s self, text: &'s str) -> impl Iterator<Item = (usize, usize, u32)> + 's {
        let found = (!self.is_empty()).then(|| self.automaton.find_iter(text));
        found.into_iter().flatten().map(|one| (one.start(), one.end(), self.ids[one.pattern().as_usize()]))
    }
}
