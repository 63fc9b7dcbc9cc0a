"""`packspeed train`: check the run file and the DeepSpeed JSON, then start training on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from packspeed.launch.checkpoint.branch import branch
from packspeed.launch.cluster.local_launcher import default_ranks, launcher_command, run_launcher
from packspeed.launch.commands.options import Fresh, LocalRanks, Overrides, RunFileArgument
from packspeed.launch.config.batch import plan_batch
from packspeed.launch.config.deepspeed_json import load_ds_config
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.config.unattended import continue_without_reader


def train(
    run_file: RunFileArgument,
    overrides: Overrides = None,
    fresh: Fresh = False,
    ranks: LocalRanks = None,
    decay_from: Annotated[
        int | None,
        typer.Option(
            metavar="STEP",
            help="Branch off the run's checkpoint of this step: a new run NAME-decay-STEP, whose learning rate decays. "
            "The run itself can continue.",
        ),
    ] = None,
    decay_steps: Annotated[
        int | None,
        typer.Option(min=1, help="With --decay-from STEP: steps of the decay. Default: a quarter of STEP."),
    ] = None,
) -> None:
    """Train on this machine: check the configuration, then run deepspeed launch/train.py.

    If the run was stopped or has crashed, the same command resumes it.
    """
    continue_without_reader()
    sets = overrides or []
    run = load_run_file(run_file, sets)
    if decay_from is not None:
        sets = [*sets, *branch(run, decay_from, decay_steps, fresh)]
        run, fresh = load_run_file(run_file, sets), False
    elif decay_steps is not None:
        raise ConfigError("--decay-steps: give --decay-from STEP too.")
    load_ds_config(run.deepspeed)
    count = ranks if ranks is not None else default_ranks(run)
    if count < 1:
        raise ConfigError(f"--ranks {count}: give at least 1.")
    # Check that ranks and batch can be divided, before any rank starts. Each rank divides it again later.
    plan_batch(run, count)
    arguments = ["--config", str(run_file), *(f"--set={o}" for o in sets), *(["--fresh"] if fresh else [])]
    raise typer.Exit(run_launcher(launcher_command(count, arguments)))
