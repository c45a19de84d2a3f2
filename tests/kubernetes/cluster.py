"""A Kubernetes control plane on this machine: etcd, kube-apiserver, kube-controller-manager and the JobSet controller."""

import base64
import json
import os
import pathlib
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request

TOKENS = {"admin": "system:masters", "alice": "training", "mallory": "others"}


class Refused(Exception):
    """An error answer of the API server."""

    def __init__(self, code: int, text: str):
        super().__init__(f"{code}: {text}")
        self.code = code


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    def __init__(self, tools: pathlib.Path, folder: pathlib.Path):
        self.tools, self.folder, self.processes = tools, folder, []
        self.port = free_port()
        self.kubelet_port = free_port()
        self.context = ssl._create_unverified_context()
        self._certificate("service-account", "service-account")
        self._certificate("server", "127.0.0.1")
        for user in TOKENS:
            self._kubeconfig(user)

    def start(self) -> None:
        etcd, peer = free_port(), free_port()
        self._run("etcd", "--data-dir", self.folder / "etcd", "--unsafe-no-fsync",
                  "--listen-client-urls", f"http://127.0.0.1:{etcd}", "--advertise-client-urls", f"http://127.0.0.1:{etcd}",
                  "--listen-peer-urls", f"http://127.0.0.1:{peer}", "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
                  "--initial-cluster", f"default=http://127.0.0.1:{peer}")
        tokens = self.folder / "tokens.csv"
        tokens.write_text("".join(f'{user}-token,{user},{user},"{group}"\n' for user, group in TOKENS.items()))
        key = self.folder / "service-account.key"
        self._run("kube-apiserver", f"--etcd-servers=http://127.0.0.1:{etcd}", f"--secure-port={self.port}",
                  "--bind-address=127.0.0.1", f"--cert-dir={self.folder}/apiserver", "--authorization-mode=RBAC",
                  f"--token-auth-file={tokens}", "--service-account-issuer=https://dyad.test",
                  f"--service-account-key-file={self.folder}/service-account.crt", f"--service-account-signing-key-file={key}",
                  "--service-cluster-ip-range=10.96.0.0/16", "--allow-privileged=true")
        self.wait("the API server", lambda: self.get("/readyz", raw=True) == "ok")
        self._run("kube-controller-manager", f"--kubeconfig={self.kubeconfig('admin')}", "--leader-elect=false",
                  f"--secure-port={free_port()}", f"--cert-dir={self.folder}/manager",
                  f"--service-account-private-key-file={key}",
                  "--controllers=job-controller,garbage-collector-controller,serviceaccount-controller,namespace-controller,"
                  "persistentvolumeclaim-protection-controller")

    def start_jobset(self, sources: pathlib.Path) -> None:
        """Starts the JobSet controller with its webhooks, which the API server calls at this machine's address."""
        import yaml

        certificates = self.folder / "k8s-webhook-server/serving-certs"
        certificates.mkdir(parents=True)
        (certificates / "tls.crt").write_bytes((self.folder / "server.crt").read_bytes())
        (certificates / "tls.key").write_bytes((self.folder / "server.key").read_bytes())
        port = free_port()
        config = self.folder / "jobset.yaml"
        config.write_text(json.dumps({
            "apiVersion": "config.jobset.x-k8s.io/v1alpha1", "kind": "Configuration",
            "leaderElection": {"leaderElect": False}, "internalCertManagement": {"enable": False},
            "webhook": {"port": port}, "metrics": {"bindAddress": "0"}, "health": {"healthProbeBindAddress": "0"}}))
        crd = yaml.safe_load((sources / "config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml").read_text())
        self.post("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", crd)
        jobsets = "/apis/jobset.x-k8s.io/v1alpha2/jobsets"
        self.wait("the JobSet kind", lambda: self.get(jobsets))
        self._run("jobset", f"--config={config}", "--metrics-bind-address=0", "--health-probe-bind-address=0",
                  env={"KUBECONFIG": str(self.kubeconfig("admin")), "TMPDIR": str(self.folder)})
        bundle = base64.b64encode((self.folder / "server.crt").read_bytes()).decode()
        for hooks in yaml.safe_load_all((sources / "config/components/webhook/manifests.yaml").read_text()):
            for hook in hooks["webhooks"]:
                path = hook["clientConfig"]["service"]["path"]
                hook["clientConfig"] = {"url": f"https://127.0.0.1:{port}{path}", "caBundle": bundle}
            kind = {"MutatingWebhookConfiguration": "mutatingwebhookconfigurations"}.get(hooks["kind"], "validatingwebhookconfigurations")
            self.post(f"/apis/admissionregistration.k8s.io/v1/{kind}", hooks)
        self.wait("the JobSet webhooks", lambda: socket.create_connection(("127.0.0.1", port), 1))

    def stop(self) -> None:
        # Kill at once: the API server would wait for its watchers, and its data is not kept.
        for process in self.processes:
            process.kill()
            process.wait()

    def kubeconfig(self, user: str) -> pathlib.Path:
        return self.folder / f"{user}.kubeconfig"

    def namespace(self, name: str, level: str) -> None:
        labels = {f"pod-security.kubernetes.io/{mode}": level for mode in ("enforce", "warn")}
        self.post("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})

    def request(self, method: str, path: str, body=None, user="admin", kind="application/json"):
        data = None if body is None else (body if isinstance(body, bytes) else json.dumps(body).encode())
        headers = {"Authorization": f"Bearer {user}-token", "Content-Type": kind}
        request = urllib.request.Request(f"https://127.0.0.1:{self.port}{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, context=self.context, timeout=30) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            text = error.read().decode()
            try:
                text = json.loads(text)["message"]
            except (ValueError, KeyError):
                pass
            raise Refused(error.code, text) from None

    def get(self, path: str, user="admin", raw=False):
        text = self.request("GET", path, user=user)
        return text if raw else json.loads(text)

    def post(self, path: str, body, user="admin"):
        return json.loads(self.request("POST", path, body, user))

    def apply(self, path: str, manifest: dict, user="admin", dry=False):
        """Server-side apply with strict validation, as `kubectl apply --server-side --validate=strict`."""
        query = "fieldManager=test&fieldValidation=Strict" + ("&dryRun=All" if dry else "")
        return json.loads(self.request("PATCH", f"{path}?{query}", manifest, user, "application/apply-patch+yaml"))

    @staticmethod
    def wait(what: str, condition, seconds=90):
        deadline = time.monotonic() + seconds
        while True:
            try:
                found = condition()
                if found:
                    return found
            except (OSError, Refused):
                pass
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited in vain for {what}")
            time.sleep(0.2)

    def _run(self, program: str, *args, env=None) -> None:
        log = open(self.folder / f"{program}.log", "wb")
        command = [str(self.tools / program), *map(str, args)]
        self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **(env or {})}))

    def _certificate(self, name: str, host: str) -> None:
        kind = "IP" if host[0].isdigit() else "DNS"
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}",
                        "-addext", f"subjectAltName={kind}:{host}", "-keyout", self.folder / f"{name}.key",
                        "-out", self.folder / f"{name}.crt"], check=True, capture_output=True)

    def _kubeconfig(self, user: str) -> None:
        self.kubeconfig(user).write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": user,
            "clusters": [{"name": "test", "cluster": {"server": f"https://127.0.0.1:{self.port}", "insecure-skip-tls-verify": True}}],
            "users": [{"name": user, "user": {"token": f"{user}-token"}}],
            "contexts": [{"name": user, "context": {"cluster": "test", "user": user, "namespace": "training"}}]}))
