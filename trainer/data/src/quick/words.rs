//! Cache of the ids of words.

use std::collections::HashMap;
use std::ops::Range;

use tokenizers::Result;

/// Most words in a cache, which is emptied when it is full; and the longest cached word in bytes.
pub(super) const WORDS: usize = 1 << 16;
const WORD_BYTES: usize = 64;

/// Words and their ids; one cache per thread.
#[derive(Debug, Default)]
pub(super) struct Words {
    /// Ranges of `ids`.
    pub(super) places: HashMap<Box<str>, Range<u32>>,
    ids: Vec<u32>,
}

impl Words {
    /// Appends the ids of a word; calls `make` if the word is not cached.
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
