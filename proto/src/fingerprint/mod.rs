//! Settings and facts that decide a run's numbers. Checkpoints keep them; a resume compares them. Pure.
//!
//! - PRO-P1: a resume fails, naming the key or fact, if one that decides a number differs.
//! - PRO-P2: every permitted change is listed, so that no change is silent.

mod roles;

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use self::roles::{KeyRole, ROLES};
use self::roles::{is_neutral, is_read};
use crate::RunConfig;
use crate::run_config::adapter_keys;
use crate::wire::Fact;

/// Names of facts.
pub mod fact {
    /// Version and digest of the trainer program.
    pub const BUILD: &str = "the trainer's build";
    /// Version of libtorch.
    pub const LIBTORCH: &str = "libtorch";
    /// `cpu` or `cuda`.
    pub const DEVICE: &str = "the kind of device";
    /// Decides which kernels run: the CPU's instruction sets, or the GPU's generation.
    pub const PROCESSOR: &str = "the processor";
    /// Precision of the forward and backward passes.
    pub const DTYPE: &str = "dtype";
    /// Maximum tokens of a sequence.
    pub const MAX_SEQ_LENGTH: &str = "max_seq_length";
    /// Digest of the weights that the run starts from.
    pub const WEIGHTS: &str = "the content of the weights of `model`";
    /// Digest of the adapter that the run starts from.
    pub const ADAPTER: &str = "the content of the adapter that training starts from";
    /// Step of the checkpoint that a rank has read.
    pub const STEP: &str = "the step of the checkpoint";
    /// Digest of the weights and moments that a rank has read from the checkpoint.
    pub const STATES: &str = "the content of the checkpoint";
}

const MODULES: &str = "lora_trainable_modules";

/// Facts that change at most the rounding of sums. A resume on another machine or build is allowed and logged.
const ROUNDING: [&str; 4] = [fact::BUILD, fact::LIBTORCH, fact::DEVICE, fact::PROCESSOR];

/// The settings and facts that decide a run's numbers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Fingerprint {
    /// SHA-256 of the training file.
    pub dataset_sha256: String,
    /// SHA-256 of the validation file; empty if there is no validation file.
    pub validation_sha256: String,
    /// Steps of one pass over the kept pairs; 0 if unknown.
    pub steps_per_epoch: u64,
    /// The configuration; empty in checkpoints of builds that did not keep it.
    pub config: Map<String, Value>,
    /// Facts that the trainers reported about files, weights and machine, by name.
    pub facts: Map<String, Value>,
}

impl Fingerprint {
    /// Whether this was written by a version that also writes checksums of all files.
    #[must_use]
    pub fn is_of_this_version(&self) -> bool {
        !self.config.is_empty() || !self.facts.is_empty()
    }
}

/// A difference between a checkpoint and the run that resumes from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Name of the key or fact.
    pub name: String,
    /// Value in the checkpoint.
    pub then: String,
    /// Value now.
    pub now: String,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} was {} and is now {}", self.name, self.then, self.now)
    }
}

impl Change {
    /// A change of the training file, which is not among the facts.
    #[must_use]
    pub fn of_training_file(then: &str, now: &str) -> Self {
        Self { name: "the SHA-256 of training_file".into(), then: then.into(), now: now.into() }
    }

    fn between(name: &str, then: &Value, now: &Value) -> Option<Self> {
        (!same(then, now)).then(|| Self { name: name.to_owned(), then: shown(then), now: shown(now) })
    }
}

/// Returns the changed keys that may change, or as an error the first one that must not.
pub fn config_changes(then: &Map<String, Value>, now: &RunConfig) -> Result<Vec<Change>, Change> {
    let (defaults, current) = (as_map(&RunConfig::default()), as_map(now));
    let (then, defaults) = (effective(then, &defaults), effective(&defaults, &defaults));
    let current = effective(&current, &defaults);
    let mut deliberate = Vec::new();
    for &(key, role) in ROLES {
        let Some(change) = Change::between(key, &then[key], &current[key]) else { continue };
        match role {
            KeyRole::Computes if is_read(key, now) => return Err(change),
            KeyRole::Resolved if !is_neutral(&then[key]) && !is_neutral(&current[key]) => return Err(change),
            KeyRole::Deliberate => deliberate.push(change),
            _ => {}
        }
    }
    Ok(deliberate)
}

/// Compares the trainers' facts with those of the checkpoint. Returns the changes that only affect rounding, or as an error the first
/// other change.
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
            // A missing file (or field of a file) did not exist then. Other missing facts are new in this build.
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

/// Whether ranks may differ in this fact; the difference affects at most the rounding of sums.
#[must_use]
pub fn may_differ_between_ranks(name: &str) -> bool {
    name == fact::PROCESSOR
}

/// Whether a fact is about a file of a model folder, or about a field of such a file.
fn is_of_file(name: &str) -> bool {
    name.contains(".json") || name.contains(".jinja")
}

/// The configuration as a JSON object, as checkpoints keep it.
#[must_use]
pub fn as_map(config: &RunConfig) -> Map<String, Value> {
    match serde_json::to_value(config) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

/// Fills in every absent key with its default; `lora_alpha` follows from `lora_r`. (A run that starts from an adapter takes both from
/// the adapter's file, which is compared as a fact.)
fn effective(config: &Map<String, Value>, defaults: &Map<String, Value>) -> Map<String, Value> {
    let mut all = defaults.clone();
    all.extend(config.iter().map(|(key, value)| (key.clone(), value.clone())));
    let usual = [("lora_r", 64.into()), ("lora_dropout", 0.0.into()), (MODULES, "all-linear".into())];
    for (key, default) in usual.into_iter().chain(adapter_keys()) {
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

/// Whether two values are equal; `1` and `1.0` are. Patterns in another order are not: the first that matches counts.
fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        // Do not compare two integers as f64: large ones would lose digits.
        (Some(x), Some(y)) if a.as_u64().is_none() || b.as_u64().is_none() => x == y,
        _ => match (a, b) {
            (Value::Object(a), Value::Object(b)) => a.iter().eq(b.iter()),
            _ => a == b,
        },
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
