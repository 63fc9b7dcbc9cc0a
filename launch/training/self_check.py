"""The self-check of a resume: compute the loss of a few samples at each save, and compare it again after a load."""

from __future__ import annotations

from pathlib import Path

import torch

from packspeed.launch.checkpoint.identity import differences, has_same_layout
from packspeed.launch.checkpoint.manifest import Manifest, Probe, RunIdentity
from packspeed.launch.config.errors import UserError
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
    topology, first = trainer.topology, trainer.samples_before(step - 1)
    rows = min(PROBE_ROWS, trainer.samples_before(step) - first)
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
    """Compute the loss of the probe's samples again with the loaded weights, compare it with that in `manifest`, and
    log the result. A collective.

    `manifest` is that of the checkpoint that was just loaded. Raises UserError if the losses differ by more than
    compare_probes allows. Does nothing if the manifest has no probe.
    """
    if "probe" in manifest:
        repeated = probe(trainer, manifest["step"])
        trainer.log(compare_probes(trainer.run.folder, manifest, trainer.checkpointer.identity, repeated))


def compare_probes(folder: Path, saved: Manifest, identity: RunIdentity, now: Probe) -> str:
    """Compare the probe in the checkpoint's manifest `saved` with `now`, the probe that the resumed run has computed.
    Returns a line to log.

    A probe is the loss of a few samples. The two must agree within 1e-5 in fp32, within 2e-3 in 16-bit precisions with
    the same layout, and within 2e-2 in 16-bit precisions with another layout or precision. Otherwise, or if the samples
    differ, it raises UserError with a list of what else differs between then and now.
    """
    before, old, new = saved["probe"], saved["layout"], identity["layout"]
    same_layout = has_same_layout(saved, identity)
    tolerance = 1e-5 if {old["precision"], new["precision"]} == {"fp32"} else 2e-3 if same_layout else 2e-2
    same_samples = now["samples_hash"] == before["samples_hash"]
    if same_samples and abs(now["loss"] - before["loss"]) <= tolerance:
        return f"self-check passed: samples of the last step have the same loss as at the save, {now['loss']:.6f}"
    causes = [] if same_samples else ["the dataset returns other samples"]
    causes += differences(
        {**saved["versions"], "commit": saved.get("commit"), **old},
        {**identity["versions"], "commit": identity.get("commit"), **new},
    )
    raise UserError(
        f"self-check failed: step {saved['step']} of {folder} does not resume as it was saved. The loss of "
        f"{before['rows']} samples, from sample {before['first_sample']} on, was {before['loss']:.8f} at the save and "
        f"is {now['loss']:.8f} now (allowed difference {tolerance:g}). Possible causes: "
        f"{'; '.join(causes) or 'no setting has changed, so the weights or the model code have'}. "
        "Restore what has changed, or start over with --fresh."
    )
