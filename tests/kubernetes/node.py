"""A node without a container runtime: binds pods, runs each pod's single container as processes of this machine, and serves its log.

Real: volumes (ConfigMaps, Secrets, claims as folders, emptyDirs), environment, user, a read-only root, exit statuses, SIGTERM and
the grace period, the log as the API server fetches it. Not simulated: images, cgroups, pod networks, probes, NetworkPolicies. A pod
reaches Services as names of 127.0.0.1.
"""

import base64
import http.server
import os
import pathlib
import signal
import ssl
import subprocess
import threading
import time
import urllib.parse

NODE = "here"


class Node:
    def __init__(self, cluster, root: pathlib.Path):
        """`root` is the image's file system."""
        self.cluster, self.root = cluster, root
        self.folder = cluster.folder / "pods"
        self.running, self.ending = {}, set()
        # A container runtime creates this file if the image lacks it.
        (root / "etc/hosts").touch()
        self.stopped = threading.Event()

    def start(self) -> None:
        self._serve_logs()
        self.cluster.post("/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
        status = {"addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
                  "daemonEndpoints": {"kubeletEndpoint": {"Port": self.cluster.kubelet_port}},
                  "conditions": [{"type": "Ready", "status": "True", "reason": "Test", "message": "ready"}]}
        self._patch(f"/api/v1/nodes/{NODE}/status", {"status": status})
        threading.Thread(target=self._loop, daemon=True).start()

    def stop(self) -> None:
        self.stopped.set()
        for process in self.running.values():
            self._kill(process)

    def _loop(self) -> None:
        told = set()
        while not self.stopped.wait(0.3):
            try:
                for pod in self.cluster.get("/api/v1/pods")["items"]:
                    self._look(pod)
            except Exception as error:  # The server is stopping, or an object was deleted meanwhile: try again.
                if str(error) not in told:
                    print(f"node: {error}", flush=True)
                told.add(str(error))

    def _look(self, pod: dict) -> None:
        meta, uid = pod["metadata"], pod["metadata"]["uid"]
        path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}"
        if not pod["spec"].get("nodeName"):
            if not meta.get("deletionTimestamp"):
                self.cluster.post(f"{path}/binding", {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": meta["name"]},
                                                      "target": {"apiVersion": "v1", "kind": "Node", "name": NODE}})
        elif meta.get("deletionTimestamp"):
            process = self.running.get(uid)
            if process is None or process.poll() is not None:
                self._delete(path)
            elif uid not in self.ending:
                self.ending.add(uid)
                os.killpg(process.pid, signal.SIGTERM)
                threading.Timer(meta.get("deletionGracePeriodSeconds") or 0, self._kill, [process]).start()
        elif uid not in self.running and pod["status"]["phase"] == "Pending":
            self._run(pod, path)

    @staticmethod
    def _kill(process) -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    def _delete(self, path: str) -> None:
        self.cluster.request("DELETE", path, {"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0})

    def _run(self, pod: dict, path: str) -> None:
        meta, container = pod["metadata"], pod["spec"]["containers"][0]
        folder = self.folder / meta["uid"]
        folder.mkdir(parents=True, exist_ok=True)
        env = {"PATH": "/opt/dyad/usr/bin:/usr/bin:/bin"}
        for variable in container.get("env", []):
            source = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
            key = source.removeprefix("metadata.annotations['").removesuffix("']")
            labels = {**meta.get("annotations", {}), **meta.get("labels", {})}
            env[variable["name"]] = variable.get("value") or labels.get(key.removeprefix("metadata.labels['"), "")
        command = [*container["command"], *container.get("args", [])]
        script = self._mounts(pod, container, folder)
        user = pod["spec"]["securityContext"]["runAsUser"]
        script += f'exec chroot --userspec={user}:{user} {folder}/root env -i "${{ENVIRONMENT[@]}}" "$@"\n'
        script = "set -e\nENVIRONMENT=(" + " ".join(f"{key}={shell(value)}" for key, value in env.items()) + ")\n" + script
        log = open(folder / "log", "wb")
        process = subprocess.Popen(["unshare", "--mount", "--propagation", "private", "bash", "-c", script, "pod", *command],
                                   stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        self.running[meta["uid"]] = process
        self._report(path, pod, {"running": {"startedAt": now()}}, "Running")
        threading.Thread(target=self._watch, args=(path, pod, process), daemon=True).start()

    def _mounts(self, pod: dict, container: dict, folder: pathlib.Path) -> str:
        """A shell script that mounts the image read-only and the pod's volumes into it."""
        root = folder / "root"
        root.mkdir(exist_ok=True)
        lines = [f"mount --bind {self.root} {root}", f"mount -o remount,bind,ro {root}", f"mount -t proc proc {root}/proc",
                 f"mount --rbind /dev {root}/dev", f"mount -t tmpfs tmpfs {root}/run"]
        hosts = folder / "hosts"
        services = self.cluster.get(f"/api/v1/namespaces/{pod['metadata']['namespace']}/services")["items"]
        hosts.write_text("127.0.0.1 localhost " + " ".join(service["metadata"]["name"] for service in services) + "\n")
        lines.append(f"mount --bind {hosts} {root}/etc/hosts")
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        for mount in container["volumeMounts"]:
            source = self._volume(pod, volumes[mount["name"]], folder)
            target = f"{root}{mount['mountPath']}"
            lines.append(f"mount --bind {source} {target}" if mount["name"] != "shm" else f"mount -t tmpfs -o mode=1777 tmpfs {target}")
            if mount.get("readOnly"):
                lines.append(f"mount -o remount,bind,ro {target}")
        return "\n".join(lines) + "\n"

    def _volume(self, pod: dict, volume: dict, folder: pathlib.Path) -> pathlib.Path:
        namespace, name = pod["metadata"]["namespace"], volume["name"]
        source = folder / f"volume-{name}"
        if claim := volume.get("persistentVolumeClaim"):
            source = self.cluster.folder / f"claims/{namespace}/{claim['claimName']}"
        source.mkdir(parents=True, exist_ok=True)
        for kind, plural, key in (("configMap", "configmaps", "name"), ("secret", "secrets", "secretName")):
            if reference := volume.get(kind):
                data = self.cluster.get(f"/api/v1/namespaces/{namespace}/{plural}/{reference[key]}")["data"]
                for file, text in data.items():
                    (source / file).write_bytes(base64.b64decode(text) if kind == "secret" else text.encode())
        group = pod["spec"]["securityContext"]["fsGroup"]
        subprocess.run(["chown", "-R", f"root:{group}", source], check=True)
        subprocess.run(["chmod", "-R", "g+rwX", source], check=True)
        return source

    def _watch(self, path: str, pod: dict, process) -> None:
        code = process.wait()
        ended = {"terminated": {"exitCode": code if code >= 0 else 128 - code, "finishedAt": now(), "startedAt": now()}}
        try:
            self._report(path, pod, ended, "Succeeded" if code == 0 else "Failed")
        except Exception:  # Deleted meanwhile.
            pass

    def _report(self, path: str, pod: dict, state: dict, phase: str) -> None:
        container = pod["spec"]["containers"][0]
        running = phase == "Running"
        condition = [{"type": kind, "status": str(running or kind == "PodScheduled")} for kind in ("Ready", "PodScheduled")]
        self._patch(f"{path}/status", {"status": {
            "phase": phase, "podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}], "conditions": condition, "startTime": now(),
            "containerStatuses": [{"name": container["name"], "image": container["image"], "imageID": "", "ready": running,
                                   "restartCount": 0, "state": state}]}})

    def _patch(self, path: str, body: dict) -> None:
        self.cluster.request("PATCH", path, body, kind="application/strategic-merge-patch+json")

    def _serve_logs(self) -> None:
        node = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                url = urllib.parse.urlparse(self.path)
                _, _, namespace, name, _ = url.path.split("/")
                query = urllib.parse.parse_qs(url.query)
                pod = node.cluster.get(f"/api/v1/namespaces/{namespace}/pods/{name}")
                if pod["metadata"]["uid"] not in node.running:
                    return self.send_error(400, "the container is waiting to start")
                self.send_response(200)
                self.end_headers()
                node.copy_log(pod["metadata"]["uid"], query, self.wfile)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", self.cluster.kubelet_port), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cluster.folder / "server.crt", self.cluster.folder / "server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()

    def copy_log(self, uid: str, query: dict, out) -> None:
        process, log = self.running[uid], self.folder / uid / "log"
        if tail := query.get("tailLines"):
            out.write(b"".join(log.read_bytes().splitlines(keepends=True)[-int(tail[0]):]))
            return
        with open(log, "rb") as lines:
            while True:
                ended = process.poll() is not None
                if chunk := lines.read():
                    out.write(chunk)
                    out.flush()
                elif ended or "follow" not in query:
                    return
                else:
                    time.sleep(0.1)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def shell(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
