//! The configuration that a run is recorded with: `run.json` is that of its beginning; a resume with another one adds its own.

use std::fs;
use std::io;
use std::path::Path;

use dyad_proto::run_folder::{RUN_CONFIG, resumed_config};
use dyad_proto::{Fault, safe_file};
use serde_json::Value;

use super::unusable;

/// Puts the configuration where it can be read later.
pub(super) fn keep(dir: &Path, config_json: &str, resumed: Option<u64>) -> Result<(), Fault> {
    let first = dir.join(RUN_CONFIG);
    let before = fs::read_to_string(&first).ok().and_then(|text| serde_json::from_str::<Value>(&text).ok());
    let path = match (resumed, before) {
        (Some(_), Some(before))
            if serde_json::from_str::<Value>(config_json).is_ok_and(|now| now == before) =>
        {
            return Ok(());
        }
        (Some(step), Some(_)) => dir.join(resumed_config(step)),
        _ => first,
    };
    write(&path, config_json).map_err(|error| unusable(&path, &error))
}

/// In one go, so that a full disk or a kill leaves what was there.
fn write(path: &Path, config_json: &str) -> io::Result<()> {
    safe_file::write(path, format!("{config_json}\n").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resume_keeps_the_first_configuration_and_adds_one_that_differs() {
        let dir = tempfile::tempdir().unwrap();
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).ok();
        keep(dir.path(), "{\"n_epochs\":1}", None).unwrap();
        keep(dir.path(), "{ \"n_epochs\": 1 }", Some(4)).unwrap();
        assert_eq!(
            (read("run.json").unwrap().as_str(), read("run-from-4.json")),
            ("{\"n_epochs\":1}\n", None)
        );
        keep(dir.path(), "{\"n_epochs\":2}", Some(6)).unwrap();
        assert_eq!(read("run.json").unwrap(), "{\"n_epochs\":1}\n");
        assert_eq!(read("run-from-6.json").unwrap(), "{\"n_epochs\":2}\n");
        keep(dir.path(), "{\"n_epochs\":3}", None).unwrap();
        assert_eq!(read("run.json").unwrap(), "{\"n_epochs\":3}\n");
        // Somebody removed it.
        fs::remove_file(dir.path().join("run.json")).unwrap();
        keep(dir.path(), "{\"n_epochs\":4}", Some(8)).unwrap();
        assert_eq!(read("run.json").unwrap(), "{\"n_epochs\":4}\n");
    }
}
