"""`packspeed bench --calibrate`: correct a calibration file by one measured step.

    write_calibration(Path("mine.yaml"), "h100-80gb", job, step_s)

Power limits, determinism and kernels make all parts of a step slower or faster by about the same factor. So the factors
of the file are multiplied by (measured step / planned step). The corrected plan is still off by about a tenth
(docs/planner.md, "Other stacks, one calibrating row each").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import yaml

from packspeed.launch.config.deepspeed_json import load_ds_config
from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.planner.lock import tensor_bytes
from packspeed.launch.planner.machine import GIB, Machine
from packspeed.launch.planner.plan import Job, job_of, plan_of
from packspeed.launch.run_folder.folder import versions

CALIBRATED_ERROR = {"median": 0.08, "p90": 0.21}  # of other stacks with one calibrating row, docs/planner.md


def measured_job(run_file: Path, overrides: Sequence[str], machine: Machine, row: JsonObject) -> Job:
    """Return the Job (run file, machine, ranks) that a row of `packspeed bench` has measured.

    Its ranks, micro batch, kernels and ZeRO stage are those of `row`, which may differ from the run file's.
    """
    settings = [*overrides, f"train.micro_batch={row['micro_batch']}", f"model.kernels={row['kernels']}"]
    run = load_run_file(run_file, settings)
    raw = load_ds_config(run.deepspeed)
    raw["zero_optimization"] = {**(raw.get("zero_optimization") or {}), "stage": row["stage"]}
    return job_of(run, raw, machine, row["ranks"])


def correction(job: Job, step_s: float) -> float:
    """Return the number by which the factors in the machine's calibration file must be multiplied so that the plan of
    `job` predicts `step_s` seconds for a step.

    Two parts of that prediction are not multiplied: the time of the optimizer, and the time for which the device waits
    for the host.
    """
    parts = plan_of(job).step_parts
    fixed = parts["optimizer"] + parts["host"]
    return max(0.0, step_s - fixed) / (sum(parts.values()) - fixed)


def write_calibration(path: Path, base: str, job: Job, step_s: float) -> None:
    """Write a calibration file for the machine of a measured job.

    base: the name of the calibration file that is corrected. step_s: the measured seconds of a step.
    """
    ratio, machine = correction(job, step_s), job.machine
    factors = {name: round(value * ratio, 5) for name, value in dataclasses.asdict(machine.factors).items()}
    installed = ", ".join(f"{name} {version}" for name, version in versions().items() if name in ("torch", "deepspeed"))
    text = yaml.safe_dump(
        {
            "like": base, "factors": factors, "time_error": CALIBRATED_ERROR,
            "source": f"{base}, with all factors times {ratio:.3f}: packspeed bench measured {step_s:.4g} s for a step "
            f"of {job.run.name} on {job.ranks} GPU(s) of {machine.device}, {installed}.",
        },
        sort_keys=False, width=116,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# Written by packspeed bench --calibrate. Use: packspeed plan --calibration {path.name}\n{text}")


def describe(machine: Machine, job: Job, step_s: float, memory_gib: float) -> list[str]:
    """Return lines of text that compare the plan with the measured step time and memory."""
    plan = plan_of(job)
    tensors = tensor_bytes(plan.memory) / GIB
    return [
        f"{machine.name}: planned {plan.step_s:.4g} s per step, measured {step_s:.4g} s "
        f"({step_s / plan.step_s - 1:+.1%})",
        f"tensors: planned {tensors:.2f} GiB, measured {memory_gib:.2f} GiB",
    ]
