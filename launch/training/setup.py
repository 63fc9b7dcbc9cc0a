"""Build the Trainer of a run from the run file, the engine, and the checkpoint from which the run continues."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from packspeed.data.dataset import TokenDataset
from packspeed.data.errors import PackspeedError
from packspeed.data.loader import Loader
from packspeed.data.mixture import MixtureData
from packspeed.launch.checkpoint.checkpointer import Checkpointer
from packspeed.launch.checkpoint.manifest import Manifest
from packspeed.launch.config.batch import BatchPlan
from packspeed.launch.config.run_data import make_run_loader
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.engine.distributed import Topology
from packspeed.launch.engine.experts import expert_norm_group
from packspeed.launch.engine.hardware import peak_flops
from packspeed.launch.engine.norms import tensor_group
from packspeed.launch.engine.patches.collectives import time_collectives
from packspeed.launch.engine.patches.gradient_norm import GradientNormHook
from packspeed.launch.engine.protocol import Engine
from packspeed.launch.run_folder.heartbeat import Heartbeat
from packspeed.launch.run_folder.phase_timer import FILE, PhaseTimer
from packspeed.launch.training.agreement import judge_by
from packspeed.launch.training.anomaly import AnomalyDetector
from packspeed.launch.training.metrics import Metrics
from packspeed.launch.training.plan_check import plan_check
from packspeed.launch.training.signals import StopSignal
from packspeed.launch.training.text_samples import TextSampler
from packspeed.launch.training.trainer import Trainer
from packspeed.model.config import GPTConfig, flops_per_token


def make_trainer(
    run: RunFile,
    config: GPTConfig,
    dataset: TokenDataset | MixtureData,
    engine: Engine,
    topology: Topology,
    plans: Mapping[int, BatchPlan],
    checkpointer: Checkpointer,
    manifest: Manifest,
    log: Callable[[str], None],
    heartbeat: Heartbeat | None = None,
) -> Trainer:
    """Return the Trainer of a run that continues after manifest["step"], where {"step": 0} means a new run.

    A collective: every rank must call it. It changes no file of the run. The caller must then call open_run_files,
    which changes some; on a resume, it must do so only after the self-check has passed.
    """
    step = manifest["step"]
    loader = make_loader_once(run, dataset, topology)
    windows = min(run.eval.windows, loader.val_available())
    if windows < run.eval.windows:
        log(
            f"note: the validation split has only {windows} windows, and each evaluation uses all of them "
            f"(eval.windows = {run.eval.windows})"
        )

    timer = PhaseTimer(None, step)
    if heartbeat:
        heartbeat.step, timer.listener = step, heartbeat
    if topology.device.type == "cpu":
        time_collectives(timer)

    # ZeRO's own groups count each part of the experts once.
    without_zero = expert_norm_group(topology) if engine.zero_optimization_stage() == 0 else None
    detector = AnomalyDetector(run.anomalies)
    if "guard" in manifest:
        detector.load(manifest["guard"])

    return Trainer(
        run=run,
        topology=topology,
        engine=engine,
        plans=plans,
        loader=loader,
        eval_windows=windows,
        metrics=None,
        checkpointer=checkpointer,
        stop=StopSignal(),
        detector=detector,
        norm_hook=GradientNormHook(engine, judge_by(detector), without_zero or tensor_group(topology, engine.module)),
        timer=timer,
        extra_heads=config.extra_heads,
        flops_per_token=flops_per_token(config, run.data.seq_len),
        peak_flops=peak_flops(topology, engine),
        log=log,
        text_sampler=TextSampler(run, config, engine, topology.device) if run.monitor.sample_prompts else None,
        evaluation_pending=bool(manifest.get("evaluation_pending")),
    )


def make_loader_once(run: RunFile, dataset: TokenDataset | MixtureData, topology: Topology) -> Loader:
    """Make the run's loader, on rank 0 first. If that fails on rank 0, all ranks raise its error. A collective.

    With packing, rank 0 computes where the windows of documents begin and stores it beside the dataset (PackedLoader),
    so the other ranks read a file of some kilobytes.
    """
    loader: Loader | None = None
    error: PackspeedError | None = None
    if topology.rank == 0:
        try:
            loader = make_run_loader(run, dataset)
        except PackspeedError as own_error:
            error = own_error
    if (error := topology.from_rank0(error)) is not None:
        raise error
    return loader or make_run_loader(run, dataset)


def open_run_files(trainer: Trainer, manifest: Manifest) -> None:
    """Open metrics.jsonl, TensorBoard's event file and goodput.jsonl on rank 0; do nothing on the other ranks.

    If metrics.jsonl has lines after manifest["step"], they are moved to metrics.discarded.jsonl.
    """
    if trainer.topology.rank == 0:
        trainer.timer.open(trainer.run.folder / FILE)
        trainer.metrics = Metrics(trainer.run, trainer.engine.monitor, manifest["step"], manifest.get("metrics_bytes"))
        trainer.metrics.shares = trainer.timer.shares
        topology = trainer.topology
        trainer.metrics.plan_check = plan_check(
            trainer.run, topology.world, lambda: trainer.timer.seconds, topology.device.type, trainer.log
        )
        trainer.metrics.write_anomalies(trainer.detector.records)
