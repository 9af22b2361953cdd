#!/usr/bin/env python3
"""Load over WebSocket: `wsload.py PORT CONNECTIONS SECONDS CONTROL BODY RESULT`, one line of JSON when it is done.

Each connection sends the same object over and over, as a target does: without waiting for results, but with no more than a
window of them on their way. What is sent is made once, masks included, and what comes is compared with what must come in large
pieces, so that one process keeps up with any server. CONTROL is the control message, BODY a file with the object or empty, RESULT
a file with the result of one object; a single byte that differs ends the load.
"""
import json
import os
import select
import socket
import sys
import time
from collections import deque
from pathlib import Path
from typing import Deque, List, Sequence, Tuple

WINDOW_BYTES = 4 << 20  # on their way in one connection, counted in objects and in results
WINDOW_OBJECTS = 256
RECEIVE_BYTES = 1 << 17  # with what it is compared with, in the processor's cache
SILENCE_SECONDS = 30.0
HANDSHAKE = (b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
             b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")


def frame(payload: bytes, masked: bool) -> bytes:
    """Make a binary message of one frame; the mask is always another, never one of zeros alone."""
    size, bit = len(payload), 0x80 if masked else 0
    head = b"\x82" + (bytes([bit | size]) if size < 126 else
                      bytes([bit | 126]) + size.to_bytes(2, "big") if size < 1 << 16 else
                      bytes([bit | 127]) + size.to_bytes(8, "big"))
    if not masked:
        return head + payload
    mask = bytes(byte | 1 for byte in os.urandom(4))
    pad = (mask * (size // 4 + 1))[:size]
    return head + mask + (int.from_bytes(payload, "big") ^ int.from_bytes(pad, "big")).to_bytes(size, "big")


class Connection:
    """One connection, which never blocks; `latencies` has the times from sending to receiving, in seconds."""

    def __init__(self, port: int, request: bytes, result: bytes) -> None:
        self._result = result
        self._request = request
        self._window = max(2, min(WINDOW_OBJECTS, WINDOW_BYTES // max(len(request), len(result))))
        batch = max(1, self._window // 4)
        self._batch = (batch, memoryview(request * batch))
        self._expected = result * (RECEIVE_BYTES // len(result) + 2)
        self._left = memoryview(b"")
        self._sent: Deque[Tuple[int, float]] = deque()  # how many objects had been sent when, ascending
        self._objects_sent = 0
        self._bytes_received = 0
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self.latencies: List[float] = []
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(HANDSHAKE)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.socket.recv(1)
        if not head.startswith(b"HTTP/1.1 101 "):
            raise SystemExit("no handshake: %r" % head)
        self.socket.setblocking(False)

    @property
    def results(self) -> int:
        """How many results have come."""
        return self._bytes_received // len(self._result)

    @property
    def wants_to_send(self) -> bool:
        """Whether the window lets it send."""
        return bool(self._left) or self._objects_sent + self._batch[0] - self.results <= self._window

    def send(self) -> None:
        """Send what the window and the socket allow."""
        while self.wants_to_send:
            if not self._left:
                self._objects_sent += self._batch[0]
                self._sent.append((self._objects_sent, time.perf_counter()))
                self._left = self._batch[1]
            try:
                self._left = self._left[self.socket.send(self._left):]
            except BlockingIOError:
                return

    def receive(self) -> None:
        """Receive what is there, and compare it."""
        count = self.socket.recv_into(self._buffer)
        start = self._bytes_received % len(self._result)
        if not count or not self._expected.startswith(self._buffer[:count], start):  # views are compared twenty times slower
            raise SystemExit("a wrong result: %r" % bytes(self._buffer[:min(count, 200)]))
        self._bytes_received += count
        now = time.perf_counter()
        while self._sent and self._sent[0][0] <= self.results:
            self.latencies.append(now - self._sent.popleft()[1])


def run(connections: Sequence[Connection], seconds: float) -> Tuple[int, float]:
    """Send and receive for a time; return how many results came, and in how many seconds."""
    poller = select.epoll()
    by_number = {connection.socket.fileno(): connection for connection in connections}
    wanted = dict.fromkeys(by_number, select.EPOLLIN | select.EPOLLOUT)
    for number in by_number:
        poller.register(number, wanted[number])
    began = now = time.perf_counter()
    while now < began + seconds:
        ready = poller.poll(SILENCE_SECONDS)
        if not ready:
            raise SystemExit("nothing came for %.0f s" % SILENCE_SECONDS)
        for number, events in ready:
            connection = by_number[number]
            if events & select.EPOLLIN:
                connection.receive()
            connection.send()
            wants = select.EPOLLIN | (select.EPOLLOUT if connection.wants_to_send else 0)
            if wants != wanted[number]:
                poller.modify(number, wants)
                wanted[number] = wants
        now = time.perf_counter()
    return sum(connection.results for connection in connections), now - began


def main(argv: Sequence[str]) -> int:
    """Do what the arguments say and print what came of it."""
    port, count, seconds, control, body, expected = argv
    request = frame(control.encode(), masked=True) + (frame(Path(body).read_bytes(), masked=True) if body else b"")
    result = frame(Path(expected).read_bytes(), masked=False)
    connections = [Connection(int(port), request, result) for _ in range(int(count))]
    objects, passed = run(connections, float(seconds))
    latencies = sorted(latency for connection in connections for latency in connection.latencies) or [0.0]
    print(json.dumps({"objects": objects, "seconds": passed, "p50_ms": 1e3 * latencies[len(latencies) // 2],
                      "p99_ms": 1e3 * latencies[len(latencies) * 99 // 100]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
