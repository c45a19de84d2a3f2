//! Ids of words that were met before, as many as fit.

use std::collections::HashMap;
use std::ops::Range;

use tokenizers::Result;

/// Words that one thread remembers, and bytes of the longest.
pub(super) const WORDS: usize = 1 << 16;
const WORD_BYTES: usize = 64;

/// Ids of words.
#[derive(Debug, Default)]
pub(super) struct Words {
    pub(super) places: HashMap<Box<str>, Range<u32>>,
    ids: Vec<u32>,
}

impl Words {
    /// Appends the ids of a word, made if it is new.
    pub(super) fn append(
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
