//! Tests: every change of a key or fact is refused, listed or ignored according to its role.

use super::*;
use crate::run_config::{FDivergenceType, LossType, TrainingMethod};

fn config() -> RunConfig {
    RunConfig { model: "m".into(), training_file: "t".into(), output_dir: "o".into(), ..RunConfig::default() }
}

/// Returns a different value of the same type.
fn other(value: &Value) -> Value {
    match value {
        Value::Null | Value::String(_) => "other".into(),
        Value::Bool(on) => (!on).into(),
        number => (number.as_f64().unwrap() + 1.0).into(),
    }
}

/// A configuration that reads the LoRA keys as well.
fn reads_all() -> RunConfig {
    RunConfig {
        lora: true,
        lora_r: Some(4),
        lora_alpha: Some(9.0),
        lora_dropout: Some(0.1),
        lora_trainable_modules: Some("q_proj".into()),
        use_rslora: Some(true),
        ..config()
    }
}

#[test]
fn changed_keys_are_refused_listed_or_ignored_by_role() {
    for &(key, role) in ROLES {
        let now = match key {
            "simpo_gamma" => {
                RunConfig { loss_type: LossType::Simpo.into(), simpo_gamma: Some(0.7), ..reads_all() }
            }
            "train_on_inputs" => RunConfig { training_method: TrainingMethod::Sft, ..reads_all() },
            "ref_model_mixup_alpha" | "ref_model_sync_steps" => {
                RunConfig { sync_ref_model: true, ..reads_all() }
            }
            "desirable_weight" | "undesirable_weight" => {
                RunConfig { loss_type: LossType::Kto.into(), ..reads_all() }
            }
            "cpo_alpha" => RunConfig { loss_type: LossType::Cpo.into(), ..reads_all() },
            "discopop_tau" => RunConfig { loss_type: LossType::Discopop.into(), ..reads_all() },
            "f_alpha_divergence_coef" => {
                RunConfig { f_divergence_type: FDivergenceType::AlphaDivergence, ..reads_all() }
            }
            _ => reads_all(),
        };
        let mut then = as_map(&now);
        then[key] = other(&then[key]);
        let found = config_changes(&then, &now);
        match role {
            KeyRole::Computes => assert_eq!(found.expect_err(key).name, key),
            KeyRole::Deliberate => assert_eq!(found.expect(key)[0].name, key),
            KeyRole::Content | KeyRole::Resolved | KeyRole::DoesNotMatter => {
                assert_eq!(found, Ok(vec![]), "{key}")
            }
        }
    }
}

#[test]
fn the_first_key_that_differs_is_named_with_both_values() {
    let now = RunConfig { batch_size: 4, dpo_beta: 0.9, max_steps: Some(7), ..config() };
    let change = config_changes(&as_map(&config()), &now).unwrap_err();
    assert_eq!(change.to_string(), "batch_size was 8 and is now 4");
    let now = RunConfig { max_steps: Some(7), ..config() };
    let changes = config_changes(&as_map(&config()), &now).unwrap();
    assert_eq!(changes[0].to_string(), "max_steps was absent and is now 7");
}

#[test]
fn keys_that_a_run_does_not_read_may_change() {
    assert_eq!(config_changes(&as_map(&config()), &RunConfig { lora_r: Some(3), ..config() }), Ok(vec![]));
    let sft = RunConfig { training_method: TrainingMethod::Sft, ..config() };
    assert_eq!(config_changes(&as_map(&sft), &RunConfig { dpo_beta: 3.0, ..sft }), Ok(vec![]));
}

#[test]
fn explicit_defaults_equal_absent_keys() {
    let adapters = || RunConfig { lora: true, ..config() };
    let then = as_map(&adapters());
    assert_eq!(config_changes(&then, &RunConfig { lora_alpha: Some(128.0), ..adapters() }), Ok(vec![]));
    let spelt = RunConfig { lora_r: Some(64), lora_dropout: Some(0.0), ..adapters() };
    assert_eq!(config_changes(&then, &spelt), Ok(vec![]));
    let change = config_changes(&then, &RunConfig { lora_alpha: Some(8.0), ..adapters() }).unwrap_err();
    assert_eq!(change.to_string(), "lora_alpha was 128.0 and is now 8.0");
    // A neutral value is compared as a fact of the trainers instead.
    assert_eq!(config_changes(&then, &RunConfig { max_seq_length: Some(60), ..adapters() }), Ok(vec![]));
    let then = as_map(&RunConfig { max_seq_length: Some(50), ..config() });
    let change = config_changes(&then, &RunConfig { max_seq_length: Some(60), ..config() }).unwrap_err();
    assert_eq!(change.name, "max_seq_length");
}

#[test]
fn seeds_beyond_the_precision_of_f64_differ() {
    let then = as_map(&RunConfig { random_seed: u64::MAX, ..config() });
    let now = RunConfig { random_seed: u64::MAX - 1, ..config() };
    assert_eq!(config_changes(&then, &now).unwrap_err().name, "random_seed");
}

#[test]
fn a_key_missing_from_the_checkpoint_had_its_default() {
    let mut then = as_map(&config());
    then.remove("optim");
    then.insert("of_another_build".into(), 1.into());
    assert_eq!(config_changes(&then, &config()), Ok(vec![]));
    let now = RunConfig { optim: crate::run_config::Optim::Adamw8bit, ..config() };
    assert_eq!(config_changes(&then, &now).unwrap_err().to_string(), "optim was adamw and is now adamw_8bit");
}

fn facts(pairs: &[(&str, &str)]) -> Vec<Fact> {
    pairs.iter().map(|(name, value)| Fact { name: (*name).into(), value: (*value).into() }).collect()
}

fn kept(pairs: &[(&str, &str)]) -> Map<String, Value> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), Value::from(*value))).collect()
}

#[test]
fn changed_facts_are_refused_unless_they_only_affect_rounding() {
    let then = kept(&[(fact::PROCESSOR, "a"), (fact::WEIGHTS, "1"), ("config.json rope_theta", "10000.0")]);
    let now = facts(&[(fact::PROCESSOR, "b"), (fact::WEIGHTS, "1"), ("config.json rope_theta", "10000.0")]);
    assert_eq!(fact_changes(&then, &now).unwrap()[0].to_string(), "the processor was a and is now b");
    let now = facts(&[(fact::PROCESSOR, "b"), (fact::WEIGHTS, "2"), ("config.json rope_theta", "10000.0")]);
    assert_eq!(fact_changes(&then, &now).unwrap_err().name, fact::WEIGHTS);
}

#[test]
fn added_and_removed_files_are_changes_but_new_facts_are_not() {
    let then = kept(&[(fact::DTYPE, "Float"), ("chat_template.jinja", "1")]);
    let gone = fact_changes(&then, &facts(&[(fact::DTYPE, "Float")])).unwrap_err();
    assert_eq!(gone.to_string(), "chat_template.jinja was 1 and is now absent");
    let now = facts(&[(fact::DTYPE, "Float"), ("chat_template.jinja", "1"), ("tokenizer.json", "2")]);
    assert_eq!(fact_changes(&then, &now).unwrap_err().to_string(), "tokenizer.json was absent and is now 2");
    let now = facts(&[(fact::DTYPE, "Float"), ("chat_template.jinja", "1"), ("something new", "2")]);
    assert_eq!(fact_changes(&then, &now), Ok(vec![]));
}

#[test]
fn a_fingerprint_survives_json_and_an_old_one_is_empty() {
    let kept = Fingerprint {
        dataset_sha256: "aa".into(),
        config: as_map(&config()),
        facts: kept(&[("a", "b")]),
        ..Fingerprint::default()
    };
    let text = serde_json::to_string(&kept).unwrap();
    assert_eq!(serde_json::from_str::<Fingerprint>(&text).unwrap(), kept);
    let old: Fingerprint = serde_json::from_str(r#"{"dataset_sha256":"aa","step":3}"#).unwrap();
    assert!(old.config.is_empty() && old.facts.is_empty());
}
