"""What a server costs before and beside its work: the time to its first answer, memory at rest, memory of a long stream."""
import http.client
import re
import socket
import statistics
import subprocess
import threading
import time
import zlib
from pathlib import Path
from typing import Dict, List, Sequence

import psutil

from bench.scenarios import DEFAULT_WORKERS, MIB, Scenario
from bench.servers import Peers, Server, ServerFailure
from bench.throughput import Effort, Figure, processes, say, settle

BLOCK = bytes(range(256)) * 4096  # one MiB of a stream


def measure(scenario: Scenario, peers: Peers, rounds: int) -> Dict[str, Figure]:
    """Return the figures of a scenario without load; the peers take turns, and only one runs at a time."""
    say("%s: %s", scenario.name, scenario.title)
    one_run = {"start": start_ms, "memory": idle_mib, "growth": stream_growth_mib}[scenario.kind]
    runs: Dict[str, List[float]] = {peer: [] for peer in scenario.peers}
    if scenario.kind == "start":  # once for nothing, so that all bytecode is cached and all files are in memory
        for peer in scenario.peers:
            start_ms(peer, peers, scenario)
    for number in range(rounds):
        for peer in scenario.peers:
            runs[peer].append(one_run(peer, peers, scenario))
        say("  round %d: %s", number + 1, "  ".join("%s %.1f" % (peer, runs[peer][-1]) for peer in runs))
    return {peer: Figure(statistics.median(values), values) for peer, values in runs.items()}


def rounds_of(scenario: Scenario, effort: Effort) -> int:
    """Return how often a scenario is measured: starts vary most, and a GiB takes long."""
    if effort.rounds == 1:
        return 1
    return {"start": max(5, effort.rounds), "memory": 3, "growth": 1}[scenario.kind]


# == Start ==


def start_ms(peer: str, peers: Peers, scenario: Scenario) -> float:
    """Return the milliseconds from exec to the first healthy answer, or to the end of a bare import."""
    if peer == "imports":
        return _imports_ms(peers)
    prepared = peers.prepare(peer, DEFAULT_WORKERS, False)
    began = time.perf_counter()
    with Server(peer, *prepared) as server:
        server.wait_until_healthy()
        return (time.perf_counter() - began) * 1e3


def _imports_ms(peers: Peers) -> float:
    command = [peers.python("slim"), "-c", "import http.server, cloudpickle"]
    began = time.perf_counter()
    subprocess.run(command, check=True)
    return (time.perf_counter() - began) * 1e3


# == Memory at rest ==


def idle_mib(peer: str, peers: Peers, scenario: Scenario) -> float:
    """Return the proportional set size of all the server's processes, as it is where no other Python runs beside them."""
    with peers.start(peer, DEFAULT_WORKERS) as server:
        settle(server)
        return own_size(processes(server)) / MIB


def own_size(members: Sequence[psutil.Process]) -> int:
    """Return the memory that would be free without these processes, were they alone, as they are in a container.

    The kernel's figure for pages of files (the interpreter, its libraries) is divided by all who map them, other Pythons on
    the machine too. So these are counted once, as much as the process has that uses most of them; the rest is the kernel's.
    """
    of_files: Dict[str, int] = {}
    anonymous = 0
    for process in members:
        anonymous += _kib(Path("/proc/%d/smaps_rollup" % process.pid), "Pss_Anon")
        for mapping in process.memory_maps(grouped=True):
            size = mapping.rss - mapping.anonymous
            of_files[mapping.path] = max(size, of_files.get(mapping.path, 0))
    return anonymous + sum(of_files.values())


def _kib(file: Path, name: str) -> int:
    """Return a figure of a file of the kernel's, in bytes."""
    return int(re.findall(r"%s:\s*(\d+) kB" % name, file.read_text())[0]) << 10


# == Memory of a stream ==


def stream_growth_mib(peer: str, peers: Peers, scenario: Scenario) -> float:
    """Return by how much the peak of resident memory grows while one worker streams an object of the scenario's size."""
    with peers.start(peer, 1, streaming=True) as server:
        stream(server, 2)  # what the first request of all needs is no growth
        _forget_peaks(server)
        before = _peak(server)
        stream(server, scenario.size // MIB)
        return (_peak(server) - before) / MIB


def _forget_peaks(server: Server) -> None:
    """Let the peak of resident memory begin at what is resident now: the peak of the start could hide growth."""
    for process in processes(server):
        Path("/proc/%d/clear_refs" % process.pid).write_text("5")


def _peak(server: Server) -> int:
    return sum(_kib(Path("/proc/%d/status" % process.pid), "VmHWM") for process in processes(server))


def stream(server: Server, blocks: int) -> None:
    """Send an object of so many MiB and read the result as it comes; raise ServerFailure if it is another one."""
    with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
        sender = threading.Thread(target=_send, args=(connection, blocks))
        sender.start()
        try:
            checksum = _receive(connection)
        finally:
            sender.join()
    expected = 0
    for _ in range(blocks):
        expected = zlib.crc32(BLOCK, expected)
    if checksum != expected:
        raise ServerFailure("%s streams other bytes than it got: %s" % (server.name, server.last_words()))


def _send(connection: socket.socket, blocks: int) -> None:
    head = "PUT /bck/obj HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % (blocks * len(BLOCK))
    connection.sendall(head.encode())
    for _ in range(blocks):
        connection.sendall(BLOCK)


def _receive(connection: socket.socket) -> int:
    """Return the checksum of the answer's body."""
    checksum = 0
    with http.client.HTTPResponse(connection, method="PUT") as response:
        response.begin()
        for piece in iter(lambda: response.read(MIB), b""):
            checksum = zlib.crc32(piece, checksum)
    return checksum
