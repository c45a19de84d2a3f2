//! The recorded configuration of a run: `run.json` holds the one of the first start; a resume with another configuration adds a
//! file of its own.

use std::path::{Path, PathBuf};

use dyad_proto::run_config::RECORD;
use dyad_proto::run_folder::{BEST, JOB, RUN_CONFIG, resumed_config};
use dyad_proto::safe_file::{self, Staged};
use dyad_proto::wire::EarlyStopping;
use dyad_proto::{Fault, files};
use serde_json::{Value, json};

use super::rows::unwritten;
use super::unusable;

/// The file with the configuration, ready to be put in place; `None` if the same configuration is recorded already.
pub(super) fn staged(
    dir: &Path,
    config_json: &str,
    record: Option<&Value>,
    resumed: Option<u64>,
) -> Result<Option<Staged>, Fault> {
    let Some(path) = place(dir, config_json, resumed) else { return Ok(None) };
    let staged = Staged::new(&path, text(config_json, record).as_bytes());
    staged.map(Some).map_err(|error| unusable(&path, &error))
}

/// The configuration with one key per line, followed by `record`.
fn text(config_json: &str, record: Option<&Value>) -> String {
    let Some(Value::Object(mut keys)) = parsed(config_json) else { return format!("{config_json}\n") };
    keys.extend(record.map(|record| (RECORD.to_owned(), record.clone())));
    format!("{:#}\n", Value::Object(keys))
}

fn parsed(text: &str) -> Option<Value> {
    serde_json::from_str(text).ok()
}

fn place(dir: &Path, config_json: &str, resumed: Option<u64>) -> Option<PathBuf> {
    let first = dir.join(RUN_CONFIG);
    let mut before = files::read_to_string(&first).ok().and_then(|text| parsed(&text));
    // The record (command, trainers, facts) is not part of the configuration.
    before.as_mut().and_then(Value::as_object_mut).map(|keys| keys.remove(RECORD));
    match (resumed, before) {
        (Some(_), Some(before)) if parsed(config_json).is_some_and(|now| now == before) => None,
        (Some(step), Some(_)) => Some(dir.join(resumed_config(step))),
        _ => Some(first),
    }
}

/// Records which scheduler job owns the run, for later `--job` restarts. A fresh run without a job removes the record; a resume without
/// a job keeps it.
pub(super) fn keep_job(dir: &Path, job: Option<&str>, resumed: bool) -> Result<(), Fault> {
    let path = dir.join(JOB);
    let kept = match job {
        Some(job) => safe_file::write(&path, format!("{job}\n").as_bytes()),
        None if resumed || !path.exists() => Ok(()),
        None => std::fs::remove_file(&path),
    };
    kept.map_err(|error| unusable(&path, &error))
}

/// Writes the best evaluation so far, and the checkpoint that has its model.
pub(super) fn keep_best(dir: &Path, stopping: &EarlyStopping) -> Result<(), Fault> {
    let best = json!({
        "step": stopping.best_step,
        "metric": stopping.metric,
        "value": stopping.best_value,
        "checkpoint": format!("checkpoint-{}", stopping.best_step),
        "evaluated_step": stopping.step,
        "patience_counter": stopping.patience_counter,
        "early_stopped": stopping.stops,
    });
    let path = dir.join(BEST);
    safe_file::write(&path, format!("{best:#}\n").as_bytes()).map_err(|error| unwritten(&path, &error))
}

/// Removes that file if it is about an evaluation after `step`, which a resumed run does again. It is not worth ending a run for.
pub(super) fn drop_best(dir: &Path, step: u64) {
    let path = dir.join(BEST);
    let kept = files::read_to_string(&path).ok().and_then(|text| parsed(&text));
    let evaluated = kept.and_then(|best| best.get("evaluated_step")?.as_u64());
    if evaluated.is_some_and(|evaluated| evaluated > step)
        && let Err(error) = std::fs::remove_file(&path)
    {
        tracing::warn!("cannot remove {}: {error}", path.display());
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn keep(dir: &Path, config_json: &str, resumed: Option<u64>) -> Result<(), Fault> {
        let staged = staged(dir, config_json, None, resumed)?;
        staged.map_or(Ok(()), |staged| staged.place().map(drop).map_err(|error| unusable(dir, &error)))
    }

    #[test]
    fn a_folder_tells_which_job_began_its_run() {
        let dir = tempfile::tempdir().unwrap();
        let begun = || fs::read_to_string(dir.path().join(JOB)).ok();
        for (job, resumed, kept) in [
            (None, false, None),
            (Some("7"), false, Some("7\n")),
            (None, true, Some("7\n")),
            (Some("8"), true, Some("8\n")),
            (None, false, None),
        ] {
            keep_job(dir.path(), job, resumed).unwrap();
            assert_eq!(begun().as_deref(), kept, "{job:?} {resumed}");
        }
    }

    #[test]
    fn a_resume_keeps_the_first_configuration_and_adds_one_that_differs() {
        let dir = tempfile::tempdir().unwrap();
        let written = |epochs: u32| format!("{{\n  \"n_epochs\": {epochs}\n}}\n");
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).ok();
        keep(dir.path(), "{\"n_epochs\":1}", None).unwrap();
        keep(dir.path(), "{ \"n_epochs\": 1 }", Some(4)).unwrap();
        assert_eq!((read("run.json").unwrap(), read("run-from-4.json")), (written(1), None));
        keep(dir.path(), "{\"n_epochs\":2}", Some(6)).unwrap();
        assert_eq!(read("run.json").unwrap(), written(1));
        assert_eq!(read("run-from-6.json").unwrap(), written(2));
        keep(dir.path(), "{\"n_epochs\":3}", None).unwrap();
        assert_eq!(read("run.json").unwrap(), written(3));
        // If run.json was removed, a resume writes it again.
        fs::remove_file(dir.path().join("run.json")).unwrap();
        keep(dir.path(), "{\"n_epochs\":4}", Some(8)).unwrap();
        assert_eq!(read("run.json").unwrap(), written(4));
    }

    #[test]
    fn a_different_command_is_no_change_of_the_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let record = serde_json::json!({ "command": ["launcher", "--config", "run.toml"] });
        let put = |record: &Value, resumed| {
            let staged = staged(dir.path(), "{\"n_epochs\":1}", Some(record), resumed).unwrap();
            staged.map(|staged| staged.place().unwrap()).is_some()
        };
        assert!(put(&record, None));
        let read = || fs::read_to_string(dir.path().join("run.json")).unwrap();
        let first = read();
        assert!(first.contains("\"recorded\": {") && first.contains("\"--config\""), "{first}");
        // The same run, resumed with another command.
        assert!(!put(&serde_json::json!({ "command": ["launcher", "--resume"] }), Some(4)));
        assert_eq!(read(), first);
    }
}
