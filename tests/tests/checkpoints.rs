//! Checkpoints: when they are written, and how a resume treats damaged ones. Records of a run survive its failures.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use dyad_tests::processes::{outcome, wait_for};
use dyad_tests::{CURVE, Workspace, assert_same_curve, binary, number, text};

/// Returns a workspace with a run of eight steps in `whole/`, with checkpoints 2, 4 and 6.
fn workspace() -> Workspace {
    let workspace = Workspace::with_model(32, "n_checkpoints = 4\nmax_steps = 8\n");
    workspace.train(1, "whole", &[]);
    workspace
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &target);
        } else {
            fs::copy(&path, &target).unwrap();
        }
    }
}

/// Copies the whole run to `name` without its `final/`. Returns the argument that sets `output_dir` to the copy.
fn interrupted(workspace: &Workspace, name: &str) -> String {
    let dir = workspace.path(name);
    copy(&workspace.path("whole"), &dir);
    fs::remove_dir_all(dir.join("final")).unwrap();
    format!("output_dir={name}")
}

fn model(workspace: &Workspace, name: &str) -> Vec<u8> {
    fs::read(workspace.path(name).join("final/model.safetensors")).unwrap()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn checkpoints(dir: &Path) -> Vec<String> {
    names(dir).into_iter().filter(|name| name.starts_with("checkpoint-")).collect()
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    let place = bytes.len() - at;
    bytes[place] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_previous_one_used() {
    let workspace = workspace();
    type Damaging = fn(&Path);
    let cases: [(Damaging, &str); 4] = [
        (|path| flip(&path.join("optimizer.safetensors"), 999), "optimizer.safetensors has other bytes"),
        (|path| flip(&path.join("model.safetensors"), 1), "model.safetensors has other bytes"),
        (|path| fs::write(path.join("model.safetensors"), "").unwrap(), "model.safetensors has 0 bytes"),
        (|path| fs::remove_file(path.join("config.json")).unwrap(), "config.json is missing"),
    ];
    for (index, (damage, expected)) in cases.into_iter().enumerate() {
        let name = format!("damaged{index}");
        let target = interrupted(&workspace, &name);
        damage(&workspace.path(&name).join("checkpoint-6"));
        let output = workspace.launch(1, &["--resume", "--set", &target]);
        let text = text(&output);
        assert!(output.status.success(), "{text}");
        let warned = text.lines().find(|line| line.contains("checkpoint-6 is damaged")).unwrap_or_default();
        assert!(warned.contains(expected) && warned.contains("checkpoint-4, the one before"), "{text}");
        assert!(text.contains("resumed after step 4"), "{text}");
        assert!(model(&workspace, &name) == model(&workspace, "whole"), "final weights differ");
        assert_eq!(workspace.rows(&format!("{name}/metrics.jsonl")).len(), 8);
    }
}

#[test]
fn a_resume_without_a_whole_checkpoint_names_what_is_wrong_with_each() {
    let workspace = workspace();
    let target = interrupted(&workspace, "out");
    let path = |name: &str| workspace.path("out").join(name);
    flip(&path("checkpoint-6/model.safetensors"), 7);
    fs::remove_file(path("checkpoint-4/dyad_state.json")).unwrap();
    fs::rename(path("checkpoint-2"), path("checkpoint-3")).unwrap();
    let output = workspace.launch(1, &["--resume", "--set", &target]);
    let text = text(&output);
    assert_eq!(output.status.code(), Some(2), "{text}");
    for expected in [
        "checkpoint-6: model.safetensors has other bytes",
        "checkpoint-4: dyad_state.json is missing",
        "checkpoint-3: dyad_state.json says step 2",
    ] {
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn checkpoints_by_time_rotate_and_change_no_number() {
    let workspace = Workspace::with_model(32, "max_steps = 24\n");
    let plain = workspace.train(2, "plain", &[]);
    assert!(checkpoints(&workspace.path("plain")).is_empty(), "a short run writes none");
    // A timed checkpoint is due after every step; `save_steps` asks for 10 and 20.
    let timed = workspace.train(2, "timed", &["--set", "save_minutes=1e-9", "--set", "save_steps=10"]);
    assert_same_curve(&plain, &timed, &CURVE, 0.0);
    assert!(model(&workspace, "plain") == model(&workspace, "timed"), "final weights differ");
    let left = ["checkpoint-10", "checkpoint-20", "checkpoint-22", "checkpoint-23"];
    assert_eq!(checkpoints(&workspace.path("timed")), left);
    let limited = ["--set", "save_steps=5", "--set", "save_total_limit=2", "--set", "save_minutes=0"];
    workspace.train(2, "limited", &limited);
    assert_eq!(checkpoints(&workspace.path("limited")), ["checkpoint-15", "checkpoint-20"]);
    assert!(names(&workspace.path("limited")).iter().all(|name| !name.starts_with(".tmp-")));
}

#[test]
fn a_refused_resume_leaves_every_record_as_it_was() {
    let workspace = workspace();
    let target = interrupted(&workspace, "out");
    let dir = workspace.path("out");
    let before: Vec<(String, Vec<u8>)> = ["run.json", "metrics.jsonl", "logs/node0-cpu.log"]
        .map(|name| (name.to_owned(), fs::read(dir.join(name)).unwrap()))
        .into();
    let log = fs::read(dir.join("logs/coordinator.log")).unwrap();
    let output = workspace.launch(1, &["--resume", "--set", &target, "--set", "batch_size=4"]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    for (name, bytes) in before {
        assert!(fs::read(dir.join(&name)).unwrap() == bytes, "{name} has changed");
    }
    assert!(fs::read(dir.join("logs/coordinator.log.1")).unwrap() == log, "the earlier log is lost");
    assert!(names(&dir).iter().all(|name| !name.starts_with(".dyad-next")), "{:?}", names(&dir));
}

#[test]
fn a_resume_with_another_configuration_keeps_the_first() {
    let workspace = workspace();
    let target = interrupted(&workspace, "out");
    let first = fs::read(workspace.path("out/run.json")).unwrap();
    let output = workspace.launch(1, &["--resume", "--set", &target, "--set", "max_steps=9"]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(fs::read(workspace.path("out/run.json")).unwrap() == first);
    let later = fs::read_to_string(workspace.path("out/run-from-6.json")).unwrap();
    assert!(later.contains("\"max_steps\": 9"), "{later}");
}

#[test]
fn lost_rows_are_named_and_tokens_are_counted_exactly_once() {
    let workspace = workspace();
    let whole = workspace.rows("whole/metrics.jsonl");
    let lines: Vec<String> = fs::read_to_string(workspace.path("whole/metrics.jsonl"))
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect();
    let torn = |at: usize| {
        let mut lines = lines.clone();
        lines[at].truncate(9);
        lines.join("\n")
    };
    let cases = [
        (String::new(), "lacks the rows of steps 1 to 6"),
        (lines[..3].join("\n") + "\n", "lacks the rows of steps 4 to 6"),
        (torn(2), "lacks the row of step 3; holds no row in line 3"),
    ];
    for (index, (rows, expected)) in cases.into_iter().enumerate() {
        let name = format!("holes{index}");
        let target = interrupted(&workspace, &name);
        fs::write(workspace.path(&name).join("metrics.jsonl"), rows).unwrap();
        let output = workspace.launch(1, &["--resume", "--set", &target]);
        assert!(output.status.success(), "{}", text(&output));
        assert!(text(&output).contains(expected), "{}", text(&output));
        let rows = workspace.rows(&format!("{name}/metrics.jsonl"));
        assert_eq!(number(rows.last().unwrap(), "num_tokens"), number(&whole[7], "num_tokens"));
    }
}

#[test]
fn a_run_whose_output_folder_is_removed_or_cut_fails_and_names_it() {
    type Meddling = fn(&Path);
    let cases: [(Meddling, &str); 3] = [
        (
            |dir| fs::rename(dir, dir.with_file_name("elsewhere")).unwrap(),
            "was removed or moved while the run",
        ),
        (|dir| fs::write(dir.join("metrics.jsonl"), "").unwrap(), "was cut short while the run"),
        (
            |dir| {
                let tb = dir.join("tb");
                fs::rename(&tb, dir.join("charts")).unwrap();
            },
            "was removed or moved while the run",
        ),
    ];
    for (meddle, expected) in cases {
        let workspace = Workspace::with_model(16, "max_steps = 100000\n");
        let mut launcher = workspace.launcher(1, &[]).stderr(Stdio::piped()).spawn().unwrap();
        workspace.wait_for_a_step();
        meddle(&workspace.path("out"));
        let (status, error) = outcome(&mut launcher);
        assert_eq!(status, Some(1), "{error}");
        let line = error.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
        assert!(line.contains(expected) && line.contains("/out/"), "{error}");
    }
}

/// The disk is a small tmpfs that ends with its mount namespace. Needs root.
#[test]
fn a_full_disk_ends_the_run_and_leaves_the_last_checkpoint_whole() {
    let workspace = Workspace::with_model(32, "save_steps = 2\nmax_steps = 100000\n");
    fs::create_dir(workspace.path("out")).unwrap();
    let launcher = binary("launcher").display().to_string();
    let script = format!(
        "mount -t tmpfs -o size=1500k tmpfs out || exit 99
         {launcher} --nodes 1 --gpus-per-node 0 --config run.toml; status=$?
         cp -a out left; exit $status"
    );
    let mut unshare = Command::new("unshare");
    unshare.current_dir(workspace.path(".")).args(["--mount", "sh", "-c", &script]).stdin(Stdio::null());
    let output = unshare.output().unwrap();
    let text = text(&output);
    assert_eq!(output.status.code(), Some(1), "(needs root) {text}");
    let error = text.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
    assert!(error.contains("cannot write") && error.contains("No space left on device"), "{text}");
    assert!(!text.contains("restart  "), "{text}");
    let left = workspace.path("left");
    let last = checkpoints(&left).iter().map(|name| name[11..].parse::<u64>().unwrap()).max().unwrap();
    assert!(
        text.contains(&format!("the same command with --resume goes on from checkpoint-{last}")),
        "{text}"
    );
    assert!(names(&left).iter().all(|name| !name.starts_with(".tmp-")), "{:?}", names(&left));
    // With more room the run resumes from the last checkpoint, and no row before it is missing.
    let end = format!("max_steps={}", last + 1);
    let output = workspace.launch(1, &["--resume", "--set", "output_dir=left", "--set", &end]);
    assert!(output.status.success(), "{}", dyad_tests::text(&output));
    assert!(!dyad_tests::text(&output).contains("lacks the row"), "{}", dyad_tests::text(&output));
    assert_eq!(workspace.rows("left/metrics.jsonl").len() as u64, last + 1);
}

#[test]
fn overwriting_keeps_the_users_files() {
    let workspace = workspace();
    let own = ["final-notes.txt", ".tmp-mydata/thesis", "checkpoint-best/model", "logs/my.txt", "tb/other"];
    for name in own {
        let path = workspace.path("whole").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "precious").unwrap();
    }
    workspace.train(1, "whole", &["--overwrite", "--set", "max_steps=2", "--set", "n_checkpoints=1"]);
    assert_eq!(workspace.rows("whole/metrics.jsonl").len(), 2);
    assert_eq!(checkpoints(&workspace.path("whole")), ["checkpoint-best"]);
    for name in own {
        assert_eq!(fs::read_to_string(workspace.path("whole").join(name)).unwrap(), "precious", "{name}");
    }
}

#[test]
fn a_resume_counts_lost_evaluation_rows() {
    let config = "n_checkpoints = 2\nmax_steps = 8\nn_evals = 4\nvalidation_file = \"pairs.jsonl\"\n";
    let workspace = Workspace::with_model(32, config);
    workspace.train(1, "whole", &[]);
    let rows = fs::read_to_string(workspace.path("whole/eval_metrics.jsonl")).unwrap();
    // Evaluations come before the first step and after steps 2, 4, 6 and 8; checkpoint-4 is written before the evaluation of step 4.
    assert_eq!(rows.lines().count(), 5);
    for (name, kept, lost) in
        [("none", "", 2), ("one", rows.lines().next().unwrap(), 1), ("all", rows.trim_end(), 0)]
    {
        let target = interrupted(&workspace, name);
        let kept = if kept.is_empty() { String::new() } else { format!("{kept}\n") };
        fs::write(workspace.path(name).join("eval_metrics.jsonl"), kept).unwrap();
        let output = workspace.launch(1, &["--resume", "--set", &target]);
        let said = text(&output);
        assert!(output.status.success(), "{said}");
        let line = format!("lacks {lost} row");
        assert_eq!(said.contains(&line), lost > 0, "{name}: {said}");
    }
}

/// A restart would continue without the removed rows.
#[test]
fn a_run_whose_metrics_are_removed_fails_without_a_restart() {
    let workspace = Workspace::with_model(16, "max_steps = 100000\nsave_steps = 2\n");
    let mut command = workspace.launcher(1, &["--max-restarts", "3"]);
    let mut launcher = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    wait_for("a checkpoint", || workspace.path("out/checkpoint-2").exists().then_some(()));
    fs::remove_file(workspace.path("out/metrics.jsonl")).unwrap();
    let (status, said) = outcome(&mut launcher);
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("metrics.jsonl was removed or moved while the run was writing it"), "{said}");
    assert!(!said.contains("restart  "), "{said}");
}

#[test]
fn a_replaced_output_folder_is_named_even_if_restarts_are_left() {
    let workspace = Workspace::with_model(16, "max_steps = 100000\nsave_steps = 2\n");
    let mut command = workspace.launcher(1, &["--max-restarts", "3"]);
    let mut launcher = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    wait_for("a checkpoint", || workspace.path("out/checkpoint-2").exists().then_some(()));
    fs::rename(workspace.path("out"), workspace.path("moved")).unwrap();
    fs::create_dir(workspace.path("out")).unwrap();
    let (status, said) = outcome(&mut launcher);
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("while the run was") && !said.contains("restart  "), "{said}");
    assert!(names(&workspace.path("out")).is_empty(), "{:?}", names(&workspace.path("out")));
}
