"""Which files, URLs and Hub datasets a preparation reads, and in which order.

    a file                            its format is chosen by its name
    a folder                          all files below it except hidden ones, sorted by path
    a glob, ** for any depth          expanded, sorted by path
    http://, https://                 fetched
    hf:OWNER/NAME[:CONFIG][@SPLIT]    a Hub dataset, streamed

Files found in a folder or by a glob are skipped and counted if they are not UTF-8 text; a file that was named must be
valid. `include` and `exclude` are glob patterns for the files in folders, matched on the path below the folder.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from packspeed.data.errors import UsageError

LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".jsonl.zst", ".ndjson.zst", ".json.zst")


URLS = ("http://", "https://")


@dataclass(frozen=True)
class Source:
    """One file, URL or Hub dataset, or a part of it. `found` is True if a folder or a glob led to it.

    `start` and `end` bound the part: bytes of plain lines (at line ends), row groups of parquet, shards of a Hub
    dataset. An `end` of -1 is the end of the file.
    """

    name: str
    kind: str  # text, lines, parquet, hub
    found: bool = False
    start: int = 0
    end: int = -1


def find_sources(
    specs: Sequence[str], *, include: Sequence[str] = (), exclude: Sequence[str] = (), outside: Path | None = None
) -> list[Source]:
    """The files, URLs and Hub datasets that `specs` name, in the order of reading, without files in folder `outside`.

    UsageError for a path that does not exist or contains nothing to read.
    """
    sources: list[Source] = []
    for spec in specs:
        found = [
            source
            for source in _expand(spec, include, exclude)
            if not (source.found and outside is not None and outside.resolve() in Path(source.name).resolve().parents)
        ]
        if not found:
            raise UsageError(f"{spec} contains no files to read. Name a folder with text files in it.")
        sources += found
    return sources


def _expand(spec: str, include: Sequence[str], exclude: Sequence[str]) -> list[Source]:
    """The sources of one argument. UsageError if it names nothing."""
    if spec.startswith("hf:"):
        return [Source(spec.removeprefix("hf:"), "hub")]
    if spec.startswith(URLS) or os.path.isfile(spec):
        return [_source_of(spec, found=False)]
    if os.path.isdir(spec):
        return [_source_of(name, found=True) for name in _walk(spec, include, exclude)]
    if glob.has_magic(spec):
        matches = sorted(name for name in glob.glob(spec, recursive=True) if os.path.isfile(name))
        if matches:
            return [_source_of(name, found=True) for name in matches]
        raise UsageError(f"No file matches {spec}. Check the pattern; ** matches folders at any depth.")
    if re.fullmatch(r"[\w-]+/[\w-]+(:[^/@]+)?(@[^/]+)?", spec):
        return [Source(spec, "hub")]
    raise UsageError(f"{spec} does not exist. Check the path; Hub datasets are written hf:owner/name.")


def _walk(folder: str, include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """The chosen files below a folder, without hidden ones, sorted by path."""
    names = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [os.path.join(root, name) for name in files if not name.startswith(".")]
    return sorted(name for name in names if os.path.isfile(name) and _chosen(name, folder, include, exclude))


def _chosen(name: str, folder: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    path = os.path.relpath(name, folder)
    wanted = not include or any(fnmatchcase(path, pattern) for pattern in include)
    return wanted and not any(fnmatchcase(path, pattern) for pattern in exclude)


def _source_of(name: str, found: bool) -> Source:
    lower = name.lower()
    if lower.endswith(LINES):
        return Source(name, "lines", found)
    return Source(name, "parquet" if lower.endswith(".parquet") else "text", found)
