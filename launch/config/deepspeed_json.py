"""The DeepSpeed JSON: checked at every level before DeepSpeed reads it, then merged with the run file.

    raw = load_ds_config("zero2")                              # ds_configs/zero2.json; ConfigError for unknown keys
    final = resolve_ds_config(run, raw, plan, "bf16")          # the dict that deepspeed.initialize gets

DeepSpeed ignores unknown top-level keys, so `zero_optimisation` would train with ZeRO off, and it keeps "auto" as a
string (DeepSpeed#653, #774, #1809). Here an unknown key is an error with its line and the nearest valid key. The keys
in OWNED belong to the run file: in the JSON they must be absent, "auto" or equal. The result contains no "auto".
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packspeed.launch.config.batch import BatchPlan
from packspeed.launch.config.deepspeed_keys import KEYS, KeyTree
from packspeed.launch.config.errors import ConfigError, nearest
from packspeed.launch.config.loading import parse_with_lines
from packspeed.launch.config.run_file import OptimizerSection, RunFile

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


def ds_config_path(name: str) -> Path:
    """`zero1` -> ds_configs/zero1.json; anything with a slash or ending in .json is a path already."""
    return Path(name) if "/" in name or name.endswith(".json") else DS_CONFIGS / f"{name}.json"


def load_ds_config(name: str) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON, given by name or path. Raises one ConfigError with a line per problem."""
    path = ds_config_path(name)
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
    except OSError as error:
        ships = sorted(p.stem for p in DS_CONFIGS.glob("*.json"))
        raise ConfigError(
            f"deepspeed: {name}: {path}: {error.strerror}{nearest(name, ships)} "
            f"Names in ds_configs/: {', '.join(ships)}; a value with a slash is a path."
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: this is not valid JSON: {error.msg}.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}:1: a DeepSpeed configuration is a JSON object.")
    # Parse again as YAML for the line numbers. JSON may be indented with tabs, YAML may not.
    _, lines = parse_with_lines(text.replace("\t", " "), path)
    problems = [
        f"{path}:{lines.get(key, 1)}: {message}" for key, message in [*unknown_keys(data, KEYS, ()), *bad_values(data)]
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    return data


def unknown_keys(
    data: dict[str, Any], valid: KeyTree, parent: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path of the key, message) for every key that DeepSpeed 0.19 would ignore, at any depth."""
    if "*" in valid:
        return
    for key, value in data.items():
        path = (*parent, key)
        if key not in valid:
            yield path, f"unknown key {'.'.join(path)!r}{nearest(key, valid)} DeepSpeed would ignore it or fail later."
        elif (children := valid[key]) is not None and isinstance(value, dict):
            yield from unknown_keys(value, children, path)
        elif children is not None and value not in (None, "auto"):
            yield path, f"{'.'.join(path)} must be a block {{...}}, not {value!r}."


def bad_values(data: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path of the key, message) for values that DeepSpeed accepts silently but reads as something else."""
    zero = data.get("zero_optimization") or {}
    if isinstance(zero, dict):
        stage = zero.get("stage", 0)
        if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
            yield (
                ("zero_optimization", "stage"),
                f'zero_optimization.stage must be 0, 1, 2 or 3, not {stage!r} (DeepSpeed reads "auto" as 0).',
            )
    for block in (data, *(v for v in data.values() if isinstance(v, dict))):
        for key, value in block.items():
            if value == "auto" and key not in OWNED and block is data:
                yield (
                    (key,),
                    f'{key}: "auto" is only valid for keys that the run file sets '
                    f"({', '.join(OWNED)}). Write the value.",
                )


# The run file sets these.
OWNED = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "fp16", "bf16", "torch_autocast", "optimizer", "scheduler",
)  # fmt: skip


def _optimizer_block(optimizer: OptimizerSection, given: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's optimizer block for the run file's optimizer, plus the JSON's (`given`) additional parameters."""
    params: dict[str, Any] = {
        "lr": optimizer.lr,
        "weight_decay": optimizer.weight_decay,
        "betas": list(optimizer.betas),
    }
    if optimizer.name != "lion":
        params["eps"] = optimizer.eps
    if optimizer.name == "muon":
        params |= {
            "momentum": optimizer.momentum,
            "muon_lr": optimizer.muon_lr or optimizer.lr,
            "adam_lr": optimizer.lr,
        }
    extra = {k: v for k, v in (given.get("params") or {}).items() if k not in params or v == "auto"}
    extra = {k: v for k, v in extra.items() if v != "auto"}
    return {"type": {"adamw": "AdamW", "muon": "Muon", "lion": "Lion"}[optimizer.name], "params": {**params, **extra}}


def _precision_blocks(precision: str, stage: int, given: dict[str, Any]) -> dict[str, Any]:
    """Blocks for the precision. Gradients are accumulated in fp32 (DeepSpeed#1800, #2352).

    bf16 at stage 0 is autocast over fp32 weights, because DeepSpeed's own bf16 mode accumulates in bf16 there.
    """
    blocks: dict[str, Any] = {}
    if precision == "fp16" and stage == 0:
        raise ConfigError(
            "train.precision: fp16 with ZeRO-0: DeepSpeed accumulates gradients in fp16 and does not resume exactly. "
            "Use deepspeed: zero1 (same speed, less memory), or bf16."
        )
    if precision == "bf16" and stage == 0:
        blocks["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif precision in ("bf16", "fp16"):
        blocks[precision] = {**(given.get(precision) or {}), "enabled": True}
        if stage > 0:
            blocks["data_types"] = {"grad_accum_dtype": "fp32", **(given.get("data_types") or {})}
    return blocks


def zero_stage(ds_config: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration; 0 if it names none."""
    return int((ds_config.get("zero_optimization") or {}).get("stage", 0))


def resolve_ds_config(run: RunFile, raw: dict[str, Any], plan: BatchPlan, precision: str) -> dict[str, Any]:
    """The configuration for the engine: the JSON plus the keys that the run file sets, without any "auto".

    Raises ConfigError if the JSON contradicts the run file; the message names both.
    """
    final = {key: copy.deepcopy(value) for key, value in raw.items() if key not in OWNED}
    owned: dict[str, Any] = {
        "train_batch_size": run.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        # DeepSpeed clips at 1.0 if the key is absent, so it is always written.
        "gradient_clipping": run.train.grad_clip,
    }
    optimizer = raw.get("optimizer") if isinstance(raw.get("optimizer"), dict) else {}
    final |= owned | {"optimizer": _optimizer_block(run.train.optimizer, optimizer or {})}
    if contradictions := list(conflicts(run, raw, owned, precision)):
        raise ConfigError("\n".join(contradictions))
    if run.train.optimizer.name == "muon" and zero_stage(raw) == 3:
        # Muon needs the full gradient of a matrix; DeepSpeed refuses it with reduce_scatter at stage 3.
        final["zero_optimization"]["reduce_scatter"] = False
    final |= _precision_blocks(precision, zero_stage(raw), raw)
    # The training loop prints its own lines; DeepSpeed's reports would repeat them.
    final.setdefault("steps_per_print", 2**31 - 1)
    board = {"enabled": run.monitor.tensorboard, "output_path": str(run.folder), "job_name": "tensorboard"}
    final["tensorboard"] = {**board, **(raw.get("tensorboard") or {})}
    return final


def conflicts(run: RunFile, raw: dict[str, Any], owned: dict[str, Any], precision: str) -> Iterator[str]:
    """A message for everything in the JSON that contradicts the run file; `owned` is its batch and clipping."""
    path = ds_config_path(run.deepspeed)
    for key, value in owned.items():
        if raw.get(key, "auto") not in ("auto", value):
            yield (
                f"{path}: {key} = {raw[key]!r}, but the run file makes it {value!r} (section train); "
                'remove it from the JSON or write "auto".'
            )
    if raw.get("scheduler", "auto") != "auto":
        yield f"{path}: scheduler: the learning rate is the run file's (train.schedule); remove the block here."
    given = raw.get("optimizer") if isinstance(raw.get("optimizer"), dict) else {}
    yield from _other_optimizer(path, given or {}, _optimizer_block(run.train.optimizer, given or {}))
    for name in ("bf16", "fp16"):
        block = raw.get(name)
        enabled = block.get("enabled", "auto") if isinstance(block, dict) else "auto"
        if enabled not in ("auto", precision == name):
            yield f"{path}: {name}.enabled = {enabled!r}, but train.precision is {precision}; remove it from the JSON."
    yield from _clipped_muon(run, path, raw, precision)


def _clipped_muon(run: RunFile, path: Path, raw: dict[str, Any], precision: str) -> Iterator[str]:
    """A message if DeepSpeed would clip before Muon orthogonalises: stage 0, or stage 1 in bf16 without offload."""
    offload = (raw.get("zero_optimization") or {}).get("offload_optimizer") or {}
    before = zero_stage(raw) == 0 or (
        zero_stage(raw) == 1 and precision == "bf16" and offload.get("device", "none") == "none"
    )
    if run.train.optimizer.name == "muon" and run.train.grad_clip > 0 and before:
        yield (
            f"{path}: Muon with train.grad_clip = {run.train.grad_clip} at ZeRO-{zero_stage(raw)} in {precision}: "
            "DeepSpeed clips the gradient before Muon orthogonalises it there, and the update afterwards at the other "
            "stages, so the stage would change the loss. Use deepspeed: zero2 (or zero3), or train.grad_clip: 0."
        )


def _other_optimizer(path: Path, given: dict[str, Any], ours: dict[str, Any]) -> Iterator[str]:
    if str(given.get("type", "auto")).lower() not in ("auto", ours["type"].lower()):
        yield (
            f"{path}: optimizer.type = {given['type']!r}, but the run file's train.optimizer.name "
            f"gives {ours['type']!r}."
        )
    for key, value in (given.get("params") or {}).items():
        if value != "auto" and key in ours["params"] and value != ours["params"][key]:
            yield (
                f"{path}: optimizer.params.{key} = {value!r}, but the run file's train.optimizer "
                f"makes it {ours['params'][key]!r}; "
                'remove it from the JSON or write "auto".'
            )
