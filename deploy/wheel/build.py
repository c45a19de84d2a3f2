#!/usr/bin/env python3
"""Builds the Python wheel from the programs of `make build`.

    deploy/wheel/build.py [FOLDER]     writes the wheel to FOLDER [default: target/wheel]

The programs are stripped and checked: they must need no newer C and C++ libraries than the oldest supported system has (RHEL 9: glibc
2.34, GCC 11), must look for libtorch in `$ORIGIN/../../torch/lib`, and must contain no path of the build machine. Panic messages
contain such paths; they are replaced by text of the same length.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PROGRAMS = ["launcher", "coordinator", "trainer"]
# RHEL 9 is the oldest supported system; Ubuntu 22.04 has glibc 2.35 and GCC 12, Debian 12 has glibc 2.36 and GCC 12.
OLDEST = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (11, 0, 0)}
PLATFORM = "manylinux_2_34_x86_64"
RUN_PATH = "$ORIGIN/../../torch/lib"


def main():
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "target/wheel").resolve()
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "wheel"
        shutil.copytree(HERE, project, ignore=shutil.ignore_patterns("build.py", "__pycache__"))
        for name in ["README.md", "LICENSE"]:
            shutil.copy(ROOT / name, project)
        (project / "version.txt").write_text(version() + "\n")
        (project / "dyad/bin").mkdir()
        for name in PROGRAMS:
            place(ROOT / "target/release" / name, project / "dyad/bin" / name)
        environment = {**os.environ, "DYAD_WHEEL_PLATFORM": PLATFORM}
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
        run([*pip, "--wheel-dir", str(target), str(project)], env=environment)
    print(target / f"dyad-{version()}-py3-none-{PLATFORM}.whl")


def version():
    """Version of the workspace."""
    text = (ROOT / "Cargo.toml").read_text()
    return re.search(r'(?ms)^\[workspace\.package\].*?^version = "([^"]+)"', text)[1]


def place(source, target):
    """Writes a program as the wheel ships it: stripped, without paths of this machine, and checked."""
    if not source.is_file():
        fail(f"no program {source}", "run `make build` first; `make wheel` does")
    run(["strip", "--strip-all", "-o", str(target), str(source)])
    data = target.read_bytes()
    for path, name in build_paths():
        data = data.replace(path, name)
    left = sorted(path.decode() for path in traces() if path in data)
    if left:
        fail(f"{source.name} still holds paths of this machine: {', '.join(left)}", "add them to build_paths()")
    target.write_bytes(data)
    target.chmod(0o755)
    old_enough(target)
    if source.name == "trainer" and RUN_PATH not in run_path(target):
        fail(f"the trainer does not look for libtorch in {RUN_PATH}", "see trainer/torch/build/main.rs")


def build_paths():
    """Folders of the build, each with a replacement text of the same length."""
    cargo = Path(os.environ.get("CARGO_HOME", Path.home() / ".cargo"))
    registries = sorted((cargo / "registry/src").glob("*"))
    folders = [(folder, "registry") for folder in registries] + [(ROOT, "dyad"), (cargo, "cargo")]
    for folder, name in folders:
        for path in {bytes(folder), bytes(folder.resolve())}:
            # Cut the name to the length of the path, or pad it with slashes.
            yield path, name.encode()[: len(path)].ljust(len(path), b"/")


def traces():
    """Paths that a program must not contain."""
    home = Path.home()
    folders = [ROOT, home / ".cargo", home / ".rustup", Path(os.environ.get("CARGO_HOME", home / ".cargo"))]
    return {bytes(folder) for folder in folders} | {bytes(folder.resolve()) for folder in folders}


def old_enough(program):
    """Fails if a program needs newer system libraries than the oldest supported system has."""
    needed = run(["readelf", "--version-info", "--wide", str(program)])
    for library, *numbers in re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI|GCC)_(\d+)\.(\d+)(?:\.(\d+))?", needed):
        wanted = tuple(int(number) for number in numbers if number)
        if wanted > OLDEST[library]:
            oldest = ".".join(map(str, OLDEST[library]))
            fail(
                f"{program.name} needs {library}_{'.'.join(map(str, wanted))}; the oldest system that is served has {oldest}",
                "build on an older system, such as Debian 12",
            )


def run_path(program):
    dynamic = run(["readelf", "--dynamic", "--wide", str(program)])
    return re.search(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", dynamic)[1].split(":")


def run(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        fail(f"{' '.join(command)} failed: {done.stderr.strip()}", "strip and readelf come with binutils, pip with python3-pip")
    return done.stdout


def fail(message, hint):
    print(f"error: {message}\n\nhint: {hint}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
