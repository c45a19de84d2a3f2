#!/usr/bin/env python3
"""`launcher kubernetes` against a real API server with the real Job and JobSet controllers, and runs of real processes on a simulated
node.

    tests/kubernetes/tools/build.sh && tests/kubernetes/test_cluster.py [NAME ...]

Needs root, python3-yaml, openssl, Go's module cache (for the JobSet sources), the binaries in target/release, and the image's root
(deploy/image/test.sh). See node.py for the limits of the simulated node.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

import yaml

from cluster import Cluster, Refused
from node import Node

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy/kubernetes"
BIN = ROOT / "target/release"
TOOLS = pathlib.Path(os.environ.get("KUBERNETES_TOOLS", ROOT / ".tools/kubernetes/bin"))
IMAGE = pathlib.Path(os.environ.get("IMAGE_ROOT", ROOT / ".tools/image"))
JOBSET = "sigs.k8s.io/jobset@v0.12.0"
OVERLAYS = ("single-node", "multi-node", "kueue", "rdma", "cpu-test")
PLURALS = {"ConfigMap": "configmaps", "PersistentVolumeClaim": "persistentvolumeclaims", "Secret": "secrets",
           "Service": "services", "ServiceAccount": "serviceaccounts", "NetworkPolicy": "networkpolicies", "Job": "jobs",
           "JobSet": "jobsets", "Role": "roles", "RoleBinding": "rolebindings"}


def path_of(manifest: dict, namespace: str) -> str:
    version = manifest["apiVersion"]
    group = f"/apis/{version}" if "/" in version else f"/api/{version}"
    return f"{group}/namespaces/{namespace}/{PLURALS[manifest['kind']]}/{manifest['metadata']['name']}"


def refused(word: str, act) -> None:
    """Fails unless the API server refuses `act` with an error that contains `word`."""
    try:
        act()
    except Refused as answer:
        assert word in str(answer), answer
    else:
        raise AssertionError(f"{word} was accepted")


class Tests:
    def __init__(self, cluster: Cluster, folder: pathlib.Path):
        self.cluster, self.folder = cluster, folder
        cluster.namespace("training", "restricted")
        cluster.namespace("rdma", "privileged")
        for file in ("role", "rolebinding"):
            manifest = yaml.safe_load((DEPLOY / f"rbac/{file}.yaml").read_text())
            cluster.apply(path_of(manifest, "training"), manifest)

    def kubernetes(self, command: str, *args: str, user="alice", status=0, **kwargs) -> str:
        words = [BIN / "launcher", "kubernetes", command, *args, "--kubeconfig", self.cluster.kubeconfig(user)]
        if command == "render":
            words = words[:-2]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, **kwargs)
        text = done.stdout + done.stderr
        assert done.returncode == status, f"{command} {args}: status {done.returncode}\n{text}"
        return text

    # ------------------------------------------------------------------ objects

    def test_kustomize_builds_what_the_launcher_renders(self):
        for overlay in OVERLAYS:
            built = self.build(overlay)
            arguments = self.overlay_arguments(overlay)
            rendered = list(yaml.safe_load_all(self.kubernetes("render", *arguments).split("warning:")[0]))
            key = lambda manifest: (manifest["kind"], manifest["metadata"]["name"])
            assert sorted(built, key=key) == sorted(rendered, key=key), overlay

    def test_overlays_pass_strict_validation_and_pod_security(self):
        for overlay in OVERLAYS:
            namespace = "rdma" if overlay == "rdma" else "training"
            for manifest in self.build(overlay):
                self.cluster.apply(path_of(manifest, namespace), manifest, dry=True)
            for pod in self.pods_of(self.build(overlay)):
                self.admit(pod, namespace)

    def test_rdma_is_refused_where_restricted_is_enforced(self):
        pods = self.pods_of(self.build("rdma"))
        self.admit(pods[0], "training")
        refused("IPC_LOCK", lambda: self.admit(pods[1], "training"))

    def test_an_unknown_field_is_refused(self):
        manifest = next(manifest for manifest in self.build("multi-node") if manifest["kind"] == "JobSet")
        manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["restartPolice"] = "Never"
        refused("restartPolice", lambda: self.cluster.apply(path_of(manifest, "training"), manifest, dry=True))

    # ------------------------------------------------------------------ commands

    def test_a_dry_run_keeps_nothing_and_a_user_without_rights_is_told(self):
        run = ["--nodes", "2", "--gpus-per-node", "8", "--image", "dyad:1", "--data", "claim:data", "--config", str(DEPLOY / "run.toml"), "--name", "dry"]
        for workload in ("jobset", "job"):
            text = self.kubernetes("apply", *run, "--workload", workload, "--dry-run", "server")
            assert "checked (nothing is kept)  ServiceAccount dry" in text, text
        assert "no run dry in namespace training" in self.kubernetes("status", "--name", "dry", status=2)
        text = self.kubernetes("apply", *run, user="mallory", status=2)
        assert "forbidden" in text and "deploy/kubernetes/rbac" in text, text
        text = self.kubernetes("apply", *run, "-n", "rdma", status=2)
        assert "forbidden" in text, text

    def test_apply_twice_keeps_the_secrets_and_refuses_another_run(self):
        run = ["--nodes", "1", "--gpus-per-node", "8", "--image", "dyad:1", "--data", "claim:data", "--config", str(DEPLOY / "run.toml"), "--name", "twice",
               "--queue", "training"]
        self.kubernetes("apply", *run)
        secret = lambda: self.cluster.get("/api/v1/namespaces/training/secrets/twice-trainer-tls")["data"]
        before = secret()
        self.kubernetes("apply", *run)
        assert secret() == before
        text = self.kubernetes("apply", *[word if word != "1" else "2" for word in run], status=2)
        assert "choose another --name" in text, text
        text = self.kubernetes("delete", "--name", "twice", status=2, stdin=subprocess.DEVNULL)
        assert "PersistentVolumeClaim twice-output  (checkpoints" in text and "add --yes" in text, text
        text = self.kubernetes("delete", "--name", "twice", "--yes", "--keep-checkpoints")
        assert "PersistentVolumeClaim" not in text and "deleted  JobSet twice" in text, text
        claims = [claim["metadata"]["name"] for claim in self.cluster.get("/api/v1/namespaces/training/persistentvolumeclaims")["items"]]
        assert "twice-output" in claims
        self.kubernetes("delete", "--name", "twice", "--yes")
        # Objects that are already being deleted are not deleted again.
        assert "no run twice" in self.kubernetes("delete", "--name", "twice", "--yes", status=2)

    def test_a_server_that_is_not_there_is_named(self):
        text = subprocess.run([BIN / "launcher", "kubernetes", "status", "--kubeconfig", "/nonexistent"], capture_output=True, text=True)
        assert text.returncode == 2 and "cannot read the kubeconfig" in text.stderr, text.stderr

    # ------------------------------------------------------------------ whole runs

    def test_a_jobset_trains_to_its_end(self):
        self.whole_run("jobset")

    def test_plain_jobs_train_to_their_end(self):
        self.whole_run("job")

    def whole_run(self, workload: str):
        name = f"whole-{workload}"
        self.apply_run(name, workload, "max_steps=6")
        text = self.kubernetes("wait", "--name", name, "--timeout", "240")
        assert "step 6/6  loss" in text and f"run {name} is complete" in text, text
        text = self.kubernetes("status", "--name", name)
        assert "complete" in text and "ended: done" in text and "progress  complete" in text, text
        logs = self.kubernetes("logs", "--name", name)
        assert "[coordinator] " in logs and "[node 1] [rank 1] " in logs and '{"body"' not in logs, logs
        output = self.output(name)
        assert (output / "final/model.safetensors").is_file() and (output / "logs/node1-cpu.log").is_file()
        self.kubernetes("delete", "--name", name, "--yes")

    def test_a_killed_trainer_restarts_the_set_from_its_checkpoint(self):
        self.restarted_run("jobset")

    def test_a_killed_trainer_is_replaced_with_plain_jobs(self):
        self.restarted_run("job")

    def restarted_run(self, workload: str):
        name = f"again-{workload}"
        self.apply_run(name, workload, "max_steps=40", "n_checkpoints=20", "batch_size=2")
        output = self.output(name)
        self.cluster.wait("a checkpoint", lambda: list(output.glob("checkpoint-*/dyad_state.json")))
        self.kill_trainer(name)
        text = self.kubernetes("wait", "--name", name, "--timeout", "280")
        assert "resumed after step" in text and f"run {name} is complete" in text, text
        rows = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
        assert rows == list(range(1, 41)), rows
        self.kubernetes("delete", "--name", name, "--yes")

    def test_invalid_input_fails_the_run_without_a_restart(self):
        for workload in ("jobset", "job"):
            name = f"invalid-{workload}"
            self.apply_run(name, workload, "training_file=/opt/dyad/example/none.jsonl")
            text = self.kubernetes("wait", "--name", name, "--timeout", "120", status=2)
            assert "error: coordinator: " in text and "none.jsonl" in text and "hint: " in text, text
            pods = self.cluster.get("/api/v1/namespaces/training/pods")["items"]
            coordinators = [pod for pod in pods if pod["metadata"]["name"].startswith(f"{name}-coordinator")]
            assert len(coordinators) <= 1, [pod["metadata"]["name"] for pod in coordinators]
            self.kubernetes("delete", "--name", name, "--yes")

    # ------------------------------------------------------------------ helpers

    def apply_run(self, name: str, workload: str, *settings: str):
        sets = [word for setting in settings for word in ("--set", setting)]
        self.cluster.wait("the last run's port", port_is_free)
        text = self.kubernetes("apply", "--name", name, "--nodes", "2", "--gpus-per-node", "0", "--image", "dyad:cpu", "--workload", workload,
                               "--output", "new:1Gi", "--shm-size", "64Mi", "--scratch-size", "64Mi", "--tls", "generate", "--grace-period", "20",
                               "--config", str(DEPLOY / "run-cpu-test.toml"), *sets)
        assert "launcher kubernetes wait" in text, text

    def output(self, name: str) -> pathlib.Path:
        return self.cluster.folder / f"claims/training/{name}-output/run"

    def kill_trainer(self, name: str):
        """Sends SIGKILL to one trainer process of the run."""
        for entry in pathlib.Path("/proc").iterdir():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except (OSError, ValueError):
                continue
            if words[0].endswith(b"trainer") and f"{name}-coordinator".encode() in b" ".join(words) and b"node1-cpu" in words:
                os.kill(int(entry.name), signal.SIGKILL)
                return
        raise AssertionError("no trainer to kill")

    def build(self, overlay: str) -> list:
        text = subprocess.run([TOOLS / "kustomize", "build", DEPLOY / "overlays" / overlay], check=True, capture_output=True, text=True).stdout
        return list(yaml.safe_load_all(text))

    def overlay_arguments(self, overlay: str) -> list:
        """Reads the arguments from the Rust test that writes the overlays, so that there is one list."""
        import re

        source = (ROOT / "launcher/tests/kubernetes/overlays.rs").read_text()
        found = re.search(rf'\(\s*"{overlay}",\s*"([^"]*)"', source)
        assert found, f"no overlay {overlay} in launcher/tests/kubernetes/overlays.rs"
        config = "run-cpu-test.toml" if overlay == "cpu-test" else "run.toml"
        return f"--image dyad --name dyad {found[1]} --config {DEPLOY / config}".split()

    def pods_of(self, manifests: list) -> list:
        templates = []
        for manifest in manifests:
            if manifest["kind"] == "JobSet":
                templates += [job["template"]["spec"]["template"] for job in manifest["spec"]["replicatedJobs"]]
            if manifest["kind"] == "Job":
                templates.append(manifest["spec"]["template"])
        return templates

    def admit(self, template: dict, namespace: str):
        """Creates a pod of the template (dry run), as a controller would; raises if admission refuses it."""
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "dyad"}}
        self.cluster.apply(f"/api/v1/namespaces/{namespace}/serviceaccounts/dyad", account)
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"generateName": "try-", **template["metadata"]}, "spec": template["spec"]}
        self.cluster.post(f"/api/v1/namespaces/{namespace}/pods?dryRun=All&fieldValidation=Strict", pod)


def port_is_free() -> bool:
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("0.0.0.0", 29400))
    return True


def main() -> int:
    if os.geteuid() != 0:
        print("error: mounts need root\n\nhint: run as root", file=sys.stderr)
        return 2
    # SIGTERM raises KeyboardInterrupt, so that the control plane is stopped too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    module = subprocess.run(["go", "mod", "download", "-json", JOBSET], check=True, capture_output=True, cwd="/")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="dyad-kubernetes-"))
    folder.chmod(0o755)
    cluster = Cluster(TOOLS, folder)
    failed, node = [], None
    try:
        cluster.start()
        cluster.start_jobset(pathlib.Path(json.loads(module.stdout)["Dir"]))
        tests = Tests(cluster, folder)
        node = Node(cluster, IMAGE)
        node.start()
        for name in [name for name in dir(tests) if name.startswith("test_")]:
            if sys.argv[1:] and not any(word in name for word in sys.argv[1:]):
                continue
            began = time.monotonic()
            try:
                getattr(tests, name)()
                print(f"ok      {name} ({time.monotonic() - began:.1f} s)", flush=True)
            except Exception:
                failed.append(name)
                print(f"FAILED  {name}\n{traceback.format_exc()}", flush=True)
    finally:
        if node:
            node.stop()
        cluster.stop()
        if failed or "KEEP" in os.environ:
            print(f"logs: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
