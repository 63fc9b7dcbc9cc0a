"""The run folder: what a run leaves to be read.

    runs/<name>/config.yaml, ds_config.json, environment.json     what ran: resolved run file, engine's dict, versions
    runs/<name>/metrics.jsonl        one object per step and one per evaluation
    runs/<name>/tensorboard/         the same scalars; x axis = step
    runs/<name>/status.json          running, stopped, finished

Each step stands once in metrics.jsonl: a resume moves the lines after its checkpoint to metrics.discarded.jsonl.
Events go through DeepSpeed's monitor, so the tensorboard, wandb, csv_monitor and comet blocks of a user's JSON all
work; DeepSpeed itself writes only the learning rate there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from packspeed.data.dataset import changes
from packspeed.launch.config import ConfigError, RunFile, UserError
from packspeed.model.config import GPTConfig

if TYPE_CHECKING:
    from packspeed.launch.engine import Topology

TAGS = {
    "loss": "train/loss", "lr": "train/lr", "grad_norm": "train/grad_norm", "val_loss": "eval/loss",
    "tokens_per_s": "speed/tokens_per_s", "mfu": "speed/mfu", "step_time_s": "speed/step_time_s",
    "data_wait_s": "speed/data_wait_s",
}  # fmt: skip


def say(line: str) -> None:
    """Print a line at once (the launcher's pipes buffer otherwise)."""
    print(line, flush=True)


def prepare(folder: Path, topology: Topology, fresh: bool) -> None:
    """Make the run folder (rank 0), moving an old one aside if asked. UserError on every rank where it cannot."""
    error = None
    if topology.rank == 0:
        try:
            if fresh and folder.exists():
                folder.rename(folder.with_name(f"{folder.name}.old-{time.strftime('%Y%m%d-%H%M%S')}"))
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            probe = folder / ".write-probe"
            probe.write_text("")
            probe.unlink()
        except OSError as problem:
            error = (
                f"run folder {folder.resolve()}: {problem.strerror}. "
                "Choose another place with --set runs_dir=DIR or --set name=NAME."
            )
    error = topology.from_rank0(error)
    if error:
        raise UserError(error)


def resolved(run: RunFile, config: GPTConfig, precision: str) -> dict[str, Any]:
    """The run file with every default and the preset written out: itself a run file."""
    out = run.model_dump(mode="json", exclude_none=True)
    out["model"] = {k: v for k, v in dataclasses.asdict(config).items() if v is not None}
    out["train"]["precision"] = precision
    return out


def write_configs(folder: Path, config: dict[str, Any], ds_config: dict[str, Any], topology: Topology) -> None:
    """Write config.yaml, ds_config.json and environment.json (rank 0)."""
    hosts = topology.gather(platform.node())
    if topology.rank:
        return
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "ds_config.json").write_text(json.dumps(ds_config, indent=2))
    names = ("packspeed", "torch", "deepspeed", "numpy", "tiktoken", "tokenizers")
    environment = {
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in names},
        "git_commit": _git_commit(),
        "hosts": sorted(set(hosts)),
        "ranks": topology.world,
        "device": topology.device.type,
        "cpus_per_host": os.cpu_count(),
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    (folder / "environment.json").write_text(json.dumps(environment, indent=2))


def write_status(folder: Path, topology: Topology, state: str) -> None:
    """Say in status.json how the run stands, for scripts and other hosts."""
    if topology.rank == 0:
        status = {"state": state, "pid": os.getpid(), "host": platform.node(), "at": time.time()}
        (folder / "status.json").write_text(json.dumps(status))


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None


def check_same_run(checkpoint: Path, saved: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """Refuse to continue another run's checkpoint (ConfigError); return a note for every setting that changed.

    Model, data order, seed, batch and optimizer kind are what the run is; the schedule, its length and everything
    about speed may change in the middle.
    """
    old, new = _flat(saved["config"]), _flat(identity["config"])
    for flat in (old, new):  # what older checkpoints do not say, and where mixtures lie
        flat.setdefault("data.packing", "stream")
        flat.setdefault("data.document_mask", False)
        flat.setdefault("data.stages", [])
        flat["data.weights"] = [source["weight"] for source in flat.get("data.sources") or []]
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    fixed = [key for key in changed if _defines_the_run(key)]
    if fixed:
        lines = "; ".join(f"{k} was {old.get(k)!r}, is {new.get(k)!r}" for k in fixed)
        raise ConfigError(
            f"{checkpoint} belongs to another run: {lines}. "
            "Restore the values, choose another name, or start over with --fresh."
        )
    for key, what in (("dp_size", "data-parallel ranks"), ("zero_stage", "as ZeRO stage")):
        if saved[key] != identity[key]:
            raise ConfigError(
                f"{checkpoint} was written with {saved[key]} {what}, this start has {identity[key]}: resuming "
                "with another number of ranks or stage is not supported yet. Start it as it was, or over with --fresh."
            )
    if saved["dataset_fingerprint"] != identity["dataset_fingerprint"] and "datasets" in saved:
        raise ConfigError(
            f"{checkpoint} was trained with another dataset: "
            f"{'; '.join(changes(saved['datasets'], identity['datasets']))}. "
            "Point the run file at the same data, or start over with --fresh."
        )
    for key in ("dataset_fingerprint", "order_version"):
        if saved[key] != identity[key]:
            raise ConfigError(
                f"{checkpoint} was trained with {key} {saved[key]}, now it is {identity[key]}: the next samples would "
                "not follow those it counted. Point data.path at the same dataset, or start over with --fresh."
            )
    return [f"note: {key} was {old.get(key)!r} before this resume, is {new.get(key)!r}" for key in changed]


def _defines_the_run(key: str) -> bool:
    if key in ("train.seed", "train.global_batch_tokens", "train.optimizer.name"):
        return True
    if key in ("data.seq_len", "data.shuffle", "data.packing", "data.document_mask", "data.weights", "data.stages"):
        return True
    return key.startswith("model.") and key != "model.activation_checkpointing"


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def finite(value: float, digits: int | None = None) -> float | None:
    """JSON has no nan: None stands for it."""
    if value != value or value in (float("inf"), float("-inf")):
        return None
    return round(value, digits) if digits is not None else value


def discard_after(path: Path, step: int) -> int:
    """Move the lines of metrics.jsonl whose step is later than `step` to metrics.discarded.jsonl; returns how many.

    A last line torn by a crash is moved too. The new file replaces the old one atomically.
    """
    if not path.exists():
        return 0
    keep: list[str] = []
    drop: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            late = json.loads(line)["step"] > step
        except (ValueError, KeyError, TypeError):
            late = True
        (drop if late else keep).append(line + "\n")
    if drop:
        with path.with_name("metrics.discarded.jsonl").open("a", encoding="utf-8") as out:
            out.writelines(drop)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(keep), encoding="utf-8")
        os.replace(temporary, path)
    return len(drop)


class Metrics:
    """Rank 0's writer. Other ranks have none."""

    def __init__(self, folder: Path, monitor: Any, total_steps: int, log_every_steps: int, start_step: int) -> None:
        path = folder / "metrics.jsonl"
        self.discarded = discard_after(path, start_step)
        # Appending without a handle of our own between steps would cost an open per step; flushed after each line.
        self.file = path.open("a", encoding="utf-8")
        self.monitor, self.total_steps, self.log_every_steps = monitor, total_steps, log_every_steps
        self.start_step, self.started = start_step, time.monotonic()
        if start_step:
            self._purge(start_step + 1)
        for name in ("config.yaml", "ds_config.json"):
            self._text(name, (folder / name).read_text())

    def _purge(self, step: int) -> None:
        """Tell TensorBoard to forget what an earlier attempt wrote from `step` on (SummaryWriter's purge_step)."""
        writer = getattr(getattr(self.monitor, "tb_monitor", None), "summary_writer", None)
        if writer is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        writer.file_writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def _text(self, name: str, content: str) -> None:
        """Show a text (the run file, the DeepSpeed dict) in TensorBoard's text page."""
        writer = getattr(getattr(self.monitor, "tb_monitor", None), "summary_writer", None)
        if writer is not None:
            writer.add_text(name, "```\n" + content + "\n```", 0)

    def write(self, record: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl; at log steps and evaluations to the monitor and the screen too."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        step = record["step"]
        if "val_loss" in record or step % self.log_every_steps == 0 or step in (self.start_step + 1, self.total_steps):
            self.monitor.write_events([(TAGS[k], v, step) for k, v in record.items() if k in TAGS and v is not None])
            say(self._line(record))

    def _line(self, record: dict[str, Any]) -> str:
        step, width = record["step"], len(str(self.total_steps))
        head = f"step {step:>{width}}/{self.total_steps}"
        if "val_loss" in record:
            return f"{head} | validation loss {record['val_loss']:.4f} over {record['val_tokens']:,} tokens"
        left = (time.monotonic() - self.started) / max(1, step - self.start_step) * (self.total_steps - step)
        mfu = f" | mfu {record['mfu']:.1%}" if record["mfu"] is not None else ""
        return (
            f"{head} | loss {record['loss']:.4f} | lr {record['lr']:.2e} | grad norm {record['grad_norm']:.2f}"
            f" | {record['tokens_per_s']:,.0f} tokens/s{mfu} | {left / 60:.0f}:{left % 60:02.0f} left"
        )

    def close(self) -> None:
        """Flush and close the file; the monitor's writers flush themselves."""
        self.file.close()
