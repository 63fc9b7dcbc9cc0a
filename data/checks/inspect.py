"""`packspeed inspect` for datasets: a summary from the manifest. Only the sizes of the files are checked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from packspeed.data.storage.manifest import check_files, load_manifest


def inspect_dataset(path: str | Path) -> dict[str, Any]:
    """Return a summary of a dataset: tokens and documents per split, tokenizer, source and so on.

    Takes milliseconds at any size. Raises DataError if the manifest is damaged or a file is missing or truncated.
    """
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
