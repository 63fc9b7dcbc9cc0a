"""`packspeed prove`: a kill-and-resume test of a run file.

It trains the run file, shortened to a few steps, with DeepSpeed's launcher in the folder .prove-<name> next to the run
folder. There are three runs:

    alone   a run without interruption
    same    a run that is killed with SIGKILL at a random step (one rank, all ranks or the launcher) and resumed with
            the same number of ranks. Every line of metrics.jsonl, apart from times, and every bit of the final weights
            must equal those of `alone`
    other   a copy of the killed run, resumed with another number of ranks. The samples of every step must be equal, and
            the losses must agree within 1e-5 (fp32) or 2e-2 (16-bit precisions)

Equal bits need the same model of GPU, number of ranks per host and in all, and versions of torch, cuDNN, NCCL and the
driver. The proof prints those that it was made with, and every checkpoint records them.

With a hostfile, `packspeed launch` trains these runs on its hosts (prove_places.py). `other` uses the first of these
hosts.

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
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypedDict

import psutil

from packspeed.launch.cluster import local_launcher as launcher
from packspeed.launch.config.batch import fits, plan_batch, shortened_warmup
from packspeed.launch.config.errors import ConfigError, UserError
from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.run_folder.formats import ComputeEnvironment
from packspeed.launch.trials.prove_places import VICTIMS, OverHosts, Place, ThisMachine

if TYPE_CHECKING:
    from packspeed.launch.checkpoint.manifest import Manifest

# Keys of metrics.jsonl that are measured, and may differ between two equal runs.
MEASURED_KEYS = {
    "step_time_s", "tokens_per_s", "mfu", "data_wait_s", "eval_time_s", "memory_gib", "planned_step_time_s",
    "planned_memory_gib",
}  # fmt: skip
# How much a loss may differ if the number of ranks differs, because sums are then rounded in another order.
TOLERANCE, TOLERANCE_16_BIT = 1e-5, 2e-2
POLL_S = 0.002  # how often to check whether the step of the kill is done; a small model needs milliseconds per step

Say = Callable[[str], None]
Line = JsonObject  # a line of metrics.jsonl without MEASURED_KEYS


@dataclasses.dataclass(frozen=True)
class ResumeResult:
    """The comparison of one resumed run with the uninterrupted one. In the JSON output, each is an entry of "legs"."""

    name: str
    ranks: int
    killed: str
    resumed_from: int | None
    losses_differ_by: float
    weights_differ_by: float | None  # None: the resumed run did not finish
    samples_equal: bool
    first_difference: str | None


class ProofReport(TypedDict):
    """The JSON output of `packspeed prove --json`."""

    ok: bool
    run_file: str
    steps: int
    ranks: int
    seed: int
    environment: ComputeEnvironment  # the hardware and software of the proof
    versions: dict[str, str]
    legs: list[JsonObject]  # the fields of each ResumeResult


@dataclasses.dataclass(frozen=True)
class ProofPlan:
    """The plan of a kill-and-resume test: the shortened run, and when to kill which of its processes."""

    run_file: Path
    overrides: list[str]
    folder: Path  # contains all runs of the test
    steps: int
    ranks: int
    other_ranks: int | None  # number of ranks of the second resume; None: there is no second resume
    kill_at: int  # kill once this step is in metrics.jsonl
    victim: str  # one of VICTIMS
    place: Place = dataclasses.field(default_factory=ThisMachine)

    def arguments(self, name: str) -> list[str]:
        """Return the arguments of train.py for a run of the test.

        name: "alone" (never killed), "same" or "other" (killed, then resumed with the same or another number of ranks).
        """
        sets = [*self.overrides, f"name={name}", f"runs_dir={self.folder}"]
        return ["--config", str(self.run_file), *(f"--set={text}" for text in sets)]


def plan_proof(
    run_file: Path,
    overrides: Sequence[str],
    steps: int,
    ranks: int | None,
    other_ranks: int | None,
    seed: int,
    hosts: OverHosts | None = None,
) -> ProofPlan:
    """Shorten the run to `steps` steps, and choose the step and the victim of the kill at random from `seed`.

    `ranks` and `other_ranks` have defaults if they are None; with `hosts`, the default of `ranks` is the number of
    their slots. If `other_ranks` is 0, there is no second resume. Raises ConfigError if there are too few steps, if the
    global batch cannot be divided among the ranks, or if the run file has train.deterministic: false.
    """
    run = load_run_file(run_file, overrides)
    if not run.train.deterministic:
        raise ConfigError(
            "train.deterministic: false gives up bitwise resumes, but these are what packspeed prove tests. "
            "Use --set train.deterministic=true."
        )
    if steps < 6:
        raise ConfigError(f"--steps {steps}: give at least 6, so that there are steps before and after the kill.")
    count = ranks if ranks is not None else hosts.slots if hosts else launcher.default_ranks(run)
    other = (other_ranks or None) if other_ranks is not None else _other_ranks(run, count)
    for number in (count, other):
        if number is not None:
            plan_batch(run, number)
            if hosts:
                hosts.first(number)  # raises: too few slots
    shorter = [f"train.steps={steps}", f"checkpoint.every_steps={max(1, steps // 6)}", f"eval.every_steps={steps // 2}"]
    shorter += ["checkpoint.mirror=null", *shortened_warmup(run, steps, run.data.seq_len)]
    if run.train.schedule.warmup_steps >= steps:
        shorter.append(f"train.schedule.warmup_steps={steps // 3}")
    draw = random.Random(seed)
    kill_at, victim = draw.randrange(2, max(3, steps * 2 // 3)), draw.choice(VICTIMS)
    folder = run.folder.with_name(f".prove-{run.name}")
    return ProofPlan(
        run_file, [*overrides, *shorter], folder, steps, count, other, kill_at, victim, hosts or ThisMachine()
    )


def _other_ranks(run: RunFile, ranks: int) -> int | None:
    """Return the default number of ranks for the second resume, which has another number of ranks than the run: half of
    `ranks`, or 2 if `ranks` is 1.

    It is lower if the global batch cannot be divided among that many ranks. Returns None if there is no such
    number, or if `ranks` is 1 and this machine has only one GPU.
    """
    if ranks == 1 and launcher.local_accelerators() == 1:
        return None
    wanted = max(1, ranks // 2) if ranks > 1 else 2
    return next((n for n in range(wanted, 0, -1) if fits(run, n) and n != ranks), None)


def prove(plan: ProofPlan, say: Say) -> list[ResumeResult]:
    """Run the kill-and-resume test in plan.folder, which is deleted first. Returns one result per resumed run.

    Raises UserError if the uninterrupted run fails, or if the run to be killed ends before the kill.
    """
    shutil.rmtree(plan.folder, ignore_errors=True)
    plan.folder.mkdir(parents=True)
    say(f"alone: {plan.steps} steps on {plan.ranks} rank(s), not interrupted")
    if _finish(plan, "alone", plan.ranks):
        raise UserError(
            f"the uninterrupted run failed: {_last_error(plan, 'alone')}. Its log: {_log_file(plan, 'alone')}"
        )
    manifest = _final_manifest(plan)
    environment = describe_environment(manifest["environment"], manifest["versions"])
    say(f"a resume is equal bit for bit only in the same environment: {environment}")
    killed = _train_and_kill(plan, "same", say)
    if plan.other_ranks is not None:
        shutil.copytree(plan.folder / "same", plan.folder / "other")
    results = [_resume(plan, "same", plan.ranks, killed, say)]
    if plan.other_ranks is not None:
        results.append(_resume(plan, "other", plan.other_ranks, killed, say))
    return results


def _log_file(plan: ProofPlan, name: str) -> Path:
    """Return the path of the file for the output of the run `name`."""
    return plan.folder / f"{name}.log"


@contextmanager
def _launched(plan: ProofPlan, name: str, ranks: int) -> Iterator[psutil.Popen]:
    """Launch the run `name` with `ranks` ranks, and return a context with the launcher's process.

    At the end of the `with` block, the processes of the launch that are still running are killed.
    """
    with _log_file(plan, name).open("a") as log:
        process = _start(plan, name, ranks, log)
        try:
            yield process
        finally:
            launcher.kill_tree(process)


def _start(plan: ProofPlan, name: str, ranks: int, log: IO[str]) -> psutil.Popen:
    """Start the launcher for the run `name` with `ranks` ranks, and write its output to `log`."""
    command = plan.place.command(ranks, plan.arguments(name), plan.folder)
    return psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def _finish(plan: ProofPlan, name: str, ranks: int) -> int:
    """Train the run `name` to its end, from its newest checkpoint if it has one.

    Returns the exit code of the launcher.
    """
    with _launched(plan, name, ranks) as process:
        return int(process.wait())


def _train_and_kill(plan: ProofPlan, name: str, say: Say) -> str:
    """Train the run `name` until step plan.kill_at is in metrics.jsonl, kill plan.victim, and wait until all processes
    have ended.

    Returns a description of the kill. Raises UserError if the run ends before it can be killed.
    """
    run_folder = plan.folder / name
    metrics = run_folder / "metrics.jsonl"
    with (
        _launched(plan, name, plan.ranks) as process,
        plan.place.victims(process, plan.ranks, run_folder) as victims,
    ):
        while _last_step(metrics) < plan.kill_at:
            victims.find()
            if process.poll() is not None:
                raise UserError(
                    f"the run ended before it could be killed after step {plan.kill_at}: {_last_error(plan, name)}. "
                    f"Its log: {_log_file(plan, name)}"
                )
            time.sleep(POLL_S)
        victims.kill(plan.victim)
        victims.wait()
        if _last_step(metrics) >= plan.steps:
            raise UserError(
                f"the run finished before {plan.victim} could be killed. Repeat the command with more --steps."
            )
    what = f"{plan.victim} killed (-9) after step {plan.kill_at}"
    say(f"killed: {what}")
    return what


def _last_step(metrics: Path) -> int:
    """Return the step of the last complete line in metrics.jsonl, or 0 if there is none."""
    try:
        content = metrics.read_bytes()
    except FileNotFoundError:
        return 0
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    return int(json.loads(lines[-1])["step"]) if lines else 0


def _resume(plan: ProofPlan, name: str, ranks: int, killed: str, say: Say) -> ResumeResult:
    """Finish the killed run `name` with `ranks` ranks, and return its comparison with the uninterrupted run.

    `killed` describes the kill.
    """
    code = _finish(plan, name, ranks)
    exact = ranks == plan.ranks
    alone = _read_lines(plan.folder / "alone" / "metrics.jsonl")
    resumed = _read_lines(plan.folder / name / "metrics.jsonl")
    tolerance = TOLERANCE if _precision(plan) == "fp32" else TOLERANCE_16_BIT
    first: str | None = None
    weights: float | None = None
    if code:
        first = f"the resumed run failed: {_last_error(plan, name)}"
    else:
        first = first_difference(alone, resumed, 0.0 if exact else tolerance)
        weights = weights_differ_by(_final_checkpoint(plan, "alone"), _final_checkpoint(plan, name))
    if first is None and exact and weights:
        first = f"final weights: they differ by up to {weights:.3g}, although every loss is equal"
    result = ResumeResult(
        name=f"{name} number of ranks", ranks=ranks, killed=killed, resumed_from=_resumed_from(plan, name),
        losses_differ_by=max((_loss_distance(a, b) for a, b in zip(alone, resumed, strict=False)), default=math.inf),
        weights_differ_by=weights,
        samples_equal=[a.get("data_hash") for a in alone] == [b.get("data_hash") for b in resumed],
        first_difference=first,
    )  # fmt: skip
    say(f"{result.name} ({ranks}): {result.first_difference or 'equal to the uninterrupted run'}")
    return result


def _read_lines(metrics: Path) -> list[Line]:
    """Return the lines of a metrics.jsonl without MEASURED_KEYS, such as times and memory."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED_KEYS} for line in lines]


def _loss_distance(a: Line, b: Line) -> float:
    """Return the absolute difference of the training or validation losses of two lines of metrics.jsonl.

    It is infinity if only one of them is finite.
    """
    x, y = (line.get("loss", line.get("val_loss")) for line in (a, b))
    if x is None or y is None:
        return 0.0 if x == y else math.inf
    return abs(float(x) - float(y))


def first_difference(alone: list[Line], resumed: list[Line], tolerance: float) -> str | None:
    """Return a description of the first line of metrics.jsonl that differs by more than is allowed, or None.

    If `tolerance` is 0, all keys must be equal. Otherwise losses may differ by `tolerance`, samples and learning rates
    must be equal, and other keys are ignored.
    """
    for a, b in zip(alone, resumed, strict=False):
        if a["step"] != b["step"] or ("loss" in a) != ("loss" in b):
            return (
                f"metrics.jsonl of the resumed run has step {b['step']} in the line in which the uninterrupted run has "
                f"step {a['step']}"
            )
        compared = a.keys() | b.keys() if tolerance == 0 else {"data_hash", "samples", "tokens", "lr"} & a.keys()
        unequal = sorted(key for key in compared if a.get(key) != b.get(key))
        if not unequal and _loss_distance(a, b) > tolerance:
            unequal = ["loss" if "loss" in a else "val_loss"]
        if unequal:
            values = ", ".join(f"{key} {a.get(key)} uninterrupted and {b.get(key)} resumed" for key in unequal)
            return f"step {a['step']}: {values}"
    if len(alone) != len(resumed):
        return f"metrics.jsonl of the resumed run has {len(resumed)} lines, that of the uninterrupted run {len(alone)}"
    return None


def _final_checkpoint(plan: ProofPlan, name: str) -> Path:
    """Return the folder of the checkpoint of the last step of the run `name`."""
    from packspeed.launch.checkpoint.manifest import step_folder

    return plan.folder / name / "checkpoints" / step_folder(plan.steps)


def _final_manifest(plan: ProofPlan) -> Manifest:
    """Return the manifest of the last checkpoint of the run `alone`, which was not interrupted."""
    from packspeed.launch.checkpoint.manifest import read_manifest

    return read_manifest(_final_checkpoint(plan, "alone"))


def describe_environment(environment: ComputeEnvironment, versions: dict[str, str]) -> str:
    """Return a line that says on what a bitwise resume depends: devices, ranks per host and in all, versions."""
    per_host = environment["ranks_per_host"]
    each = str(per_host[0]) if len(set(per_host)) == 1 else ", ".join(map(str, per_host))
    facts = [
        " and ".join(environment["devices"]),
        f"{environment['ranks']} rank(s) on {len(per_host)} host(s) ({each} per host)",
        *([f"{environment['threads']} thread(s) per rank"] if environment["threads"] else []),
        *(f"{name} {versions[name]}" for name in ("torch", "deepspeed")),
    ]
    if environment["cuda"]:
        facts += [f"CUDA {environment['cuda']}", f"cuDNN {environment['cudnn']}", f"NCCL {environment['nccl']}"]
        facts.append(f"driver {environment['driver'] or 'unknown'}")
    return ", ".join(facts)


def weights_differ_by(one: Path, other: Path) -> float:
    """Return the largest absolute difference of an fp32 weight between two checkpoint folders.

    Their ZeRO stages and numbers of ranks may differ. Returns infinity if a weight is NaN or is missing in `other`.
    """
    from packspeed.launch.checkpoint.zero_checkpoint import full_tensors

    mine, largest = dict(full_tensors(one, ("fp32",))), 0.0
    for name, states in full_tensors(other, ("fp32",)):
        distance = (mine.pop(name)["fp32"].detach() - states["fp32"].detach()).abs().max().item()
        largest = max(largest, math.inf if math.isnan(distance) else distance)
    return math.inf if mine else largest


def _precision(plan: ProofPlan) -> str:
    """Return the precision in which the runs of the test were trained: "bf16", "fp16" or "fp32"."""
    config = json.loads((plan.folder / "alone" / "ds_config.json").read_text())
    return next((name for name in ("bf16", "fp16") if (config.get(name) or {}).get("enabled")), "fp32")


def _resumed_from(plan: ProofPlan, name: str) -> int | None:
    """Return the step from which the run `name` was resumed, according to its log; None if it started at step 0."""
    lines = [line for line in _log_file(plan, name).read_text().splitlines() if line.startswith("resuming from ")]
    return int(lines[-1].rpartition("(step ")[2].rstrip(")")) if lines else None


def _last_error(plan: ProofPlan, name: str) -> str:
    """Return the last error that the run `name` printed, or the last line of its log if there is no error."""
    lines = _log_file(plan, name).read_text(errors="replace").strip().splitlines()
    errors = [line.partition("error: ")[2] for line in lines if "error: " in line]
    return (errors or lines or ["it printed nothing"])[-1]


def report(plan: ProofPlan, results: Sequence[ResumeResult], seed: int) -> ProofReport:
    """Return the output of `packspeed prove --json`. `ok` is true if no resumed run differs from what is expected."""
    manifest = _final_manifest(plan)
    return {
        "ok": all(result.first_difference is None for result in results),
        "run_file": str(plan.run_file),
        "steps": plan.steps,
        "ranks": plan.ranks,
        "seed": seed,
        "environment": manifest["environment"],
        "versions": manifest["versions"],
        "legs": [dataclasses.asdict(result) for result in results],
    }


def random_seed() -> int:
    """Return a random seed for plan_proof. A failed test can be repeated with the same seed."""
    return int.from_bytes(os.urandom(3), "big")
