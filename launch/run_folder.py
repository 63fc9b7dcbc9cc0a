"""The run folder: what a run leaves to be read.

    runs/<name>/config.yaml, ds_config.json, environment.json     what ran: resolved run file, engine's dict, versions
    runs/<name>/metrics.jsonl        one object per step and one per evaluation
    runs/<name>/tensorboard/         the same scalars; configs, samples, histograms of norms (Board)
    runs/<name>/anomalies.jsonl      steps that were not taken, and what was done instead
    runs/<name>/goodput.jsonl, samples.jsonl      where the time went (watch.py); texts of each evaluation
    runs/<name>/status.json          running, stopped, finished, failed
    runs/.<name>.lock                held while a process trains there

Each step stands once in metrics.jsonl: a resume moves the lines after its checkpoint to metrics.discarded.jsonl.
Events go through DeepSpeed's monitor, so the tensorboard, wandb, csv_monitor and comet blocks of a user's JSON all
work; DeepSpeed itself writes only the learning rate there.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import yaml

from packspeed.data.dataset import changes
from packspeed.launch.config import ConfigError, RunFile, UserError
from packspeed.model.config import GPTConfig

if TYPE_CHECKING:
    from packspeed.launch.engine import Topology

TAGS = {
    "loss": "train/loss", "lr": "train/lr", "grad_norm": "train/grad_norm", "val_loss": "eval/loss",
    "tokens_per_s": "speed/tokens_per_s", "mfu": "speed/mfu", "step_time_s": "speed/step_time_s",
    "data_wait_s": "speed/data_wait_s", "memory_gib": "memory/rank0_gib",
}  # fmt: skip
# group -> chart -> tags; goodput's shares are those of this process life, lost work is in `packspeed goodput`.
LAYOUT: dict[str, dict[str, list[Any]]] = {
    "training": {
        "loss": ["Multiline", ["train/loss", "eval/loss"]],
        "learning rate": ["Multiline", ["train/lr"]],
        "gradient norm before clipping": ["Multiline", ["train/grad_norm"]],
    },
    "speed": {
        "tokens per second": ["Multiline", ["speed/tokens_per_s"]],
        "model FLOPs utilisation": ["Multiline", ["speed/mfu"]],
        "seconds per step": ["Multiline", ["speed/step_time_s", "speed/data_wait_s"]],
    },
    "memory": {"GiB on rank 0": ["Multiline", ["memory/rank0_gib"]]},
    "goodput": {"share of the wall time": ["Multiline", ["goodput/.*"]]},
}
COMPARED = ("train/loss", "eval/loss", "speed/tokens_per_s", "speed/mfu")


def say(line: str) -> None:
    """Print a line at once (the launcher's pipes buffer otherwise)."""
    print(line, flush=True)


LOCK_WAIT_S = 60.0


def move_aside(folder: Path) -> None:
    """Give an old run folder another name."""
    folder.rename(folder.with_name(f"{folder.name}.old-{time.strftime('%Y%m%d-%H%M%S')}"))


@contextmanager
def prepared(folder: Path, topology: Topology, fresh: bool) -> Iterator[None]:
    """Make the run folder (rank 0), moving an old one aside if asked, and hold its lock while training.

    UserError on every rank where the folder cannot be made, or another process still trains in it.
    """
    error, lock = None, None
    if topology.rank == 0:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder)
            if fresh and folder.exists():
                move_aside(folder)
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            probe = folder / ".write-probe"
            probe.write_text("")
            probe.unlink()
        except UserError as problem:
            error = str(problem)
        except OSError as problem:
            error = (
                f"run folder {folder.resolve()}: {problem.strerror}. "
                "Choose another place with --set runs_dir=DIR or --set name=NAME."
            )
    error = topology.from_rank0(error)
    if error:
        raise UserError(error)
    try:
        yield
    finally:
        if lock:
            lock.close()


def _lock(folder: Path) -> IO[str]:
    """<runs_dir>/.<name>.lock, held by one training at a time; it goes with the process, however that ends."""
    file = folder.with_name(f".{folder.name}.lock").open("a+", encoding="utf-8")
    end = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            if time.monotonic() > end:
                raise UserError(
                    f"run folder {folder}: {holder} still trains in it. Stop that first, or choose another name with "
                    "--set name=NAME."
                ) from None
            say(f"waiting for {holder}, which still trains in {folder} ...")
            time.sleep(2)
        except OSError:  # a file system without locks
            break
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


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
    environment = {
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": versions(),
        "git_commit": git_commit(),
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


def versions() -> dict[str, str]:
    """Versions of what computes a run."""
    names = ("packspeed", "torch", "deepspeed", "numpy", "tiktoken", "tokenizers")
    return {name: metadata.version(name) for name in names}


def memory_gib(device_type: str) -> float:
    """Most device memory torch held in this process so far; on CPUs what the process has in memory now."""
    if device_type == "cuda":
        import torch

        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError):
        return 0.0
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**30, 3)


def git_commit() -> str | None:
    """Commit of this checkout, with -dirty where files were changed; None outside git."""
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
    if "imported" in saved:
        check_same_model(checkpoint, old, new)
        return []
    for flat in (old, new):  # what older checkpoints do not say, and where mixtures lie
        flat.setdefault("data.packing", "stream")
        flat.setdefault("data.document_mask", False)
        flat.setdefault("data.stages", [])
        flat.setdefault("model.z_loss", 0.0)
        flat.setdefault("model.kernels", "auto")
        flat["data.weights"] = [source["weight"] for source in flat.get("data.sources") or []]
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    fixed = [key for key in changed if _defines_the_run(key)]
    if fixed:
        lines = "; ".join(f"{k} was {old.get(k)!r}, is {new.get(k)!r}" for k in fixed)
        raise ConfigError(
            f"{checkpoint} belongs to another run: {lines}. "
            "Restore the values, choose another name, or start over with --fresh."
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


SPEED_ONLY = ("model.activation_checkpointing", "model.kernels")  # these of the model leave its maths alone


def check_same_model(checkpoint: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse a run file whose model is not the one imported; what shapes no weight is the run's own choice."""
    free = ("model.dropout", "model.z_loss", *SPEED_ONLY)
    keys = {key for key in old.keys() | new.keys() if key.startswith("model.") and key not in free}
    if changed := sorted(key for key in keys if old.get(key) != new.get(key)):
        lines = "; ".join(f"{k} is {old.get(k)!r} there, {new.get(k)!r} in the run file" for k in changed)
        raise ConfigError(f"{checkpoint} holds the imported weights of another model: {lines}.")


def _defines_the_run(key: str) -> bool:
    if key in ("train.seed", "train.global_batch_tokens", "train.optimizer.name"):
        return True
    if key in ("data.seq_len", "data.shuffle", "data.packing", "data.document_mask", "data.weights", "data.stages"):
        return True
    return key.startswith("model.") and key not in SPEED_ONLY


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def write_durably(path: Path, text: str) -> None:
    """Write a small file so that after a power cut it holds the old or the new text, never half."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file's bytes, or the names in a folder, on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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


class Board:
    """TensorBoard beyond scalars, through the SummaryWriter of DeepSpeed's monitor: texts, hparams, histograms.

    The scalars go through engine.monitor.write_events, which wandb, csv_monitor and comet get too. hparams compares
    runs by everything about model and training in config.yaml that is one number, word or truth value.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def begin(self, folder: Path) -> None:
        """What stands once: the layout of the custom scalars, the run's files, its hparams."""
        self.writer.add_custom_scalars(LAYOUT)
        for name in ("config.yaml", "ds_config.json"):
            self.text(name, "```\n" + (folder / name).read_text(encoding="utf-8") + "\n```", 0)
        self._hparams(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))

    def _hparams(self, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams

        told = {key: value for key, value in _flat(config).items() if key.startswith(("deepspeed", "model.", "train."))}
        settings = {key: value for key, value in told.items() if isinstance(value, (bool, int, float, str))}
        # Session start and the metrics to compare; the values of the metrics are the scalars of this same folder.
        for summary in hparams(  # type: ignore[no-untyped-call]
            settings, dict.fromkeys(COMPARED, 0.0)
        )[:2]:
            self.writer.file_writer.add_summary(summary)

    def text(self, name: str, content: str, step: int) -> None:
        """Show a text (markdown) on the text page."""
        self.writer.add_text(name, content, step)

    def norms(self, step: int, norms: dict[str, dict[str, float]]) -> None:
        """Histograms of L2 norms: over all parameters, and over each layer's. norms: kind -> parameter -> norm."""
        import numpy as np

        for kind, by_name in norms.items():
            layers: dict[str, list[float]] = {"all": list(by_name.values())}
            for name, value in by_name.items():
                layers.setdefault(layer_of(name), []).append(value)
            for layer, values in layers.items():
                self.writer.add_histogram(f"{kind}_norms/{layer}", np.array(values), step)


def layer_of(name: str) -> str:
    """`blocks.3.attn.qkv.weight` -> `blocks.03`; what is in no block keeps its first word."""
    parts = name.split(".")
    return f"{parts[0]}.{int(parts[1]):02d}" if len(parts) > 1 and parts[1].isdigit() else parts[0]


class Metrics:
    """Rank 0's writer. Other ranks have none.

    A full disk does not end a run: lines that cannot be written wait in memory and are tried again with the next one.
    """

    def __init__(self, folder: Path, monitor: Any, total_steps: int, log_every_steps: int, start_step: int) -> None:
        self.folder, self.path = folder, folder / "metrics.jsonl"
        self.monitor, self.total_steps, self.log_every_steps = monitor, total_steps, log_every_steps
        self.waiting: list[str] = []
        self.anomalies = -1  # lines in anomalies.jsonl, unknown yet
        self.followers: list[Callable[[dict[str, Any]], None]] = []  # see every line, as the live screen does
        self.shares: Callable[[], dict[str, float]] = dict  # of the wall time, by bucket
        self.board: Board | None = None
        self._begin(start_step)
        writer = getattr(getattr(self.monitor, "tb_monitor", None), "summary_writer", None)
        if writer is not None:
            self.board = Board(writer)
            self.board.begin(folder)
        self.broken = False  # the monitor could not write its last events
        self._shield()

    def _shield(self) -> None:
        """DeepSpeed writes events of its own inside engine.step: a full disk must not end the run there."""
        original = self.monitor.write_events

        def write_events(*args: Any, **kwargs: Any) -> None:
            try:
                original(*args, **kwargs)
            except OSError as error:
                self._monitor_failed(error)

        self.monitor.write_events = write_events

    def _monitor_failed(self, error: OSError) -> None:
        if not self.broken:
            say(f"WARNING: TensorBoard's events could not be written ({error.strerror}); metrics.jsonl has every step")
        self.broken = True

    def _mend(self) -> None:
        """A SummaryWriter whose thread met a full disk fails for ever: begin another file."""
        from torch.utils.tensorboard import SummaryWriter

        if self.board is None:
            return
        with suppress(OSError):
            writer = SummaryWriter(log_dir=self.board.writer.log_dir)
            self.monitor.tb_monitor.summary_writer = self.board.writer = writer
            self.broken = False

    def _begin(self, step: int) -> None:
        """Open the file for what follows `step`."""
        discard_after(self.path, step)
        # Kept open: an open per step would cost more than the line; flushed after each line.
        self.file = self.path.open("ab", buffering=0)
        self.start_step, self.started = step, time.monotonic()
        self._purge(step + 1)

    def go_back(self, step: int) -> None:
        """Forget the lines after `step` (they are kept in metrics.discarded.jsonl)."""
        self.close()
        self._begin(step)

    def _purge(self, step: int) -> None:
        """Tell TensorBoard to forget what an earlier attempt wrote from `step` on (SummaryWriter's purge_step).

        Its server takes the first such mark of a run for the start and only the following for restarts, so a fresh run
        leaves one too.
        """
        writer = getattr(getattr(self.monitor, "tb_monitor", None), "summary_writer", None)
        if writer is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        writer.file_writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, record: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl; at log steps and evaluations to the monitor and the screen too."""
        self.waiting.append(json.dumps(record) + "\n")
        if error := self._flush():
            say(f"WARNING: metrics.jsonl: {error}; {len(self.waiting)} line(s) wait in memory")
        for follower in self.followers:
            follower(record)
        step = record["step"]
        if "val_loss" in record or step % self.log_every_steps == 0 or step in (self.start_step + 1, self.total_steps):
            events = [(TAGS[k], v, step) for k, v in record.items() if k in TAGS and v is not None]
            events += [(f"goodput/{name}", share, step) for name, share in self.shares().items()]
            if self.broken:
                self._mend()
            self.monitor.write_events(events)
            say(self._line(record))

    def _flush(self) -> str | None:
        """Write the lines that wait, each whole or not at all; returns the error that stopped it."""
        try:
            while self.waiting:
                line, end = self.waiting[0].encode(), self.file.seek(0, os.SEEK_END)
                if self.file.write(line) != len(line):
                    self.file.truncate(end)
                    return os.strerror(errno.ENOSPC)
                del self.waiting[0]
        except OSError as problem:
            return problem.strerror
        return None

    def sync(self) -> str | None:
        """Have the lines on disk before a checkpoint that follows them; returns the error where they are not."""
        if error := self._flush():
            return f"metrics.jsonl: {error}"
        try:
            os.fsync(self.file.fileno())
        except OSError as problem:
            return f"metrics.jsonl: {problem.strerror}"
        return None

    def write_anomalies(self, records: list[dict[str, Any]]) -> None:
        """Keep anomalies.jsonl as the guard remembers it: every step that was not taken, and what was done."""
        if len(records) == self.anomalies or not (records or (self.folder / "anomalies.jsonl").exists()):
            return
        try:
            write_durably(self.folder / "anomalies.jsonl", "".join(json.dumps(record) + "\n" for record in records))
            self.anomalies = len(records)
        except OSError as error:
            say(f"WARNING: anomalies.jsonl: {error.strerror}")

    def write_norms(self, step: int, norms: dict[str, dict[str, float]] | None) -> None:
        """Histograms of norms, where the step has them and TensorBoard is on."""
        if norms is not None and self.board is not None:
            try:
                self.board.norms(step, norms)
            except OSError as error:
                self._monitor_failed(error)

    def write_samples(self, step: int, samples: list[dict[str, str]]) -> None:
        """Keep the texts of an evaluation in samples.jsonl and show them in TensorBoard."""
        from packspeed.launch.inside import append, markdown

        try:
            append(self.folder, step, samples)
            if self.board is not None:
                self.board.text("samples", markdown(samples), step)
        except OSError as error:
            say(f"WARNING: samples.jsonl: {error.strerror}")

    def _line(self, record: dict[str, Any]) -> str:
        step, width = record["step"], len(str(self.total_steps))
        head = f"step {step:>{width}}/{self.total_steps}"
        if "val_loss" in record:
            return f"{head} | validation loss {record['val_loss']:.4f} over {record['val_tokens']:,} tokens"
        if record["loss"] is None:
            return f"{head} | {record.get('skipped', 'loss is not finite')}"
        left = (time.monotonic() - self.started) / max(1, step - self.start_step) * (self.total_steps - step)
        mfu = f" | mfu {record['mfu']:.1%}" if record["mfu"] is not None else ""
        norm = "none" if record["grad_norm"] is None else f"{record['grad_norm']:.2f}"
        return (
            f"{head} | loss {record['loss']:.4f} | lr {record['lr']:.2e} | grad norm {norm}"
            f" | {record['tokens_per_s']:,.0f} tokens/s{mfu} | {left // 60:.0f}:{left % 60 // 1:02.0f} left"
        )

    def close(self) -> None:
        """Write what waits and close the file; the monitor's writers flush themselves."""
        if error := self._flush():
            say(f"WARNING: metrics.jsonl: {error}; {len(self.waiting)} line(s) are lost")
        self.file.close()
