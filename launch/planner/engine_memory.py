"""Memory of one rank of Packspeed: what it holds, and the peak of each phase of a step, in bytes by kind.

    account = engine_memory(EngineSpec(model=config, seq_len=1024, micro_batch=8, ranks=64, stage=2, ...))
    account.peak.phase, account.peak.total, account.peak.kinds

Everything is a count: states by launch/config/memory.py; activations by what autograd keeps in the model's own code
(block_bytes, measured with saved-tensor hooks, exact); buckets and copies by what DeepSpeed's optimizers allocate.
tests/test_planner_memory.py compares it with the engine under a fake process group and with torch's profiler.

Phases of a step:

    gather      ZeRO-3 gathers weights for the forward pass: all of them, and a flat copy of a prefetch bucket
    forward     at its end: activations of all blocks, gradients of the head, the logits of a chunk
    backward    at its start, with a bucket; at its end, with all gradients and the copies that a reduction makes
    step        gradients and the optimizer's temporary tensors
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

from packspeed.launch.config.deepspeed_defaults import BUCKET, MAX_LIVE, PREFETCH_BUCKET
from packspeed.launch.config.memory import held
from packspeed.model.config import (
    CPU_BLOCK_ELEMENTS,
    CPU_CHUNK_BYTES,
    GPU_BLOCK_ELEMENTS,
    GPU_CHUNK_BYTES,
    GPTConfig,
    largest_parameter,
    num_parameters,
)

Device = Literal["cpu", "gpu"]
KINDS = (
    "weights", "gradients", "optimizer", "buckets", "gathered", "activations", "logits", "recompute", "communication",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """The settings on which the memory of a rank depends. Sizes of buckets are in elements; see
    deepspeed_defaults.py.
    """

    model: GPTConfig
    seq_len: int
    micro_batch: int
    accumulation: int
    ranks: int  # data-parallel ranks, among which ZeRO divides
    stage: int
    precision: str  # "fp32", "bf16" or "fp16"; fp8 counts as bf16
    kernels: str = "triton"  # what model.kernels resolves to: "eager", "native", "triton" or "compile"
    device: Device = "gpu"
    reduce_bucket: int = BUCKET
    prefetch_bucket: int = PREFETCH_BUCKET
    overlap: bool = False  # gradients are reduced during the backward pass
    offload_optimizer: bool = False
    offload_param: bool = False
    adam_copies: bool = False  # torch's own AdamW, which allocates temporary tensors; fused ones do not
    tensor: int = 1  # ranks that share the matrices
    sequence: int = 1  # ranks that share a sample's tokens
    expert: int = 1  # ranks that share the experts of a layer

    @property
    def tokens(self) -> float:
        """Return the number of tokens in one forward pass of this rank."""
        return self.seq_len * self.micro_batch / self.sequence

    @property
    def predictions(self) -> float:
        """Return the number of tokens that the output head predicts in one forward pass, including those of extra heads
        (model.mtp).
        """
        return self.tokens * (1 + self.model.extra_heads)

    @property
    def autocast(self) -> bool:
        """Return whether the weights are fp32 and products are computed in 16 bits."""
        return self.stage == 0 and self.precision != "fp32"

    @property
    def weight_bytes(self) -> int:
        """Return the bytes per weight of the model: 4 in fp32 or at ZeRO stage 0, otherwise 2."""
        return 4 if self.precision == "fp32" or self.stage == 0 else 2

    @property
    def value_bytes(self) -> int:
        """Return the bytes per element of most activations."""
        return 4 if self.precision == "fp32" else 2

    @property
    def offloads_activations(self) -> bool:
        """Return whether the inputs of recomputed blocks are moved to host memory. On a CPU, that would save
        nothing.
        """
        return self.model.activation_offload and self.device == "gpu"

    @functools.cached_property
    def own(self) -> GPTConfig:
        """The configuration of this rank's part of the model under tensor parallelism.

        It has the rank's heads, hidden channels and vocabulary rows (padding included), but all experts of each layer.
        """
        model = self.model
        return dataclasses.replace(
            model, n_head=model.n_head // self.tensor, n_kv_head=model.kv_heads // self.tensor,
            head_dim=model.head_width, d_ff=model.ff_width // self.tensor,
            vocab_size=model.padded_vocab_size // self.tensor,
        )  # fmt: skip

    @property
    def parameters(self) -> float:
        """Return the number of parameters of this rank before ZeRO divides them."""
        return self.divided - expert_parameters(self.model) * (1 - 1 / self.expert)

    @property
    def divided(self) -> int:
        """Return the number of parameters that ZeRO divides among the data-parallel ranks, with all experts."""
        tables = sum(map(self.own.embeds_values, range(self.own.n_block)))  # have all rows, and columns of own heads
        rows = self.model.padded_vocab_size - self.own.vocab_size
        return num_parameters(self.own) + tables * rows * self.own.kv_heads * self.own.head_width

    @functools.cached_property
    def largest(self) -> int:
        """The number of elements of the largest parameter on this rank."""
        rest = largest_parameter(dataclasses.replace(self.own, vocab_size=1))  # the rank's rows need no padding
        values = self.model.padded_vocab_size * self.own.kv_heads * self.own.head_width
        tables = self.own.vocab_size * self.own.d_model, values if self.own.value_embeddings else 0
        return max(rest, *tables)


Kinds = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Phase:
    """The device memory of a rank in one phase of a step: bytes by kind (weights, activations, ...)."""

    phase: str
    kinds: Kinds

    @property
    def total(self) -> float:
        """Return the sum over all kinds."""
        return sum(self.kinds.values())


@dataclasses.dataclass(frozen=True)
class EngineMemory:
    """The memory of a rank in bytes: on the device between steps and in every phase of a step, and in host memory."""

    kept: Kinds
    phases: list[Phase]
    host: Kinds

    @property
    def peak(self) -> Phase:
        """Return the phase with the largest sum."""
        return max(self.phases, key=lambda phase: phase.total)


def engine_memory(spec: EngineSpec) -> EngineMemory:
    """Return the memory of one rank."""
    kept, host = states(spec)
    if spec.offloads_activations:
        host = host | {"activations": _recomputed_inputs(spec)}
    extra = [
        ("gather", _gathering(spec)),
        ("forward", _end_of_forward(spec)),
        ("backward, its start", _start_of_backward(spec)),
        ("backward, its end", _end_of_backward(spec)),
        ("step", _step(spec)),
    ]
    return EngineMemory(kept, [Phase(name, _sum(kept, more)) for name, more in extra], host)


def _sum(*parts: Kinds) -> Kinds:
    """Add up dicts of bytes by kind. Kinds with 0 bytes are left out."""
    return {kind: total for kind in KINDS if (total := sum(part.get(kind, 0.0) for part in parts))}


def states(spec: EngineSpec) -> tuple[Kinds, Kinds]:
    """Return the bytes that a rank holds between steps, by kind: (on the device, in host memory)."""
    count, size, ranks = spec.parameters, spec.weight_bytes, spec.ranks
    table = held(spec.stage, spec.precision)[0]
    total = table.complete * count + table.shared * spec.divided / ranks
    count = count if spec.stage < 3 else spec.divided
    weights = size * count / (ranks if spec.stage == 3 else 1)
    gradients = 4 * count / ranks if spec.stage == 3 else 0.0
    kept = {"weights": weights, "gradients": gradients, "optimizer": total - weights - gradients}
    if spec.stage == 3:
        kept["buckets"] = 4.0 * spec.reduce_bucket
    if not spec.offload_optimizer:
        return kept, {}
    host = {"optimizer": kept.pop("optimizer")}
    if spec.stage == 3:
        host["gradients"] = kept.pop("gradients") + 4 * count / ranks
        if spec.offload_param:
            host["weights"] = kept.pop("weights")
        return kept, host
    # Stages 1 and 2 copy each gradient by way of one buffer on either side. The host adds up the gradients of micro
    # batches, those of every matrix that the rank has a part of.
    kept |= {"gradients": size * count / ranks, "buckets": size * spec.largest}
    host |= {"gradients": 4 * count / ranks, "buckets": size * spec.largest}
    if spec.accumulation > 1:
        host["gradients"] += size * max(count / ranks, spec.largest)
    return kept, host


# Bytes that autograd keeps for a token of a block: per channel of the residual stream (d), of the query heads (q), of
# the key heads (kv, keys and values together) and of the MLP (ff). e: bytes of a value.


def block_bytes(spec: EngineSpec) -> float:
    """Return the bytes per token that the forward pass of one block keeps for its backward pass."""
    model, e = spec.own, spec.value_bytes
    torch_norms = spec.kernels != "triton" and model.norm == "rmsnorm" and spec.device == "cpu"
    d = (8 + 2 * e if spec.autocast else 4 * e) + ((8 if e == 4 or spec.autocast else 12) if torch_norms else 0)
    dropout = 2 * model.d_model if model.dropout else 0
    norms = d * model.d_model + (16 if model.norm == "layernorm" else 8)
    return norms + attention_bytes(spec) + hidden_bytes(spec) + dropout


def attention_bytes(spec: EngineSpec) -> float:
    """Return the bytes per token that attention keeps for the backward pass: queries, keys, values and its result."""
    model, e = spec.own, spec.value_bytes
    q = kv = 2.0 * e
    if spec.kernels not in ("native", "triton") and not spec.autocast:
        if e == 2 and spec.device == "cpu":
            q, kv = 10.0, 8.0  # attention in fp32
        elif model.position == "rope":
            q = kv = 3.0 * e
        if model.qk_norm:  # it keeps more, but nothing beside the rotated copies
            q, kv = q - e, kv - e
    if model.qk_norm:
        q, kv = (q + 8, kv + 8) if e == 4 or spec.autocast else (q + 10, kv + 10)
    heads = model.n_head * model.head_width
    keys = model.kv_heads * model.head_width
    statistics = 4 * model.n_head + (4 * (model.n_head + model.kv_heads) if model.qk_norm else 0)
    exchanged = _exchanged_bytes(spec) if spec.sequence > 1 else 0
    return q * heads + kv * keys + statistics + exchanged + _gate_bytes(spec) + _mixed_value_bytes(spec)


def _gate_bytes(spec: EngineSpec) -> float:
    """Return the bytes per token that the gates of attention (model.attention_gate) keep for the backward pass of a
    block.

    These are the sigmoids, and the outputs of the heads multiplied by them. Elementwise gates also keep the inputs of
    the sigmoids.
    """
    model, e = spec.own, spec.value_bytes
    heads = model.n_head * model.head_width
    if model.attention_gate == "elementwise":
        return (2 if _attends_in_fp32(spec) else 3) * e * heads
    if model.attention_gate == "headwise":  # autocast rounds the input of the gates for them alone
        return e * (model.n_head + heads) + (e * model.d_model if spec.autocast else 0)
    return 0.0


def _mixed_value_bytes(spec: EngineSpec) -> float:
    """Return the bytes per token that a block keeps in addition because of model.value_residual and
    model.value_embeddings, as a mean over the blocks.

    Both add something to the values of attention.
    """
    model = spec.own
    residual = [model.value_residual and layer > 0 for layer in range(model.n_block)]
    if _attends_in_fp32(spec):  # the factor of the residual keeps the 16-bit values, a view of all heads
        return spec.value_bytes * model.qkv_width * sum(residual) / model.n_block
    mixed = sum(mixes or model.embeds_values(layer) for layer, mixes in enumerate(residual))
    return spec.value_bytes * model.kv_heads * model.head_width * mixed / model.n_block


def _attends_in_fp32(spec: EngineSpec) -> bool:
    """Return whether attention converts 16-bit queries, keys and values to fp32 and keeps only the fp32 copies."""
    return spec.value_bytes == 2 and spec.device == "cpu" and spec.kernels not in ("native", "triton")


def _exchanged_bytes(spec: EngineSpec) -> float:
    """Return the bytes per token that attention keeps in addition with sequence parallelism.

    The ranks then exchange queries, keys, values and the result, and keep the received copies. If there are more ranks
    than key heads, several ranks hold a copy of the same key head.
    """
    model, e = spec.own, spec.value_bytes
    heads, keys = model.n_head * model.head_width, model.kv_heads * model.head_width
    repeated = max(0, spec.sequence - model.kv_heads) * model.head_width
    eager = spec.kernels not in ("native", "triton") and not spec.autocast
    if eager and e == 2 and spec.device == "cpu":
        return 8 * repeated  # attention in fp32
    if (model.qk_norm and e == 2) or (eager and model.position == "rope" and not model.qk_norm):
        return 2 * e * repeated - e * keys
    return 2 * e * repeated + e * heads + (e * keys if model.qk_norm else 0)


def hidden_bytes(spec: EngineSpec) -> float:
    """Return the bytes per token that a block's MLP or experts keep for the backward pass: the mean over all blocks."""
    model, e = spec.own, spec.value_bytes
    fused = spec.kernels in ("native", "triton")
    ff = (2 if model.mlp != "swiglu" else 3 if fused else 4) * e  # per hidden channel
    again = spec.kernels == "native" and not spec.autocast and spec.tensor == 1  # the activation is computed twice
    dense = ff - e if again else ff
    if model.n_expert is None:
        return dense * model.ff_width
    router = (6 if e == 2 and not spec.autocast else 4) * model.n_expert + 4
    if e == 2:  # the router's fp32 input; a 16-bit one is kept for the shared experts only
        router += (4 if model.n_shared_expert else 2) * model.d_model
    experts = model.n_expert_active * (2 * e * model.d_model + ff * model.expert_width + 32) + router
    experts += dense * model.n_shared_expert * model.expert_width
    sparse = (model.n_block - model.first_dense) / model.n_block
    return sparse * experts + (1 - sparse) * dense * model.ff_width


def multiplied_weights(spec: EngineSpec) -> float:
    """Return the number of weights in the matrices of a block on this rank, experts included: the mean over blocks."""
    model = spec.own
    matrices = 3 if model.mlp == "swiglu" else 2
    sparse = (model.n_block - model.first_dense) / model.n_block if model.n_expert else 0.0
    width = (1 - sparse) * model.ff_width
    width += sparse * ((model.n_expert or 0) / spec.expert + model.n_shared_expert) * model.expert_width
    return model.d_model * (matrices * width + model.attention_rows)


def expert_parameters(model: GPTConfig) -> int:
    """Return the number of parameters of all experts, without routers and shared experts."""
    matrices = 3 if model.mlp == "swiglu" else 2
    count = (model.n_block - model.first_dense) * (model.n_expert or 0)
    return count * matrices * model.d_model * model.expert_width


def _recomputed_inputs(spec: EngineSpec, most: int | None = None) -> float:
    """Return the bytes of the inputs of all recomputed blocks, or of at most `most` of these blocks."""
    again = spec.model.recomputed_blocks
    blocks = again if most is None else min(most, again)
    return blocks * (4 if spec.autocast else spec.value_bytes) * spec.model.d_model * spec.tokens


def _blocks(spec: EngineSpec) -> tuple[float, float]:
    """Return (bytes that all blocks keep, further bytes while one block or one chunk of an MLP is recomputed)."""
    model, each, again = spec.model, block_bytes(spec) * spec.tokens, spec.model.recomputed_blocks
    chunk = 0.0
    if model.mlp_chunk is not None and model.mlp_chunk < spec.tokens:
        each -= hidden_bytes(spec) * spec.tokens
        chunk = hidden_bytes(spec) * model.mlp_chunk
    kept = (model.n_block - again) * each + _recomputed_inputs(spec, 2 if spec.offloads_activations else None)
    if model.value_residual:  # a copy of the first layer's values, which all other blocks read
        kept += spec.value_bytes * spec.own.kv_heads * model.head_width * spec.tokens
    copies = 0.0
    if spec.autocast:  # 16-bit copies of the weights of all products, made once in a forward pass
        copies = 2 * multiplied_weights(spec) * (model.n_block - again)
    return kept + copies, chunk + (each if again else 0.0)


def _embedding(spec: EngineSpec) -> float:
    """Return the bytes kept for the embedding and RoPE's table."""
    model = spec.own
    rope = 4 * model.head_width / spec.micro_batch if model.position == "rope" else 0
    return (rope + 20) * spec.tokens


def _last_norm(spec: EngineSpec) -> float:
    """Return the bytes kept for the last norm."""
    model, e = spec.model, 4 if spec.autocast else spec.value_bytes
    return (8 if model.norm == "rmsnorm" and spec.device == "cpu" else e) * model.d_model * spec.predictions


def _head(spec: EngineSpec) -> tuple[float, float]:
    """Return (bytes of the head's gradients, which the forward pass computes; bytes of one chunk of the logits)."""
    model, e = spec.own, spec.value_bytes
    rows = model.vocab_size
    weight, chunks = rows * model.d_model, _chunks(spec)
    summed = chunks > 1 or spec.model.extra_heads > 0  # the weight's gradient is a sum of several products
    wide = e == 2 and (spec.device == "gpu" or summed)
    gradients = spec.predictions * model.d_model * e + weight * (4 if wide else e)
    product = weight * e if summed and spec.device == "cpu" and e == 2 else 0.0
    copy = 2 * weight if spec.autocast else 0.0
    return gradients + copy, spec.tokens * rows * e / chunks + product


def _chunks(spec: EngineSpec) -> int:
    """Return the number of chunks in which the logits are computed."""
    rows = spec.own.vocab_size
    logits = spec.tokens * rows * spec.value_bytes
    limit = CPU_CHUNK_BYTES if spec.device == "cpu" else GPU_CHUNK_BYTES
    lends = _adds_in_one_tensor(spec) and spec.accumulation == 1 and spec.model.extra_heads == 0
    if spec.device == "cpu" and lends and spec.model.logit_softcap is None and logits <= 4 * spec.parameters:
        return 1  # in the tensor that the gradients get later
    return max(1, int(-(-logits // limit)))


def _adds_in_one_tensor(spec: EngineSpec) -> bool:
    """Return whether gradients are added up in one fp32 tensor, as patches/flat_gradients.py does at ZeRO-1."""
    return spec.stage == 1 and spec.precision != "fp16" and not (spec.overlap or spec.offload_optimizer)


def _gathered(spec: EngineSpec) -> float:
    """Return the bytes of gathered weights at ZeRO-3: all weights, but at most stage3_max_live_parameters of them."""
    return spec.weight_bytes * min(spec.parameters, MAX_LIVE) if spec.stage == 3 else 0.0


def _accumulated(spec: EngineSpec) -> float:
    """Return the bytes of gradients that earlier micro batches of the step have accumulated."""
    if spec.stage == 3 or spec.accumulation == 1:
        return 0.0
    return held(spec.stage, spec.precision)[1].on(spec.ranks) * spec.parameters


def _gathering(spec: EngineSpec) -> Kinds:
    if spec.stage < 3:
        return {}
    flat = spec.weight_bytes * min(spec.prefetch_bucket, spec.parameters)
    kept, _ = _blocks(spec)
    later = _last_norm(spec) + _head(spec)[0]
    if spec.model.recomputed_blocks:  # a recomputed block frees what it has computed
        model, e = spec.own, spec.value_bytes
        part = max(attention_bytes(spec) + e * model.d_model, hidden_bytes(spec) + 3 * e * model.d_model)
        later = max(later, part * spec.tokens)
    return {
        "gathered": _gathered(spec), "communication": flat, "activations": kept + _embedding(spec) + later,
    }  # fmt: skip


def _end_of_forward(spec: EngineSpec) -> Kinds:
    """Return the bytes at the end of the forward pass by kind.

    After the logits of a chunk, the head computes first the losses, then the gradient of its weight. Only the larger of
    these two counts, except on CPUs if there is only one chunk and no extra head: memory then holds both at once.
    """
    kept, _ = _blocks(spec)
    gradients, logits = _head(spec)
    rows = spec.predictions * spec.model.d_model * spec.value_bytes  # the head's input, which nothing keeps
    losses, weight = _losses(spec), gradients - rows  # the weight's gradient comes after the first losses
    both = spec.device == "cpu" and _chunks(spec) == 1 and spec.model.extra_heads == 0
    # In fp32, ZeRO-1 with buckets keeps them from the first micro batch of a step to the last.
    keeps = spec.stage == 1 and spec.weight_bytes == 4 and spec.accumulation > 1 and not _adds_in_one_tensor(spec)
    bucket = _bucket(spec) if keeps else {}
    return bucket | {
        "gathered": _gathered(spec),
        "activations": kept + _embedding(spec) + _last_norm(spec) + rows + (weight if both or weight >= losses else 0),
        "logits": logits + rows + (losses if both or losses > weight else 0), "gradients": _accumulated(spec),
    }  # fmt: skip


def _losses(spec: EngineSpec) -> float:
    """Return the bytes that computing the losses of a chunk of logits takes in addition to the logits.

    The chunk is processed in blocks. Memory holds 1 fp32 copy of a block, plus 1 if the logits have 16 bits, plus 1
    with tensor parallelism, plus 1 (that of the previous block) if there are several blocks. Fused kernels
    need none without tensor parallelism.
    """
    if spec.kernels in ("native", "triton") and spec.tensor == 1:
        return 0.0
    block = CPU_BLOCK_ELEMENTS if spec.device == "cpu" else GPU_BLOCK_ELEMENTS
    every = spec.tokens * spec.own.vocab_size
    copies = (2 if spec.value_bytes == 2 else 1) + (spec.tensor > 1) + (every > block)
    return 4 * min(block, every) * copies


def _passing(spec: EngineSpec) -> float:
    """Return the bytes of the gradients of activations during the backward pass of one block."""
    wide = spec.value_bytes == 2 and spec.device == "cpu"  # attention in fp32
    return (5 if wide else 4) * spec.tokens * spec.own.n_head * spec.own.head_width * spec.value_bytes


def _passing_mlp(spec: EngineSpec) -> float:
    """Return the bytes of gradients of an MLP's hidden channels, and of its input, in the backward pass."""
    model, sparse = spec.own, spec.own.has_experts(spec.model.n_layer - 1)
    chosen = model.n_expert_active if sparse else 0
    width = (chosen + model.n_shared_expert) * model.expert_width if sparse else model.ff_width
    hidden = (2 if model.mlp == "swiglu" else 1) * width
    tokens = min(spec.tokens, model.mlp_chunk or spec.tokens)
    return (hidden + (1 + chosen) * model.d_model) * spec.value_bytes * tokens


def _start_of_backward(spec: EngineSpec) -> Kinds:
    """Return the memory at the start of the backward pass: after the head or in the first recomputed block, whichever
    is larger.
    """
    kept, block = _blocks(spec)
    gradients, _ = _head(spec)
    base = {"gathered": _gathered(spec)} | _bucket(spec)
    base["gradients"] = max(base.get("gradients", 0.0), _accumulated(spec))
    activations, passing = kept + _embedding(spec), max(_passing(spec), _passing_mlp(spec))
    tied = spec.own.vocab_size * spec.model.d_model if spec.model.tie_embeddings else 0
    waiting = tied * spec.value_bytes  # the head's part of a tied embedding's gradient
    if block and block + passing + waiting > _last_norm(spec) + gradients:
        if spec.stage == 3 and not spec.model.tie_embeddings:  # the head is not gathered any more
            rest = spec.parameters - spec.own.vocab_size * spec.model.d_model
            base["gathered"] = spec.weight_bytes * min(rest, MAX_LIVE)
        return base | {"activations": activations + waiting, "recompute": block + passing}
    head = activations + _last_norm(spec) + gradients
    return base | {"activations": head + (0 if block else _first_gradients(spec))}


def _first_gradients(spec: EngineSpec) -> float:
    """Return the bytes that the backward pass allocates right after the head: in the last norm or in the last block's
    MLP, whichever is more.

    The MLP allocates a gradient of its hidden channels and one of its second matrix; with SwiGLU, two of its hidden
    channels if that is more. What the last norm has kept is subtracted, because it is free by then.
    """
    model, sparse = spec.own, spec.own.has_experts(spec.own.n_layer - 1)
    width = model.ff_width if not sparse else model.n_expert_active * model.expert_width
    matrix = model.ff_width if not sparse else (model.n_expert or 0) / spec.expert * model.expert_width
    hidden = spec.predictions * width
    largest = max(hidden + matrix * model.d_model, 2 * hidden if model.mlp == "swiglu" else 0)
    copies = 5 if model.norm == "rmsnorm" and spec.value_bytes == 2 and spec.device == "cpu" else 1  # fp32 ones
    norm = copies * spec.predictions * model.d_model * spec.value_bytes
    return max(norm, largest * spec.value_bytes - _last_norm(spec))


def _bucket(spec: EngineSpec) -> Kinds:
    """Return the bytes that DeepSpeed allocates for gradients when the backward pass begins."""
    elements = spec.reduce_bucket * (2 if spec.overlap else 1)
    if spec.stage in (0, 3):
        return {}
    if _adds_in_one_tensor(spec):
        return {"gradients": 4 * spec.parameters}
    return {"buckets": spec.weight_bytes * elements}


def _end_of_backward(spec: EngineSpec) -> Kinds:
    """Return the bytes at the end of the backward pass by kind: gradients, and either the copies that their reduction
    makes or the block that is recomputed last, depending on the settings.
    """
    count, e = spec.parameters, spec.weight_bytes
    _, block = _blocks(spec)
    branch = _passing(spec)
    full = min(count, spec.reduce_bucket)
    gathered = {"gathered": _gathered(spec)}
    if spec.stage == 3:
        return gathered | {"recompute": block + branch, "gradients": 2.0 * e * spec.largest}
    if spec.stage == 0:
        copy = 4 * min(count, BUCKET) if spec.ranks > 1 else 0.0
        if copy > block + branch:
            return {"gradients": 4 * count, "communication": copy}
        return {"gradients": 4 * count, "recompute": block + branch}
    own = held(spec.stage, spec.precision)[1].on(spec.ranks) * count
    if _adds_in_one_tensor(spec):
        return {"gradients": own, "recompute": block + branch, "buckets": e * spec.largest}
    # The bucket, the gradients that it was filled from, and for 16 bits the fp32 copy that is sent.
    copies = {
        "buckets": e * spec.reduce_bucket * (2 if spec.overlap else 1),
        "communication": (e if e == 4 else e + 4) * full,
    }
    if spec.offload_optimizer:
        return copies | {"communication": e * full, "gradients": 2 * own if e == 2 else 0.0}
    if spec.stage == 1 and spec.accumulation > 1:  # the gradients are there already
        return copies | {"communication": 10.0 * spec.largest, "gradients": own}
    if spec.stage == 1:
        return copies | {"gradients": 4 * spec.largest}
    return copies | {"gradients": own if e == 2 else 0.0}


def _step(spec: EngineSpec) -> Kinds:
    """Return the memory in the optimizer's step: gradients and temporary tensors."""
    share = spec.parameters / (spec.ranks if spec.stage else 1)
    gradients = 4 * share if spec.stage < 3 else 0.0
    if spec.stage == 1 and spec.weight_bytes == 4 and spec.ranks > 1 and not _adds_in_one_tensor(spec):
        gradients = max(gradients, 4.0 * spec.largest)
    copies = 8 * min(share, spec.largest if spec.stage == 0 else share) if spec.adam_copies else 0.0
    if spec.offload_optimizer:
        return {"gradients": gradients if spec.weight_bytes == 2 and spec.stage < 3 else 0.0}
    return {"gradients": gradients, "optimizer": copies + (4 * share if spec.stage == 3 and spec.adam_copies else 0.0)}
