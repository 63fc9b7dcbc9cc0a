"""`packspeed prove`: the user's own proof, on their own config, that a killed run goes on as if nothing had happened.

Three runs of the run file, shortened to a few steps, beside the user's own run folder, through DeepSpeed's launcher:
    alone   left alone, to the end
    same    killed (-9) at a random step: one rank, all ranks or the launcher; resumed by the same number of ranks:
            every line of metrics.jsonl and every bit of the final weights must be those of `alone`
    other   a copy of the killed folder, resumed by another number of ranks: the same samples in every step, losses
            within 1e-5 (fp32) or 2e-2 (16 bits)
Cost: four launches and 2.5 times the steps.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil

from packspeed.launch.cluster import local_launcher as spawn
from packspeed.launch.config.batch import solve_batch
from packspeed.launch.config.errors import ConfigError, UserError
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.config.run_file import RunFile

CLOCKED = {
    "step_time_s",
    "tokens_per_s",
    "mfu",
    "data_wait_s",
    "eval_time_s",
    "memory_gib",
}  # what two equal runs may differ in


TOLERANCE = {"fp32": 1e-5}  # of a loss at another number of ranks; 16 bits: 2e-2


VICTIMS = ("one rank", "all ranks", "the launcher")


Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Leg:
    """What one resumed run showed, beside the run left alone."""

    name: str
    ranks: int
    killed: str
    resumed_from: int | None
    losses_differ_by: float
    weights_differ_by: float | None  # None: it did not finish
    samples_equal: bool
    first_difference: str | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The shortened run, and what is to happen to it."""

    run_file: Path
    overrides: list[str]
    folder: Path
    steps: int
    ranks: int
    other_ranks: int | None
    kill_at: int
    victim: str

    def arguments(self, name: str) -> list[str]:
        """Arguments of train.py for the run called `name`."""
        sets = [*self.overrides, f"name={name}", f"runs_dir={self.folder}"]
        return ["--config", str(self.run_file), *(f"--set={text}" for text in sets)]


def make_plan(
    run_file: Path, overrides: Sequence[str], steps: int, ranks: int | None, other_ranks: int | None, seed: int
) -> Plan:
    """Shorten the run and draw the moment and the victim of the kill. Raises ConfigError for impossible ranks."""
    run = load_run_file(run_file, overrides)
    if steps < 6:
        raise ConfigError(f"--steps {steps}: give at least 6, so that there is something before and after the kill.")
    count = ranks if ranks is not None else spawn.default_ranks(run)
    other = other_ranks if other_ranks is not None else _other_ranks(run, count)
    for number in (count, other):
        if number is not None:
            solve_batch(run.global_batch, run.data.seq_len, number, run.train.micro_batch)
    shorter = [f"train.steps={steps}", f"checkpoint.every_steps={max(1, steps // 6)}", f"eval.every_steps={steps // 2}"]
    if run.train.schedule.warmup_steps >= steps:
        shorter.append(f"train.schedule.warmup_steps={steps // 3}")
    draw = random.Random(seed)
    kill_at, victim = draw.randrange(2, max(3, steps * 2 // 3)), draw.choice(VICTIMS)
    folder = run.folder.with_name(f".prove-{run.name}")
    return Plan(run_file, [*overrides, *shorter], folder, steps, count, other, kill_at, victim)


def _other_ranks(run: RunFile, ranks: int) -> int | None:
    """Half as many, or twice one; None where this machine has only one GPU."""
    if ranks == 1 and spawn.local_accelerators() == 1:
        return None
    wanted = max(1, ranks // 2) if ranks > 1 else 2
    return next((n for n in range(wanted, 0, -1) if run.global_batch % n == 0 and n != ranks), None)


def prove(plan: Plan, say: Say) -> list[Leg]:
    """Run the proof in plan.folder, which is made anew; returns a Leg for each resume."""
    shutil.rmtree(plan.folder, ignore_errors=True)
    plan.folder.mkdir(parents=True)
    say(f"alone: {plan.steps} steps on {plan.ranks} rank(s), left alone")
    if _finish(plan, "alone", plan.ranks):
        raise UserError(
            f"the run left alone failed already: {_last_words(plan, 'alone')}. Its log: {_log(plan, 'alone')}"
        )
    killed = _killed(plan, "same", say)
    if plan.other_ranks is not None:
        shutil.copytree(plan.folder / "same", plan.folder / "other")
    legs = [_resumed(plan, "same", plan.ranks, killed, say)]
    if plan.other_ranks is not None:
        legs.append(_resumed(plan, "other", plan.other_ranks, killed, say))
    return legs


def _log(plan: Plan, name: str) -> Path:
    return plan.folder / f"{name}.log"


@contextmanager
def _launched(plan: Plan, name: str, ranks: int) -> Iterator[psutil.Popen]:
    """A launch of the run `name`; nothing of it is left at the end."""
    with _log(plan, name).open("a") as log:
        process = _start(plan, name, ranks, log)
        try:
            yield process
        finally:
            for each in _family(process):
                with suppress(psutil.NoSuchProcess):
                    each.kill()


def _start(plan: Plan, name: str, ranks: int, log: IO[str]) -> psutil.Popen:
    command = spawn.launcher_command(ranks, plan.arguments(name))
    return psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def _family(process: psutil.Popen) -> list[psutil.Process]:
    try:
        return [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return []


def _finish(plan: Plan, name: str, ranks: int) -> int:
    """Train to the end; returns the exit code."""
    with _launched(plan, name, ranks) as process:
        return int(process.wait())


def _killed(plan: Plan, name: str, say: Say) -> str:
    """Train until plan.kill_at, kill plan.victim, wait for the rest to end; returns what was done."""
    with _launched(plan, name, plan.ranks) as process:
        metrics = plan.folder / name / "metrics.jsonl"
        ranks: list[psutil.Process] = []
        while _steps(metrics) < plan.kill_at:
            if len(ranks) < plan.ranks:  # looked for while they start: it takes longer than a small model's steps
                family, ranks = _family(process), spawn.ranks_below(process.pid)
            if process.poll() is not None:
                raise UserError(
                    f"the run to be killed after step {plan.kill_at} ended before: {_last_words(plan, name)}. "
                    f"Its log: {_log(plan, name)}"
                )
            time.sleep(0.002)
        victims = {"one rank": ranks[-1:], "all ranks": ranks, "the launcher": [p for p in family if p not in ranks]}
        for victim in victims[plan.victim]:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        psutil.wait_procs(family, timeout=600)
        if _steps(metrics) >= plan.steps:
            raise UserError(f"the run was over before {plan.victim} could be killed: prove it with more --steps.")
    what = f"{plan.victim} killed (-9) after step {plan.kill_at}"
    say(f"killed: {what}")
    return what


def _steps(metrics: Path) -> int:
    """The last step in metrics.jsonl; a line that is being written does not count."""
    try:
        content = metrics.read_bytes()
    except FileNotFoundError:
        return 0
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    return int(json.loads(lines[-1])["step"]) if lines else 0


def _resumed(plan: Plan, name: str, ranks: int, killed: str, say: Say) -> Leg:
    """Finish a killed run on `ranks` ranks and compare it with `alone`."""
    code = _finish(plan, name, ranks)
    exact = ranks == plan.ranks
    alone, mine = (_lines(plan.folder / each / "metrics.jsonl") for each in ("alone", name))
    bound = 0.0 if exact else TOLERANCE.get(_precision(plan), 2e-2)
    first = f"the resumed run failed: {_last_words(plan, name)}" if code else _first_difference(alone, mine, bound)
    weights = None if code else weights_differ_by(_final(plan, "alone"), _final(plan, name))
    if first is None and exact and weights:
        first = f"final weights: they differ by up to {weights:.3g}, though every loss is equal"
    hashes = [[line.get("data_hash") for line in lines] for lines in (alone, mine)]
    leg = Leg(
        name=f"{name} number of ranks", ranks=ranks, killed=killed, resumed_from=_resumed_from(plan, name),
        losses_differ_by=max((_distance(a, b) for a, b in zip(alone, mine, strict=False)), default=math.inf),
        weights_differ_by=weights, samples_equal=hashes[0] == hashes[1],
        first_difference=first,
    )  # fmt: skip
    say(f"{leg.name} ({ranks}): {leg.first_difference or 'as if nothing had happened'}")
    return leg


def _lines(metrics: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCKED} for line in lines]


def _distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """How far the losses of two lines are apart."""
    x, y = (line.get("loss", line.get("val_loss")) for line in (a, b))
    if x is None or y is None:
        return 0.0 if x == y else math.inf
    return abs(float(x) - float(y))


def _first_difference(alone: list[dict[str, Any]], mine: list[dict[str, Any]], bound: float) -> str | None:
    """The first line that differs by more than it may, in words; bound 0: every field must be equal."""
    for a, b in zip(alone, mine, strict=False):
        if a["step"] != b["step"] or ("loss" in a) != ("loss" in b):
            return f"metrics.jsonl has step {b['step']} where the run left alone has step {a['step']}"
        compared = a.keys() | b.keys() if bound == 0 else {"data_hash", "samples", "tokens", "lr"} & a.keys()
        wrong = sorted(key for key in compared if a.get(key) != b.get(key))
        if not wrong and _distance(a, b) > bound:
            wrong = ["loss" if "loss" in a else "val_loss"]
        if wrong:
            told = ", ".join(f"{key} {a.get(key)} left alone and {b.get(key)} resumed" for key in wrong)
            return f"step {a['step']}: {told}"
    if len(alone) != len(mine):
        return f"metrics.jsonl has {len(mine)} lines, that of the run left alone {len(alone)}"
    return None


def _final(plan: Plan, name: str) -> Path:
    from packspeed.launch.checkpoint.manifest import step_folder

    return plan.folder / name / "checkpoints" / step_folder(plan.steps)


def weights_differ_by(one: Path, other: Path) -> float:
    """The largest difference of a weight (fp32) between two checkpoints of any layout; inf where one is NaN."""
    from packspeed.launch.checkpoint.zero_checkpoint import full_tensors

    mine, largest = dict(full_tensors(one, ("fp32",))), 0.0
    for name, states in full_tensors(other, ("fp32",)):
        distance = (mine.pop(name)["fp32"].detach() - states["fp32"].detach()).abs().max().item()
        largest = max(largest, math.inf if math.isnan(distance) else distance)
    return math.inf if mine else largest


def _precision(plan: Plan) -> str:
    config = json.loads((plan.folder / "alone" / "ds_config.json").read_text())
    return next((name for name in ("bf16", "fp16") if (config.get(name) or {}).get("enabled")), "fp32")


def _resumed_from(plan: Plan, name: str) -> int | None:
    lines = [line for line in _log(plan, name).read_text().splitlines() if line.startswith("resuming from ")]
    return int(lines[-1].rpartition("(step ")[2].rstrip(")")) if lines else None


def _last_words(plan: Plan, name: str) -> str:
    """The last error that a run printed, or its last line."""
    lines = _log(plan, name).read_text(errors="replace").strip().splitlines()
    errors = [line.partition("error: ")[2] for line in lines if "error: " in line]
    return (errors or lines or ["it printed nothing"])[-1]


def report(plan: Plan, legs: Sequence[Leg], seed: int) -> dict[str, Any]:
    """The proof as one JSON object."""
    return {
        "ok": all(leg.first_difference is None for leg in legs),
        "run_file": str(plan.run_file),
        "steps": plan.steps,
        "ranks": plan.ranks,
        "seed": seed,
        "legs": [dataclasses.asdict(leg) for leg in legs],
    }


def seed_of_the_day() -> int:
    """A number that a failed proof can be repeated with."""
    return int.from_bytes(os.urandom(3), "big")
