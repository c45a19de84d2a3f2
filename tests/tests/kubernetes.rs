//! Command lines of rendered pods, compared with the programs' own flags.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::process::Command;

use dyad_tests::{Workspace, binary, text};

fn render(extra: &[&str]) -> String {
    let workspace = Workspace::empty();
    workspace.write(
        "run.toml",
        "model = \"org/model\"\ntraining_file = \"pairs.jsonl\"\noutput_dir = \"run\"\nzero_stage = 2\n",
    );
    let mut command = Command::new(binary("launcher"));
    command.current_dir(workspace.path("")).args([
        "kubernetes",
        "render",
        "--nodes",
        "2",
        "--gpus-per-node",
        "8",
    ]);
    command.args(["--image", "dyad:1", "--data", "claim:data", "--config", "run.toml"]).args(extra);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    String::from_utf8(output.stdout).unwrap()
}

fn help(program: &str, args: &[&str]) -> String {
    let output = Command::new(binary(program)).args(args).arg("--help").output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_programs_know_every_flag_that_pods_give_them() {
    let (coordinator, node) = (help("coordinator", &[]), help("launcher", &["node"]));
    for extra in [&["--tls", "off"][..], &["--workload", "job"][..]] {
        let yaml = render(extra);
        let mut program = "";
        let mut flags = 0;
        for line in yaml.lines().map(str::trim) {
            match line {
                "- coordinator" => program = &coordinator,
                "- node" => program = &node,
                _ => {}
            }
            let Some(flag) = line.strip_prefix("- --").and_then(|word| word.split('=').next()) else {
                continue;
            };
            let flag = format!("--{flag}");
            flags += 1;
            assert!(
                program.contains(&format!("{flag} ")) || program.contains(&format!("{flag}\n")),
                "{flag}"
            );
        }
        assert!(flags >= 13, "{flags} flags in {yaml}");
    }
}

#[test]
fn a_folder_of_manifests_has_a_kustomization_that_lists_them() {
    let folder = Workspace::empty();
    render(&["--tls", "off", "--output-dir", folder.path("out").to_str().unwrap()]);
    let list = std::fs::read_to_string(folder.path("out/kustomization.yaml")).unwrap();
    for file in [
        "jobset.yaml",
        "service-coordinator.yaml",
        "networkpolicy-default-deny.yaml",
        "configmap-config.yaml",
    ] {
        assert!(list.contains(file) && folder.path(&format!("out/{file}")).is_file(), "{file}: {list}");
    }
}
