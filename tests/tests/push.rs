//! `--push` to a host that is simulated by a folder.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

use dyad_tests::{Workspace, binary, text};

/// Stands in for ssh: runs the command line with another home folder, and logs it.
const SSH: &str = "#!/bin/sh\nfor line; do :; done\necho \"$line\" >> \"$LINES_SEEN\"\nHOME=$FAR_HOME exec sh -c \"$line\"\n";

fn executable(workspace: &Workspace, name: &str, text: &str) {
    workspace.write(name, text);
    std::fs::set_permissions(workspace.path(name), std::fs::Permissions::from_mode(0o755)).unwrap();
}

fn doctor(workspace: &Workspace) -> Output {
    let mut command = Command::new(workspace.path("here/target/release/launcher"));
    command.args(["doctor", "--hosts", "far", "--push", "--ssh"]).arg(workspace.path("ssh"));
    command.env("FAR_HOME", workspace.path("far")).env("LINES_SEEN", workspace.path("lines"));
    command.output().unwrap()
}

#[test]
fn binaries_and_libtorch_are_copied_once_and_the_agent_starts_from_the_copy() {
    let workspace = Workspace::empty();
    for dir in [
        "here/target/release",
        "here/.libtorch/torch/lib",
        "here/.libtorch/torch/include",
        "here/.libtorch/nvidia",
        "far",
    ] {
        std::fs::create_dir_all(workspace.path(dir)).unwrap();
    }
    std::fs::copy(binary("launcher"), workspace.path("here/target/release/launcher")).unwrap();
    executable(&workspace, "here/target/release/coordinator", "#!/bin/sh\n");
    executable(&workspace, "here/target/release/trainer", "#!/bin/sh\n");
    workspace.write("here/.libtorch/.installed-cpu", "0123456789ab");
    workspace.write("here/.libtorch/torch/lib/libtorch_cpu.so", "a library");
    workspace.write("here/.libtorch/torch/include/torch.h", "a header");
    executable(&workspace, "ssh", SSH);

    let output = doctor(&workspace);
    assert!(output.status.success(), "{}", text(&output));
    let cache = workspace.path("far/.cache/dyad");
    let mut names: Vec<String> = std::fs::read_dir(&cache)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let [programs, libtorch] = &names[..] else { panic!("{names:?}") };
    assert!(libtorch.starts_with("libtorch-"), "{names:?}");
    // The trainer's RPATH leads there.
    let library = cache.join(programs).join("target/release/../../.libtorch/torch/lib/libtorch_cpu.so");
    assert_eq!(std::fs::read_to_string(library).unwrap(), "a library");
    assert!(!cache.join(libtorch).join("torch/include").exists(), "headers are of no use there");
    let agent = format!("exec '{}' agent", cache.join(programs).join("target/release/launcher").display());
    let seen = || std::fs::read_to_string(workspace.path("lines")).unwrap();
    assert!(seen().lines().any(|line| line.starts_with(&agent)), "{}", seen());

    let copies = |lines: &str| lines.matches("tar -xf").count();
    assert_eq!(copies(&seen()), 2);
    assert!(doctor(&workspace).status.success());
    assert_eq!(copies(&seen()), 2, "what is there is not sent again");
    // Another build gets another folder; libtorch is not copied again.
    executable(&workspace, "here/target/release/trainer", "#!/bin/sh\nexit 0\n");
    assert!(doctor(&workspace).status.success());
    assert_eq!((copies(&seen()), std::fs::read_dir(&cache).unwrap().count()), (3, 3));
}

#[test]
fn a_host_without_room_says_so() {
    let workspace = Workspace::empty();
    executable(&workspace, "ssh", "#!/bin/sh\necho 'No space left on device' >&2\nexit 1\n");
    let output = Command::new(binary("launcher"))
        .args(["doctor", "--hosts", "far", "--push", "--ssh"])
        .arg(workspace.path("ssh"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    assert!(
        text(&output).contains("host far: cannot copy Dyad there: No space left on device"),
        "{}",
        text(&output)
    );
}
