"""The rules about checkpoints that need no training: which are complete, which are kept, which may be resumed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from packspeed.data.storage.hashing import FileHash, hash_file
from packspeed.launch.checkpoint import retention, tensor_file
from packspeed.launch.checkpoint.identity import has_same_layout
from packspeed.launch.checkpoint.manifest import (
    Manifest,
    RunIdentity,
    dump_manifest,
    list_checkpoints,
    read_manifest,
)
from packspeed.launch.checkpoint.resume import (
    OLDER_DEFAULTS,
    check_loaded_step,
    check_same_run,
    find_checkpoint,
)
from packspeed.launch.checkpoint.retention import expired_checkpoints, rewind_target
from packspeed.launch.checkpoint.verify import find_damage, newest_complete, shares
from packspeed.launch.checkpoint.writer import SafeWriter
from packspeed.launch.config.effects import MODEL_SPEED_ONLY
from packspeed.launch.config.errors import ConfigError, UserError
from packspeed.launch.config.run_file import CheckpointSection
from packspeed.launch.engine import mapped_pages, optimizer_state
from packspeed.launch.engine.distributed import Topology
from packspeed.launch.training.self_check import compare_probes
from packspeed.model.config import GPTConfig


def write_checkpoint(folder: Path, step: int, val_loss: float | None = None) -> Path:
    """A complete checkpoint with one file."""
    checkpoint = folder / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights.pt").write_bytes(bytes([step]))
    files = {"weights.pt": hash_file(checkpoint / "weights.pt")}
    manifest = {"format_version": 1, "step": step, "val_loss": val_loss, "files": files}
    (checkpoint / "packspeed.json").write_text(json.dumps(manifest))
    return checkpoint


def steps(paths: list[Path]) -> list[int]:
    return [int(path.name[5:]) for path in paths]


def section(**keys: int) -> CheckpointSection:
    return CheckpointSection(**{"every_steps": 4, "keep": 1, "keep_best": 0, **keys})  # type: ignore[arg-type]  # ints


@pytest.mark.parametrize(
    ("keys", "expired"),
    [
        ({}, [7, 6, 4, 3]),
        ({"keep": 2}, [7, 6, 4, 3]),
        ({"keep": 3}, [6, 4, 3]),
        ({"keep_every_steps": 3}, [7, 4]),
        ({"keep_best": 1}, [7, 6, 4]),
        ({"keep_best": 2}, [7, 4]),
        ({"every_steps": 0}, [8, 7, 6, 4, 3]),
        ({"every_steps": 7}, [8, 6, 4, 3]),
    ],
)
def test_retention(tmp_path: Path, keys: dict[str, int], expired: list[int]) -> None:
    """Step 9 is the newest, 8 the newest scheduled one, 3 and 6 have the lowest validation losses."""
    for step, val_loss in ((3, 1.0), (4, 3.0), (6, 2.0), (7, None), (8, 5.0), (9, None)):
        write_checkpoint(tmp_path, step, val_loss)
    assert steps(expired_checkpoints(tmp_path, 9, [], section(**keys))) == expired


def test_retention_deletes_in_the_background_and_reads_each_manifest_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same checkpoints stay as by the rule; a changed manifest is read again; a crash leaves no part of one."""
    read: list[str] = []

    def counted(folder: Path) -> Manifest:
        read.append(folder.name)
        return read_manifest(folder)

    monkeypatch.setattr(retention, "read_manifest", counted)
    expire = retention.Retention(tmp_path, section(keep_best=1))
    for step, val_loss in ((3, 1.0), (4, 3.0), (6, 2.0), (8, 5.0), (9, None)):
        write_checkpoint(tmp_path, step, val_loss)
    expire.start(9, [])
    expire.wait()
    assert steps(list_checkpoints(tmp_path)) == [9, 8, 3]
    assert len(read) == 5
    write_checkpoint(tmp_path, 10, 0.5)
    with monkeypatch.context() as crash:
        crash.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
        expire.start(10, [])
        expire.wait()
    assert steps(list_checkpoints(tmp_path)) == [10, 8]
    assert read[5:] == ["step-00000010"], "the others are remembered"
    assert len(list(tmp_path.glob(".step-*"))) == 2
    time.sleep(0.01)
    shutil.rmtree(tmp_path / "step-00000008")
    write_checkpoint(tmp_path, 8, 0.1)
    write_checkpoint(tmp_path, 11)
    expire.start(11, [])
    expire.wait()
    assert steps(list_checkpoints(tmp_path)) == [11, 8]
    assert read[6:] == ["step-00000011", "step-00000008"]
    assert not list(tmp_path.glob(".step-*"))


def test_a_rewind_returns_to_the_newest_complete_scheduled_checkpoint(tmp_path: Path) -> None:
    for step in (3, 4, 8, 9):
        write_checkpoint(tmp_path, step)
    assert rewind_target(tmp_path, 10, section()) == 8, "9 is newer, but of a stop"
    assert rewind_target(tmp_path, 8, section()) == 4
    (tmp_path / "step-00000008" / "weights.pt").write_bytes(b"x")
    assert rewind_target(tmp_path, 10, section()) == 4, "8 is damaged"
    assert rewind_target(tmp_path, 10, section(every_steps=0)) == 9, "none is scheduled"
    assert rewind_target(tmp_path, 4, section()) == 3
    assert rewind_target(tmp_path, 3, section()) is None


def test_only_step_folders_are_checkpoints(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 3)
    write_checkpoint(tmp_path, 100)
    for name in (".step-00000200.tmp", "step-old", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000300").write_text("a file")
    assert steps(list_checkpoints(tmp_path)) == [100, 3]


def test_damage_is_named_and_an_older_checkpoint_taken(tmp_path: Path) -> None:
    for step in range(1, 7):
        write_checkpoint(tmp_path, step)
    (tmp_path / "step-00000002" / "weights.pt").unlink()
    (tmp_path / "step-00000003" / "weights.pt").write_bytes(b"12")
    (tmp_path / "step-00000004" / "weights.pt").write_bytes(b"x")
    (tmp_path / "step-00000005" / "more").write_text("")
    (tmp_path / "step-00000006" / "packspeed.json").write_text("{")
    lines: list[str] = []
    newest, damaged = newest_complete(tmp_path, lines.append)
    assert newest == tmp_path / "step-00000001"
    assert steps(damaged) == [6, 5, 4, 3, 2]
    for line, reason in zip(lines, ["cannot be read", "not listed", "was changed", "2 bytes", "missing"], strict=True):
        assert line.startswith("skipping checkpoint step-")
        assert reason in line


def test_ranks_share_the_bytes_of_a_checkpoint() -> None:
    """A rank gets its own two files if all are alike; files of other sizes are spread evenly."""
    ranks = 12
    sizes = {f"zero_pp_rank_{rank}_optim_states.pt": 50 * 2**20 + rank for rank in range(ranks)}
    sizes |= {f"zero_pp_rank_{rank}_model_states.pt": 7 * 2**20 + rank for rank in range(ranks)}
    files: dict[str, FileHash] = {name: {"bytes": size, "xxh3_128": ""} for name, size in sizes.items()}
    own = [[f"zero_pp_rank_{rank}_{kind}_states.pt" for kind in ("optim", "model")] for rank in range(ranks)]
    assert shares(files, ranks) == own
    uneven: dict[str, FileHash] = {f"file_{i}": {"bytes": i * 2**20, "xxh3_128": ""} for i in range(100)}
    loads = [sum(uneven[name]["bytes"] for name in names) for names in shares(uneven, 7)]
    assert sum(loads) == sum(file["bytes"] for file in uneven.values())
    assert max(loads) - min(loads) <= 2**21
    assert shares({"one": files["zero_pp_rank_3_model_states.pt"]}, 3) == [["one"], [], []]


def test_retention_counts_complete_checkpoints_only(tmp_path: Path) -> None:
    """Steps 20 and 24 were found damaged, the run resumed at 12 and has saved 14; then it passes 20."""
    for step in (8, 12, 14, 20, 24):
        write_checkpoint(tmp_path, step)
    damaged = {tmp_path / "step-00000020", tmp_path / "step-00000024"}
    assert steps(expired_checkpoints(tmp_path, 14, damaged, section(keep=2))) == [8], "what was saved last stays"
    write_checkpoint(tmp_path, 22)
    assert steps(expired_checkpoints(tmp_path, 22, damaged, section(keep=2, every_steps=0))) == [12, 8]
    write_checkpoint(tmp_path, 23)
    assert steps(expired_checkpoints(tmp_path, 23, damaged, section(keep=2, every_steps=0))) == [14, 12, 8, 20]


def test_odd_folder_names_are_no_checkpoints(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 3)
    for name in ("step-\u00b2", "step-3", "step-0000000\u0663", "step-000000012", "step--0000001", "step-00000012.bak"):
        (tmp_path / name).mkdir()
    assert steps(list_checkpoints(tmp_path)) == [3]


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(step=2),
        lambda manifest: manifest.update(step="1"),
        lambda manifest: manifest.update(files=[]),
        lambda manifest: manifest.update(files={"weights.pt": 3}),
        lambda manifest: manifest.update(files={"weights.pt": {"bytes": "1", "xxh3_128": 2}}),
        lambda manifest: manifest.pop("files"),
        lambda manifest: manifest.pop("step"),
        lambda manifest: manifest.pop("format_version"),
    ],
)
def test_a_damaged_value_in_the_manifest_is_damage(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Also in a manifest without a hash of its own, as version 0.1 wrote it."""
    path = write_checkpoint(tmp_path, 1) / "packspeed.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    assert len(find_damage(path.parent)) == 1


def test_every_changed_byte_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1) / "packspeed.json"
    text = dump_manifest(json.loads(path.read_text()) | {"probe": {"loss": 3.25}, "config": {"train": {"lr": 1e-3}}})
    path.write_text(text)
    assert find_damage(path.parent) == []
    for place, character in enumerate(text):
        if not character.isspace():
            path.write_text(text[:place] + ("7" if character != "7" else "8") + text[place + 1 :])
            assert find_damage(path.parent), text[max(0, place - 20) : place + 20]


def test_a_run_without_a_complete_checkpoint_does_not_begin_again(tmp_path: Path) -> None:
    alone = Topology(0, 0, 1, torch.device("cpu"))
    lines: list[str] = []
    assert find_checkpoint(tmp_path / "none", alone, identity(), lines.append).checkpoint is None
    checkpoint = write_checkpoint(tmp_path, 4)
    (checkpoint / "weights.pt").write_bytes(b"xy")
    with pytest.raises(UserError, match="--fresh"):
        find_checkpoint(tmp_path, alone, identity(), lines.append)
    shutil.rmtree(checkpoint)
    (tmp_path / "latest").write_text("step-00000004")
    with pytest.raises(UserError, match="--fresh"):
        find_checkpoint(tmp_path, alone, identity(), lines.append)


def test_the_resharded_folder_is_no_damage(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 1)
    (checkpoint / "universal").mkdir()
    (checkpoint / "universal" / "wte.safetensors").write_text("")
    (checkpoint / ".universal.lock").write_text("")
    assert find_damage(checkpoint) == []


def test_every_newer_model_key_has_a_value_for_older_checkpoints() -> None:
    """Without one, a run that began before the key existed would be refused as another run."""
    first = (
        "n_layer n_head d_model vocab_size max_seq_len n_kv_head head_dim d_ff norm norm_eps position rope_theta mlp "
        "bias qk_norm tie_embeddings dropout activation_checkpointing"
    )
    newer = {field.name: field.default for field in dataclasses.fields(GPTConfig) if field.name not in first.split()}
    wrong = {
        name: value
        for name, value in newer.items()
        if value is not None and OLDER_DEFAULTS.get(f"model.{name}") != value
    }
    assert not {name for name in wrong if f"model.{name}" not in MODEL_SPEED_ONLY}


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 1)
    (checkpoint / "packspeed.json").write_text(json.dumps({"format_version": 2}))
    assert "format version 2, but this Packspeed reads version 1" in find_damage(checkpoint)[0]


def identity(precision: str = "fp32", dp_size: int = 2, **config: Any) -> RunIdentity:
    """A run; `config` replaces settings."""
    settings = {"train": {"seed": 1, "steps": 10}, "model": {"d_model": 32, "kernels": "eager"}}
    for key, value in config.items():
        room, _, name = key.partition("_")
        settings[room][name] = value
    return {
        "config": settings,
        "dataset_fingerprint": "a",
        "order_version": 1,
        "layout": {"dp_size": dp_size, "zero_optimization": {}, "precision": precision, "optimizers": []},
        "versions": {"torch": "2"},
        "commit": "c",
    }


def saved(**keys: Any) -> Manifest:
    probe: Any = {"first_sample": 0, "rows": 8, "samples_hash": "h", "loss": 4.0}
    manifest: Any = {"step": 5, **identity(), "probe": probe, **keys}
    return manifest


def test_what_may_change_on_resume(tmp_path: Path) -> None:
    assert check_same_run(tmp_path, saved(), identity()) == []
    changes = check_same_run(tmp_path, saved(), identity(train_steps=20, model_kernels="native"))
    assert changes == [
        {"step": 5, "key": "model.kernels", "old": "eager", "new": "native"},
        {"step": 5, "key": "train.steps", "old": 10, "new": 20},
    ]
    with pytest.raises(ConfigError, match=r"another run: model.d_model was 32, is 64; train.seed was 1, is 2"):
        check_same_run(tmp_path, saved(), identity(train_seed=2, model_d_model=64))
    for changed, message in (
        ({"dataset_fingerprint": "b"}, "fingerprint b"),
        ({"order_version": 2}, "order_version 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_same_run(tmp_path, saved(**changed), identity())


def test_a_checkpoint_of_deepspeeds_muon_is_refused(tmp_path: Path) -> None:
    old = {**saved()["layout"], "optimizers": ["DeepSpeedZeroOptimizer", "MuonWithAuxAdam"]}
    with pytest.raises(UserError, match=r"trained with DeepSpeed's Muon.*start over with --fresh"):
        check_same_run(tmp_path, saved(layout=old), identity())


def test_imported_weights_are_checked_for_the_model_only(tmp_path: Path) -> None:
    imported: Manifest = {
        "step": 0,
        "config": {"model": {"d_model": 32}},
        "imported": {"source": "s", "tied": {}},
    }
    now = identity(train_seed=2, model_dropout=0.1)
    assert check_same_run(tmp_path, imported, now) == []
    with pytest.raises(ConfigError, match=r"another model: model\.d_model is 32 there, 64"):
        check_same_run(tmp_path, imported, identity(model_d_model=64))


def test_settings_of_the_network_do_not_make_another_layout() -> None:
    """A checkpoint of a Packspeed that did not size its buckets is still loaded as it is."""

    def layout(**zero: object) -> Any:
        return {**identity(), "layout": {**identity()["layout"], "zero_optimization": {"stage": 3, **zero}}}

    nvme = {"device": "nvme", "nvme_path": "x"}
    sized = layout(
        reduce_bucket_size=2, stage3_prefetch_bucket_size=2, memory_efficient_linear=False, overlap_comm=True,
        offload_param=nvme | {"buffer_size": 7},
    )  # fmt: skip
    assert has_same_layout(layout(offload_param=nvme), sized)
    assert not has_same_layout(layout(), sized)
    assert not has_same_layout(layout(), layout(sub_group_size=10))
    assert not has_same_layout({"step": 0}, layout()), "imported weights have no layout"  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("now", "difference", "agrees"),
    [
        (identity(), 9e-6, True),
        (identity(), 2e-5, False),
        (identity(dp_size=1), 2e-5, False),
        (identity("bf16"), 1.9e-2, True),
        (identity("bf16"), 2.1e-2, False),
    ],
)
def test_the_probe_agrees_to_the_precision(tmp_path: Path, now: RunIdentity, difference: float, agrees: bool) -> None:
    repeated: Any = {"first_sample": 0, "rows": 8, "samples_hash": "h", "loss": 4.0 + difference}
    if agrees:
        assert "have the same loss as at the save, 4.0" in compare_probes(tmp_path, saved(), now, repeated)
    else:
        with pytest.raises(UserError, match=r"self-check failed: step 5 of .* was 4\.00000000 at the save"):
            compare_probes(tmp_path, saved(), now, repeated)


def test_a_probe_of_other_samples_names_the_causes(tmp_path: Path) -> None:
    repeated: Any = {"first_sample": 0, "rows": 8, "samples_hash": "other", "loss": 4.0}
    now = identity("bf16")
    now["versions"] = {"torch": "3"}
    causes = "the dataset returns other samples; torch was 2, is 3; precision was fp32, is bf16"
    with pytest.raises(UserError, match=causes):
        compare_probes(tmp_path, saved(), now, repeated)


def test_the_state_inside_must_be_of_the_same_step(tmp_path: Path) -> None:
    check_loaded_step(tmp_path, 5, "here", {"packspeed_step": 5})
    with pytest.raises(UserError, match=r"packspeed\.json this is step 5, but DeepSpeed.s files are of step 6"):
        check_loaded_step(tmp_path, 5, "here", {"packspeed_step": 6})
    with pytest.raises(UserError, match="found nothing to load"):
        check_loaded_step(tmp_path, 5, None, {})


@pytest.mark.parametrize(
    ("groups", "held", "inner"),
    [
        ("fp32_flat_groups", "fp32_partitioned_groups_flat", "optimizer_state_dict"),
        ("single_partition_of_fp32_groups", "single_partition_of_fp32_groups", "base_optimizer_state"),
    ],
)
def test_a_load_maps_the_file_and_keeps_none_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, held: str, inner: str
) -> None:
    """Weights go straight into the optimizer's tensors, states into memory that the file does not share."""
    monkeypatch.setattr(mapped_pages, "PIECE", 7)
    weights, moment = torch.arange(20.0), torch.arange(20.0).reshape(4, 5) + 100
    state = {"state": {0: {"exp_avg": moment, "step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.5}]}
    path = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": {groups: [weights], inner: state}, "ds_version": "0.19.8"}, path)

    own = torch.zeros(20)
    engine: Any = SimpleNamespace(optimizer=SimpleNamespace(**{held: [own]}), module=torch.nn.Linear(1, 1))
    writer = SafeWriter(on_load=lambda content: optimizer_state.own_states(engine, content))
    loaded = writer.load(str(path), map_location="cpu")["optimizer_state_dict"]
    with path.open("r+b") as file:  # in place, so that what is still mapped becomes zero
        file.write(bytes(path.stat().st_size))
    assert torch.equal(own, weights)
    assert loaded[groups][0].data_ptr() == own.data_ptr()
    assert torch.equal(loaded[inner]["state"][0]["exp_avg"], moment)
    assert loaded[inner]["state"][0]["step"] == 3
    assert loaded[inner]["param_groups"] == [{"lr": 0.5}]


def test_a_tensor_file_is_read_by_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors longer than a piece, transposed, with NaN, and a number."""
    monkeypatch.setattr(tensor_file, "PIECE", 7)
    tensors = {
        "fp32": torch.arange(20.0).reshape(4, 5).T,
        "exp_avg": torch.tensor([float("nan"), 1.0, -0.0]),
        "step": torch.tensor(3.0),
    }
    file = tensor_file.TensorFile(tmp_path / "w.safetensors")
    assert [file.append(key, tensor) for key, tensor in tensors.items()] == [None] * 3
    assert file.finish() == hash_file(file.path)
    found = load_file(file.path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key].view(torch.int32), tensors[key].contiguous().view(torch.int32)) for key in found)


def test_a_tensor_file_notices_what_the_disk_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tensor_file.TensorFile(tmp_path / "w.safetensors")
    other = torch.zeros(1024 + 3)
    monkeypatch.setattr(torch, "from_file", lambda *args, **kwargs: other)
    assert "w.safetensors: fp32, read back from the file, differs" in str(file.append("fp32", torch.ones(3)))


def test_a_tensor_file_has_room_for_a_header_of_fixed_size(tmp_path: Path) -> None:
    file = tensor_file.TensorFile(tmp_path / "w.safetensors")
    for number in range(80):
        file.append(f"state_{number}", torch.zeros(1))
    with pytest.raises(ValueError, match="its header needs"):
        file.finish()
