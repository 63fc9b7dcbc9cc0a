"""The formats of other projects' token files that can be imported and exported, and how a file's format is detected.

    megatron    PREFIX.bin, PREFIX.idx    MMIDIDX 1; any integers; a document is one or more sequences (megatron.py)
    nanogpt     NAME.bin                  only tokens; EOT is at the end or at the beginning of documents (flat.py)
    npy         NAME.npy                  numpy.save: a header with the type, then tokens as in nanogpt; import only
    llmc        NAME.bin                  256 int32 (magic, version, tokens, 0 ...), then tokens; documents begin with
                                          EOT: magic 20240520, version 1, uint16 (GPT-2; modded-nanogpt too) or
                                          magic 20240801, version 7, uint32 (Llama 3)
    mds         a folder                  MosaicML's streaming format (mds.py)

Sources: megatron/core/datasets in https://github.com/NVIDIA/Megatron-LM, data/openwebtext/prepare.py in
https://github.com/karpathy/nanoGPT, dev/data/data_common.py in https://github.com/karpathy/llm.c.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Literal

from packspeed.data.errors import UsageError

Kind = Literal["megatron", "nanogpt", "llmc", "mds"]


SourceKind = Literal["megatron", "nanogpt", "llmc", "mds", "npy"]


KINDS = ("megatron", "nanogpt", "llmc", "mds")


PIECE_TOKENS = 2**22


LLMC_HEADER_BYTES = 1024


LLMC = {20240520: (1, "uint16"), 20240801: (7, "uint32")}


NPY_MAGIC = b"\x93NUMPY"


HEAD_BYTES = 2**16


# First bytes of files that are not token files -> what the file is and what the user can do.
OTHER_FILES = {
    b"PK\x03\x04": "a zip archive (.npz, .pt). Save the token ids with numpy.save",
    b"PAR1": "a parquet file. If it holds text, use `packspeed prepare`; else save the token ids with numpy.save",
    b"ARROW1": "an Arrow file. If it holds text, use `packspeed prepare`; else save the token ids with numpy.save",
    b"\x1f\x8b\x08": "compressed with gzip. Decompress it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd. Decompress it",
    b"\xfd7zXZ\x00": "compressed with xz. Decompress it",
    b"\x89HDF\r\n": "an HDF5 file. Save the token ids with numpy.save",
    b"MMIDIDX\x00\x00": "a Megatron index without its .bin. Copy both files",
}


def megatron_prefix(path: str) -> str | None:
    """Return the prefix PREFIX if PREFIX.bin and PREFIX.idx exist and `path` is the prefix or one of the files.

    Otherwise return None.
    """
    for prefix in (path, path.removesuffix(".bin"), path.removesuffix(".idx")):
        if Path(prefix + ".idx").is_file() and Path(prefix + ".bin").is_file():
            return prefix
    return None


def detect(path: str) -> SourceKind:
    """Return the format of a file, a folder or a Megatron prefix, detected from names and first bytes.

    Raises UsageError if it has none of the formats. The message says what the file is and how to convert it.
    """
    if megatron_prefix(path) is not None:
        return "megatron"
    if Path(path).is_dir():
        return _detect_folder(Path(path))
    if not Path(path).is_file():
        raise UsageError(f"{path} is neither a file nor the prefix of a .bin and an .idx file. Check the path.")
    return _detect_file(Path(path))


def _detect_file(path: Path) -> SourceKind:
    """Return the format of a file of tokens. If it cannot be imported, raises UsageError that says what it is."""
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    if head.startswith(NPY_MAGIC):
        return "npy"
    if len(head) >= 4 and struct.unpack("<i", head[:4])[0] in LLMC:
        return "llmc"
    other = next((what for magic, what in OTHER_FILES.items() if head.startswith(magic)), None)
    if other is None and head[8:10] == b'{"':
        other = "a safetensors file. Save the token ids with numpy.save"
    if other is None and _is_text(head):
        other = "text, not tokens. Use `packspeed prepare`"
    if other is not None:
        raise UsageError(f"{path} is {other}.")
    if path.suffix == ".mds":
        raise UsageError(f"{path} is one shard of an MDS dataset. Give its folder, which contains an index.json.")
    if _is_litdata(path.parent):
        raise _litdata(path.parent)
    return "nanogpt"


def _is_text(head: bytes) -> bool:
    """Return whether the first bytes of a file are UTF-8 without control characters.

    Files of tokens contain control characters: an id below 256 has a zero byte.
    """
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # an error in the last bytes is a character that the cut has divided
            return False
        text = head[: error.start].decode()
    return bool(text) and not re.search(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]", text)


def _detect_folder(path: Path) -> SourceKind:
    """Return the format of a folder of tokens ("mds"). If it has none of the formats, raises UsageError that says what
    it is.
    """
    if _is_litdata(path):
        raise _litdata(path)
    if (path / "index.json").is_file():
        return "mds"
    if (path / "manifest.json").is_file():
        raise UsageError(f"{path} is a Packspeed dataset already: train on it. To import it, give its .bin files.")
    inner = sorted(index.parent.name for index in path.glob("*/index.json"))
    if inner:
        raise UsageError(f"{path} contains several MDS datasets ({', '.join(inner[:5])}). Give them one by one.")
    raise UsageError(
        f"{path} is a folder without an index.json, so it is not an MDS dataset. Give the token files in it, for "
        f"example {path}/*.bin. If it contains text, use `packspeed prepare`."
    )


def _is_litdata(folder: Path) -> bool:
    """Return whether a folder is a LitData dataset."""
    try:
        index = json.loads((folder / "index.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False  # if the index is damaged, mds.py reports it
    return isinstance(index, dict) and "chunks" in index


def _litdata(folder: Path) -> UsageError:
    """Return the error for a LitData dataset."""
    return UsageError(
        f"{folder} is a LitData dataset, which cannot be imported. Read it with litdata.StreamingDataset, save the "
        f"token ids with numpy.save, and import the .npy file."
    )
