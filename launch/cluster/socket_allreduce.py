"""The doctor's all-reduce on plain sockets. The agents of all hosts take part, without importing torch, which is slow.

    1. meet        The first host listens at the rendezvous port, and the others connect (Coordinator).
    2. ring        The hosts exchange their addresses, and each host connects to the next one.
    3. links       Every link is measured in both directions, in bursts. Links that have no host in common are measured
                   at the same time, so the time does not grow with the number of hosts.
    4. all-reduce  A vector is reduced around the ring (reduce-scatter, then all-gather), and its sum is checked. The
                   slower the slowest link, the shorter the vector.

It takes about 2 s. The rate of the all-reduce is the size of the vector divided by the time, in Gbit/s. Ring
all-reduce: Patarasu and Yuan, https://doi.org/10.1016/j.jpdc.2008.09.002
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TextIO, TypeVar, cast

from packspeed.launch.cluster.messages import RingAnswer

CHUNK_BYTES = 2**18


BURST_BYTES, BURST_S = 2**23, 0.05  # a burst ends after so many bytes or seconds, whichever is first


ROUNDS = 4  # bursts per link and direction; the best one counts


REDUCED_BYTES, REDUCED_S = 2**24, 0.5  # size of the vector; smaller if the slowest link would need longer than this


BUFFER_BYTES = 2**20  # send buffer; it limits how much a slow link still has to send when a burst ends


MEET_S, ANSWER_S = 10.0, 30.0  # longest wait for a connection, and for data on a connection


Value = TypeVar("Value")


class RingError(Exception):
    """A host cannot be reached or has closed its connection. The text says which host.

    If hosts have not connected to the first host, the text is JSON instead: {"late": [ranks of these hosts]}.
    """


def run_ring(rank: int, world: int, address: str, master: str, port: int) -> RingAnswer:
    """Take part in the complete measurement of the network as host number `rank` of `world`.

    `address` is where the previous host in the ring can reach this one; the first host listens at `master` and `port`.
    Every host gets the same result. Raises RingError if a host cannot be reached.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((address, 0), family=_family(address), backlog=8))
        listener.settimeout(ANSWER_S)
        coordinator = stack.enter_context(Coordinator(rank, world, master, port))
        addresses = coordinator.exchange((address, int(listener.getsockname()[1])))
        next_address, next_port = addresses[(rank + 1) % world]
        following = stack.enter_context(_connect(next_address, next_port, MEET_S))
        previous = stack.enter_context(_configure(listener.accept()[0]))

        links = coordinator.exchange(_measure_links(rank, world, coordinator, previous, following))

        slowest = min(rate for both_ways in links for rate in both_ways) * 1e9 / 8  # bytes/s
        count = max(world, int(min(REDUCED_BYTES, slowest * REDUCED_S / 2)) // 4 // world * world)
        results = coordinator.exchange(_all_reduce(rank, world, coordinator, previous, following, count))
        return {
            "links": links, "sum": all(correct for _, correct in results),
            "all": count * 32 / 1e9 / max(seconds for seconds, _ in results),
        }  # fmt: skip


class Coordinator:
    """Connections between the first host and all others, over which the hosts exchange values.

    `rank` is the number of this host among `world`; the first host has 0 and listens at `master` and `port`. A context
    manager, which closes the connections.
    """

    def __init__(self, rank: int, world: int, master: str, port: int) -> None:
        self.rank, self.world = rank, world
        self.streams: list[TextIO] = []  # on rank 0: streams to ranks 1, 2, ...; on the others: the stream to rank 0
        self.sockets = list(self._accept_all(master, port) if rank == 0 else [_connect(master, port, MEET_S)])
        if rank:
            self.streams = [self.sockets[0].makefile("rw")]
            self._write(self.streams[0], rank)

    def _accept_all(self, master: str, port: int) -> Iterator[socket.socket]:
        """On the first host: accept the connections of all other hosts and yield their sockets.

        Raises RingError with the ranks that do not connect within 10 s (MEET_S).
        """
        streams: dict[int, TextIO] = {}
        with socket.create_server((master, port), family=_family(master), backlog=self.world) as server:
            deadline = time.monotonic() + MEET_S
            while len(streams) < self.world - 1:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    connection = _configure(server.accept()[0])
                except TimeoutError:
                    late = sorted(set(range(1, self.world)) - set(streams))
                    raise RingError(json.dumps({"late": late})) from None
                stream = connection.makefile("rw")
                streams[int(json.loads(stream.readline()))] = stream
                yield connection
        self.streams = [streams[rank] for rank in sorted(streams)]

    def exchange(self, value: Value) -> list[Value]:
        """Send `value` to all ranks, and return the values of all, in the order of ranks.

        Every rank must call it, so it is also a barrier. Values are sent as JSON: a tuple arrives as a list.
        """
        if self.rank == 0:
            values = [value, *(json.loads(stream.readline()) for stream in self.streams)]
            for stream in self.streams:
                self._write(stream, values)
            return values
        self._write(self.streams[0], value)
        line = self.streams[0].readline()
        if not line:
            raise RingError("the first host has closed the connection")
        return cast(list[Value], json.loads(line))

    @staticmethod
    def _write(stream: TextIO, value: object) -> None:
        """Write a value as one line of JSON."""
        stream.write(json.dumps(value) + "\n")
        stream.flush()

    def __enter__(self) -> Coordinator:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self.sockets:
            connection.close()


# --- connections ------------------------------------------------------------------------------------------------------


def _family(address: str) -> socket.AddressFamily:
    """Return the address family of an IPv4 or IPv6 address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _configure(connection: socket.socket) -> socket.socket:
    """Set the timeout (ANSWER_S) and the size of the send buffer (BUFFER_BYTES) of a connection, and return it."""
    connection.settimeout(ANSWER_S)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    return connection


def _connect(address: str, port: int, timeout_s: float) -> socket.socket:
    """Connect to an address and port, and retry for `timeout_s` until the other host listens.

    Raises RingError after that.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return _configure(socket.create_connection((address, port), timeout=5))
        except OSError as error:
            if time.monotonic() > deadline:
                raise RingError(f"cannot reach {address} port {port}: {error}") from error
            time.sleep(0.2)


def _read(connection: socket.socket, count: int) -> bytes:
    """Read exactly `count` bytes. Raises RingError if the other host closes the connection first."""
    data = bytearray(count)
    _read_into(connection, memoryview(data))
    return bytes(data)


def _read_into(connection: socket.socket, view: memoryview) -> None:
    """Fill the buffer with data from the connection. Raises RingError if the other host closes it."""
    while view:
        count = connection.recv_into(view)
        if count == 0:
            raise RingError("a neighbour in the ring has closed the connection")
        view = view[count:]


# --- links ------------------------------------------------------------------------------------------------------------


def _measure_links(
    rank: int, world: int, coordinator: Coordinator, previous: socket.socket, following: socket.socket
) -> list[float]:
    """Take part in measuring this host's two links, to the next and to the previous host in the ring.

    Returns the rates of the link to the next host: [Gbit/s to that host, Gbit/s back from it].
    """
    best = [0.0, 0.0]
    odd_link = world % 2 * (world - 1)  # in a ring of odd length, the last link is measured in its own turn; 0: none
    for _ in range(ROUNDS):
        for turn in range(3 if odd_link else 2):
            coordinator.exchange(None)
            if _turn(rank, world, odd_link) == turn:
                best[0] = max(best[0], _send_burst(following))
                best[1] = max(best[1], _receive_burst(following))
            if _turn((rank - 1) % world, world, odd_link) == turn:
                _receive_burst(previous)
                _send_burst(previous)
    return best


def _turn(link: int, world: int, odd_link: int) -> int:
    """Return when the link from rank `link` to the next rank is measured: in turn 0, 1 or 2.

    Links of one turn have no host in common, so that they can be measured at the same time. Even links have turn 0, odd
    links turn 1. In a ring with an odd number of hosts, the last link has a host in common with link 0, and has turn 2.
    `odd_link` is the number of that last link, or 0 if the number of hosts is even.
    """
    return 2 if odd_link and link == odd_link else link % 2


def _send_burst(connection: socket.socket) -> float:
    """Send data for 0.05 s (BURST_S), at most 8 MiB. Returns the rate in Gbit/s that the other host measured."""
    data, sent, start = bytes(CHUNK_BYTES), 0, time.perf_counter()
    while sent < BURST_BYTES and time.perf_counter() - start < BURST_S:
        connection.sendall(b"\1" + data)
        sent += len(data)
    connection.sendall(b"\0")
    return float(_read(connection, 32).decode())


def _receive_burst(connection: socket.socket) -> float:
    """Receive the data of one _send_burst, measure its rate, send the rate back and return it, in Gbit/s."""
    chunk, received, start = bytearray(CHUNK_BYTES), 0, 0.0
    while _read(connection, 1) == b"\1":
        start = start or time.perf_counter()
        _read_into(connection, memoryview(chunk))
        received += len(chunk)
    rate = received * 8 / 1e9 / max(time.perf_counter() - start, 1e-9)
    connection.sendall(f"{rate:32.9f}".encode())
    return rate


# --- all-reduce -------------------------------------------------------------------------------------------------------


def _all_reduce(
    rank: int, world: int, coordinator: Coordinator, previous: socket.socket, following: socket.socket, count: int
) -> tuple[float, bool]:
    """Sum a vector of `count` fp32 numbers over the hosts of the ring, three times.

    Returns (seconds that the fastest of the three took, whether all sums were right).
    """
    import numpy as np

    best, correct = float("inf"), True
    with ThreadPoolExecutor(1) as sender:
        for _ in range(3):
            parts = np.full((world, count // world), rank + 1, dtype=np.float32)
            incoming = np.empty_like(parts[0])
            coordinator.exchange(None)
            start = time.perf_counter()
            # In the first world - 1 steps, each host adds its numbers to the part that it receives. In the next
            # world - 1 steps, the sums are passed on. Hosts send and receive at the same time; otherwise all would wait
            # for each other.
            for step in range(2 * (world - 1)):
                outgoing, received = (rank - step) % world, (rank - step - 1) % world
                sending = sender.submit(following.sendall, parts[outgoing].tobytes())
                _read_into(previous, memoryview(incoming).cast("B"))
                sending.result()
                parts[received] = parts[received] + incoming if step < world - 1 else incoming
            best = min(best, time.perf_counter() - start)
            correct &= bool((parts == world * (world + 1) / 2).all())
    return best, correct
