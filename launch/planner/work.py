"""What a training step computes and how it is divided: the input of every formula of the planner.

    Work(model, seq_len=2048, micro_batch=8, accumulation=4, layout=Layout(ranks=64, stage=3))

A layout says which share of the model, of the tokens and of the optimizer each rank has. It covers more than Packspeed
trains (pipelines, tensor parallelism with sharded sequences), because published runs of other stacks are predicted too.
"""

from __future__ import annotations

import dataclasses

from packspeed.model.config import GPTConfig, num_parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How ranks share a model, a sequence and an optimizer. `ranks` is a multiple of tensor * pipeline * context."""

    ranks: int
    per_host: int = 8
    stage: int = 0  # ZeRO stage; FSDP's full shard is 3
    tensor: int = 1
    pipeline: int = 1
    chunks: int = 1  # pieces of the model on each pipeline rank (interleaved schedule)
    context: int = 1  # ranks that share a sequence
    expert: int = 1  # ranks that share the experts of a layer
    expert_tensor: int | None = None  # ranks that share the matrices of one expert; None: as `tensor`
    sequence_sharded: bool = False  # tensor-parallel ranks also divide the tokens of norms and residuals

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if field.name not in ("stage", "expert_tensor", "sequence_sharded") and size < 1:
                raise ValueError(f"{field.name} = {size}: give at least 1.")

    @property
    def data(self) -> int:
        """Return the number of data-parallel ranks, at least 1."""
        return max(1, self.ranks // (self.tensor * self.pipeline * self.context))

    @property
    def expert_data(self) -> int:
        """Return the number of ranks that hold the same experts, at least 1."""
        return max(1, self.ranks // (self.pipeline * self.expert * self.expert_tensor_ranks))

    @property
    def expert_tensor_ranks(self) -> int:
        """Return the number of ranks that share the matrices of one expert."""
        return self.expert_tensor or self.tensor

    @property
    def hosts(self) -> int:
        """Return the number of hosts."""
        return -(-self.ranks // self.per_host)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """One optimizer step: a model, its tokens, and how ranks divide both."""

    model: GPTConfig
    seq_len: int
    micro_batch: int  # samples per forward pass of a model replica
    accumulation: int  # forward passes per optimizer step
    layout: Layout
    precision: str = "bf16"
    recomputed: float = 0.0  # share of the blocks that are computed again in the backward pass
    gather_bytes: float = 4.0  # bytes per parameter that ZeRO-3 gathers in a micro batch, forward and backward
    reduce_bytes: float = 4.0  # bytes per gradient that is sent

    @property
    def tokens(self) -> int:
        """Return the number of tokens in a forward pass of one model replica."""
        return self.seq_len * self.micro_batch

    @property
    def block_products(self) -> float:
        """Return the number of weights that multiply each token in a block, as a mean over the blocks."""
        model = self.model
        return model.d_model * (model.attention_rows + self.ff_rows)

    @property
    def queries(self) -> int:
        """Return the number of channels of all query heads together."""
        return self.model.n_head * self.model.head_width

    @property
    def keys(self) -> int:
        """Return the number of channels of all key heads together."""
        return self.model.kv_heads * self.model.head_width

    @property
    def ff_rows(self) -> float:
        """Return the width of the MLP that each token uses, times its number of matrices: 2, or 3 with a gate.

        With experts, the widths of the experts that a token uses are added up. The result is a mean over the blocks.
        """
        model = self.model
        matrices = 3 if model.mlp == "swiglu" else 2
        if model.n_expert is None:
            return matrices * model.ff_width
        used = (model.n_expert_active + model.n_shared_expert) * model.expert_width
        sparse = (model.n_block - model.first_dense) / model.n_block
        return matrices * (sparse * used + (1 - sparse) * model.ff_width)

    @property
    def parameters(self) -> int:
        """Return the number of parameters, with every expert."""
        return num_parameters(self.model, padded=True)
