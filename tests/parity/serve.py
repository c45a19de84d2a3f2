"""Runs the scripts of this folder for tests, each in a process of its own that has the libraries already.

    serve.py SOCKET        listens at a Unix socket until standard input ends

A request is one line of JSON: {"script", "args", "cwd"}. The answer is one line: {"status", "stdout", "stderr"}. Importing TRL takes
longer than most scripts; a forked process inherits the import.
"""

from __future__ import annotations

import json
import os
import runpy
import socketserver
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests run side by side: threads of several processes would wait for each other in turn.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401
from trl import DPOTrainer, KTOTrainer, SFTTrainer  # noqa: F401
from trl.experimental.cpo import CPOTrainer  # noqa: F401
from trl.experimental.orpo import ORPOTrainer  # noqa: F401

FOLDER = Path(__file__).parent


def run(request: dict[str, Any]) -> int:
    """Runs a script as the main program; returns its exit status."""
    os.chdir(request["cwd"])
    sys.argv = [str(FOLDER / request["script"]), *request["args"]]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


class Handler(socketserver.StreamRequestHandler):
    """One request, in a forked process."""

    def handle(self) -> None:
        """Runs the script with its output in files, then answers."""
        request = json.loads(self.rfile.readline())
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            status = run(request)
            sys.stdout.flush()
            sys.stderr.flush()
            said = []
            for file in (out, err):
                file.seek(0)
                said.append(file.read().decode(errors="replace"))
        answer = {"status": status, "stdout": said[0], "stderr": said[1]}
        self.wfile.write(json.dumps(answer).encode() + b"\n")


class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    """A process for each request."""

    max_children = 64


def main() -> None:
    """Serves until the test program ends."""
    with Server(sys.argv[1], Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print("ready", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
