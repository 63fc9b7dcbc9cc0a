"""Find the files, URLs and Hub datasets that `prepare` reads, and their order.

    a file                            its name decides the format (formats.py), or else its first bytes (sniff.py)
    a folder                          the files of known formats below it except hidden ones, sorted by path
    a glob, ** for any depth          expanded, sorted by path; a folder that matches is read as a folder
    http://, https://                 downloaded
    s3://, gs://, hf://, ...          a file, folder or glob in any store that fsspec opens
    hf:OWNER/NAME[:CONFIG][@SPLIT]    a Hub dataset, streamed
    -                                 standard input

Links to folders are followed, but each folder is read once. Files in a folder or a glob that are not read are listed
with the reason: unknown formats, state files of the `datasets` library, a README beside records, datasets that
Packspeed wrote, broken links. `include` and `exclude` are glob patterns. They are matched with a file's path below the
folder, or below the part of the glob that has no pattern.
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
    """One file, URL or Hub dataset, or a part of it.

    found: whether it was found through a folder or a glob; False if the user gave it by name.
    start, end: the part to read is start .. end - 1, or up to the end of the file if `end` is -1. They count bytes of
    uncompressed lines (and are at line ends), row groups of parquet, batches of arrow or shards of a Hub dataset.
    copy: the path of a local copy, or "".
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
        """Return the path or URL to open: the local copy if there is one, otherwise the name."""
        return self.copy or self.name


@dataclass
class SourceList:
    """The sources in the order in which they are read, and the files that were skipped, as `NAME: REASON`."""

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
    """Return the sources for the user's arguments `specs`: files, folders, globs, URLs and names of Hub datasets.

    include, exclude: glob patterns that select files of folders and globs by their path below the folder. outside:
    files in this folder are left out. unknown: the format (one of formats.CHOICES) of files whose names do not reveal
    it; "": skip such files. Raises UsageError if a path does not exist or contains nothing to read.
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
    """Return a file name as text that UTF-8 can encode. Bytes that are not UTF-8 become escapes such as \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


class _Search:
    """Finds the files for the user's arguments, one call of `add` each, and collects them in `result`.

    include, exclude: glob patterns that select files of folders and globs. outside: files in this folder are left out.
    unknown: the format of files whose names do not reveal it; "": skip such files.
    """

    def __init__(self, include: Sequence[str], exclude: Sequence[str], outside: Path | None, unknown: str):
        self.include, self.exclude, self.unknown = include, exclude, unknown
        self.outside = outside.resolve() if outside is not None else None
        self.result = SourceList()

    def add(self, spec: str) -> None:
        """Add the files of one argument: a path, glob, URL, Hub name or `-`. Raises UsageError if it does not exist."""
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
        """Add a file, a download URL or standard input (`-`) that the user gave by name."""
        self.result.sources.append(self._source(name, found=False))

    def _add_folder(self, folder: str) -> None:
        """Add the files below a folder. Raises UsageError if it is a dataset of tokens."""
        if _is_dataset(folder):
            raise UsageError(
                f"{folder} is a dataset of tokens that Packspeed wrote, not text. Give the text that it was made from."
            )
        self._choose(folder, list(self._walk(folder)))

    def _add_glob(self, pattern: str) -> None:
        """Add the files that match a pattern, and the files below folders that match it."""
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise UsageError(f"No file matches {pattern}. Check the pattern; ** matches folders at any depth.")
        names = list[str]()
        for match in matches:
            # With **, the files below a matching folder have been matched too.
            if os.path.isdir(match) and "**" not in pattern:
                names += self._walk(match)
            elif not os.path.isdir(match):
                names.append(match)
        self._choose(_folder_of(pattern), sorted(dict.fromkeys(names)))

    def _walk(self, folder: str) -> Iterator[str]:
        """Yield the files below a folder, sorted by path, without hidden ones. Each folder is visited once."""
        visited = {os.path.realpath(folder)}
        names = list[str]()

        def fail(error: OSError) -> None:
            raise DataError(
                f"{error.filename} cannot be read: {error.strerror}. Correct that, or name only readable folders."
            ) from error

        for root, folders, files in os.walk(folder, followlinks=True, onerror=fail):
            for name in sorted(folders):
                path, real = os.path.join(root, name), os.path.realpath(os.path.join(root, name))
                if name.startswith(".") or self._is_outside(path):
                    folders.remove(name)
                elif real in visited:
                    folders.remove(name)
                    self._pass_over(path, "a link to a folder that is read already")
                elif _is_dataset(path):
                    folders.remove(name)
                    self._pass_over(path, "a dataset that packspeed wrote")
                visited.add(real)
            folders.sort()
            names += [os.path.join(root, name) for name in files if not name.startswith(".")]
        yield from sorted(names)

    def _add_from_store(self, url: str) -> None:
        """Add the files that a URL of a store (such as s3://) names: a file, the files of a folder, or those of a
        glob.
        """
        store = open_store(url)
        if store.is_file():
            self._add_named(url)
            return
        names = store.glob() if glob.has_magic(url) else store.find()
        if not names:
            raise UsageError(f"{url} does not exist, or contains no file. Check the URL and the credentials.")
        self._choose(_folder_of(url) if glob.has_magic(url) else url.rstrip("/"), names, store)

    def _choose(self, folder: str, names: list[str], store: Store | None = None) -> None:
        """Add those of the files `names` below `folder` that contain text, and record the others with the reason.

        store: where the files are; None: on a local disk.
        """
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
        """Return why a file in a folder is not read, or "" if it is read.

        has_records: whether the folder has files of records, such as jsonl or parquet. remote: whether it is in a
        store.
        """
        base, kind = os.path.basename(name), format_of(name).kind
        if not remote and not os.path.isfile(name):
            return "a broken link" if os.path.islink(name) else "not a regular file"
        if _is_state(name):
            return "describes a dataset"
        if has_records and not self.include and CARD.fullmatch(base) and kind in NO_RECORDS:
            return "describes the data beside it (to read it, use --include)"
        if base.startswith("cache-") and kind == "arrow":
            return "a cache of datasets"
        if kind == "unknown" and not self.unknown:
            return "its name reveals no known format (choose one with --format, or give the file by name)"
        return ""

    def _source(self, name: str, found: bool) -> Source:
        """Return the Source of a file. found: whether it was found in a folder or by a pattern."""
        kind, compression = format_of(name)
        return Source(name, self.unknown or kind if kind == "unknown" else kind, found, compression=compression)

    def _wanted(self, path: str) -> bool:
        """Return whether --include and --exclude select a file. path: its path below the folder that is searched."""
        chosen = not self.include or any(fnmatchcase(path, pattern) for pattern in self.include)
        return chosen and not any(fnmatchcase(path, pattern) for pattern in self.exclude)

    def _is_outside(self, name: str) -> bool:
        """Return whether a path is the folder `outside`, whose files are left out, or is in it."""
        if self.outside is None or is_url(name):
            return False
        path = Path(name).resolve()
        return self.outside == path or self.outside in path.parents

    def _pass_over(self, name: str, reason: str) -> None:
        """Record in `result.passed_over` that a file is skipped, with the reason."""
        self.result.passed_over.append(f"{name}: {reason}")


class _SavedDatasets:
    """The folders among `names` that `Dataset.save_to_disk` wrote.

    The state.json of such a folder lists its files in order. All other files in it are caches.
    """

    def __init__(self, names: list[str], store: Store | None):
        self.names = names
        self.files = {
            os.path.dirname(name): _data_files(_read(name, store))
            for name in names
            if os.path.basename(name) == "state.json"
        }

    def reason(self, name: str) -> str:
        """Return why a file in the folder of a saved dataset is not part of it; "" for all other files."""
        files = self.files.get(os.path.dirname(name))
        if not files or os.path.basename(name) in files or _is_state(name):
            return ""
        return "not among the files that state.json lists"

    def ordered(self) -> list[str]:
        """Return `names`, with the files of each saved dataset in the order in which its state.json lists them."""

        def key(name: str) -> tuple[PurePosixPath, int, str]:
            folder, base = os.path.split(name)
            files = self.files.get(folder) or []
            return PurePosixPath(folder), files.index(base) if base in files else len(files), base

        if not any(self.files.values()):
            return self.names
        return sorted(self.names, key=key)


def _data_files(content: bytes) -> list[str]:
    """Return the names of the data files in a state.json of the `datasets` library; [] for another file."""
    try:
        state = json.loads(content)
        return [str(record["filename"]) for record in state["_data_files"]]
    except (ValueError, LookupError, TypeError):
        return []  # the state.json of another program


def _is_state(name: str) -> bool:
    """Return whether this is the name of a metadata file of `datasets`, such as state.json, and not of data."""
    return os.path.basename(name) in STATE_FILES


def _is_dataset(folder: str) -> bool:
    """Return whether a folder contains a dataset that Packspeed wrote, complete or not."""
    if os.path.exists(os.path.join(folder, ".units", "job.json")):
        return True
    path = os.path.join(folder, DATASET_FILE)
    return os.path.isfile(path) and DATASET_FORMAT in _read(path, None)


def _dataset_folders(names: list[str], store: Store | None) -> set[str]:
    """Return those folders of the files `names` that are datasets which Packspeed wrote."""
    if store is None:
        return {folder for folder in {os.path.dirname(name) for name in names} if _is_dataset(folder)}
    manifests = [name for name in names if os.path.basename(name) == DATASET_FILE]
    return {os.path.dirname(name) for name in manifests if DATASET_FORMAT in _read(name, store)}


def _read(name: str, store: Store | None) -> bytes:
    """Return up to a megabyte from the start of a file, or b"" if it cannot be read. store: None for a local file."""
    try:
        if store is not None:
            return store.head(name, 2**20)
        with open(name, "rb") as stream:
            return stream.read(2**20)
    except OSError:
        return b""


def _folder_of(pattern: str) -> str:
    """Return the folder of a glob: the part of the path before its first pattern."""
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:first]) or ("/" if pattern.startswith("/") else ".")
