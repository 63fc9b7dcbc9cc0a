"""Check that a checkpoint is complete: it has exactly the files that its manifest lists, with their sizes and hashes.

    find_damage(folder)                 this process reads every file, at about 10 GB/s from the page cache
    find_damage(folder, topology)       all ranks together: each reads about bytes / ranks, and all get the same result

Rank 0 reads the manifest and lists the folder. `shares` divides the files. A rank usually gets the files that DeepSpeed
wrote for that rank: it loads them next, and then they are in the page cache of its host. A file is never divided,
because its hash needs all its bytes in order: at ZeRO stage 0, one rank reads nearly everything.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from packspeed.data.storage.hashing import FileHash, hash_file
from packspeed.launch.checkpoint.manifest import MANIFEST, UNIVERSAL, list_checkpoints, read_manifest
from packspeed.launch.config.errors import UserError

if TYPE_CHECKING:
    from packspeed.launch.engine.distributed import Topology

ALIKE_BYTES = 2**20  # sizes that differ by less count as equal when the files are divided


class _Contents(NamedTuple):
    """The files that a checkpoint's manifest lists, and the damage that rank 0 finds without reading them."""

    listed: dict[str, FileHash]
    damage: list[str]  # a manifest that cannot be read, or files that it does not list


def find_damage(folder: Path, topology: Topology | None = None) -> list[str]:
    """Check a checkpoint. Returns a line per missing, truncated, changed, unreadable or unexpected file; [] if it is
    complete.

    With a topology this is a collective: every rank must call it, and all get the same lines.
    """
    listed, unexpected = topology.on_rank0(lambda: _contents(folder)) if topology else _contents(folder)
    if topology is None or not listed:
        found = _check(folder, listed)
    else:
        from packspeed.launch.engine.shared_work import SharedWork  # here, because it loads DeepSpeed

        # It waits as long as any rank makes progress. A collective would fail after 30 minutes.
        work = SharedWork(topology, "verifying")
        own = shares(listed, topology.world)[topology.rank]
        found = _check(folder, {name: listed[name] for name in own}, work.progress)
        work.wait()
        found = {name: line for of_rank in topology.gather(found) for name, line in of_rank.items()}
    return [found[name] for name in listed if name in found] + unexpected


def shares(files: Mapping[str, FileHash], ranks: int) -> list[list[str]]:
    """Divide files among ranks, so that all ranks read about the same number of bytes. Returns the names for each rank.

    Greedy: the largest file first, each to the rank with the fewest bytes. Files of about the same size are given out
    in the order of the numbers in their names, and ranks with about the same load in the order of ranks. So the file
    of rank 7 goes to rank 7 if every rank has written one of that size.
    """

    def order(name: str) -> tuple[int, list[int], str]:
        return -(files[name]["bytes"] // ALIKE_BYTES), [int(number) for number in re.findall(r"\d+", name)], name

    # A heap. An entry is (load in units of ALIKE_BYTES, number of files, rank, load in bytes).
    loads = [(0, 0, rank, 0) for rank in range(ranks)]
    of_ranks: list[list[str]] = [[] for _ in range(ranks)]
    for name in sorted(files, key=order):
        _, count, rank, load = loads[0]
        load += files[name]["bytes"]
        heapq.heapreplace(loads, (load // ALIKE_BYTES, count + 1, rank, load))
        of_ranks[rank].append(name)
    return of_ranks


def _contents(folder: Path) -> _Contents:
    """Read the manifest and list the folder. Returns the listed files, and the damage that is visible without reading
    them.
    """
    try:
        listed = read_manifest(folder)["files"]
    except UserError as error:
        return _Contents({}, [str(error)])
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    # The converted copy is written later than the manifest, and has its own manifest.
    present = {name for name in present if not name.startswith((f"{UNIVERSAL}/", f".{UNIVERSAL}"))}
    unexpected = sorted(present - set(listed) - {MANIFEST})
    return _Contents(listed, [f"{folder / name} is not listed in {MANIFEST}" for name in unexpected])


def _check(folder: Path, files: Mapping[str, FileHash], progress: Callable[[], object] = int) -> dict[str, str]:
    """Compare files in `folder` with the sizes and hashes in `files`. Returns {name: what is wrong}.

    Calls `progress` after every 4 MiB that it reads.
    """
    damage = {}
    for name, expected in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                damage[name] = f"{path} has {size:,} bytes, but according to {MANIFEST} it had {expected['bytes']:,}"
            elif hash_file(path, progress) != expected:
                damage[name] = f"{path} was changed: its hash is not the one in {MANIFEST}"
        except FileNotFoundError:
            damage[name] = f"{path} is missing"
        except OSError as error:
            damage[name] = f"{path} cannot be read: {error.strerror}"
    return damage


def newest_complete(
    folder: Path, log: Callable[[str], None], topology: Topology | None = None
) -> tuple[Path | None, list[Path]]:
    """Return (the newest complete checkpoint in `folder` or None, the newer checkpoints that are damaged).

    Logs why they are damaged. Raises UserError if the folder cannot be read. With a topology this is a collective.
    """
    damaged: list[Path] = []
    for path in checkpoints_in(folder, topology):
        damage = find_damage(path, topology)
        if not damage:
            return path, damaged
        log(f"skipping checkpoint {path.name}, which is damaged: {'; '.join(damage)}")
        damaged.append(path)
    return None, damaged


def checkpoints_in(folder: Path, topology: Topology | None) -> list[Path]:
    """Return the checkpoint folders in `folder`, newest first, as rank 0 sees them, without checking them.

    Raises UserError if `folder` cannot be read. With a topology this is a collective.
    """
    try:
        return topology.on_rank0(lambda: list_checkpoints(folder)) if topology else list_checkpoints(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}. Is the file system mounted?") from None
