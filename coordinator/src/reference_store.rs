//! Reference log-probabilities on disk, kept across runs: one SQLite file, shared by all runs of a user.
//!
//! A row's key is SHA-256 over the trainer's reference key and the pair's own text: whatever changes the number (model,
//! tokenizer, template, precision, sequence limit, one character of the pair) changes the key.

use std::path::{Path, PathBuf};

use dyad_proto::wire::{ReferenceLogps, Split};
use dyad_proto::{Fault, RunConfig};
use rusqlite::{Connection, OptionalExtension, params};
use sha2::{Digest, Sha256};

use crate::dataset::Datasets;
use crate::references::Known;

/// Another run may be writing: how long to wait for it.
const BUSY: std::time::Duration = std::time::Duration::from_secs(30);

/// The open file, seen through one reference key.
#[derive(Debug)]
pub struct ReferenceStore {
    path: PathBuf,
    connection: Connection,
    reference_key: String,
}

/// Where a run keeps them: what its config says, else the user's cache folder.
#[must_use]
pub fn path(config: &RunConfig) -> PathBuf {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")));
    match (&config.reference_cache, cache) {
        (Some(path), _) => PathBuf::from(path),
        (None, Some(cache)) => cache.join("dyad/reference.sqlite"),
        (None, None) => Path::new(&config.output_dir).join("reference.sqlite"),
    }
}

impl ReferenceStore {
    /// Opens the file, or makes it.
    pub fn open(path: &Path, reference_key: &str) -> Result<Self, Fault> {
        if reference_key.is_empty() {
            return Err(Fault::failed("rank 0 did not say which reference model it holds")
                .hint("run the coordinator and all trainers from the same build"));
        }
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).map_err(|error| Fault::input(cannot(path, &error)).hint(HINT))?;
        }
        let connection = Connection::open(path).and_then(|connection| {
            connection.busy_timeout(BUSY)?;
            // Losing the last rows to a power cut costs computing them again.
            connection.pragma_update(None, "journal_mode", "WAL")?;
            connection.pragma_update(None, "synchronous", "NORMAL")?;
            connection.execute_batch(
                "CREATE TABLE IF NOT EXISTS reference_logps
                 (key BLOB PRIMARY KEY, chosen REAL NOT NULL, rejected REAL NOT NULL) WITHOUT ROWID",
            )?;
            Ok(connection)
        });
        let connection = connection.map_err(|error| Fault::input(cannot(path, &error)).hint(HINT))?;
        Ok(Self { path: path.to_owned(), connection, reference_key: reference_key.to_owned() })
    }

    /// What is known of any pair of the run.
    pub fn recall(&mut self, data: &Datasets) -> Result<Vec<Known>, Fault> {
        let mut known = Vec::new();
        for split in [Split::Train, Split::Validation] {
            let Some(dataset) = data.of(split) else { continue };
            let keys = (0..dataset.records() as u64).map(|id| (id, self.key(dataset.json(id))));
            let found: Result<Vec<Known>, rusqlite::Error> = (|| {
                let mut statement = self
                    .connection
                    .prepare_cached("SELECT chosen, rejected FROM reference_logps WHERE key = ?1")?;
                let mut found = Vec::new();
                for (id, key) in keys {
                    let row = statement.query_row(params![&key[..]], |row| {
                        Ok(ReferenceLogps { chosen: row.get(0)?, rejected: row.get(1)? })
                    });
                    found.extend(row.optional()?.map(|logps| Known { split, id, logps }));
                }
                Ok(found)
            })();
            known.extend(found.map_err(|error| self.broken(&error))?);
        }
        Ok(known)
    }

    /// Writes what is new.
    pub fn keep(&mut self, new: &[Known], data: &Datasets) -> Result<(), Fault> {
        if new.is_empty() {
            return Ok(());
        }
        let rows: Vec<_> = new
            .iter()
            .filter_map(|known| Some((self.key(data.of(known.split)?.json(known.id)), known.logps)))
            .collect();
        let written = self.connection.transaction().and_then(|transaction| {
            {
                let mut statement = transaction.prepare_cached(
                    "INSERT OR REPLACE INTO reference_logps (key, chosen, rejected) VALUES (?1, ?2, ?3)",
                )?;
                for (key, logps) in &rows {
                    statement.execute(params![&key[..], logps.chosen, logps.rejected])?;
                }
            }
            transaction.commit()
        });
        written.map_err(|error| self.broken(&error))
    }

    fn key(&self, json: &str) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(self.reference_key.as_bytes());
        hash.update([0]);
        hash.update(json.as_bytes());
        hash.finalize().into()
    }

    fn broken(&self, error: &rusqlite::Error) -> Fault {
        Fault::failed(cannot(&self.path, error)).hint(HINT)
    }
}

const HINT: &str = "name a file that can be written in `reference_cache`, or delete a damaged one; \
                    reference_logps = \"compute\" needs none";

fn cannot(path: &Path, error: &dyn std::fmt::Display) -> String {
    format!("cannot use the reference cache {}: {error}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(question: &str) -> String {
        format!(
            r#"{{"input":{{"messages":[{{"role":"user","content":"{question}"}}]}},"preferred_output":[{{"role":"assistant","content":"Hello"}}],"non_preferred_output":[{{"role":"assistant","content":"No"}}]}}"#
        )
    }

    fn data(dir: &Path, questions: &[&str]) -> Datasets {
        let path = dir.join("pairs.jsonl");
        let lines: Vec<String> = questions.iter().map(|question| line(question)).collect();
        std::fs::write(&path, lines.join("\n")).unwrap();
        let config = RunConfig { training_file: path.display().to_string(), ..RunConfig::default() };
        Datasets::load(&config).unwrap()
    }

    fn known(id: u64, chosen: f64) -> Known {
        Known { split: Split::Train, id, logps: ReferenceLogps { chosen, rejected: -2.5 } }
    }

    #[test]
    fn another_run_finds_the_same_pairs_wherever_they_stand() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/down/reference.sqlite");
        let first = data(dir.path(), &["a", "b"]);
        let mut store = ReferenceStore::open(&path, "model").unwrap();
        store.keep(&[known(1, -1.25)], &first).unwrap();
        drop(store);
        let second = data(dir.path(), &["c", "d", "b"]);
        let mut store = ReferenceStore::open(&path, "model").unwrap();
        assert_eq!(store.recall(&second).unwrap(), [known(2, -1.25)]);
        assert!(ReferenceStore::open(&path, "other model").unwrap().recall(&second).unwrap().is_empty());
    }

    #[test]
    fn a_file_that_is_no_store_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("reference.sqlite");
        std::fs::write(
            &path,
            "this is a letter, not a database, and long enough to be told from one".repeat(9),
        )
        .unwrap();
        let fault = ReferenceStore::open(&path, "model").unwrap_err();
        assert!(
            fault.message.contains(&path.display().to_string()) && fault.hint.contains("reference_cache"),
            "{fault}"
        );
        assert_eq!(fault.code.exit_status(), 2);
    }
}
