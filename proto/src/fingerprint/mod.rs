//! What a run computes, kept in its checkpoints, and what a resume has changed of it. Pure.
//!
//! - PRO-P1: a key or fact that decides a number and differs is refused by name.
//! - PRO-P2: what may be changed is listed, so that no change is silent.

mod roles;

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use self::roles::{ROLES, Role};
use self::roles::{is_neutral, is_read};
use crate::RunConfig;
use crate::wire::Fact;

/// Names of facts.
pub mod fact {
    /// Version and digest of the trainer program.
    pub const BUILD: &str = "the trainer's build";
    /// The libtorch that it runs on.
    pub const LIBTORCH: &str = "libtorch";
    /// `cpu` or `cuda`.
    pub const DEVICE: &str = "the kind of device";
    /// What kernels are chosen by: instruction sets, or a GPU's generation.
    pub const PROCESSOR: &str = "the processor";
    /// Precision of the passes.
    pub const DTYPE: &str = "dtype";
    /// Most tokens of a sequence.
    pub const MAX_SEQ_LENGTH: &str = "max_seq_length";
    /// Digest of the weights that the run starts from.
    pub const WEIGHTS: &str = "the content of the weights of `model`";
    /// Digest of the adapter that the run starts from.
    pub const ADAPTER: &str = "the content of the adapter that training starts from";
    /// The step of the checkpoint that a rank has read.
    pub const STEP: &str = "the step of the checkpoint";
    /// Digest of the weights and moments that a rank has read from the checkpoint.
    pub const STATES: &str = "the content of the checkpoint";
}

const MODULES: &str = "lora_trainable_modules";

/// Facts that change the rounding of sums at most: another machine or build goes on with the run, and says so.
const ROUNDING: [&str; 4] = [fact::BUILD, fact::LIBTORCH, fact::DEVICE, fact::PROCESSOR];

/// What a run computes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Fingerprint {
    /// SHA-256 of the training file.
    pub dataset_sha256: String,
    /// SHA-256 of the validation file; empty without one.
    pub validation_sha256: String,
    /// Steps that one pass over the kept pairs takes; 0 where that was not written down.
    pub steps_per_epoch: u64,
    /// The configuration; empty in checkpoints of builds that did not keep it.
    pub config: Map<String, Value>,
    /// What the trainers said of files, weights and machine, by name.
    pub facts: Map<String, Value>,
}

impl Fingerprint {
    /// Written by a version that also writes checksums of all files.
    #[must_use]
    pub fn is_of_this_version(&self) -> bool {
        !self.config.is_empty() || !self.facts.is_empty()
    }
}

/// A difference between a checkpoint and the run that resumes from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// What differs.
    pub name: String,
    /// What the checkpoint says.
    pub then: String,
    /// What it is now.
    pub now: String,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} was {} and is now {}", self.name, self.then, self.now)
    }
}

impl Change {
    /// Of the training file, which has no digest among the facts.
    #[must_use]
    pub fn of_training_file(then: &str, now: &str) -> Self {
        Self { name: "the SHA-256 of training_file".into(), then: then.into(), now: now.into() }
    }

    fn between(name: &str, then: &Value, now: &Value) -> Option<Self> {
        (!same(then, now)).then(|| Self { name: name.to_owned(), then: shown(then), now: shown(now) })
    }
}

/// The keys that were changed deliberately; or the first that must not change.
pub fn config_changes(then: &Map<String, Value>, now: &RunConfig) -> Result<Vec<Change>, Change> {
    let (defaults, current) = (as_map(&RunConfig::default()), as_map(now));
    let (then, defaults) = (effective(then, &defaults), effective(&defaults, &defaults));
    let current = effective(&current, &defaults);
    let mut deliberate = Vec::new();
    for &(key, role) in ROLES {
        let Some(change) = Change::between(key, &then[key], &current[key]) else { continue };
        match role {
            Role::Computes if is_read(key, now) => return Err(change),
            Role::Resolved if !is_neutral(&then[key]) && !is_neutral(&current[key]) => return Err(change),
            Role::Deliberate => deliberate.push(change),
            _ => {}
        }
    }
    Ok(deliberate)
}

/// What trainers say now against what they said then: what only rounds otherwise; or the first that computes otherwise.
pub fn fact_changes(then: &Map<String, Value>, now: &[Fact]) -> Result<Vec<Change>, Change> {
    let mut rounding = Vec::new();
    let absent = Value::Null;
    let said = |name: &str| now.iter().find(|fact| fact.name == name);
    let gone = then.iter().filter(|(name, _)| is_of_file(name) && said(name).is_none());
    let gone = gone.filter_map(|(name, value)| Change::between(name, value, &absent));
    let changed = now.iter().filter_map(|fact| {
        let now = Value::from(fact.value.as_str());
        match then.get(&fact.name) {
            Some(then) => Change::between(&fact.name, then, &now),
            // Facts of another kind are new with this build; a file, or a field of one, was not there.
            None if is_of_file(&fact.name) => Change::between(&fact.name, &absent, &now),
            None => None,
        }
    });
    for change in changed.chain(gone) {
        if !ROUNDING.contains(&change.name.as_str()) {
            return Err(change);
        }
        rounding.push(change);
    }
    Ok(rounding)
}

/// Whether ranks that differ in it train together all the same, to the rounding of sums.
#[must_use]
pub fn may_differ_between_ranks(name: &str) -> bool {
    name == fact::PROCESSOR
}

/// Whether a fact is a file of a model folder, or a field of one.
fn is_of_file(name: &str) -> bool {
    name.contains(".json") || name.contains(".jinja")
}

/// The configuration as it is kept.
#[must_use]
pub fn as_map(config: &RunConfig) -> Map<String, Value> {
    match serde_json::to_value(config) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

/// With a value for every key: what was left out had its default, and `lora_alpha` follows from `lora_r`. (Where the run starts from an
/// adapter, both are the adapter's, whose file is compared.)
fn effective(config: &Map<String, Value>, defaults: &Map<String, Value>) -> Map<String, Value> {
    let mut all = defaults.clone();
    all.extend(config.iter().map(|(key, value)| (key.clone(), value.clone())));
    for (key, default) in
        [("lora_r", 64.into()), ("lora_dropout", 0.0.into()), (MODULES, "all-linear".into())]
    {
        if all.get(key).is_none_or(Value::is_null) {
            all.insert(key.to_owned(), default);
        }
    }
    if all.get("lora_alpha").is_none_or(Value::is_null) {
        let alpha = all.get("lora_r").and_then(Value::as_f64).map(|r| 2.0 * r);
        all.insert("lora_alpha".to_owned(), alpha.into());
    }
    all
}

/// A number is the same however it is written.
fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        // Whole numbers may be larger than a float can tell apart.
        (Some(x), Some(y)) if a.as_u64().is_none() || b.as_u64().is_none() => x == y,
        _ => a == b,
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "absent".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests;
