"""The format and the compression of a file, derived from its name.

`train.jsonl.zst` contains JSON lines and is compressed with zstd. For a URL, the path counts, or else a file name in
its query. If the name reveals nothing, the format is `unknown`. Such a file is read only if the user gave it by name;
then its first bytes decide (sniff.py).
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".xz": "xz", ".bz2": "bz2"}


FORMATS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".jsonlines": "lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".warc": "warc",
    ".wet": "warc",
}


# These have their own compression inside. Files that are compressed once more are not supported.
BINARY_FORMATS = ("parquet", "arrow")


# Prose, markup and source code: one file is one document.
_TEXT_SUFFIXES = (
    ".txt .text .md .markdown .mdx .rst .adoc .org .tex .bib .srt .vtt .po .html .htm .xhtml .css .scss .less .xml "
    ".py .pyi .pyx .r .jl .m .f .f90 .for .c .h .cc .cpp .cxx .hh .hpp .cu .cuh .cs .java .kt .kts .scala .groovy "
    ".clj .go .rs .swift .mm .d .zig .nim .v .sv .vhd .vhdl .js .mjs .cjs .jsx .ts .tsx .vue .svelte .php .rb .pl "
    ".pm .lua .tcl .hs .ml .mli .fs .ex .exs .erl .lisp .el .scm .rkt .lean .agda .idr .coq .thy .dart .sh .bash "
    ".zsh .fish .ps1 .bat .sql .proto .graphql .cmake .mk .gradle .tf .yaml .yml .toml .ini .cfg .conf .s .asm "
    ".sol .wat .patch .diff"
)


TEXT_SUFFIXES = frozenset(_TEXT_SUFFIXES.split())


# The choices of `--format`.
CHOICES = ("jsonl", "json", "csv", "tsv", "parquet", "arrow", "warc", "text")


# In a folder with files of records, these files describe the records: the card and the licence of a Hub dataset.
CARD = re.compile(r"(readme|license|licence|copying|notice|changelog|citation|contributing|authors)\b.*", re.IGNORECASE)


# Files that the `datasets` library and Hub tools write beside the data.
STATE_FILES = frozenset(["state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"])


class Format(NamedTuple):
    """The format of a file ("unknown" if the name does not reveal it) and its compression ("" if none)."""

    kind: str
    compression: str


def format_of(name: str) -> Format:
    """Return the format and the compression of a file or a URL, by its name."""
    if not re.match(r"[a-z][a-z0-9+.-]*://", name):
        return _by_suffix(name)
    try:
        url = urlsplit(name)
        names = [unquote(url.path), *(value.rstrip('"; ') for _, value in parse_qsl(url.query))]
    except ValueError:  # not a valid URL: opening it will raise the error
        names = [name]
    formats = [_by_suffix(candidate) for candidate in names]
    return next((found for found in formats if found.kind != "unknown"), formats[0])


def _by_suffix(name: str) -> Format:
    """Return the format and the compression by the suffixes of a file name, such as a.jsonl.gz."""
    stem, dot, suffix = name.rsplit("/", 1)[-1].lower().rpartition(".")
    compression = COMPRESSIONS.get(dot + suffix, "")
    if compression:
        _, dot, suffix = stem.rpartition(".")
    suffix = dot + suffix
    kind = FORMATS.get(suffix, "text" if suffix in TEXT_SUFFIXES else "unknown")
    return Format("unknown" if compression and kind in BINARY_FORMATS else kind, compression)
