//! The lock of an output folder, and what `--overwrite` removes.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use dyad_tests::processes::{Watch, children, interrupt, kill_9, outcome};
use dyad_tests::{Workspace, binary, text};

fn long_run(workspace: &Workspace) -> Child {
    let mut command = workspace.launcher(1, &["--set", "max_steps=100000"]);
    let launcher = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    workspace.wait_for_a_step();
    launcher
}

fn coordinator(workspace: &Workspace) -> Command {
    let mut command = Command::new(binary("coordinator"));
    command.current_dir(workspace.path(".")).args(["--config", "run.toml", "--world-size", "1", "--resume"]);
    command
}

/// Whether the second run is new, resumed, overwriting or started by hand: the first run goes on, and its records are unchanged.
#[test]
fn a_second_run_in_one_folder_is_refused_and_names_the_first() {
    let workspace = Workspace::with_model(16, "");
    let mut first = long_run(&workspace);
    let (config, log) =
        (std::fs::read(workspace.path("out/run.json")).ok(), workspace.path("out/logs/coordinator.log"));
    let began = |text: &str| text.lines().next().unwrap_or_default().to_owned();
    let first_line = began(&std::fs::read_to_string(&log).unwrap());
    let owner = format!("(pid {} on host ", first.id());
    for args in [&["--set", "max_steps=1"][..], &["--resume"], &["--overwrite"], &["--auto-resume"]] {
        let output = workspace.launch(1, args);
        let said = text(&output);
        assert_eq!(output.status.code(), Some(3), "{args:?}: {said}");
        assert!(said.contains("is in use by run run-") && said.contains(&owner), "{args:?}: {said}");
    }
    let output = coordinator(&workspace).output().unwrap();
    assert!(output.status.code() == Some(3) && text(&output).contains(&owner), "{}", text(&output));
    assert_eq!(std::fs::read(workspace.path("out/run.json")).ok(), config);
    assert_eq!(began(&std::fs::read_to_string(&log).unwrap()), first_line);
    interrupt(first.id() as i32);
    let (status, error) = outcome(&mut first);
    assert_eq!(status, Some(130), "{error}");
    // The folder is free again.
    let output = workspace.launch(1, &["--overwrite", "--set", "max_steps=1"]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(!workspace.path("out/.dyad-lock").exists());
}

#[test]
fn of_two_runs_that_start_together_one_is_refused() {
    let workspace = Workspace::with_model(16, "max_steps = 40\n");
    let start = || {
        let mut command = workspace.launcher(1, &[]);
        command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
    };
    let mut both = [start(), start()];
    let mut ends: Vec<(Option<i32>, String)> = both.iter_mut().map(outcome).collect();
    ends.sort();
    assert_eq!(ends[0].0, Some(0), "{ends:?}");
    // If the second run starts late enough, it finds a complete run.
    let refused = ends[1].1.contains("is in use by ") || ends[1].1.contains("already holds a run");
    assert!(refused && matches!(ends[1].0, Some(2 | 3)), "{ends:?}");
    let steps: Vec<u64> =
        workspace.rows("out/metrics.jsonl").iter().filter_map(|row| row["step"].as_u64()).collect();
    assert_eq!(steps, (1..=40).collect::<Vec<_>>());
}

#[test]
fn a_killed_run_leaves_no_lock() {
    let workspace = Workspace::with_model(16, "");
    let mut first = long_run(&workspace);
    let watches: Vec<Watch> = children(&first).iter().map(Watch::on).collect();
    kill_9(first.id() as i32);
    watches.iter().for_each(Watch::wait_gone);
    outcome(&mut first);
    let output = workspace.launch(1, &["--overwrite", "--set", "max_steps=1"]);
    assert!(output.status.success(), "{}", text(&output));
}

/// Returns all files that a run leaves, with their bytes; without `run*` and `logs/`.
fn left(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut ahead = vec![dir.to_owned()];
    while let Some(folder) = ahead.pop() {
        for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            let name = path.strip_prefix(dir).unwrap().display().to_string();
            if path.is_dir() && !name.starts_with("logs") {
                ahead.push(path);
            } else if path.is_file() && !name.starts_with("run") && !name.starts_with("logs") {
                all.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    all
}

#[test]
fn an_overwriting_run_that_fails_before_its_first_row_removes_nothing() {
    let workspace = Workspace::with_model(16, "max_steps = 4\nn_checkpoints = 2\n");
    workspace.train(1, "out", &[]);
    let before = left(&workspace.path("out"));
    assert!(before.contains_key("final/model.safetensors"), "{:?}", before.keys());
    let spoil = |name: &str, change: &dyn Fn(&Path)| {
        let copied =
            Command::new("cp").arg("-r").args([workspace.path("model"), workspace.path(name)]).status();
        assert!(copied.unwrap().success());
        change(&workspace.path(name));
    };
    spoil("no-weights", &|dir| std::fs::remove_file(dir.join("model.safetensors")).unwrap());
    spoil("another", &|dir| {
        let config =
            std::fs::read_to_string(dir.join("config.json")).unwrap().replace("\"llama\"", "\"mistral\"");
        std::fs::write(dir.join("config.json"), config).unwrap();
    });
    for set in ["model=no-weights", "model=another", "max_seq_length=3"] {
        let output = workspace.launch(1, &["--overwrite", "--set", set]);
        assert!(!output.status.success(), "{set}");
        assert!(left(&workspace.path("out")) == before, "{set}: {:?}", left(&workspace.path("out")).keys());
    }
    let output = workspace.launch(1, &["--overwrite", "--set", "max_steps=1"]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(!workspace.path("out/checkpoint-2").exists());
}

#[test]
fn an_overwriting_run_cannot_start_from_files_it_would_remove() {
    let workspace = Workspace::with_model(16, "max_steps = 2\n");
    workspace.train(1, "out", &[]);
    let before = left(&workspace.path("out"));
    std::os::unix::fs::symlink("out/final", workspace.path("link")).unwrap();
    for set in
        ["from_checkpoint=out/final", "model=out/final", "model=model/../out/./final", "from_checkpoint=link"]
    {
        let output = workspace.launch(1, &["--overwrite", "--set", set]);
        let said = text(&output);
        assert_eq!(output.status.code(), Some(2), "{set}: {said}");
        assert!(said.contains("lies in final of output_dir"), "{set}: {said}");
    }
    for set in ["output_dir=model", "output_dir=model/out"] {
        let output = workspace.launch(1, &["--set", set]);
        assert!(
            output.status.code() == Some(2) && text(&output).contains("the folder of model"),
            "{}",
            text(&output)
        );
    }
    assert!(left(&workspace.path("out")) == before && !workspace.path("model/run.json").exists());
}
