"""Start a training process: everything between reading the files and the training loop, and the exit code.

connect            precision, batch and DeepSpeed configuration; the process group
start_training     checkpoint to continue from -> engine -> load -> checks -> files of the run
train_to_end       the loop, and status.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path

from packspeed.data.dataset import TokenDataset
from packspeed.data.mixture import MixtureData
from packspeed.launch.checkpoint.checkpointer import Checkpointer
from packspeed.launch.checkpoint.identity import name_optimizers, run_identity
from packspeed.launch.checkpoint.resume import find_checkpoint, resume_newest
from packspeed.launch.config.batch import BatchPlan, plan_stages
from packspeed.launch.config.deepspeed_json import resolve_ds_config, zero_stage
from packspeed.launch.config.errors import EXIT_STOPPED
from packspeed.launch.config.fp8 import engine_precision
from packspeed.launch.config.json_types import DsConfig
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.engine.build import (
    agree_on_kernels,
    build_engine,
    check_ds_config,
    check_precision,
    resolve_kernels,
    resolve_precision,
)
from packspeed.launch.engine.distributed import Topology, launcher_environment, no_beat, start_distributed
from packspeed.launch.engine.hardware import compute_environment, keep_memory, limit_threads
from packspeed.launch.engine.protocol import Engine
from packspeed.launch.engine.quiet import DeepSpeedLogFilter, quiet
from packspeed.launch.observe.console import RunProgress, live
from packspeed.launch.observe.goodput import read_lives
from packspeed.launch.run_folder import folder as run_folder
from packspeed.launch.run_folder.heartbeat import Heartbeat
from packspeed.launch.training.loop import fit
from packspeed.launch.training.self_check import repeat_probe
from packspeed.launch.training.setup import make_trainer, open_run_files
from packspeed.launch.training.trainer import Trainer
from packspeed.model.config import GPTConfig


def start_training(
    run: RunFile,
    raw_ds_config: DsConfig,
    dataset: TokenDataset | MixtureData,
    fresh: bool,
    log_filter: DeepSpeedLogFilter,
    heartbeat: Heartbeat | None = None,
) -> int:
    """Train the run from its newest complete checkpoint until it ends or is stopped.

    Returns the exit code of the process. A collective: every rank must call it. If `fresh` is True, an existing run
    folder is moved aside and training starts at step 0. `log_filter` writes DeepSpeed's log lines to deepspeed.log in
    the run folder. `heartbeat` tells a supervisor, if there is one, what this rank is doing. Raises UserError if the
    run cannot start or has failed.
    """
    ranks = connect(run, raw_ds_config, dataset, heartbeat or no_beat)
    topology, log = ranks.topology, ranks.log
    mirror = None
    if run.mirror:  # imported here, because it loads fsspec
        from packspeed.launch.checkpoint.mirror import Mirror

        mirror = Mirror(run.mirror, run.folder / "checkpoints", run.checkpoint.keep, topology, log)

    with run_folder.locked_run_folder(run.folder, topology, fresh, run.mirror):
        # Find the checkpoint to continue from. If the run cannot continue from it, the error comes before any file of
        # the run has changed.
        resolved = run_folder.resolved_config(run, ranks.config, ranks.precision)
        identity = run_identity(resolved, dataset, topology, ranks.ds_config, compute_environment(topology))
        found = find_checkpoint(run.folder / "checkpoints", topology, identity, log, mirror)

        # Build the engine. If there is a checkpoint, its weights will replace the initial ones, so none are drawn.
        engine = build_quietly(run, ranks, log_filter, draw=found.checkpoint is None)
        log(f"{run.name}: {dataset.tokens('train'):,} training tokens, {ranks.describe(run)}")

        # Load weights, optimizer and random generators from the checkpoint.
        identity = name_optimizers(identity, engine)
        checkpointer = Checkpointer(run.folder / "checkpoints", engine, topology, run.checkpoint, identity, log, mirror)
        manifest = resume_newest(checkpointer, found)
        total_steps = run.train.total_steps
        if manifest["step"] >= total_steps and not manifest.get("evaluation_pending"):
            checkpointer.finish_mirror(stopped=False)
            log(
                f"run {run.name} is finished: {manifest['step']} of {total_steps} steps. "
                "Raise train.steps to continue it, or start over with --fresh."
            )
            return 0

        trainer = make_trainer(
            run, ranks.config, dataset, engine, topology, ranks.plans, checkpointer, manifest, log, heartbeat
        )
        repeat_probe(trainer, manifest)  # check that the checkpoint still gives the loss with which it was saved

        # All checks have passed. From here on the files of the run change.
        run_folder.write_configs(run.folder, resolved, ranks.ds_config, topology)
        if topology.rank == 0:
            run_folder.record_changes(run.folder, found.changes)
        open_run_files(trainer, manifest)
        if mirror and checkpointer.newest is not None:
            mirror.catch_up(checkpointer.newest)
        return train_to_end(trainer, manifest["step"])


@dataclasses.dataclass(frozen=True)
class ConnectedRanks:
    """The ranks of a run, and what they have decided together before the model is built."""

    topology: Topology
    plans: dict[int, BatchPlan]  # {samples of a step: how they are divided}, ascending
    config: GPTConfig
    ds_config: DsConfig  # the final DeepSpeed configuration
    precision: str  # train.precision, with "auto" resolved
    kernels: str  # model.kernels, with "auto" resolved
    threads: int  # CPU threads per rank
    log: Callable[[str], None]  # prints a line on rank 0, nothing on the others

    def describe(self, run: RunFile) -> str:
        """Return ranks, precision, kernels and batch as text."""
        return (
            f"{self.topology.world} rank(s) x {self.threads} thread(s) on {self.topology.device.type}, "
            f"{self.precision}, {self.kernels} kernels, ZeRO-{zero_stage(self.ds_config)}, "
            + ", then ".join(
                f"{samples} samples per step = {plan.micro_batch} x {plan.accumulation} accumulated x {plan.layout}"
                for samples, plan in self.plans.items()
            )
        )


def connect(
    run: RunFile, raw_ds_config: DsConfig, dataset: TokenDataset | MixtureData, beat: Callable[..., None]
) -> ConnectedRanks:
    """Decide precision, batch and DeepSpeed configuration, and join the process group. A collective.

    All ranks use the same kernels, even if hosts support different ones. `beat` is called with the name of each phase,
    such as "connecting". Raises ConfigError if this machine cannot train the run.
    """
    rank, world, _, local_size = launcher_environment()
    log: Callable[[str], None] = run_folder.say if rank == 0 else lambda line: None
    threads = limit_threads(local_size)
    precision = resolve_precision(run.train.precision)
    plans = plan_stages(run, world)
    plan = plans[run.global_batch]
    config = run.gpt_config(dataset.vocab_size)
    keep_memory(sizes_vary=config.n_expert is not None, note=log)
    ds_config = resolve_ds_config(run, raw_ds_config, plan, engine_precision(precision), config)
    check_precision(precision)
    check_ds_config(ds_config, run.deepspeed)
    # Join the process group and compile DeepSpeed's ops.
    beat("connecting")
    topology = start_distributed(ds_config, log, deterministic=run.train.deterministic, beat=beat, layout=plan.layout)
    config = agree_on_kernels(config, topology, log)
    kernels = resolve_kernels(config.kernels, log)
    return ConnectedRanks(topology, plans, config, ds_config, precision, kernels, threads, log)


def build_quietly(run: RunFile, ranks: ConnectedRanks, log_filter: DeepSpeedLogFilter, draw: bool) -> Engine:
    """Build the engine, with DeepSpeed's output in deepspeed.log of the run folder. A collective.

    If `draw` is False, no initial weights are drawn, and the caller must load a checkpoint.
    """
    ranks.topology.beat("building")
    file = run.folder / "deepspeed.log" if ranks.topology.rank == 0 else None
    log_filter.path = file or Path(os.devnull)
    with quiet(file):
        return build_engine(ranks.config, run, ranks.ds_config, draw=draw, topology=ranks.topology)


def train_to_end(trainer: Trainer, step: int) -> int:
    """Train the steps after `step`. At the end, write the state "finished", "stopped" or "failed" to status.json, even
    if training raises.

    A collective. Returns the exit code: 0 if the run has finished, EXIT_STOPPED if a signal has stopped it.
    """
    folder, topology, state = trainer.run.folder, trainer.topology, "failed"
    try:
        run_folder.write_status(folder, topology, "running")
        with live_panel(trainer):
            stopped_by = fit(trainer, step)
        state = "stopped" if stopped_by else "finished"
    finally:
        if trainer.metrics:
            trainer.metrics.close()
        trainer.timer.close(state)
        run_folder.write_status(folder, topology, state)
    if stopped_by:
        trainer.log(
            f"stopped by {stopped_by}. The state is saved; to continue, repeat the command (exit code {EXIT_STOPPED})"
        )
        return EXIT_STOPPED
    trainer.log(f"finished {trainer.run.train.total_steps} steps: {folder}")
    return 0


def live_panel(trainer: Trainer) -> contextlib.AbstractContextManager[None]:
    """Return a context that shows a panel with the run's progress below the output of training.

    On ranks other than 0, and if the output is not a terminal, the context does nothing.
    """
    if trainer.metrics is None or not sys.stdout.isatty():
        return contextlib.nullcontext()
    run, restarts = trainer.run, len(read_lives(trainer.run.folder)) - 1
    return live(trainer.metrics, RunProgress(run.name, run.train.total_steps, run.train.batches, restarts))
