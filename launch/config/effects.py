"""Answer two questions about a key of the run file: may it change on a resume, and can it change the loss?

checkpoint/resume.py refuses a resume according to the first answer. `packspeed report` groups the differences between
runs by the second. docs/run_file.md prints both. Keys are written with dots: "train.optimizer.lr".
"""

from __future__ import annotations

# Keys of the section model that change speed and memory, but not the function that the model computes.
MODEL_SPEED_ONLY = (
    "model.activation_checkpointing", "model.activation_offload", "model.mlp_chunk", "model.kernels",
)  # fmt: skip

FIXED = (
    "train.seed", "train.global_batch_tokens", "train.batch_warmup", "train.optimizer.name", "data.seq_len",
    "data.shuffle", "data.packing", "data.document_mask", "data.weights", "data.stages",
)  # fmt: skip

SPEED_ONLY = (
    "name", "runs_dir", "checkpoint.", "monitor.", "eval.", "train.micro_batch", "train.deterministic", "data.cache_",
    "parallel.", "deepspeed", *MODEL_SPEED_ONLY,
)  # fmt: skip


def fixed_on_resume(key: str) -> bool:
    """Return whether a resume is refused if this key of the run file, such as "train.seed", has changed.

    These keys define the model, the global batch, and the samples and their order. `data.weights` means the
    weights of data.sources.
    """
    return key in FIXED or (key.startswith("model.") and key not in MODEL_SPEED_ONLY)


def can_change_the_loss(key: str) -> bool:
    """Return whether this key of the run file, such as "data.path", can change the loss by more than rounding."""
    return not key.startswith(SPEED_ONLY)
