//! Reference log-probabilities on disk, kept across runs: one SQLite file, shared by all runs of a user.
//!
//! A row's key is SHA-256 over the trainer's reference key and the hash of the pair's token ids. The key changes with everything that
//! changes the score (the model, its arithmetic, one token), and with nothing else. So a template that writes today's date misses
//! yesterday's scores, and another file with the same conversations finds all of them.

use std::path::{Path, PathBuf};

use dyad_proto::wire::ReferenceLogps;
use dyad_proto::{Fault, RunConfig, counted};
use rusqlite::{Connection, OptionalExtension, params};
use sha2::{Digest, Sha256};

use crate::run::references::{Known, PairKey};

/// How long to wait while another run writes to the file. This run is blocked meanwhile.
const BUSY: std::time::Duration = std::time::Duration::from_secs(5);

/// `user_version` of the file. Version 0 stored rows by the text of pairs in the table `reference_logps`; they are left unchanged.
const VERSION: i32 = 1;

/// The open file, for one reference key.
#[derive(Debug)]
pub struct ReferenceStore {
    path: PathBuf,
    connection: Connection,
    reference_key: String,
}

/// Path of the file: `reference_cache` of the config, else in the user's cache folder, else in `output_dir`.
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

/// Why the file cannot be used.
#[derive(Debug)]
pub enum StoreTrouble {
    /// The disk is full or fails, or another process has locked the file: the run can go on without it.
    Passing(Fault),
    /// The file is not such a database, or is damaged: the run fails.
    Lasting(Fault),
}

impl StoreTrouble {
    fn of(error: &rusqlite::Error, fault: Fault) -> Self {
        use rusqlite::ErrorCode::{DatabaseBusy, DatabaseLocked, DiskFull, SystemIoFailure};
        let passing = [DatabaseBusy, DatabaseLocked, DiskFull, SystemIoFailure];
        match error.sqlite_error_code().is_some_and(|code| passing.contains(&code)) {
            true => Self::Passing(fault),
            false => Self::Lasting(fault),
        }
    }
}

impl ReferenceStore {
    /// Opens the file; creates it if it does not exist.
    pub fn open(path: &Path, reference_key: &str) -> Result<Self, StoreTrouble> {
        if reference_key.is_empty() {
            let unsaid = Fault::failed("rank 0 did not say which reference model it holds");
            return Err(StoreTrouble::Lasting(
                unsaid.hint("run the coordinator and all trainers from the same build"),
            ));
        }
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder)
                .map_err(|error| StoreTrouble::Lasting(Fault::input(cannot(path, &error)).hint(HINT)))?;
        }
        // Refuse pipes and devices first: SQLite would wait for a pipe and write to a device.
        if path.symlink_metadata().is_ok() {
            dyad_proto::files::open(path)
                .map_err(|error| StoreTrouble::Lasting(Fault::input(cannot(path, &error)).hint(HINT)))?;
        }
        let opened = Connection::open(path).and_then(|connection| {
            connection.busy_timeout(BUSY)?;
            // Rows lost to a power cut are only computed again.
            connection.pragma_update(None, "journal_mode", "WAL")?;
            connection.pragma_update(None, "synchronous", "NORMAL")?;
            connection.execute_batch(
                "CREATE TABLE IF NOT EXISTS reference_logps_by_tokens
                 (key BLOB PRIMARY KEY, chosen REAL NOT NULL, rejected REAL NOT NULL) WITHOUT ROWID",
            )?;
            let unused = unused_rows(&connection)?;
            connection.pragma_update(None, "user_version", VERSION)?;
            Ok((connection, unused))
        });
        let (connection, unused) = opened
            .map_err(|error| StoreTrouble::of(&error, Fault::input(cannot(path, &error)).hint(HINT)))?;
        if unused > 0 {
            tracing::warn!(
                "{} holds {} of an older Dyad, kept by the text of pairs, whose tokens may have changed since: not used",
                path.display(),
                counted(unused, "reference log-probability")
            );
        }
        Ok(Self { path: path.to_owned(), connection, reference_key: reference_key.to_owned() })
    }

    /// Returns the stored scores of these pairs.
    pub fn recall(&mut self, pairs: Vec<PairKey>) -> Result<Vec<Known>, StoreTrouble> {
        let found: Result<Vec<Known>, rusqlite::Error> = (|| {
            let mut statement = self
                .connection
                .prepare_cached("SELECT chosen, rejected FROM reference_logps_by_tokens WHERE key = ?1")?;
            let mut found = Vec::new();
            for key in pairs {
                let row = statement.query_row(params![&self.key(key)[..]], |row| {
                    Ok(ReferenceLogps { chosen: row.get(0)?, rejected: row.get(1)? })
                });
                found.extend(row.optional()?.map(|logps| Known { key, logps }));
            }
            Ok(found)
        })();
        found.map_err(|error| StoreTrouble::of(&error, self.broken(&error)))
    }

    /// Stores new scores.
    pub fn keep(&mut self, new: &[Known]) -> Result<(), Fault> {
        if new.is_empty() {
            return Ok(());
        }
        let rows: Vec<_> = new.iter().map(|known| (self.key(known.key), known.logps)).collect();
        let written = self.connection.transaction().and_then(|transaction| {
            {
                let mut statement = transaction.prepare_cached(
                    "INSERT OR REPLACE INTO reference_logps_by_tokens (key, chosen, rejected) VALUES (?1, ?2, ?3)",
                )?;
                for (key, logps) in &rows {
                    statement.execute(params![&key[..], logps.chosen, logps.rejected])?;
                }
            }
            transaction.commit()
        });
        written.map_err(|error| self.broken(&error))
    }

    fn key(&self, PairKey { tokens: (high, low), .. }: PairKey) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(self.reference_key.as_bytes());
        hash.update([0]);
        hash.update(high.to_be_bytes());
        hash.update(low.to_be_bytes());
        hash.finalize().into()
    }

    fn broken(&self, error: &rusqlite::Error) -> Fault {
        Fault::failed(cannot(&self.path, error)).hint(HINT)
    }
}

/// Number of old rows in a file that this version has not opened yet; 0 afterwards, so that the warning appears once.
fn unused_rows(connection: &Connection) -> Result<i64, rusqlite::Error> {
    let version: i32 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let old = "SELECT count(*) FROM sqlite_master WHERE name = 'reference_logps'";
    if version >= VERSION || connection.query_row(old, [], |row| row.get::<_, i64>(0))? == 0 {
        return Ok(0);
    }
    connection.query_row("SELECT count(*) FROM reference_logps", [], |row| row.get(0))
}

const HINT: &str = "name a file that can be written in `reference_cache`, or delete a damaged one; \
                    reference_logps = \"compute\" needs none";

fn cannot(path: &Path, error: &dyn std::fmt::Display) -> String {
    format!("cannot use the reference cache {}: {error}", path.display())
}

#[cfg(test)]
mod tests {
    use dyad_proto::wire::Split;

    use super::*;

    fn pair(id: u64, tokens: u64) -> PairKey {
        PairKey { split: Split::Train, id, tokens: (7, tokens) }
    }

    fn known(key: PairKey, chosen: f64) -> Known {
        Known { key, logps: ReferenceLogps { chosen, rejected: -2.5 } }
    }

    #[test]
    fn another_run_finds_scores_by_tokens_not_by_id_or_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/down/reference.sqlite");
        let mut store = ReferenceStore::open(&path, "model").unwrap();
        store.keep(&[known(pair(1, 100), -1.25)]).unwrap();
        drop(store);
        let elsewhere = PairKey { split: Split::Validation, ..pair(2, 100) };
        let asked = || vec![pair(0, 98), pair(1, 99), elsewhere];
        let mut store = ReferenceStore::open(&path, "model").unwrap();
        assert_eq!(store.recall(asked()).unwrap(), [known(elsewhere, -1.25)]);
        assert!(ReferenceStore::open(&path, "other model").unwrap().recall(asked()).unwrap().is_empty());
    }

    #[test]
    fn rows_of_an_older_version_are_counted_once_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("reference.sqlite");
        let old = Connection::open(&path).unwrap();
        old.execute_batch(
            "CREATE TABLE reference_logps (key BLOB PRIMARY KEY, chosen REAL, rejected REAL) WITHOUT ROWID;
             INSERT INTO reference_logps VALUES (x'01', -1, -2), (x'02', -1, -2);",
        )
        .unwrap();
        assert_eq!(unused_rows(&old).unwrap(), 2);
        drop(ReferenceStore::open(&path, "model").unwrap());
        assert_eq!(unused_rows(&old).unwrap(), 0);
        let left: i64 = old.query_row("SELECT count(*) FROM reference_logps", [], |row| row.get(0)).unwrap();
        assert_eq!(left, 2);
    }

    #[test]
    fn opening_a_file_that_is_no_database_fails_and_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("reference.sqlite");
        std::fs::write(
            &path,
            "this is a letter, not a database, and long enough to be told from one".repeat(9),
        )
        .unwrap();
        let StoreTrouble::Lasting(fault) = ReferenceStore::open(&path, "model").unwrap_err() else {
            panic!("the fault must be lasting");
        };
        assert!(
            fault.message.contains(&path.display().to_string()) && fault.hint.contains("reference_cache"),
            "{fault}"
        );
        assert_eq!(fault.code.exit_status(), 2);
    }

    /// With passing trouble the run goes on without the store; a damaged file is lasting trouble.
    #[test]
    fn a_full_disk_and_a_locked_file_are_passing_trouble() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.sqlite");
        let mut store = ReferenceStore::open(&path, "key").unwrap();
        let of = |error: &rusqlite::Error| StoreTrouble::of(error, Fault::failed("x"));
        store.connection.pragma_update(None, "max_page_count", 1).unwrap();
        let many = "CREATE TABLE t AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 9999) SELECT i FROM n";
        let full = store.connection.execute_batch(many).unwrap_err();
        assert!(matches!(of(&full), StoreTrouble::Passing(_)), "{full}");
        let other = Connection::open(&path).unwrap();
        other.execute_batch("BEGIN IMMEDIATE").unwrap();
        store.connection.busy_timeout(std::time::Duration::ZERO).unwrap();
        let busy = store.connection.execute_batch("BEGIN IMMEDIATE").unwrap_err();
        assert!(matches!(of(&busy), StoreTrouble::Passing(_)), "{busy}");
        let key = PairKey { split: Split::Train, id: 1, tokens: (1, 2) };
        let known = Known { key, logps: ReferenceLogps { chosen: 1.0, rejected: 2.0 } };
        assert!(store.keep(&[known]).is_err());
    }
}
