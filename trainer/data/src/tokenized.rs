//! A pair as token ids.

use sha2::{Digest, Sha256};

/// Token ids of a pair. The full sequences are `prompt + chosen` and `prompt + rejected`.
#[derive(Clone, Debug, PartialEq)]
pub struct Tokenized {
    /// Ids of the prompt, which both answers continue.
    pub prompt: Vec<u32>,
    /// The preferred answer, and everything that the template puts after it.
    pub chosen: Vec<u32>,
    /// The rejected answer.
    pub rejected: Vec<u32>,
    /// Factor of the pair's loss, from the record's `weight`; finite and at least 0.
    pub weight: f64,
}

impl Tokenized {
    /// A pair of weight 1.
    #[must_use]
    pub fn new(prompt: Vec<u32>, chosen: Vec<u32>, rejected: Vec<u32>) -> Self {
        Self { prompt, chosen, rejected, weight: 1.0 }
    }

    /// All ids of the three parts.
    pub fn tokens(&self) -> impl Iterator<Item = u32> {
        [&self.prompt, &self.chosen, &self.rejected].into_iter().flatten().copied()
    }

    /// First 16 bytes of the SHA-256 over the ids and the length of each part, as two numbers.
    #[must_use]
    pub fn hash(&self) -> (u64, u64) {
        let mut hash = Sha256::new();
        let mut bytes = Vec::new();
        for part in [&self.prompt, &self.chosen, &self.rejected] {
            hash.update((part.len() as u64).to_be_bytes());
            bytes.clear();
            bytes.extend(part.iter().flat_map(|id| id.to_be_bytes()));
            hash.update(&bytes);
        }
        let digest = hash.finalize();
        let number =
            |at: usize| digest[at..at + 8].iter().fold(0, |number, &byte| number << 8 | u64::from(byte));
        (number(0), number(8))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(prompt: &[u32], chosen: &[u32], rejected: &[u32]) -> Tokenized {
        Tokenized::new(prompt.to_vec(), chosen.to_vec(), rejected.to_vec())
    }

    #[test]
    fn hashes_depend_on_every_token_and_on_the_part_boundaries() {
        let hashes = [
            pair(&[1, 2], &[3], &[4]),
            pair(&[1], &[2, 3], &[4]),
            pair(&[1, 2], &[3], &[5]),
            pair(&[1, 2], &[4], &[3]),
            pair(&[1, 2], &[3, 4], &[]),
        ]
        .map(|pair| pair.hash());
        let different: std::collections::HashSet<_> = hashes.iter().collect();
        assert_eq!(different.len(), hashes.len());
        // python3 -c 'import hashlib,struct; print(hashlib.sha256(struct.pack(">QIIQIQI",2,1,2,1,3,1,4)).hexdigest()[:32])'
        assert_eq!(format!("{:016x}{:016x}", hashes[0].0, hashes[0].1), "429d382db28e128ae5cf25465e45f610");
    }
}
