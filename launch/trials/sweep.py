"""Train the runs of a sweep, one after another or side by side, and compare their losses.

    <runs_dir>/<name>-sweep/<run>/            an ordinary run folder
    <runs_dir>/<name>-sweep/<run>/sweep.json  the settings with which the sweep started the run
    <runs_dir>/<name>-sweep/<run>.log         what the run has printed
    <runs_dir>/<name>-sweep/report.html       a report about all runs, the best first

Each run is a process `packspeed train`. What the files of its folder say decides what a repeated sweep does: a run that
has finished or diverged is left as it is, and any other run starts, from its newest checkpoint if it has one. Signals
are passed on to the runs, which save and stop.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Literal

from packspeed.data.storage.atomic import write_file
from packspeed.launch.cluster.local_launcher import PACKSPEED, local_accelerators
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.config.unattended import SIGNALS
from packspeed.launch.run_folder.folder import aligned, set_aside
from packspeed.launch.run_folder.formats import AnomalyLine, Status
from packspeed.launch.run_folder.reading import read_lines, read_metrics, read_object
from packspeed.launch.trials.sweep_plan import Sweep, SweepRun, Values

RECORD = "sweep.json"
POLL_S = 0.1  # seconds between two looks at the processes
TRAIN_COMMAND = (*PACKSPEED, "train")

State = Literal["finished", "diverged", "failed", "unfinished"]
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Result:
    """The state of a run, read from its folder."""

    run: SweepRun
    state: State
    step: int  # the last one in metrics.jsonl
    val_loss: float | None  # after the last step; None: there was no evaluation
    train_loss: float | None  # mean of the last tenth of the steps

    @property
    def done(self) -> bool:
        """Return whether the run need not be started again: it has finished or diverged."""
        return self.state in ("finished", "diverged")


def read_result(run: SweepRun) -> Result:
    """Return what the run folder says: how far the run is, and its losses if it has finished."""
    folder, notes = run.run.folder, list[str]()
    status = read_object(folder / "status.json", Status, notes)
    steps, evaluations = read_metrics(folder, notes)
    last, total = (steps[-1]["step"] if steps else 0), run.run.train.total_steps
    recorded = status["state"] if status else None
    state: State = "failed" if recorded == "failed" else "unfinished"
    if recorded == "finished" and last == total:
        state = "finished"
    if state == "failed":  # the run stopped itself, and would do so again
        anomalies = read_lines(folder / "anomalies.jsonl", AnomalyLine, notes)
        state = "diverged" if anomalies and anomalies[-1]["step"] >= last else "failed"
    if state != "finished":
        return Result(run, state, last, None, None)
    tail = [loss for line in steps[-max(1, total // 10) :] if (loss := line["loss"]) is not None]
    final = evaluations[-1]["val_loss"] if evaluations and evaluations[-1]["step"] == total else None
    return Result(run, state, last, final, statistics.fmean(tail) if tail else None)


def check_folders(sweep: Sweep) -> None:
    """Raise ConfigError if a run's folder was made with other settings, or not by a sweep, because its loss could not
    be compared.
    """
    for run in sweep.runs:
        folder = run.run.folder
        if not folder.exists():
            continue
        try:
            before: JsonObject = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ConfigError(
                f"{folder}: the folder has no {RECORD}, so no sweep has made it. Rename it, or use --fresh, "
                "which moves it aside."
            ) from None
        now = run.settings()
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if changed:
            listed = ", ".join(f"{key} ({before.get(key)} then, {now.get(key)} now)" for key in changed[:4])
            raise ConfigError(
                f"{folder} was trained with other settings: {listed}{' ...' if len(changed) > 4 else ''}. Use --fresh "
                "to train all runs again, or --set name=NAME for another sweep."
            )


def train_all(sweep: Sweep, fresh: bool, say: Say) -> bool:
    """Train every run that is not done, sweep.parallel of them at a time. Returns False if a signal has stopped them.

    fresh: first move existing run folders aside. Signals that ask for a stop are passed on to the runs, and no
    other run is started. Installs handlers for these signals until it returns.
    """
    if fresh:
        for run in sweep.runs:
            set_aside(run.run.folder, run.run.mirror)
    else:
        check_folders(sweep)
    done = [] if fresh else [result for result in map(read_result, sweep.runs) if result.done]
    for result in done:
        say(f"{result.run.name}: already done ({describe(result)})")
    finished = [result.run for result in done]
    waiting = [run for run in sweep.runs if run not in finished]
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        return _train(sweep, waiting, received, say)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train(sweep: Sweep, waiting: list[SweepRun], received: list[int], say: Say) -> bool:
    """Start the runs in `waiting` and wait until all have ended. Returns False if a signal has stopped them.

    A signal handler appends the number of each signal that arrives meanwhile to `received`.
    """
    running: dict[int, tuple[SweepRun, subprocess.Popen[bytes]]] = {}  # by the place among those side by side
    stopped = False
    try:
        while running or (waiting and not stopped):
            free = [place for place in range(sweep.parallel) if place not in running]
            while waiting and free and not received and not stopped:
                run, place = waiting.pop(0), free.pop(0)
                say(f"{run.name}: started, {len(waiting)} waiting")
                running[place] = run, _start(sweep, run, place)
            while received:
                number, stopped = received.pop(0), True
                say(f"{signal.Signals(number).name}: waiting until {len(running)} run(s) have saved and stopped")
                for _, process in running.values():
                    process.send_signal(number)
            for place, (run, process) in list(running.items()):
                code = process.poll()
                if code is not None:
                    del running[place]
                    say(f"{run.name}: {describe(read_result(run))}{_reason(sweep, run) if code else ''}")
            time.sleep(POLL_S if running else 0)
    finally:
        for _, process in running.values():  # only after an error: the others would train on unattended
            process.send_signal(signal.SIGTERM)
    return not stopped


def _start(sweep: Sweep, run: SweepRun, place: int) -> subprocess.Popen[bytes]:
    """Start `packspeed train` for a run, in a session of its own, with its output in a log file beside its folder.

    `place` is its index among the runs that train at the same time; it determines the run's GPUs. Without
    GPUs, these runs get equal shares of the cores as OMP_NUM_THREADS, unless that is set.
    """
    folder, env = run.run.folder, dict(os.environ)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / RECORD, json.dumps(run.settings(), indent=1))
    if sweep.parallel > 1 and local_accelerators():
        visible = env.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(local_accelerators())))
        env["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[place * run.ranks : (place + 1) * run.ranks])
    elif sweep.parallel > 1:
        cores = len(os.sched_getaffinity(0)) // (sweep.parallel * run.ranks)
        env.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
    sets = [f"--set={text}" for text in (*sweep.overrides, *run.overrides)]
    command = [*TRAIN_COMMAND, str(sweep.run_file), "--ranks", str(run.ranks), *sets]
    with _log_file(sweep, run).open("ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )


def _log_file(sweep: Sweep, run: SweepRun) -> Path:
    return sweep.folder / f"{run.name}.log"


def _reason(sweep: Sweep, run: SweepRun) -> str:
    """Return the end of a line about a run that ended with an error: its last error, and where its output is."""
    path = _log_file(sweep, run)
    errors = [line for line in path.read_text(errors="replace").splitlines() if line.startswith("error: ")]
    return f": {errors[-1].removeprefix('error: ')} Its output: {path}" if errors else f". Its output: {path}"


def describe(result: Result) -> str:
    """Return a phrase about a run: "finished, validation loss 2.1034" or "unfinished at step 40 of 100"."""
    if result.state != "finished":
        return f"{result.state} at step {result.step} of {result.run.run.train.total_steps}"
    losses = {"validation loss": result.val_loss, "training loss": result.train_loss}
    return ", ".join(["finished", *(f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None)][:2])


@dataclasses.dataclass(frozen=True)
class Row:
    """The runs with the same values and different seeds. The losses are None unless all of them are done."""

    values: Values
    results: list[Result]
    median: float | None  # infinity for a run that has diverged
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The rows of a sweep, the best first, and which loss they compare (`measure`)."""

    measure: str
    rows: list[Row]


def compare(results: Sequence[Result]) -> Comparison:
    """Return the runs grouped by their values, in ascending order of the median loss over the seeds.

    The loss is the validation loss after the last step, or, if a finished run has none, the mean training loss over
    the last tenth of the steps. A run that diverged has an infinite loss. Rows with runs that are not done come last.
    """
    validated = all(result.val_loss is not None for result in results if result.state == "finished")

    def loss(result: Result) -> float:
        value = result.val_loss if validated else result.train_loss
        return math.inf if value is None else value

    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(json.dumps(result.run.values), []).append(result)
    rows = []
    for group in groups.values():
        losses = sorted(map(loss, group)) if all(result.done for result in group) else None
        spread = (statistics.median(losses), losses[0], losses[-1]) if losses else (None, None, None)
        rows.append(Row(group[0].run.values, sorted(group, key=loss), *spread))
    rows.sort(key=lambda row: (row.median is None, row.median or 0.0))
    return Comparison("validation loss" if validated else "training loss", rows)


def table(comparison: Comparison) -> list[str]:
    """Return the comparison as lines of text: a row per combination of values, the best first."""
    rows, keys = comparison.rows, list(comparison.rows[0].values)
    seeds = len(rows[0].results) > 1
    head = [*keys, *(["median", "lowest", "highest"] if seeds else [comparison.measure]), "runs"]
    cells = [head]
    for row in rows:
        losses = [row.median, row.low, row.high] if seeds else [row.median]
        shown = ["-" if loss is None else "diverged" if math.isinf(loss) else f"{loss:.4f}" for loss in losses]
        states = [result.state for result in row.results]
        runs = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        cells.append([*row.values.values(), *shown, runs])
    lines = aligned(cells)
    return [f"{comparison.measure} after the last step, best first", *lines] if seeds else lines


def as_json(sweep: Sweep, comparison: Comparison, report: Path | None) -> JsonObject:
    """Return the comparison for --json. An infinite loss, of a run that has diverged, is null.

    report: the path of the HTML report; None if none was written.
    """

    def number(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    rows: list[JsonObject] = [
        {
            "values": row.values, "median": number(row.median), "lowest": number(row.low), "highest": number(row.high),
            "runs": [
                {"name": result.run.name, "folder": str(result.run.run.folder), "seed": result.run.run.train.seed,
                 "state": result.state, "step": result.step, "val_loss": number(result.val_loss),
                 "train_loss": number(result.train_loss)}
                for result in row.results
            ],
        }
        for row in comparison.rows
    ]  # fmt: skip
    best = rows[0]["values"] if rows[0]["median"] is not None else None
    return {
        "folder": str(sweep.folder), "measure": comparison.measure, "best": best, "rows": rows,
        "report": str(report) if report else None,
    }  # fmt: skip
