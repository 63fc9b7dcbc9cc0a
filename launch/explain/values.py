"""List every effective setting of a run, with its default and who set it.

Who set a value is one of: default, preset NAME, file:line, --set KEY=VALUE, dataset, or solved (computed from the
number of ranks and the device). DEFAULTS and OTHER_DEFAULTS hold the defaults of DeepSpeed 0.19.8.
tests/test_explain.py compares them with the installed version.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from packspeed.data.batch_sizes import BatchStage
from packspeed.launch.config.batch import BatchPlan
from packspeed.launch.config.deepspeed_defaults import BUCKET, MAX_LIVE, PREFETCH_BUCKET
from packspeed.launch.config.deepspeed_json import ds_config_path, zero_stage
from packspeed.launch.config.fp8 import fp8_blocks
from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.config.memory import held_bytes
from packspeed.launch.config.parsing import KeyPath
from packspeed.launch.config.run_file import RunFile, Section
from packspeed.launch.explain.lenient import WrittenRunFile
from packspeed.launch.explain.lint import Case, device
from packspeed.launch.run_folder.folder import flatten
from packspeed.model.config import PRESETS, GPTConfig, RopeScaling, num_parameters
from packspeed.model.mtp import MTP
from packspeed.model.mup import MuP

# DeepSpeed's defaults for the keys of zero_optimization.
DEFAULTS: JsonObject = {
    "stage": 0, "contiguous_gradients": True, "reduce_scatter": True, "reduce_bucket_size": BUCKET,
    "allgather_partitions": True, "allgather_bucket_size": BUCKET, "round_robin_gradients": False,
    "sub_group_size": 1_000_000_000, "stage3_prefetch_bucket_size": PREFETCH_BUCKET,
    "stage3_param_persistence_threshold": 100_000, "stage3_max_live_parameters": MAX_LIVE,
    "stage3_max_reuse_distance": 1_000_000_000, "stage3_gather_16bit_weights_on_model_save": False,
    "memory_efficient_linear": True,
    "zero_hpz_partition_size": 1, "zero_quantized_weights": False, "zero_quantized_gradients": False,
}  # fmt: skip

# DeepSpeed's defaults for keys at the top level.
OTHER_DEFAULTS: JsonObject = {
    "gradient_clipping": 1.0, "prescale_gradients": False, "gradient_predivide_factor": 1.0, "steps_per_print": None,
    "wall_clock_breakdown": False, "memory_breakdown": False, "zero_allow_untested_optimizer": False,
}  # fmt: skip

# Why Packspeed sets what neither file sets (config/deepspeed_defaults.py).
SOLVED = {
    "communication_data_type": 'solved: 4 bytes a gradient on the wire; "bf16" sends 2, and rounds every sum',
    "zero_optimization.memory_efficient_linear": "solved: true would round twice in 16 bits in layers with a bias",
    "zero_optimization.reduce_bucket_size": "solved: the model's size, in 8 pieces with overlap_comm",
    "zero_optimization.allgather_bucket_size": "solved: the model's size",
    "zero_optimization.stage3_prefetch_bucket_size": "solved: the model's size",
    "zero_optimization.offload_param.buffer_size": "solved: a rank's part of the largest parameter",
    "timers.throughput.enabled": "solved: true would wait for the device twice per micro batch",
}


HEAD = (
    "model/fused_loss.py; DeepSpeed's TiledFusedLogitsLoss is not used, because it ignores factors on the loss such as "
    "1 / accumulation (docs/long_context.md)"
)


@dataclasses.dataclass(frozen=True)
class Value:
    """One effective setting. `set_by` says who set it: a file and its line, --set, or the default."""

    key: str
    value: Any
    default: Any
    set_by: str


def run_file_values(run: RunFile, written: WrittenRunFile, model: GPTConfig | None, has_dataset: bool) -> list[Value]:
    """Return every setting of the run file, in the order in which the schema lists them.

    `model` is the model's configuration, if it is valid; `has_dataset` says whether the vocabulary size comes from a
    dataset.
    """
    values: list[Value] = []

    def walk(section: Section, prefix: str) -> None:
        for name, field in type(section).model_fields.items():
            value, key = getattr(section, name), prefix + name
            if key == "model":
                values.extend(_model_values(run, written, model, has_dataset))
            elif isinstance(value, Section):
                walk(value, f"{key}.")
            else:
                default = None if field.is_required() else field.get_default(call_default_factory=True)
                values.append(Value(key, _plain(value), _plain(default), written.set_by(key) or "default"))

    walk(run, "")
    return values


def _model_values(run: RunFile, written: WrittenRunFile, model: GPTConfig | None, has_dataset: bool) -> list[Value]:
    """Return the settings of the section `model`; only the preset if `model` is None.

    `model` is the model's configuration, if it is valid; `has_dataset` says whether the vocabulary size comes from a
    dataset.
    """
    preset = run.model.preset  # type: ignore[attr-defined]
    values = [Value("model.preset", preset, None, written.set_by("model.preset") or "default")]
    solved = {
        "vocab_size": "dataset" if has_dataset else "unknown: the dataset is not on this machine",
        "max_seq_len": "solved: data.seq_len",
    }
    for field in dataclasses.fields(GPTConfig) if model else ():
        default = None if field.default is dataclasses.MISSING else field.default
        inherited = f"preset {preset}" if preset and field.name in PRESETS.get(preset, {}) else None
        value = getattr(model, field.name)
        key = name = f"model.{field.name}"
        if isinstance(value, RopeScaling | MuP | MTP):  # a mapping in the run file; its first key must be given
            key = f"{name}.{dataclasses.fields(value)[0].name}"
            value = {k: v for k, v in dataclasses.asdict(value).items() if v is not None}
        by = written.set_by(key) or inherited or solved.get(field.name) or "default"
        values.append(Value(name, value, default, by))
    return values


def solved_values(
    run: RunFile, plans: Mapping[int, BatchPlan], precision: str, why: str, model: GPTConfig | None
) -> list[Value]:
    """Return the settings that are computed from the run file, the number of ranks and the device.

    `plans` is {samples of a step: how the ranks divide them}, `why` the reason for the precision, and `model` the
    model's configuration, or None if it is invalid.
    """
    plan, batches = plans[run.global_batch], run.train.batches
    division = (
        f"solved: {run.global_batch} samples = {plan.micro_batch} x {plan.accumulation} accumulated x "
        f"{plan.layout.rows} {'ranks' if plan.layout.per_row == 1 else f'groups of {plan.layout.per_row} ranks'}"
    )
    blocks = fp8_blocks(model, run.train.fp8_skip_blocks) if model and precision == "fp8" else range(0)
    in_fp8 = f"linear layers of {len(blocks)} of {model.n_layer} blocks" if model and blocks else "none"
    return [
        Value("(solved) resumes", *_resumes(run.train.deterministic)),
        Value("(solved) precision", precision, "auto", why),
        Value("(solved) in fp8", in_fp8, "none", "train.precision and train.fp8_skip_blocks"),
        Value("(solved) ranks", str(plan.layout), None, "the section parallel"),
        Value("(solved) micro batch", plan.micro_batch, "auto", division),
        Value("(solved) accumulation", plan.accumulation, None, division),
        *(
            Value(f"(solved) batch from step {stage.first_batch + 1:,} on", *_stage(stage, plans, run.data.seq_len))
            for stage in batches.stages
            if len(batches.stages) > 1
        ),
        Value("(solved) loss of the head", "in chunks", None, HEAD),
        Value("(solved) total steps", run.train.total_steps, None, "train.steps or train.tokens"),
    ]


def _stage(stage: BatchStage, plans: Mapping[int, BatchPlan], seq_len: int) -> tuple[str, None, str]:
    """Return (value, default, source) of the line about one stage of train.batch_warmup.

    `plans` is {samples of a step: how the ranks divide them}. The numbers in `stage` are in tokens.
    """
    plan = plans[stage.rows // seq_len]
    tokens = f"{stage.rows:,} tokens, from token {stage.first_sample:,} on"
    return tokens, None, f"solved: {plan.samples} samples = {plan.micro_batch} x {plan.accumulation} accumulated"


def memory_values(case: Case) -> list[Value]:
    """Return one setting: the GB of weights, gradients and AdamW's state that each rank holds.

    Returns an empty list with offload, with other optimizers, or without a valid model.
    """
    offloads = {device(case, "offload_optimizer"), device(case, "offload_param")} != {"none"}
    if case.model is None or offloads or case.run.train.optimizer.name != "adamw":
        return []
    each = sum(held_bytes(case.stage, case.precision, case.ranks))
    size = each * num_parameters(case.model, padded=True) / 1e9
    why = f"solved: {each:.4g} bytes a parameter; activations and buckets are added"
    return [Value("(solved) memory per rank", f"{size:.3g} GB", None, why)]


def _resumes(deterministic: bool) -> tuple[str, str, str]:
    """Return (value, default, source) of the line that says how exactly a resumed run equals an uninterrupted one.

    The default is what train.deterministic: true gives.
    """
    exact = "bit for bit"
    if deterministic:
        costs = "on GPUs attention's backward pass takes an estimated 1.2 to 2 times as long"
        return exact, exact, f"train.deterministic: {costs}"
    return "up to rounding on GPUs", exact, "train.deterministic: false"


def deepspeed_values(run: RunFile, raw: JsonObject, final: JsonObject, lines: dict[KeyPath, int]) -> list[Value]:
    """Return the settings of the final DeepSpeed configuration, and DeepSpeed's defaults for keys of zero_optimization
    that it does not contain.

    `raw` is the JSON, `final` the merged configuration, and `lines` has the line of each key of the JSON.
    """
    path, stage = ds_config_path(run.deepspeed), zero_stage(raw)
    flat, written = flatten(final), flatten(raw)
    values = []
    for key, value in flat.items():
        name = key.removeprefix("zero_optimization.")
        default = DEFAULTS.get(name) if name != key else OTHER_DEFAULTS.get(key)
        from_json = key in written and written[key] == value
        line = lines.get(tuple(key.split(".")))
        values.append(
            Value(key, value, default, f"{path}:{line}" if from_json and line else SOLVED.get(key, "run file (solved)"))
        )
    if "communication_data_type" not in flat:  # fp32, or stage 0, whose gradients are fp32 in every precision
        values.append(Value("communication_data_type", "fp32", "fp32", "the gradients are fp32"))
    for name, value in DEFAULTS.items():
        only_stage3 = name.startswith(("stage3_", "zero_", "sub_", "memory_"))
        if f"zero_optimization.{name}" not in flat and (stage == 3 or not only_stage3):
            values.append(Value(f"zero_optimization.{name}", value, value, "DeepSpeed's default"))
    return values


def _plain(value: Any) -> Any:
    """Return `value` with all sections of the run file in it, at any depth, converted to dicts for JSON."""
    if isinstance(value, Section):
        return value.model_dump(mode="json")
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
