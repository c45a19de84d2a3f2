//! The Python wheel: built from this build's programs, installed into a new environment, and used there.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use dyad_tests::{root, text};

/// Builds the wheel into a folder and returns its path.
fn build(target: &Path) -> PathBuf {
    let output =
        Command::new("python3").arg(root().join("deploy/wheel/build.py")).arg(target).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    String::from_utf8(output.stdout).unwrap().trim().into()
}

/// A new virtual environment.
struct Environment {
    dir: PathBuf,
    packages: PathBuf,
}

impl Environment {
    fn new(dir: &Path) -> Self {
        let python = root().join(".venv/parity/bin/python");
        let output = Command::new(python).args(["-m", "venv", "--without-pip"]).arg(dir).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        Self { dir: dir.to_owned(), packages: packages(dir) }
    }

    /// Links torch and its dependencies into the environment.
    fn with_torch(self) -> Self {
        for entry in std::fs::read_dir(packages(&root().join(".venv/parity"))).unwrap() {
            let entry = entry.unwrap();
            symlink(entry.path(), self.packages.join(entry.file_name())).unwrap();
        }
        self
    }

    fn install(&self, wheel: &Path, args: &[&str]) -> Output {
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "--python"]).arg(self.dir.join("bin/python"));
        pip.args(["--disable-pip-version-check", "install", "--no-index", "--root-user-action", "ignore"]);
        pip.args(args).arg(wheel).output().unwrap()
    }

    /// Returns a command of the wheel that runs in `folder` with a minimal environment.
    fn command(&self, name: &str, folder: &Path) -> Command {
        let mut command = Command::new(self.dir.join("bin").join(name));
        command.current_dir(folder).env_clear().env("PATH", "/usr/bin:/bin").env("HOME", folder);
        command
    }
}

fn packages(environment: &Path) -> PathBuf {
    let lib = std::fs::read_dir(environment.join("lib")).unwrap().next().unwrap().unwrap().path();
    lib.join("site-packages")
}

#[test]
fn the_wheel_installs_beside_torch_and_trains() {
    let dir = tempfile::tempdir().unwrap();
    let wheel = build(&dir.path().join("dist"));
    let environment = Environment::new(&dir.path().join("venv")).with_torch();
    // pip finds that the wheel's requirements are met.
    let installed = environment.install(&wheel, &[]);
    assert!(installed.status.success(), "{}", text(&installed));

    let help = environment.command("dyad", dir.path()).arg("--help").output().unwrap();
    let said = text(&help);
    assert!(
        help.status.success() && said.contains("Usage: dyad ") && said.contains("\n  dyad quickstart"),
        "{said}"
    );
    assert!(!said.contains("  launcher --"), "{said}");

    let output = environment.command("dyad", dir.path()).arg("quickstart").output().unwrap();
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    for part in [
        "$ dyad --nodes 2",
        "$ dyad-trainer new-model",
        "held-out pairs",
        "reward accuracy",
        "quickstart-runs/dpo/final",
    ] {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
    assert!(dir.path().join("quickstart-runs/dpo/final/model.safetensors").is_file());

    let model = dir.path().join("quickstart-runs/dpo/final");
    let mut generate = environment.command("dyad-trainer", dir.path());
    let answer =
        generate.args(["generate", "--prompt", "What is 2 plus 3?", "--model"]).arg(model).output().unwrap();
    assert!(answer.status.success() && text(&answer).contains("\"completion\":"), "{}", text(&answer));

    let nothing = environment.command("dyad", dir.path()).args(["--config", "none.toml"]).output().unwrap();
    assert_eq!(nothing.status.code(), Some(2), "{}", text(&nothing));
    refuses_other_torches(&environment, &wheel, dir.path());
}

/// A missing torch or another version is refused, because its ABI differs. A torch in another folder is found.
fn refuses_other_torches(environment: &Environment, wheel: &Path, dir: &Path) {
    let bare = Environment::new(&dir.join("bare"));
    let refused = bare.install(wheel, &[]);
    assert!(!refused.status.success() && text(&refused).contains("torch"), "{}", text(&refused));
    assert!(bare.install(wheel, &["--no-deps"]).status.success());
    let output = bare.command("dyad-trainer", dir).arg("--version").output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("hint: pip install 'torch==2.11.*'"), "{}", text(&output));
    // An environment that sees the packages of another one, as with --system-site-packages.
    std::fs::write(bare.packages.join("others.pth"), format!("{}\n", environment.packages.display()))
        .unwrap();
    let output = bare.command("dyad-trainer", dir).arg("--version").output().unwrap();
    assert!(output.status.success() && text(&output).starts_with("dyad-trainer "), "{}", text(&output));
    // Metadata of another torch version.
    let other = bare.packages.join("torch-2.10.0.dist-info");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("METADATA"), "Metadata-Version: 2.1\nName: torch\nVersion: 2.10.0\n").unwrap();
    let output = bare.command("dyad", dir).arg("--version").output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("torch 2.10.0 is installed"), "{}", text(&output));
}
