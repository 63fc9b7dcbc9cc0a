"""The DeepSpeed JSON: how memory and network are used, checked at every level before DeepSpeed sees it.

DeepSpeed ignores unknown top-level keys (`zero_optimisation` trains with ZeRO off) and keeps "auto" as a string
(DeepSpeed#653, #774, #1809). Here an unknown key is refused with its line and the nearest valid one, values that
the run file owns must be absent, "auto" or equal, and no "auto" is left in what the engine gets.
KEYS is DeepSpeed 0.19.8's own list (docs/config-json and its pydantic models); a test compares the two.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packspeed.launch.config.batch import BatchPlan
from packspeed.launch.config.deepspeed_keys import KEYS
from packspeed.launch.config.errors import ConfigError, nearest
from packspeed.launch.config.loading import parse_with_lines
from packspeed.launch.config.run_file import OptimizerSection, RunFile

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


def ds_config_path(name: str) -> Path:
    """`zero1` -> ds_configs/zero1.json; anything with a slash or ending in .json is a path already."""
    return Path(name) if "/" in name or name.endswith(".json") else DS_CONFIGS / f"{name}.json"


def load_ds_config(name: str) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON. Raises ConfigError naming every unknown key with its line."""
    path = ds_config_path(name)
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
    except OSError as error:
        ships = sorted(p.stem for p in DS_CONFIGS.glob("*.json"))
        raise ConfigError(
            f"deepspeed: {name}: {path}: {error.strerror}{nearest(name, ships)} Names that ship: {', '.join(ships)}; "
            "a value with a slash is a path."
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: this is not valid JSON: {error.msg}.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}:1: a DeepSpeed configuration is a JSON object.")
    # JSON forbids tabs nowhere, YAML does; only the marks are wanted here.
    _, lines = parse_with_lines(text.replace("\t", " "), path)
    problems = [
        f"{path}:{lines.get(where, 1)}: {message}"
        for where, message in [*unknown_keys(data, KEYS, ()), *bad_values(data)]
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    return data


def unknown_keys(
    data: dict[str, Any], valid: dict[str, Any], where: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every key that DeepSpeed 0.19 would ignore, at any depth."""
    if "*" in valid:
        return
    for key, value in data.items():
        here = (*where, key)
        if key not in valid:
            yield here, f"unknown key {'.'.join(here)!r}{nearest(key, valid)} DeepSpeed would ignore it or fail later."
        elif valid[key] is not None and isinstance(value, dict):
            yield from unknown_keys(value, valid[key], here)
        elif valid[key] is not None and value not in (None, "auto"):
            yield here, f"{'.'.join(here)} is a block {{...}}, not {value!r}."


def bad_values(data: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Values that DeepSpeed takes in silence and that do not do what they say."""
    zero = data.get("zero_optimization") or {}
    if isinstance(zero, dict):
        stage = zero.get("stage", 0)
        if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
            yield (
                ("zero_optimization", "stage"),
                f'zero_optimization.stage is 0, 1, 2 or 3, not {stage!r} (DeepSpeed reads "auto" as 0).',
            )
    for block in (data, *(v for v in data.values() if isinstance(v, dict))):
        for key, value in block.items():
            if value == "auto" and key not in OWNED and block is data:
                yield (
                    (key,),
                    f'{key}: "auto" is only understood for what the run file owns '
                    f"({', '.join(OWNED)}); write the value.",
                )


OWNED = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "fp16", "bf16", "torch_autocast", "optimizer", "scheduler",
)  # fmt: skip


def _optimizer_block(optimizer: OptimizerSection, given: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's optimizer block for the run file's optimizer; `given` may add what does not change the maths."""
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
    """Blocks for the precision; gradients accumulate in fp32 wherever DeepSpeed can (pain 23: bf16 accumulation).

    bf16 at stage 0 runs as autocast over fp32 weights: DeepSpeed's own bf16 stage 0 would add gradients up in bf16.
    """
    blocks: dict[str, Any] = {}
    if precision == "fp16" and stage == 0:
        raise ConfigError(
            "train.precision: fp16 with ZeRO-0: DeepSpeed adds its gradients up in fp16 and does not resume exactly "
            "there. Use deepspeed: zero1 (same speed, less memory), or bf16."
        )
    if precision == "bf16" and stage == 0:
        blocks["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif precision in ("bf16", "fp16"):
        blocks[precision] = {**(given.get(precision) or {}), "enabled": True}
        if stage > 0:
            blocks["data_types"] = {"grad_accum_dtype": "fp32", **(given.get("data_types") or {})}
    return blocks


def zero_stage(ds_config: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed dict; 0 where it says nothing."""
    return int((ds_config.get("zero_optimization") or {}).get("stage", 0))


def resolve_ds_config(run: RunFile, raw: dict[str, Any], plan: BatchPlan, precision: str) -> dict[str, Any]:
    """Return the dict the engine gets: the JSON plus what the run file owns, no "auto" left anywhere.

    Raises ConfigError where the JSON contradicts the run file, naming both places.
    """
    final = {key: copy.deepcopy(value) for key, value in raw.items() if key not in OWNED}
    owned: dict[str, Any] = {
        "train_batch_size": run.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        # DeepSpeed clips at 1.0 where the key is absent, so it is always written.
        "gradient_clipping": run.train.grad_clip,
    }
    optimizer = raw.get("optimizer") if isinstance(raw.get("optimizer"), dict) else {}
    final |= owned | {"optimizer": _optimizer_block(run.train.optimizer, optimizer or {})}
    if found := list(conflicts(run, raw, owned, precision)):
        raise ConfigError("\n".join(found))
    if run.train.optimizer.name == "muon" and zero_stage(raw) == 3:
        # DeepSpeed refuses Muon with reduce_scatter at stage 3: it needs whole gradients.
        final["zero_optimization"]["reduce_scatter"] = False
    final |= _precision_blocks(precision, zero_stage(raw), raw)
    # The loop prints its own line and owns the garbage collector; DeepSpeed's reports would double them.
    final.setdefault("steps_per_print", 2**31 - 1)
    board = {"enabled": run.monitor.tensorboard, "output_path": str(run.folder), "job_name": "tensorboard"}
    final["tensorboard"] = {**board, **(raw.get("tensorboard") or {})}
    return final


def conflicts(run: RunFile, raw: dict[str, Any], owned: dict[str, Any], precision: str) -> Iterator[str]:
    """Everything in the JSON that contradicts the run file, whose batch and clipping come to `owned`."""
    path = ds_config_path(run.deepspeed)
    for key, value in owned.items():
        if raw.get(key, "auto") not in ("auto", value):
            yield (
                f"{path}: {key} = {raw[key]!r}, but the run file makes it {value!r} (section train); "
                'drop it from the JSON or write "auto".'
            )
    if raw.get("scheduler", "auto") != "auto":
        yield f"{path}: scheduler: the learning rate is the run file's (train.schedule); drop the block from the JSON."
    given = raw.get("optimizer") if isinstance(raw.get("optimizer"), dict) else {}
    yield from _other_optimizer(path, given or {}, _optimizer_block(run.train.optimizer, given or {}))
    for name in ("bf16", "fp16"):
        block = raw.get(name)
        enabled = block.get("enabled", "auto") if isinstance(block, dict) else "auto"
        if enabled not in ("auto", precision == name):
            yield f"{path}: {name}.enabled = {enabled!r}, but train.precision is {precision}; drop it from the JSON."
    yield from _clipped_muon(run, path, raw, precision)


def _clipped_muon(run: RunFile, path: Path, raw: dict[str, Any], precision: str) -> Iterator[str]:
    """DeepSpeed clips before Muon orthogonalises at stage 0 and in bf16 at stage 1 without offload, elsewhere after."""
    offload = (raw.get("zero_optimization") or {}).get("offload_optimizer") or {}
    before = zero_stage(raw) == 0 or (
        zero_stage(raw) == 1 and precision == "bf16" and offload.get("device", "none") == "none"
    )
    if run.train.optimizer.name == "muon" and run.train.grad_clip > 0 and before:
        yield (
            f"{path}: Muon with train.grad_clip = {run.train.grad_clip} at ZeRO-{zero_stage(raw)} in {precision}: "
            "DeepSpeed clips the gradient there before Muon orthogonalises it, and the update after it at the other "
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
                'drop it from the JSON or write "auto".'
            )
