"""Parameter groups of the optimizer: which parameters share a learning rate, and the rates of each step.

    groups = optimizer_groups(model, run.train.optimizer)
    set_rates(optimizer.param_groups, step, run.train, scales(config))     # before every step

    matrices      the matrices of the blocks, if the optimizer is Muon: peak learning rate muon_lr
    embedding     token and position embeddings, if embedding_lr is given
    head          an output head that is not tied to the embedding, if head_lr is given
    scalars       norms and biases, if scalar_lr is given
    hidden        the matrices of the blocks, if model.mup is given: optimizer.lr times muP's factor
    decay         all other matrices: optimizer.lr
    no_decay      all other parameters: optimizer.lr
    experts       the matrices of experts, if ranks share them (engine/experts.py): optimizer.lr

Weight decay applies to matrices only. Groups without parameters are left out.
With model.mup, weight decay and eps are multiplied by factors, too (model/mup.py).
"""

from __future__ import annotations

from collections.abc import Iterable

from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.config.run_file import OptimizerSection, TrainSection
from packspeed.launch.config.schedule import learning_rate, momentum, weight_decay
from packspeed.model.expert_parts import part_of
from packspeed.model.gpt import GPT, is_matrix, is_muon_parameter
from packspeed.model.mup import STANDARD, Scales, scales

MATRICES = "matrices"
EXPERTS = "experts"
ALWAYS = ("decay", "no_decay")
WITHOUT_DECAY = ("no_decay", "scalars")
HIDDEN = "hidden"
IN_BLOCKS = (HIDDEN, *WITHOUT_DECAY)


def peak_rates(optimizer: OptimizerSection, factors: Scales = STANDARD) -> dict[str, float]:
    """Return {name of a parameter group: its peak learning rate} for all groups that this optimizer may need.

    factors: muP's factors (model/mup.py).
    """
    own = {"embedding": optimizer.embedding_lr, "head": optimizer.head_lr, "scalars": optimizer.scalar_lr}
    rates = {name: rate for name, rate in own.items() if rate is not None}
    if optimizer.name == "muon":
        rates[MATRICES] = optimizer.muon_lr or optimizer.lr
    if factors != STANDARD:
        rates[HIDDEN] = optimizer.lr * factors.matrix_lr
    return rates | dict.fromkeys((*ALWAYS, EXPERTS), optimizer.lr)


def group_of(name: str, groups: dict[str, float]) -> str:
    """Return the name of the group, a key of `groups`, to which the parameter called `name` belongs."""
    if not is_matrix(name):
        return "scalars" if "scalars" in groups else "no_decay"
    if is_muon_parameter(name):
        return next((group for group in (MATRICES, HIDDEN) if group in groups), "decay")
    wanted = "head" if name == "lm_head.weight" else "embedding"
    return wanted if wanted in groups else "decay"


def optimizer_groups(model: GPT, optimizer: OptimizerSection) -> list[JsonObject]:
    """Return the parameter groups for a torch optimizer, each with its name, parameters and weight decay.

    Tied weights appear once.
    """
    factors = scales(model.config)
    rates = peak_rates(optimizer, factors)
    of_group: dict[str, list[object]] = {name: [] for name in rates}
    for name, parameter in model.named_parameters():
        of_group[group_of(name, rates) if part_of(parameter) is None else EXPERTS].append(parameter)
    groups: list[JsonObject] = []
    for name in rates:
        if of_group[name]:
            decay = _decay(name, optimizer.weight_decay, factors)
            groups.append({"name": name, "params": of_group[name], "weight_decay": decay})
            if name == EXPERTS:
                groups[-1]["moe"] = True
            if factors != STANDARD and optimizer.name == "adamw":
                groups[-1]["eps"] = _eps(name, optimizer.eps, factors)
    return groups


def _decay(group: str, weight_decay: float, factors: Scales) -> float:
    """Return the weight decay of a parameter group.

    It is 0 if the group has no matrices, `weight_decay` times muP's factor for hidden matrices, else `weight_decay`.
    """
    return 0.0 if group in WITHOUT_DECAY else weight_decay * (factors.matrix_decay if group == HIDDEN else 1.0)


def _eps(group: str, eps: float, factors: Scales) -> float:
    """Return AdamW's eps of a group: `eps` times muP's factor."""
    return eps * (factors.block_eps if group in IN_BLOCKS else factors.table_eps)


def set_rates(groups: Iterable[JsonObject], step: int, train: TrainSection, factors: Scales = STANDARD) -> None:
    """Set the learning rate, weight decay and momentum for optimizer step `step` (from 0) in the parameter groups.

    factors: muP's factors (model/mup.py). Betas and eps are set too: loading a checkpoint restores the values of the
    save, but the run file may have changed since then.
    """
    optimizer, lr = train.optimizer, learning_rate(step, train)
    rates, decay = peak_rates(optimizer, factors), weight_decay(step, train)
    for group in groups:
        group["lr"] = lr * (rates[group["name"]] / optimizer.lr) if optimizer.lr else 0.0
        group["weight_decay"] = _decay(group["name"], decay, factors)
        eps = _eps(group["name"], optimizer.eps, factors)
        present = {"betas": list(optimizer.betas), "eps": eps, "momentum": momentum(step, optimizer)}
        group.update({key: value for key, value in present.items() if key in group})
