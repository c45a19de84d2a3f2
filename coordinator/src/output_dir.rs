//! The output folder: what may be written where, where a resumed run picks up, and the two metrics files.
//!
//! [`inspect`] only looks (and makes the folder); nothing is removed before [`OutputPlan::apply`].

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use dyad_proto::Fault;
use dyad_proto::run_folder::{
    EVALUATION_METRICS, METRICS, TENSORBOARD, checkpoint_step, is_unfinished, refuse_earlier_run, traces,
};
use serde::Deserialize;
use serde_json::Value;

use crate::tensorboard::EventFile;

/// What to do with the traces of an earlier run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// There must be none.
    Fresh,
    /// Remove them.
    Overwrite,
    /// Go on from the newest checkpoint.
    Resume,
    /// The same where there is one; else remove what an attempt without checkpoint left. A finished model is kept.
    AutoResume,
}

/// What a checkpoint must agree on with the run that resumes from it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Identity {
    /// SHA-256 of the training file.
    pub dataset_sha256: String,
    /// Seed of the data order.
    pub random_seed: u64,
    /// Pairs per step.
    pub batch_size: u32,
}

/// `dyad_state.json` of a checkpoint, as far as the coordinator reads it.
#[derive(Clone, Debug, Deserialize)]
struct CheckpointState {
    step: u64,
    #[serde(flatten)]
    identity: Identity,
}

/// Where a resumed run picks up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResumePoint {
    /// Steps done.
    pub step: u64,
    /// The checkpoint folder.
    pub path: PathBuf,
}

/// What is about to happen to the output folder.
#[derive(Debug)]
pub struct OutputPlan {
    dir: PathBuf,
    remove: Vec<PathBuf>,
    /// Set when an earlier run goes on.
    pub resume: Option<ResumePoint>,
}

/// The metrics files, and what the rows kept from an earlier run say.
#[derive(Debug)]
pub struct Output {
    /// `metrics.jsonl`.
    pub metrics: MetricsFile,
    /// `eval_metrics.jsonl`.
    pub evaluations: MetricsFile,
    /// The same for TensorBoard, in `tb/`.
    pub board: EventFile,
    /// Tokens trained on before.
    pub num_tokens: u64,
    /// The evaluation due at the resumed step was done before.
    pub evaluated: bool,
}

/// Checks that the folder can be written and used as `mode` says.
pub fn inspect(dir: &Path, mode: Mode, identity: &Identity) -> Result<OutputPlan, Fault> {
    check_writable(dir)?;
    let traces = traces(dir).map_err(|error| unusable(dir, &error))?;
    let unfinished = traces.iter().filter(|path| is_unfinished(path));
    match mode {
        Mode::Fresh => {
            refuse_earlier_run(dir, &traces)?;
            Ok(OutputPlan { dir: dir.to_owned(), remove: unfinished.cloned().collect(), resume: None })
        }
        // What has neither checkpoint nor final model is worth nothing to a run that starts again.
        Mode::AutoResume => {
            let has = |wanted: fn(&Path) -> bool| traces.iter().any(|path| wanted(path));
            let mode =
                match (has(|path| checkpoint_step(path).is_some()), has(|path| path.ends_with("final"))) {
                    (true, _) => Mode::Resume,
                    (false, true) => Mode::Fresh,
                    (false, false) => Mode::Overwrite,
                };
            inspect(dir, mode, identity)
        }
        Mode::Overwrite => Ok(OutputPlan { dir: dir.to_owned(), remove: traces, resume: None }),
        Mode::Resume => {
            let resume = Some(resume_point(dir, &traces, identity)?);
            Ok(OutputPlan { dir: dir.to_owned(), remove: unfinished.cloned().collect(), resume })
        }
    }
}

impl OutputPlan {
    /// Removes what is to go, cuts the metrics back to the resumed step, and opens them.
    pub fn apply(&self) -> Result<Output, Fault> {
        for path in &self.remove {
            let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
            removed.map_err(|error| unusable(path, &error))?;
        }
        let step = self.resume.as_ref().map_or(0, |resume| resume.step);
        let (metrics, last) = MetricsFile::open(self.dir.join(METRICS), step)?;
        let (evaluations, last_evaluation) = MetricsFile::open(self.dir.join(EVALUATION_METRICS), step)?;
        let number = |row: Option<Value>, key: &str| row.and_then(|row| row.get(key).and_then(Value::as_u64));
        Ok(Output {
            metrics,
            evaluations,
            board: EventFile::new(&self.dir.join(TENSORBOARD), step),
            num_tokens: number(last, "num_tokens").unwrap_or(0),
            evaluated: number(last_evaluation, "step") == Some(step),
        })
    }
}

/// A JSON Lines file that grows by one row at a time.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    /// Opens for appending after dropping rows beyond `step`; also returns the last row kept.
    fn open(path: PathBuf, step: u64) -> Result<(Self, Option<Value>), Fault> {
        let opened = truncate(&path, step)
            .and_then(|last| Ok((OpenOptions::new().create(true).append(true).open(&path)?, last)));
        match opened {
            Ok((file, last)) => Ok((Self { path, file }, last)),
            Err(error) => Err(unusable(&path, &error)),
        }
    }

    /// Writes one row through to the file system, so that a reader never waits for a buffer.
    pub fn append(&mut self, row: &str) -> Result<(), Fault> {
        self.file.write_all(format!("{row}\n").as_bytes()).map_err(|error| {
            Fault::failed(format!("cannot write {}: {error}", self.path.display())).hint("is the disk full?")
        })
    }
}

/// Keeps the rows up to `step`. A row torn by a kill does not parse and goes too.
fn truncate(path: &Path, step: u64) -> io::Result<Option<Value>> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text?,
    };
    let mut last = None;
    let mut kept = String::new();
    for line in text.lines() {
        let row = serde_json::from_str::<Value>(line).ok();
        let Some(row) = row.filter(|row| row["step"].as_u64().is_some_and(|at| at <= step)) else { continue };
        kept.push_str(line);
        kept.push('\n');
        last = Some(row);
    }
    let scratch = path.with_extension("jsonl.tmp");
    fs::write(&scratch, kept)?;
    fs::rename(&scratch, path)?;
    Ok(last)
}

fn check_writable(dir: &Path) -> Result<(), Fault> {
    let probe = dir.join(".dyad-write-test");
    let written =
        fs::create_dir_all(dir).and_then(|()| fs::write(&probe, b"")).and_then(|()| fs::remove_file(&probe));
    written.map_err(|error| unusable(dir, &error))
}

fn unusable(path: &Path, error: &io::Error) -> Fault {
    Fault::input(format!("cannot write output_dir {}: {error}", path.display()))
        .hint("set output_dir to a folder that you may write to")
}

fn resume_point(dir: &Path, traces: &[PathBuf], identity: &Identity) -> Result<ResumePoint, Fault> {
    let mut checkpoints: Vec<&PathBuf> =
        traces.iter().filter(|path| checkpoint_step(path).is_some()).collect();
    checkpoints.sort_by_key(|path| checkpoint_step(path));
    let newest = checkpoints.into_iter().rev().find_map(|path| {
        let text = fs::read_to_string(path.join("dyad_state.json")).ok()?;
        Some((path, serde_json::from_str::<CheckpointState>(&text).ok()?))
    });
    let Some((path, state)) = newest else {
        return Err(Fault::input(format!("output_dir {} holds no checkpoint to resume from", dir.display()))
            .hint("start without --resume; --overwrite removes what an earlier run left"));
    };
    match difference(&state.identity, identity) {
        None => Ok(ResumePoint { step: state.step, path: path.clone() }),
        Some(what) => Err(Fault::input(format!("cannot resume from {}: {what}", path.display()))
            .hint("resume with the data and config of that run, or start anew with --overwrite")),
    }
}

fn difference(then: &Identity, now: &Identity) -> Option<String> {
    let differs = |key: &str, then: String, now: String| {
        (then != now).then(|| format!("{key} was {then} and is now {now}"))
    };
    differs("the SHA-256 of training_file", then.dataset_sha256.clone(), now.dataset_sha256.clone())
        .or_else(|| differs("random_seed", then.random_seed.to_string(), now.random_seed.to_string()))
        .or_else(|| differs("batch_size", then.batch_size.to_string(), now.batch_size.to_string()))
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn identity() -> Identity {
        Identity { dataset_sha256: "aa".into(), random_seed: 42, batch_size: 8 }
    }

    fn write(dir: &Path, file: &str, text: &str) {
        let path = dir.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn state(step: u64) -> String {
        format!(
            r#"{{"step":{step},"total_steps":9,"dataset_sha256":"aa","random_seed":42,"batch_size":8,"world_size":2}}"#
        )
    }

    /// A run with checkpoints 2 and 4, a half-written newer one, and metrics beyond both.
    fn earlier_run() -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "run.json", "{}");
        write(dir.path(), "checkpoint-2/dyad_state.json", &state(2));
        write(dir.path(), "checkpoint-4/dyad_state.json", &state(4));
        write(dir.path(), "checkpoint-10/dyad_state.json", "{\"step\":");
        write(dir.path(), ".tmp-checkpoint-6/model.safetensors", "");
        let rows: String =
            (1..=5).map(|step| format!("{{\"step\":{step},\"num_tokens\":{}}}\n", step * 100)).collect();
        write(dir.path(), METRICS, &format!("{rows}{{\"step\":6,\"num_t"));
        write(dir.path(), EVALUATION_METRICS, "{\"step\":0}\n{\"step\":4}\n");
        dir
    }

    fn plan(dir: &Path, mode: Mode) -> Result<OutputPlan, Fault> {
        inspect(dir, mode, &identity())
    }

    #[test]
    fn earlier_run_is_refused_without_a_word() {
        let dir = earlier_run();
        let fault = plan(dir.path(), Mode::Fresh).unwrap_err();
        assert!(fault.message.contains("already holds a run (checkpoint-10)"), "{fault}");
        assert!(fault.hint.contains("--resume") && fault.hint.contains("--overwrite"));
    }

    #[test]
    fn a_restarted_run_goes_on_or_starts_over_but_never_removes_a_model() {
        let dir = earlier_run();
        assert_eq!(plan(dir.path(), Mode::AutoResume).unwrap().resume.map(|resume| resume.step), Some(4));
        let early = tempfile::tempdir().unwrap();
        write(early.path(), METRICS, "{\"step\":1}\n");
        let again = plan(early.path(), Mode::AutoResume).unwrap();
        assert_eq!((again.resume, again.remove), (None, vec![early.path().join(METRICS)]));
        let done = tempfile::tempdir().unwrap();
        write(done.path(), "final/config.json", "{}");
        assert!(
            plan(done.path(), Mode::AutoResume).unwrap_err().message.contains("already holds a run (final)")
        );
    }

    #[test]
    fn fresh_folder_is_made_and_other_files_do_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "run.json", "{}");
        assert!(plan(dir.path(), Mode::Fresh).is_ok());
        let deep = dir.path().join("a/b");
        let output = plan(&deep, Mode::Fresh).unwrap().apply().unwrap();
        assert!(deep.join(METRICS).exists() && output.num_tokens == 0);
    }

    #[test]
    fn overwrite_removes_just_the_traces() {
        let dir = earlier_run();
        let plan = plan(dir.path(), Mode::Overwrite).unwrap();
        assert!(dir.path().join("checkpoint-4").exists(), "inspection removes nothing");
        plan.apply().unwrap();
        let mut left: Vec<String> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, [EVALUATION_METRICS, METRICS, "run.json"]);
        assert_eq!(fs::read_to_string(dir.path().join(METRICS)).unwrap(), "");
    }

    #[test]
    fn resume_takes_the_newest_readable_checkpoint_and_cuts_the_metrics() {
        let dir = earlier_run();
        let plan = plan(dir.path(), Mode::Resume).unwrap();
        assert_eq!(plan.resume, Some(ResumePoint { step: 4, path: dir.path().join("checkpoint-4") }));
        let mut output = plan.apply().unwrap();
        assert_eq!((output.num_tokens, output.evaluated), (400, true));
        output.metrics.append("{\"step\":5}").unwrap();
        let text = fs::read_to_string(dir.path().join(METRICS)).unwrap();
        assert!(text.ends_with("{\"step\":4,\"num_tokens\":400}\n{\"step\":5}\n"), "{text}");
        assert_eq!(text.lines().count(), 5);
        assert!(!dir.path().join(".tmp-checkpoint-6").exists());
        assert!(dir.path().join("checkpoint-2").exists());
    }

    #[test]
    fn resume_names_what_differs() {
        let dir = earlier_run();
        let cases = [
            (Identity { batch_size: 4, ..identity() }, "batch_size was 8 and is now 4"),
            (Identity { random_seed: 1, ..identity() }, "random_seed was 42 and is now 1"),
            (Identity { dataset_sha256: "bb".into(), ..identity() }, "training_file was aa and is now bb"),
        ];
        for (identity, expected) in cases {
            let fault = inspect(dir.path(), Mode::Resume, &identity).unwrap_err();
            assert!(fault.message.ends_with(expected), "{fault}");
        }
        let empty = tempfile::tempdir().unwrap();
        assert!(
            plan(empty.path(), Mode::Resume).unwrap_err().message.contains("no checkpoint to resume from")
        );
    }

    #[test]
    fn folder_that_cannot_be_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "file", "");
        let fault = plan(&dir.path().join("file/out"), Mode::Fresh).unwrap_err();
        assert!(
            fault.message.contains("cannot write output_dir") && fault.message.contains("file/out"),
            "{fault}"
        );
        assert_eq!(fault.code.exit_status(), 2);
    }
}
