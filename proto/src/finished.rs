//! Recognises a complete run, and decides whether a resume has anything left to do.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::fingerprint::{Change, Fingerprint, as_map, config_changes};
use crate::manifest::{Damage, Manifest};
use crate::run_config::EARLY_STOPPING_KEYS;
use crate::run_folder::{FINAL, MANIFEST, METRICS, STATE, how_to_go_on, newest_checkpoint};
use crate::{Fault, RunConfig, counted, files};

/// State of a finished run, from `final/dyad_state.json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Finished {
    /// Optimizer steps.
    pub step: u64,
    /// The run ended before its last step, because evaluations no longer improved.
    #[serde(default)]
    pub early_stopped: bool,
    /// The step whose model was kept, if it is not that of `step`.
    #[serde(default)]
    pub best_step: Option<u64>,
    /// Settings and facts of the run; partly empty for earlier versions.
    #[serde(flatten)]
    pub fingerprint: Fingerprint,
}

/// Steps that a configuration asks for, compared with the steps done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asks {
    More,
    Nothing,
    Fewer(u64),
}

/// How a finished run ended early and which step's model it kept, for a message; empty for other runs.
#[must_use]
pub fn ended_early(model: &Path) -> String {
    let kept = files::read_to_string(&model.join(STATE)).ok();
    let state = kept.and_then(|text| serde_json::from_str::<Finished>(&text).ok());
    let Some(Finished { step, early_stopped, best_step, .. }) = state else { return String::new() };
    let best = best_step.map(|best| format!("it is the model of step {best}"));
    let early = early_stopped.then(|| format!("the run stopped early after step {step}"));
    let parts: Vec<String> = early.into_iter().chain(best).collect();
    if parts.is_empty() { String::new() } else { format!(" ({})", parts.join("; ")) }
}

/// Steps that a configuration asks for; `None` if it depends on the length of an epoch and that is unknown (0).
#[must_use]
pub fn total_steps(config: &RunConfig, steps_per_epoch: u64) -> Option<u64> {
    let of_epochs = (steps_per_epoch > 0).then(|| u64::from(config.n_epochs) * steps_per_epoch);
    config.max_steps.or(of_epochs)
}

/// `template_date` of the run in a folder; a resume uses the same date.
#[must_use]
pub fn kept_template_date(dir: &Path) -> Option<String> {
    let folders = [newest_checkpoint(dir), Some(dir.join(FINAL))];
    let state = |folder: PathBuf| files::read_to_string(&folder.join(STATE)).ok();
    let kept = folders.into_iter().flatten().filter_map(state);
    kept.filter_map(|text| serde_json::from_str::<Finished>(&text).ok())
        .find_map(|state| state.fingerprint.config.get("template_date")?.as_str().map(str::to_owned))
}

/// Returns the finished model if a resume with this configuration has nothing left to do, `None` if it has. Fails if more steps are
/// asked for but there is no checkpoint, if fewer are asked for, if the configuration differs, or if the model is damaged. Changes no
/// file. `sha256` returns the hash of the training file.
pub fn complete(
    dir: &Path,
    config: &RunConfig,
    sha256: &dyn Fn() -> Result<String, Fault>,
) -> Result<Option<PathBuf>, Fault> {
    let Some(finished) = Finished::read(dir) else { return Ok(None) };
    let model = dir.join(FINAL);
    match finished.asks(config) {
        Asks::More if newest_checkpoint(dir).is_some() => return Ok(None),
        Asks::More => return Err(finished.nothing_to_go_on_from(&model)),
        Asks::Nothing | Asks::Fewer(_) => {}
    }
    finished.check(config, sha256).map_err(|change| other_run(&model, &change))??;
    match finished.asks(config) {
        Asks::Fewer(total) => {
            Err(fewer(&format!("this run is complete with {}", counted(finished.step, "step")), total))
        }
        _ => match finished.whole(&model) {
            Ok(()) => Ok(Some(model)),
            Err(damage) => Err(damaged(dir, &model, &damage)),
        },
    }
}

fn damaged(dir: &Path, model: &Path, damage: &Damage) -> Fault {
    let again = match newest_checkpoint(dir) {
        Some(checkpoint) => {
            format!("move {} away, then {}", model.display(), how_to_go_on(Some(&checkpoint)))
        }
        None => "there is no checkpoint to make it from again: start again with --overwrite".into(),
    };
    Fault::input(format!("this run is complete, but its model {} is damaged: {damage}", model.display()))
        .hint(again)
}

/// Error for a resume that asks for fewer steps than are done.
#[must_use]
pub fn fewer(what_is_done: &str, total: u64) -> Fault {
    Fault::input(format!("{what_is_done}, but the configuration asks for {total} (n_epochs, max_steps)"))
        .hint("raise them to go on; for a model of fewer steps start a new run in another output_dir")
}

impl Finished {
    fn read(dir: &Path) -> Option<Self> {
        let model = dir.join(FINAL);
        let has_weights = std::fs::read_dir(&model)
            .ok()?
            .flatten()
            .any(|entry| entry.path().extension().is_some_and(|extension| extension == "safetensors"));
        if !has_weights {
            return None;
        }
        let kept = files::read_to_string(&model.join(STATE)).ok();
        kept.and_then(|text| serde_json::from_str(&text).ok()).or_else(|| Self::by_rows(dir))
    }

    /// For a run of an earlier version, which left no state: reads the last row of its metrics.
    fn by_rows(dir: &Path) -> Option<Self> {
        let text = String::from_utf8(files::read_rows(&dir.join(METRICS)).ok()?).ok()?;
        let row: Value = serde_json::from_str(text.lines().last()?).ok()?;
        let (step, epoch) = (row.get("step")?.as_u64()?, row.get("epoch")?.as_f64()?);
        let steps_per_epoch = if epoch > 0.0 { (step as f64 / epoch).round() as u64 } else { 0 };
        let fingerprint = Fingerprint { steps_per_epoch, ..Fingerprint::default() };
        Some(Self { step, early_stopped: false, best_step: None, fingerprint })
    }

    /// Checks that all files exist and have the bytes that were written.
    fn whole(&self, model: &Path) -> Result<(), Damage> {
        match Manifest::read(model)? {
            Some(manifest) => manifest.verify(model),
            // Earlier versions wrote no manifest.
            None if self.fingerprint.is_of_this_version() => Err(Damage::new(MANIFEST, "is missing")),
            None => Ok(()),
        }
    }

    fn asks(&self, config: &RunConfig) -> Asks {
        match total_steps(config, self.fingerprint.steps_per_epoch) {
            Some(total) if total > self.step && !self.stops_again(config) => Asks::More,
            Some(total) if total < self.step => Asks::Fewer(total),
            _ => Asks::Nothing,
        }
    }

    /// Whether the run ended early and would do so again: more steps change nothing, other keys of early stopping do.
    fn stops_again(&self, config: &RunConfig) -> bool {
        let now = as_map(config);
        let same = |key: &&str| self.fingerprint.config.get(*key) == now.get(*key);
        self.early_stopped && EARLY_STOPPING_KEYS.iter().all(same)
    }

    /// The outer error is a difference to the finished run; the inner one is a failure to read the training file.
    fn check(
        &self,
        config: &RunConfig,
        sha256: &dyn Fn() -> Result<String, Fault>,
    ) -> Result<Result<(), Fault>, Change> {
        let then = &self.fingerprint;
        if then.config.is_empty() {
            return Ok(Ok(()));
        }
        let now = match sha256() {
            Ok(now) => now,
            Err(fault) => return Ok(Err(fault)),
        };
        if now != then.dataset_sha256 {
            return Err(Change::of_training_file(&then.dataset_sha256, &now));
        }
        config_changes(&then.config, config).map(|_| Ok(()))
    }

    fn nothing_to_go_on_from(&self, model: &Path) -> Fault {
        let (steps, model) = (counted(self.step, "step"), model.display());
        Fault::input(format!(
            "this run is complete after {steps} ({model}), and left no checkpoint from which to train more steps"
        ))
        .hint(format!(
            "start a new run from its model: from_checkpoint = \"{model}\", with another output_dir (the optimizer, the schedule and \
             DPO's reference start anew there)"
        ))
    }
}

fn other_run(model: &Path, change: &Change) -> Fault {
    Fault::input(format!("this run is complete ({}), with other settings: {change}", model.display()))
        .hint("put back what was changed, or start a new run in another output_dir")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> RunConfig {
        RunConfig { n_epochs: 2, ..RunConfig::default() }
    }

    /// A run of two epochs of three steps.
    fn finished() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let state = serde_json::json!({
            "step": 6, "total_steps": 6, "steps_per_epoch": 3, "dataset_sha256": "aa", "config": as_map(&config()),
        });
        std::fs::create_dir(dir.path().join(FINAL)).unwrap();
        std::fs::write(dir.path().join("final/model.safetensors"), "").unwrap();
        std::fs::write(dir.path().join(FINAL).join(STATE), state.to_string()).unwrap();
        let model = dir.path().join(FINAL);
        Manifest::of(&model, &Default::default()).unwrap().write(&model).unwrap();
        dir
    }

    fn asked(dir: &Path, config: &RunConfig) -> Result<Option<PathBuf>, Fault> {
        complete(dir, config, &|| Ok("aa".into()))
    }

    #[test]
    fn a_run_with_all_requested_steps_is_complete() {
        let dir = finished();
        assert_eq!(asked(dir.path(), &config()), Ok(Some(dir.path().join(FINAL))));
        // The same number of steps, from max_steps.
        let steps = RunConfig { max_steps: Some(6), ..config() };
        assert_eq!(asked(dir.path(), &steps), Ok(Some(dir.path().join(FINAL))));
        std::fs::remove_file(dir.path().join("final/model.safetensors")).unwrap();
        assert_eq!(asked(dir.path(), &config()), Ok(None));
    }

    #[test]
    fn more_steps_need_a_checkpoint() {
        let dir = finished();
        for more in [RunConfig { n_epochs: 3, ..config() }, RunConfig { max_steps: Some(7), ..config() }] {
            let fault = asked(dir.path(), &more).unwrap_err();
            let model = dir.path().join(FINAL);
            assert!(fault.message.contains("complete after 6 steps"), "{fault}");
            assert!(
                fault.hint.contains(&format!("from_checkpoint = \"{}\"", model.display())),
                "{}",
                fault.hint
            );
        }
        // A folder without a state file is not a checkpoint.
        let checkpoint = dir.path().join("checkpoint-3");
        std::fs::create_dir(&checkpoint).unwrap();
        assert!(asked(dir.path(), &RunConfig { n_epochs: 3, ..config() }).is_err());
        std::fs::write(checkpoint.join(STATE), "{}").unwrap();
        assert_eq!(asked(dir.path(), &RunConfig { n_epochs: 3, ..config() }), Ok(None));
    }

    #[test]
    fn a_run_that_stopped_early_is_complete_until_its_early_stopping_is_changed() {
        let dir = finished();
        let early = RunConfig {
            early_stopping_enabled: true,
            validation_file: Some("v".into()),
            n_evals: Some(9),
            ..config()
        };
        let state = serde_json::json!({
            "step": 4, "total_steps": 6, "steps_per_epoch": 3, "dataset_sha256": "aa", "config": as_map(&early),
            "early_stopped": true, "best_step": 2,
        });
        let model = dir.path().join(FINAL);
        std::fs::write(model.join(STATE), state.to_string()).unwrap();
        Manifest::of(&model, &Default::default()).unwrap().write(&model).unwrap();
        for more in [early.clone(), RunConfig { n_epochs: 3, ..early.clone() }] {
            assert_eq!(asked(dir.path(), &more), Ok(Some(model.clone())));
        }
        assert_eq!(ended_early(&model), " (the run stopped early after step 4; it is the model of step 2)");
        let checkpoint = dir.path().join("checkpoint-4");
        std::fs::create_dir(&checkpoint).unwrap();
        std::fs::write(checkpoint.join(STATE), "{}").unwrap();
        for other in [
            RunConfig { early_stopping_patience: Some(5), ..early.clone() },
            RunConfig { early_stopping_enabled: false, ..early.clone() },
        ] {
            assert_eq!(asked(dir.path(), &other), Ok(None));
        }
        assert!(asked(dir.path(), &RunConfig { max_steps: Some(3), ..early }).is_err());
    }

    #[test]
    fn fewer_steps_and_other_runs_are_refused() {
        let dir = finished();
        let fault = asked(dir.path(), &RunConfig { max_steps: Some(2), ..config() }).unwrap_err();
        assert!(fault.message.contains("complete with 6 steps, but the configuration asks for 2"), "{fault}");
        let fault = asked(dir.path(), &RunConfig { dpo_beta: 0.5, ..config() }).unwrap_err();
        assert!(fault.message.ends_with("dpo_beta was 0.1 and is now 0.5"), "{fault}");
        let fault = complete(dir.path(), &config(), &|| Ok("bb".into())).unwrap_err();
        assert!(fault.message.contains("training_file was aa and is now bb"), "{fault}");
        assert!(complete(dir.path(), &config(), &|| Err(Fault::failed("no"))).is_err());
    }

    #[test]
    fn a_complete_run_with_a_damaged_model_is_not_called_complete() {
        let dir = finished();
        let model = dir.path().join(FINAL);
        std::fs::write(model.join("model.safetensors"), "longer").unwrap();
        let fault = asked(dir.path(), &config()).unwrap_err();
        assert!(fault.message.ends_with("is damaged: model.safetensors has 6 bytes, not 0"), "{fault}");
        assert!(fault.hint.contains("--overwrite"), "{}", fault.hint);
        std::fs::write(model.join("model.safetensors"), "").unwrap();
        std::fs::remove_file(model.join(MANIFEST)).unwrap();
        std::fs::create_dir(dir.path().join("checkpoint-3")).unwrap();
        std::fs::write(dir.path().join("checkpoint-3").join(STATE), "{}").unwrap();
        let fault = asked(dir.path(), &config()).unwrap_err();
        assert!(fault.message.ends_with("is damaged: dyad_manifest.json is missing"), "{fault}");
        assert!(
            fault.hint.ends_with("then the same command with --resume goes on from checkpoint-3"),
            "{}",
            fault.hint
        );
    }

    #[test]
    fn a_run_of_an_earlier_version_is_recognised_by_its_metrics() {
        let dir = finished();
        std::fs::remove_file(dir.path().join(FINAL).join(STATE)).unwrap();
        std::fs::remove_file(dir.path().join(FINAL).join(MANIFEST)).unwrap();
        assert_eq!(asked(dir.path(), &config()), Ok(None), "nothing says what was done");
        std::fs::write(dir.path().join(METRICS), "{\"step\":5}\n{\"step\":6,\"epoch\":2.0}\n").unwrap();
        assert_eq!(asked(dir.path(), &config()), Ok(Some(dir.path().join(FINAL))));
        assert!(asked(dir.path(), &RunConfig { n_epochs: 3, ..config() }).is_err());
    }
}
