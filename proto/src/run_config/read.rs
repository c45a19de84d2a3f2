//! Parses TOML text and `--set` overrides into a configuration. Errors name line and key.

use super::RunConfig;
use super::foreign::{instead_of, instead_of_value};
use crate::Fault;

pub(super) const KEYS: [&str; 86] = [
    "model",
    "model_revision",
    "training_file",
    "validation_file",
    "dataset_format",
    "output_dir",
    "training_method",
    "train_on_inputs",
    "assistant_only_loss",
    "from_checkpoint",
    "n_epochs",
    "max_steps",
    "batch_size",
    "learning_rate",
    "lr_scheduler_type",
    "min_lr_ratio",
    "scheduler_num_cycles",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "max_seq_length",
    "template_date",
    "random_seed",
    "shuffle",
    "dtype",
    "reduce_dtype",
    "lora",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_trainable_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "init_lora_weights",
    "merge_adapter",
    "loss_type",
    "loss_weights",
    "dpo_beta",
    "label_smoothing",
    "dpo_normalize_logratios_by_length",
    "rpo_alpha",
    "desirable_weight",
    "undesirable_weight",
    "dpo_reference_free",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "simpo_gamma",
    "cpo_alpha",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "ld_alpha",
    "discopop_tau",
    "use_weighting",
    "reference_logps",
    "reference_cache",
    "n_checkpoints",
    "save_steps",
    "save_minutes",
    "save_total_limit",
    "n_evals",
    "eval_steps",
    "eval_on_start",
    "n_samples",
    "max_new_tokens",
    "early_stopping_enabled",
    "early_stopping_patience",
    "early_stopping_min_delta",
    "early_stopping_warmup_evals",
    "metric_for_best_model",
    "greater_is_better",
    "micro_batch_tokens",
    "prefix_sharing",
    "activation_checkpointing",
    "zero_stage",
    "optim",
    "offload_optimizer",
    "offload_reference",
    "model_loading",
];

/// Key of a `run.json` that is not configuration: a record of command, trainers and facts.
pub const RECORD: &str = "recorded";

/// Parses TOML text or a `run.json` into keys and values.
pub(super) fn table_of(text: &str, source: &str) -> Result<toml::Table, Fault> {
    if text.trim_start().starts_with('{') {
        return table_of_json(text, source);
    }
    text.parse().map_err(|error: toml::de::Error| {
        let line = error.span().map_or(1, |span| line_of(text, span.start));
        Fault::input(format!("{source} line {line}: {}", error.message().trim()))
            .hint("the file must be valid TOML, or a run.json; a text stands in quotes: key = \"text\"")
    })
}

fn table_of_json(text: &str, source: &str) -> Result<toml::Table, Fault> {
    let bad = |reason: String| {
        Fault::input(format!("{source}: {reason}")).hint("the file must be valid TOML, or a run.json")
    };
    let keys: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(text).map_err(|error| bad(error.to_string()))?;
    // In a run.json, null means that the key is not set.
    let set = keys.into_iter().filter(|(key, value)| key != RECORD && !value.is_null());
    set.map(|(key, value)| match toml::Value::try_from(value) {
        Ok(value) => Ok((key, value)),
        Err(error) => Err(bad(format!("`{key}`: {error}"))),
    })
    .collect()
}

pub(super) fn known(key: &str) -> Result<(), Fault> {
    if KEYS.contains(&key) {
        return Ok(());
    }
    let nearest =
        KEYS.iter().max_by(|a, b| strsim::jaro_winkler(key, a).total_cmp(&strsim::jaro_winkler(key, b)));
    let fault = Fault::input(format!("unknown config key `{key}`"));
    if let Some(instead) = instead_of(key) {
        return Err(fault.hint(instead));
    }
    Err(match nearest {
        Some(nearest) if strsim::jaro_winkler(key, nearest) > 0.75 => {
            fault.hint(format!("did you mean `{nearest}`?"))
        }
        _ => fault.hint(format!("known keys: {}", KEYS.join(", "))),
    })
}

/// Adds a hint if the unknown key is a section, as in configurations of other trainers.
pub(super) fn without_sections(fault: Fault, value: &toml::Value) -> Fault {
    match value {
        toml::Value::Table(_) => {
            fault.hint("a configuration has no sections: write the keys without [brackets] above them")
        }
        _ => fault,
    }
}

pub(super) fn at(fault: Fault, source: &str, text: &str, key: &str) -> Fault {
    let names = |line: &str| {
        let rest = line.trim_start().trim_start_matches(['"', '[']).strip_prefix(key);
        rest.is_some_and(|rest| rest.trim_start().starts_with(['=', '"', ']', '.']))
    };
    let line = text.lines().position(names);
    Fault { message: format!("{source} line {}: {}", line.map_or(1, |at| at + 1), fault.message), ..fault }
}

pub(super) fn line_of(text: &str, offset: usize) -> usize {
    text[..offset.min(text.len())].matches('\n').count() + 1
}

pub(super) fn parse_override(item: &str) -> Result<(String, toml::Value), Fault> {
    let Some((key, value)) = item.split_once('=') else {
        return Err(Fault::input(format!("--set {item}: expected key=value"))
            .hint("for example --set learning_rate=1e-6"));
    };
    let (key, value) = (key.trim(), value.trim());
    let in_override = |fault: Fault| Fault { message: format!("--set {item}: {}", fault.message), ..fault };
    known(key).map_err(in_override)?;
    // `--set model=my/folder` needs no quotes: a text that is not a TOML value is taken as a string.
    let literal = || toml::Value::String(value.to_owned());
    let parsed = parse_value(value).unwrap_or_else(literal);
    match typed(key, &parsed) {
        Ok(()) => Ok((key.to_owned(), parsed)),
        // A folder may be called 2026-11-29 or 1, which TOML reads as a date and a number.
        Err(_) if !parsed.is_str() && typed(key, &literal()).is_ok() => Ok((key.to_owned(), literal())),
        Err(fault) => Err(in_override(fault)),
    }
}

/// Parses one TOML value; `None` if the text is not a value or has more than one line.
fn parse_value(text: &str) -> Option<toml::Value> {
    if text.contains(['\n', '\r']) {
        return None;
    }
    format!("v = {text}").parse::<toml::Table>().ok()?.remove("v")
}

pub(super) fn from_table(table: &toml::Table, source: &str, text: &str) -> Result<RunConfig, Fault> {
    // Check one key at a time, so that every type error names its key.
    for (key, value) in table {
        typed(key, value).map_err(|fault| at(fault, source, text, key))?;
    }
    let promoted: toml::Table =
        table.iter().map(|(key, value)| (key.clone(), promote(key, value.clone()))).collect();
    promoted
        .try_into()
        .map_err(|error: toml::de::Error| Fault::input(format!("{source}: {}", error.message().trim())))
}

fn typed(key: &str, value: &toml::Value) -> Result<(), Fault> {
    let single = toml::Table::from_iter([(key.to_owned(), promote(key, value.clone()))]);
    let Err(error) = single.try_into::<RunConfig>() else { return Ok(()) };
    let message = [
        ("expected f64", "expected a number"),
        ("expected u8", "expected a whole number from 0 to 3"),
        ("expected u32", "expected a whole number from 0 to 4294967295"),
        ("expected u64", "expected a whole number of at least 0"),
    ]
    .into_iter()
    .fold(error.message().trim().to_owned(), |message, (type_name, words)| message.replace(type_name, words));
    let hint = value.as_str().and_then(|value| instead_of_value(key, value));
    Err(Fault::input(format!("config key `{key}`: {message}"))
        .hint(hint.unwrap_or("see docs/config.md for every key and its type")))
}

/// Converts integers to floats where a float is expected, and a boolean `activation_checkpointing` to `"full"` or `"none"`.
fn promote(key: &str, value: toml::Value) -> toml::Value {
    const FLOATS: [&str; 22] = [
        "learning_rate",
        "min_lr_ratio",
        "scheduler_num_cycles",
        "warmup_ratio",
        "weight_decay",
        "max_grad_norm",
        "lora_alpha",
        "lora_dropout",
        "dpo_beta",
        "label_smoothing",
        "rpo_alpha",
        "desirable_weight",
        "undesirable_weight",
        "ref_model_mixup_alpha",
        "simpo_gamma",
        "cpo_alpha",
        "f_alpha_divergence_coef",
        "ld_alpha",
        "discopop_tau",
        "loss_weights",
        "save_minutes",
        "early_stopping_min_delta",
    ];
    match value {
        toml::Value::Boolean(on) if key == "activation_checkpointing" => {
            toml::Value::String(if on { "full" } else { "none" }.into())
        }
        toml::Value::Integer(integer) if FLOATS.contains(&key) => toml::Value::Float(integer as f64),
        toml::Value::Array(values) if FLOATS.contains(&key) => {
            toml::Value::Array(values.into_iter().map(|value| promote(key, value)).collect())
        }
        other => other,
    }
}
