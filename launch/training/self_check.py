"""Self check."""

from __future__ import annotations

from typing import Any

import torch

from packspeed.launch.config.errors import UserError
from packspeed.launch.training.evaluation import row_mean_losses
from packspeed.launch.training.trainer import Trainer

PROBE_ROWS = 8


@torch.no_grad()
def probe(trainer: Trainer, step: int) -> dict[str, Any]:
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


def check_probe(trainer: Trainer, manifest: dict[str, Any]) -> None:
    """Repeat the probe of the checkpoint just loaded; UserError that says what differs where its loss does not agree.

    fp32 must agree to rounding, 16 bits in the same layout to 2e-3, in another layout or precision to 2e-2.
    """
    expected = manifest.get("probe")
    if expected is None:
        return
    found = probe(trainer, manifest["step"])
    old, new = manifest["layout"], trainer.checkpointer.identity["layout"]
    tolerance = 1e-5 if {old["precision"], new["precision"]} == {"fp32"} else 2e-3 if old == new else 2e-2
    difference, same_samples = abs(found["loss"] - expected["loss"]), found["samples_hash"] == expected["samples_hash"]
    if same_samples and difference <= tolerance:
        trainer.log(f"self-check: the last step's samples have the loss of the save, {found['loss']:.6f}")
        return
    causes = [] if same_samples else ["the samples read are others (the dataset)"]
    names = (*trainer.checkpointer.identity["versions"], "commit")
    then = {**manifest["versions"], "commit": manifest.get("commit")}
    now = {**trainer.checkpointer.identity["versions"], "commit": trainer.checkpointer.identity.get("commit")}
    causes += [f"{name} was {then.get(name)}, is {now[name]}" for name in names if then.get(name) != now[name]]
    causes += [f"{key} was {old.get(key)}, is {new[key]}" for key in new if old.get(key) != new[key]]
    raise UserError(
        f"self-check: step {manifest['step']} of {trainer.run.folder} does not resume as it was saved. Loss of samples "
        f"{expected['first_sample']} and on: {expected['loss']:.8f} when saved, {found['loss']:.8f} now (more than "
        f"{tolerance:g} apart counts). What differs: {'; '.join(causes) or 'only the weights or the model code'}. "
        "Restore what differs, or start over with --fresh."
    )
