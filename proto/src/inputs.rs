//! Refuses inputs that lie where the run writes. `--overwrite` would remove an earlier run's checkpoint or final model that the new run
//! starts from, and a run that writes into a model folder would mix its files with the model's.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use crate::run_config::DataFiles;
use crate::run_folder::{EVALUATION_METRICS, METRICS, checkpoint_step, is_unfinished};
use crate::{Fault, RunConfig, files};

/// Links that are followed in one path; more count as a loop.
const MOST_LINKS: usize = 40;
/// Levels of folders below a model folder that are searched for links; models themselves use one.
const DEEPEST: usize = 4;

/// Fails if an input lies in a file or folder that a run writes or removes in its output folder, or if the output folder is, or lies
/// in, a model folder. Follows every link on the way to an input. `config_file` is the file that the configuration was read from.
pub fn refuse_entangled(config: &RunConfig, config_file: &Path) -> Result<(), Fault> {
    let output_dir = Path::new(&config.output_dir);
    for (key, model) in models(config) {
        refuse_inside_model(output_dir, key, &model)?;
    }
    refuse_inside_any_model(output_dir)?;
    // A missing folder holds no input.
    let Ok(real) = output_dir.canonicalize() else { return Ok(()) };
    for (key, path) in inputs(config, config_file) {
        let doomed = way(&path).into_iter().find(|at| at.parent() == Some(&real) && is_made(at));
        if let Some(doomed) = doomed {
            let name = doomed.file_name().unwrap_or_default().to_string_lossy().into_owned();
            return Err(Fault::input(format!(
                "{key} {} lies in {name} of output_dir {}, which a run replaces or removes",
                path.display(),
                output_dir.display()
            ))
            .hint("choose another output_dir, or move that input out of it first"));
        }
    }
    Ok(())
}

fn refuse_inside_model(output_dir: &Path, key: &str, model: &Path) -> Result<(), Fault> {
    let Ok(folder) = model.canonicalize() else { return Ok(()) };
    let target = real(output_dir);
    if !folder.is_dir() || !target.starts_with(&folder) {
        return Ok(());
    }
    let relation = if target == folder { "is" } else { "lies in" };
    Err(Fault::input(format!(
        "output_dir {} {relation} the folder of {key} {}",
        output_dir.display(),
        model.display()
    ))
    .hint("choose an output_dir outside the model's folder, which a run only reads"))
}

/// Fails if the output folder is, or lies in, any model folder, named in the configuration or not. (A run's own `final/` lies below the
/// output folder, so it does not count.)
fn refuse_inside_any_model(output_dir: &Path) -> Result<(), Fault> {
    let target = real(output_dir);
    let Some(folder) = target.ancestors().find(|folder| is_model(folder)) else { return Ok(()) };
    let relation = if folder == target { "is" } else { "lies in" };
    Err(Fault::input(format!(
        "output_dir {} {relation} the folder of a model, {}",
        output_dir.display(),
        folder.display()
    ))
    .hint("choose an output_dir outside of models; a run's files would be mixed with the model's"))
}

/// Whether a folder holds a model or an adapter as transformers and PEFT save them.
fn is_model(folder: &Path) -> bool {
    let weights = || {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries
            .map(|entry| entry.path())
            .any(|path| path.extension().is_some_and(|name| name == "safetensors"))
    };
    ["config.json", "adapter_config.json"].iter().any(|name| folder.join(name).is_file()) && weights()
}

/// The configured models and the base models of adapters, each with its configuration key.
fn models(config: &RunConfig) -> Vec<(&'static str, PathBuf)> {
    let named = [("model", Some(&config.model)), ("from_checkpoint", config.from_checkpoint.as_ref())];
    let named = named.into_iter().filter_map(|(key, path)| Some((key, PathBuf::from(path?))));
    let present = named.filter(|(_, path)| !path.as_os_str().is_empty());
    present
        .flat_map(|(key, path)| [base_of(&path).map(|base| (key, base)), Some((key, path))])
        .flatten()
        .collect()
}

/// The base model that an adapter folder names, if it exists on this machine.
fn base_of(adapter: &Path) -> Option<PathBuf> {
    let text = files::read_to_string(&adapter.join("adapter_config.json")).ok()?;
    let json: serde_json::Value = serde_json::from_str(&text).ok()?;
    let base = PathBuf::from(json.get("base_model_name_or_path")?.as_str()?);
    base.exists().then_some(base)
}

/// Every path that a run reads. For a folder that holds links, each link as well.
fn inputs(config: &RunConfig, config_file: &Path) -> Vec<(&'static str, PathBuf)> {
    let mut all = models(config);
    for (key, folder) in all.clone() {
        all.extend(links_below(&folder).into_iter().map(|link| (key, link)));
    }
    let validation = config.validation_file.iter().flat_map(DataFiles::iter);
    let pairs = config.training_file.iter().map(|file| ("training_file", file));
    let pairs = pairs.chain(validation.map(|file| ("validation_file", file)));
    let here = pairs.filter(|(_, file)| !file.is_remote());
    all.extend(here.map(|(key, file)| (key, without_pattern(&file.path))));
    all.extend(config.reference_cache.iter().map(|path| ("reference_cache", PathBuf::from(path))));
    all.push(("--config", config_file.to_owned()));
    all
}

/// The part of a path before its first component that is a pattern of names.
fn without_pattern(path: &str) -> PathBuf {
    Path::new(path)
        .components()
        .take_while(|part| !part.as_os_str().to_string_lossy().contains(['*', '?', '[']))
        .collect()
}

/// Every link in a folder and its subfolders, including linked subfolders.
fn links_below(folder: &Path) -> Vec<PathBuf> {
    let (mut links, mut seen) = (Vec::new(), BTreeSet::new());
    let mut ahead = vec![(folder.to_owned(), 0)];
    while let Some((at, depth)) = ahead.pop() {
        if !at.canonicalize().is_ok_and(|real| seen.insert(real)) {
            continue;
        }
        for entry in std::fs::read_dir(at).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() && depth < DEEPEST {
                ahead.push((path.clone(), depth + 1));
            }
            if path.is_symlink() {
                links.push(path);
            }
        }
    }
    links
}

/// Whether a run writes, replaces or removes files of this name in its output folder.
fn is_made(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default();
    name == "final"
        || name == METRICS
        || name == EVALUATION_METRICS
        || checkpoint_step(path).is_some()
        || is_unfinished(path)
}

/// The path with all links resolved, also if parts of it do not exist.
fn real(path: &Path) -> PathBuf {
    way(path).pop().unwrap_or_else(|| PathBuf::from("/"))
}

/// Every path that the kernel passes while it resolves `path`; the parents of each are free of links. The last one is the result.
fn way(path: &Path) -> Vec<PathBuf> {
    let mut at = PathBuf::from("/");
    let mut passed = Vec::new();
    let mut links = 0;
    let mut ahead = words(&std::env::current_dir().unwrap_or_default().join(path));
    while let Some(word) = ahead.pop() {
        if word == ".." {
            at.pop();
            passed.push(at.clone());
            continue;
        }
        if word == "/" {
            at = PathBuf::from("/");
            continue;
        }
        at.push(word);
        passed.push(at.clone());
        if let Ok(target) = std::fs::read_link(&at) {
            links += 1;
            if links > MOST_LINKS {
                break;
            }
            at.pop();
            ahead.extend(words(&target));
        }
    }
    passed
}

/// The components of a path in reverse order.
fn words(path: &Path) -> Vec<OsString> {
    let parts = path.components().filter(|part| *part != Component::CurDir);
    let mut words: Vec<OsString> = parts.map(|part| part.as_os_str().to_owned()).collect();
    words.reverse();
    words
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    struct Place(tempfile::TempDir);

    impl Place {
        /// A model, pairs, and an output folder with a finished run in it.
        fn new() -> Self {
            let place = Self(tempfile::tempdir().unwrap());
            for file in [
                "m/config.json",
                "pairs.jsonl",
                "out/final/config.json",
                "out/checkpoint-3/model.safetensors",
            ] {
                let path = place.path(file);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, "{}").unwrap();
            }
            place
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn text(&self, name: &str) -> String {
            self.path(name).display().to_string()
        }

        fn refused(&self, change: impl FnOnce(&mut RunConfig)) -> Option<String> {
            let mut config = RunConfig {
                model: self.text("m"),
                training_file: self.text("pairs.jsonl").into(),
                output_dir: self.text("out"),
                ..RunConfig::default()
            };
            change(&mut config);
            refuse_entangled(&config, &self.path("run.toml")).err().map(|fault| fault.message)
        }
    }

    #[test]
    fn inputs_in_folders_that_a_run_removes_are_refused_through_any_link() {
        let place = Place::new();
        assert_eq!(place.refused(|_| {}), None);
        symlink(place.path("out/final"), place.path("link")).unwrap();
        symlink(place.path("link"), place.path("second")).unwrap();
        symlink(place.path("out"), place.path("out-too")).unwrap();
        symlink(place.path("m"), place.path("out/checkpoint-9")).unwrap();
        for start in [
            "out/final",
            "out/checkpoint-3",
            "link",
            "second",
            "m/../out/./final",
            "out-too/final",
            // A link to a folder outside; the run would remove the link.
            "out/checkpoint-9",
        ] {
            let said =
                place.refused(|config| config.from_checkpoint = Some(place.text(start))).unwrap_or_default();
            assert!(
                said.starts_with("from_checkpoint ") && said.contains("of output_dir"),
                "{start}: {said}"
            );
            assert!(place.refused(|config| config.model = place.text(start)).is_some(), "{start}");
        }
        std::fs::write(place.path("out/final/pairs.jsonl"), "").unwrap();
        for set in [
            (|config, path| config.training_file = path.into()) as fn(&mut RunConfig, String),
            |config, path| config.validation_file = Some(path.into()),
            |config, path| config.reference_cache = Some(path),
        ] {
            assert!(place.refused(|config| set(config, place.text("out/final/pairs.jsonl"))).is_some());
            assert_eq!(place.refused(|config| set(config, place.text("out/pairs.jsonl"))), None);
        }
        // The output folder itself may be a link.
        assert!(
            place
                .refused(|config| {
                    config.output_dir = place.text("out-too");
                    config.model = place.text("out/final");
                })
                .is_some()
        );
    }

    #[test]
    fn an_output_folder_in_an_unconfigured_model_is_refused() {
        let place = Place::new();
        let other = place.path("other/final");
        std::fs::create_dir_all(&other).unwrap();
        let output = |name: &str| place.refused(|config| config.output_dir = place.text(name));
        // A folder with config.json but no weights is not a model.
        std::fs::write(other.join("config.json"), "{}").unwrap();
        assert_eq!(output("other/final"), None);
        std::fs::write(other.join("model.safetensors"), "").unwrap();
        assert!(output("other/final").unwrap().contains(" is the folder of a model, "));
        assert!(output("other/final/runs/1").unwrap().contains(" lies in the folder of a model, "));
        assert_eq!(output("other"), None);
    }

    #[test]
    fn linked_model_files_and_the_base_of_an_adapter_are_inputs() {
        let place = Place::new();
        std::fs::create_dir(place.path("linked")).unwrap();
        symlink("../out/checkpoint-3/model.safetensors", place.path("linked/model.safetensors")).unwrap();
        let said = place.refused(|config| config.model = place.text("linked")).unwrap();
        assert!(said.contains("lies in checkpoint-3"), "{said}");
        // Links in a subfolder, and in a linked subfolder.
        for name in ["nested", "linked-folder", "templates"] {
            std::fs::create_dir_all(place.path(name)).unwrap();
        }
        std::fs::create_dir(place.path("nested/additional_chat_templates")).unwrap();
        for link in ["nested/additional_chat_templates/a.jinja", "templates/a.jinja"] {
            symlink(place.path("out/final/config.json"), place.path(link)).unwrap();
        }
        symlink("../templates", place.path("linked-folder/additional_chat_templates")).unwrap();
        symlink(".", place.path("linked-folder/circle")).unwrap();
        for model in ["nested", "linked-folder"] {
            let said = place.refused(|config| config.model = place.text(model)).unwrap_or_default();
            assert!(said.contains("a.jinja lies in final"), "{model}: {said}");
        }
        std::fs::create_dir(place.path("adapter")).unwrap();
        let json = format!("{{\"base_model_name_or_path\": {:?}}}", place.text("out/final"));
        std::fs::write(place.path("adapter/adapter_config.json"), json).unwrap();
        assert!(place.refused(|config| config.from_checkpoint = Some(place.text("adapter"))).is_some());
    }

    #[test]
    fn an_output_folder_in_a_configured_model_is_refused() {
        let place = Place::new();
        symlink(place.path("m"), place.path("alias")).unwrap();
        for (output, words) in [
            ("m", "is the folder of"),
            ("alias", "is the folder of"),
            ("m/new/out", "lies in the folder of"),
            ("alias/../m/x", "lies in the folder of"),
        ] {
            let said = place.refused(|config| config.output_dir = place.text(output)).unwrap_or_default();
            assert!(said.contains(words), "{output}: {said}");
        }
        assert_eq!(place.refused(|config| config.output_dir = place.text("m-2")), None);
        // A loop of links ends.
        symlink(place.path("b"), place.path("a")).unwrap();
        symlink(place.path("a"), place.path("b")).unwrap();
        assert_eq!(place.refused(|config| config.model = place.text("a")), None);
    }
}
