"""Token files of other projects that can be imported and exported, and how to tell them apart.

    megatron    PREFIX.bin, PREFIX.idx    MMIDIDX v1; uint16 or int32; a document is one or more sequences
    nanogpt     NAME.bin                  uint16, nothing else; documents end with EOT
    llmc        NAME.bin                  256 int32 (magic, version, tokens, 0 ...), then tokens; EOT begins documents:
                                          magic 20240520, version 1, uint16 (GPT-2; modded-nanogpt too) or
                                          magic 20240801, version 7, uint32 (Llama 3)
    mds         a folder                  see mds.py

Sources: megatron/core/datasets in https://github.com/NVIDIA/Megatron-LM, data/openwebtext/prepare.py in
https://github.com/karpathy/nanoGPT, dev/data/data_common.py in https://github.com/karpathy/llm.c.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Literal

from packspeed.data.errors import UsageError

Kind = Literal["megatron", "nanogpt", "llmc", "mds"]


KINDS = ("megatron", "nanogpt", "llmc", "mds")


PIECE_TOKENS = 2**22


LLMC_HEADER_BYTES = 1024


LLMC = {20240520: (1, "uint16"), 20240801: (7, "uint32")}


def detect(path: str) -> Kind:
    """The format of a path. UsageError if it is none of them."""
    if Path(path + ".idx").is_file() and Path(path + ".bin").is_file():
        return "megatron"
    if Path(path).is_dir() and (Path(path) / "index.json").is_file():
        return "mds"
    if not Path(path).is_file():
        raise UsageError(f"{path} is neither a file nor the prefix of a .bin and an .idx file. Check the path.")
    with open(path, "rb") as stream:
        head = stream.read(4)
    return "llmc" if len(head) == 4 and struct.unpack("<i", head)[0] in LLMC else "nanogpt"
