//! Checks, before anything is written, that a resume continues the run of the checkpoint. Pure.

use std::path::Path;

use dyad_proto::checkpoint_state::RunIdentity;
use dyad_proto::fingerprint::{Change, config_changes};
use dyad_proto::finished::{fewer, total_steps};
use dyad_proto::run_config::LrSchedulerType;
use dyad_proto::{Fault, RunConfig, counted};

/// The run as it is started now.
#[derive(Clone, Debug)]
pub struct Now {
    /// The checked config.
    pub config: RunConfig,
    /// SHA-256 of the training file.
    pub dataset_sha256: String,
    /// SHA-256 of the validation file; empty without one.
    pub validation_sha256: String,
    /// Trainers that take part.
    pub world_size: u32,
}

/// Fails on the first difference that makes it another run; otherwise returns warnings, such as a list of deliberate changes.
pub fn same_run(path: &Path, step: u64, then: &RunIdentity, now: &Now) -> Result<Vec<String>, Fault> {
    let deliberate = changes(then, now).map_err(|change| {
        Fault::input(format!("cannot resume from {}: {change}", path.display()))
            .hint("resume with the data and config of that run, or start anew with --overwrite")
    })?;
    if let Some(total) =
        total_steps(&now.config, then.fingerprint.steps_per_epoch).filter(|total| *total < step)
    {
        return Err(fewer(&format!("{} has done {}", path.display(), counted(step, "step")), total));
    }
    let mut words = Vec::new();
    if then.fingerprint.config.is_empty() {
        words.push(format!(
            "{} was written by an earlier version: nothing but the training file, random_seed and batch_size could be compared; \
             the run goes on with the config, model, adapter and tokenizer that it finds now",
            path.display()
        ));
    }
    if !deliberate.is_empty() {
        let list: Vec<String> = deliberate.iter().map(ToString::to_string).collect();
        words.push(format!(
            "going on from {} with changes: {}{}",
            path.display(),
            list.join(", "),
            schedule(&deliberate, now, step)
        ));
    }
    Ok(words)
}

fn changes(then: &RunIdentity, now: &Now) -> Result<Vec<Change>, Change> {
    let kept = &then.fingerprint;
    if kept.dataset_sha256 != now.dataset_sha256 {
        return Err(Change::of_training_file(&kept.dataset_sha256, &now.dataset_sha256));
    }
    let number = |name: &str, then: u64, now: u64| {
        let change = Change { name: name.to_owned(), then: then.to_string(), now: now.to_string() };
        (then != now).then_some(change)
    };
    if kept.config.is_empty() {
        let seed = number("random_seed", then.random_seed, now.config.random_seed);
        let size = number("batch_size", then.batch_size.into(), now.config.batch_size.into());
        return seed.or(size).map_or(Ok(Vec::new()), Err);
    }
    let mut deliberate = config_changes(&kept.config, &now.config)?;
    if kept.validation_sha256 != now.validation_sha256 {
        let shown =
            |sha: &str| if sha.is_empty() { "absent".to_owned() } else { sha.chars().take(16).collect() };
        let (then, now) = (shown(&kept.validation_sha256), shown(&now.validation_sha256));
        deliberate.push(Change { name: "the SHA-256 of validation_file".into(), then, now });
    }
    if then.world_size > 0 {
        deliberate.extend(number("the number of trainers", then.world_size.into(), now.world_size.into()));
    }
    Ok(deliberate)
}

/// Note on the learning rate for a changed run length: the schedule spans the whole run, so it changes with the length.
fn schedule(changes: &[Change], now: &Now, step: u64) -> String {
    let resized = changes.iter().any(|change| ["n_epochs", "max_steps"].contains(&change.name.as_str()));
    use LrSchedulerType::{Constant, InverseSqrt};
    let endless =
        matches!(now.config.lr_scheduler_type, Constant | InverseSqrt) && now.config.warmup_ratio == 0.0;
    if !resized || endless {
        return String::new();
    }
    format!("; from step {} on the learning rate is that of a run of the new length", step + 1)
}

#[cfg(test)]
mod tests {
    use dyad_proto::fingerprint::as_map;

    use dyad_proto::fingerprint::Fingerprint;

    use super::*;

    fn config() -> RunConfig {
        RunConfig { n_epochs: 2, ..RunConfig::default() }
    }

    fn then() -> RunIdentity {
        let fingerprint = Fingerprint {
            dataset_sha256: "aa".into(),
            steps_per_epoch: 3,
            config: as_map(&config()),
            ..Fingerprint::default()
        };
        RunIdentity { random_seed: 42, batch_size: 8, world_size: 2, fingerprint }
    }

    fn now(config: RunConfig) -> Now {
        Now { config, dataset_sha256: "aa".into(), validation_sha256: String::new(), world_size: 2 }
    }

    fn words(then: &RunIdentity, now: &Now) -> Result<Vec<String>, Fault> {
        same_run(Path::new("out/checkpoint-4"), 4, then, now)
    }

    #[test]
    fn the_same_run_resumes_without_warnings() {
        assert_eq!(words(&then(), &now(config())), Ok(vec![]));
    }

    #[test]
    fn a_change_of_the_computation_is_refused_by_name() {
        let fault = words(&then(), &now(RunConfig { dpo_beta: 0.9, ..config() })).unwrap_err();
        assert_eq!(fault.message, "cannot resume from out/checkpoint-4: dpo_beta was 0.1 and is now 0.9");
        let other = Now { dataset_sha256: "bb".into(), ..now(config()) };
        let fault = words(&then(), &other).unwrap_err();
        assert!(fault.message.ends_with("the SHA-256 of training_file was aa and is now bb"), "{fault}");
    }

    #[test]
    fn deliberate_changes_are_one_line_with_the_effect_on_the_schedule() {
        let longer = Now { world_size: 1, ..now(RunConfig { n_epochs: 3, ..config() }) };
        let line = "going on from out/checkpoint-4 with changes: n_epochs was 2 and is now 3, \
                    the number of trainers was 2 and is now 1; from step 5 on the learning rate is that of a run of the new length";
        assert_eq!(words(&then(), &longer), Ok(vec![line.to_owned()]));
        let constant = RunConfig { lr_scheduler_type: LrSchedulerType::Constant, ..config() };
        let mut then = then();
        then.fingerprint.config = as_map(&constant);
        let line = words(&then, &now(RunConfig { n_epochs: 3, ..constant })).unwrap().remove(0);
        assert!(line.ends_with("n_epochs was 2 and is now 3"), "{line}");
    }

    #[test]
    fn changed_validation_pairs_are_listed() {
        let other = Now { validation_sha256: "cc".into(), ..now(config()) };
        assert!(words(&then(), &other).unwrap()[0].contains("validation_file was absent and is now cc"));
    }

    #[test]
    fn fewer_total_steps_than_done_are_refused() {
        for config in [RunConfig { n_epochs: 1, ..config() }, RunConfig { max_steps: Some(3), ..config() }] {
            let fault = words(&then(), &now(config)).unwrap_err();
            assert!(fault.message.contains("has done 4 steps, but the configuration asks for 3"), "{fault}");
        }
        assert!(words(&then(), &now(RunConfig { max_steps: Some(4), ..config() })).is_ok());
    }

    #[test]
    fn a_checkpoint_of_an_earlier_version_is_compared_by_its_few_keys() {
        let mut old = then();
        old.fingerprint.config.clear();
        let line = words(&old, &now(RunConfig { dpo_beta: 0.9, ..config() })).unwrap().remove(0);
        assert!(line.contains("written by an earlier version"), "{line}");
        assert!(words(&old, &now(RunConfig { random_seed: 1, ..config() })).is_err());
        assert!(words(&old, &now(RunConfig { batch_size: 1, ..config() })).is_err());
    }
}
