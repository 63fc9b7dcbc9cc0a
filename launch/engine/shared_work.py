"""Work that all ranks share, such as reading a checkpoint, with a wait at its end that may take hours.

    work = SharedWork(topology, "verifying")
    for piece in own_share:
        ...                 # do it
        work.progress()
    work.wait()             # returns when every rank has called it

A collective fails when the process group's timeout (30 minutes) ends, even if the slowest rank still makes progress.
This wait fails only if no rank at all has made progress for 30 minutes. Progress is counted in the store with which the
process group was started, a server in rank 0. Cost: one request per rank and second.
"""

from __future__ import annotations

import itertools
import time

from torch.distributed import HashStore  # type: ignore[attr-defined]  # torch does not list it
from torch.distributed.distributed_c10d import _get_default_store

from packspeed.launch.config.errors import UserError
from packspeed.launch.engine.distributed import Topology

SILENCE_S = 1800.0  # how long the ranks wait without progress of any of them
REPORT_S = 1.0  # shortest time between two reports of a rank's progress
POLL_S = 0.5  # longest time between two looks at whether all ranks have arrived

_numbers = itertools.count()


class SharedWork:
    """Work of which each rank does its own part, such as reading a checkpoint.

    Every rank must create this object and call `wait`, which returns when all ranks have finished, and raises an error
    on all of them if one has failed. `phase` is a name for the work, such as "verifying": that error and the rank's
    heartbeats contain it.
    """

    def __init__(self, topology: Topology, phase: str) -> None:
        self.topology, self.phase = topology, phase
        self._key = f"packspeed/{next(_numbers)}/{phase}"  # the same on all ranks, which make works in the same order
        self._reported = -REPORT_S
        self._store = _get_default_store() if topology.world > 1 else None
        self.progress()

    def progress(self) -> None:
        """Report that this rank has done some of its part. Call it often: it sends at most one report per second."""
        now = time.monotonic()
        if now - self._reported < REPORT_S:
            return
        self._reported = now
        self.topology.beat(self.phase)
        if self._store is not None:
            self._store.add(f"{self._key}/progress", 1)

    def wait(self) -> None:
        """Wait until every rank has called this.

        Raises UserError if no rank has made progress for 30 minutes. The error lists the ranks that have not called
        this.
        """
        if self._store is None:
            return
        store, key, world = self._store, self._key, self.topology.world
        self.topology.beat("communication", self.phase)  # so that a hang names the ranks that still work
        store.set(f"{key}/rank/{self.topology.rank}", "arrived")
        store.add(f"{key}/progress", 1)
        if store.add(f"{key}/arrived", 1) == world:
            store.set(f"{key}/all", "arrived")
        pause, seen, since = 0.001, 0, time.monotonic()
        while not store.check([f"{key}/all"]):
            time.sleep(pause)
            pause = min(2 * pause, POLL_S)
            count = store.add(f"{key}/progress", 0)
            if count != seen:
                seen, since = count, time.monotonic()
            elif time.monotonic() - since > SILENCE_S:
                absent = [rank for rank in range(world) if not store.check([f"{key}/rank/{rank}"])]
                raise UserError(
                    f"{self.phase}: no rank has made progress for {SILENCE_S:g} s. Not ready: rank(s) "
                    f"{', '.join(map(str, absent))}. Find out what these processes do, for example with py-spy dump, "
                    "and whether the file system answers. Then start the run again."
                )


class Board:
    """Short texts and counters that the ranks share without a collective, in the process group's key-value store.

    The main thread of every rank must create it. All ranks must create their Board and SharedWork objects in the same
    order. Afterwards any thread may use the Board.
    """

    def __init__(self, topology: Topology, name: str) -> None:
        self._key = f"packspeed/{next(_numbers)}/{name}"
        self._store = _get_default_store() if topology.world > 1 else HashStore()

    def post(self, note: str, text: str = "") -> None:
        """Store `text` under the key `note`, for all ranks. Replaces an earlier text with that key."""
        self._store.set(f"{self._key}/{note}", text)

    def read(self, note: str) -> str | None:
        """Return the text that a rank has posted under the key `note`, or None if none has."""
        key = f"{self._key}/{note}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def count(self, note: str, add: int = 0) -> int:
        """Add `add` to the counter with the key `note`, which starts at 0, and return the new value."""
        return int(self._store.add(f"{self._key}/{note}", add))
