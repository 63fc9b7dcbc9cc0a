"""The self-check of a resume: the loss of a few known samples, computed at each save and again after each load."""

from __future__ import annotations

import torch

from packspeed.launch.checkpoint import resume
from packspeed.launch.checkpoint.manifest import Manifest, Probe
from packspeed.launch.training.evaluation import row_mean_losses
from packspeed.launch.training.trainer import Trainer

PROBE_ROWS = 8


@torch.no_grad()
def probe(trainer: Trainer, step: int) -> Probe:
    """Loss of the first rows of the batch of `step` under the weights as they are, without dropout or an update.

    A checkpoint keeps it, and a resume repeats it: other data, code or weights cannot go unnoticed.
    """
    topology, rows = trainer.topology, min(PROBE_ROWS, trainer.run.global_batch)
    first = trainer.batches_before(step - 1) * trainer.run.global_batch
    batch = trainer.loader.read(first, rows)
    single = list(batch.cut(1))
    losses = torch.zeros(rows, dtype=torch.float64)
    trainer.engine.eval()
    for start in range(0, rows, topology.dp_size):
        mine = start + topology.dp_rank
        value = row_mean_losses(trainer, single[min(mine, rows - 1)], 1)
        if mine < rows:
            losses[mine] = value[0]
    trainer.engine.train()
    loss = float(topology.sum(losses.to(topology.device)).mean())
    return {"first_sample": first, "rows": rows, "samples_hash": f"{batch.hash():08x}", "loss": loss}


def repeat_probe(trainer: Trainer, manifest: Manifest) -> None:
    """Repeat the probe of the checkpoint just loaded. UserError if it does not agree (checkpoint/resume.py)."""
    if "probe" in manifest:
        repeated = probe(trainer, manifest["step"])
        trainer.log(resume.compare_probes(trainer.run.folder, manifest, trainer.checkpointer.identity, repeated))
