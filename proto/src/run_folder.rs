//! What Dyad's runs leave in an output folder, and the rule that the next run must not fall into it unasked.
//!
//! [`traces`] is the one list of what may be removed. Everything else in the folder is the user's and stays: what merely has a
//! similar name, and what stands under one of Dyad's names but was not written by it ([`foreign`]).

use std::io;
use std::path::{Path, PathBuf};

use crate::{Fault, files};

/// One row per optimizer step.
pub const METRICS: &str = "metrics.jsonl";
/// One row per evaluation.
pub const EVALUATION_METRICS: &str = "eval_metrics.jsonl";
/// Event files for TensorBoard.
pub const TENSORBOARD: &str = "tb";
/// The configuration that the run began with.
pub const RUN_CONFIG: &str = "run.json";
/// The configuration of a run that is about to start, for its coordinator. It becomes [`RUN_CONFIG`] with the run's first row: a start
/// that is refused leaves the record of the run before alone.
pub const NEXT_RUN_CONFIG: &str = ".dyad-next-run.json";
/// The finished model.
pub const FINAL: &str = "final";
/// Where the run stood, in a checkpoint.
pub const STATE: &str = "dyad_state.json";
/// The job of a scheduler that the folder's run was begun by.
pub const JOB: &str = ".dyad-job";
/// Moments and masters, in a checkpoint.
pub const OPTIMIZER: &str = "optimizer.safetensors";
/// Size and checksum of every file, in checkpoints and the finished model.
pub const MANIFEST: &str = "dyad_manifest.json";

/// Files that Dyad writes in an output folder.
const FILES: [&str; 5] = [RUN_CONFIG, METRICS, EVALUATION_METRICS, JOB, "metrics.svg"];
/// Folders that Dyad writes there beside checkpoints and the final model.
const FOLDERS: [&str; 3] = [TENSORBOARD, "logs", "profile"];

/// What may stand where Dyad is going to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FolderPlace {
    /// A regular file.
    File,
    /// Anything that one call removes: it is replaced.
    Scratch,
    /// A folder.
    Folder,
    /// No link; whether it is Dyad's is for [`refuse_foreign`] to say.
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

    /// Why nothing can be written there, and what to do.
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

/// Refuses a folder in which something stands where Dyad is going to write that it can neither write to nor replace, before anything is
/// removed: a link (somebody else may have put it there), a folder in the place of a file, a file in the place of a folder.
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

/// What a run that dies leaves of the folder that it was writing.
const UNFINISHED: &str = ".tmp-";
/// What a run that dies leaves of an earlier run.
const EARLIER: &str = "earlier-";

/// What Dyad made in the folder and a new run must not mix with, in a stable order. A run that was refused before its first row has
/// left nothing. Each path is one file or one whole folder of Dyad's.
pub fn traces(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        // Of the entry itself: what a link leads to is not Dyad's.
        let (kind, name) = (entry.file_type()?, name(&path));
        match name {
            METRICS | EVALUATION_METRICS if kind.is_file() && entry.metadata()?.len() > 0 => found.push(path),
            TENSORBOARD if kind.is_dir() => found.extend(event_files(&path)?),
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

/// What stands where a run would write, but was not written by Dyad.
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

/// Refuses a folder that holds a run, by the first of its traces, or something else in the place of one; what was never finished is
/// no run.
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

/// Refuses a folder in which a run would have to remove what is not Dyad's.
pub fn refuse_foreign(dir: &Path) -> Result<(), Fault> {
    // A folder that cannot be read is refused by whoever lists it.
    let Some(path) = foreign(dir).ok().flatten() else { return Ok(()) };
    Err(Fault::input(format!("output_dir {} holds {}, which Dyad did not write", dir.display(), name(&path)))
        .hint("move it away, or choose another output_dir"))
}

/// The newest checkpoint that Dyad wrote; whether it is whole is seen when it is used.
#[must_use]
pub fn newest_checkpoint(dir: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(dir).ok()?.flatten().map(|entry| entry.path());
    let checkpoints = entries.filter(|path| checkpoint_step(path).is_some() && is_real_folder(path));
    checkpoints.filter(|path| path.join(STATE).is_file()).max_by_key(|path| checkpoint_step(path))
}

/// A folder, and no link to one.
#[must_use]
pub fn is_real_folder(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|about| about.is_dir())
}

/// Whether the folder's run was begun by this job of a scheduler: then the same job, queued again, goes on with it. What anybody else
/// left there is as it was before the job's first start.
#[must_use]
pub fn begun_by(dir: &Path, job: &str) -> bool {
    files::read_to_string(&dir.join(JOB)).is_ok_and(|begun| begun.trim_end() == job)
}

/// What to do after a run that had begun to train has failed.
#[must_use]
pub fn how_to_go_on(checkpoint: Option<&Path>) -> String {
    match checkpoint {
        Some(checkpoint) => format!("the same command with --resume goes on from {}", name(checkpoint)),
        None => "no checkpoint was written yet: start again with --overwrite; the key save_minutes says how often one is".into(),
    }
}

/// The same by what lies in the folder: nobody is told to throw a finished model away.
#[must_use]
pub fn how_to_go_on_in(dir: &Path) -> String {
    match newest_checkpoint(dir) {
        None if dir.join(FINAL).is_dir() => {
            "the folder holds a finished model: --resume tells whether anything is left to do".into()
        }
        checkpoint => how_to_go_on(checkpoint.as_deref()),
    }
}

/// A hint for somebody who has named a run's folder where a model's is wanted; `None` for any other folder.
#[must_use]
pub fn model_hint(dir: &Path) -> Option<String> {
    let model = dir.join(FINAL);
    (dir.join(RUN_CONFIG).is_file() && model.is_dir())
        .then(|| format!("this is the folder of a run; its model is {}", model.display()))
}

/// The step of a folder named `checkpoint-N`, exactly as Dyad writes it.
#[must_use]
pub fn checkpoint_step(path: &Path) -> Option<u64> {
    let digits = name(path).strip_prefix("checkpoint-")?;
    let step: u64 = digits.parse().ok()?;
    (step > 0 && step.to_string() == digits).then_some(step)
}

/// Name of the configuration that a run went on with after so many steps, where it is not the one that it began with.
#[must_use]
pub fn resumed_config(step: u64) -> String {
    format!("run-from-{step}.json")
}

fn is_resumed_config(name: &str) -> bool {
    let digits = name.strip_prefix("run-from-").and_then(|rest| rest.strip_suffix(".json"));
    digits.and_then(|digits| digits.parse().ok()).is_some_and(|step| resumed_config(step) == name)
}

/// The name under which a folder is filled before it appears.
#[must_use]
pub fn unfinished(target: &Path) -> PathBuf {
    target.with_file_name(format!("{UNFINISHED}{}", name(target)))
}

/// The name under which an earlier run's folder waits for its end. Not that of an unfinished one, which the new run may be filling by then.
#[must_use]
pub fn set_aside(target: &Path) -> PathBuf {
    target.with_file_name(format!("{UNFINISHED}{EARLIER}{}", name(target)))
}

/// The name that a folder has once it is finished, or had: what [`unfinished`] or [`set_aside`] was given, or its own.
#[must_use]
pub fn finished_name(path: &Path) -> String {
    hidden_name(path).unwrap_or(name(path)).to_owned()
}

/// A folder that a run died over: by its name, which is one that [`unfinished`] or [`set_aside`] gives.
#[must_use]
pub fn is_unfinished(path: &Path) -> bool {
    hidden_name(path).is_some_and(|name| has_own_name(Path::new(name)))
}

fn hidden_name(path: &Path) -> Option<&str> {
    let hidden = name(path).strip_prefix(UNFINISHED)?;
    Some(hidden.strip_prefix(EARLIER).unwrap_or(hidden))
}

/// A folder under a name of Dyad's holds what only Dyad writes. One that holds nothing is nobody's loss.
#[must_use]
pub fn is_own(path: &Path) -> bool {
    let has = |name: &str| path.join(name).is_file();
    if has(MANIFEST) || std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none()) {
        return true;
    }
    match checkpoint_step(path) {
        Some(_) => has(STATE) || has(OPTIMIZER),
        // Before there were manifests, a finished model had no mark of its own.
        None => {
            let beside_rows = path.parent().is_some_and(|dir| dir.join(METRICS).is_file());
            beside_rows && (has("config.json") || has("adapter_config.json"))
        }
    }
}

/// A name of a checkpoint or of the finished model.
#[must_use]
pub fn has_own_name(path: &Path) -> bool {
    name(path) == FINAL || checkpoint_step(path).is_some()
}

/// Files of TensorBoard that a run wrote; others may lie beside them.
fn event_files(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir)?.collect::<io::Result<Vec<_>>>()?;
    let files = entries.into_iter().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()));
    Ok(files.map(|entry| entry.path()).filter(|path| is_event_file(name(path))).collect())
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
    fn links_where_a_run_writes_are_named_and_others_do_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        std::fs::create_dir(&out).unwrap();
        let link = |name: &str| std::os::unix::fs::symlink(dir.path(), out.join(name)).unwrap();
        for name in ["final", "notes", "data"] {
            link(name);
        }
        // The folder itself may be one.
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
    fn what_stands_where_a_run_writes_and_cannot_be_written_is_named() {
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
    fn a_folder_with_the_name_of_a_checkpoint_is_none_to_go_on_from() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "checkpoint-7/trainer_state.json");
        std::os::unix::fs::symlink(dir.path(), dir.path().join("checkpoint-8")).unwrap();
        assert_eq!(newest_checkpoint(dir.path()), None);
        write(dir.path(), "checkpoint-3/dyad_state.json");
        assert_eq!(newest_checkpoint(dir.path()), Some(dir.path().join("checkpoint-3")));
    }

    #[test]
    fn a_finished_model_is_not_advised_to_be_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        assert!(how_to_go_on_in(dir.path()).ends_with("the key save_minutes says how often one is"));
        write(dir.path(), "final/model.safetensors");
        let advice = how_to_go_on_in(dir.path());
        assert!(advice.contains("--resume") && !advice.contains("--overwrite"), "{advice}");
        write(dir.path(), "checkpoint-3/dyad_state.json");
        assert_eq!(how_to_go_on_in(dir.path()), "the same command with --resume goes on from checkpoint-3");
    }

    #[test]
    fn what_is_set_aside_is_in_nobodys_way_and_goes_with_what_is_unfinished() {
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
    fn a_job_knows_what_it_has_begun() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!begun_by(dir.path(), "c/7") && !begun_by(dir.path(), ""));
        std::fs::write(dir.path().join(JOB), "c/7\n").unwrap();
        assert!(begun_by(dir.path(), "c/7") && !begun_by(dir.path(), "c/71") && !begun_by(dir.path(), "7"));
    }

    #[test]
    fn only_what_a_run_wrote_counts() {
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
    fn what_only_looks_like_a_trace_stays() {
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
    fn a_name_of_dyads_with_somebody_elses_content_is_refused() {
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
