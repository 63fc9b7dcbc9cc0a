"""Parameter groups of the optimizer: who shares a learning rate, and the rates of each step.

    groups = optimizer_groups(model, run.train.optimizer)
    set_rates(engine, step, run.train)                          # before every step, from the step's number alone

    matrices      the matrices of the blocks, if the optimizer is Muon: peak learning rate muon_lr
    embedding     token and position embeddings, if embedding_lr is given
    head          an output head that is not tied to the embedding, if head_lr is given
    scalars       norms and biases, if scalar_lr is given
    decay         all other matrices: optimizer.lr
    no_decay      all other parameters: optimizer.lr
    experts       the matrices of experts, if ranks share them (engine/experts.py): as decay

Weight decay applies to matrices only. Groups without parameters are left out.
"""

from __future__ import annotations

from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.config.run_file import OptimizerSection, TrainSection
from packspeed.launch.config.schedule import learning_rate, momentum, weight_decay
from packspeed.launch.engine.protocol import Engine
from packspeed.model.gpt import GPT, is_matrix, is_muon_parameter

MATRICES = "matrices"
EXPERTS = "experts"
ALWAYS = ("decay", "no_decay")
WITHOUT_DECAY = ("no_decay", "scalars")


def peak_rates(optimizer: OptimizerSection) -> dict[str, float]:
    """Return {name of a group: its peak learning rate} for all groups that these settings may need."""
    own = {"embedding": optimizer.embedding_lr, "head": optimizer.head_lr, "scalars": optimizer.scalar_lr}
    rates = {name: rate for name, rate in own.items() if rate is not None}
    if optimizer.name == "muon":
        rates[MATRICES] = optimizer.muon_lr or optimizer.lr
    return rates | dict.fromkeys((*ALWAYS, EXPERTS), optimizer.lr)


def group_of(name: str, groups: dict[str, float]) -> str:
    """Return the group of the parameter called `name`, one of the keys of `groups`."""
    if not is_matrix(name):
        return "scalars" if "scalars" in groups else "no_decay"
    wanted = MATRICES if is_muon_parameter(name) else "head" if name == "lm_head.weight" else "embedding"
    return wanted if wanted in groups else "decay"


def optimizer_groups(model: GPT, optimizer: OptimizerSection) -> list[JsonObject]:
    """Return the parameter groups for a torch optimizer, with name, parameters and weight decay. Tied weights appear
    once.
    """
    rates = peak_rates(optimizer)
    of_group: dict[str, list[object]] = {name: [] for name in rates}
    for name, parameter in model.named_parameters():
        shared_out = not getattr(parameter, "allreduce", True)  # by mark_experts
        of_group[EXPERTS if shared_out else group_of(name, rates)].append(parameter)
    decays = {name: 0.0 if name in WITHOUT_DECAY else optimizer.weight_decay for name in rates}
    groups = [{"name": name, "params": of_group[name], "weight_decay": decays[name]} for name in rates]
    return [{**group, "moe": True} if group["name"] == EXPERTS else group for group in groups if group["params"]]


def set_rates(engine: Engine, step: int, train: TrainSection) -> None:
    """Set the learning rate, weight decay and momentum of an optimizer step, counted from 0, in every group.

    Betas and eps are set too: loading a checkpoint restores the values of the save, but the run file may have changed
    since then.
    """
    optimizer, lr = train.optimizer, learning_rate(step, train)
    rates, decay = peak_rates(optimizer), weight_decay(step, train)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * (rates[group["name"]] / optimizer.lr) if optimizer.lr else 0.0
        group["weight_decay"] = 0.0 if group["name"] in WITHOUT_DECAY else decay
        present = {"betas": list(optimizer.betas), "eps": optimizer.eps, "momentum": momentum(step, optimizer)}
        group.update({key: value for key, value in present.items() if key in group})
