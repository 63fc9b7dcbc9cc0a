"""Damaged datasets: every manifest, index and shard that opens gives the same batches, the rest is one paragraph."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packspeed.data.checks.inspect import inspect_dataset
from packspeed.data.checks.verify import verify
from packspeed.data.dataset import TokenDataset
from packspeed.data.errors import DataError
from packspeed.data.packing import PackedMode, make_loader
from packspeed.data.prepare.prepare import prepare
from packspeed.data.storage import manifest as manifest_module
from packspeed.data.storage.hashing import hash_file
from packspeed.data.storage.manifest import Manifest, load_manifest

ROUNDS = 150
ODD_VALUES: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**400, 0.5, float("nan"), float("inf"), "", "x" * 10_000, "\ud800", "../x",
    "train-00000\n", [], {}, [[]],
]  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of a few shards whose documents are a few tokens long."""
    folder = tmp_path_factory.mktemp("fuzz")
    texts = [f"{i}: " + "word " * (i % 7) for i in range(150)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([str(folder / "a.jsonl")], folder / "out", "bytes", val_fraction=0.1, shard_tokens=1000)
    return folder / "out"


def batches(folder: Path) -> list[str]:
    """What a run reads: hashes of batches in every packing, and all documents."""
    dataset = TokenDataset(folder)
    hashes = []
    for packing in ("stream", "best_fit", "bos_aligned"):
        loader = make_loader(dataset, seq_len=32, global_batch=8, seed=1, packing=packing)
        hashes += [loader.content_hash(step) for step in range(loader.samples_per_epoch // 8 + 1)]
    position, end = 0, dataset.tokens("train")
    while position < end:
        span = dataset.document_at("train", position)
        hashes.append(str(span))
        position = span.start + span.tokens
    return hashes


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Flipped bits, another byte, a cut, a gap, a repetition, or zeros."""
    raw, at, size = bytearray(content), rng.randrange(len(content)), rng.choice([1, 1, 2, 8, 512])
    kind = rng.randrange(6)
    if kind == 0:
        raw[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        raw[at] = rng.randrange(256)
    elif kind == 2:
        del raw[at:]
    elif kind == 3:
        del raw[at : at + size]
    elif kind == 4:
        raw[at:at] = raw[max(0, at - size) : at]
    else:
        raw[at : at + size] = bytes(len(raw[at : at + size]))
    return bytes(raw)


def edited(raw: Any, rng: random.Random) -> Any:
    """Replace, remove or repeat one value somewhere in a JSON document."""
    key = rng.choice(list(raw) if isinstance(raw, dict) else range(len(raw)))
    if isinstance(raw[key], dict | list) and raw[key] and rng.random() < 0.8:
        edited(raw[key], rng)
    elif rng.random() < 0.2:
        del raw[key]
    elif isinstance(raw[key], str | int) and rng.random() < 0.5:
        raw[key] = raw[key][: rng.randrange(9)] if isinstance(raw[key], str) else raw[key] + rng.choice([-1, 1, 256])
    else:
        raw[key] = rng.choice(ODD_VALUES)
    return raw


def damage_something(folder: Path, rng: random.Random) -> str:
    """Damage one file of a dataset; returns its name. Half of the damage gets right hashes and fingerprints again."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".idx"))
    path = folder / rng.choice([*names, *["manifest.json"] * len(names)])
    if path.suffix != ".json" or rng.random() < 0.5:
        path.write_bytes(damaged(path.read_bytes(), rng))
    else:
        path.write_text(json.dumps(edited(json.loads(path.read_text()), rng)))
    if rng.random() < 0.5:
        forge(folder)
    return path.name


def forge(folder: Path) -> None:
    """Write the hashes and the fingerprint that fit the files, as a program would that knows the format."""
    try:
        raw = json.loads((folder / "manifest.json").read_text())
        for shard in raw["shards"]:
            shard["idx_xxh3_128"] = hash_file(folder / f"{shard['name']}.idx")["xxh3_128"]
        fingerprint = manifest_module.build_record(Manifest, raw, "test").compute_fingerprint()
        (folder / "manifest.json").write_text(json.dumps(raw | {"fingerprint": fingerprint}))
    except (DataError, ValueError, OSError, KeyError, TypeError, RecursionError):
        pass  # beyond forging


def outcome(folder: Path) -> list[str] | str:
    """The batches, or the error's text."""
    try:
        json.dumps(inspect_dataset(folder), allow_nan=False).encode()
        verify(folder)
        return batches(folder)
    except DataError as error:
        return str(error)


def check_rounds(sound: Path, folder: Path, seed: int, rounds: int) -> Iterator[str]:
    expected, fingerprint = batches(sound), load_manifest(sound).fingerprint
    for number in range(rounds):
        rng = random.Random(f"{seed} {number}")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound, folder)
        name = damage_something(folder, rng)
        result = outcome(folder)
        if isinstance(result, str):
            assert "\n" not in result.encode().decode(), number
            assert 40 < len(result) < 1500, number
            yield result
        # A forged manifest may describe another dataset, which has another fingerprint.
        elif name.endswith((".idx", ".json")) and load_manifest(folder).fingerprint == fingerprint:
            assert result == expected, (number, name)


@pytest.mark.slow
def test_damage_is_one_paragraph_or_changes_nothing(sound: Path, tmp_path: Path) -> None:
    messages = list(check_rounds(sound, tmp_path / "copy", seed=0, rounds=ROUNDS))
    assert len(messages) > ROUNDS / 2


def epoch_hashes(folder: Path, packing: PackedMode) -> list[str]:
    loader = make_loader(TokenDataset(folder), seq_len=32, global_batch=8, seed=1, packing=packing)
    return [loader.content_hash(step) for step in range(-(-loader.samples_per_epoch // 8))]


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["best_fit", "bos_aligned"])
def test_a_flipped_byte_of_an_index_is_named_with_its_place(packing: PackedMode, sound: Path, tmp_path: Path) -> None:
    """Each byte of an index, so each field of it. None may change the curve in silence, now or after the repair."""
    shutil.copytree(sound, tmp_path / "copy", ignore=shutil.ignore_patterns(".derived*"))
    path = tmp_path / "copy/train-00001.idx"
    whole = path.read_bytes()
    documents = TokenDataset(sound).manifest.shards[1].documents
    expected = epoch_hashes(sound, packing)
    for at in range(34, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        if at >= 34 + 12 * documents:  # the boundaries repeat what the other fields say, and are not read
            assert epoch_hashes(tmp_path / "copy", packing) == expected
            continue
        in_lengths, in_offsets = (at - 34) // 4, (at - 34 - 4 * documents) // 8
        changed = in_lengths if in_lengths < documents else in_offsets
        with pytest.raises(DataError, match=r"train-00001\.idx has changed") as error:
            epoch_hashes(tmp_path / "copy", packing)
        if named := re.search(r"document (\d+) ", str(error.value)):
            assert int(named[1]) in (changed, changed - 1)
    path.write_bytes(whole)
    assert epoch_hashes(tmp_path / "copy", packing) == expected


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_an_id_outside_the_vocabulary_is_named_with_its_place(packing: str, sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "copy")
    tokens = np.fromfile(tmp_path / "copy/train-00001.bin", dtype="<u2")
    tokens[100] = 16_384
    tokens.tofile(tmp_path / "copy/train-00001.bin")
    loader = make_loader(TokenDataset(tmp_path / "copy"), seq_len=32, global_batch=1, seed=1, packing=packing)
    text = r"train-00001\.bin contains token id 16384 at byte 200, outside the vocabulary of 257: .*packspeed verify"
    with pytest.raises(DataError, match=text):
        list(map(loader.batch, range(loader.samples_per_epoch)))
    with pytest.raises(DataError, match=text):
        loader.dataset.read_rows("train", [loader.dataset.manifest.shards[0].tokens + 90], 20)
