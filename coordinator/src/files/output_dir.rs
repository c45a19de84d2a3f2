//! The output folder: checks before a run, the point where a resumed run continues, and the files that a run writes.
//!
//! [`inspect`] only checks (and creates the folder). Files of an earlier run are replaced when the new run writes its first row
//! ([`RunFiles`]). A run that ends before its first row leaves the earlier run intact.

mod aside;
mod checkpoint;
mod records;
pub(crate) mod rows;
mod samples;

use std::fs;
use std::path::{Path, PathBuf};

use dyad_proto::fingerprint::Fingerprint;
use dyad_proto::folder::Folder;
use dyad_proto::names::metric;
use dyad_proto::run_flags::OutputMode;
use dyad_proto::run_folder::{
    EVALUATION_METRICS, FINAL, METRICS, SAMPLES, TENSORBOARD, checkpoint_step, finished_name, is_unfinished,
    refuse_earlier_run, refuse_foreign, refuse_obstacles, traces,
};
use dyad_proto::wire::{EarlyStopping, SampleAnswer};
use dyad_proto::{Fault, files, removal, safe_file};
use serde_json::Value;

use self::aside::Aside;
use self::rows::{KeptRows, MetricsFile, StagedRows};
use self::samples::BaseAnswers;
use crate::files::tensorboard::EventFile;
use crate::run::metrics_row::MetricsRow;
use crate::run::same_run::{Now, same_run};

/// Where a resumed run continues.
#[derive(Clone, Debug, PartialEq)]
pub struct ResumePoint {
    /// Steps done.
    pub step: u64,
    /// The checkpoint folder.
    pub path: PathBuf,
    /// Tokens trained on.
    pub num_tokens: u64,
    /// Evaluations that have a row.
    pub evaluations: u64,
    /// Fingerprint of the run when the checkpoint was made.
    pub then: Fingerprint,
}

/// The planned changes to the output folder.
#[derive(Debug)]
pub struct OutputPlan {
    folder: Folder,
    remove: Vec<PathBuf>,
    /// Set if an earlier run is resumed.
    pub resume: Option<ResumePoint>,
    /// The scheduler's job that the run belongs to.
    job: Option<String>,
}

/// The files that a run writes: its configuration, rows of steps and evaluations, and the same rows for TensorBoard.
#[derive(Debug)]
pub struct RunFiles {
    plan: OutputPlan,
    config_json: String,
    /// Written to `run.json` with the configuration: command, trainers, facts.
    record: Option<Value>,
    /// Open from the first row on.
    files: Option<OutputFiles>,
    /// The evaluation due at the resumed step was done before.
    pub evaluated: bool,
    /// Rows of evaluations that a resumed run keeps.
    pub earlier: Vec<Value>,
    /// Sample answers of the model that the run started from.
    base: BaseAnswers,
}

#[derive(Debug)]
struct OutputFiles {
    metrics: MetricsFile,
    evaluations: MetricsFile,
    board: EventFile,
}

impl OutputFiles {
    /// Returns once all rows are on the disk.
    fn persist(&self) -> Result<(), Fault> {
        self.metrics.persist()?;
        self.evaluations.persist()
    }
}

/// Creates the folder if needed, and checks that it can be written and used as `mode` says.
pub fn inspect(folder: &Folder, mode: OutputMode, now: &Now) -> Result<OutputPlan, Fault> {
    let dir = folder.path();
    folder.still_there()?;
    check_writable(dir)?;
    refuse_obstacles(dir)?;
    removal::recover(dir).map_err(|error| unusable(dir, &error))?;
    let traces = traces(dir).map_err(|error| unusable(dir, &error))?;
    let unfinished = traces.iter().filter(|path| is_unfinished(path));
    let plan = |remove, resume| OutputPlan { folder: folder.clone(), remove, resume, job: None };
    match mode {
        OutputMode::Fresh => {
            refuse_earlier_run(dir, &traces)?;
            Ok(plan(unfinished.cloned().collect(), None))
        }
        // Files without a checkpoint or final model are of no use to a run that starts again.
        OutputMode::AutoResume => {
            let has = |wanted: fn(&Path) -> bool| traces.iter().any(|path| wanted(path));
            let mode = match (has(|path| checkpoint_step(path).is_some()), has(|path| path.ends_with(FINAL)))
            {
                (true, _) => OutputMode::Resume,
                (false, true) => OutputMode::Fresh,
                (false, false) => OutputMode::Overwrite,
            };
            inspect(folder, mode, now)
        }
        OutputMode::Overwrite => {
            refuse_foreign(dir)?;
            Ok(plan(traces, None))
        }
        OutputMode::Resume => {
            // Otherwise a foreign folder in the place of a checkpoint or of the model would be found only when they are saved.
            refuse_foreign(dir)?;
            let resume = Some(resume_point(dir, now)?);
            Ok(plan(unfinished.cloned().collect(), resume))
        }
    }
}

impl OutputPlan {
    /// Sets the scheduler's job; the folder records it with the first row.
    #[must_use]
    pub fn of_job(self, job: Option<String>) -> Self {
        Self { job, ..self }
    }

    /// Removes the unfinished folders of a run that died, and returns the output for the new run.
    pub fn start(self, config_json: String) -> Result<RunFiles, Fault> {
        self.remove.iter().filter(|path| is_unfinished(path)).try_for_each(|path| remove(path))?;
        let evaluations = KeptRows::read(&self.folder.path().join(EVALUATION_METRICS), self.step())?;
        let last = evaluations.last.as_ref().and_then(|row| row.get(metric::STEP)?.as_u64());
        let evaluated = self.resume.is_some() && last == Some(self.step());
        let earlier = if self.resume.is_some() { evaluations.values() } else { Vec::new() };
        let samples = self.folder.path().join(SAMPLES);
        let base = self.resume.as_ref().map(|_| BaseAnswers::read(&samples)).unwrap_or_default();
        Ok(RunFiles { config_json, record: None, files: None, evaluated, earlier, base, plan: self })
    }

    /// Steps that were done before.
    fn step(&self) -> u64 {
        self.resume.as_ref().map_or(0, |resume| resume.step)
    }

    /// Puts the new run's files in their places and removes those of the earlier run. First does everything that is likely to fail; after
    /// a failure there the earlier run is unchanged.
    fn apply(&self, config_json: &str, record: Option<&Value>) -> Result<OutputFiles, Fault> {
        let dir = self.folder.path();
        self.folder.still_there()?;
        refuse_obstacles(dir)?;
        let resumed = self.resume.as_ref().map(|resume| resume.step);
        let config = records::staged(dir, config_json, record, resumed)?;
        let (metrics, evaluations) = (self.rows(METRICS)?, self.rows(EVALUATION_METRICS)?);
        let board = EventFile::create(&dir.join(TENSORBOARD), self.step())?;
        let job = || records::keep_job(dir, self.job.as_deref(), self.resume.is_some());
        // While files of an earlier run are still there, the job's record would claim them for this job: then write it last.
        let alone = self.remove.iter().all(|path| is_unfinished(path));
        let place = || -> Result<_, Fault> {
            if alone {
                job()?;
            }
            let aside = Aside::put(self.removed_with_the_first_row())?;
            let metrics = metrics.place()?;
            let evaluations = evaluations.place()?;
            config
                .map_or(Ok(()), |config| config.place().map(drop))
                .map_err(|error| unusable(dir, &error))?;
            records::drop_best(dir, self.step());
            files::sync_folder(dir).map_err(|error| unusable(dir, &error))?;
            aside.remove()?;
            if !alone {
                job()?;
            }
            Ok((metrics, evaluations))
        };
        let (metrics, evaluations) = place().inspect_err(|_| board.discard())?;
        Ok(OutputFiles { metrics, evaluations, board })
    }

    fn rows(&self, name: &str) -> Result<StagedRows, Fault> {
        let path = self.folder.path().join(name);
        let kept = match self.resume {
            Some(_) => KeptRows::read(&path, self.step())?,
            None => KeptRows::default(),
        };
        StagedRows::new(path, &kept)
    }

    /// Paths to remove with the first row: not the metrics files, which are replaced, nor unfinished folders, which `start` removes.
    fn removed_with_the_first_row(&self) -> impl Iterator<Item = &Path> {
        let replaced = |path: &Path| path.ends_with(METRICS) || path.ends_with(EVALUATION_METRICS);
        self.remove.iter().map(PathBuf::as_path).filter(move |path| !is_unfinished(path) && !replaced(path))
    }
}

impl RunFiles {
    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.plan.folder.path()
    }

    /// Sets the record that `run.json` holds with the configuration; without effect after the first row.
    pub fn tells(&mut self, record: impl FnOnce() -> Value) {
        if self.files.is_none() && self.record.is_none() {
            self.record = Some(record());
        }
    }

    /// Writes the row of a step. With `durable` it is synced to the disk when this returns.
    pub fn step(&mut self, row: &MetricsRow, durable: bool) -> Result<(), Fault> {
        let files = self.files()?;
        files.metrics.append(&row.to_json())?;
        if durable {
            files.persist()?;
        }
        files.board.add(row)
    }

    /// Writes the row of an evaluation.
    pub fn evaluation(&mut self, row: &MetricsRow) -> Result<(), Fault> {
        let files = self.files()?;
        files.evaluations.append(&row.to_json())?;
        files.board.add(row)
    }

    /// Writes the sample answers of an evaluation, beside those of the model that the run started from.
    pub fn samples(&mut self, step: u64, answers: &[SampleAnswer]) -> Result<(), Fault> {
        let dir = self.plan.folder.path().join(SAMPLES);
        if answers.is_empty() { Ok(()) } else { self.base.write(&dir, step, answers) }
    }

    /// Replaces the file that names the best evaluation so far.
    pub fn best(&self, stopping: &EarlyStopping) -> Result<(), Fault> {
        records::keep_best(self.dir(), stopping)
    }

    /// Returns once all rows are on the disk.
    pub fn persist(&self) -> Result<(), Fault> {
        self.files.as_ref().map_or(Ok(()), OutputFiles::persist)
    }

    fn files(&mut self) -> Result<&mut OutputFiles, Fault> {
        let files = match self.files.take() {
            Some(files) => files,
            None => self.plan.apply(&self.config_json, self.record.as_ref())?,
        };
        Ok(self.files.insert(files))
    }
}

/// Removes a file or folder. Foreign files in it are kept in `NAME-kept`, where NAME is `final` for `.tmp-final` too.
fn remove(path: &Path) -> Result<(), Fault> {
    removal::remove(path, &finished_name(path)).map_err(|error| unusable(path, &error))
}

fn check_writable(dir: &Path) -> Result<(), Fault> {
    if let Some(what) = files::obstacle(dir) {
        return Err(unusable(dir, what));
    }
    let probe = dir.join(".dyad-write-test");
    let written = fs::create_dir_all(dir)
        .and_then(|()| safe_file::write(&probe, b""))
        .and_then(|()| fs::remove_file(&probe));
    written.map_err(|error| unusable(dir, &error))
}

fn unusable(path: &Path, error: impl std::fmt::Display) -> Fault {
    Fault::input(format!("cannot write output_dir {}: {error}", path.display()))
        .hint("set output_dir to a folder that you may write to")
}

fn resume_point(dir: &Path, now: &Now) -> Result<ResumePoint, Fault> {
    let checkpoint::Checkpoint { path, state } = checkpoint::newest(dir)?;
    same_run(&path, state.step, &state.run, now)?.iter().for_each(|line| tracing::warn!("{line}"));
    let step = state.step;
    let rows = KeptRows::read(&dir.join(METRICS), step)?;
    if let Some(holes) = rows.holes(step) {
        tracing::warn!("{} {holes}: the run goes on without", dir.join(METRICS).display());
    }
    let evaluations = dir.join(EVALUATION_METRICS);
    let kept = KeptRows::read(&evaluations, step)?;
    let lost = kept.lost_before(step, state.evaluations.unwrap_or(0));
    for what in kept.torn().into_iter().chain(lost) {
        tracing::warn!("{} {what}: the run goes on without", evaluations.display());
    }
    let last = || rows.last.as_ref().and_then(|row| row.get(metric::NUM_TOKENS).and_then(Value::as_u64));
    let num_tokens = state.num_tokens.or_else(last).unwrap_or(0);
    Ok(ResumePoint { step, num_tokens, evaluations: kept.rows(), path, then: state.run.fingerprint })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use dyad_proto::manifest::Manifest;
    use dyad_proto::run_flags::OutputMode;
    use dyad_proto::run_folder::{MANIFEST, OPTIMIZER, STATE};
    use tempfile::TempDir;

    use super::*;

    fn now() -> Now {
        Now {
            config: dyad_proto::RunConfig::default(),
            dataset_sha256: "aa".into(),
            validation_sha256: String::new(),
            world_size: 2,
        }
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

    fn checkpoint(dir: &Path, step: u64) {
        let name = format!("checkpoint-{step}");
        write(dir, &format!("{name}/{STATE}"), &state(step));
        write(dir, &format!("{name}/{OPTIMIZER}"), "moments");
        write(dir, &format!("{name}/model.safetensors"), "weights");
        Manifest::of(&dir.join(&name), &BTreeMap::new()).unwrap().write(&dir.join(name)).unwrap();
    }

    /// A run with checkpoints 2 and 4, a half-written newer one, and metrics beyond both.
    fn earlier_run() -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "run.json", "{}");
        checkpoint(dir.path(), 2);
        checkpoint(dir.path(), 4);
        checkpoint(dir.path(), 10);
        write(dir.path(), "checkpoint-10/dyad_state.json", "{\"step\":");
        write(dir.path(), ".tmp-checkpoint-6/model.safetensors", "");
        let rows: String =
            (1..=5).map(|step| format!("{{\"step\":{step},\"num_tokens\":{}}}\n", step * 100)).collect();
        write(dir.path(), METRICS, &format!("{rows}{{\"step\":6,\"num_t"));
        write(dir.path(), EVALUATION_METRICS, "{\"step\":0}\n{\"step\":4}\n");
        dir
    }

    fn names(dir: &Path) -> Vec<String> {
        let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    }

    fn started(dir: &Path, mode: OutputMode) -> RunFiles {
        plan(dir, mode).unwrap().start("{\"n_epochs\":2}".into()).unwrap()
    }

    fn step_row(step: f64) -> MetricsRow {
        MetricsRow::from([("step", step), ("loss", 0.5)])
    }

    fn plan(dir: &Path, mode: OutputMode) -> Result<OutputPlan, Fault> {
        inspect(&Folder::unseen(dir), mode, &now())
    }

    #[test]
    fn fresh_mode_refuses_a_folder_with_an_earlier_run() {
        let dir = earlier_run();
        let fault = plan(dir.path(), OutputMode::Fresh).unwrap_err();
        assert!(fault.message.contains("already holds a run (checkpoint-10)"), "{fault}");
        assert!(fault.hint.contains("--resume") && fault.hint.contains("--overwrite"));
    }

    #[test]
    fn auto_resume_resumes_or_starts_over_but_never_removes_a_model() {
        let dir = earlier_run();
        assert_eq!(
            plan(dir.path(), OutputMode::AutoResume).unwrap().resume.map(|resume| resume.step),
            Some(4)
        );
        let early = tempfile::tempdir().unwrap();
        write(early.path(), METRICS, "{\"step\":1}\n");
        let again = plan(early.path(), OutputMode::AutoResume).unwrap();
        assert_eq!((again.resume, again.remove), (None, vec![early.path().join(METRICS)]));
        let done = tempfile::tempdir().unwrap();
        write(done.path(), "final/dyad_manifest.json", "{}");
        assert!(
            plan(done.path(), OutputMode::AutoResume)
                .unwrap_err()
                .message
                .contains("already holds a run (final)")
        );
    }

    #[test]
    fn fresh_mode_creates_the_folder_and_ignores_foreign_files() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "run.json", "{}");
        write(dir.path(), ".tmp-mydata/thesis", "precious");
        assert!(plan(dir.path(), OutputMode::Fresh).is_ok());
        let deep = dir.path().join("a/b");
        started(&deep, OutputMode::Fresh).step(&step_row(1.0), true).unwrap();
        assert_eq!(names(&deep), [EVALUATION_METRICS, METRICS, "run.json", TENSORBOARD]);
        started(dir.path(), OutputMode::Fresh).step(&step_row(1.0), false).unwrap();
        assert!(dir.path().join(".tmp-mydata/thesis").exists());
    }

    #[test]
    fn overwrite_removes_only_run_files_and_only_with_the_first_row() {
        let dir = earlier_run();
        for name in ["final-notes.txt", "checkpoint-best/model", "tb/other", "logs/my.txt"] {
            write(dir.path(), name, "of the user");
        }
        let before = names(dir.path());
        let mut output = started(dir.path(), OutputMode::Overwrite);
        let half_written = |name: &String| !name.starts_with(".tmp-");
        assert_eq!(names(dir.path()), before.into_iter().filter(half_written).collect::<Vec<_>>());
        output.step(&step_row(1.0), false).unwrap();
        let left = [
            "checkpoint-best",
            EVALUATION_METRICS,
            "final-notes.txt",
            "logs",
            METRICS,
            "run.json",
            TENSORBOARD,
        ];
        assert_eq!(names(dir.path()), left);
        assert!(dir.path().join("tb/other").exists() && dir.path().join("logs/my.txt").exists());
        let rows = fs::read_to_string(dir.path().join(METRICS)).unwrap();
        assert_eq!(rows.lines().count(), 1, "{rows}");
        assert_eq!(fs::read_to_string(dir.path().join("run.json")).unwrap(), "{\n  \"n_epochs\": 2\n}\n");
    }

    /// Makes a folder that is not empty in the place of a file.
    fn fill_folder(dir: &Path, name: &str) -> std::io::Result<()> {
        fs::create_dir_all(dir.join(name).join("x"))
    }

    /// Each obstacle makes the first row of the new run fail.
    #[test]
    fn overwrite_removes_nothing_if_a_new_file_cannot_be_created() {
        type Meddling = fn(&Path) -> std::io::Result<()>;
        let cases: [(&str, Meddling); 7] = [
            ("tb", |dir| fs::write(dir.join("tb"), "")),
            (METRICS, |dir| fs::remove_file(dir.join(METRICS)).and_then(|()| fill_folder(dir, METRICS))),
            (EVALUATION_METRICS, |dir| {
                fs::remove_file(dir.join(EVALUATION_METRICS))
                    .and_then(|()| fill_folder(dir, EVALUATION_METRICS))
            }),
            ("run.json", |dir| {
                fs::remove_file(dir.join("run.json")).and_then(|()| fill_folder(dir, "run.json"))
            }),
            (".run.json.part", |dir| fill_folder(dir, ".run.json.part")),
            (".metrics.jsonl.part", |dir| fill_folder(dir, ".metrics.jsonl.part")),
            ("logs", |dir| fs::write(dir.join("logs"), "")),
        ];
        for (name, meddle) in cases {
            let dir = earlier_run();
            write(dir.path(), "final/dyad_manifest.json", "{\"files\":{}}");
            // The obstacle appears after this start and before its first row; later starts find it at once.
            let mut output = started(dir.path(), OutputMode::Overwrite);
            meddle(dir.path()).unwrap();
            let before = names(dir.path());
            for mode in [OutputMode::Overwrite, OutputMode::Resume, OutputMode::AutoResume] {
                let fault = plan(dir.path(), mode).unwrap_err();
                assert!(fault.message.contains(&format!(": {name} is ")), "{fault}");
            }
            assert!(output.step(&step_row(1.0), false).unwrap_err().message.contains(name));
            assert_eq!(names(dir.path()), before, "{name}");
        }
    }

    #[test]
    fn a_folder_replaced_before_the_first_row_gets_no_files() {
        let dir = tempfile::tempdir().unwrap();
        let (out, moved) = (dir.path().join("out"), dir.path().join("moved"));
        fs::create_dir(&out).unwrap();
        let plan = inspect(&Folder::seen(&out).unwrap(), OutputMode::Fresh, &now()).unwrap();
        let mut output = plan.start("{}".into()).unwrap();
        fs::rename(&out, &moved).unwrap();
        fs::create_dir(&out).unwrap();
        let fault = output.step(&step_row(1.0), true).unwrap_err();
        assert!(fault.message.contains("out was replaced by another folder while the run"), "{fault}");
        assert!(names(&out).is_empty() && names(&moved).is_empty());
    }

    #[test]
    fn overwrite_keeps_foreign_files_in_a_checkpoint() {
        let dir = earlier_run();
        write(dir.path(), "checkpoint-4/my-eval.txt", "precious");
        started(dir.path(), OutputMode::Overwrite).step(&step_row(1.0), false).unwrap();
        assert!(!dir.path().join("checkpoint-4").exists());
        let kept = fs::read_to_string(dir.path().join("checkpoint-4-kept/my-eval.txt")).unwrap();
        assert_eq!(kept, "precious");
        assert_eq!(names(&dir.path().join("checkpoint-4-kept")), ["my-eval.txt"]);
    }

    #[test]
    fn resume_is_refused_if_a_foreign_folder_is_in_the_way() {
        for name in ["final", "checkpoint-8"] {
            let dir = earlier_run();
            write(dir.path(), &format!("{name}/notes.txt"), "precious");
            for mode in [OutputMode::Resume, OutputMode::AutoResume] {
                let fault = plan(dir.path(), mode).unwrap_err();
                assert!(
                    fault.message.ends_with(&format!("holds {name}, which Dyad did not write")),
                    "{fault}"
                );
                assert_eq!(fault.code.exit_status(), 2);
            }
        }
    }

    #[test]
    fn resume_takes_the_newest_undamaged_checkpoint_and_trims_metrics_with_the_first_row() {
        let dir = earlier_run();
        let plan = plan(dir.path(), OutputMode::Resume).unwrap();
        let path = dir.path().join("checkpoint-4");
        let resume = plan.resume.as_ref().unwrap();
        assert_eq!((resume.step, &resume.path, resume.num_tokens), (4, &path, 400));
        let mut output = plan.start("{}".into()).unwrap();
        assert!(output.evaluated);
        let text = || fs::read_to_string(dir.path().join(METRICS)).unwrap();
        assert!(text().ends_with("{\"step\":6,\"num_t"), "{}", text());
        output.step(&step_row(5.0), true).unwrap();
        assert!(
            text().ends_with("{\"step\":4,\"num_tokens\":400}\n{\"step\":5,\"loss\":0.5}\n"),
            "{}",
            text()
        );
        assert_eq!(text().lines().count(), 5);
        assert!(!dir.path().join(".tmp-checkpoint-6").exists());
        assert!(dir.path().join("checkpoint-2").exists());
    }

    #[test]
    fn damaged_checkpoints_are_skipped() {
        type Damaging = fn(&Path) -> std::io::Result<()>;
        let cases: [(&str, Damaging); 9] = [
            ("cut short", |path| fs::write(path.join(OPTIMIZER), "mom")),
            ("a flipped byte", |path| fs::write(path.join(OPTIMIZER), "mOments")),
            ("missing", |path| fs::remove_file(path.join("model.safetensors"))),
            ("no state", |path| fs::remove_file(path.join(STATE))),
            ("another step", |path| fs::write(path.join(STATE), state(2))),
            ("no manifest", |path| fs::remove_file(path.join(MANIFEST))),
            ("no manifest, of this version", |path| {
                let state = state(4).replace('}', ",\"config\":{\"batch_size\":8}}");
                fs::write(path.join(STATE), state)?;
                fs::remove_file(path.join(MANIFEST))
            }),
            ("a torn manifest", |path| fs::write(path.join(MANIFEST), "{")),
            ("another name", |path| fs::rename(path, path.with_file_name("checkpoint-0004"))),
        ];
        for (what, damage) in cases {
            let dir = earlier_run();
            damage(&dir.path().join("checkpoint-4")).unwrap();
            let resume = plan(dir.path(), OutputMode::Resume).unwrap().resume.unwrap();
            assert_eq!((resume.step, resume.num_tokens), (2, 200), "{what}");
            fs::write(dir.path().join("checkpoint-2/model.safetensors"), "").unwrap();
            let fault = plan(dir.path(), OutputMode::AutoResume).unwrap_err();
            let expected = "checkpoint-2: model.safetensors has 0 bytes, not 7";
            assert!(fault.message.ends_with(expected), "{what}: {fault}");
        }
    }

    /// Checkpoints as versions without checksums wrote them, with the smallest possible safetensors files.
    #[test]
    fn a_checkpoint_without_checksums_is_accepted_if_file_lengths_match() {
        let dir = tempfile::tempdir().unwrap();
        let tensors = |len: u64, header: &str| [&len.to_le_bytes()[..], header.as_bytes(), &[0; 4]].concat();
        let header = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
        let good = tensors(header.len() as u64, header);
        write(dir.path(), "checkpoint-4/dyad_state.json", &state(4));
        write(dir.path(), "checkpoint-4/config.json", "{}");
        write(dir.path(), METRICS, "{\"step\":4,\"num_tokens\":7}\n");
        let file = |name: &str| dir.path().join("checkpoint-4").join(name);
        fs::write(file("model.safetensors"), &good).unwrap();
        fs::write(file(OPTIMIZER), &good).unwrap();
        let resume = || plan(dir.path(), OutputMode::Resume).map(|plan| plan.resume.unwrap().num_tokens);
        assert_eq!(resume(), Ok(7));
        let bad = [vec![], vec![0; good.len()], good[..good.len() - 1].to_vec(), tensors(u64::MAX, header)];
        for bytes in bad {
            fs::write(file(OPTIMIZER), bytes).unwrap();
            assert!(resume().unwrap_err().message.contains("optimizer.safetensors"));
        }
    }

    #[test]
    fn resume_error_names_the_difference() {
        let dir = earlier_run();
        type Change = fn(&mut Now);
        let cases: [(Change, &str); 3] = [
            (|now| now.config.batch_size = 4, "batch_size was 8 and is now 4"),
            (|now| now.config.random_seed = 1, "random_seed was 42 and is now 1"),
            (|now| now.dataset_sha256 = "bb".into(), "training_file was aa and is now bb"),
        ];
        for (change, expected) in cases {
            let mut now = now();
            change(&mut now);
            let fault = inspect(&Folder::unseen(dir.path()), OutputMode::Resume, &now).unwrap_err();
            assert!(fault.message.ends_with(expected), "{fault}");
        }
        let empty = tempfile::tempdir().unwrap();
        assert!(
            plan(empty.path(), OutputMode::Resume)
                .unwrap_err()
                .message
                .contains("no checkpoint to resume from")
        );
    }

    #[test]
    fn folder_that_cannot_be_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "file", "");
        let fault = plan(&dir.path().join("file/out"), OutputMode::Fresh).unwrap_err();
        assert!(
            fault.message.contains("cannot write output_dir") && fault.message.contains("file/out"),
            "{fault}"
        );
        assert_eq!(fault.code.exit_status(), 2);
    }
}
