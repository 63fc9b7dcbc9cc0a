"""`packspeed report RUN [RUN...]`: write one HTML page about one or several runs, which needs no network.

The page shows loss curves, throughput, memory, goodput, restarts, generated text, configuration and environment. All of
it comes from the files in the run folders. Each chart shows the curves of all runs. Settings that differ between the
runs are listed in two groups: those that can change the loss, and those that only change the speed. Cost: 20 s per
million steps; the page has 0.2 MB per run. Imports neither torch nor deepspeed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from packspeed.data.storage.atomic import temporary, write_file
from packspeed.launch.config import effects
from packspeed.launch.config.errors import UserError
from packspeed.launch.observe.charts import COLORS, SCRIPT, STYLE, Chart, Series, line_chart, short_number, smoothed
from packspeed.launch.observe.goodput import BUCKETS, LABELS, Account, account, duration
from packspeed.launch.observe.png import draw_png
from packspeed.launch.run_folder.columns import Columns, read_columns
from packspeed.launch.run_folder.folder import flatten
from packspeed.launch.run_folder.formats import (
    PLAN_FILE,
    AnomalyLine,
    Environment,
    PlanResult,
    SamplesLine,
    Status,
)
from packspeed.launch.run_folder.reading import read_lines, read_object, read_tree, run_name

# Keys of ds_config.json that can change the loss. For keys of the run file see config/effects.py.
DS_CHANGES_LOSS = (
    "communication_data_type", "data_types.", "prescale_gradients", "gradient_predivide_factor", "fp16.", "bf16.",
    "torch_autocast.", "zero_optimization.zero_quantized",
)  # fmt: skip


# Keys of ds_config.json that Packspeed copies there from config.yaml, and that are therefore not listed again.
DS_REPEATS = (
    "optimizer.", "train_", "gradient_accumulation_steps", "gradient_clipping", "tensorboard.", "steps_per_print",
)  # fmt: skip


BUCKET_COLORS = dict(
    zip(
        BUCKETS,
        ("#059669", "#0891b2", "#7c3aed", "#2563eb", "#6366f1", "#d97706", "#94a3b8", "#dc2626", "#cbd5e1"),
        strict=True,
    )
)


@dataclasses.dataclass(frozen=True)
class Run:
    """The content of a run folder.

    A missing or damaged file gives an empty value; `notes` says which files are damaged.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    ds_config: dict[str, Any]
    environment: Environment | None
    status: Status | None
    columns: Columns
    samples: list[SamplesLine]
    anomalies: list[AnomalyLine]
    account: Account | None
    notes: list[str]
    plan: PlanResult | None = None
    color: str = COLORS[0]


def read_run(folder: Path, color: str = COLORS[0]) -> Run:
    """Read a run folder. Raises UserError if nothing in it can be read. `color` is the colour of its curves."""
    notes: list[str] = []
    config = read_tree(folder / "config.yaml", notes)
    columns = read_columns(folder, notes)
    run = Run(
        folder, run_name(folder, config), config, read_tree(folder / "ds_config.json", notes),
        read_object(folder / "environment.json", Environment, notes),
        read_object(folder / "status.json", Status, notes), columns,
        read_lines(folder / "samples.jsonl", SamplesLine, notes),
        read_lines(folder / "anomalies.jsonl", AnomalyLine, notes), account(folder, notes), notes,
        read_object(folder / PLAN_FILE, PlanResult, notes) or None, color,
    )  # fmt: skip
    if not (run.config or any(map(len, columns.numbers.values())) or run.account):
        reason = " ".join(notes) or "config.yaml is missing."
        raise UserError(
            f"{folder} is not a run folder. {reason} Give the folder that training printed, such as runs/quickstart."
        )
    if not os.path.lexists(folder / "config.yaml"):
        notes.append(f"{folder / 'config.yaml'}: the file is missing.")
    return run


Difference = tuple[str, list[Any]]  # a setting and its value in each run


def differences(runs: Sequence[Run]) -> tuple[list[Difference], list[Difference]]:
    """Return the settings that differ between the runs: (those that can change the loss, the others)."""
    flats = []
    for run in runs:
        # One flat dict per run: config.yaml, then ds_config.json and environment.json with a prefix.
        flat = flatten(run.config)
        flat |= {
            f"ds_config.{key}": value for key, value in flatten(run.ds_config).items() if not key.startswith(DS_REPEATS)
        }
        environment: Mapping[str, Any] = run.environment or {}
        flat |= {f"environment.{key}": environment.get(key) for key in ("ranks", "device", "hosts", "git_commit")}
        flat |= {f"environment.{key}": value for key, value in environment.get("versions", {}).items()}
        flats.append(flat)
    loss: list[Difference] = []
    speed: list[Difference] = []
    for key in dict.fromkeys(key for flat in flats for key in flat):
        values = [flat.get(key) for flat in flats]
        if any(value != values[0] for value in values):
            (loss if can_change_the_loss(key) else speed).append((key, values))
    return loss, speed


def can_change_the_loss(key: str) -> bool:
    """Return whether a setting can change the loss by more than rounding does (a different order of additions).

    `key` has dots, as in `differences`: train.steps, ds_config.fp16.enabled or environment.ranks.
    """
    if key.startswith("ds_config."):
        return key.removeprefix("ds_config.").startswith(DS_CHANGES_LOSS)
    return not key.startswith("environment.") and effects.can_change_the_loss(key)


def report(folders: Sequence[Path], out: Path) -> tuple[list[Run], list[str]]:
    """Write an HTML page about the runs in `folders` to `out`. Returns (runs, notes about what could not be read).

    Raises UserError if none of the runs can be read, or if `out` cannot be written.
    """
    runs: list[Run] = []
    notes: list[str] = []
    for folder in dict.fromkeys(folders):
        try:
            run = read_run(folder, COLORS[len(runs) % len(COLORS)])
        except UserError as error:
            notes.append(str(error))
            continue
        runs.append(run)
        notes += run.notes
    if not runs:
        raise UserError(" ".join(notes))
    write_output(out, page(runs, notes).encode("utf-8", "backslashreplace"), "--out FILE")
    return runs, notes


def write_pngs(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write every chart that has a curve to `folder`, as TITLE.png, and return the paths of the files."""
    paths = []
    for chart in training_charts(runs) + speed_charts(runs):
        picture = draw_png(chart)
        if picture is not None:
            paths.append(folder / f"{chart.title.replace(' ', '_')}.png")
            write_output(paths[-1], picture, "--png DIR")
    return paths


def write_output(path: Path, content: bytes, option: str) -> None:
    """Write content to a path that the user has chosen with `option`, such as "--out FILE".

    A regular file is replaced in one step; to a device or a pipe the content is written directly. Raises UserError,
    which names the option, if that fails.
    """
    target = Path(os.path.realpath(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_file() or not target.exists():
            write_file(target, content)
            return
        # With O_NONBLOCK, opening a pipe that nobody reads is an error. Without it, the call would wait.
        with open(os.open(target, os.O_WRONLY | os.O_NONBLOCK), "wb") as stream:
            os.set_blocking(stream.fileno(), True)
            stream.write(content)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        with contextlib.suppress(OSError, ValueError):
            temporary(target).unlink()
        raise UserError(f"{path} cannot be written: {reason}. Choose another path with {option}.") from None


def page(runs: Sequence[Run], notes: Sequence[str] = ()) -> str:
    """Return the report about `runs` as an HTML page. `notes` says what could not be read."""
    title = " · ".join(run.name for run in runs)
    sections = [
        ("Damaged files", "".join(f"<p>{html.escape(note)}</p>" for note in notes)),
        ("Summary", _summaries(runs)),
        ("Training", _charts(training_charts(runs))),
        ("What differs", _differences(runs) if len(runs) > 1 else ""),
        ("Throughput and memory", _charts(speed_charts(runs))),
        ("Plan", "".join(_plan(run, len(runs) > 1) for run in runs if run.plan)),
        ("Goodput", "".join(_goodput(run, len(runs) > 1) for run in runs if run.account)),
        ("Samples", "".join(_samples(run, len(runs) > 1) for run in runs if run.samples)),
        ("Anomalies", "".join(_anomalies(run) for run in runs if run.anomalies)),
        ("Configuration", "".join(_configuration(run) for run in runs)),
        ("Environment", _environment(runs)),
    ]
    body = "".join(f"<section><h2>{name}</h2>{content}</section>" for name, content in sections if content)
    made = time.strftime("%Y-%m-%d %H:%M")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<header><h1>{html.escape(title)}</h1><p>packspeed report, {made}</p>{_legend(runs)}</header>{body}"
        f"<script>{SCRIPT}</script></body></html>"
    )


def _legend(runs: Sequence[Run]) -> str:
    """Return the HTML of a legend with the colour of each run, or an empty string if there is only one run."""
    keys = "".join(f'<span><i style="background:{run.color}"></i>{html.escape(run.name)}</span>' for run in runs)
    return f'<div class="legend">{keys}</div>' if len(runs) > 1 else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return an HTML table with these header cells and rows. None is shown as a dash."""

    def cell(value: Any) -> str:
        return f"<td>{html.escape('-' if value is None else str(value))}</td>"

    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(cell(value) for value in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _summaries(runs: Sequence[Run]) -> str:
    """Return the HTML of one box per run, with its main figures."""
    return '<div class="runs">' + "".join(_summary(run) for run in runs) + "</div>"


def _summary(run: Run) -> str:
    """Return the HTML of a box with the main figures of one run: state, steps, losses, speed, goodput."""
    steps, tokens = run.columns.numbers["step"], run.columns.numbers["tokens"]
    validation_losses = run.columns.values("val_loss")[1]
    # Show the last finite loss, because the loss of the last step may be null.
    losses = run.columns.values("loss")[1]
    facts = [
        ("state", run.status["state"] if run.status else "unknown"),
        ("steps", f"{int(steps[-1]) if len(steps) else 0:,}"),
        ("tokens", short_number(np.nan_to_num(tokens[-1]) if len(tokens) else 0)),
        ("training loss", f"{losses[-1]:.4f}" if len(losses) else "-"),
        ("best validation loss", f"{validation_losses.min():.4f}" if len(validation_losses) else "-"),
        ("tokens/s (median)", short_number(_median(run, "tokens_per_s"))),
        ("MFU (median)", f"{_median(run, 'mfu'):.1%}"),
        ("memory, rank 0", f"{max(run.columns.values('memory_gib')[1], default=0.0):.2f} GiB"),
    ]
    if run.account:
        facts += [
            ("wall time", duration(run.account.wall_s)),
            ("goodput", f"{run.account.goodput:.1%}"),
            ("restarts", str(run.account.restarts)),
            ("steps repeated", str(run.account.steps_lost)),
        ]
    body = "".join(f"<div><dt>{label}</dt><dd>{html.escape(str(value))}</dd></div>" for label, value in facts)
    return f'<article style="border-color:{run.color}"><h3>{html.escape(run.name)}</h3><dl>{body}</dl></article>'


def _median(run: Run, key: str) -> float:
    """Return the median of a key of metrics.jsonl over all steps, or 0 if no step has the key."""
    values = run.columns.values(key)[1]
    return float(np.median(values)) if len(values) else 0.0


def training_charts(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts of losses, gradient norm and learning rate, with a curve for each run."""
    loss: list[Series] = []
    for run in runs:
        x, y = run.columns.values("loss")
        window = min(50, len(y) // 20)  # curves of less than 40 steps are not smoothed
        if window > 1:  # also draw the raw values, behind the smoothed curve
            loss.append(Series(run.name, x, y, run.color, faint=True))
        loss.append(Series(run.name, x, smoothed(y, window), run.color))
    val = [Series(run.name, *run.columns.values("val_loss"), run.color, dots=True) for run in runs]
    with_experts = [run for run in runs if len(run.columns.values("expert_load")[0])]
    experts = [
        _chart(with_experts, "expert_load", "largest load of an expert", "multiple of the mean"),
        _chart(with_experts, "dead_experts", "experts without a token"),
    ]
    return [
        Chart("training loss", loss, "nats per token"),
        Chart("validation loss", val, "nats per token"),
        _chart(runs, "grad_norm", "gradient norm", "before clipping"),
        _chart(runs, "lr", "learning rate"),
        *(experts if with_experts else []),
    ]


def speed_charts(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts of throughput, MFU, step time and memory, with a curve for each run."""
    return [
        _chart(runs, "tokens_per_s", "throughput", "tokens/s"),
        _chart(runs, "mfu", "model FLOPs utilisation", "share of peak"),
        _chart(runs, "step_time_s", "step time", "s"),
        _chart(runs, "memory_gib", "memory of rank 0", "GiB"),
    ]


def _chart(runs: Sequence[Run], key: str, title: str, unit: str = "") -> Chart:
    """Return a chart of one key of metrics.jsonl over the steps, with a curve for each run."""
    return Chart(title, [Series(run.name, *run.columns.values(key), run.color) for run in runs], unit)


def _charts(charts: Sequence[Chart]) -> str:
    """Return the charts side by side, as HTML."""
    return f'<div class="charts">{"".join(line_chart(chart) for chart in charts)}</div>'


def _heading(run: Run, named: bool) -> str:
    """Return the run's name as an HTML heading if `named`, otherwise an empty string."""
    return f"<h3>{html.escape(run.name)}</h3>" if named else ""


def _plan(run: Run, named: bool) -> str:
    """Return the HTML that compares a run's first steps with the plan that `packspeed plan --lock` has stored.

    `named` adds the run's name.
    """
    plan = run.plan
    assert plan is not None
    names = {"step_time_s": "step time, s", "memory_gib": "memory of rank 0, GiB"}
    rows = [
        (names[key], f"{plan['planned'][key]:.4g}", f"{plan['measured'][key]:.4g}", f"{plan['error'][key]:+.1%}",
         f"{plan['bar'][key]:.0%}")
        for key in names
    ]  # fmt: skip
    parts = [(name, f"{value:.4g} s", "") for name, value in plan["planned_step_s"].items() if value]
    parts += [(name, f"{value:.3f} GiB", "") for name, value in plan["planned_memory_gib"].items() if value]
    parts += [(name, "", f"{value:.4g} s") for name, value in plan["measured_step_s"].items()]
    parts += [(name, "", f"{value:.3f} GiB") for name, value in plan["measured_memory_gib"].items()]
    head = _heading(run, named)
    return (
        f"{head}<p>The first {plan['steps']} steps of the newest process, compared with the locked plan.</p>"
        f"{_table(('', 'planned', 'measured', 'error', 'nine tenths of plans within'), rows)}"
        f"{_table(('part or kind', 'planned', 'measured'), parts)}"
    )


def _goodput(run: Run, named: bool) -> str:
    """Return the HTML of a run's goodput: a bar of the time per kind of work, its legend, a table of its processes.

    `named` adds the run's name.
    """
    total = run.account
    assert total is not None
    seconds = dict(sorted(((b, total.seconds[b]) for b in BUCKETS if total.seconds[b] > 0), key=lambda item: -item[1]))
    wall = total.wall_s or 1.0
    bar = "".join(
        f'<i style="width:{100 * value / wall:.2f}%;background:{BUCKET_COLORS[b]}" title="{LABELS[b]}"></i>'
        for b, value in seconds.items()
    )
    legend = "".join(
        f'<span><i style="background:{BUCKET_COLORS[b]}"></i>{LABELS[b]} '
        f"<b>{value / wall:.1%}</b> {duration(value)}</span>"
        for b, value in seconds.items()
    )
    lives = [
        (i + 1, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(life["started_at"])),
         duration(sum(life["seconds"].values())), f"{life['from_step']} to {life['step']}",
         life["ended"] or ("crashed" if i + 1 < len(total.lives) else "no end recorded"))
        for i, life in enumerate(total.lives)
    ]  # fmt: skip
    head = _heading(run, named)
    return (
        f"{head}<p>{total.goodput:.1%} of {duration(total.wall_s)} was spent computing steps that were kept. "
        f"{total.restarts} restart(s), {total.steps_lost} step(s) repeated.</p>"
        f'<div class="bar">{bar}</div><div class="legend">{legend}</div>'
        + _table(("process", "started", "length", "steps", "end"), lives)
    )


def _differences(runs: Sequence[Run]) -> str:
    """Return the HTML of two tables with the settings that differ between the runs."""
    loss, speed = differences(runs)
    head = ("setting", *(run.name for run in runs))
    parts = []
    for title, rows in (("Can change the loss", loss), ("Only changes speed", speed)):
        table = _table(head, [(key, *values) for key, values in rows]) if rows else "<p>nothing</p>"
        parts.append(f"<h3>{title}</h3>{table}")
    return "".join(parts)


def _samples(run: Run, named: bool) -> str:
    """Return the HTML of the texts that a run has generated at its evaluations. `named` adds the run's name."""
    head = _heading(run, named)
    newest, *older = reversed(run.samples)  # show the newest, and at most 20 older ones in a folded block
    rest = "".join(_sample(entry) for entry in older[:20])
    more = f"<details><summary>earlier ({len(older)})</summary>{rest}</details>" if older else ""
    return f"{head}{_sample(newest)}{more}"


def _sample(entry: SamplesLine) -> str:
    """Return the HTML of the prompts and generated texts of one evaluation."""
    texts = "".join(
        f"<pre><b>{html.escape(sample['prompt'])}</b>{html.escape(sample['text'])}</pre>" for sample in entry["samples"]
    )
    return f'<div class="sample"><h4>step {entry["step"]:,}</h4>{texts}</div>'


def _anomalies(run: Run) -> str:
    """Return an HTML table of the steps that the optimizer did not apply, with the reasons."""
    keys = ("step", "reason", "policy", "loss", "grad_norm", "first_sample", "samples")
    return f"<h3>{html.escape(run.name)}</h3>" + _table(keys, [[entry.get(k) for k in keys] for entry in run.anomalies])


def _configuration(run: Run) -> str:
    """Return the HTML of a run's config.yaml and ds_config.json, in folded blocks."""
    files = (
        ("config.yaml", yaml.safe_dump(run.config, sort_keys=False)),
        ("ds_config.json", json.dumps(run.ds_config, indent=2)),
    )
    return "".join(
        f"<details><summary>{html.escape(run.name)}: {name}</summary><pre>{html.escape(text)}</pre></details>"
        for name, text in files
    )


def _environment(runs: Sequence[Run]) -> str:
    """Return an HTML table of environment.json, with a column for each run."""
    flats = [flatten(run.environment or {}) for run in runs]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    shown = [
        (key, *(" ".join(map(str, v)) if isinstance(v := flat.get(key), list) else v for flat in flats)) for key in keys
    ]
    return _table(("", *(run.name for run in runs)), shown)
