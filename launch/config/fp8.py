"""What `train.precision: fp8` means for other settings. Does not import torch; the arithmetic is in
model/fp8_linear.py.

fp8 changes only the matrix products of linear layers. Weights, gradients, optimizer and DeepSpeed configuration are the
same as with bf16.
"""

from __future__ import annotations

from packspeed.model.config import FP8_MULTIPLE, GPTConfig


def engine_precision(precision: str) -> str:
    """Return the precision of DeepSpeed's engine and of the tensors in checkpoints: "fp32", "bf16" or "fp16".

    It is the value of train.precision, except that "fp8" gives "bf16".
    """
    return "bf16" if precision == "fp8" else precision


def fp8_blocks(config: GPTConfig, skip_blocks: int) -> range:
    """Return the indices, from 0, of the transformer blocks whose linear layers multiply in fp8.

    The first and the last `skip_blocks` blocks stay in bf16.
    """
    return range(skip_blocks, config.n_layer - skip_blocks)


def fp8_obstacle(config: GPTConfig, seq_len: int, skip_blocks: int) -> str | None:
    """Return why a model cannot train in fp8, as the end of an error message; None if it can.

    seq_len: tokens per sample. skip_blocks: number of blocks at the start, and as many at the end, that stay in bf16.
    """
    if not fp8_blocks(config, skip_blocks):
        return (
            f"all {config.n_layer} blocks stay in bf16 with train.fp8_skip_blocks = {skip_blocks} at each end: "
            f"lower it to at most {(config.n_layer - 1) // 2}, or use bf16."
        )
    widths = {
        "data.seq_len": seq_len,
        "model.d_model": config.d_model,
        "the MLP's width (model.d_ff)": config.ff_width,
        "model.mlp_chunk": config.mlp_chunk or FP8_MULTIPLE,
        "the width of the shared experts (n_shared_expert x d_expert)": config.n_shared_expert * config.expert_width,
        "the width of all query heads (n_head x head_dim)": config.n_head * config.head_width,
        "the width of queries, keys and values (heads x head_dim)": config.qkv_width,
    }
    wrong = [f"{name} = {width}" for name, width in widths.items() if width % FP8_MULTIPLE]
    if not wrong:
        return None
    return (
        f"GPUs multiply in fp8 only if all sizes are multiples of {FP8_MULTIPLE}, but {', '.join(wrong)}. Change "
        "these sizes, or use bf16."
    )
