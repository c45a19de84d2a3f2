"""The commands of the wheel. Each replaces itself by one of Dyad's programs, which use the libtorch of the installed torch."""

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
NEEDED = "2.11"


def launcher():
    become("launcher", "dyad")


def coordinator():
    become("coordinator", "dyad-coordinator")


def trainer():
    become("trainer", "dyad-trainer")


def become(program, command):
    """Replaces this process by the program."""
    environment = dict(os.environ)
    # Makes messages and help use the wheel's command names.
    environment["DYAD_INSTALLED_BY_PIP"] = "1"
    libraries = torch_libraries()
    # The programs look for libtorch in their own site-packages folder.
    if libraries.resolve() != (PACKAGE.parent / "torch" / "lib").resolve():
        others = environment.get("LD_LIBRARY_PATH")
        environment["LD_LIBRARY_PATH"] = f"{libraries}:{others}" if others else str(libraries)
    path = PACKAGE / "bin" / program
    try:
        os.execve(path, [command, *sys.argv[1:]], environment)
    except OSError as error:
        fail(f"cannot start {path}: {error.strerror}", "install it anew: pip install --force-reinstall --no-deps dyad")


def torch_libraries():
    """The folder of libtorch. Does not import torch, which would take seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        fail("torch is not installed for this Python", f"pip install 'torch=={NEEDED}.*'")
    version = importlib.metadata.version("torch")
    if version.split(".")[:2] != NEEDED.split("."):
        fail(
            f"torch {version} is installed; Dyad's programs were built against torch {NEEDED}",
            f"pip install 'torch=={NEEDED}.*'",
        )
    libraries = Path(spec.origin).parent / "lib"
    if not (libraries / "libtorch_cpu.so").is_file():
        fail(f"{libraries} holds no libtorch_cpu.so", f"pip install --force-reinstall 'torch=={NEEDED}.*'")
    return libraries


def fail(message, hint):
    """Prints an error and a hint, and exits with status 2, like Dyad's programs on invalid input."""
    print(f"error: {message}\n\nhint: {hint}", file=sys.stderr)
    sys.exit(2)
