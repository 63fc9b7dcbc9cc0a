"""`packspeed inspect`: what a dataset holds, from its manifest and the quick check of its files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from packspeed.data.storage.manifest import check_files, load_manifest


def inspect_dataset(path: str | Path) -> dict[str, Any]:
    """What a dataset holds, from its manifest and the quick check alone: milliseconds at any size."""
    folder, manifest = Path(path), load_manifest(path)
    check_files(folder, manifest)
    splits = {
        split: {"tokens": manifest.split_tokens(split), "documents": manifest.split_documents(split)}
        for split in ("train", "val")
    }
    return {
        "path": str(folder),
        "splits": splits,
        "shards": len(manifest.shards),
        "bytes": sum(shard.bin_bytes + shard.idx_bytes for shard in manifest.shards),
        "dtype": manifest.dtype,
        "tokenizer": dataclasses.asdict(manifest.tokenizer),
        "split": dataclasses.asdict(manifest.split),
        "source": dataclasses.asdict(manifest.source),
        "fingerprint": manifest.fingerprint,
    }
