"""The memory limit of this process's cgroup, and how many processes the kernel's OOM killer has ended in it.

Containers, SLURM and systemd set such limits. Both versions of cgroups are supported:

    v2   one tree at /sys/fs/cgroup: memory.max, memory.peak, memory.events
    v1   /sys/fs/cgroup/memory: memory.limit_in_bytes, memory.max_usage_in_bytes, memory.oom_control

https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


LIMITS = {"memory.max": "memory.peak", "memory.limit_in_bytes": "memory.max_usage_in_bytes"}  # limit -> peak (v2, v1)


UNLIMITED = 2**60  # a limit above this is none: without a limit, v1 reports nearly 2**63 (and v2 the word `max`)


def groups(root: Path = ROOT, own: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """Return the folders of this process's memory cgroup and its parents, innermost first, as far as they are visible.

    Returns an empty list if there is no memory cgroup.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return []
    for controllers, top in (("memory", root / "memory"), ("", root)):
        path = next((line[2] for line in lines if line[1] == controllers), None)
        if path is None or (controllers == "" and not (root / "cgroup.controllers").exists()):
            continue
        inner = top / path.lstrip("/")
        # In a container, the process's own cgroup is often visible as the root, and the path is that on the host.
        folders = [inner, *inner.parents] if inner.is_dir() else [top]
        return [folder for folder in folders if folder == top or top in folder.parents]
    return []


def oom_kills(folders: list[Path], vmstat: Path = Path("/proc/vmstat")) -> int:
    """Return the number of processes that the OOM killer has ended in the memory cgroup `folders[0]`.

    If that cgroup has no count, return the count of this machine since it was booted. `folders` is the result of
    groups.
    """
    for path in [folder / name for folder in folders[:1] for name in ("memory.events", "memory.oom_control")] + [
        vmstat
    ]:
        count = _number(path, "oom_kill")
        if count is not None:
            return count
    return 0


def limit(folders: list[Path]) -> tuple[int, int, str] | None:
    """Return (limit in bytes, peak use in bytes, folder of the cgroup) of the lowest memory limit in `folders`.

    Returns None if there is no limit. `folders` is the result of groups.
    """
    limits = []
    for folder in folders:
        for limit_name, peak_name in LIMITS.items():
            value = _number(folder / limit_name)
            if value is not None and value < UNLIMITED:
                limits.append((value, _number(folder / peak_name) or 0, str(folder)))
    return min(limits, default=None)


def _number(path: Path, key: str = "") -> int | None:
    """Return the number at the start of a file, or after the word `key`; None if there is none or no such file."""
    try:
        words = path.read_text().split()
        return int(words[words.index(key) + 1] if key else words[0])
    except (OSError, ValueError, IndexError):
        return None
