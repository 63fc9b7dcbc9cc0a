"""The train entry: `deepspeed launch/train.py --config launch/configs/quickstart.yaml [--set key.path=value ...]`.

The same command again continues the run from its newest whole checkpoint; `--fresh` moves the old folder aside.
Exit codes: 0 finished, 1 failed, 2 wrong usage or config, 75 saved and stopped on a signal (start it again).
Both files are checked before torch is imported, so a typo answers at once and no process group is made.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from packspeed.data.dataset import TokenDataset, open_dataset
from packspeed.data.errors import DataError
from packspeed.launch import run_folder
from packspeed.launch.config import BatchPlan, RunFile, UserError, load_run_file, solve_batch
from packspeed.launch.ds_config import load_ds_config, resolve_ds_config, zero_stage
from packspeed.model.config import GPTConfig, flops_per_token

if TYPE_CHECKING:
    from packspeed.data.loader import Loader
    from packspeed.data.mixture import MixtureData
    from packspeed.launch.checkpoint import Checkpointer
    from packspeed.launch.engine import Topology


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
        return _train(run, load_ds_config(run.deepspeed), args.fresh)
    except (UserError, DataError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(2)  # the launcher kills everybody at the first exit: let rank 0 speak
        return error.exit_code


def _train(run: RunFile, raw_ds_config: dict[str, Any], fresh: bool) -> int:
    dataset = open_data(run)
    config = run.gpt_config(dataset.vocab_size)
    # Only now the slow imports: everything above answers in a fraction of a second.
    logging.getLogger("DeepSpeed").setLevel(os.environ.get("PACKSPEED_DEEPSPEED_LOG", "WARNING"))
    from packspeed.launch import engine as engines

    rank, world, local_rank, local_size = engines.launcher_environment()
    speak: Callable[[str], None] = run_folder.say if rank == 0 else lambda line: None
    threads = engines.limit_threads(local_size)
    precision = engines.resolve_precision(run.train.precision)
    plan = solve_batch(run.global_batch, run.data.seq_len, world, run.train.micro_batch)
    ds_config = resolve_ds_config(run, raw_ds_config, plan, precision)
    if local_rank == 0:
        engines.build_ops(engines.needed_ops(ds_config, engines.device_type()), speak)
    topology = engines.start_distributed()
    run_folder.prepare(run.folder, topology, fresh)
    resolved = run_folder.resolved(run, config, precision)
    with engines.quiet(run.folder / "deepspeed.log" if rank == 0 else None):
        engine = engines.build_engine(config, run, ds_config)
    run_folder.write_configs(run.folder, resolved, ds_config, topology)
    speak(
        f"{run.name}: {dataset.tokens('train'):,} training tokens, {topology.world} rank(s) x {threads} thread(s) on "
        f"{topology.device.type}, {precision}, ZeRO-{zero_stage(ds_config)}, {run.global_batch} samples per step = "
        f"{plan.micro_batch} x {plan.accumulation} accumulated x {plan.dp_size} ranks"
    )
    identity = _identity(resolved, dataset, topology, ds_config)
    checkpointer, start_step = _resume(run, engine, topology, identity, speak)
    if start_step >= run.train.total_steps:
        speak(
            f"run {run.name} is finished: {start_step} of {run.train.total_steps} steps. "
            "Raise train.steps to go on, or start over with --fresh."
        )
        return 0
    return _fit(run, config, dataset, engine, topology, plan, checkpointer, start_step, speak)


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
    resolved: dict[str, Any], dataset: TokenDataset | MixtureData, topology: Topology, ds_config: dict[str, Any]
) -> dict[str, Any]:
    """What a checkpoint says about the run that wrote it."""
    from packspeed.data.order import ORDER_VERSION

    return {
        "config": resolved,
        "dataset_fingerprint": dataset.fingerprint,
        "datasets": dataset.describe(),
        "order_version": ORDER_VERSION,
        "zero_stage": zero_stage(ds_config),
        "dp_size": topology.dp_size,
        "packspeed": metadata.version("packspeed"),
    }


def _resume(
    run: RunFile, engine: Any, topology: Topology, identity: dict[str, Any], speak: Callable[[str], None]
) -> tuple[Checkpointer, int]:
    """Load the newest whole checkpoint where there is one; returns the checkpointer and the step to go on from."""
    from packspeed.launch.checkpoint import Checkpointer, newest_whole, read_manifest

    checkpointer = Checkpointer(run.folder / "checkpoints", engine, topology, run.checkpoint, identity, speak)
    newest = topology.from_rank0(newest_whole(checkpointer.folder, speak) if topology.rank == 0 else None)
    if newest is None:
        return checkpointer, 0
    for note in run_folder.check_same_run(newest, read_manifest(newest), identity):
        speak(note)
    step = checkpointer.load(newest)
    speak(f"resuming from {newest} (step {step})")
    return checkpointer, step


def _fit(
    run: RunFile,
    config: GPTConfig,
    dataset: TokenDataset | MixtureData,
    engine: Any,
    topology: Topology,
    plan: BatchPlan,
    checkpointer: Checkpointer,
    start_step: int,
    speak: Callable[[str], None],
) -> int:
    from packspeed.launch.engine import peak_flops
    from packspeed.launch.loop import EXIT_STOPPED, StopRequest, Trainer, fit

    loader = make_run_loader(run, dataset)
    windows = min(run.eval.windows, loader.val_available())
    if windows < run.eval.windows:
        speak(f"note: the validation split has {windows} windows; eval.windows asks for {run.eval.windows}")
    metrics = None
    if topology.rank == 0:
        metrics = run_folder.Metrics(
            run.folder, engine.monitor, run.train.total_steps, run.monitor.log_every_steps, start_step
        )
    trainer = Trainer(
        run=run,
        topology=topology,
        engine=engine,
        plan=plan,
        loader=loader,
        eval_windows=windows,
        metrics=metrics,
        save=checkpointer.save,
        stop=StopRequest(),
        flops_per_token=flops_per_token(config, run.data.seq_len),
        peak_flops=peak_flops(topology, engine),
    )
    run_folder.write_status(run.folder, topology, "running")
    stopped_by = fit(trainer, start_step)
    if metrics:
        metrics.close()
    run_folder.write_status(run.folder, topology, "stopped" if stopped_by else "finished")
    if stopped_by:
        speak(f"stopped by {stopped_by}; the state is saved, the same command continues it (exit code {EXIT_STOPPED})")
        return EXIT_STOPPED
    speak(f"finished {run.train.total_steps} steps: {run.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
