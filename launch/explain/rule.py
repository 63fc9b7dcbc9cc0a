"""Rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from packspeed.launch.config.run_file import RunFile
from packspeed.model.config import GPTConfig, num_parameters

KINDS = ("refused", "loss", "unsafe", "memory", "slow", "useless")


GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Case:
    """What the rules look at. Facts about the dataset are None where it is not there."""

    run: RunFile
    given: dict[str, Any]  # the run file's own keys, dotted: what somebody wrote
    ds: dict[str, Any]  # the JSON as written
    precision: str
    ranks: int
    accumulation: int
    micro_batch: int
    on_gpu: bool
    model: GPTConfig | None = None
    train_tokens: int | None = None
    val_tokens: int | None = None

    @property
    def zero(self) -> dict[str, Any]:
        """The zero_optimization block."""
        return block(self.ds, "zero_optimization")

    @property
    def stage(self) -> int:
        """The ZeRO stage; 0 where it is no number."""
        stage = self.zero.get("stage", 0)
        return stage if isinstance(stage, int) else 0

    @property
    def parameters(self) -> int | None:
        """Parameters of the model."""
        return None if self.model is None else num_parameters(self.model)


def block(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """A sub-block, empty where it is missing or no block."""
    value = tree.get(key)
    return value if isinstance(value, dict) else {}


def device(case: Case, key: str) -> str:
    """Where offload_optimizer or offload_param goes."""
    return str(block(case.zero, key).get("device", "none"))


@dataclasses.dataclass(frozen=True)
class Rule:
    """A named check; `source` says whose trouble it was."""

    name: str
    kind: str
    check: Callable[[Case], Iterator[str]]
    source: str


RULES: list[Rule] = []


def rule(kind: str, source: str = "") -> Callable[[Callable[[Case], Iterator[str]]], Callable[[Case], Iterator[str]]]:
    """Put a check into the table under its function's name."""

    def register(check: Callable[[Case], Iterator[str]]) -> Callable[[Case], Iterator[str]]:
        RULES.append(Rule(check.__name__.replace("_", "-"), kind, check, source))
        return check

    return register
