"""`packspeed explain RUNFILE`: every effective value, its default, who set it, and every known trouble.

    explanation = explain("launch/configs/quickstart.yaml", ["train.steps=10"], ranks=2)

Training refuses a wrong file at its first problem; this goes on past it: what is wrong is noted, taken out, and the
rest explained, so that one reading names everything. Who set a value: default, preset, file:line, --set, dataset, or
solved (from the ranks and the device). Troubles come from the loaders themselves (kind refused) and from the rules in
lint.py and lint_run.py. Cost: 0.3 s; imports neither torch nor deepspeed. DEFAULTS is DeepSpeed 0.19.8's, tested.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from packspeed.data.errors import DataError
from packspeed.data.remote import open_dataset
from packspeed.launch.cluster.local_launcher import default_ranks, local_accelerators
from packspeed.launch.config.batch import BatchPlan, solve_batch
from packspeed.launch.config.deepspeed_json import (
    OWNED,
    bad_values,
    ds_config_path,
    resolve_ds_config,
    unknown_keys,
    zero_stage,
)
from packspeed.launch.config.deepspeed_keys import KEYS
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.loading import apply_overrides, describe_error, parse_numbers, parse_with_lines
from packspeed.launch.config.run_file import RunFile, Section
from packspeed.launch.explain import deepspeed_rules, run_rules  # noqa: F401  importing them fills RULES
from packspeed.launch.explain.rule import KINDS, RULES, Case, block
from packspeed.launch.run_folder.folder import flatten
from packspeed.model.config import PRESETS, GPTConfig

# What DeepSpeed 0.19.8 uses for the keys of zero_optimization that matter at each stage, where a JSON says nothing.
DEFAULTS: dict[str, Any] = {
    "stage": 0, "contiguous_gradients": True, "reduce_scatter": True, "reduce_bucket_size": 500_000_000,
    "allgather_partitions": True, "allgather_bucket_size": 500_000_000, "round_robin_gradients": False,
    "sub_group_size": 1_000_000_000, "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000, "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000, "stage3_gather_16bit_weights_on_model_save": False,
    "zero_hpz_partition_size": 1, "zero_quantized_weights": False, "zero_quantized_gradients": False,
}  # fmt: skip


OTHER_DEFAULTS: dict[str, Any] = {
    "gradient_clipping": 1.0, "prescale_gradients": False, "gradient_predivide_factor": 1.0, "steps_per_print": None,
    "wall_clock_breakdown": False, "memory_breakdown": False, "zero_allow_untested_optimizer": False,
}  # fmt: skip


MAX_REPAIRS = 40


@dataclasses.dataclass(frozen=True)
class Value:
    """One effective setting."""

    key: str
    value: Any
    default: Any
    set_by: str


@dataclasses.dataclass(frozen=True)
class Problem:
    """One trouble; `where` is a file and line where it is known."""

    rule: str
    kind: str
    message: str
    source: str = ""


@dataclasses.dataclass
class Explanation:
    """What explain found."""

    run_file: str
    values: list[Value]
    deepspeed: list[Value]
    problems: list[Problem]

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return dataclasses.asdict(self)


@dataclasses.dataclass
class _Files:
    """Both files as written, with where everything stands."""

    path: Path
    lines: dict[tuple[str | int, ...], int]
    origins: dict[tuple[str | int, ...], str]
    given: dict[str, Any]  # what the file and --set say, before repairs
    problems: list[Problem]

    def set_by(self, key: str) -> str | None:
        """Who wrote a dotted key; None where nobody did."""
        where = tuple(key.split("."))
        for n in range(len(where), 0, -1):
            if where[:n] in self.origins and (key in self.given or n == len(where)):
                return self.origins[where[:n]]
        return f"{self.path}:{self.lines[where]}" if where in self.lines and key in self.given else None


def explain(run_file: str | Path, overrides: Sequence[str] = (), ranks: int | None = None) -> Explanation:
    """Explain both files. Raises ConfigError only where the run file cannot be read as YAML or holds no run."""
    path = Path(run_file)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"run file {path}: {error.strerror}.") from None
    data, lines = parse_with_lines(text, path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}:1: a run file is a mapping (name: ..., model: ..., data: ..., train: ...).")
    origins = apply_overrides(data, overrides)
    data = parse_numbers(data)
    files = _Files(path, lines, origins, flatten(data), [])
    run = _validated(copy.deepcopy(data), files)
    raw, ds_lines = _deepspeed_json(run.deepspeed, files.problems)
    count = ranks if ranks is not None else default_ranks(run)
    plan = _plan(run, count, files.problems)
    precision, why = guessed_precision(run.train.precision)
    facts = _dataset_facts(run, files.problems)
    model = _model(run, facts, files.problems)
    final = _resolved(run, raw, plan, precision, files.problems)
    case = Case(
        run, files.given, raw, precision, count, plan.accumulation, plan.micro_batch, local_accelerators() > 0, model,
        facts.get("train"), facts.get("val"),
    )  # fmt: skip
    files.problems += _linted(case)
    values = [*_run_values(run, files, model, facts), *_solved(run, plan, precision, why, count)]
    return Explanation(str(path), values, _ds_values(run, raw, final, ds_lines), _sorted(files.problems))


def _validated(data: dict[str, Any], files: _Files) -> RunFile:
    """The run file with what is wrong taken out and noted."""
    for _ in range(MAX_REPAIRS):
        try:
            return RunFile.model_validate(data)
        except ValidationError as error:
            found = error.errors()
        for each in found:
            message = describe_error(each, files.path, files.lines, files.origins)
            name = "unknown-key" if each["type"] == "extra_forbidden" else "wrong-value"
            files.problems.append(Problem(name, "refused", message))
            if not _repair(data, tuple(each["loc"]), str(each["msg"])):
                raise ConfigError("\n".join(dict.fromkeys(p.message for p in files.problems)))
    raise ConfigError("\n".join(dict.fromkeys(p.message for p in files.problems)))


def _repair(data: dict[str, Any], where: tuple[str | int, ...], message: str) -> bool:
    """Take the wrong value out (or put a harmless one in), so that the rest can be explained."""
    train, part = data.get("train", {}), data.get("data", {})
    if "warmup_steps" in message and isinstance(train, dict):
        train.setdefault("schedule", {})["warmup_steps"] = 0
        return True
    if "global_batch_tokens" in message and isinstance(train, dict):
        length = int(part["seq_len"])
        train["global_batch_tokens"] = max(length, int(train["global_batch_tokens"]) // length * length)
        return True
    if "exactly one of" in message:
        (train if "train" in message else part).pop("tokens" if "train" in message else "sources", None)
        return any(key in (train if "train" in message else part) for key in ("steps", "path"))
    return _remove(data, where)


def _remove(data: Any, where: tuple[str | int, ...]) -> bool:
    """Remove the deepest key of `where` that is there, unless the whole of a required section would go."""
    node, last = data, None
    for part in where:
        if not isinstance(node, dict) or part not in node:
            break
        node, last = node[part], (node, part)
    if last is None or (last[0] is data and last[1] in ("model", "data", "train", "name")):
        return False
    del last[0][last[1]]
    return True


def _deepspeed_json(name: str, problems: list[Problem]) -> tuple[dict[str, Any], dict[tuple[str | int, ...], int]]:
    """The JSON without what DeepSpeed would not read, and its lines; everything wrong is noted."""
    path = ds_config_path(name)
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
        _, lines = parse_with_lines(text.replace("\t", " "), path)
        if not isinstance(data, dict):
            raise ConfigError(f"{path}:1: a DeepSpeed configuration is a JSON object.")
    except (OSError, ValueError, ConfigError) as error:
        what = error.strerror if isinstance(error, OSError) else str(error)
        problems.append(Problem("unreadable-json", "refused", f"deepspeed: {path}: {what}"))
        return {}, {}
    for where, message in list(unknown_keys(data, KEYS, ())):
        kind = "removed-key" if where[0] in REMOVED else "unknown-key"
        why = f"{'.'.join(where)}: {REMOVED[where[0]]}" if where[0] in REMOVED else message
        problems.append(Problem(kind, "refused", f"{path}:{lines.get(where, 1)}: {why}", "DeepSpeed#653, #774, #1809"))
        _remove(data, where)
    for where, message in list(bad_values(data)):
        problems.append(Problem("bad-value", "refused", f"{path}:{lines.get(where, 1)}: {message}", "FAI-RL#72"))
    if not isinstance(block(data, "zero_optimization").get("stage", 0), int):
        data["zero_optimization"].pop("stage")
    return data, lines


REMOVED = {
    "elasticity": "gone from DeepSpeed 0.19; start again with other ranks instead: the checkpoint is converted.",
    "amp": "gone from DeepSpeed 0.19; the run file's train.precision says it.",
    "curriculum_learning": "gone from DeepSpeed 0.19; stages of data.sources change the mixture.",
    "sparse_attention": "gone from DeepSpeed 0.19; attention is causal, in flash kernels.",
    "progressive_layer_drop": "gone from DeepSpeed 0.19.",
    "compression_training": "gone from DeepSpeed 0.19.",
    "nebula": "gone from DeepSpeed 0.19; checkpoint.async_write saves in the background.",
}


def _plan(run: RunFile, ranks: int, problems: list[Problem]) -> BatchPlan:
    try:
        return solve_batch(run.global_batch, run.data.seq_len, ranks, run.train.micro_batch)
    except ConfigError as error:
        problems.append(Problem("batch-does-not-divide", "refused", str(error), "DeepSpeed#17, #3228, #3982"))
        return BatchPlan(1, max(1, run.global_batch // ranks), ranks)


def guessed_precision(wanted: str) -> tuple[str, str]:
    """What `auto` becomes on this machine, without torch, and why; a GPU is taken to have bf16."""
    if wanted != "auto":
        return wanted, "given"
    if local_accelerators():
        return "bf16", "solved: this machine has a GPU"
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        flags = ""
    native = bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags))  # the last is Arm's
    return ("bf16", "solved: this CPU has bf16") if native else ("fp32", "solved: no GPU, and this CPU has no bf16")


def _dataset_facts(run: RunFile, problems: list[Problem]) -> dict[str, int]:
    """Tokens of both splits and the vocabulary of a local dataset; empty where it is a mixture or elsewhere."""
    if run.data.path is None or "://" in run.data.path:
        return {}
    try:
        dataset = open_dataset(run.data.path)
        splits = {"train": dataset.tokens("train"), "val": dataset.tokens("val")}
        return {**splits, "vocab_size": dataset.vocab_size}
    except (DataError, OSError, KeyError) as error:
        problems.append(Problem("no-dataset", "refused", f"data.path: {error}"))
        return {}


def _model(run: RunFile, facts: dict[str, int], problems: list[Problem]) -> GPTConfig | None:
    try:
        return run.gpt_config(facts.get("vocab_size", run.model.vocab_size or 1))  # type: ignore[attr-defined]
    except ConfigError as error:
        problems.append(Problem("model-does-not-fit", "refused", str(error)))
        return None


def _resolved(
    run: RunFile, raw: dict[str, Any], plan: BatchPlan, precision: str, problems: list[Problem]
) -> dict[str, Any]:
    """The dict the engine would get; contradictions are noted and the run file's side taken."""
    for _ in range(2):
        try:
            return resolve_ds_config(run, raw, plan, precision)
        except ConfigError as error:
            name = "fp16-stage0" if "fp16 with ZeRO-0" in str(error) else "contradiction"
            problems += [Problem(name, "refused", line, "DeepSpeed#17, #7303") for line in str(error).split("\n")]
            if name == "fp16-stage0":
                return dict(raw)
            raw = {key: value for key, value in raw.items() if key not in OWNED}
    return dict(raw)


def _linted(case: Case) -> list[Problem]:
    return [Problem(each.name, each.kind, message, each.source) for each in RULES for message in each.check(case)]


def _sorted(problems: list[Problem]) -> list[Problem]:
    unique = {(p.rule, p.message): p for p in problems}
    return sorted(unique.values(), key=lambda p: KINDS.index(p.kind))


def _run_values(run: RunFile, files: _Files, model: GPTConfig | None, facts: dict[str, int]) -> list[Value]:
    """Every field of the run file, sections in the order of the schema."""
    out: list[Value] = []

    def walk(section: Section, prefix: str) -> None:
        for name, field in type(section).model_fields.items():
            value, key = getattr(section, name), prefix + name
            if key == "model":
                out.extend(_model_values(run, files, model, facts))
            elif isinstance(value, Section):
                walk(value, f"{key}.")
            else:
                default = None if field.is_required() else field.get_default(call_default_factory=True)
                out.append(Value(key, _plain(value), _plain(default), files.set_by(key) or "default"))

    walk(run, "")
    return out


def _model_values(run: RunFile, files: _Files, model: GPTConfig | None, facts: dict[str, int]) -> list[Value]:
    preset = run.model.preset  # type: ignore[attr-defined]
    out = [Value("model.preset", preset, None, files.set_by("model.preset") or "default")]
    for field in dataclasses.fields(GPTConfig) if model else ():
        default = None if field.default is dataclasses.MISSING else field.default
        solved = {
            "vocab_size": "dataset" if facts else "unknown: no dataset here",
            "max_seq_len": "solved: data.seq_len",
        }
        inherited = f"preset {preset}" if preset and field.name in PRESETS.get(preset, {}) else None
        by = files.set_by(f"model.{field.name}") or inherited or solved.get(field.name) or "default"
        out.append(Value(f"model.{field.name}", getattr(model, field.name), default, by))
    return out


def _solved(run: RunFile, plan: BatchPlan, precision: str, why: str, ranks: int) -> list[Value]:
    cut = f"solved: {run.global_batch} samples = {plan.micro_batch} x {plan.accumulation} accumulated x {ranks} ranks"
    return [
        Value("(solved) precision", precision, "auto", why),
        Value("(solved) micro batch", plan.micro_batch, "auto", cut),
        Value("(solved) accumulation", plan.accumulation, None, cut),
        Value("(solved) total steps", run.train.total_steps, None, "train.steps or train.tokens"),
    ]


def _ds_values(
    run: RunFile, raw: dict[str, Any], final: dict[str, Any], lines: dict[tuple[str | int, ...], int]
) -> list[Value]:
    """The dict the engine gets, and what DeepSpeed adds to its ZeRO block."""
    path, stage = ds_config_path(run.deepspeed), zero_stage(raw)
    flat, written, out = flatten(final), flatten(raw), []
    for key, value in flat.items():
        name = key.removeprefix("zero_optimization.")
        default = DEFAULTS.get(name) if name != key else OTHER_DEFAULTS.get(key)
        mine = key in written and written[key] == value
        line = lines.get(tuple(key.split(".")))
        out.append(Value(key, value, default, f"{path}:{line}" if mine and line else "run file (solved)"))
    for name, value in DEFAULTS.items():
        if f"zero_optimization.{name}" not in flat and (
            not name.startswith(("stage3_", "zero_", "sub_")) or stage == 3
        ):
            out.append(Value(f"zero_optimization.{name}", value, value, "DeepSpeed's default"))
    return out


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.model_dump(mode="json")
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def text(found: Explanation) -> str:
    """For a terminal: problems first, then the values, those that somebody set marked with a star."""
    lines = [f"{len(found.problems)} known trouble(s) in {found.run_file}"]
    lines += [f"  [{p.kind}] {p.rule}: {p.message}{f' ({p.source})' if p.source else ''}" for p in found.problems]
    for title, values in (("run file", found.values), ("DeepSpeed, as the engine gets it", found.deepspeed)):
        width = max((len(v.key) for v in values), default=0)
        lines += ["", title]
        for v in values:
            star = " " if v.value == v.default else "*"
            was = "" if v.value == v.default else f"   default {_short(v.default)}"
            lines.append(f" {star} {v.key:<{width}}  {_short(v.value):<24} {v.set_by}{was}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    written = "-" if value is None else json.dumps(value) if isinstance(value, (list, dict, bool)) else str(value)
    return written if len(written) < 60 else written[:57] + "..."
