"""Images and containers for tests: buildah and podman with a store of their own, which is removed, and without networks.

Containers have the host's network, so that no bridge is left behind, and listen on ports that are free.
"""
import gzip
import json
import os
import shutil
import socket
import subprocess
import tarfile
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Type

from harness import SERVING, Server

PROGRAMS = ("buildah", "podman", "runc", "catatonit", "qemu-img", "debugfs")
BUILD_SECONDS = 600
CONFIGURATION = """\
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


class Layer(NamedTuple):
    """A layer of an image: its digest, the bytes that it takes, and the names and sizes of its files."""

    digest: str
    plain: int
    gzipped: int  # as a registry has it, by `gzip -6`; 0 where that was not asked for
    files: Dict[str, int]


class Engine:
    """A store of images, and what builds and runs them; a context manager that removes all of it."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="containers-", dir="/var/tmp"))  # no tmpfs: layers are large
        self._options = ["--root", str(self._folder / "store"), "--runroot", str(self._folder / "run"),
                         "--storage-driver", "overlay"]
        configuration = self._folder / "containers.conf"
        configuration.write_text(CONFIGURATION)
        self.environ = {**os.environ, "CONTAINERS_CONF": str(configuration), "TMPDIR": str(self._folder)}

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], where: Optional[TracebackType]
    ) -> None:
        self.podman("pod", "rm", "--all", "--force")
        self.podman("rm", "--all", "--force", "--time", "0")
        for mount in reversed(mounts_below(self._folder)):
            subprocess.run(["umount", "--lazy", mount], check=True)
        shutil.rmtree(self._folder)

    def build(self, context: Path, tag: str, *options: str, file: Optional[Path] = None) -> None:
        """Build an image from a folder; its Dockerfile may lie elsewhere."""
        chosen = ["--file", str(file)] if file else []
        self._run(["buildah", *self._options, "bud", "--isolation", "chroot", "--pull-never", "--format", "docker", "--layers",
                   "--tag", tag, *chosen, *options, str(context)])

    def podman(self, *arguments: str, timeout: float = 60.0) -> "subprocess.CompletedProcess[str]":
        """Run a podman command, which may fail."""
        return subprocess.run(self.podman_command(*arguments), env=self.environ, stdin=subprocess.DEVNULL, timeout=timeout,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)

    def podman_command(self, *arguments: str) -> List[str]:
        """Return the command line of a podman command."""
        return ["podman", *self._options, *arguments]

    def inspect(self, image: str) -> Dict[str, object]:
        """Return what an image says of itself: its configuration."""
        done = self.podman("image", "inspect", image)
        assert done.returncode == 0, done.stdout
        config: Dict[str, object] = json.loads(done.stdout)[0]["Config"]
        return config

    def layers(self, image: str, gzipped: Callable[[int], bool] = lambda number: True) -> List[Layer]:
        """Return an image's layers, the lowest first; `gzipped` tells by number which are to be compressed."""
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            self._run(["buildah", *self._options, "push", "--quiet", "--format", "docker", "--disable-compression", image,
                       "dir:" + folder])
            manifest = json.loads(Path(folder, "manifest.json").read_text())
            blobs = [Path(folder, layer["digest"].partition(":")[2]) for layer in manifest["layers"]]
            return [read_layer(blob, gzipped(number)) for number, blob in enumerate(blobs)]

    def _run(self, command: Sequence[str]) -> None:
        done = subprocess.run(command, env=self.environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, universal_newlines=True, timeout=BUILD_SECONDS)
        assert done.returncode == 0, done.stdout


def read_layer(blob: Path, is_gzipped: bool) -> Layer:
    """Read a layer's tar."""
    packed = blob.with_suffix(".gz")
    packed.touch()
    if is_gzipped:
        with blob.open("rb") as stream, gzip.open(str(packed), "wb", compresslevel=6) as sink:
            shutil.copyfileobj(stream, sink)
    with tarfile.open(str(blob)) as archive:
        files = {entry.name: entry.size for entry in archive if not entry.isdir()}
    return Layer(blob.name, blob.stat().st_size, packed.stat().st_size, files)


def mounts_below(folder: Path) -> List[str]:
    """List what is mounted below a folder, in the order in which it was."""
    mounts = [line.split(" ")[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [mount for mount in mounts if mount.startswith(str(folder) + "/")]


def free_port() -> int:
    """Return a port that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Container(Server):
    """A container on the host's network, with its log; `port` is set by `wait_until_serving`."""

    _count = 0

    def __init__(
        self, engine: Engine, image: str, env: Mapping[str, str], options: Sequence[str] = (), command: Sequence[str] = ()
    ) -> None:
        Container._count += 1
        self.name = "test-%d" % Container._count
        self._engine = engine
        variables = [word for item in env.items() for word in ("--env", "%s=%s" % item)]
        super().__init__(engine.podman_command(
            "run", "--name", self.name, "--network", "host", *variables, *options, image, *command), engine.environ)

    @classmethod
    def follow(cls, engine: Engine, name: str) -> "Container":
        """Take a container that runs already, with the log it has and will have."""
        container = cls.__new__(cls)
        container.name = name
        container._engine = engine
        Server.__init__(container, engine.podman_command("logs", "--follow", name), engine.environ)
        return container

    def kill(self) -> None:
        """Remove the container."""
        self._engine.podman("rm", "--force", "--time", "0", self.name)
        super().kill()

    def wait_until_serving(self) -> "Container":
        """Wait for the runtime to say that it serves, and where."""
        self.port = int(self.wait_for_line(SERVING, timeout=60)[1])
        return self

    def execute(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run a command in the container."""
        return self._engine.podman("exec", self.name, *command)

    def exit_code(self) -> int:
        """Return the exit code of the container's first process, which has ended."""
        done = self._engine.podman("inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", self.name)
        status, code = done.stdout.split()
        assert status == "exited", done.stdout
        return int(code)


def missing_programs() -> Iterator[str]:
    """Name the programs that are not installed."""
    return (program for program in PROGRAMS if shutil.which(program) is None)
