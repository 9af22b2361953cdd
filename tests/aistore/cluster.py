"""A real AIStore cluster in a network namespace of its own: one proxy, two targets, and the stand-in for Kubernetes.

    python cluster.py STATE_FOLDER COMMAND [ARGUMENT…]

Runs COMMAND inside the namespace with `AIS_ENDPOINT` (the proxy's URL) and `KUBE_STATE` (the folder of the pods' logs) set,
stops everything after it, and exits as it did. `AISNODE` names AIStore's binary, built with `-tags etl`; `KUBE_IMAGES` says what
the pods run (see kube.py). It wants root: for the network, and for a mount over the folder of the service account, which every
client of Kubernetes reads and which is seen in this namespace only.
"""
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import FrameType
from typing import Any, Dict, List, Optional, Sequence, Tuple

TARGETS = 2
MOUNTPATHS = 2  # of each target
KUBE_PORT = 6443  # nobody else is in the namespace, so all ports are free
FIRST_NODE_PORT = 8000
START_SECONDS = 120.0
STOP_SECONDS = 20.0
INTERNAL = "10.99.0.1"  # an address of the nodes beside 127.0.0.1: AIStore wants its networks apart
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class ClusterFailure(Exception):
    """The cluster did not start; the text says what did not."""


def node_config(primary: str) -> Dict[str, Any]:
    """Return the part of AIStore's configuration that has no usable default; `primary` is the proxy's URL."""
    return {
        "backend": {}, "auth": {}, "tracing": {"enabled": False},
        "timeout": {"cplane_operation": "2s", "max_keepalive": "5s", "cold_get_conflict": "5s", "max_host_busy": "20s",
                    "startup_time": "1m", "join_startup_time": "3m", "send_file_time": "5m", "ec_streams_time": "10m",
                    "object_md": "2h"},
        "proxy": {"primary_url": primary, "original_url": primary, "discovery_url": "", "non_electable": False},
        "space": {"cleanupwm": 93, "lowwm": 94, "highwm": 95, "out_of_space": 98, "batch_size": 32768,
                  "dont_cleanup_time": "120m"},
        "resilver": {"enabled": True},
        "memsys": {"min_free": "1gb", "default_buf": "32kb", "to_gc": "4gb", "hk_time": "3m",
                   "min_pct_total": 0, "min_pct_free": 0},
        "versioning": {"enabled": True, "validate_warm_get": False},
        "net": {"l4": {"proto": "tcp", "sndrcv_buf_size": 131072},
                "http": {"use_https": False, "server_crt": "server.crt", "server_key": "server.key", "domain_tls": "",
                         "client_ca_tls": "", "client_auth_tls": 0, "idle_conn_time": "6s", "idle_conns_per_host": 32,
                         "idle_conns": 256, "write_buffer_size": 65536, "read_buffer_size": 65536,
                         "chunked_transfer": True, "skip_verify": False},
                "use_ipv6": False},
        "distributed_sort": {"duplicated_records": "ignore", "missing_shards": "ignore", "ekm_malformed_line": "abort",
                             "ekm_missing_key": "abort", "default_max_mem_usage": "80%", "call_timeout": "10m",
                             "dsorter_mem_threshold": "100GB", "compression": "never", "bundle_multiplier": 4},
    }


def isolate(argv: Sequence[str]) -> None:
    """Start this program again in a namespace where nothing but the cluster can be reached; there, set it up."""
    if "IN_CLUSTER_NAMESPACE" not in os.environ:
        environment = dict(os.environ, IN_CLUSTER_NAMESPACE="1")
        os.execvpe("unshare", ["unshare", "--net", "--mount", sys.executable, __file__, *argv], environment)
    ACCOUNT.parent.mkdir(parents=True, exist_ok=True)
    for command in (["mount", "-t", "tmpfs", "tmpfs", str(ACCOUNT.parent)], ["ip", "link", "set", "lo", "up"],
                    ["ip", "addr", "add", INTERNAL + "/32", "dev", "lo"]):
        subprocess.run(command, check=True, timeout=30)


class Cluster:
    """The processes of a cluster; a context manager that ends them all. `endpoint` is the proxy's URL."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.kube_state = state / "kube"
        self.endpoint = "http://127.0.0.1:%d" % FIRST_NODE_PORT
        self._processes: List[Tuple[str, "subprocess.Popen[bytes]"]] = []

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the nodes, then Kubernetes and with it the pods."""
        for _, process in reversed(self._processes):
            process.terminate()
        for _, process in reversed(self._processes):
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        self._start_kubernetes(deadline)
        self._start_node("ais-proxy", FIRST_NODE_PORT, [])
        for index in range(TARGETS):
            self._start_node(target_name(index), FIRST_NODE_PORT + 3 * (index + 1), self._mountpaths(index))
        while not self._is_ready():
            self._pause(deadline)

    def _start_kubernetes(self, deadline: float) -> None:
        mounts = {target_name(index): [str(self.state / target_name(index))] for index in range(TARGETS)}
        command = [sys.executable, str(Path(__file__).with_name("kube.py")), str(self.kube_state), str(KUBE_PORT)]
        self._spawn("kube", command, {"KUBE_TARGETS": json.dumps(mounts)})
        while not (self.kube_state / "ready").exists():
            self._pause(deadline)
        ACCOUNT.mkdir(parents=True, exist_ok=True)
        (ACCOUNT / "token").write_text("token")
        (ACCOUNT / "namespace").write_text("default")
        (ACCOUNT / "ca.crt").write_text((self.kube_state / "ca.crt").read_text())

    def _mountpaths(self, index: int) -> List[Path]:
        return [self.state / target_name(index) / ("mp%d" % number) for number in range(MOUNTPATHS)]

    def _start_node(self, name: str, first_port: int, mountpaths: Sequence[Path]) -> None:
        """Start a target or, where it has no mountpaths, the proxy; it has three ports, from the first one on."""
        folder = self.state / ("conf-" + name)
        for path in [folder, *mountpaths]:
            path.mkdir(parents=True)
        keys = ("port", "port_intra_control", "port_intra_data")
        network = {"hostname": "127.0.0.1", "hostname_intra_control": INTERNAL, "hostname_intra_data": INTERNAL}
        (folder / "ais.json").write_text(json.dumps(node_config(self.endpoint)))
        (folder / "local.json").write_text(json.dumps({
            "confdir": str(folder), "log_dir": str(folder / "log"),
            "host_net": {**network, **{key: str(first_port + number) for number, key in enumerate(keys)}},
            "fspaths": {str(path): "one-disk" for path in mountpaths},  # the label lets them share a file system
            "test_fspaths": {"root": "", "count": 0, "instance": 0},
        }))
        role = ["-role=target"] if mountpaths else ["-role=proxy", "-ntargets=%d" % TARGETS]
        command = [os.environ["AISNODE"], "-config=%s/ais.json" % folder, "-local_config=%s/local.json" % folder, *role]
        self._spawn(name, command, {
            "MY_POD": name, "HOSTNAME": name, "MY_NODE": "node-0", "K8S_NS": "default",
            "KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(KUBE_PORT),
        })

    def _spawn(self, name: str, command: Sequence[str], variables: Dict[str, str]) -> None:
        with open(self.state / (name + ".out"), "wb") as out:
            process = subprocess.Popen(
                command, env={**os.environ, **variables}, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )
        self._processes.append((name, process))

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(self.endpoint + "/v1/daemon?what=smap", timeout=5) as answer:
                cluster_map = json.load(answer)
            with urllib.request.urlopen(self.endpoint + "/v1/health?readiness=true", timeout=5):
                return len(cluster_map["tmap"]) == TARGETS and bool(cluster_map.get("uuid"))
        except (OSError, ValueError, KeyError):
            return False

    def _pause(self, deadline: float) -> None:
        """Wait a moment, unless nothing is left to wait for."""
        for name, process in self._processes:
            if process.poll() is not None:
                output = (self.state / (name + ".out")).read_text(errors="replace")
                raise ClusterFailure("%s exited with %d: %s" % (name, process.returncode, output[-2000:]))
        if time.monotonic() > deadline:
            raise ClusterFailure("the cluster is not ready after %d s" % START_SECONDS)
        time.sleep(0.1)


def target_name(index: int) -> str:
    """Return the name of a target's pod."""
    return "ais-target-%d" % index


def end(signal_number: int, _: Optional[FrameType]) -> None:
    """Make a signal end the program as an exception does, so that the cluster is stopped."""
    raise SystemExit(128 + signal_number)


def main(argv: Sequence[str]) -> int:
    """Run a command beside a cluster and return its exit code."""
    isolate(argv)
    signal.signal(signal.SIGTERM, end)
    state = Path(argv[0]).resolve()
    state.mkdir(parents=True, exist_ok=True)
    try:
        with Cluster(state) as cluster:
            variables = {"AIS_ENDPOINT": cluster.endpoint, "KUBE_STATE": str(cluster.kube_state)}
            return subprocess.run(argv[1:], env={**os.environ, **variables}).returncode
    except ClusterFailure as failure:
        print("cluster.py: %s" % failure, file=sys.stderr)
        return os.EX_UNAVAILABLE


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
