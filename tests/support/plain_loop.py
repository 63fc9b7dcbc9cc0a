"""A reference to compare runs with: a training loop in plain PyTorch, without DeepSpeed.

It uses one process and torch's own AdamW, clipping and cross entropy, in fp32, with all rows of a batch in one pass.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch.nn import functional

from packspeed.launch.checkpoint.zero_checkpoint import fp32_state_dict
from packspeed.launch.config.run_data import make_run_loader, open_data
from packspeed.launch.config.run_file import RunFile, TrainSection
from packspeed.launch.training.micro_batch import dropout_keys
from packspeed.model.gpt import GPT, init_weights, is_matrix
from support.workspace import Workspace


def cosine_lr(step: int, train: TrainSection) -> float:
    """Return the learning rate of a step (from 0) as nanoGPT's get_lr does: linear warm-up, then cosine to min_lr."""
    warmup, peak, low = train.schedule.warmup_steps, train.optimizer.lr, train.schedule.min_lr
    assert train.schedule.name == "cosine", "the reference knows the cosine schedule"
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    ratio = (step - warmup) / (train.total_steps - warmup)
    return low + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (peak - low)


class Curve(NamedTuple):
    """Losses, gradient norms and batch hashes of all steps of the reference."""

    losses: list[float]
    norms: list[float]  # of the gradient, before clipping
    hashes: list[str]  # of the batch, as data_hash in metrics.jsonl
    heads: list[list[float]]  # losses of extra heads (model/mtp.py)


def reference(run: RunFile) -> tuple[Curve, dict[str, torch.Tensor]]:
    """Train as a run file says, in plain PyTorch. Return the curve and the final weights by name."""
    dataset, train = open_data(run), run.train
    loader, optimizer = make_run_loader(run, dataset), train.optimizer
    assert optimizer.name == "adamw", "the reference knows AdamW"
    model = GPT(dataclasses.replace(run.gpt_config(dataset.vocab_size), kernels="eager"))
    init_weights(model, train.seed)
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if is_matrix(name)], "weight_decay": optimizer.weight_decay},
        {"params": [p for name, p in named if not is_matrix(name)], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps)
    curve = Curve([], [], [], [])
    for step in range(train.total_steps):
        for group in adamw.param_groups:
            group["lr"] = cosine_lr(step, train)
        batch = loader.batch(step, 0, 1)
        tokens = torch.from_numpy(batch.tokens.astype("int64"))
        keys = dropout_keys(batch.samples, train.seed, torch.device("cpu"))
        hidden = model.hidden(tokens[:, :-1], dropout_keys=keys, heads=model.config.extra_heads)
        all_logits = model.lm_head(hidden if model.config.mtp else hidden[None])
        sums = []  # of the losses for the next token, then of those for tokens further on
        for k, logits in enumerate(all_logits, start=1):
            with_target = logits[:, : tokens.size(1) - k]
            sums.append(functional.cross_entropy(with_target.flatten(0, 1), tokens[:, k:].flatten(), reduction="sum"))
        loss = sums[0] / tokens[:, 1:].numel()
        further = [part / tokens[:, 1:].numel() for part in sums[1:]]
        weight = model.config.mtp.weight / model.config.mtp.depth if model.config.mtp else 0.0
        (loss + weight * sum(further)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip or math.inf)
        adamw.step()
        adamw.zero_grad()
        balance_experts(model)
        curve.losses.append(loss.detach().item())
        heads = [part.item() / tokens[:, k:].numel() for k, part in enumerate(sums[1:], start=2)]
        curve.heads.append(heads)
        curve.norms.append(norm.item())
        curve.hashes.append(f"{batch.hash():08x}")
    return curve, {name: value.detach() for name, value in (*named, *model.named_buffers())}


def balance_experts(model: GPT) -> None:
    """Raise the router bias of experts that got fewer tokens of the batch than the mean, lower the others'."""
    for block in model.blocks:
        router = getattr(block.mlp, "router", None)
        if router is not None:
            counts = block.mlp.counts.tolist()
            mean = sum(counts) / len(counts)
            for expert, count in enumerate(counts):
                step = router.rate if count < mean else -router.rate if count > mean else 0.0
                router.bias[expert] += step
            block.mlp.counts = None


def differences(space: Workspace, name: str, curve: Curve, weights: dict[str, torch.Tensor]) -> list[float]:
    """Compare a finished run with the reference: its curve and its final weights by name.

    Return the largest difference of a loss, of a gradient norm (relative) and of a weight. Raises AssertionError if the
    two have read different batches.
    """
    mine = [line for line in space.metrics(name) if "loss" in line]
    assert [line["data_hash"] for line in mine] == curve.hashes, name
    final = fp32_state_dict(space.checkpoints(name) / f"step-{len(mine):08d}")
    return [
        max(abs(line["loss"] - loss) for line, loss in zip(mine, curve.losses, strict=True)),
        max(abs(line["grad_norm"] / norm - 1) for line, norm in zip(mine, curve.norms, strict=True)),
        max(float((final[key].detach() - value).abs().max()) for key, value in weights.items()),
    ]
