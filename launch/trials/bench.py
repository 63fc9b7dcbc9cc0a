"""`packspeed bench`: what a step of a run costs here, and beside other ways to train the same model.

    packspeed bench my.yaml --micro-batch 1,2,4 --kernels eager,compile --stage 0,1,2
    packspeed bench my.yaml --compare --nanogpt path/to/nanoGPT

A row per setting, as a Markdown table on stdout. Every setting and every contender is measured in processes of its own
(contest.py), so its memory and what it tells the allocator are its own, and one that fails is a row that says why. With
--compare the contenders take turns, a round of steps each, the others asleep, another one first in each round: what
else the machine does meets all of them. `x bare` is the median over the rounds of the bare loop's time by theirs, with
the lowest and the highest.

Step: median over the rounds, with the fastest and the slowest. MFU: model FLOPs (flops_per_token in model/config.py) by
the peak of the device, the data sheet's on GPUs and the best GEMM on CPUs; `of fp32 GEMM` and `of bf16 GEMM` are shares
of what square GEMMs reach in the same run. Memory: the most a rank's process had on CPUs, of which `before` the model
was there; what torch allocated on GPUs. The parts are those of the round of the median step. Communication is what the
host waits for (gloo); on GPUs it is queued and stays inside the other parts, as DistributedDataParallel's does. JSON
also has the CPU time of a step, which other work on the machine changes least.
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
from typing import Any, get_args

from packspeed.launch.cluster.local_launcher import default_ranks, launcher_command
from packspeed.launch.config.batch import solve_batch
from packspeed.launch.config.deepspeed_json import load_ds_config
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.config.run_file import RunFile
from packspeed.model.config import Kernels

WORKER = Path(__file__).resolve().with_name("bench_worker.py")


KERNELS = get_args(Kernels)


PARTS = ("forward", "backward", "step", "communication", "data", "other")


POLL_S = 0.02


PEER_PRECISIONS = ("fp32", "autocast", "bf16")


COLUMNS = (
    "who", "precision", "kernels", "ZeRO", "ranks x threads", "micro batch", "step, ms", "tokens/s", "TFLOP/s", "MFU",
    "of fp32 GEMM", "of bf16 GEMM", "memory, GiB", "before", "forward", "backward", "optimizer", "communication",
    "data", "other", "x bare",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured: the run file, ranks, rounds of steps and the values that are swept over."""

    run_file: Path
    overrides: list[str]
    ranks: int
    rounds: int
    steps: int
    settings: list[dict[str, Any]]  # micro_batch, kernels, stage; None: the run file's
    peers: list[str]  # "bare:fp32", ...; none without --compare
    nanogpt: Path | None


def make_plan(
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
) -> Plan:
    """Check what was asked for; raises ConfigError that says what is wrong with it."""
    run = load_run_file(run_file, overrides)
    load_ds_config(run.deepspeed)
    count = ranks if ranks is not None else default_ranks(run)
    for name, value in (("--ranks", count), ("--rounds", rounds), ("--steps", steps)):
        if value < 1:
            raise ConfigError(f"{name} {value}: give a whole number of at least 1.")
    swept = {
        "micro_batch": _listed("--micro-batch", micro_batch, lambda word: word.isdigit() and int(word) > 0, int),
        "kernels": _listed("--kernels", kernels, KERNELS.__contains__, str),
        "stage": _listed("--stage", stage, ("0", "1", "2", "3").__contains__, int),
    }
    settings = [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]
    if nanogpt is not None and not (nanogpt / "model.py").is_file():
        raise ConfigError(f"--nanogpt {nanogpt}: there is no model.py. Name a checkout of github.com/karpathy/nanoGPT.")
    peers = _peers(run, nanogpt, precision) if compare or nanogpt else []
    if peers and len(settings) > 1:
        raise ConfigError("--compare takes one setting, not a sweep: name one micro batch, one of kernels, one stage.")
    return Plan(run_file.resolve(), list(overrides), count, rounds, steps, settings, peers, nanogpt)


def _listed(flag: str, text: str | None, valid: Callable[[str], bool], kind: Callable[[str], Any]) -> list[Any]:
    """The values of a flag like 1,2,4; [None] where it is absent."""
    if text is None:
        return [None]
    words = [word.strip() for word in text.split(",")]
    if bad := [word for word in words if not valid(word)]:
        example = {"--micro-batch": "1,2,4", "--kernels": ",".join(KERNELS), "--stage": "0,1,2,3"}[flag]
        raise ConfigError(f"{flag} {text}: {bad[0]!r} is none. Give a list like {example}.")
    return [kind(word) for word in words]


def _peers(run: RunFile, nanogpt: Path | None, precision: str | None) -> list[str]:
    """Names of the contenders beside packspeed; the first is what the others are compared with."""
    default = "fp32" if run.train.precision in ("fp32", "auto") else "bf16,autocast,fp32"
    words = (precision or default).split(",")
    if bad := [word for word in words if word not in PEER_PRECISIONS]:
        raise ConfigError(f"--precision {precision}: {bad[0]!r} is none. Give a list like {','.join(PEER_PRECISIONS)}.")
    config = run.gpt_config(50_257)
    if run.train.optimizer.name != "adamw" or run.data.packing != "stream" or run.data.document_mask:
        raise ConfigError(
            "--compare: the peers know AdamW and full windows only: set packing stream, no document mask."
        )
    if (config.position, config.norm, config.kv_heads, config.head_dim) == (
        "learned",
        "layernorm",
        config.n_head,
        None,
    ):
        names = ["bare", "gpt2"] + (["nanogpt"] if nanogpt else [])
    else:
        names = ["bare"]  # the others are GPT-2s
    return [f"{name}:{word}" for name in names for word in words]


def bench(plan: Plan, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Measure everything, saying each row as it is found; returns the rows."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the processes are ended first
    say(_line(COLUMNS))
    say(_line(["---"] * len(COLUMNS)))
    rows = []
    for setting in plan.settings:
        for row in _measured(plan, setting, ["packspeed:", *plan.peers]):
            rows.append(row)
            say(_line(_cells(row)))
    return rows


def _measured(plan: Plan, setting: dict[str, Any], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of the contenders, which take turns: A B C, B C A, C A B."""
    with tempfile.TemporaryDirectory(prefix="packspeed-bench-") as folder, contextlib.ExitStack() as running:
        contenders = []
        for number, name in enumerate(names):
            contenders.append(running.enter_context(Contender(plan, setting, name, Path(folder) / str(number))))
            contenders[-1].wait_for("ready")
        for number in range(plan.rounds):
            first = number % len(contenders)  # who comes after whom is worth some percent
            for contender in contenders[first:] + contenders[:first]:
                contender.take_turn()
    found = [c.latest["gemm_flops"] for c in contenders if c.latest]
    gemm = {kind: max(each[kind] for each in found) for kind in (found[0] if found else ())}
    reference = next((c for c in contenders if plan.peers and c.name == plan.peers[0]), None)
    yield from (_row(contender, setting, gemm, reference) for contender in contenders)


class Contender:
    """Processes that train one model, a round of steps at each turn (contest.py); `error` says why they do not."""

    def __init__(self, plan: Plan, setting: dict[str, Any], name: str, folder: Path) -> None:
        self.name, self.folder, self.error = name, folder, ""
        self.rounds: list[dict[str, Any]] = []
        self.latest: dict[str, Any] = {}
        self._process: subprocess.Popen[str] | None = None
        folder.mkdir()
        changes = {"micro_batch": "train.micro_batch", "kernels": "model.kernels"}
        overrides = plan.overrides + [f"{key}={setting[k]}" for k, key in changes.items() if setting[k] is not None]
        try:
            run = load_run_file(plan.run_file, overrides)
            solve_batch(run.global_batch, run.data.seq_len, plan.ranks, run.train.micro_batch)
        except ConfigError as error:
            self.error = str(error)
            return
        job = folder / "job.json"
        job.write_text(json.dumps({
            "run_file": str(plan.run_file), "overrides": [*overrides, f"runs_dir={folder}"], "stage": setting["stage"],
            "contender": name, "steps": plan.steps, "nanogpt": str(plan.nanogpt or ""),
            "owner": os.getpid(),
        }))  # fmt: skip
        alone = [sys.executable, str(WORKER), str(job)]
        command = alone if plan.ranks == 1 else launcher_command(plan.ranks, [str(job)], WORKER)
        self._complaints = (folder / "stderr").open("w")
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=self._complaints, text=True, start_new_session=True
        )

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        """The processes do not outlive this: ranks take SIGTERM for a wish to save and stop."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._complaints.close()

    def take_turn(self) -> None:
        """A round of steps, added to `rounds`."""
        if self.error:
            return
        number = len(self.rounds)
        (self.folder / f"turn-{number}").touch()
        if found := self.wait_for(f"round-{number}.json"):
            self.latest = json.loads(found.read_text())
            self.rounds.append(self.latest["round"])

    def wait_for(self, name: str) -> Path | None:
        """A file that the processes make, or None and the error where they end before."""
        path = self.folder / name
        while not self.error and not path.exists():
            if self._process is None or self._process.poll() is not None:
                self.error = self._why()
            time.sleep(POLL_S)
        return None if self.error else path

    def _why(self) -> str:
        told = self.folder / "error"
        if told.is_file():
            return told.read_text()
        code = self._process.returncode if self._process else 0
        if code in (-9, 137):
            return "killed, by the kernel for want of memory perhaps"
        last = ((self.folder / "stderr").read_text().strip().splitlines() or ["no word"])[-1]
        return f"exit code {code}: {last}"


def _row(
    contender: Contender, setting: dict[str, Any], gemm: dict[str, float], reference: Contender | None
) -> dict[str, Any]:
    """One result; MFU on CPUs by the best GEMM of all processes of this comparison."""
    who, _, precision = contender.name.partition(":")
    row: dict[str, Any] = {"who": who, "precision": precision, **setting, "error": contender.error or None}
    if contender.error:
        return row
    rounds, found = contender.rounds, contender.latest
    times = [each["step_s"] for each in rounds]
    step_s = statistics.median_low(times)
    speed = found["tokens_per_step"] / step_s
    flops = speed * found["flops_per_token"]
    peak = found["datasheet_flops"] or (gemm["fp32"] if found["precision"] == "fp32" else max(gemm.values()))
    shared = (
        "kernels", "stage", "ranks", "threads", "micro_batch", "accumulation", "tokens_per_step", "memory_gib",
        "base_gib", "loss",
    )  # fmt: skip
    row |= {key: found[key] for key in shared} | {
        "precision": precision or found["precision"], "step_s": step_s, "rounds_s": times, "tokens_per_s": speed,
        "model_flops": flops, "peak_flops": peak, "mfu": flops / peak, "gemm_flops": gemm,
        "gemm_share": {kind: flops / each for kind, each in gemm.items()},
        "parts_s": {part: rounds[times.index(step_s)]["parts_s"].get(part, 0.0) for part in PARTS},
    }  # fmt: skip
    row["cpu_s"] = statistics.median(each["cpu_s"] for each in rounds)
    if reference is not None and not reference.error:
        for name, key in (("ratio", "step_s"), ("cpu_ratio", "cpu_s")):
            row[f"{name}s"] = [theirs[key] / own[key] for theirs, own in zip(reference.rounds, rounds, strict=True)]
            row[name] = statistics.median(row[f"{name}s"])
    return row


def _cells(row: dict[str, Any]) -> list[str]:
    """A row of the table; what a failed one asked for, and why it failed."""
    if row["error"]:
        asked = ["run file's" if row[key] is None else str(row[key]) for key in ("kernels", "stage", "micro_batch")]
        cells = [row["who"], row["precision"] or "-", asked[0], asked[1], "-", asked[2], f"failed: {row['error']}"]
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
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"
