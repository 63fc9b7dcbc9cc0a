"""Which ranks share rows of the batch, tokens of a row, weights and experts: the section `parallel` of the run file.

    layout = run_layout(run, 8)          # Layout(world=8, sequence=2), or ConfigError with the sizes that divide
    layout.rows                          # 4: groups of ranks that read different rows of the global batch
    layout.members("sequence", 5)        # [4, 5]: the ranks that share the tokens of rank 5's rows

Ranks are numbered with the tensor axis fastest, then the sequence axis, then the rows:

    rank = (row group * sequence + sequence rank) * tensor + tensor rank

So the ranks of a tensor group, which exchange the most, are neighbours on one host. DeepSpeed partitions and averages
over all ranks with the same tensor rank (the axis "zero"): to it, ranks that share the tokens of a row are ordinary
data-parallel ranks. The ranks of a tensor group hold different parts of the same weights and compute the same loss.
"""

from __future__ import annotations

import dataclasses
import math

from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.run_file import RunFile
from packspeed.model.config import FP8_MULTIPLE, VOCAB_MULTIPLE, GPTConfig


@dataclasses.dataclass(frozen=True)
class Layout:
    """How `world` ranks form groups: the sizes of the sequence-parallel, tensor-parallel and expert-parallel groups.

    run_layout checks the sizes; this class does not.
    """

    world: int = 1
    sequence: int = 1  # ranks that share the tokens of the same rows
    tensor: int = 1  # ranks that share the weights of each layer
    expert: int = 1  # ranks that share the experts of each layer; they may read different rows

    @property
    def per_row(self) -> int:
        """Number of ranks that work on the same rows of the batch."""
        return self.sequence * self.tensor

    @property
    def rows(self) -> int:
        """Number of groups of ranks that read different rows of the batch."""
        return self.size("rows")

    @property
    def zero(self) -> int:
        """Number of ranks over which ZeRO partitions, and over which DeepSpeed averages gradients."""
        return self.size("zero")

    def size(self, axis: str) -> int:
        """Return the number of ranks in a group along an axis such as "sequence" (`_axis` lists them)."""
        return self._axis(axis)[1]

    def index(self, axis: str, rank: int) -> int:
        """Return the position, from 0, of `rank` in its group along an axis such as "sequence" (`_axis` lists them)."""
        stride, size = self._axis(axis)
        return rank // stride % size

    def members(self, axis: str, rank: int) -> list[int]:
        """Return the ranks of the group that contains `rank`, in ascending order. The group is along an axis such as
        "sequence" (`_axis` lists them).
        """
        stride, size = self._axis(axis)
        first = rank - self.index(axis, rank) * stride
        return [first + stride * number for number in range(size)]

    def groups(self, axis: str) -> list[list[int]]:
        """Return all groups along an axis such as "sequence" (`_axis` lists them), in the same order on every rank.
        Each rank is in one group.
        """
        return [self.members(axis, rank) for rank in range(self.world) if self.index(axis, rank) == 0]

    def _axis(self, name: str) -> tuple[int, int]:
        """Return (difference between neighbouring ranks, number of ranks) of each group along an axis.

        The names of the axes, and what the ranks of a group do: tensor: share the weights of each layer. sequence:
        share the tokens of the same rows. rows: read different rows. zero: hold ZeRO's partitions of the same weights.
        expert: share the experts of each layer. expert_copies: hold the same experts.
        """
        zero = self.world // self.tensor
        return {
            "tensor": (1, self.tensor),
            "sequence": (self.tensor, self.sequence),
            "rows": (self.per_row, self.world // self.per_row),
            "zero": (self.tensor, zero),
            "expert": (self.tensor, self.expert),
            "expert_copies": (self.tensor * self.expert, zero // self.expert),
        }[name]

    def __str__(self) -> str:
        """Return the layout in words, such as "4 ranks = 2 groups of rows x 2 sequence"."""
        axes = [f"{size} {name}" for name, size in (("sequence", self.sequence), ("tensor", self.tensor)) if size > 1]
        rows = f"{self.rows} group{'s' if self.rows > 1 else ''} of rows"
        experts = f", experts over {self.expert}" if self.expert > 1 else ""
        ranks = f"{self.world} rank{'s' if self.world > 1 else ''}"
        return (f"{ranks} = {' x '.join([rows, *axes])}" if axes else ranks) + experts


ONE_RANK = Layout()


def run_layout(run: RunFile, world: int) -> Layout:
    """Return the layout of a run with `world` ranks.

    Raises ConfigError if a size of the section `parallel` does not divide the number of ranks, heads or experts, or
    is not supported with another setting; the message says which sizes are possible or what to change.
    """
    sizes = run.parallel
    layout = Layout(world, sizes.sequence, sizes.tensor, sizes.expert)
    if layout.per_row > 1:
        _check_ranks(layout)
    if layout.tensor > 1:
        _check_tensor(run, layout)
    if layout.sequence > 1:
        _check_sequence(run, layout)
    if layout.expert > 1:
        _check_experts(run, layout)
    return layout


def _check_ranks(layout: Layout) -> None:
    """Raise ConfigError unless the number of ranks is a multiple of layout.per_row, the number of ranks that work on
    the same rows of the batch.
    """
    if layout.world % layout.per_row == 0:
        return
    near = [n * layout.per_row for n in (layout.world // layout.per_row, layout.world // layout.per_row + 1) if n]
    sizes = {"sequence": layout.sequence, "tensor": layout.tensor}
    name = " x ".join(str(size) for size in sizes.values() if size > 1)
    keys = " x ".join(f"parallel.{axis}" for axis, size in sizes.items() if size > 1)
    raise ConfigError(
        f"{keys} = {name} does not divide {layout.world} ranks. "
        f"The nearest numbers of ranks that it divides: {' and '.join(map(str, near))}."
    )


def _check_tensor(run: RunFile, layout: Layout) -> None:
    """Raise ConfigError unless the matrices can be divided evenly among the ranks of a tensor-parallel group.

    Also raises it for what tensor parallelism does not support: experts, Muon, fp8, compiled blocks and muP.
    """
    model, asked = run.gpt_config(1), f"parallel.tensor = {layout.tensor}"
    for refused, what, use in (
        (model.n_expert is not None, "a model with experts", "Use ZeRO-3 to divide the experts' weights."),
        (run.train.optimizer.name == "muon", "Muon, which needs complete matrices", "Use train.optimizer.name: adamw."),
        (
            run.train.precision == "fp8",
            "train.precision: fp8, whose scales are those of complete matrices",
            "Use bf16.",
        ),
        (model.kernels == "compile", "model.kernels: compile", "Use auto."),
        (model.mup is not None, "model.mup", "Leave model.mup out."),
    ):
        if refused:
            raise ConfigError(f"{asked} is not supported with {what}. {use} Or write parallel.tensor: 1.")

    def possible(size: int) -> bool:
        divides = VOCAB_MULTIPLE % size == 0 == model.ff_width % size
        return divides and heads_fit(model, size, 1) and layout.world % (size * layout.sequence) == 0

    if not possible(layout.tensor):
        sizes = [size for size in range(1, layout.world + 1) if possible(size)]
        raise ConfigError(
            f"{asked}: the model has {model.n_head} heads, {model.kv_heads} key-value heads and {model.ff_width} "
            "hidden channels in the MLP. The size must be a power of 2 and divide these three numbers. "
            f"With {layout.world} ranks these sizes are possible: {', '.join(map(str, sizes))}."
        )


def _check_sequence(run: RunFile, layout: Layout) -> None:
    """Raise ConfigError unless every rank of a sequence-parallel group gets equally many heads, and enough tokens.

    Each rank computes attention for some of the heads, over complete rows. If the group has more ranks than the model
    has key-value heads, these heads are repeated. So the number of ranks must divide the number of key-value heads or
    be a multiple of it. In fp8, matrix products need a multiple of 16 tokens.
    """
    model, length = run.gpt_config(1), run.data.seq_len

    def possible(size: int) -> bool:
        divides = layout.world % (size * layout.tensor) == 0
        return divides and heads_fit(model, layout.tensor, size) and length >= size

    if not possible(layout.sequence):
        sizes = [size for size in range(1, layout.world + 1) if possible(size)]
        raise ConfigError(
            f"parallel.sequence = {layout.sequence}: the model has {model.n_head} heads and {model.kv_heads} key-value "
            f"heads, and rows have {length} tokens. The size must divide model.n_head and be at most {length}. It must "
            f"also divide model.n_kv_head or be a multiple of it. With {layout.world} ranks these sizes are possible: "
            f"{', '.join(map(str, sizes))}."
        )
    if run.train.precision == "fp8" and length % (layout.sequence * FP8_MULTIPLE):
        raise ConfigError(
            f"parallel.sequence = {layout.sequence} with train.precision: fp8 leaves {length / layout.sequence:g} "
            f"tokens of a row to a rank, but GPUs multiply in fp8 only if that is a multiple of {FP8_MULTIPLE}. Make "
            f"data.seq_len a multiple of {layout.sequence * FP8_MULTIPLE}, or use bf16."
        )


def _check_experts(run: RunFile, layout: Layout) -> None:
    """Raise ConfigError unless the ranks can share the experts of each layer equally.

    Also raises it with Muon and with tensor parallelism, which do not work with expert parallelism.
    """
    model, key = run.gpt_config(1), f"parallel.expert = {layout.expert}"
    if model.n_expert is None:
        raise ConfigError(f"{key}: the model has no experts (model.n_expert). Write 1.")
    if layout.tensor > 1:
        raise ConfigError(f"{key} with parallel.tensor = {layout.tensor} is not supported. Write 1 for one of them.")
    if run.train.optimizer.name == "muon":
        raise ConfigError(
            f"{key}: Muon needs complete matrices and collects their parts from all ranks, but not all ranks would "
            "have parts of the same experts. Write 1, or use train.optimizer.name: adamw."
        )
    if model.n_expert % layout.expert or layout.zero % layout.expert:
        common = math.gcd(model.n_expert, layout.zero)
        sizes = [size for size in range(1, common + 1) if common % size == 0]
        raise ConfigError(
            f"{key} must divide the {model.n_expert} experts of a layer and the {layout.zero} ranks. These sizes do: "
            f"{', '.join(map(str, sizes))}."
        )


def heads_fit(model: GPTConfig, tensor: int, sequence: int) -> bool:
    """Return whether `tensor` x `sequence` ranks can share the model's heads equally."""
    if model.n_head % (tensor * sequence) or model.kv_heads % tensor:
        return False
    keys = model.kv_heads // tensor
    return math.gcd(keys, sequence) in (keys, sequence)
