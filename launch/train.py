"""The train entry: `deepspeed launch/train.py --config launch/configs/quickstart.yaml [--set key.path=value ...]`.

The same command again continues the run from its newest whole checkpoint; `--fresh` moves the old folder aside.
Exit codes: 0 finished, 1 failed, 2 wrong usage or config, 75 saved and stopped on a signal (start it again).
Both files are checked before torch is imported, so a typo answers at once and no process group is made.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packspeed.data.dataset import TokenDataset, open_dataset
from packspeed.data.errors import DataError
from packspeed.launch import run_folder
from packspeed.launch.config import EXIT_STOPPED, LAUNCH_ID, BatchPlan, RunFile, UserError, load_run_file, solve_batch
from packspeed.launch.ds_config import load_ds_config, resolve_ds_config, zero_stage
from packspeed.model.config import GPTConfig, flops_per_token

if TYPE_CHECKING:
    from packspeed.data.loader import Loader
    from packspeed.data.mixture import MixtureData
    from packspeed.launch.checkpoint import Checkpointer
    from packspeed.launch.engine import Topology
    from packspeed.launch.loop import Trainer


class Chatter(logging.Filter):
    """A filter on DeepSpeed's logger and Python's warnings that keeps all below ERROR off the screen, in a file."""

    def __init__(self) -> None:
        super().__init__()
        self.path: Path | None = None
        self.waiting: list[str] = []  # until the run folder is there
        self._format = logging.Formatter("[%(asctime)s] [%(levelname)s] %(message)s")

    def __enter__(self) -> Chatter:
        """Begin before DeepSpeed is imported: it speaks while it is."""
        for name in ("DeepSpeed", "py.warnings"):
            logging.getLogger(name).addFilter(self)
        logging.captureWarnings(True)
        return self

    def __exit__(self, *_: object) -> None:
        """Let them speak again."""
        for name in ("DeepSpeed", "py.warnings"):
            logging.getLogger(name).removeFilter(self)
        logging.captureWarnings(False)

    def filter(self, record: logging.LogRecord) -> bool:
        """Let errors pass; the rest goes to the file."""
        if record.levelno >= logging.ERROR or "PACKSPEED_DEEPSPEED_LOG" in os.environ:
            return True
        self.waiting.append(self._format.format(record) + "\n")
        if self.path is not None:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.writelines(self.waiting)
                self.waiting.clear()
            except OSError:
                self.waiting.clear()
        return False


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of train.py; --local_rank is what DeepSpeed's launcher appends."""
    parser = argparse.ArgumentParser(prog="train.py", description="Train a GPT as a run file says.")
    parser.add_argument("--config", required=True, help="the run file (YAML)")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY.PATH=VALUE")
    parser.add_argument("--fresh", action="store_true", help="move an existing run folder aside, start at step 0")
    parser.add_argument("--deepspeed_config", metavar="FILE", help="DeepSpeed JSON, instead of the run file's")
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the training; turn expected errors into one paragraph and an exit code."""
    args = parse_args(argv)
    try:
        overrides = list(args.overrides)
        if file := args.deepspeed_config:
            overrides.append(f"deepspeed={file if '/' in file else './' + file}")
        run = load_run_file(args.config, overrides)
        if LAUNCH_ID in os.environ:
            from packspeed.launch.heartbeat import keep_logs

            keep_logs(run.folder / "logs", int(os.environ.get("RANK", 0)))
        with Chatter() as chatter:
            return _train(run, load_ds_config(run.deepspeed), args.fresh, chatter)
    except (UserError, DataError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(2)  # the launcher kills everybody at the first exit: let rank 0 speak
        return error.exit_code


def _train(run: RunFile, raw_ds_config: dict[str, Any], fresh: bool, chatter: Chatter) -> int:
    dataset = open_data(run)
    config = run.gpt_config(dataset.vocab_size)
    # Only now the slow imports: everything above answers in a fraction of a second.
    logging.getLogger("DeepSpeed").setLevel(os.environ.get("PACKSPEED_DEEPSPEED_LOG", "WARNING"))
    from packspeed.launch import engine as engines

    rank, world, _, local_size = engines.launcher_environment()
    speak: Callable[[str], None] = run_folder.say if rank == 0 else lambda line: None
    threads = engines.limit_threads(local_size)
    precision = engines.resolve_precision(run.train.precision)
    plan = solve_batch(run.global_batch, run.data.seq_len, world, run.train.micro_batch)
    ds_config = resolve_ds_config(run, raw_ds_config, plan, precision)
    engines.check_precision(precision)
    topology = engines.start_distributed(ds_config, speak)
    config = engines.agree_on_kernels(config, topology, speak)
    kernels = engines.resolve_kernels(config.kernels, speak)
    with run_folder.prepared(run.folder, topology, fresh):
        chatter.path = run.folder / "deepspeed.log" if rank == 0 else Path(os.devnull)
        resolved = run_folder.resolved(run, config, precision)
        with engines.quiet(run.folder / "deepspeed.log" if rank == 0 else None):
            engine = engines.build_engine(config, run, ds_config)
        run_folder.write_configs(run.folder, resolved, ds_config, topology)
        speak(
            f"{run.name}: {dataset.tokens('train'):,} training tokens, {world} rank(s) x {threads} thread(s) on "
            f"{topology.device.type}, {precision}, {kernels} kernels, ZeRO-{zero_stage(ds_config)}, "
            f"{run.global_batch} samples per step = {plan.micro_batch} x {plan.accumulation} accumulated x "
            f"{plan.dp_size} ranks"
        )
        identity = _identity(resolved, dataset, topology, ds_config, engine)
        checkpointer, manifest = _resume(run, engine, topology, identity, speak)
        total = run.train.total_steps
        if manifest["step"] >= total and not manifest.get("evaluation_pending"):
            speak(
                f"run {run.name} is finished: {manifest['step']} of {total} steps. "
                "Raise train.steps to go on, or start over with --fresh."
            )
            return 0
        trainer = make_trainer(run, config, dataset, engine, topology, plan, checkpointer, manifest, speak)
        return _fit(trainer, manifest)


def open_data(run: RunFile) -> TokenDataset | MixtureData:
    """The dataset of the run, or all of a mixture's."""
    remote: dict[str, Any] = {"cache_dir": run.data.cache_dir, "cache_gb": run.data.cache_gb}
    if run.data.path is not None:
        return open_dataset(run.data.path, **remote)
    from packspeed.data.mixture import MixtureData

    return MixtureData([source.path for source in run.data.sources or []], **remote)


def make_run_loader(run: RunFile, dataset: TokenDataset | MixtureData) -> Loader:
    """The loader that the run file describes: a pure function of it and the dataset."""
    from packspeed.data.loader import make_loader

    arguments: dict[str, Any] = {
        "seq_len": run.data.seq_len,
        "global_batch": run.global_batch,
        "seed": run.train.seed,
        "shuffle": run.data.shuffle,
        "packing": run.data.packing,
        "document_mask": run.data.document_mask,
    }
    if isinstance(dataset, TokenDataset):
        return make_loader(dataset, **arguments)
    from packspeed.data.mixture import MixtureLoader

    stages = [(0.0, [source.weight for source in run.data.sources or []])]
    stages += [(stage.from_tokens, stage.weights) for stage in run.data.stages]
    return MixtureLoader(dataset, stages, **arguments)


def _identity(
    resolved: dict[str, Any],
    dataset: TokenDataset | MixtureData,
    topology: Topology,
    ds_config: dict[str, Any],
    engine: Any,
) -> dict[str, Any]:
    """What a checkpoint says about the run that wrote it. A checkpoint of another layout is converted on resume."""
    from packspeed.data.order import ORDER_VERSION

    return {
        "config": resolved,
        "dataset_fingerprint": dataset.fingerprint,
        "datasets": dataset.describe(),
        "order_version": ORDER_VERSION,
        "zero_stage": zero_stage(ds_config),
        "dp_size": topology.dp_size,
        "layout": {
            "dp_size": topology.dp_size,
            "zero_optimization": ds_config.get("zero_optimization") or {},
            "precision": resolved["train"]["precision"],
            "optimizers": [type(engine.optimizer).__name__, type(engine.basic_optimizer).__name__],
        },
        "packspeed": metadata.version("packspeed"),
        "versions": run_folder.versions(),
        "commit": run_folder.git_commit(),
    }


def _resume(
    run: RunFile, engine: Any, topology: Topology, identity: dict[str, Any], speak: Callable[[str], None]
) -> tuple[Checkpointer, dict[str, Any]]:
    """Load the newest whole checkpoint where there is one; returns the checkpointer and what its manifest says."""
    from packspeed.launch.checkpoint import Checkpointer, newest_whole, read_manifest, tag

    checkpointer = Checkpointer(run.folder / "checkpoints", engine, topology, run.checkpoint, identity, speak)
    newest = topology.from_rank0(newest_whole(checkpointer.folder, speak) if topology.rank == 0 else None)
    if newest is None:
        if (checkpointer.folder / tag(0)).is_dir():
            raise UserError(f"{checkpointer.folder}: the imported weights are damaged. Import them again.")
        return checkpointer, {"step": 0}
    for note in run_folder.check_same_run(newest, read_manifest(newest), identity):
        speak(note)
    manifest = checkpointer.load(newest)
    speak(f"resuming from {newest} (step {manifest['step']})")
    return checkpointer, manifest


def make_trainer(
    run: RunFile,
    config: GPTConfig,
    dataset: TokenDataset | MixtureData,
    engine: Any,
    topology: Topology,
    plan: BatchPlan,
    checkpointer: Checkpointer,
    manifest: dict[str, Any],
    speak: Callable[[str], None],
) -> Trainer:
    """What a step needs, for a run that goes on after the step that `manifest` names."""
    from packspeed.launch.engine import peak_flops
    from packspeed.launch.loop import Trainer
    from packspeed.launch.optimizers import GradientGate
    from packspeed.launch.watch import FILE, Clock, Guard, StopRequest, time_collectives

    loader = make_run_loader(run, dataset)
    windows = min(run.eval.windows, loader.val_available())
    if windows < run.eval.windows:
        speak(f"note: the validation split has {windows} windows; eval.windows asks for {run.eval.windows}")
    clock = Clock(run.folder / FILE if topology.rank == 0 else None, manifest["step"])
    if LAUNCH_ID in os.environ:
        from packspeed.launch.heartbeat import Heartbeat

        clock.beat = Heartbeat(run.folder / "logs", topology.rank, platform.node(), manifest["step"])
    if topology.device.type == "cpu":
        time_collectives(clock)
    guard = Guard(run.anomalies)
    if "guard" in manifest:
        guard.load(manifest["guard"])
    metrics = sampler = None
    if run.monitor.sample_prompts:
        from packspeed.launch.inside import Sampler

        sampler = Sampler(run, engine, topology.device)
    if topology.rank == 0:
        metrics = run_folder.Metrics(
            run.folder, engine.monitor, run.train.total_steps, run.monitor.log_every_steps, manifest["step"]
        )
        metrics.shares = clock.shares
        metrics.write_anomalies(guard.records)
    return Trainer(
        run=run,
        topology=topology,
        engine=engine,
        plan=plan,
        loader=loader,
        eval_windows=windows,
        metrics=metrics,
        checkpointer=checkpointer,
        stop=StopRequest(),
        guard=guard,
        gate=GradientGate(engine, guard.judge),
        clock=clock,
        sampler=sampler,
        flops_per_token=flops_per_token(config, run.data.seq_len),
        peak_flops=peak_flops(topology, engine),
        say=speak,
        evaluation_pending=bool(manifest.get("evaluation_pending")),
    )


def _screen(trainer: Trainer) -> contextlib.AbstractContextManager[None]:
    """The live panel where rank 0 has a terminal; the plain lines do elsewhere."""
    if trainer.metrics is None or not sys.stdout.isatty():
        return contextlib.nullcontext()
    from packspeed.launch.console import Progress, live
    from packspeed.launch.goodput import read_lives

    run, restarts = trainer.run, len(read_lives(trainer.run.folder)) - 1
    return live(trainer.metrics, Progress(run.name, run.train.total_steps, restarts))


def _fit(trainer: Trainer, manifest: dict[str, Any]) -> int:
    from packspeed.launch.loop import check_probe, fit

    folder, topology, state = trainer.run.folder, trainer.topology, "failed"
    try:
        check_probe(trainer, manifest)
        run_folder.write_status(folder, topology, "running")
        with _screen(trainer):
            stopped_by = fit(trainer, manifest["step"])
        state = "stopped" if stopped_by else "finished"
    finally:
        if trainer.metrics:
            trainer.metrics.close()
        trainer.clock.close(state)
        run_folder.write_status(folder, topology, state)
    if stopped_by:
        trainer.say(
            f"stopped by {stopped_by}; the state is saved, the same command continues it (exit code {EXIT_STOPPED})"
        )
        return EXIT_STOPPED
    trainer.say(f"finished {trainer.run.train.total_steps} steps: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
