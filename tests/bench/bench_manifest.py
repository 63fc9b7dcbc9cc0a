"""The manifest of a dataset that a benchmark has made without `packspeed prepare`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from packspeed.data.storage.manifest import (
    MANIFEST,
    Manifest,
    Shard,
    SourceSummary,
    SplitMethod,
    TokenizerIdentity,
    manifest_json,
)

EOT = 50256


def write_manifest(folder: Path, shards: list[Shard]) -> None:
    """Write manifest.json for shards of uint16 tokens of GPT-2's vocabulary, whose files are in `folder`."""
    identity = TokenizerIdentity("gpt2", 50257, EOT, "", "", "gpt2.tiktoken")
    summary = SourceSummary([], 0, 0, 0, 0, 0, "")
    manifest = Manifest("packspeed-tokens", 1, "uint16", identity, SplitMethod("none", 0.0), summary, shards, "")
    manifest = dataclasses.replace(manifest, fingerprint=manifest.compute_fingerprint())
    (folder / MANIFEST).write_bytes(manifest_json(manifest))
