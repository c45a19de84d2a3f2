//! Ids of plain text without a chat template: the same as `tokenizer(text)` in transformers, which adds special tokens.
//!
//! The post-processor of tokenizer.json decides which tokens are added. transformers 5.23 ignores `add_bos_token` and `add_eos_token`
//! of tokenizer_config.json if there is a tokenizer.json (`PreTrainedTokenizerBase._from_pretrained`).

use tokenizers::Tokenizer;

/// Ids that are added before and after the ids of a text.
#[derive(Debug)]
pub(crate) struct Around {
    before: Vec<u32>,
    after: Vec<u32>,
}

/// Texts that are encoded to find out which ids a post-processor adds.
const PROBES: [&str; 3] = ["a", "Hello there", ""];

impl Around {
    /// Finds the ids that the post-processor adds; `None` if they differ between texts or are not at the ends.
    pub(crate) fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let ids = |text: &str, special| Some(tokenizer.encode_fast(text, special).ok()?.get_ids().to_vec());
        let mut found: Option<Self> = None;
        for text in PROBES {
            let (bare, whole) = (ids(text, false)?, ids(text, true)?);
            let added = whole.len().checked_sub(bare.len())?;
            let is_at = |at: &usize| whole[*at..].starts_with(&bare);
            let before = match &found {
                Some(around) => around.before.len(),
                None => (0..=added).find(is_at)?,
            };
            let around =
                Self { before: whole.get(..before)?.into(), after: whole.get(before + bare.len()..)?.into() };
            let same = |known: &Self| (&known.before, &known.after) == (&around.before, &around.after);
            if !is_at(&before) || found.as_ref().is_some_and(|known| !same(known)) {
                return None;
            }
            found = Some(around);
        }
        found
    }

    /// Adds the ids before and after.
    pub(crate) fn put(&self, ids: &[u32]) -> Vec<u32> {
        [&self.before, ids, &self.after].concat()
    }
}
