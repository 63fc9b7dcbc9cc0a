"""`packspeed report RUN [RUN...]`: runs as one HTML page that needs no network.

Curves, configuration, throughput, memory, goodput, restarts, samples and environment, from the run folders' files
alone; several runs lie over each other, and what differs between their configurations is split into what can change
the loss and what only changes speed. Cost: 1 s and 1 MB per million steps; imports neither torch nor deepspeed.
"""

from __future__ import annotations

import dataclasses
import html
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from packspeed.launch.config.errors import UserError
from packspeed.launch.observe.charts import COLORS, SCRIPT, STYLE, Chart, Series, line_chart, short, smoothed
from packspeed.launch.observe.goodput import BUCKETS, LABELS, Account, account, duration
from packspeed.launch.observe.png import write_png
from packspeed.launch.run_folder.folder import flatten

# Keys of config.yaml and ds_config.json that leave every loss as it is, but for the order of rounding.
SPEED_ONLY = (
    "name", "runs_dir", "checkpoint.", "monitor.", "eval.", "train.micro_batch", "data.cache_", "deepspeed",
    "model.activation_checkpointing", "model.kernels", "environment.",
)  # fmt: skip


DS_CHANGES_LOSS = (
    "communication_data_type", "data_types.", "prescale_gradients", "gradient_predivide_factor", "fp16.", "bf16.",
    "torch_autocast.", "zero_optimization.zero_quantized",
)  # fmt: skip


DS_REPEATS = (
    "optimizer.",
    "train_",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "tensorboard.",
    "steps_per_print",
)


BUCKET_COLORS = dict(
    zip(
        BUCKETS,
        ("#059669", "#0891b2", "#7c3aed", "#2563eb", "#6366f1", "#d97706", "#94a3b8", "#dc2626", "#cbd5e1"),
        strict=True,
    )
)


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run folder says; parts that are not there are empty."""

    folder: Path
    config: dict[str, Any]
    ds_config: dict[str, Any]
    environment: dict[str, Any]
    status: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    anomalies: list[dict[str, Any]]
    account: Account | None
    color: str = COLORS[0]

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.config["name"])

    def values(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a key of metrics.jsonl, where it is a number."""
        lines = [line for line in self.steps if isinstance(line.get(key), (int, float))]
        return [line["step"] for line in lines], [line[key] for line in lines]


def read_run(folder: Path, color: str = COLORS[0]) -> Run:
    """Read a run folder. Raises UserError where there is no run."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{folder}: no run there ({error.strerror}: config.yaml). Name the folder that training printed."
        ) from None
    lines = _json_lines(folder / "metrics.jsonl")
    return Run(
        folder, config,
        _json(folder / "ds_config.json"), _json(folder / "environment.json"), _json(folder / "status.json"),
        [line for line in lines if "loss" in line], [line for line in lines if "val_loss" in line],
        _json_lines(folder / "samples.jsonl"), _json_lines(folder / "anomalies.jsonl"), account(folder), color,
    )  # fmt: skip


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    out = []
    for line in lines:
        try:
            out.append(json.loads(line))
        except ValueError:
            continue
    return out


def differences(runs: Sequence[Run]) -> tuple[list[tuple[str, list[Any]]], list[tuple[str, list[Any]]]]:
    """(what can change the loss, what only changes speed): key and each run's value, where they are not all equal."""
    flats = []
    for run in runs:
        flat = flatten(run.config)
        flat |= {
            f"ds_config.{key}": value for key, value in flatten(run.ds_config).items() if not key.startswith(DS_REPEATS)
        }
        versions = run.environment.get("versions", {})
        flat |= {f"environment.{key}": run.environment.get(key) for key in ("ranks", "device", "hosts", "git_commit")}
        flat |= {f"environment.{key}": value for key, value in versions.items()}
        flats.append(flat)
    loss: list[tuple[str, list[Any]]] = []
    speed: list[tuple[str, list[Any]]] = []
    for key in dict.fromkeys(key for flat in flats for key in flat):
        values = [flat.get(key) for flat in flats]
        if any(value != values[0] for value in values):
            (loss if can_change_the_loss(key) else speed).append((key, values))
    return loss, speed


def can_change_the_loss(key: str) -> bool:
    """Whether a setting can move the curve by more than the order of rounding."""
    if key.startswith("ds_config."):
        return key.removeprefix("ds_config.").startswith(DS_CHANGES_LOSS)
    return not key.startswith(SPEED_ONLY)


def report(folders: Sequence[Path], out: Path) -> list[Run]:
    """Write the page; returns the runs."""
    runs = [read_run(folder, COLORS[i % len(COLORS)]) for i, folder in enumerate(folders)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(runs), encoding="utf-8")
    return runs


def write_pngs(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write every chart that has something to show as a PNG, named after its title; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    charts = {
        folder / f"{chart.title.replace(' ', '_')}.png": chart for chart in training_charts(runs) + speed_charts(runs)
    }
    return [path for path, chart in charts.items() if write_png(chart, path)]


def page(runs: Sequence[Run]) -> str:
    """The whole page."""
    title = " · ".join(run.name for run in runs)
    sections = [
        ("Summary", _cards(runs)),
        ("Training", _charts(training_charts(runs))),
        ("What differs", _differences(runs) if len(runs) > 1 else ""),
        ("Throughput and memory", _charts(speed_charts(runs))),
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
    keys = "".join(f'<span><i style="background:{run.color}"></i>{html.escape(run.name)}</span>' for run in runs)
    return f'<div class="legend">{keys}</div>' if len(runs) > 1 else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        return f"<td>{html.escape('-' if value is None else str(value))}</td>"

    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(cell(value) for value in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cards(runs: Sequence[Run]) -> str:
    return '<div class="runs">' + "".join(_card(run) for run in runs) + "</div>"


def _card(run: Run) -> str:
    last, best = (
        run.steps[-1] if run.steps else {},
        min((e["val_loss"] for e in run.evaluations if e["val_loss"]), default=None),
    )
    loss = next((line["loss"] for line in reversed(run.steps) if line["loss"] is not None), None)
    facts = [
        ("state", run.status.get("state", "unknown")),
        ("steps", f"{last.get('step', 0):,}"),
        ("tokens", short(last.get("tokens", 0))),
        ("training loss", "-" if loss is None else f"{loss:.4f}"),
        ("best validation loss", "-" if best is None else f"{best:.4f}"),
        ("tokens/s (median)", short(_median(run, "tokens_per_s"))),
        ("MFU (median)", f"{_median(run, 'mfu'):.1%}"),
        ("memory, rank 0", f"{max(run.values('memory_gib')[1], default=0.0):.2f} GiB"),
    ]
    if run.account:
        facts += [
            ("wall time", duration(run.account.wall_s)),
            ("goodput", f"{run.account.goodput:.1%}"),
            ("restarts", str(run.account.restarts)),
            ("steps done again", str(run.account.steps_lost)),
        ]
    body = "".join(f"<div><dt>{label}</dt><dd>{html.escape(str(value))}</dd></div>" for label, value in facts)
    return f'<article style="border-color:{run.color}"><h3>{html.escape(run.name)}</h3><dl>{body}</dl></article>'


def _median(run: Run, key: str) -> float:
    return statistics.median(run.values(key)[1] or [0.0])


def training_charts(runs: Sequence[Run]) -> list[Chart]:
    """Losses, gradient norm, learning rate."""
    loss: list[Series] = []
    for run in runs:
        x, y = run.values("loss")
        window = min(50, len(y) // 20)
        if window > 1:
            loss.append(Series(run.name, x, y, run.color, faint=True))
        loss.append(Series(run.name, x, smoothed(y, window), run.color))
    val = [
        Series(run.name, [e["step"] for e in run.evaluations if e["val_loss"]],
               [e["val_loss"] for e in run.evaluations if e["val_loss"]], run.color, dots=True)
        for run in runs
    ]  # fmt: skip
    return [
        Chart("training loss", loss, "nats per token"),
        Chart("validation loss", val, "nats per token"),
        _chart(runs, "grad_norm", "gradient norm", "before clipping"),
        _chart(runs, "lr", "learning rate"),
    ]


def speed_charts(runs: Sequence[Run]) -> list[Chart]:
    """Throughput and memory."""
    return [
        _chart(runs, "tokens_per_s", "throughput", "tokens/s"),
        _chart(runs, "mfu", "model FLOPs utilisation", "share of peak"),
        _chart(runs, "step_time_s", "step time", "s"),
        _chart(runs, "memory_gib", "memory of rank 0", "GiB"),
    ]


def _chart(runs: Sequence[Run], key: str, title: str, unit: str = "") -> Chart:
    return Chart(title, [Series(run.name, *run.values(key), run.color) for run in runs], unit)


def _charts(charts: Sequence[Chart]) -> str:
    return f'<div class="charts">{"".join(line_chart(chart) for chart in charts)}</div>'


def _goodput(run: Run, named: bool) -> str:
    found = run.account
    assert found is not None
    order = sorted((b for b in BUCKETS if found.seconds[b] > 0), key=lambda b: -found.seconds[b])
    wall = found.wall_s or 1.0
    bar = "".join(
        f'<i style="width:{100 * found.seconds[b] / wall:.2f}%;background:{BUCKET_COLORS[b]}" title="{LABELS[b]}"></i>'
        for b in order
    )
    keys = "".join(
        f'<span><i style="background:{BUCKET_COLORS[b]}"></i>{LABELS[b]} '
        f"<b>{found.seconds[b] / wall:.1%}</b> {duration(found.seconds[b])}</span>"
        for b in order
    )
    total = duration(sum(found.seconds.values()))
    lives = [
        (i + 1, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(life["started_at"])),
         duration(life["ended_at"] - life["started_at"]), f"{life['from_step']} to {life['step']}",
         life["ended"] or ("crashed" if i + 1 < len(found.lives) else "no end recorded"))
        for i, life in enumerate(found.lives)
    ]  # fmt: skip
    head = f"<h3>{html.escape(run.name)}</h3>" if named else ""
    return (
        f"{head}<p>{found.goodput:.1%} of {duration(found.wall_s)} computed steps that stand; the parts add up to "
        f"{total}. {found.restarts} restart(s), {found.steps_lost} step(s) done again.</p>"
        f'<div class="bar">{bar}</div><div class="legend">{keys}</div>'
        + _table(("process", "started", "length", "steps", "end"), lives)
    )


def _differences(runs: Sequence[Run]) -> str:
    loss, speed = differences(runs)
    head = ("setting", *(run.name for run in runs))
    parts = []
    for title, rows in (("Can change the loss", loss), ("Only changes speed", speed)):
        table = _table(head, [(key, *values) for key, values in rows]) if rows else "<p>nothing</p>"
        parts.append(f"<h3>{title}</h3>{table}")
    return "".join(parts)


def _samples(run: Run, named: bool) -> str:
    head = f"<h3>{html.escape(run.name)}</h3>" if named else ""
    newest, *older = reversed(run.samples)
    rest = "".join(_sample(each) for each in older[:20])
    more = f"<details><summary>earlier ({len(older)})</summary>{rest}</details>" if older else ""
    return f"{head}{_sample(newest)}{more}"


def _sample(entry: dict[str, Any]) -> str:
    texts = "".join(
        f"<pre><b>{html.escape(each['prompt'])}</b>{html.escape(each['text'])}</pre>" for each in entry["samples"]
    )
    return f'<div class="sample"><h4>step {entry["step"]:,}</h4>{texts}</div>'


def _anomalies(run: Run) -> str:
    keys = ("step", "reason", "policy", "loss", "grad_norm", "first_sample", "samples")
    return f"<h3>{html.escape(run.name)}</h3>" + _table(keys, [[entry.get(k) for k in keys] for entry in run.anomalies])


def _configuration(run: Run) -> str:
    files = (
        ("config.yaml", yaml.safe_dump(run.config, sort_keys=False)),
        ("ds_config.json", json.dumps(run.ds_config, indent=2)),
    )
    return "".join(
        f"<details><summary>{html.escape(run.name)}: {name}</summary><pre>{html.escape(text)}</pre></details>"
        for name, text in files
    )


def _environment(runs: Sequence[Run]) -> str:
    flats = [flatten(run.environment) for run in runs]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    shown = [
        (key, *(" ".join(map(str, v)) if isinstance(v := flat.get(key), list) else v for flat in flats)) for key in keys
    ]
    return _table(("", *(run.name for run in runs)), shown)
