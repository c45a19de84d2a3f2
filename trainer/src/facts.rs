//! Facts that decide this rank's results: files, machine, weights. They are compared between ranks, and between a resumed run and its
//! checkpoint.

use std::io::{self, Read};
use std::path::Path;

use dyad_data::adapter::ADAPTER_CONFIG;
use dyad_proto::fingerprint::fact;
use dyad_proto::wire::Fact;
use dyad_proto::{Fault, RunConfig, files};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tch::Device;

use crate::load::Sources;
use crate::model::Model;
use crate::model::lora;
use crate::model::weights::Digested;
use dyad_torch::device::compute_kind;
use dyad_torch::gpu::capability;

/// Compared as a whole.
const TOKENIZER_FILES: [&str; 1] = ["chat_template.jinja"];
/// Compared as JSON, whatever the formatting.
const TOKENIZER_JSON: [&str; 2] = ["tokenizer.json", "added_tokens.json"];
/// Compared field by field, so that a difference can name the field.
const TOKENIZER_FIELDS: [&str; 2] = ["tokenizer_config.json", "special_tokens_map.json"];
/// Folder of the named templates.
const TEMPLATES: &str = "additional_chat_templates";
/// Fields that say where a file comes from and do not influence results.
const ORIGIN: [&str; 10] = [
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "base_model_name_or_path",
    "peft_version",
    "revision",
    "inference_mode",
    "is_local",
    "local_files_only",
    "use_cache",
];
/// Longest value that is shown; a longer one is shown by its digest.
const SHOWN: usize = 80;
/// Instruction sets that kernels check a CPU for.
const INSTRUCTION_SETS: [&str; 4] = ["avx2", "avx512f", "avx512_bf16", "amx_bf16"];
/// Environment variables that override them.
const CAPABILITIES: [&str; 2] = ["DYAD_CPU_CAPABILITY", "ATEN_CPU_CAPABILITY"];

/// Version and digest of this program. Any two builds may compute different results.
#[must_use]
pub fn build() -> String {
    let mut program = Vec::new();
    let _ = files::open(Path::new("/proc/self/exe")).map(|mut file| file.read_to_end(&mut program));
    format!("{} ({})", env!("CARGO_PKG_VERSION"), short(&program))
}

/// Facts that are known before the weights are loaded.
pub fn of_files(
    config: &RunConfig,
    sources: &Sources,
    device: Device,
    max_seq_length: usize,
) -> Result<Vec<Fact>, Fault> {
    let kind = if device.is_cuda() { "cuda" } else { "cpu" };
    let mut facts = vec![
        named(fact::BUILD, build()),
        named(fact::LIBTORCH, libtorch()),
        named(fact::DEVICE, kind),
        named(fact::PROCESSOR, processor(device)),
        named(fact::DTYPE, format!("{:?}", compute_kind(config.dtype, device))),
    ];
    facts.extend(fields(&sources.base, "config.json")?);
    if let Some(adapter) = &sources.adapter {
        facts.extend(fields(adapter, ADAPTER_CONFIG)?);
    }
    facts.extend(of_tokenizer(sources.tokenizer())?);
    facts.push(named(fact::MAX_SEQ_LENGTH, max_seq_length.to_string()));
    Ok(facts)
}

fn of_tokenizer(dir: &Path) -> Result<Vec<Fact>, Fault> {
    let mut facts = Vec::new();
    let mut files: Vec<String> = TOKENIZER_FILES.map(str::to_owned).into();
    files.extend(templates(dir)?);
    for name in files {
        if let Some(bytes) = read(&dir.join(&name))? {
            facts.push(named(&name, short(&bytes)));
        }
    }
    for name in TOKENIZER_JSON {
        if let Some(bytes) = read(&dir.join(name))? {
            let value = serde_json::from_slice::<Value>(&bytes);
            facts
                .push(named(name, short(&value.map_or(bytes, |value| canonical(&value).to_string().into()))));
        }
    }
    for name in TOKENIZER_FIELDS {
        facts.extend(fields(dir, name)?);
    }
    Ok(facts)
}

fn templates(dir: &Path) -> Result<Vec<String>, Fault> {
    let folder = dir.join(TEMPLATES);
    let entries = match std::fs::read_dir(&folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|error| unreadable(&folder, &error))?,
    };
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> =
        names.filter(|name| name.ends_with(".jinja")).map(|name| format!("{TEMPLATES}/{name}")).collect();
    names.sort();
    Ok(names)
}

/// Facts about the loaded weights: those of the start, and the adapter on top of them.
pub fn of_weights(policy: &mut Model, loaded: &Digested) -> Vec<Fact> {
    let mut facts = vec![named(fact::WEIGHTS, loaded.text())];
    let adapter = Digested::default();
    let mut found = false;
    for (name, tensor) in lora::named_tensors(policy).into_iter().flatten() {
        adapter.add(&name, tensor);
        found = true;
    }
    if found {
        facts.push(named(fact::ADAPTER, adapter.text()));
    }
    facts
}

/// Facts about what has been read from a checkpoint.
#[must_use]
pub fn of_checkpoint(step: u64, read: &Digested) -> Vec<Fact> {
    vec![named(fact::STEP, step.to_string()), named(fact::STATES, read.text())]
}

fn named(name: &str, value: impl Into<String>) -> Fact {
    Fact { name: name.to_owned(), value: value.into() }
}

/// The non-null fields of a JSON file that influence results; empty if there is no such file.
fn fields(dir: &Path, name: &str) -> Result<Vec<Fact>, Fault> {
    let path = dir.join(name);
    let Some(bytes) = read(&path)? else { return Ok(Vec::new()) };
    let Ok(Value::Object(map)) = serde_json::from_slice::<Value>(&bytes) else {
        // Not an object: the code that loads the file reports a better error.
        return Ok(vec![named(name, short(&bytes))]);
    };
    let decides = |(key, value): &(&String, &Value)| !value.is_null() && !ORIGIN.contains(&key.as_str());
    let mut fields: Vec<Fact> = map
        .iter()
        .filter(decides)
        .map(|(key, value)| named(&format!("{name} {}", plain(key)), shown(value)))
        .collect();
    fields.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(fields)
}

/// The same text for equal values, whatever their formatting; a digest if the text is long.
fn shown(value: &Value) -> String {
    let text = canonical(value).to_string();
    if text.len() <= SHOWN && !text.chars().any(char::is_control) { text } else { short(text.as_bytes()) }
}

fn plain(key: &str) -> String {
    key.chars().take(SHOWN).flat_map(char::escape_default).collect()
}

fn canonical(value: &Value) -> Value {
    match value {
        Value::Number(number) => number.as_f64().map_or_else(|| value.clone(), Value::from),
        Value::Array(values) => values.iter().map(canonical).collect(),
        Value::Object(map) => {
            let mut entries: Vec<(&String, &Value)> = map.iter().collect();
            entries.sort_by_key(|(key, _)| *key);
            entries.into_iter().map(|(key, value)| (key.clone(), canonical(value))).collect()
        }
        other => other.clone(),
    }
}

fn processor(device: Device) -> String {
    if let Device::Cuda(index) = device {
        let of = |(major, minor)| format!("a GPU of compute capability {major}.{minor}");
        return capability(index).map_or_else(|_| "an unknown GPU".to_owned(), of);
    }
    let info = files::of_kernel("/proc/cpuinfo").unwrap_or_default();
    let line = |key: &str| {
        let line = info.lines().find(|line| line.starts_with(key)).unwrap_or_default();
        line.split_once(':').map_or("", |(_, value)| value.trim())
    };
    let flags: Vec<&str> = line("flags").split_whitespace().collect();
    let mut words = vec![line("vendor_id").to_owned()];
    words.extend(INSTRUCTION_SETS.iter().filter(|set| flags.contains(set)).map(|set| (*set).to_owned()));
    for name in CAPABILITIES {
        words.extend(std::env::var(name).ok().map(|value| format!("{name}={}", plain(&value))));
    }
    words.join(" ")
}

/// Identifies a build of libtorch by the size and the first MiB of its library.
fn libtorch() -> String {
    let maps = files::of_kernel("/proc/self/maps").unwrap_or_default();
    let mut paths = maps.lines().filter_map(|line| line.find('/').map(|at| &line[at..]));
    let head = paths.find(|path| path.ends_with("/libtorch_cpu.so")).and_then(|path| {
        let file = files::open(Path::new(path)).ok()?;
        let mut bytes = file.metadata().ok()?.len().to_le_bytes().to_vec();
        file.take(1 << 20).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    });
    short(&head.unwrap_or_default())
}

/// The first 16 digits of a SHA-256: enough to tell files apart, not to detect forgery.
fn short(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, Fault> {
    crate::observe::progress::advance();
    match files::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some).map_err(|error| unreadable(path, &error)),
    }
}

fn unreadable(path: &Path, error: &io::Error) -> Fault {
    Fault::input(format!("cannot read {}: {error}", path.display()))
        .hint("every trainer must be able to read the model folder")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str, text: &str) -> Vec<(String, String)> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(name), text).unwrap();
        let facts = fields(dir.path(), name).unwrap();
        facts.into_iter().map(|fact| (fact.name, fact.value)).collect()
    }

    #[test]
    fn fields_are_equal_in_any_formatting() {
        let one = of("config.json", r#"{"rope_theta": 10000, "a": {"y": 1, "x": 1e-5}, "n": null}"#);
        let other = of("config.json", r#"{"a":{"x":0.00001,"y":1.0},"rope_theta":1e4,"_name_or_path":"/m"}"#);
        assert_eq!(one, other);
        assert_eq!(one[1], ("config.json rope_theta".to_owned(), "10000.0".to_owned()));
    }

    #[test]
    fn every_tokenizer_file_counts_and_a_missing_one_gives_no_fact() {
        let dir = tempfile::tempdir().unwrap();
        assert!(of_tokenizer(dir.path()).unwrap().is_empty());
        std::fs::create_dir(dir.path().join(TEMPLATES)).unwrap();
        let template = format!("{TEMPLATES}/tool_use.jinja");
        for name in ["tokenizer.json", "added_tokens.json", "chat_template.jinja", template.as_str()] {
            let before = of_tokenizer(dir.path()).unwrap();
            std::fs::write(dir.path().join(name), "x").unwrap();
            let after = of_tokenizer(dir.path()).unwrap();
            assert_eq!(after.len(), before.len() + 1, "{name}");
            std::fs::write(dir.path().join(name), "y").unwrap();
            assert_ne!(of_tokenizer(dir.path()).unwrap(), after, "{name}");
        }
        std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"bos_token":"<s>"}"#).unwrap();
        let facts = of_tokenizer(dir.path()).unwrap();
        assert!(facts.contains(&named("tokenizer_config.json bos_token", "\"<s>\"")), "{facts:?}");
    }

    #[test]
    fn build_libtorch_and_processor_are_identified() {
        assert!(build().starts_with(env!("CARGO_PKG_VERSION")));
        // Loads libtorch.
        let _ = tch::Tensor::from_slice(&[1.0]);
        assert_ne!(libtorch(), short(&[]));
        assert!(!processor(Device::Cpu).is_empty());
    }
}
