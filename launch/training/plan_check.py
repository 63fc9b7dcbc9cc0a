"""Compare the first steps of a run with its locked plan (`packspeed plan --lock`), and keep the result.

    metrics.plan_check = plan_check(run, ranks, ...)      None without a locked plan of this run

For the first 20 steps of a process (STEPS), metrics.jsonl and TensorBoard get the planned values (planned_step_time_s,
planned_memory_gib) beside the measured ones. After these steps, both are written to `plan.json` in the run folder, with
the seconds of a step by kind of work and the allocator's own numbers. A warning is printed if a value is outside the
plan's error bar. The first 5 steps (WARM_UP) do not count, because they compile kernels and allocate memory. Steps with
a smaller batch (train.batch_warmup) are left out.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from packspeed.data.errors import PackspeedError
from packspeed.launch.config.deepspeed_json import load_ds_config
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.planner.lock import Lock, differences, read_lock, tensor_bytes
from packspeed.launch.run_folder.formats import PLAN_FILE, PlanResult, StepLine

STEPS, WARM_UP = 20, 5
GIB = 2**30


class PlanCheck:
    """Follows the first steps of a run on rank 0, and compares them with `lock`, the plan that packspeed plan --lock
    wrote.
    """

    def __init__(
        self,
        lock: Lock,
        folder: Path,
        spent: Callable[[], dict[str, float]],
        device: str,
        log: Callable[[str], None],
        batch_tokens: int = 0,
    ) -> None:
        """`spent` returns {kind of work: seconds that this process has spent on it}. `device` is "cpu" or "cuda".
        Steps with fewer tokens than `batch_tokens` are left out.
        """
        self.plan, self.path, self.spent, self.device, self.log = lock["plan"], folder / PLAN_FILE, spent, device, log
        self.batch_tokens = batch_tokens
        self.warm: dict[str, float] = {}  # the seconds at the end of the warm-up
        self.planned = {
            "step_time_s": float(self.plan["step_s"]),
            "memory_gib": tensor_bytes(self.plan["memory"]) / GIB,
        }
        self.seconds: list[float] = []
        self.memory: list[float] = []

    def see(self, line: StepLine) -> None:
        """Add the planned values to `line`, if it is of one of the first 20 steps. At the 20th, write plan.json."""
        if len(self.seconds) >= STEPS or line.get("batch_tokens", self.batch_tokens) < self.batch_tokens:
            return
        line["planned_step_time_s"] = round(self.planned["step_time_s"], 6)
        line["planned_memory_gib"] = round(self.planned["memory_gib"], 3)
        self.seconds.append(line["step_time_s"])
        self.memory.append(line["memory_gib"])
        if len(self.seconds) == WARM_UP:
            self.warm = dict(self.spent())
        if len(self.seconds) == STEPS:
            self._finish()

    def _each_step(self) -> dict[str, float]:
        """Return {kind of work: mean seconds per step}, without the first WARM_UP steps."""
        steps = STEPS - WARM_UP
        each = {kind: (seconds - self.warm.get(kind, 0.0)) / steps for kind, seconds in self.spent().items()}
        return {kind: round(seconds, 6) for kind, seconds in each.items() if seconds > 0}

    def _finish(self) -> None:
        """Write plan.json, and log the errors of the plan: as warnings if they exceed those of 90% of plans."""
        measured = {"step_time_s": statistics.median(self.seconds[WARM_UP:]), "memory_gib": max(self.memory[WARM_UP:])}
        bars = {"step_time_s": self.plan["errors"]["time"]["p90"], "memory_gib": self.plan["errors"]["memory"]["p90"]}
        result: PlanResult = {
            "steps": STEPS, "planned": self.planned, "measured": measured,
            "error": {key: measured[key] / self.planned[key] - 1 for key in measured}, "bar": bars,
            "planned_step_s": self.plan["step_parts"], "measured_step_s": self._each_step(),
            "planned_memory_gib": {kind: size / GIB for kind, size in self.plan["memory"].items()},
            "measured_memory_gib": device_memory(self.device),
        }  # fmt: skip
        try:
            self.path.write_text(json.dumps(result, indent=2) + "\n")
        except OSError as error:
            self.log(f"WARNING: {self.path}: {error.strerror}. The comparison with the plan is not kept.")
        report_errors(result, self.log)


def plan_check(
    run: RunFile, ranks: int, spent: Callable[[], dict[str, float]], device: str, log: Callable[[str], None]
) -> PlanCheck | None:
    """Return the PlanCheck of a run that has a locked plan, otherwise None. Call it on rank 0 only.

    `spent` returns {kind of work: seconds that this process has spent on it}. If the plan cannot be read or belongs to
    another run, logs a note and returns None.
    """
    try:
        lock = read_lock(run)
        if lock is None:
            return None
        found = differences(lock, run, load_ds_config(run.deepspeed), ranks)
    except PackspeedError as error:
        found = [str(error)]
    if found or lock is None:
        log(f"note: nothing is compared with the locked plan: {'; '.join(found)}")
        return None
    return PlanCheck(lock, run.folder, spent, device, log, run.train.global_batch_tokens)


def report_errors(result: PlanResult, log: Callable[[str], None]) -> None:
    """Log how far step time and memory are from the plan, one line each: a warning if an error is larger than the plan
    allows.
    """
    for key, words, unit in (("step_time_s", "step time", "s"), ("memory_gib", "memory", "GiB")):
        error, bar = result["error"][key], result["bar"][key]
        log(
            f"{'WARNING: ' if abs(error) > bar else ''}plan: {words} {result['measured'][key]:.4g} {unit}, planned "
            f"{result['planned'][key]:.4g} ({error:+.1%}; nine tenths of plans are within {bar:.0%})"
        )


def device_memory(device: str) -> dict[str, float]:
    """Return {name: GiB}: the peaks of torch's GPU allocator, and the memory in use on the GPU; {} on a CPU."""
    if device != "cuda":
        return {}
    statistics_of = torch.cuda.memory_stats()
    names = {"peak allocated": "allocated_bytes.all.peak", "peak reserved": "reserved_bytes.all.peak"}
    free, total = torch.cuda.mem_get_info()
    found = {name: statistics_of.get(key, 0) / GIB for name, key in names.items()}
    return found | {"used on the device": (total - free) / GIB}
