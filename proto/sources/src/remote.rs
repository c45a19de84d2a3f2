//! Fetches files of pairs by their address. What was fetched last for an address is recorded, so that it is found without the network.

use std::path::Path;

use dyad_proto::{ErrorCode, Fault, files, safe_file};

use crate::chosen::Fetched;
use crate::{cache, hub, objects};

/// Whether to ask the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetch {
    /// Fetch what is not here, or has changed.
    Missing,
    /// Use only what was fetched before.
    Nothing,
}

/// The files of an address, in the order of their names; `None` if they were not fetched before and `how` asks for nothing.
pub fn files_of(address: &str, how: Fetch) -> Result<Option<Vec<Fetched>>, Fault> {
    let record = cache::folder()?.join(format!("fetched-{}.json", cache::text_sha256(address)));
    if how == Fetch::Nothing {
        return Ok(known(&record));
    }
    let fetched = match address.strip_prefix("hf://") {
        Some(_) => hub::datasets::fetch(address),
        None => objects::fetch(address),
    };
    match fetched {
        Ok(found) => {
            let json = serde_json::to_string(&found)
                .map_err(|error| Fault::failed(format!("cannot record what was fetched: {error}")))?;
            safe_file::write(&record, json.as_bytes()).map_err(|error| cache::unwritable(&record, &error))?;
            Ok(Some(found))
        }
        // As with models, the copies of an earlier run are used if nobody answers; their checksum decides whether a resume may use them.
        Err(fault) if fault.code == ErrorCode::Unavailable => match known(&record) {
            Some(found) => {
                tracing::warn!(
                    address,
                    reason = fault.message,
                    "cannot be asked: what was fetched last is used"
                );
                Ok(Some(found))
            }
            None => Err(fault),
        },
        Err(fault) => Err(fault),
    }
}

fn known(record: &Path) -> Option<Vec<Fetched>> {
    let text = files::read_to_string(record).ok()?;
    let found: Vec<Fetched> = serde_json::from_str(&text).ok()?;
    found.iter().all(|file| file.path.is_file()).then_some(found)
}
