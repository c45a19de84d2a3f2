//! Key-value store through which ranks exchange addresses before they connect. Gloo needs one; this one opens no port.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// A key-value store that all ranks share.
pub trait Board: Debug + Send + Sync {
    /// Stores a value; from then on all ranks can read it.
    fn post(&self, key: &str, value: Vec<u8>);

    /// Waits for the value of a key; `None` if it is still missing after `patience`.
    fn read(&self, key: &str, patience: Duration) -> Option<Vec<u8>>;
}

/// Values that have arrived in this process. On its own it is a board for ranks that are threads of one process.
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
    fn read_waits_for_its_key_until_the_timeout() {
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
