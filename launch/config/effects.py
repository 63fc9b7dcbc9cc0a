"""What changing a key of the run file does: may a resume change it, and can it change the loss?

checkpoint/resume.py refuses a resume by the first answer, `packspeed report` groups differences by the second, and
docs/run_file.md prints both. Keys are dotted: "train.optimizer.lr".
"""

from __future__ import annotations

# Of the model, these change speed and memory but not the function that is computed.
MODEL_SPEED_ONLY = ("model.activation_checkpointing", "model.kernels")

FIXED = (
    "train.seed", "train.global_batch_tokens", "train.optimizer.name", "data.seq_len", "data.shuffle", "data.packing",
    "data.document_mask", "data.weights", "data.stages",
)  # fmt: skip

SPEED_ONLY = (
    "name", "runs_dir", "checkpoint.", "monitor.", "eval.", "train.micro_batch", "data.cache_", "deepspeed",
    *MODEL_SPEED_ONLY,
)  # fmt: skip


def fixed_on_resume(key: str) -> bool:
    """Whether a resume is refused if this key has changed: the model, the batch, or the samples and their order.

    `data.weights` is the list of the weights of data.sources.
    """
    return key in FIXED or (key.startswith("model.") and key not in MODEL_SPEED_ONLY)


def can_change_the_loss(key: str) -> bool:
    """Whether this key can change the loss by more than the rounding of another order of additions."""
    return not key.startswith(SPEED_ONLY)
