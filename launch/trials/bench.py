"""`packspeed bench`: measure what a training step of a run costs on this machine.

    packspeed bench my.yaml --micro-batch 1,2,4 --kernels eager,compile --stage 0,1,2
    packspeed bench my.yaml --compare --nanogpt path/to/nanoGPT

The first form measures each combination of settings. The second one compares Packspeed with other training loops on the
same model. Both print a Markdown table with one row per setting or training loop. Each row is measured by its own
processes (bench_worker.py), so that peak memory and allocator settings belong to it alone. If a measurement fails, its
row shows the reason.

With --compare, all workers are started first and then take turns. While one measures a round of steps, the others
sleep, and each round starts with another worker. Other programs on the machine then slow all workers alike. The column
`x bare` is the ratio (time of the baseline `bare` / time of this loop): the median over the rounds, then its minimum
and maximum.

Columns
    step            time per step: median over the rounds (minimum to maximum)
    MFU             model FLOP/s (flops_per_token in model/config.py) / peak FLOP/s of the device. On GPUs the peak
                    comes from the data sheet. On CPUs it is the fastest square matrix product (GEMM) in the same
                    benchmark
    of ... GEMM     model FLOP/s / FLOP/s of square matrix products, measured in the same benchmark
    memory          on CPUs: peak resident memory of a rank's process, and `before`: that peak before the model was
                    built. On GPUs: peak allocation by torch
    forward, ...    time per phase, from the round with the median step time. Communication is the time for which the
                    CPU waits (gloo). On GPUs, communication runs in the background, and its cost is in the other phases
The JSON file also contains the CPU time per step, which depends least on other programs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar, get_args

from packspeed.launch.cluster.local_launcher import default_ranks, launcher_command
from packspeed.launch.config.batch import plan_batch
from packspeed.launch.config.deepspeed_json import load_ds_config
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.config.run_file import RunFile
from packspeed.model.config import Kernels

if TYPE_CHECKING:  # these import torch, which only the workers load
    from packspeed.launch.trials.bench_setup import BenchJob
    from packspeed.launch.trials.bench_worker import Result, Round

WORKER = Path(__file__).resolve().with_name("bench_worker.py")
KERNELS = get_args(Kernels)
PARTS = ("forward", "backward", "step", "communication", "data", "other")  # the phases with a column in the table
POLL_S = 0.02
BASELINE_PRECISIONS = ("fp32", "autocast", "bf16")

COLUMNS = (
    "who", "precision", "kernels", "ZeRO", "ranks x threads", "micro batch", "step, ms", "tokens/s", "TFLOP/s", "MFU",
    "of fp32 GEMM", "of bf16 GEMM", "memory, GiB", "before", "forward", "backward", "optimizer", "communication",
    "data", "other", "x bare",
)  # fmt: skip

Say = Callable[[str], None]
Row = JsonObject  # an entry of the JSON file; `_row` lists its keys
Value = TypeVar("Value")


class Setting(TypedDict):
    """One combination of the values of --micro-batch, --kernels and --stage. None means the run file's value."""

    micro_batch: int | None
    kernels: str | None
    stage: int | None  # of ZeRO


@dataclasses.dataclass(frozen=True)
class BenchPlan:
    """What to measure: the run file, the number of ranks, the rounds of steps, and the settings."""

    run_file: Path
    overrides: list[str]
    ranks: int
    rounds: int
    steps: int
    settings: list[Setting]
    baselines: list[str]  # "bare:fp32", ...; empty without --compare
    nanogpt: Path | None
    profile: Path | None = None  # folder for the traces of --profile


def plan_bench(
    run_file: Path,
    overrides: Sequence[str],
    ranks: int | None,
    rounds: int,
    steps: int,
    micro_batch: str | None,
    kernels: str | None,
    stage: str | None,
    compare: bool,
    nanogpt: Path | None,
    precision: str | None,
    profile: Path | None = None,
) -> BenchPlan:
    """Check the options of `packspeed bench` and return the plan. Raises ConfigError if an option is wrong.

    `micro_batch`, `kernels`, `stage` (ZeRO) and `precision` (of the baselines) are lists as the user writes them:
    "1,2,4". `steps` is the number of steps per round, `nanogpt` a checkout of nanoGPT, and `profile` the folder for
    traces of torch's profiler.
    """
    run = load_run_file(run_file, overrides)
    load_ds_config(run.deepspeed)
    count = ranks if ranks is not None else default_ranks(run)
    for name, value in (("--ranks", count), ("--rounds", rounds), ("--steps", steps)):
        if value < 1:
            raise ConfigError(f"{name} {value}: give a whole number of at least 1.")
    settings: list[Setting] = [
        {"micro_batch": rows, "kernels": name, "stage": zero}
        for rows, name, zero in itertools.product(
            _listed("--micro-batch", micro_batch, lambda word: word.isdigit() and int(word) > 0, int),
            _listed("--kernels", kernels, KERNELS.__contains__, str),
            _listed("--stage", stage, ("0", "1", "2", "3").__contains__, int),
        )
    ]
    if nanogpt is not None and not (nanogpt / "model.py").is_file():
        raise ConfigError(f"--nanogpt {nanogpt}: there is no model.py. Name a checkout of github.com/karpathy/nanoGPT.")
    baselines = _baselines(run, nanogpt, precision) if compare or nanogpt else []
    if baselines and len(settings) > 1:
        raise ConfigError(
            "--compare measures one setting: give one value each for --micro-batch, --kernels and --stage."
        )
    traces = None if profile is None else profile.resolve()
    return BenchPlan(run_file.resolve(), list(overrides), count, rounds, steps, settings, baselines, nanogpt, traces)


def _listed(
    flag: str, text: str | None, valid: Callable[[str], bool], convert: Callable[[str], Value]
) -> list[Value | None]:
    """Return the values of an option such as "1,2,4", or [None] if it is absent.

    Raises ConfigError for an invalid value.
    """
    if text is None:
        return [None]
    words = [word.strip() for word in text.split(",")]
    if bad := [word for word in words if not valid(word)]:
        example = {"--micro-batch": "1,2,4", "--kernels": ",".join(KERNELS), "--stage": "0,1,2,3"}[flag]
        raise ConfigError(f"{flag} {text}: {bad[0]!r} is not a valid value. Give a list such as {example}.")
    return [convert(word) for word in words]


def _baselines(run: RunFile, nanogpt: Path | None, precision: str | None) -> list[str]:
    """Return the names of the baselines, such as "bare:bf16". All loops are compared with the first baseline.

    Raises ConfigError if the baselines cannot train this run: they support only AdamW and windows of a token stream.
    """
    default = "fp32" if run.train.precision in ("fp32", "auto") else "bf16,autocast,fp32"
    words = (precision or default).split(",")
    if bad := [word for word in words if word not in BASELINE_PRECISIONS]:
        raise ConfigError(
            f"--precision {precision}: {bad[0]!r} is not a valid value. Give a list such as "
            f"{','.join(BASELINE_PRECISIONS)}."
        )
    config = run.gpt_config(50_257)
    if run.train.optimizer.name != "adamw" or run.data.packing != "stream" or run.data.document_mask:
        raise ConfigError(
            "--compare: the baselines support only AdamW and full windows. Use --set train.optimizer.name=adamw, "
            "--set data.packing=stream and --set data.document_mask=false."
        )
    shape = (config.position, config.norm, config.kv_heads, config.head_dim)
    names = ["bare"]
    if shape == ("learned", "layernorm", config.n_head, None):  # the other baselines can only have GPT-2's architecture
        names += ["gpt2"] + (["nanogpt"] if nanogpt else [])
    return [f"{name}:{word}" for name in names for word in words]


def bench(plan: BenchPlan, say: Say) -> list[Row]:
    """Measure every setting and training loop of the plan, and return the rows of the JSON file.

    Each row is also printed with `say`, as a line of a Markdown table, as soon as it is measured.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that the workers are killed first
    say(_line(COLUMNS))
    say(_line(["---"] * len(COLUMNS)))
    rows, profiles = [], []
    loops = ["packspeed:", *plan.baselines]
    for setting in plan.settings:
        for loop, row in zip(loops, _measure(plan, setting, loops), strict=True):
            rows.append(row)
            say(_line(_cells(row)))
            if plan.profile is not None and not row["error"]:
                profiles.append(_profile_prefix(plan, setting, loop))
    for prefix in profiles:
        say(f"\n{prefix}-rank*.json, {plan.steps} step(s); rank 0:\n{Path(prefix + '.txt').read_text()}")
    return rows


def _profile_prefix(plan: BenchPlan, setting: Setting, loop: str) -> str:
    """Return the path prefix of a worker's profile files, or an empty string without --profile."""
    if plan.profile is None:
        return ""
    stage = None if setting["stage"] is None else f"zero{setting['stage']}"
    rows = None if setting["micro_batch"] is None else f"batch{setting['micro_batch']}"
    words = [*loop.split(":"), rows, setting["kernels"], stage]
    return str(plan.profile / "-".join(word for word in words if word))


def _measure(plan: BenchPlan, setting: Setting, loops: Sequence[str]) -> Iterator[Row]:
    """Measure the training loops with one setting, in turns (A B C, B C A, C A B, ...), and yield one row per loop."""
    with tempfile.TemporaryDirectory(prefix="packspeed-bench-") as folder, contextlib.ExitStack() as running:
        workers = []
        for number, loop in enumerate(loops):
            worker = running.enter_context(WorkerProcess(plan, setting, loop, Path(folder) / str(number)))
            worker.wait_for("ready")
            workers.append(worker)
        for number in range(plan.rounds):
            first = number % len(workers)  # rotate, because the position within a round changes times by a few percent
            for worker in workers[first:] + workers[:first]:
                worker.measure_round()
    peaks = [worker.result["gemm_flops"] for worker in workers if worker.result]
    gemm = {precision: max(peak[precision] for peak in peaks) for precision in (peaks[0] if peaks else ())}
    reference = next((worker for worker in workers if plan.baselines and worker.loop == plan.baselines[0]), None)
    yield from (_row(worker, setting, gemm, reference) for worker in workers)


class WorkerProcess:
    """The processes that measure one training loop (bench_worker.py). A context manager, which kills them at its end.

    If they fail, `error` contains the reason; otherwise it is empty.
    """

    def __init__(self, plan: BenchPlan, setting: Setting, loop: str, folder: Path) -> None:
        self.loop, self.folder, self.error = loop, folder, ""
        self.rounds: list[Round] = []
        self.result: Result | None = None  # of the last round
        self._process: subprocess.Popen[str] | None = None
        folder.mkdir()
        overrides = list(plan.overrides)
        if setting["micro_batch"] is not None:
            overrides.append(f"train.micro_batch={setting['micro_batch']}")
        if setting["kernels"] is not None:
            overrides.append(f"model.kernels={setting['kernels']}")
        try:  # a setting that is impossible for this run gives a row with an error; other settings are still measured
            run = load_run_file(plan.run_file, overrides)
            plan_batch(run, plan.ranks)
        except ConfigError as error:
            self.error = str(error)
            return
        job: BenchJob = {
            "run_file": str(plan.run_file), "overrides": [*overrides, f"runs_dir={folder}"], "stage": setting["stage"],
            "loop": loop, "steps": plan.steps, "nanogpt": str(plan.nanogpt or ""), "owner": os.getpid(),
            "profile": _profile_prefix(plan, setting, loop),
        }  # fmt: skip
        job_file = folder / "job.json"
        job_file.write_text(json.dumps(job))
        one_rank = [sys.executable, str(WORKER), str(job_file)]
        command = one_rank if plan.ranks == 1 else launcher_command(plan.ranks, [str(job_file)], WORKER)
        self._stderr = (folder / "stderr").open("w")
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=self._stderr, text=True, start_new_session=True
        )

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the processes, with SIGKILL because ranks would answer SIGTERM by saving a checkpoint."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._stderr.close()

    def measure_round(self) -> None:
        """Let the worker measure its next round of steps, and append the result to `rounds`.

        Does nothing if `error` is set.
        """
        if self.error:
            return
        number = len(self.rounds)
        (self.folder / f"start-{number}").touch()
        if result_file := self.wait_for(f"round-{number}.json"):
            result: Result = json.loads(result_file.read_text())
            self.result = result
            self.rounds.append(result["round"])

    def wait_for(self, name: str) -> Path | None:
        """Wait until the worker has written the file `name` in its folder, and return the file's path.

        Returns None and sets `error` if the worker ends before.
        """
        path = self.folder / name
        while not self.error and not path.exists():
            if self._process is None or self._process.poll() is not None:
                self.error = self._error_text()
            time.sleep(POLL_S)
        return None if self.error else path

    def _error_text(self) -> str:
        """Return why the worker ended: its own error file, or its exit code and the last line it printed."""
        error_file = self.folder / "error"
        if error_file.is_file():
            return error_file.read_text()
        code = self._process.returncode if self._process else 0
        if code in (-9, 137):
            return "killed, perhaps by the kernel because it ran out of memory"
        last_line = ((self.folder / "stderr").read_text().strip().splitlines() or ["no output"])[-1]
        return f"exit code {code}: {last_line}"


def _row(worker: WorkerProcess, setting: Setting, gemm: dict[str, float], reference: WorkerProcess | None) -> Row:
    """Return the row of a worker, as the JSON file contains it.

    `gemm` is the best FLOP/s of square matrix products by precision, over all workers of this comparison. It is the
    peak for MFU on CPUs. `reference` is the worker of the first baseline, for the ratios.
    """
    who, _, precision = worker.loop.partition(":")
    row: Row = {"who": who, "precision": precision, **setting, "error": worker.error or None}
    if worker.error or worker.result is None:
        return row
    rounds, result = worker.rounds, worker.result
    times = [measured["step_s"] for measured in rounds]
    step_s = statistics.median_low(times)  # one of the rounds, whose phases are shown
    speed = result["tokens_per_step"] / step_s
    flops = speed * result["flops_per_token"]
    peak = result["datasheet_flops"] or (gemm["fp32"] if result["precision"] == "fp32" else max(gemm.values()))
    row |= {
        "kernels": result["kernels"], "stage": result["stage"], "ranks": result["ranks"],
        "threads": result["threads"], "micro_batch": result["micro_batch"], "accumulation": result["accumulation"],
        "tokens_per_step": result["tokens_per_step"], "memory_gib": result["memory_gib"],
        "base_gib": result["base_gib"], "loss": result["loss"],
        "precision": precision or result["precision"], "step_s": step_s, "rounds_s": times, "tokens_per_s": speed,
        "model_flops": flops, "peak_flops": peak, "mfu": flops / peak, "gemm_flops": gemm,
        "gemm_share": {name: flops / gemm_flops for name, gemm_flops in gemm.items()},
        "parts_s": {part: rounds[times.index(step_s)]["parts_s"].get(part, 0.0) for part in PARTS},
    }  # fmt: skip
    row["cpu_s"] = statistics.median(measured["cpu_s"] for measured in rounds)
    if reference is not None and not reference.error:
        # Compare times of the same round, because other programs slowed both loops alike in it.
        pairs = list(zip(reference.rounds, rounds, strict=True))
        row["ratios"] = [theirs["step_s"] / own["step_s"] for theirs, own in pairs]
        row["ratio"] = statistics.median(row["ratios"])
        row["cpu_ratios"] = [theirs["cpu_s"] / own["cpu_s"] for theirs, own in pairs]
        row["cpu_ratio"] = statistics.median(row["cpu_ratios"])
    return row


def _cells(row: Row) -> list[str]:
    """Return the cells of a row of the Markdown table, one per column of COLUMNS.

    If the measurement failed, cells give its setting and the reason, and the others are empty.
    """
    if row["error"]:
        setting = ["run file's" if row[key] is None else str(row[key]) for key in ("kernels", "stage", "micro_batch")]
        cells = [
            row["who"],
            row["precision"] or "-",
            setting[0],
            setting[1],
            "-",
            setting[2],
            f"failed: {row['error']}",
        ]
        return cells + [""] * (len(COLUMNS) - len(cells))
    ms = [f"{1000 * row['parts_s'][part]:.1f}" for part in PARTS]
    spread = f"{1000 * row['step_s']:.1f} ({1000 * min(row['rounds_s']):.1f} to {1000 * max(row['rounds_s']):.1f})"
    ours = row["who"] == "packspeed"
    ratio = f"{row['ratio']:.3f} ({min(row['ratios']):.3f} to {max(row['ratios']):.3f})" if "ratio" in row else "-"
    return [
        row["who"], row["precision"], row["kernels"] if row["who"] in ("packspeed", "bare") else "-",
        str(row["stage"]) if ours else "-", f"{row['ranks']} x {row['threads']}",
        f"{row['micro_batch']} x {row['accumulation']}", spread, f"{row['tokens_per_s']:,.0f}",
        f"{row['model_flops'] / 1e12:.4g}", f"{row['mfu']:.1%}", f"{row['gemm_share']['fp32']:.1%}",
        f"{row['gemm_share']['bf16']:.1%}", f"{row['memory_gib']:.2f}", f"{row['base_gib']:.2f}", *ms, ratio,
    ]  # fmt: skip


def _line(cells: Sequence[str]) -> str:
    """Return one line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"
