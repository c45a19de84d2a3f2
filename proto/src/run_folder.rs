//! Names of the files that a run leaves in its output folder. A new run does not start in a folder that holds an earlier one.
//!
//! [`traces`] is the only list of files that may be removed. All other files belong to the user and stay: files with a similar name, and
//! files under one of Dyad's names that Dyad did not write ([`foreign`]).

use std::io;
use std::path::{Path, PathBuf};

use crate::{Fault, files};

/// One row per optimizer step.
pub const METRICS: &str = "metrics.jsonl";
/// One row per evaluation.
pub const EVALUATION_METRICS: &str = "eval_metrics.jsonl";
/// Event files for TensorBoard.
pub const TENSORBOARD: &str = "tb";
/// Sample answers, two files per evaluation.
pub const SAMPLES: &str = "samples";
/// The configuration that the run began with.
pub const RUN_CONFIG: &str = "run.json";
/// The configuration of a run that is starting, for its coordinator. It becomes [`RUN_CONFIG`] with the run's first row, so that a
/// refused start does not overwrite the earlier run's record.
pub const NEXT_RUN_CONFIG: &str = ".dyad-next-run.json";
/// The best evaluation so far of a run with early stopping, and the checkpoint that has its model.
pub const BEST: &str = "dyad_best.json";
/// The finished model.
pub const FINAL: &str = "final";
/// Progress and identity of the run, in a checkpoint.
pub const STATE: &str = "dyad_state.json";
/// Names the scheduler job that started the folder's run.
pub const JOB: &str = ".dyad-job";
/// Optimizer moments and master weights, in a checkpoint.
pub const OPTIMIZER: &str = "optimizer.safetensors";
/// Size and checksum of every file, in checkpoints and the finished model.
pub const MANIFEST: &str = "dyad_manifest.json";

/// Files that Dyad writes in an output folder.
const FILES: [&str; 6] = [RUN_CONFIG, METRICS, EVALUATION_METRICS, BEST, JOB, "metrics.svg"];
/// Folders that Dyad writes there, in addition to checkpoints and the final model.
const FOLDERS: [&str; 4] = [TENSORBOARD, SAMPLES, "logs", "profile"];

/// Kind of a path that a run writes in its output folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FolderPlace {
    /// A regular file.
    File,
    /// A temporary file: anything but a folder is replaced.
    Scratch,
    /// A folder.
    Folder,
    /// A checkpoint: must not be a link. [`refuse_foreign`] checks whether Dyad wrote it.
    Checkpoint,
}

impl FolderPlace {
    fn of(path: &Path) -> Option<Self> {
        let name = name(path);
        let is_file = |name: &str| FILES.contains(&name) || is_resumed_config(name);
        let scratch = name.strip_prefix('.').and_then(|name| name.strip_suffix(".part"));
        match name {
            _ if is_file(name) => Some(Self::File),
            NEXT_RUN_CONFIG => Some(Self::Scratch),
            _ if scratch.is_some_and(|name| is_file(name) || name == NEXT_RUN_CONFIG) => Some(Self::Scratch),
            _ if FOLDERS.contains(&name) || is_unfinished(path) => Some(Self::Folder),
            _ => checkpoint_step(path).map(|_| Self::Checkpoint),
        }
    }

    /// Why the run cannot write there, and a hint; `None` if it can.
    fn refuses(self, path: &Path) -> Option<(String, &'static str)> {
        let Ok(about) = path.symlink_metadata() else { return None };
        let kind = about.file_type();
        let wrong = match self {
            Self::Scratch => (kind.is_dir(), "a folder, where a run writes a file"),
            _ if kind.is_symlink() => {
                let what = "is a link, and links are not followed there".to_owned();
                return Some((what, "remove it; output_dir itself may be a link"));
            }
            Self::File if kind.is_dir() => (true, "a folder, where a run writes a file"),
            Self::File => (!kind.is_file(), "neither a file nor a folder, where a run writes a file"),
            Self::Folder => (!kind.is_dir(), "no folder, where a run makes one"),
            Self::Checkpoint => (false, ""),
        };
        wrong.0.then(|| (format!("is {}", wrong.1), "move it away, or choose another output_dir"))
    }
}

/// Fails, before anything is removed, if the output folder holds an obstacle under a name that a run writes: a link (another user may
/// have planted it), a folder in the place of a file, or a file in the place of a folder.
pub fn refuse_obstacles(dir: &Path) -> Result<(), Fault> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut all: Vec<PathBuf> = entries.collect();
    all.sort();
    let refusal = |path: &PathBuf| Some((path.clone(), FolderPlace::of(path)?.refuses(path)?));
    match all.iter().find_map(refusal) {
        None => Ok(()),
        Some((path, (what, hint))) => {
            Err(Fault::input(format!("output_dir {}: {} {what}", dir.display(), name(&path))).hint(hint))
        }
    }
}

/// Prefix of a folder that is being written.
const UNFINISHED: &str = ".tmp-";
/// Second prefix of an earlier run's folder that is about to be removed.
const EARLIER: &str = "earlier-";

/// Lists the files and folders that earlier runs left in the folder, sorted. A new run must not mix with them. A run that was refused
/// before its first row leaves none.
pub fn traces(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        // Do not follow links: their targets are not Dyad's.
        let (kind, name) = (entry.file_type()?, name(&path));
        match name {
            METRICS | EVALUATION_METRICS if kind.is_file() && entry.metadata()?.len() > 0 => found.push(path),
            TENSORBOARD if kind.is_dir() => found.extend(files_in(&path, is_event_file)?),
            SAMPLES if kind.is_dir() => found.extend(files_in(&path, is_sample_file)?),
            BEST if kind.is_file() => found.push(path),
            _ if kind.is_file() && is_resumed_config(name) => found.push(path),
            _ if kind.is_dir() && (is_unfinished(&path) || (has_own_name(&path) && is_own(&path))) => {
                found.push(path);
            }
            _ => {}
        }
    }
    found.sort();
    Ok(found)
}

/// The first entry that has the name of a checkpoint or final model, but was not written by Dyad.
pub fn foreign(dir: &Path) -> io::Result<Option<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        if has_own_name(&path) && !(entry.file_type()?.is_dir() && is_own(&path)) {
            found.push(path);
        }
    }
    Ok(found.into_iter().min())
}

/// Fails if the folder holds a run, or foreign files under a name of Dyad's. Unfinished folders do not count. The error names the first
/// of `traces`.
pub fn refuse_earlier_run(dir: &Path, traces: &[PathBuf]) -> Result<(), Fault> {
    match traces.iter().find(|path| !is_unfinished(path)) {
        None => refuse_foreign(dir),
        Some(trace) => {
            let trace = trace.strip_prefix(dir).unwrap_or(trace);
            let message = format!("output_dir {} already holds a run ({})", dir.display(), trace.display());
            Err(Fault::input(message)
                .hint("--resume continues it, --overwrite removes it; or choose another output_dir"))
        }
    }
}

/// Fails if a run would have to remove files that Dyad did not write.
pub fn refuse_foreign(dir: &Path) -> Result<(), Fault> {
    // Ignore read errors: the caller lists the folder too, and fails then.
    let Some(path) = foreign(dir).ok().flatten() else { return Ok(()) };
    Err(Fault::input(format!("output_dir {} holds {}, which Dyad did not write", dir.display(), name(&path)))
        .hint("move it away, or choose another output_dir"))
}

/// The newest checkpoint that Dyad wrote. It may be damaged; its user checks that.
#[must_use]
pub fn newest_checkpoint(dir: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(dir).ok()?.flatten().map(|entry| entry.path());
    let checkpoints = entries.filter(|path| checkpoint_step(path).is_some() && is_real_folder(path));
    checkpoints.filter(|path| path.join(STATE).is_file()).max_by_key(|path| checkpoint_step(path))
}

/// Whether the path is a folder, not a link to one.
#[must_use]
pub fn is_real_folder(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|about| about.is_dir())
}

/// Whether this scheduler job started the folder's run. If so, the requeued job resumes it; otherwise it treats the folder as in its
/// first start.
#[must_use]
pub fn begun_by(dir: &Path, job: &str) -> bool {
    files::read_to_string(&dir.join(JOB)).is_ok_and(|begun| begun.trim_end() == job)
}

/// Hint after a failure of a run that had begun to train.
#[must_use]
pub fn how_to_go_on(checkpoint: Option<&Path>) -> String {
    match checkpoint {
        Some(checkpoint) => format!("the same command with --resume goes on from {}", name(checkpoint)),
        None => "no checkpoint was written yet: start again with --overwrite; the key save_minutes sets how often one is written".into(),
    }
}

/// Like [`how_to_go_on`], for a folder. Does not suggest `--overwrite` if the folder holds a finished model.
#[must_use]
pub fn how_to_go_on_in(dir: &Path) -> String {
    match newest_checkpoint(dir) {
        None if dir.join(FINAL).is_dir() => {
            "the folder holds a finished model: --resume tells whether anything is left to do".into()
        }
        checkpoint => how_to_go_on(checkpoint.as_deref()),
    }
}

/// Hint for a run's folder given in the place of a model folder; `None` for any other folder.
#[must_use]
pub fn model_hint(dir: &Path) -> Option<String> {
    let model = dir.join(FINAL);
    (dir.join(RUN_CONFIG).is_file() && model.is_dir())
        .then(|| format!("this is the folder of a run; its model is {}", model.display()))
}

/// The step of a folder named `checkpoint-N`; `None` for other names, such as `checkpoint-007`.
#[must_use]
pub fn checkpoint_step(path: &Path) -> Option<u64> {
    let digits = name(path).strip_prefix("checkpoint-")?;
    let step: u64 = digits.parse().ok()?;
    (step > 0 && step.to_string() == digits).then_some(step)
}

/// Name of the file that keeps the configuration of a run resumed after `step` with a changed configuration.
#[must_use]
pub fn resumed_config(step: u64) -> String {
    format!("run-from-{step}.json")
}

fn is_resumed_config(name: &str) -> bool {
    let digits = name.strip_prefix("run-from-").and_then(|rest| rest.strip_suffix(".json"));
    digits.and_then(|digits| digits.parse().ok()).is_some_and(|step| resumed_config(step) == name)
}

/// The temporary path under which a folder is written before it is renamed to `target`.
#[must_use]
pub fn unfinished(target: &Path) -> PathBuf {
    target.with_file_name(format!("{UNFINISHED}{}", name(target)))
}

/// The path under which an earlier run's folder waits for its removal. Differs from [`unfinished`], which the new run may be using.
#[must_use]
pub fn set_aside(target: &Path) -> PathBuf {
    target.with_file_name(format!("{UNFINISHED}{EARLIER}{}", name(target)))
}

/// The final name of a folder: undoes [`unfinished`] and [`set_aside`]; other names stay as they are.
#[must_use]
pub fn finished_name(path: &Path) -> String {
    hidden_name(path).unwrap_or(name(path)).to_owned()
}

/// Whether the name is one that [`unfinished`] or [`set_aside`] gives: such a folder is left over from a run that died.
#[must_use]
pub fn is_unfinished(path: &Path) -> bool {
    hidden_name(path).is_some_and(|name| has_own_name(Path::new(name)))
}

fn hidden_name(path: &Path) -> Option<&str> {
    let hidden = name(path).strip_prefix(UNFINISHED)?;
    Some(hidden.strip_prefix(EARLIER).unwrap_or(hidden))
}

/// Whether Dyad wrote a folder that has the name of a checkpoint or final model. An empty folder counts: its removal loses nothing.
#[must_use]
pub fn is_own(path: &Path) -> bool {
    let has = |name: &str| path.join(name).is_file();
    if has(MANIFEST) || std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none()) {
        return true;
    }
    match checkpoint_step(path) {
        Some(_) => has(STATE) || has(OPTIMIZER),
        // Earlier versions wrote no manifest into the final model: look for the run's metrics next to it.
        None => {
            let beside_rows = path.parent().is_some_and(|dir| dir.join(METRICS).is_file());
            beside_rows && (has("config.json") || has("adapter_config.json"))
        }
    }
}

/// Whether the name is that of a checkpoint or of the final model.
#[must_use]
pub fn has_own_name(path: &Path) -> bool {
    name(path) == FINAL || checkpoint_step(path).is_some()
}

/// Files in a folder with names that a run gives. The folder may hold other files too.
fn files_in(dir: &Path, is_own: fn(&str) -> bool) -> io::Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir)?.collect::<io::Result<Vec<_>>>()?;
    let files = entries.into_iter().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()));
    Ok(files.map(|entry| entry.path()).filter(|path| is_own(name(path))).collect())
}

/// Name of the file with the sample answers after a step; `extension` is `jsonl` or `md`.
#[must_use]
pub fn sample_file(step: u64, extension: &str) -> String {
    format!("step-{step}.{extension}")
}

fn is_sample_file(name: &str) -> bool {
    let step = name.strip_prefix("step-").and_then(|rest| rest.split_once('.'));
    step.is_some_and(|(step, extension)| {
        ["jsonl", "md"].contains(&extension)
            && step.parse().is_ok_and(|step: u64| sample_file(step, extension) == name)
    })
}

/// `events.out.tfevents.SECONDS.HOST.PID.0`.
fn is_event_file(name: &str) -> bool {
    let number = |part: Option<&str>| part.is_some_and(|part| part.parse::<u64>().is_ok());
    let Some(rest) = name.strip_prefix("events.out.tfevents.") else { return false };
    let mut parts = rest.split('.');
    number(parts.next())
        && parts.next_back() == Some("0")
        && number(parts.next_back())
        && parts.next().is_some()
}

fn name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, file: &str) {
        let path = dir.join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "{}\n").unwrap();
    }

    fn names(dir: &Path) -> Vec<String> {
        let own = |path: PathBuf| path.strip_prefix(dir).unwrap().display().to_string();
        traces(dir).unwrap().into_iter().map(own).collect()
    }

    #[test]
    fn links_under_names_that_a_run_writes_are_refused_and_others_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        std::fs::create_dir(&out).unwrap();
        let link = |name: &str| std::os::unix::fs::symlink(dir.path(), out.join(name)).unwrap();
        for name in ["final", "notes", "data"] {
            link(name);
        }
        // The output folder itself may be a link.
        std::os::unix::fs::symlink(&out, dir.path().join("here")).unwrap();
        assert_eq!(refuse_obstacles(&dir.path().join("here")), Ok(()));
        let others = ["checkpoint-7", ".tmp-final", ".tmp-checkpoint-3", "run-from-4.json"];
        for name in FILES.into_iter().chain(FOLDERS).chain(others) {
            link(name);
            let fault = refuse_obstacles(&out).unwrap_err();
            assert!(fault.message.contains(&format!(": {name} is a link")), "{fault}");
            std::fs::remove_file(out.join(name)).unwrap();
        }
    }

    #[test]
    fn folders_in_the_place_of_files_and_files_in_the_place_of_folders_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (file, fifo) = ("a folder, where a run writes a file", "neither a file nor a folder");
        let scratch = |name: &str| format!(".{name}.part");
        for name in FILES.into_iter().chain(["run-from-12.json"]) {
            for name in [name, &scratch(name), NEXT_RUN_CONFIG, &scratch(NEXT_RUN_CONFIG)] {
                let path = dir.path().join(name);
                std::fs::create_dir(&path).unwrap();
                let fault = refuse_obstacles(dir.path()).unwrap_err();
                assert!(fault.message.ends_with(&format!(": {name} is {file}")), "{fault}");
                std::fs::remove_dir(&path).unwrap();
            }
            let path = dir.path().join(name);
            assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
            assert!(refuse_obstacles(dir.path()).unwrap_err().message.contains(fifo));
            std::fs::remove_file(&path).unwrap();
            std::fs::write(&path, "").unwrap();
        }
        assert_eq!(refuse_obstacles(dir.path()), Ok(()));
        for name in FOLDERS.into_iter().chain([".tmp-final", ".tmp-checkpoint-4"]) {
            std::fs::write(dir.path().join(name), "").unwrap();
            let fault = refuse_obstacles(dir.path()).unwrap_err();
            assert!(
                fault.message.ends_with(&format!(": {name} is no folder, where a run makes one")),
                "{fault}"
            );
            std::fs::remove_file(dir.path().join(name)).unwrap();
        }
    }

    #[test]
    fn a_foreign_folder_named_like_a_checkpoint_is_not_resumed_from() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "checkpoint-7/trainer_state.json");
        std::os::unix::fs::symlink(dir.path(), dir.path().join("checkpoint-8")).unwrap();
        assert_eq!(newest_checkpoint(dir.path()), None);
        write(dir.path(), "checkpoint-3/dyad_state.json");
        assert_eq!(newest_checkpoint(dir.path()), Some(dir.path().join("checkpoint-3")));
    }

    #[test]
    fn the_hint_for_a_finished_model_does_not_suggest_overwrite() {
        let dir = tempfile::tempdir().unwrap();
        assert!(how_to_go_on_in(dir.path()).ends_with("the key save_minutes sets how often one is written"));
        write(dir.path(), "final/model.safetensors");
        let advice = how_to_go_on_in(dir.path());
        assert!(advice.contains("--resume") && !advice.contains("--overwrite"), "{advice}");
        write(dir.path(), "checkpoint-3/dyad_state.json");
        assert_eq!(how_to_go_on_in(dir.path()), "the same command with --resume goes on from checkpoint-3");
    }

    #[test]
    fn set_aside_folders_have_their_own_name_and_count_as_unfinished() {
        for name in ["final", "checkpoint-2"] {
            let path = Path::new("out").join(name);
            assert_ne!(set_aside(&path), unfinished(&path));
            for hidden in [set_aside(&path), unfinished(&path)] {
                assert!(is_unfinished(&hidden) && finished_name(&hidden) == name, "{}", hidden.display());
            }
        }
        assert!(
            !is_unfinished(Path::new(".tmp-earlier-notes")) && !is_unfinished(Path::new("earlier-final"))
        );
    }

    #[test]
    fn a_job_recognises_only_its_own_run() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!begun_by(dir.path(), "c/7") && !begun_by(dir.path(), ""));
        std::fs::write(dir.path().join(JOB), "c/7\n").unwrap();
        assert!(begun_by(dir.path(), "c/7") && !begun_by(dir.path(), "c/71") && !begun_by(dir.path(), "7"));
    }

    #[test]
    fn only_finished_files_of_a_run_refuse_the_next_run() {
        let dir = tempfile::tempdir().unwrap();
        let refused = || refuse_earlier_run(dir.path(), &traces(dir.path()).unwrap());
        for name in ["run.json", "notes.txt", ".tmp-final/model.safetensors"] {
            write(dir.path(), name);
        }
        std::fs::write(dir.path().join(METRICS), "").unwrap();
        assert_eq!(refused(), Ok(()));
        for (trace, file) in [
            (METRICS, METRICS),
            (EVALUATION_METRICS, EVALUATION_METRICS),
            ("checkpoint-3", "checkpoint-3/dyad_state.json"),
            ("final", "final/dyad_manifest.json"),
        ] {
            write(dir.path(), file);
            let message = refused().unwrap_err().message;
            assert!(message.ends_with(&format!("already holds a run ({trace})")), "{message}");
            let path = dir.path().join(trace);
            if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }.unwrap();
        }
    }

    #[test]
    fn files_with_similar_names_are_not_traces() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            ".tmp-mydata/thesis",
            ".tmp-checkpoint-best/model.safetensors",
            ".tmp-finals/notes",
            "checkpoint-best/dyad_state.json",
            "checkpoint-0006/dyad_state.json",
            "checkpoint--6/dyad_state.json",
            "checkpoint-+6/dyad_state.json",
            "checkpoint-6.bak/dyad_state.json",
            "checkpoints-6/dyad_state.json",
            "final-notes.txt",
            "finals/config.json",
            "metrics.jsonl.bak",
            "logs/my.txt",
            "tb/other",
            "tb/events.out.tfevents.mine",
            "tb/events.out.tfevents.1700000000.host.7.0.bak",
        ] {
            write(dir.path(), name);
        }
        std::os::unix::fs::symlink("logs", dir.path().join(".tmp-final")).unwrap();
        assert_eq!(names(dir.path()), [] as [&str; 0]);
        assert_eq!(foreign(dir.path()).unwrap(), None);
        for name in [
            "metrics.jsonl",
            ".tmp-checkpoint-12/a",
            "checkpoint-12/optimizer.safetensors",
            "final/config.json",
            "tb/events.out.tfevents.1700000000.a.b.7.0",
        ] {
            write(dir.path(), name);
        }
        let expected = [
            ".tmp-checkpoint-12",
            "checkpoint-12",
            "final",
            "metrics.jsonl",
            "tb/events.out.tfevents.1700000000.a.b.7.0",
        ];
        assert_eq!(names(dir.path()), expected);
    }

    #[test]
    fn foreign_content_under_a_name_of_dyads_is_refused() {
        for file in ["final/config.json", "final", "checkpoint-500/trainer_state.json", "checkpoint-7"] {
            let dir = tempfile::tempdir().unwrap();
            write(dir.path(), file);
            assert_eq!(names(dir.path()), [] as [&str; 0], "{file}");
            let message = refuse_earlier_run(dir.path(), &[]).unwrap_err().message;
            let name = file.split('/').next().unwrap();
            assert!(message.ends_with(&format!("holds {name}, which Dyad did not write")), "{message}");
        }
    }
}
