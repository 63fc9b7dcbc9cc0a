"""What a lint rule is: a function that looks at a run and yields a message for everything it finds.

    @rule("loss", "DeepSpeed#1800")                       # kind and source; the function's name is the rule's id
    def fixed_loss_scale(case: Case) -> Iterator[str]:
        \"\"\"A static loss scale does not follow the gradients.    <- why
        Symptom: ...                                              <- what the user sees
        Fix: ...                                                  <- what to do
        \"\"\"
        if ...:
            yield "what, where, and what to do"

The rules are in deepspeed_rules.py and run_rules.py. Importing these modules adds them to RULES. `packspeed explain`
runs all rules, and docs/troubleshooting.md is generated from their docstrings. A rule reads plain dicts and must not
raise, even if a value has the wrong type; that is reported by the code that reads the files.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator

from packspeed.launch.config.json_types import DsConfig, JsonObject
from packspeed.launch.config.run_file import RunFile
from packspeed.model.config import GPTConfig, num_parameters

KINDS = {
    "refused": "training does not start",
    "loss": "the setting can change the loss or the weights",
    "unsafe": "work can be lost",
    "memory": "the setting wastes memory",
    "slow": "the setting costs speed",
    "useless": "the setting has no effect",
}  # in the order in which findings are printed

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Finding:
    """One result of a rule, or an error of a loader. The message starts with file and line if they are known.

    `kind` is a key of KINDS. `source` names an issue, a paper or a page, for example "DeepSpeed#1800" or
    "arXiv:2306.10209".
    """

    rule: str
    kind: str
    message: str
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Case:
    """What the rules look at: a run and its DeepSpeed JSON, for a given number of ranks."""

    run: RunFile
    given: JsonObject  # keys and values that the run file and --set contain; keys are dotted: "train.optimizer.lr"
    ds: DsConfig  # the DeepSpeed JSON as written
    precision: str  # of the engine: bf16 if train.precision is fp8
    ranks: int
    accumulation: int
    micro_batch: int  # samples
    on_gpu: bool
    model: GPTConfig | None = None  # None if the run file's model is invalid
    train_tokens: int | None = None  # tokens of the training split; None if the dataset is not on this machine
    val_tokens: int | None = None  # the same for the validation split

    @property
    def zero(self) -> JsonObject:
        """The block zero_optimization of the DeepSpeed JSON, or an empty dict if there is none."""
        return block(self.ds, "zero_optimization")

    @property
    def stage(self) -> int:
        """The ZeRO stage in the DeepSpeed JSON; 0 if it is missing or is not a number."""
        stage = self.zero.get("stage", 0)
        return stage if isinstance(stage, int) else 0

    @property
    def parameters(self) -> int | None:
        """Number of parameters of the model; None if the model is invalid."""
        return None if self.model is None else num_parameters(self.model)


def block(tree: JsonObject, key: str) -> JsonObject:
    """Return the block at `key`, or an empty dict if it is missing or not a block."""
    value = tree.get(key)
    return value if isinstance(value, dict) else {}


def device(case: Case, key: str) -> str:
    """Return the device of the block offload_optimizer or offload_param (`key`): "none", "cpu" or "nvme"."""
    target = block(case.zero, key).get("device")
    return "none" if target in (None, "auto") else str(target)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A check of a run and its entry in docs/troubleshooting.md.

    `kind` is a key of KINDS. `source` names an issue, a paper or a page, for example "DeepSpeed#1800".
    """

    name: str
    kind: str
    check: Callable[[Case], Iterator[str]]
    source: str
    why: str
    symptom: str
    fix: str


RULES: list[Rule] = []


def rule(kind: str, source: str = "") -> Callable[[Callable[[Case], Iterator[str]]], Callable[[Case], Iterator[str]]]:
    """Return a decorator that adds a check to RULES.

    The rule's name is that of the function. Its docstring must have three parts: why, Symptom: and Fix:.
    """

    def register(check: Callable[[Case], Iterator[str]]) -> Callable[[Case], Iterator[str]]:
        text = " ".join((inspect.getdoc(check) or "").split())
        why, _, rest = text.partition(" Symptom: ")
        symptom, _, fix = rest.partition(" Fix: ")
        if not fix:
            raise TypeError(f"{check.__name__}: the docstring of a rule needs three parts: why, Symptom: and Fix:")
        RULES.append(Rule(check.__name__.replace("_", "-"), kind, check, source, why, symptom, fix))
        return check

    return register
