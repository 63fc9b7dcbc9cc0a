"""The doctor's all-reduce on plain sockets: every host's agent takes part, and nothing as slow as torch is imported.

The first host listens at the rendezvous port; the others report there, each with a port of its own, and get the table
of all. Then every host connects to the next one, and the ring's links are measured both ways in bursts, those that
share no host at the same time: the time does not grow with the number of hosts. At last the hosts reduce a vector
around the ring (reduce-scatter, all-gather) and check its sum; its size is fitted to the slowest link. About 2 s.
Gbit/s of the all-reduce is the algorithm's: bytes reduced per second, on each host.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

CHUNK_BYTES = 2**18


BURST_BYTES, BURST_S = 2**23, 0.05  # a burst ends at the first of these


ROUNDS = 4  # bursts on every link and way, of which the best counts


REDUCED_BYTES, REDUCED_S = 2**24, 0.5


BUFFER_BYTES = 2**20  # what a slow link has yet to send when a burst has ended


MEET_S, ANSWER_S = 10.0, 30.0


class RingError(Exception):
    """Who cannot reach whom, in words."""


def take_part(rank: int, world: int, address: str, master: str, port: int) -> dict[str, Any]:
    """Run to the end. The first host's answer: `links`, the rate from rank i to i + 1 and back, `all`, and `sum`."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((address, 0), family=_family(address), backlog=8))
        listener.settimeout(ANSWER_S)
        centre = stack.enter_context(Centre(rank, world, master, port))
        table = centre.exchange([address, listener.getsockname()[1]])
        host, its_port = table[(rank + 1) % world]
        following = stack.enter_context(_connect(host, its_port, MEET_S))
        previous = stack.enter_context(_tuned(listener.accept()[0]))
        rates = _measure_links(rank, world, centre, previous, following)
        links = centre.exchange(rates)
        slowest = min(rate for link in links for rate in link) * 1e9 / 8  # bytes/s
        count = max(world, int(min(REDUCED_BYTES, slowest * REDUCED_S / 2)) // 4 // world * world)
        best, correct = _all_reduce(rank, world, centre, previous, following, count)
        everywhere = centre.exchange([best, correct])
        return {
            "links": links, "sum": all(right for _, right in everywhere),
            "all": count * 32 / 1e9 / max(seconds for seconds, _ in everywhere),
        }  # fmt: skip


class Centre:
    """Everybody's line to the first host: `exchange` gives all the values of all, in the order of ranks."""

    def __init__(self, rank: int, world: int, master: str, port: int) -> None:
        self.rank, self.world = rank, world
        self.lines: list[Any] = []  # of rank 0: to 1, 2, ...; of the others: to 0
        self.sockets = list(self._meet(master, port) if rank == 0 else [_connect(master, port, MEET_S)])
        if rank:
            self.lines = [self.sockets[0].makefile("rw")]
            self._write(self.lines[0], rank)

    def _meet(self, master: str, port: int) -> Iterator[socket.socket]:
        """Wait for all; raises RingError with those that did not come."""
        came: dict[int, Any] = {}
        with socket.create_server((master, port), family=_family(master), backlog=self.world) as server:
            deadline = time.monotonic() + MEET_S
            while len(came) < self.world - 1:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    line = _tuned(server.accept()[0])
                except TimeoutError:
                    late = sorted(set(range(1, self.world)) - set(came))
                    raise RingError(json.dumps({"late": late})) from None
                file = line.makefile("rw")
                came[int(json.loads(file.readline()))] = file
                yield line
        self.lines = [came[rank] for rank in sorted(came)]

    def exchange(self, value: Any) -> list[Any]:
        """The values of all ranks; returns when all have come."""
        if self.rank == 0:
            values = [value, *(json.loads(line.readline()) for line in self.lines)]
            for line in self.lines:
                self._write(line, values)
            return values
        self._write(self.lines[0], value)
        said = self.lines[0].readline()
        if not said:
            raise RingError("the first host has given up")
        values = json.loads(said)
        return list(values)

    @staticmethod
    def _write(line: Any, value: Any) -> None:
        line.write(json.dumps(value) + "\n")
        line.flush()

    def __enter__(self) -> Centre:
        return self

    def __exit__(self, *_: object) -> None:
        for line in self.sockets:
            line.close()


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _tuned(connection: socket.socket) -> socket.socket:
    connection.settimeout(ANSWER_S)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    return connection


def _connect(address: str, port: int, patience_s: float) -> socket.socket:
    """A connection; the other end may not listen yet."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return _tuned(socket.create_connection((address, port), timeout=5))
        except OSError as error:
            if time.monotonic() > deadline:
                raise RingError(f"cannot reach {address} port {port}: {error}") from error
            time.sleep(0.2)


def _measure_links(
    rank: int, world: int, centre: Centre, previous: socket.socket, following: socket.socket
) -> list[float]:
    """Gbit/s from this host to the next one, and back."""
    best = [0.0, 0.0]
    last = world % 2 * (world - 1)  # in a ring of odd length one link goes alone
    for _ in range(ROUNDS):
        for turn in range(3 if last else 2):
            centre.exchange(None)
            if _turn(rank, world, last) == turn:
                best[0] = max(best[0], _burst(following))
                best[1] = max(best[1], _drain(following))
            if _turn((rank - 1) % world, world, last) == turn:
                _drain(previous)
                _burst(previous)
    return best


def _turn(link: int, world: int, last: int) -> int:
    """When the link from a rank to the next one is measured. Two hosts have two links, one after the other."""
    return 2 if last and link == last else link % 2


def _burst(line: socket.socket) -> float:
    """Send for a while; the other end's word on how fast it came, Gbit/s."""
    data, sent, start = bytes(CHUNK_BYTES), 0, time.perf_counter()
    while sent < BURST_BYTES and time.perf_counter() - start < BURST_S:
        line.sendall(b"\1" + data)
        sent += len(data)
    line.sendall(b"\0")
    return float(_exactly(line, 32).decode())


def _drain(line: socket.socket) -> float:
    """Receive a burst, and tell how fast it came."""
    chunk, got, start = bytearray(CHUNK_BYTES), 0, 0.0
    while _exactly(line, 1) == b"\1":
        start = start or time.perf_counter()
        _fill(line, memoryview(chunk))
        got += len(chunk)
    rate = got * 8 / 1e9 / max(time.perf_counter() - start, 1e-9)
    line.sendall(f"{rate:32.9f}".encode())
    return rate


def _exactly(line: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    _fill(line, memoryview(data))
    return bytes(data)


def _fill(line: socket.socket, view: memoryview) -> None:
    while view:
        count = line.recv_into(view)
        if count == 0:
            raise RingError("a neighbour in the ring has gone")
        view = view[count:]


def _all_reduce(
    rank: int, world: int, centre: Centre, previous: socket.socket, following: socket.socket, count: int
) -> tuple[float, bool]:
    """Sum a vector of `count` fp32 over the ring, three times; (best seconds, whether the sum is right)."""
    import numpy as np

    best, correct = float("inf"), True
    with ThreadPoolExecutor(1) as sender:
        for _ in range(3):
            parts = np.full((world, count // world), rank + 1, dtype=np.float32)
            incoming = np.empty_like(parts[0])
            centre.exchange(None)
            start = time.perf_counter()
            for step in range(2 * (world - 1)):
                away, here = (rank - step) % world, (rank - step - 1) % world
                sending = sender.submit(following.sendall, parts[away].tobytes())
                _fill(previous, memoryview(incoming).cast("B"))
                sending.result()
                parts[here] = parts[here] + incoming if step < world - 1 else incoming
            best = min(best, time.perf_counter() - start)
            correct &= bool((parts == world * (world + 1) / 2).all())
    return best, correct
