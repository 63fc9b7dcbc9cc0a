"""Check a DeepSpeed JSON at every level before DeepSpeed reads it, then merge it with the run file.

    raw = load_ds_config("zero2")                              # ds_configs/zero2.json; ConfigError for unknown keys
    final = resolve_ds_config(run, raw, plan, "bf16")          # the dict that is passed to deepspeed.initialize

The file may be JSON or HJSON, as for DeepSpeed: comments, trailing commas and keys such as "_comment" are allowed.

DeepSpeed ignores unknown top-level keys, so a file with `zero_optimisation` would train without ZeRO. It also keeps
"auto" as a string (DeepSpeed#653, #774, #1809). Here an unknown key is an error with its line and the nearest valid
key, and the merged result contains no "auto". The keys in OWNED are set by the run file. In the JSON they must be
absent, "auto", or equal to the run file's value. deepspeed_keys.py lists the keys that are refused because they would
harm a run.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from packspeed.launch.config.batch import BatchPlan
from packspeed.launch.config.deepspeed_defaults import fill_defaults
from packspeed.launch.config.deepspeed_keys import KEYS, KeyTree, Refused, Unused, refusals, without_refused_keys
from packspeed.launch.config.errors import ConfigError, nearest
from packspeed.launch.config.json_types import DsConfig, JsonObject
from packspeed.launch.config.parsing import KeyPath, dotted, parse_json, printable, read_text, shortened
from packspeed.launch.config.run_file import OptimizerSection, RunFile
from packspeed.model.config import GPTConfig

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


def ds_config_path(name: str) -> Path:
    """Return the path of a DeepSpeed JSON: ds_configs/zero1.json for "zero1".

    A name that contains a slash or ends in .json is itself the path.
    """
    return Path(name) if "/" in name or name.endswith(".json") else DS_CONFIGS / f"{name}.json"


def load_ds_config(name: str) -> JsonObject:
    """Read and check a DeepSpeed JSON, and return its content. `name` is a name in ds_configs/, such as "zero2", or a
    path.

    Raises one ConfigError with a line of text per problem.
    """
    path = ds_config_path(name)
    data, lines = read_ds_config(name)
    problems = [*unknown_keys(data, KEYS, ()), *bad_values(data), *refusals(data), *missing_packages(data)]
    if problems:
        raise ConfigError("\n".join(f"{path}:{lines.get(key, 1)}: {message}" for key, message in problems))
    return data


def read_ds_config(name: str) -> tuple[JsonObject, dict[KeyPath, int]]:
    """Read a DeepSpeed JSON without checking its keys. Returns its content and the line number of every key.

    Comments are removed, and old spellings that DeepSpeed still accepts are replaced by the current ones (modernise).
    Raises ConfigError if the file cannot be read or parsed.
    """
    path = ds_config_path(name)
    ships = sorted(p.stem for p in DS_CONFIGS.glob("*.json"))
    hint = f"{nearest(name, ships)} Names in ds_configs/: {', '.join(ships)}; a value with a slash is a path."
    data, lines = parse_json(read_text(path, f"deepspeed: {printable(name)}:", hint), path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}:1: the top level of a DeepSpeed configuration must be an object, {{...}}.")
    modernise(data)
    return data, lines


def modernise(data: JsonObject) -> None:
    """Replace old keys and values of a parsed DeepSpeed JSON, in place, by the current ones with the same meaning.

    DeepSpeed still accepts both, for example `bfloat16` for `bf16`. Afterwards all checks see the same keys.
    """
    if (old := data.pop("bfloat16", None)) is not None:
        data.setdefault("bf16", old)
    zero = data.get("zero_optimization")
    if isinstance(zero, bool):  # true was stage 1
        size = {"allgather_bucket_size": data.pop("allgather_size")} if "allgather_size" in data else {}
        zero = data["zero_optimization"] = {"stage": int(zero), **(size if zero else {})}
    if not isinstance(zero, dict):
        return
    if zero.get("stage") in ("0", "1", "2", "3", 0.0, 1.0, 2.0, 3.0) and zero["stage"] is not True:
        zero["stage"] = int(zero["stage"])  # DeepSpeed reads "2" and 2.0 as 2
    for old_key, key in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if zero.get(old_key) in (None, "auto", False):
            zero.pop(old_key, None)
        elif zero[old_key] is True and zero.get(key) is None:
            del zero[old_key]
            zero[key] = {"device": "cpu"}


def unknown_keys(data: JsonObject, valid: KeyTree, parent: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (path of the key, message) for every key, at any depth, that DeepSpeed 0.19 does not know.

    A key that must have a block as its value but has another value is reported too. `valid` is the tree of the keys
    that may be below the key path `parent`: at the top level, deepspeed_keys.KEYS.
    """
    if "*" in valid:
        return
    for key, value in data.items():
        path = (*parent, key)
        if key not in valid:
            yield path, f"unknown key {dotted(path)!r}{nearest(key, valid)} DeepSpeed would ignore it or fail later."
            continue
        children = valid[key]
        if children is None or isinstance(children, (Refused, Unused)):
            continue
        if isinstance(value, dict):
            yield from unknown_keys(value, children, path)
        elif value not in (None, "auto"):
            yield path, f"{dotted(path)} must be a block {{...}}, not {shortened(value)}."


def bad_values(data: JsonObject) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (path of the key, message) for each wrong value that DeepSpeed may accept without an error.

    These are a ZeRO stage other than 0 to 3, a value of an old offload key that modernise could not replace, and "auto"
    at a top-level key that the run file does not set.
    """
    zero = data.get("zero_optimization")
    if isinstance(zero, dict):
        stage = zero.get("stage", 0)
        if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
            yield (
                ("zero_optimization", "stage"),
                f'zero_optimization.stage must be 0, 1, 2 or 3, not {shortened(stage)} (DeepSpeed reads "auto" as 0).',
            )
        for old_key in ("cpu_offload", "cpu_offload_param"):
            if old_key in zero:
                yield (
                    ("zero_optimization", old_key),
                    f"zero_optimization.{old_key} is an old key: its value must be true or false, and the block that "
                    "replaces it (offload_optimizer or offload_param) must be absent. Remove the old key.",
                )
    for key, value in data.items():
        if value == "auto" and key not in OWNED and not isinstance(KEYS.get(key), (Refused, Unused)):
            yield (
                (key,),
                f'{key}: "auto" is only valid for keys that the run file sets ({", ".join(OWNED)}). Write the value.',
            )


def missing_packages(data: JsonObject) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (path of the key, message) for each monitor that the JSON turns on but whose package is not installed."""
    for key, package in (("wandb", "wandb"), ("comet", "comet_ml")):
        block = data.get(key)
        if isinstance(block, dict) and block.get("enabled") is True and importlib.util.find_spec(package) is None:
            yield (
                (key, "enabled"),
                f"{key}.enabled needs the package {package}, which is not installed here: "
                f"pip install {package}, or remove the block.",
            )


# The run file sets the values of these keys.
OWNED = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "fp16", "bf16", "torch_autocast", "optimizer", "scheduler",
)  # fmt: skip


def _optimizer_block(optimizer: OptimizerSection, given: JsonObject) -> JsonObject:
    """Return DeepSpeed's `optimizer` block for the run file's optimizer. With muon, the block describes the AdamW that
    updates the parameters outside Muon's matrices.

    `given` is the optimizer block of the JSON. Parameters that only the JSON has are kept.
    """
    params: JsonObject = {
        "lr": optimizer.lr,
        "weight_decay": optimizer.weight_decay,
        "betas": list(optimizer.betas),
    }
    if optimizer.name != "lion":
        params["eps"] = optimizer.eps
    extra = {k: v for k, v in (given.get("params") or {}).items() if k not in params}
    return {"type": "Lion" if optimizer.name == "lion" else "AdamW", "params": {**params, **extra}}


def _precision_blocks(precision: str, stage: int, given: JsonObject) -> JsonObject:
    """Return the blocks of the DeepSpeed configuration that set the precision ("fp32", "bf16" or "fp16") at a ZeRO
    stage.

    Gradients are always accumulated in fp32 (DeepSpeed#1800, #2352). So at stage 0, bf16 means torch.autocast over fp32
    weights, because DeepSpeed's own bf16 mode accumulates in bf16 there. `given` is the JSON; other settings in the
    same blocks are kept. Raises ConfigError for fp16 at stage 0.
    """
    blocks: JsonObject = {}
    if precision == "fp16" and stage == 0:
        raise ConfigError(
            "train.precision: fp16 with ZeRO-0: DeepSpeed accumulates gradients in fp16 and does not resume exactly. "
            "Write deepspeed: zero1 (same speed, less memory), or train.precision: bf16."
        )
    if precision == "bf16" and stage == 0:
        blocks["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif precision in ("bf16", "fp16"):
        blocks[precision] = {**(given.get(precision) or {}), "enabled": True}
        if stage > 0:
            blocks["data_types"] = {"grad_accum_dtype": "fp32", **(given.get("data_types") or {})}
    return blocks


def zero_stage(ds_config: DsConfig) -> int:
    """Return the ZeRO stage of a DeepSpeed configuration, or 0 if the configuration sets none."""
    return int((ds_config.get("zero_optimization") or {}).get("stage") or 0)


def _without_auto(data: JsonObject) -> JsonObject:
    """Return a copy of a DeepSpeed JSON without the keys whose value is "auto" or null, at any depth.

    For them the value of the run file, of deepspeed_defaults.py or of DeepSpeed itself then applies.
    """
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in data.items()
        if value is not None and value != "auto"
    }


def resolve_ds_config(
    run: RunFile, raw: JsonObject, plan: BatchPlan, precision: str, model: GPTConfig | None = None
) -> JsonObject:
    """Return the final DeepSpeed configuration: the JSON plus the keys that the run file sets, without any "auto".

    `raw` is the checked JSON (load_ds_config) and `precision` is "fp32", "bf16" or "fp16". Raises ConfigError if the
    JSON contradicts the run file (the message names both values), and for fp16 at stage 0. Keys that neither file sets
    get the defaults of deepspeed_defaults.py. Some of these depend on the model's size and need `model`.
    """
    raw = _without_auto(without_refused_keys(raw))
    final = {key: copy.deepcopy(value) for key, value in raw.items() if key not in OWNED}
    owned: JsonObject = {
        "train_batch_size": run.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        # DeepSpeed clips at 1.0 if the key is absent, so it is always written.
        "gradient_clipping": run.train.grad_clip,
    }
    final |= owned | {"optimizer": _optimizer_block(run.train.optimizer, raw.get("optimizer") or {})}
    if contradictions := list(conflicts(run, raw, owned, precision)):
        raise ConfigError("\n".join(contradictions))
    # DeepSpeed takes ranks that share a row for data-parallel ranks, and checks the product of the three numbers.
    final["train_batch_size"] = plan.counted_by_deepspeed
    if run.train.optimizer.name == "muon":  # engine/muon.py, which DeepSpeed does not know
        final |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    final |= _precision_blocks(precision, zero_stage(raw), raw)
    # The training loop prints its own lines; DeepSpeed's reports would repeat them.
    final.setdefault("steps_per_print", 2**31 - 1)
    board = {"enabled": run.monitor.tensorboard, "output_path": str(run.folder), "job_name": "tensorboard"}
    final["tensorboard"] = {**board, **(raw.get("tensorboard") or {})}
    fill_defaults(final, precision, model, plan.layout.zero)
    return final


def conflicts(run: RunFile, raw: JsonObject, owned: JsonObject, precision: str) -> Iterator[str]:
    """Yield a message for everything in the JSON that contradicts the run file.

    `raw` is the JSON without "auto". `owned` has the batch sizes and the clipping limit that follow from the run file.
    """
    path = ds_config_path(run.deepspeed)
    for key, value in owned.items():
        if raw.get(key, value) != value:
            yield (
                f"{path}: {key} = {shortened(raw[key])}, but the run file's section train makes it {value!r}. "
                'Remove the key from the JSON or write "auto".'
            )
    if raw.get("scheduler"):
        yield f"{path}: scheduler: the run file sets the learning rate (train.schedule). Remove the block here."
    given = raw.get("optimizer") or {}
    yield from _other_optimizer(path, given, _optimizer_block(run.train.optimizer, given))
    autocast = raw.get("torch_autocast") or {}
    wanted = {"bf16": precision == "bf16", "fp16": precision == "fp16"}
    if autocast.get("enabled"):
        # At stage 0, bf16 is autocast.
        wanted["torch_autocast"] = precision == "bf16" and zero_stage(raw) == 0
        if str(autocast.get("dtype", "bfloat16")).removeprefix("torch.") not in ("bfloat16", "bf16"):
            yield (
                f"{path}: torch_autocast.dtype = {autocast['dtype']!r}, but the run file sets the precision "
                "(train.precision). Remove the key."
            )
    for name, expected in wanted.items():
        enabled = (raw.get(name) or {}).get("enabled", expected)
        if enabled != expected:
            yield f"{path}: {name}.enabled = {enabled!r}, but train.precision is {precision}. Remove {name} here."
    if run.parallel.sequence > 1 and (raw.get("compile") or {}).get("deepcompile") is True:
        yield (
            f"{path}: compile.deepcompile with parallel.sequence = {run.parallel.sequence} is not supported. Remove "
            "the compile block; to compile the model, set model.kernels: compile in the run file."
        )
    if run.parallel.tensor > 1:
        yield from _refused_with_tensor(path, raw, f"parallel.tensor = {run.parallel.tensor}")
    quantized = (raw.get("zero_optimization") or {}).get("zero_quantized_gradients") is True
    if quantized and precision != "fp16" and raw.get("communication_data_type") != "fp16":
        yield (
            f"{path}: zero_quantized_gradients = True in {precision}: DeepSpeed's kernel reads the gradients as fp16, "
            "whatever they are, and 0.0008 in bf16 becomes 0.79. Remove it (zero_quantized_weights may stay), or train "
            "in fp16."
        )
    if run.train.optimizer.name == "muon":
        yield from _refused_with_muon(path, raw)
    if run.train.batch_warmup:
        yield from _refused_with_batch_warmup(path, raw)
    if run.parallel.expert > 1:
        yield from _refused_with_experts(path, raw, run.parallel.expert)


def _refused_with_tensor(path: Path, raw: JsonObject, asked: str) -> Iterator[str]:
    """Yield a message for every setting of the JSON `raw` that works only if each rank has complete weights.

    `asked` names the setting of the run file that divides them, such as "parallel.tensor = 2".
    """
    zero = raw.get("zero_optimization") or {}
    if (raw.get("compile") or {}).get("deepcompile") is True:
        yield f"{path}: compile.deepcompile with {asked} is not supported. Remove the compile block."
    if (zero.get("zero_hpz_partition_size") or 1) > 1 or zero.get("zero_quantized_gradients") is True:
        yield (
            f"{path}: zero_hpz_partition_size and zero_quantized_gradients with {asked} are not supported: DeepSpeed "
            "uses groups of neighbours for them, and they have different parts of the weights. Remove them here."
        )


def _refused_with_batch_warmup(path: Path, raw: JsonObject) -> Iterator[str]:
    """Yield a message for each setting of the JSON `raw` with which the number of micro batches per step cannot
    change during a run.
    """
    zero, compiler = raw.get("zero_optimization") or {}, raw.get("compile") or {}
    found = {
        "zero_optimization.zenflow": bool(zero.get("zenflow")),  # counts its own intervals in micro batches
        "compile.deepcompile": compiler.get("deepcompile") is True,  # compiles the first micro batches' accumulation
    }
    for setting in (name for name, given in found.items() if given):
        yield f"{path}: {setting} does not work with train.batch_warmup. Remove one of the two."


def _refused_with_muon(path: Path, raw: JsonObject) -> Iterator[str]:
    """Yield a message for each setting of the JSON `raw` that works only with one of DeepSpeed's own Adam
    optimizers.
    """
    zero = raw.get("zero_optimization") or {}
    offload = zero.get("offload_optimizer") or {}
    found = {
        "zero_optimization.offload_optimizer.device: nvme": offload.get("device") == "nvme",
        "zero_optimization.offload_optimizer.ratio below 1": offload.get("ratio", 1) != 1,
        "zero_optimization.offload_optimizer.super_offload": bool(offload.get("super_offload")),
        "zero_optimization.zenflow": bool(zero.get("zenflow")),
    }
    for setting in (name for name, given in found.items() if given):
        yield f"{path}: {setting} works with AdamW only, not with train.optimizer.name: muon. Remove it."


def _refused_with_experts(path: Path, raw: JsonObject, expert: int) -> Iterator[str]:
    """Yield a message for each setting of the JSON `raw` with which ranks cannot share experts."""
    zero = raw.get("zero_optimization") or {}
    if zero_stage(raw) == 3:
        yield (
            f"{path}: ZeRO-3 with parallel.expert = {expert} is not supported, because it would partition each rank's "
            "experts over ranks that hold other experts. Write deepspeed: zero1 or zero2, or parallel.expert: 1."
        )
    found = {
        "zero_optimization.reduce_scatter: false": zero.get("reduce_scatter") is False,
        "zero_optimization.contiguous_gradients: false": zero.get("contiguous_gradients") is False,
        "zero_optimization.load_from_fp32_weights: false": zero.get("load_from_fp32_weights") is False,
        "zero_optimization.zenflow": bool(zero.get("zenflow")),
        "compile.deepcompile": (raw.get("compile") or {}).get("deepcompile") is True,
        "prescale_gradients": raw.get("prescale_gradients") is True,
    }
    for setting in (name for name, given in found.items() if given):
        yield f"{path}: {setting} does not work with parallel.expert = {expert}. Remove it."


def _other_optimizer(path: Path, given: JsonObject, ours: JsonObject) -> Iterator[str]:
    # "Adam" is AdamW in DeepSpeed unless params.adam_w_mode is false.
    """Yield a message if the JSON's optimizer block (`given`) has another type or another value than the run file's
    (`ours`).
    """
    params = given.get("params") or {}
    same = (ours["type"].lower(), "adam" if ours["type"] == "AdamW" and params.get("adam_w_mode", True) else "")
    if str(given.get("type", ours["type"])).lower() not in same:
        yield (
            f"{path}: optimizer.type = {shortened(given['type'])}, but the run file's train.optimizer.name "
            f"gives {ours['type']!r}. Remove the key from the JSON, or change the run file."
        )
    for key, value in params.items():
        if key in ours["params"] and value != ours["params"][key]:
            yield (
                f"{path}: optimizer.params.{key} = {shortened(value)}, but the run file's train.optimizer "
                f"makes it {ours['params'][key]!r}. "
                'Remove the key from the JSON or write "auto".'
            )
