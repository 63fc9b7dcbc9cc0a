"""`packspeed plan --search`: the settings of a run that fit, fastest first.

    found = search(run, machine, ranks=64)
    found.fitting[0].plan, found.fitting[0].settings

Every combination of parallel sizes that the engine trains, ZeRO stage (with offload at 2 and 3), micro batch (the
divisors of a rank's share) and recompute (no block, every second one, all) is planned; a plan takes about 1 ms. Of
settings that predict the same time, micro batches of at least ENOUGH_TOKENS come first, then less memory. If nothing
fits, `remedies` lists changes of the run file and how much memory each saves.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

from packspeed.launch.config.batch import divisors_of
from packspeed.launch.config.deepspeed_json import load_ds_config, zero_stage
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.config.layout import run_layout
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.planner.machine import GIB, Machine
from packspeed.launch.planner.plan import NOT_MEASURED, Plan, job_of, plan_of
from packspeed.model.config import Recompute

STAGES = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")  # files in ds_configs/
RECOMPUTES: tuple[Recompute, ...] = ("none", 2, "full")
MOST_TOKENS = 131_072  # of a micro batch: beyond it nothing gets faster
ENOUGH_TOKENS = 8_192  # of a micro batch: with fewer, kernels are slower than the formulas say
AXES = ("sequence", "tensor", "expert")  # of the section `parallel`
PARALLEL = (1, 2, 4, 8)  # ranks that share a sequence or the weights: those of a host, which has the fast links
MARGIN = 0.08  # share of the memory that stays free: nine tenths of plans err by less


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One combination of settings, as `--set` writes them, and its plan."""

    settings: dict[str, str]
    plan: Plan

    @property
    def fits_with_margin(self) -> bool:
        """Return whether the plan fits and leaves the share MARGIN of the device's memory free."""
        return self.plan.fits and self.plan.device_total <= (1 - MARGIN) * self.plan.device_capacity


@dataclasses.dataclass(frozen=True)
class Found:
    """All candidates that fit, fastest first, and remedies if there is none."""

    tried: int
    fitting: list[Candidate]
    remedies: list[str]

    def as_dict(self, most: int) -> JsonObject:
        """Return the result as plain data for JSON, with at most `most` candidates."""
        shown = [{"set": c.settings, "plan": c.plan.as_dict()} for c in self.fitting[:most]]
        return {"tried": self.tried, "fitting": len(self.fitting), "candidates": shown, "remedies": self.remedies}


def search(run: RunFile, machine: Machine, ranks: int, vocabulary: int | None = None) -> Found:
    """Return the settings with which a run fits on `ranks` GPUs.

    Raises ConfigError if the global batch cannot be divided among them, or if no layout can train the run.
    """
    samples = run.batches.divisor
    if samples % ranks:
        near = [n for n in divisors_of(samples) if n <= ranks][-3:]
        raise ConfigError(
            f"{' or '.join(map(str, run.batches.sizes))} samples of a step cannot be divided among {ranks} GPUs: "
            f"choose --ranks from {', '.join(map(str, near))}, or change train.global_batch_tokens"
            f"{' and train.batch_warmup' if run.train.batch_warmup else ''}."
        )
    alone = run.parallel.model_copy(update=dict.fromkeys(_axes(run), 1))
    run_layout(_changed(run, {"parallel": alone}), ranks)  # raises what no other size would change
    candidates = list(_candidates(run, machine, ranks, vocabulary))
    fitting = sorted(
        (c for c in candidates if c.fits_with_margin),
        key=lambda c: (
            round(c.plan.step_s, 3), max(0, ENOUGH_TOKENS - c.plan.micro_batch * run.data.seq_len), c.plan.device_total,
        ),
    )  # fmt: skip
    return Found(len(candidates), fitting, [] if fitting else remedies(run, machine, ranks, candidates))


def _candidates(run: RunFile, machine: Machine, ranks: int, vocabulary: int | None) -> Iterator[Candidate]:
    """Yield every combination of parallel sizes, ZeRO stage, recompute and micro batch, with its plan."""
    samples = run.batches.divisor  # the candidates' micro batch must divide every batch
    for parallel in _parallel_sizes(run, machine.on_host(ranks)):
        shared = _changed(run, {"parallel": run.parallel.model_copy(update=parallel)})
        try:
            rows = run_layout(shared, ranks).rows
        except ConfigError:  # a size does not divide the heads, the tokens or the experts
            continue
        if samples % rows:
            continue
        settings = {f"parallel.{key}": str(size) for key, size in parallel.items() if size > 1}
        for candidate in _within(shared, machine, ranks, vocabulary, samples // rows):
            yield Candidate(candidate.settings | settings, candidate.plan)


def _axes(run: RunFile) -> list[str]:
    """Return the keys of the section `parallel` that this model can use: expert only if it has experts."""
    return [axis for axis in AXES if axis != "expert" or run.gpt_config(1).n_expert]


def _parallel_sizes(run: RunFile, most: int) -> Iterator[dict[str, int]]:
    """Yield every combination of sizes for the keys of the section `parallel` that this model can use (`_axes`).

    Neither sequence x tensor nor expert is larger than `most`.
    """
    axes = _axes(run)
    for sizes in itertools.product(PARALLEL, repeat=len(axes)):
        parallel = dict(zip(axes, sizes, strict=True))
        shared = parallel.get("sequence", 1) * parallel.get("tensor", 1)
        if max(shared, parallel.get("expert", 1)) <= most:
            yield parallel


def _within(run: RunFile, machine: Machine, ranks: int, vocabulary: int | None, samples: int) -> Iterator[Candidate]:
    """Yield a candidate for every combination of ZeRO stage, recompute and micro batch, with the parallel sizes of
    `run`.

    samples: samples per step of each data-parallel replica.
    """
    most = MOST_TOKENS * run.parallel.sequence
    sizes = [n for n in divisors_of(samples) if n == 1 or n * run.data.seq_len <= most]
    for name, raw in _stages(run):
        for recompute, size in itertools.product(RECOMPUTES, sizes):
            settings = {
                "deepspeed": name, "train.micro_batch": str(size), "model.activation_checkpointing": str(recompute),
            }  # fmt: skip
            changed = _micro_batch(_recompute(run, recompute), size)
            yield Candidate(settings, plan_of(job_of(changed, raw, machine, ranks, vocabulary)))


@functools.cache
def _stage(name: str) -> JsonObject:
    """Return the packaged DeepSpeed configuration `name`, such as "zero2". Do not change the result: it is cached."""
    return load_ds_config(name)


def _stages(run: RunFile) -> Iterator[tuple[str, JsonObject]]:
    """Yield (name, content) of the DeepSpeed configurations in STAGES that the run's layout allows."""
    for name in STAGES:
        raw = _stage(name)
        if run.parallel.expert == 1 or zero_stage(raw) < 3:
            yield name, raw


def _recompute(run: RunFile, recompute: Recompute) -> RunFile:
    """Return a copy of a run file with this value of model.activation_checkpointing."""
    model = run.model.model_copy(update={"activation_checkpointing": recompute})  # type: ignore[attr-defined]
    return _changed(run, {"model": model})


def _micro_batch(run: RunFile, size: int) -> RunFile:
    """Return a copy of a run file with this micro batch."""
    return _changed(run, {"train": run.train.model_copy(update={"micro_batch": size})})


def _changed(run: RunFile, sections: JsonObject) -> RunFile:
    """Return a copy of a run file with these sections instead of its own."""
    return run.model_copy(update=sections)


def remedies(run: RunFile, machine: Machine, ranks: int, candidates: list[Candidate]) -> list[str]:
    """Return lines of text: changes that would make the run fit, and how much memory each saves. None of `candidates`
    fits.
    """
    best = min(candidates, key=lambda c: c.plan.device_total)
    free = (1 - MARGIN) * machine.memory
    host = sum(best.plan.host_memory.values()) * machine.on_host(ranks)
    lines = [
        f"the smallest combination, {_named(best)}, needs {best.plan.device_total / GIB:.1f} GiB of a GPU's "
        f"{free / GIB:.1f} GiB, and {host / GIB:.0f} GiB of a host's {machine.host_memory / GIB:.0f} GiB"
    ]
    if host > machine.host_memory:
        lines.append(f"hosts with more memory, or {math.ceil(host / machine.host_memory)} times as many")
    kinds = sorted(best.plan.memory.items(), key=lambda item: -item[1])[:3]
    lines.append("its largest parts: " + ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in kinds))
    shared = sum(best.plan.memory.get(kind, 0.0) for kind in ("optimizer", "gradients", "weights"))
    if best.plan.stage == 3 and shared:
        lines.append(f"twice the GPUs: {shared / 2 / GIB:.1f} GiB less per GPU, because ZeRO-3 divides the states")
    activations = best.plan.memory.get("activations", 0.0) + best.plan.memory.get("logits", 0.0)
    lines.append(f"half of data.seq_len: up to {activations / 2 / GIB:.1f} GiB less, of activations and logits")
    if run.train.optimizer.name == "adamw":
        states = 4 * best.plan.parameters / ranks
        lines.append(f"train.optimizer.name: lion: {states / GIB:.1f} GiB less, because it has one moment")
    return lines


def _named(candidate: Candidate) -> str:
    """Return a candidate's settings as text, such as "deepspeed zero3, micro_batch 4"."""
    return ", ".join(f"{key.split('.')[-1]} {value}" for key, value in candidate.settings.items())


def reductions(plan: Plan, run: RunFile, raw: JsonObject, machine: Machine, vocabulary: int | None) -> list[str]:
    """Return one line for each single change to a plan that does not fit: the change, how much memory it saves, and
    how much longer a step takes.

    On a CPU, only the memory of tensors is compared, and the lines do not contain the time.
    """
    measured = NOT_MEASURED if machine.is_cpu else None
    tensors = plan.device_total - plan.memory.get("process", 0.0)
    lines = []
    changes: list[tuple[str, RunFile, JsonObject]] = []
    if plan.recompute != "full":
        changes.append(("model.activation_checkpointing: full", _recompute(run, "full"), raw))
    for size in [n for n in divisors_of(plan.micro_batch) if n < plan.micro_batch][-1:]:
        changes.append((f"train.micro_batch: {size}", _micro_batch(run, size), raw))
    for name, other_stage in _stages(run):
        if zero_stage(other_stage) > plan.stage or "offload" in name:
            changes.append((f"deepspeed: {name}", run, other_stage))
    for words, changed, json in changes:
        other = plan_of(job_of(changed, json, machine, plan.ranks, vocabulary), "", measured)
        less = tensors - other.device_total
        if less > 0:
            slower = "" if machine.is_cpu else f", step {other.step_s / plan.step_s - 1:+.0%}"
            lines.append(
                f"{words}: {less / GIB:.1f} GiB less, {'fits' if other.fits else 'still does not fit'}{slower}"
            )
    return lines
