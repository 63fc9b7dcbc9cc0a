"""Build the line of metrics.jsonl for one training step."""

from __future__ import annotations

from packspeed.launch.engine.hardware import memory_gib
from packspeed.launch.run_folder.formats import StepLine
from packspeed.launch.training.experts import load
from packspeed.launch.training.metrics import finite_or_none
from packspeed.launch.training.trainer import StepResult, Trainer


def metrics_line(
    trainer: Trainer, step: int, result: StepResult, lr: float, step_time_s: float, data_wait_s: float
) -> StepLine:
    """Return the line of metrics.jsonl for the training step `step` (run_folder/formats.py describes the keys).

    `step_time_s` is the wall time of the step, and `data_wait_s` the part of it that was spent waiting for data.
    """
    seq_len, samples = trainer.run.data.seq_len, trainer.samples_before(step)
    tokens_of_step = (samples - trainer.samples_before(step - 1)) * seq_len
    tokens_per_s = tokens_of_step / step_time_s
    line: StepLine = {
        "step": step,
        "tokens": trainer.samples_trained(step) * seq_len,
        "samples": samples,
        "data_hash": result.data_hash,
        "loss": finite_or_none(result.loss),
        "lr": lr,
        "grad_norm": finite_or_none(result.norm),
        "step_time_s": round(step_time_s, 6),
        "tokens_per_s": round(tokens_per_s, 1),
        "mfu": finite_or_none(tokens_per_s * trainer.flops_per_token / trainer.peak_flops, 5),
        "data_wait_s": round(data_wait_s, 6),
        "memory_gib": memory_gib(trainer.topology.device.type),
    }
    if trainer.run.train.batch_warmup:
        line["batch_tokens"] = tokens_of_step
    if result.not_taken:
        line["skipped"] = result.not_taken
    report = getattr(trainer.loader, "report", None)  # only a mixture's loader has one
    if report is not None:
        line["epochs"] = [row["epochs"] for row in report(line["samples"])]
    if result.head_losses:
        line["mtp_losses"] = [finite_or_none(loss) for loss in result.head_losses]
    if result.expert_counts:
        line["expert_load"], line["dead_experts"] = load(trainer.engine.module, result.expert_counts)
    return line
