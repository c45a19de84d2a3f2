//! Matches the tensors that a model or adapter needs with those in its files, by transformers' rules for names and tied heads.
//!
//! - TRN-W1: every tensor in the files is used or reported: as unexpected in a model, as an error in an adapter.
//! - TRN-W2: a needed tensor that is missing is an error, which names the tensor that it may be stored as.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use dyad_proto::{Fault, noun};

use super::files::{MappedFiles, TensorLocation};
use super::names::{EMBEDDING, HEAD, MAGNITUDE};

/// Most names that a message lists.
const LISTED: usize = 3;
/// Prefix of the names in a causal model, except the head's. A model saved without its head lacks the prefix.
const BASE_PREFIX: &str = "model.";

/// Tensors that are needed.
#[derive(Clone, Debug)]
pub enum Wanted {
    /// Tensors of a model. If `tied`, the head is the embedding unless the files hold a different head.
    Model {
        /// All names; the head's only if it is not tied.
        names: Vec<String>,
        /// `tie_word_embeddings`.
        tied: bool,
    },
    /// Tensors of an adapter, by PEFT's names.
    Adapter {
        /// All names.
        names: Vec<String>,
    },
}

/// Files whose tensors have the wanted names, and warnings about them.
#[derive(Debug)]
pub(super) struct Claimed {
    pub(super) files: MappedFiles,
    pub(super) warnings: Vec<String>,
}

impl Wanted {
    /// Finds every tensor. `dir` names the folder in errors.
    pub(super) fn claim(&self, dir: &Path, files: MappedFiles) -> Result<Claimed, Fault> {
        match self {
            Self::Model { names, tied } => model(dir, files, names, *tied),
            Self::Adapter { names } => adapter(dir, files, names),
        }
    }
}

fn adapter(dir: &Path, files: MappedFiles, names: &[String]) -> Result<Claimed, Fault> {
    let stored = |name: &String| {
        // Files that were saved without PEFT have the adapter's name in their tensor names, and magnitudes end in `.weight`.
        let magnitude = name.ends_with(MAGNITUDE);
        let longer = match magnitude {
            true => format!("{name}.default.weight"),
            false => name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."),
        };
        let as_module = || if magnitude { files.stored(&format!("{name}.weight")) } else { None };
        let stored = files.stored(name).or_else(|| files.stored(&longer)).or_else(as_module)?;
        Some((name.clone(), stored.clone()))
    };
    let index: HashMap<String, TensorLocation> = names.iter().filter_map(stored).collect();
    refuse_missing(dir, "adapter_config.json", &files, names, &index)?;
    let unused = unused(&files, &index, None);
    if !unused.is_empty() {
        return Err(Fault::input(format!(
            "the adapter in {} holds tensors that are not used: {}",
            dir.display(),
            listed(&unused)
        ))
        .hint("adapter_config.json does not speak of them; an adapter is taken whole or not at all"));
    }
    floating(files.renamed(index), Vec::new())
}

fn model(dir: &Path, files: MappedFiles, names: &[String], tied: bool) -> Result<Claimed, Fault> {
    let mut index = named_as(&files, names)?;
    let mut warnings = Vec::new();
    // A head that equals the embedding: it counts as used, but is not loaded.
    let mut spare = None;
    if tied && let Some(head) = named_as(&files, &[HEAD.to_owned()])?.remove(HEAD) {
        match index.get(EMBEDDING) {
            // The stored head serves as embedding and head.
            None => drop(index.insert(EMBEDDING.to_owned(), head)),
            Some(embedding) if files.equal(embedding, &head) => spare = Some(head),
            Some(_) => {
                warnings.push(format!(
                    "{}: config.json ties the head to the embedding, but {HEAD} differs from it: they are not tied",
                    dir.display()
                ));
                index.insert(HEAD.to_owned(), head);
            }
        }
    }
    refuse_missing(dir, "config.json", &files, names, &index)?;
    let unexpected: Vec<&str> =
        unused(&files, &index, spare.as_ref()).into_iter().filter(|name| !passed_over(name)).collect();
    if !unexpected.is_empty() {
        warnings.push(format!(
            "UNEXPECTED tensors in {} are not used: {}",
            dir.display(),
            listed(&unexpected)
        ));
    }
    floating(files.renamed(index), warnings)
}

/// Tensors that transformers ignores silently: buffers that older releases saved.
fn passed_over(name: &str) -> bool {
    name.contains("rotary_emb.inv_freq")
}

/// Finds names as transformers does: the prefix `model.` may be missing or superfluous.
fn named_as(files: &MappedFiles, names: &[String]) -> Result<HashMap<String, TensorLocation>, Fault> {
    let mut index = HashMap::new();
    for name in names {
        let longer = format!("{BASE_PREFIX}{name}");
        let candidates = [Some(name.as_str()), name.strip_prefix(BASE_PREFIX), Some(longer.as_str())];
        let there: Vec<&str> = candidates.into_iter().flatten().filter(|name| files.contains(name)).collect();
        if let [a, b, ..] = there.as_slice() {
            return Err(Fault::input(format!("{a} and {b} are both there, and are the same tensor"))
                .hint("the folder holds the weights of two models; keep one of them"));
        }
        if let Some(stored) = there.first().and_then(|name| files.stored(name)) {
            index.insert(name.clone(), stored.clone());
        }
    }
    Ok(index)
}

fn unused<'a>(
    files: &'a MappedFiles,
    index: &HashMap<String, TensorLocation>,
    spare: Option<&TensorLocation>,
) -> Vec<&'a str> {
    let used: HashSet<&str> = index.values().chain(spare).map(|stored| stored.name.as_str()).collect();
    let mut unused: Vec<&str> = files.names().filter(|name| !used.contains(name)).collect();
    unused.sort_unstable();
    unused
}

fn refuse_missing(
    dir: &Path,
    config: &str,
    files: &MappedFiles,
    names: &[String],
    index: &HashMap<String, TensorLocation>,
) -> Result<(), Fault> {
    let missing: Vec<&str> =
        names.iter().map(String::as_str).filter(|name| !index.contains_key(*name)).collect();
    let Some(first) = missing.first() else { return Ok(()) };
    let what = noun(missing.len(), "tensor");
    let fault = Fault::input(format!("missing {what} {} in {}", listed(&missing), dir.display()));
    Err(match other_name(files, first) {
        Some(other) => fault.hint(format!(
            "there is {other}: the weights were saved from inside something else; save the model itself, or rename the tensors"
        )),
        None => fault.hint(format!("the folder is incomplete, or its {config} belongs to other weights")),
    })
}

/// The same tensor under another name, e.g. with `_orig_mod.` before or within it: the one with the longest common end, which must reach
/// back at least to the layer's number.
fn other_name<'a>(files: &'a MappedFiles, name: &str) -> Option<&'a str> {
    let alike = |other: &str| {
        let pairs = name.rsplit('.').zip(other.rsplit('.'));
        pairs.take_while(|(a, b)| a == b).count()
    };
    let parts = name.split('.').count();
    let number = name.rsplit('.').position(|part| part.bytes().all(|byte| byte.is_ascii_digit()));
    let least = number.map_or(parts.saturating_sub(1), |at| at + 1);
    let mut others: Vec<&str> = files.names().filter(|other| alike(other) >= least).collect();
    others.sort_unstable_by_key(|other| (std::cmp::Reverse(alike(other)), *other));
    others.first().copied()
}

/// The first few names, and how many more there are.
pub(crate) fn listed(names: &[&str]) -> String {
    let shown = names.iter().take(LISTED).copied().collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(LISTED) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// Fails if a tensor does not hold floating-point numbers.
fn floating(files: MappedFiles, warnings: Vec<String>) -> Result<Claimed, Fault> {
    files.check_floating()?;
    Ok(Claimed { files, warnings })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::weights::test_files::{File, write};

    const NAMES: [&str; 3] = [EMBEDDING, "model.layers.0.a.weight", "model.norm.weight"];

    fn claimed(files: &[File<'_>], tied: bool) -> Result<Claimed, Fault> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        write(&path, files);
        let mut names: Vec<String> = NAMES.map(str::to_owned).into();
        names.extend((!tied).then(|| HEAD.to_owned()));
        Wanted::Model { names, tied }.claim(Path::new("folder"), MappedFiles::open(vec![path])?)
    }

    fn whole<'a>(prefix: &'a str) -> Vec<File<'a>> {
        NAMES.iter().map(|name| File::named(format!("{prefix}{name}"), &[1], &[1.0])).collect()
    }

    #[test]
    fn names_without_the_models_prefix_are_found() {
        let bare: Vec<File<'_>> = NAMES
            .iter()
            .map(|name| File::named(name.trim_start_matches("model.").to_owned(), &[1], &[1.0]))
            .collect();
        let claimed = claimed(&bare, true).unwrap();
        assert!(claimed.warnings.is_empty() && NAMES.iter().all(|name| claimed.files.contains(name)));
        let twice: Vec<File<'_>> = [whole(""), bare].into_iter().flatten().collect();
        assert!(super::tests::claimed(&twice, true).unwrap_err().message.contains("are both there"));
    }

    #[test]
    fn a_foreign_prefix_is_named_as_the_cause() {
        let fault = claimed(&whole("_orig_mod."), true).unwrap_err();
        assert!(fault.message.starts_with("missing tensors model.embed_tokens.weight, "), "{fault}");
        assert!(fault.hint.starts_with("there is _orig_mod.model.embed_tokens.weight"), "{}", fault.hint);
    }

    #[test]
    fn unused_tensors_are_reported_except_old_buffers() {
        let mut files = whole("");
        files.push(File::f32("model.layers.0.self_attn.rotary_emb.inv_freq", &[1], &[1.0]));
        assert!(claimed(&files, true).unwrap().warnings.is_empty());
        for name in ["a", "b", "c", "d", "e"] {
            files.push(File::f32(name, &[1], &[1.0]));
        }
        let warnings = claimed(&files, true).unwrap().warnings;
        assert_eq!(warnings, ["UNEXPECTED tensors in folder are not used: a, b, c and 2 more"]);
    }

    #[test]
    fn a_tied_head_is_the_embedding_unless_the_file_holds_another() {
        let mut files = whole("");
        files.push(File::f32(HEAD, &[1], &[1.0]));
        let equal = claimed(&files, true).unwrap();
        assert!(equal.warnings.is_empty() && !equal.files.contains(HEAD));
        files.pop();
        files.push(File::f32(HEAD, &[1], &[2.0]));
        let other = claimed(&files, true).unwrap();
        assert!(other.files.contains(HEAD) && other.warnings[0].contains("they are not tied"));
        files.remove(0);
        let alone = claimed(&files, true).unwrap();
        assert!(alone.files.contains(EMBEDDING) && !alone.files.contains(HEAD));
    }

    #[test]
    fn weights_that_are_not_floating_point_are_refused() {
        let mut files = whole("");
        files[1] = File::bytes(NAMES[1], &[1], &[7]);
        let fault = claimed(&files, true).unwrap_err();
        assert!(
            fault.message.contains("model.layers.0.a.weight")
                && fault.message.ends_with("unsupported dtype U8")
        );
    }

    #[test]
    fn an_adapter_must_match_its_files_exactly() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter_model.safetensors");
        write(&path, &[File::f32("a", &[1], &[1.0]), File::f32("b", &[1], &[1.0])]);
        let claim = |names: &[&str]| {
            let names = names.iter().map(|name| (*name).to_owned()).collect();
            Wanted::Adapter { names }
                .claim(Path::new("adapter"), MappedFiles::open(vec![path.clone()]).unwrap())
        };
        claim(&["a", "b"]).unwrap();
        assert!(claim(&["a"]).unwrap_err().message.ends_with("holds tensors that are not used: b"));
        assert!(claim(&["a", "b", "c"]).unwrap_err().message.starts_with("missing tensor c in adapter"));
    }
}
