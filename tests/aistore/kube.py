"""A stand-in for the Kubernetes API: just enough of it for AIStore's targets to run their ETL pods as local processes.

    python kube.py STATE_FOLDER PORT     (TLS; the folder gets `ca.crt`, `events.jsonl`, and one `POD.log` per pod)

A pod becomes a process that is PID 1 of its own PID namespace, with the environment of its spec, a port of 127.0.0.1 (told to
it as `PORT`) in place of 8000, and a readiness probe of `/health`. Its end is told with the last lines of its log, as the policy
`FallbackToLogsOnError` does. It has two seconds from SIGTERM to SIGKILL: the target deletes its pods with a grace period of 0.

`KUBE_IMAGES` is JSON, {"image name": {"command": […], "env": {…}}}; an image is found by the beginning of its name.
`KUBE_TARGETS` is JSON, {"name of a target's pod": ["folder it mounts", …]}.
Of pods and services the bodies come in protobuf (client-go sends no other), of which the few fields that matter are read.
"""
import functools
import http.server
import itertools
import json
import os
import queue
import signal
import socketserver
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

CONTAINER = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--")  # the command is PID 1 of its pod
GRACE_SECONDS = 2.0  # what a kubelet makes of a grace period of 0
PROBE_SECONDS = 10.0  # between the probes of a pod that is ready, as AIStore's specs have it
PROBE_TIMEOUT_SECONDS = 5.0
MESSAGE_BYTES = 2048  # of a termination message, and at most 80 lines
FIRST_POD_PORT = 10000  # in a namespace of its own; the range of outgoing connections begins at 32768
RUNNING = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}

Object = Dict[str, Any]
Field = Tuple[int, Union[int, bytes]]


# == Protobuf, as far as needed ==


def read_varint(message: bytes, start: int) -> Tuple[int, int]:
    """Return the number that begins at `start`, and where it ends."""
    value = shift = 0
    while True:
        byte = message[start]
        start += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, start
        shift += 7


def read_fields(message: bytes) -> Iterator[Field]:
    """Yield the number and the value of each field: an int for a varint, bytes for anything else."""
    start = 0
    while start < len(message):
        key, start = read_varint(message, start)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, start = read_varint(message, start)
            yield number, value
            continue
        length = {1: 8, 5: 4}.get(wire_type)
        if length is None:
            assert wire_type == 2, "wire type %d" % wire_type
            length, start = read_varint(message, start)
        yield number, message[start:start + length]
        start += length


def all_of(message: bytes, number: int) -> List[bytes]:
    """Return the values of a repeated field."""
    return [value for found, value in read_fields(message) if found == number and isinstance(value, bytes)]


def one_of(message: bytes, number: int) -> bytes:
    """Return the last value of a field, empty where it is missing."""
    return (all_of(message, number) or [b""])[-1]


def text_of(message: bytes, number: int) -> str:
    """Return the last value of a text field."""
    return one_of(message, number).decode()


def number_of(message: bytes, number: int) -> int:
    """Return the last value of a number field, 0 where it is missing."""
    return ([value for found, value in read_fields(message) if found == number and isinstance(value, int)] or [0])[-1]


def read_metadata(message: bytes) -> Object:
    """Return the metadata of an object: core/v1 has it as field 1 of each."""
    metadata = one_of(message, 1)
    labels = {text_of(entry, 1): text_of(entry, 2) for entry in all_of(metadata, 11)}
    return {"name": text_of(metadata, 1), "namespace": "default", "labels": labels}


def read_container(message: bytes) -> Object:
    """Return what a core/v1 Container has of name, image, command, arguments, ports and environment."""
    return {
        "name": text_of(message, 1), "image": text_of(message, 2),
        "command": [word.decode() for word in all_of(message, 3)], "args": [word.decode() for word in all_of(message, 4)],
        "ports": [{"containerPort": number_of(port, 3), "name": text_of(port, 1)} for port in all_of(message, 6)],
        "env": [{"name": text_of(entry, 1), "value": text_of(entry, 2)} for entry in all_of(message, 7)],
    }


def read_pod(message: bytes) -> Object:
    """Return a core/v1 Pod."""
    containers = [read_container(container) for container in all_of(one_of(message, 2), 2)]
    return {"metadata": read_metadata(message), "spec": {"containers": containers}}


def read_service(message: bytes) -> Object:
    """Return a core/v1 Service."""
    ports = [{"port": number_of(port, 3)} for port in all_of(one_of(message, 2), 1)]
    return {"metadata": read_metadata(message), "spec": {"ports": ports, "type": "NodePort"}}


READERS: Dict[str, Callable[[bytes], Object]] = {"pods": read_pod, "services": read_service}


def read_object(kind: str, body: bytes) -> Object:
    """Return the object of a request's body, JSON or protobuf in Kubernetes' envelope."""
    if body[:4] == b"k8s\0":
        return READERS[kind](one_of(body[4:], 2))
    decoded: Object = json.loads(body)
    return decoded


# == Pods ==


class Process:
    """A pod's container: a process, its log, and what there is to tell of its life.

    Its own thread runs `run`; `stop` is called by the thread that serves the request to delete it.
    """

    def __init__(self, name: str, command: Sequence[str], env: Dict[str, str], log: Path) -> None:
        self.name = name
        self.port = int(env["PORT"])
        self.log = log
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                [*CONTAINER, *command], env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def is_healthy(self) -> bool:
        """Probe the process as a kubelet does."""
        url = "http://127.0.0.1:%d/health" % self.port
        try:
            with urllib.request.urlopen(url, timeout=PROBE_TIMEOUT_SECONDS) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def wait(self, seconds: float) -> bool:
        """Wait for the end of the process, and tell whether it came."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def exit_code(self) -> int:
        """Return the exit code as Kubernetes tells it, 128 and more for a signal."""
        code = self.process.returncode
        return int(code if code >= 0 else 128 - code)

    def last_lines(self) -> str:
        """Return the end of the log, as much as a termination message holds."""
        return "\n".join(self.log.read_bytes()[-MESSAGE_BYTES:].decode("utf-8", "replace").splitlines()[-80:])

    def stop(self) -> None:
        """End the process as a kubelet does; all of its PID namespace goes with it."""
        children = Path("/proc/%d/task/%d/children" % (self.process.pid, self.process.pid))
        try:
            for pid in children.read_text().split():
                os.kill(int(pid), signal.SIGTERM)
        except (FileNotFoundError, ProcessLookupError):
            pass  # it ended just now
        if not self.wait(GRACE_SECONDS):
            self.process.kill()
            self.process.wait()


class Kubernetes:
    """The pods and services there are, and those who watch them. All of its state is under `lock`."""

    def __init__(self, folder: Path, images: Dict[str, Any], targets: Dict[str, List[str]]) -> None:
        self.folder = folder
        self.images = images
        self.lock = threading.RLock()
        self.tables: Dict[str, Dict[str, Object]] = {"pods": {}, "services": {}}
        self.processes: Dict[str, Process] = {}
        self._ports: Dict[str, int] = {}
        self._free_ports = itertools.count(FIRST_POD_PORT)
        self._watchers: List[Tuple[Optional[str], "queue.Queue[str]"]] = []
        for name, mounts in targets.items():
            self.tables["pods"][name] = target_pod(name, mounts)

    def tell(self, pod: str, event: str, **facts: Any) -> None:
        """Write down what happened to a pod, for the tests."""
        with self.lock, open(self.folder / "events.jsonl", "a") as file:
            file.write(json.dumps({"pod": pod, "event": event, "time": time.time(), **facts}) + "\n")

    def port_of(self, name: str) -> int:
        """Return the port of a pod and of its service, which has the same name."""
        with self.lock:
            if name not in self._ports:
                self._ports[name] = next(self._free_ports)
            return self._ports[name]

    # -- watching --

    def watch(self, name: Optional[str]) -> "queue.Queue[str]":
        """Return a queue that gets what happens to the pod of this name, or to all."""
        events: "queue.Queue[str]" = queue.Queue()
        with self.lock:
            self._watchers.append((name, events))
        return events

    def unwatch(self, events: "queue.Queue[str]") -> None:
        """Forget a queue."""
        with self.lock:
            self._watchers = [watcher for watcher in self._watchers if watcher[1] is not events]

    def notify(self, kind: str, pod: Object) -> None:
        """Tell the watchers of a pod that it was added, modified or deleted."""
        with self.lock:
            pod["metadata"]["resourceVersion"] = str(time.monotonic_ns())
            text = json.dumps({"type": kind, "object": dict(pod, kind="Pod", apiVersion="v1")})
            for name, events in self._watchers:
                if name in (None, pod["metadata"]["name"]):
                    events.put(text)

    def set_status(self, pod: Object, phase: str, ready: bool, state: Object) -> None:
        """Change the state of a pod's only container and tell its watchers."""
        container = pod["spec"]["containers"][0]
        pod["status"] = {
            "phase": phase, "hostIP": "127.0.0.1", "podIP": "127.0.0.1",
            "conditions": [{"type": "Ready", "status": str(ready)}],
            "containerStatuses": [{"name": container["name"], "ready": ready, "image": container["image"], "imageID": "",
                                   "restartCount": 0, "state": state}],
        }
        self.notify("MODIFIED", pod)

    # -- a pod's life --

    def add(self, kind: str, new: Object) -> bool:
        """Add a pod, and start it, or a service; False where its name is taken."""
        name = new["metadata"]["name"]
        with self.lock:
            if name in self.tables[kind]:
                return False
            new["metadata"]["uid"] = str(time.monotonic_ns())
            self.tables[kind][name] = new
        if kind == "services":
            new["spec"]["ports"][0]["nodePort"] = self.port_of(name)
            return True
        new["status"] = {"phase": "Pending"}
        self.notify("ADDED", new)
        threading.Thread(target=self._run, args=(name, new), daemon=True).start()
        return True

    def remove(self, kind: str, name: str) -> bool:
        """Remove a service, or a pod, and return when it has ended; False where there is none."""
        with self.lock:
            old = self.tables[kind].pop(name, None)
            process = self.processes.pop(name, None) if kind == "pods" else None
        if old is None:
            return False
        if process:
            self._stop(process)
        if kind == "pods":
            self._ports.pop(name, None)
            self.notify("DELETED", old)
        return True

    def stop_all(self) -> None:
        """End all pods."""
        for process in list(self.processes.values()):
            self._stop(process)

    def _stop(self, process: Process) -> None:
        started = time.monotonic()
        if process.process.poll() is None:
            process.stop()
            self.tell(process.name, "stopped", code=process.exit_code(), seconds=time.monotonic() - started)

    def _run(self, name: str, pod: Object) -> None:
        """Run a pod from its start to its end; the main function of its thread."""
        process = self._start(name, pod)
        if process is None:
            return
        self.tell(name, "started", pid=process.process.pid, labels=pod["metadata"]["labels"])
        self.set_status(pod, "Running", False, RUNNING)
        self._probe_until_end(process, pod)
        with self.lock:
            deleted = self.tables["pods"].get(name) is not pod
        if not deleted:
            code = process.exit_code()
            self.tell(name, "exited", code=code)
            message = process.last_lines() if code else ""
            ended = {"exitCode": code, "reason": "Error" if code else "Completed", "message": message}
            self.set_status(pod, "Failed" if code else "Succeeded", False, {"terminated": ended})

    def _start(self, name: str, pod: Object) -> Optional[Process]:
        container = pod["spec"]["containers"][0]
        image = next((entry for prefix, entry in self.images.items() if container["image"].startswith(prefix)), None)
        if image is None:  # a real cluster would wait for it until `init_timeout`
            ended = {"exitCode": 125, "reason": "ErrImagePull", "message": container["image"]}
            self.set_status(pod, "Failed", False, {"terminated": ended})
            return None
        env = {"PATH": os.environ.get("PATH", os.defpath), "HOME": "/", "HOSTNAME": name, **image.get("env", {})}
        env.update({entry["name"]: entry.get("value", "") for entry in container.get("env", [])})
        env["PORT"] = str(self.port_of(name))
        command = [*(container.get("command") or image["command"]), *(container.get("args") or [])]
        process = Process(name, command, env, self.folder / (name + ".log"))
        with self.lock:
            self.processes[name] = process
        return process

    def _probe_until_end(self, process: Process, pod: Object) -> None:
        started = time.monotonic()
        ready = False
        while not process.wait(PROBE_SECONDS if ready else 0.02):
            healthy = process.is_healthy()
            if healthy != ready and process.process.poll() is None:
                ready = healthy
                self.tell(process.name, "ready" if ready else "unready", seconds=time.monotonic() - started)
                self.set_status(pod, "Running", ready, RUNNING)


def target_pod(name: str, mounts: Sequence[str]) -> Object:
    """Return the pod of a target, which it looks up to give its own mounts to the pods it starts."""
    volume_mounts = [{"name": "v%d" % index, "mountPath": mount} for index, mount in enumerate(mounts)]
    volumes = [{"name": "v%d" % index, "hostPath": {"path": mount}} for index, mount in enumerate(mounts)]
    container = {"name": "ais", "image": "aisnode", "volumeMounts": volume_mounts}
    return {"metadata": {"name": name, "namespace": "default"}, "spec": {"containers": [container], "volumes": volumes},
            "status": {"phase": "Running", "hostIP": "127.0.0.1"}}


# == HTTP ==


class Handler(http.server.BaseHTTPRequestHandler):
    """Requests for `/api/v1/namespaces/default/KIND[/NAME[/log]]`."""

    protocol_version = "HTTP/1.1"
    titles = {"pods": "Pod", "services": "Service"}

    def __init__(self, kubernetes: Kubernetes, *args: Any) -> None:
        self.kubernetes = kubernetes
        super().__init__(*args)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the log is for tracebacks."""

    def do_GET(self) -> None:
        """Answer with an object, a list, a pod's log, or what happens to pods."""
        path, query = self._split_path()
        if not path or path[0] not in self.titles:
            return self._answer_status(404, "NotFound", "no such kind")
        if len(path) == 1:
            return self._list(path[0], query)
        found = self.kubernetes.tables[path[0]].get(path[1])
        if found is None:
            return self._answer_status(404, "NotFound", "%s %r not found" % (path[0], path[1]))
        if len(path) == 3:
            log = self.kubernetes.folder / (path[1] + ".log")
            return self._answer(200, log.read_bytes() if log.exists() else b"", "text/plain")
        return self._answer_json(200, dict(found, kind=self.titles[path[0]], apiVersion="v1"))

    def do_POST(self) -> None:
        """Add a pod or a service."""
        path, _ = self._split_path()
        new = read_object(path[0], self._read_body())
        if not self.kubernetes.add(path[0], new):
            return self._answer_status(409, "AlreadyExists", "%s already exists" % new["metadata"]["name"])
        return self._answer_json(201, dict(new, kind=self.titles[path[0]], apiVersion="v1"))

    def do_DELETE(self) -> None:
        """Remove a pod or a service."""
        self._read_body()
        path, _ = self._split_path()
        if not self.kubernetes.remove(path[0], path[1]):
            return self._answer_status(404, "NotFound", "%s %r not found" % (path[0], path[1]))
        return self._answer_json(200, {"kind": "Status", "apiVersion": "v1", "status": "Success"})

    def _list(self, kind: str, query: Dict[str, str]) -> None:
        name = query.get("fieldSelector", "").partition("metadata.name=")[2] or None
        if query.get("watch") in ("1", "true"):
            return self._watch(name)
        with self.kubernetes.lock:
            items = [item for key, item in self.kubernetes.tables[kind].items() if name in (None, key)]
        return self._answer_json(200, {"kind": self.titles[kind] + "List", "apiVersion": "v1", "metadata": {}, "items": items})

    def _watch(self, name: Optional[str]) -> None:
        """Send events until the client goes."""
        events = self.kubernetes.watch(name)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            while True:
                line = (events.get() + "\n").encode()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                self.wfile.flush()
        except OSError:
            pass
        finally:
            self.kubernetes.unwatch(events)

    def _split_path(self) -> Tuple[List[str], Dict[str, str]]:
        url = urllib.parse.urlsplit(self.path)
        return url.path.strip("/").split("/")[4:], dict(urllib.parse.parse_qsl(url.query))

    def _read_body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer_status(self, code: int, reason: str, message: str) -> None:
        self._answer_json(code, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code,
                                 "message": message})

    def _answer_json(self, code: int, answer: Object) -> None:
        self._answer(code, json.dumps(answer).encode(), "application/json")

    def _answer(self, code: int, body: bytes, content_type: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """One thread per connection."""

    allow_reuse_address = True
    daemon_threads = True


def make_certificate(folder: Path) -> Tuple[str, str]:
    """Make a self-signed certificate for 127.0.0.1 and return the files of it and of its key."""
    certificate, key = str(folder / "ca.crt"), str(folder / "ca.key")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key,
         "-out", certificate, "-days", "2", "-subj", "/CN=kube", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, stderr=subprocess.DEVNULL, timeout=60,
    )
    return certificate, key


def main(argv: Sequence[str]) -> int:
    """Serve until SIGTERM, then end all pods."""
    folder = Path(argv[0])
    folder.mkdir(parents=True, exist_ok=True)
    kubernetes = Kubernetes(folder, json.loads(os.environ["KUBE_IMAGES"]), json.loads(os.environ["KUBE_TARGETS"]))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*make_certificate(folder))
    server = Server(("127.0.0.1", int(argv[1])), functools.partial(Handler, kubernetes))
    server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (folder / "ready").touch()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    kubernetes.stop_all()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
