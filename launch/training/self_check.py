"""The self-check of a resume: compute the loss of a few samples at each save, and compare it again after a load."""

from __future__ import annotations

import torch

from packspeed.launch.checkpoint import resume
from packspeed.launch.checkpoint.manifest import Manifest, Probe
from packspeed.launch.training.evaluation import row_mean_losses
from packspeed.launch.training.trainer import Trainer

PROBE_ROWS = 8


@torch.no_grad()
def probe(trainer: Trainer, step: int) -> Probe:
    """Return the mean loss of the first 8 (PROBE_ROWS) samples of the batch of `step`, with the current weights and
    without dropout.

    A collective: every rank must call it. Checkpoints contain the result. A resumed run repeats it, so changed data,
    code or weights are detected. Nothing is trained.
    """
    topology, rows = trainer.topology, min(PROBE_ROWS, trainer.run.global_batch)
    first = trainer.batches_before(step - 1) * trainer.run.global_batch
    batch = trainer.loader.read(first, rows)
    single = list(batch.cut(1))
    losses = torch.zeros(rows, dtype=torch.float64)
    trainer.engine.eval()
    # Every rank runs equally many forward passes, because ZeRO-3 gathers weights in each. A rank without a row in the
    # last round computes the last row again, and its result is not counted.
    for start in range(0, rows, topology.rows_size):
        mine = start + topology.rows_rank
        value = row_mean_losses(trainer, single[min(mine, rows - 1)], 1)
        if mine < rows:
            losses[mine] = value[0]
    trainer.engine.train()
    loss = float(topology.sum_of_parts(losses.to(topology.device)).mean())
    return {"first_sample": first, "rows": rows, "samples_hash": f"{batch.hash():08x}", "loss": loss}


def repeat_probe(trainer: Trainer, manifest: Manifest) -> None:
    """Compute the probe again (see `probe`), compare it with that in `manifest`, the manifest of the checkpoint that
    was just loaded, and log the result. A collective.

    Raises UserError if the two probes differ (checkpoint/resume.py says by how much they may). Does nothing if the
    manifest has no probe.
    """
    if "probe" in manifest:
        repeated = probe(trainer, manifest["step"])
        trainer.log(resume.compare_probes(trainer.run.folder, manifest, trainer.checkpointer.identity, repeated))
