"""Which files, URLs and Hub datasets a preparation reads, and in which order.

    a file                            its format is chosen by its name (formats.py), else by its first bytes
    a folder                          the files of known formats below it except hidden ones, sorted by path
    a glob, ** for any depth          expanded, sorted by path; a folder that matches is read as a folder
    http://, https://                 downloaded
    s3://, gs://, hf://, ...          a file, folder or glob in any store that fsspec opens
    hf:OWNER/NAME[:CONFIG][@SPLIT]    a Hub dataset, streamed
    -                                 standard input

Links to folders are followed, each folder once. What a folder or a glob holds and is not read is listed with the
reason: unknown formats, state files of `datasets`, the README beside records, datasets that packspeed wrote, broken
links. `include` and `exclude` are glob patterns, matched on the path below the folder or below the glob's first folder.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from packspeed.data.errors import DataError, UsageError
from packspeed.data.read.formats import CARD, CHOICES, STATE_FILES, format_of
from packspeed.data.read.stores import DOWNLOADED, Store, is_url, open_store

STDIN = "-"


DATASET_FILE = "manifest.json"  # of a dataset that packspeed wrote


DATASET_FORMAT = b'"packspeed-tokens"'


NO_RECORDS = ("text", "unknown")


@dataclass(frozen=True)
class Source:
    """One file, URL or Hub dataset, or a part of it. `found` is True if a folder or a glob led to it.

    `start` and `end` bound the part: bytes of plain lines (at line ends), row groups of parquet, batches of arrow,
    shards of a Hub dataset. An `end` of -1 is the end of the file. `copy` is a local copy of its content, if there is
    one.
    """

    name: str
    kind: str  # text, lines, json, csv, tsv, parquet, arrow, warc, hub; unknown: by its first bytes
    found: bool = False
    start: int = 0
    end: int = -1
    compression: str = ""  # gzip, zstd, xz, bz2
    copy: str = ""

    @property
    def location(self) -> str:
        """What to open: the local copy, else the name."""
        return self.copy or self.name


@dataclass
class SourceList:
    """The sources in the order of reading, and what was passed over, as `NAME: REASON`."""

    sources: list[Source] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)


def find_sources(
    specs: Sequence[str],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    outside: Path | None = None,
    unknown: str = "",
) -> SourceList:
    """The files, URLs and Hub datasets that `specs` name, without files in folder `outside`.

    `unknown` is the format of files whose name says none (one of formats.CHOICES). UsageError for a path that does not
    exist or contains nothing to read.
    """
    if unknown and unknown not in CHOICES:
        raise UsageError(f"--format {unknown}: choose among {', '.join(CHOICES)}.")
    search = _Search(include, exclude, outside, {"jsonl": "lines"}.get(unknown, unknown))
    for spec in specs:
        before, passed_before = len(search.result.sources), len(search.result.passed_over)
        search.add(spec)
        if len(search.result.sources) == before:
            passed = search.result.passed_over[passed_before:]
            reasons = f" Passed over: {'; '.join(passed[:3])}{'; ...' if len(passed) > 3 else ''}." if passed else ""
            raise UsageError(f"{spec} contains no files to read.{reasons} Name a folder with text files in it.")
    return search.result


def printable(name: str) -> str:
    """A name as UTF-8: names of files may be any bytes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


class _Search:
    """Collects sources, one argument after the other."""

    def __init__(self, include: Sequence[str], exclude: Sequence[str], outside: Path | None, unknown: str):
        self.include, self.exclude, self.unknown = include, exclude, unknown
        self.outside = outside.resolve() if outside is not None else None
        self.result = SourceList()

    def add(self, spec: str) -> None:
        """Add the sources of one argument. UsageError if it names nothing."""
        if spec == STDIN:
            self._add_named(spec)
        elif is_url(spec):
            if spec.startswith(DOWNLOADED):
                self._add_named(spec)
            else:
                self._add_from_store(spec)
        elif spec.startswith("hf:"):
            self.result.sources.append(Source(spec.removeprefix("hf:"), "hub"))
        elif os.path.isdir(spec):
            self._add_folder(spec)
        elif os.path.exists(spec):
            self._add_named(spec)
        elif glob.has_magic(spec):
            self._add_glob(spec)
        elif re.fullmatch(r"[\w-]+/[\w-]+(:[^/@]+)?(@[^/]+)?", spec):
            self.result.sources.append(Source(spec, "hub"))
        else:
            raise UsageError(f"{spec} does not exist. Check the path; Hub datasets are written hf:owner/name.")

    def _add_named(self, name: str) -> None:
        self.result.sources.append(self._source(name, found=False))

    def _add_folder(self, folder: str) -> None:
        if _is_dataset(folder):
            raise UsageError(f"{folder} is a dataset of tokens that packspeed wrote, not text. Name its sources.")
        self._choose(folder, list(self._walk(folder)))

    def _add_glob(self, pattern: str) -> None:
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise UsageError(f"No file matches {pattern}. Check the pattern; ** matches folders at any depth.")
        names = list[str]()
        for match in matches:
            # ** has already matched what is below the folder.
            if os.path.isdir(match) and "**" not in pattern:
                names += self._walk(match)
            elif not os.path.isdir(match):
                names.append(match)
        self._choose(_folder_of(pattern), sorted(dict.fromkeys(names)))

    def _walk(self, folder: str) -> Iterator[str]:
        """The files below a folder, without hidden ones, sorted by path. Every folder is visited once."""
        visited = {os.path.realpath(folder)}
        names = list[str]()

        def fail(error: OSError) -> None:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}. Correct it or exclude it.") from error

        for root, folders, files in os.walk(folder, followlinks=True, onerror=fail):
            for name in sorted(folders):
                path, real = os.path.join(root, name), os.path.realpath(os.path.join(root, name))
                if name.startswith(".") or self._is_outside(path):
                    folders.remove(name)
                elif real in visited:
                    folders.remove(name)
                    self._pass_over(path, "the same folder as another one that is read")
                elif _is_dataset(path):
                    folders.remove(name)
                    self._pass_over(path, "a dataset that packspeed wrote")
                visited.add(real)
            folders.sort()
            names += [os.path.join(root, name) for name in files if not name.startswith(".")]
        yield from sorted(names)

    def _add_from_store(self, url: str) -> None:
        """A file, a folder or a glob in a store that fsspec opens."""
        store = open_store(url)
        if store.is_file():
            self._add_named(url)
            return
        names = store.glob() if glob.has_magic(url) else store.find()
        if not names:
            raise UsageError(f"{url} does not exist, or holds no file. Check the URL and the credentials.")
        self._choose(_folder_of(url) if glob.has_magic(url) else url.rstrip("/"), names, store)

    def _choose(self, folder: str, names: list[str], store: Store | None = None) -> None:
        """Add those of the files in `folder` that are corpus; list the others with the reason."""
        names = [name for name in names if self._wanted(os.path.relpath(name, folder)) and not self._is_outside(name)]
        has_records = any(format_of(name).kind not in NO_RECORDS and not _is_state(name) for name in names)
        saved = _SavedDatasets(names, store)
        datasets = _dataset_folders(names, store)
        for name in saved.ordered():
            reason = saved.reason(name) or self._reason(name, has_records, store is not None)
            if os.path.dirname(name) in datasets:
                reason = "part of a dataset that packspeed wrote"
            if reason:
                self._pass_over(name, reason)
            else:
                self.result.sources.append(self._source(name, found=True))

    def _reason(self, name: str, has_records: bool, remote: bool) -> str:
        """Why a file in a folder is not read; empty if it is."""
        base, kind = os.path.basename(name), format_of(name).kind
        if not remote and not os.path.isfile(name):
            return "a broken link" if os.path.islink(name) else "not a regular file"
        if _is_state(name):
            return "describes a dataset"
        if has_records and not self.include and CARD.fullmatch(base) and kind in NO_RECORDS:
            return "describes the data beside it (read it with --include)"
        if base.startswith("cache-") and kind == "arrow":
            return "a cache of datasets"
        if kind == "unknown" and not self.unknown:
            return "its name says no known format (choose one by --format, or give the file by name)"
        return ""

    def _source(self, name: str, found: bool) -> Source:
        kind, compression = format_of(name)
        return Source(name, self.unknown or kind if kind == "unknown" else kind, found, compression=compression)

    def _wanted(self, path: str) -> bool:
        chosen = not self.include or any(fnmatchcase(path, pattern) for pattern in self.include)
        return chosen and not any(fnmatchcase(path, pattern) for pattern in self.exclude)

    def _is_outside(self, name: str) -> bool:
        """Whether a path is the folder `outside` or in it."""
        if self.outside is None or is_url(name):
            return False
        path = Path(name).resolve()
        return self.outside == path or self.outside in path.parents

    def _pass_over(self, name: str, reason: str) -> None:
        self.result.passed_over.append(f"{name}: {reason}")


class _SavedDatasets:
    """Folders that `Dataset.save_to_disk` wrote. state.json lists their files in order; others there are caches."""

    def __init__(self, names: list[str], store: Store | None):
        self.names = names
        self.files = {
            os.path.dirname(name): _data_files(_read(name, store))
            for name in names
            if os.path.basename(name) == "state.json"
        }

    def reason(self, name: str) -> str:
        """Why a file is no part of a saved dataset; empty if it is, or if there is none in its folder."""
        files = self.files.get(os.path.dirname(name))
        if not files or os.path.basename(name) in files or _is_state(name):
            return ""
        return "not among the files that state.json lists"

    def ordered(self) -> list[str]:
        """All names, those of a saved dataset in its order."""

        def key(name: str) -> tuple[PurePosixPath, int, str]:
            folder, base = os.path.split(name)
            files = self.files.get(folder) or []
            return PurePosixPath(folder), files.index(base) if base in files else len(files), base

        if not any(self.files.values()):
            return self.names
        return sorted(self.names, key=key)


def _data_files(content: bytes) -> list[str]:
    try:
        state = json.loads(content)
        return [str(record["filename"]) for record in state["_data_files"]]
    except (ValueError, LookupError, TypeError):
        return []  # another program's state.json


def _is_state(name: str) -> bool:
    return os.path.basename(name) in STATE_FILES


def _is_dataset(folder: str) -> bool:
    """Whether a folder holds a dataset of packspeed, finished or not."""
    if os.path.exists(os.path.join(folder, ".units", "job.json")):
        return True
    path = os.path.join(folder, DATASET_FILE)
    return os.path.isfile(path) and DATASET_FORMAT in _read(path, None)


def _dataset_folders(names: list[str], store: Store | None) -> set[str]:
    """The folders of files that are datasets of packspeed."""
    if store is None:
        return {folder for folder in {os.path.dirname(name) for name in names} if _is_dataset(folder)}
    manifests = [name for name in names if os.path.basename(name) == DATASET_FILE]
    return {os.path.dirname(name) for name in manifests if DATASET_FORMAT in _read(name, store)}


def _read(name: str, store: Store | None) -> bytes:
    """The first bytes of a small file; empty if it cannot be read."""
    try:
        if store is not None:
            return store.head(name, 2**20)
        with open(name, "rb") as stream:
            return stream.read(2**20)
    except OSError:
        return b""


def _folder_of(pattern: str) -> str:
    """The part of a glob before its first pattern."""
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:first]) or ("/" if pattern.startswith("/") else ".")
