"""The memory limit of this process's cgroup, and how many of its processes the kernel's OOM killer has ended.

Containers, SLURM and systemd set such limits. Both versions of cgroups are read:

    v2   one tree at /sys/fs/cgroup: memory.max, memory.peak, memory.events
    v1   /sys/fs/cgroup/memory: memory.limit_in_bytes, memory.max_usage_in_bytes, memory.oom_control

https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


LIMITS = {"memory.max": "memory.peak", "memory.limit_in_bytes": "memory.max_usage_in_bytes"}  # v2, v1: limit -> peak


UNLIMITED = 2**60  # v1 writes nearly 2**63 for no limit, v2 `max`


def groups(root: Path = ROOT, own: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """The folders of our memory cgroup and its parents, innermost first, as far as they are visible from here."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return []
    for controllers, top in (("memory", root / "memory"), ("", root)):
        path = next((line[2] for line in lines if line[1] == controllers), None)
        if path is None or (controllers == "" and not (root / "cgroup.controllers").exists()):
            continue
        inner = top / path.lstrip("/")
        # A container often sees its own cgroup as the root, under a path that only the host knows.
        folders = [inner, *inner.parents] if inner.is_dir() else [top]
        return [folder for folder in folders if folder == top or top in folder.parents]
    return []


def oom_kills(folders: list[Path], vmstat: Path = Path("/proc/vmstat")) -> int:
    """Number of processes that the OOM killer has ended: in our cgroup if it counts them, else here since boot."""
    for path in [folder / name for folder in folders[:1] for name in ("memory.events", "memory.oom_control")] + [
        vmstat
    ]:
        count = _number(path, "oom_kill")
        if count is not None:
            return count
    return 0


def limit(folders: list[Path]) -> tuple[int, int, str] | None:
    """(limit in bytes, peak use in bytes, cgroup) of the tightest limit that applies to us; None without a limit."""
    limits = []
    for folder in folders:
        for limit_name, peak_name in LIMITS.items():
            value = _number(folder / limit_name)
            if value is not None and value < UNLIMITED:
                limits.append((value, _number(folder / peak_name) or 0, str(folder)))
    return min(limits, default=None)


def _number(path: Path, key: str = "") -> int | None:
    """The first number in a file, or the one after `key`; None if there is none."""
    try:
        words = path.read_text().split()
        return int(words[words.index(key) + 1] if key else words[0])
    except (OSError, ValueError, IndexError):
        return None
