"""Coordinate check of muP: train the model of a run file for a few steps at several widths, and compare activations.

For each width, the model has the same depth and the same width of heads, and its MLP grows with it. It is trained in
this process, in fp32, at the peak learning rate, on the first samples of the run. Then the mean |activation| and the
mean |change| of an activation since the start are measured on further samples: for the embedding, the two branches of
each block, and the logits. With muP neither depends on the width: value ~ width^exponent with an exponent near 0.
Without it, changes grow with the width. Method: Yang et al. 2022 (https://arxiv.org/abs/2203.03466), appendix D.1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.config.run_data import make_run_loader, open_data
from packspeed.launch.config.run_file import RunFile, ScheduleSection
from packspeed.launch.engine.distributed import Topology
from packspeed.launch.engine.groups import optimizer_groups, set_rates
from packspeed.launch.training.micro_batch import MicroBatch, micro_batches
from packspeed.model.config import GPTConfig
from packspeed.model.gpt import GPT, init_weights
from packspeed.model.mup import scales

Batches = Sequence[MicroBatch]
# Where micro_batches puts its tensors: one process, which has complete rows.
ALONE = Topology(rank=0, local_rank=0, local_size=1, device=torch.device("cpu"))


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """The activations of one layer. `size` and `change` have one value for each width."""

    layer: str
    size: tuple[float, ...]  # mean |activation| after the steps
    change: tuple[float, ...]  # mean |activation after the steps - activation before them|
    size_exponent: float
    change_exponent: float
    flat: bool  # sizes do not grow, and changes neither grow nor shrink


@dataclasses.dataclass(frozen=True)
class WidthCheck:
    """The result of a coordinate check, which tests whether activations depend on the model's width."""

    widths: tuple[int, ...]
    layers: list[LayerResult]

    @property
    def flat(self) -> bool:
        """Return whether in every layer activations do not grow with the width, and changes do not depend on it."""
        return all(layer.flat for layer in self.layers)


def mup_check(
    run_file: Path,
    overrides: Sequence[str],
    widths: Sequence[int] | None,
    steps: int,
    rows: int,
    seeds: int,
    tolerance: float,
) -> WidthCheck:
    """Train the model of a run file at each width, and compare its activations.

    widths: values of d_model; None: 1, 2, 4 and 8 times the base width, or without model.mup 1, 2, 4 and 8 times a
    quarter of d_model. rows: samples per step. seeds: number of seeds for the initial weights, over which results are
    averaged. tolerance: a layer is flat if activations ~ width^e with e <= tolerance, and their changes ~ width^e with
    |e| <= tolerance. Raises ConfigError if the run file cannot be checked.
    """
    run = load_run_file(run_file, overrides)
    if run.train.optimizer.name != "adamw":
        raise ConfigError(f"train.optimizer.name: {run.train.optimizer.name}: mup-check trains with adamw only.")
    dataset = open_data(run)
    config = run.gpt_config(dataset.vocab_size)
    if config.n_expert is not None:
        raise ConfigError("model.n_expert: mup-check cannot check models with experts. Remove the key.")
    base = config.mup.base_width if config.mup else max(config.d_model // 4, config.head_width)
    configs = [widened(config, width) for width in widths or [base * factor for factor in (1, 2, 4, 8)]]
    if len({model.d_model for model in configs}) < 2:
        raise ConfigError("--widths: give at least two different widths.")
    loader = make_run_loader(run, dataset)
    batches = [next(micro_batches(loader.read(n * rows, rows), rows, ALONE)) for n in range(steps + 1)]
    measured = [_mean_over_seeds(model, run, batches, seeds) for model in configs]
    return WidthCheck(
        tuple(model.d_model for model in configs),
        [_compare(layer, [m[layer] for m in measured], configs, tolerance) for layer in measured[0]],
    )


def widened(config: GPTConfig, width: int) -> GPTConfig:
    """Return the config with d_model = width. The width of a head, the query heads per key-value head and d_ff /
    d_model stay the same; dropout, recomputation and extra heads are off.

    Raises ConfigError if `width` is not a multiple of the width of a head * query heads per key-value head, or if d_ff
    would not be a whole number.
    """
    per_group = config.n_head // config.kv_heads
    heads, rest = divmod(width * config.n_head, config.d_model)
    if rest or heads % per_group or width < 1 or config.ff_width * width % config.d_model:
        unit = config.d_model // config.n_head * per_group
        raise ConfigError(f"width {width}: give a multiple of {unit} channels, because heads keep their width.")
    return dataclasses.replace(
        config, d_model=width, n_head=heads, n_kv_head=heads // per_group, head_dim=config.head_width,
        d_ff=config.ff_width * width // config.d_model, dropout=0.0, activation_checkpointing="none",
        activation_offload=False, mtp=None,
    )  # fmt: skip


def _mean_over_seeds(config: GPTConfig, run: RunFile, batches: Batches, seeds: int) -> dict[str, tuple[float, float]]:
    """Return {layer: (mean |activation|, mean |change|)}, averaged over the seeds train.seed, train.seed + 1, ..."""
    found = [_measure(config, run, batches, run.train.seed + n) for n in range(seeds)]
    return {
        layer: (float(np.mean([one[layer][0] for one in found])), float(np.mean([one[layer][1] for one in found])))
        for layer in found[0]
    }


def _measure(config: GPTConfig, run: RunFile, batches: Batches, seed: int) -> dict[str, tuple[float, float]]:
    """Return {layer: (mean |activation|, mean |change| since the start)} on the last batch.

    Before that, the model is trained for one step on each of the other batches.
    """
    model = GPT(config)
    init_weights(model, seed)
    train = run.train.model_copy(update={"schedule": ScheduleSection(name="constant")})
    options = train.optimizer
    optimizer = torch.optim.AdamW(optimizer_groups(model, options), lr=options.lr, betas=options.betas, eps=options.eps)
    before = _activations(model, batches[-1])
    for step, batch in enumerate(batches[:-1]):
        set_rates(optimizer.param_groups, step, train, scales(config))
        optimizer.zero_grad()
        model(batch.inputs, batch.labels, **batch.arguments).backward()
        if train.grad_clip:
            nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        optimizer.step()
    after = _activations(model, batches[-1])
    return {name: (_mean(after[name]), _mean(after[name] - before[name])) for name in after}


def _mean(x: Tensor) -> float:
    return float(x.abs().mean())


def _activations(model: GPT, batch: MicroBatch) -> dict[str, Tensor]:
    """Return {layer: its output for a batch}: embedding, attention and MLP of each block, logits."""
    found: dict[str, Tensor] = {}
    modules: dict[str, nn.Module] = {"embedding": model.embed}
    for n, block in enumerate(model.blocks):
        modules |= {f"block {n} attention": cast(nn.Module, block.attn), f"block {n} mlp": cast(nn.Module, block.mlp)}

    def keeps(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: Any, output: Tensor | tuple[Tensor, Tensor | None]) -> None:
            branch = output[0] if isinstance(output, tuple) else output  # attention returns its values, too
            found[name] = branch.detach().clone()

        return keep

    hooks = [module.register_forward_hook(keeps(name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            found["logits"] = model(batch.inputs, **batch.arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: found[name] for name in (*modules, "logits")}


def _compare(
    layer: str, values: Sequence[tuple[float, float]], configs: Sequence[GPTConfig], tolerance: float
) -> LayerResult:
    """Return the result of a layer, given (mean |activation|, mean |change|) at each width."""
    widths = [config.d_model for config in configs]
    sizes, changes = zip(*values, strict=True)
    of_sizes, of_changes = exponent(widths, sizes), exponent(widths, changes)
    flat = of_sizes <= tolerance and abs(of_changes) <= tolerance  # NaN is not flat
    return LayerResult(layer, sizes, changes, of_sizes, of_changes, flat)


def exponent(widths: Sequence[int], values: Sequence[float]) -> float:
    """Return the e of the best fit values ~ width^e; NaN if a value is not finite or not above 0."""
    array = np.asarray(values, dtype=np.float64)
    if not (np.isfinite(array) & (array > 0)).all():
        return float("nan")
    return float(np.polyfit(np.log(widths), np.log(array), 1)[0])
