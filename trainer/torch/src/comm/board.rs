//! Where ranks that are about to connect leave word for each other. Gloo asks for a key-value store; it gets one without a port.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Words by key, the same for all ranks.
pub trait Board: Debug + Send + Sync {
    /// Leaves word; all ranks can read it from then on.
    fn post(&self, key: &str, value: Vec<u8>);

    /// What was left under the key; nothing where nobody has within that time.
    fn read(&self, key: &str, patience: Duration) -> Option<Vec<u8>>;
}

/// What has arrived in this process; by itself the board of ranks that are threads of one.
#[derive(Debug, Default)]
pub struct LocalBoard {
    words: Mutex<HashMap<String, Vec<u8>>>,
    more: Condvar,
}

impl Board for LocalBoard {
    fn post(&self, key: &str, value: Vec<u8>) {
        self.words.lock().unwrap_or_else(PoisonError::into_inner).insert(key.to_owned(), value);
        self.more.notify_all();
    }

    fn read(&self, key: &str, patience: Duration) -> Option<Vec<u8>> {
        let words = self.words.lock().unwrap_or_else(PoisonError::into_inner);
        let missing = |words: &mut HashMap<String, Vec<u8>>| !words.contains_key(key);
        let (words, _) =
            self.more.wait_timeout_while(words, patience, missing).unwrap_or_else(PoisonError::into_inner);
        words.get(key).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_waits_for_the_word_and_not_for_ever() {
        let board = LocalBoard::default();
        assert_eq!(board.read("a", Duration::ZERO), None);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| board.read("a", Duration::from_secs(60)));
            board.post("b", vec![1]);
            board.post("a", vec![2]);
            assert_eq!(reader.join().unwrap(), Some(vec![2]));
        });
    }
}
