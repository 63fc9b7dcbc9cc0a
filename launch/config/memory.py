"""Bytes per parameter that a rank holds for weights, gradients and AdamW's two moments, without offload.

    held_bytes(2, "bf16", 8)          (3.5, 0.5): always, and for gradients until the end of the step

The numbers were measured. tests/test_memory.py compares them with DeepSpeed's engine on 8 and 1,024 ranks, and with the
table in ds_configs/README.md. They do not include activations, buckets (deepspeed_defaults.py) and the temporary memory
of kernels and collectives.
"""

from __future__ import annotations

from typing import NamedTuple


class Held(NamedTuple):
    """A rank's memory in bytes per parameter of the model: `complete` + `shared` / ranks.

    `complete`: bytes that every rank holds for each parameter. `shared`: bytes that ZeRO divides between the ranks.
    """

    complete: float
    shared: float

    def on(self, ranks: int) -> float:
        """Return the bytes per parameter of the model on each of `ranks` ranks."""
        return self.complete + self.shared / ranks

    def __str__(self) -> str:
        parts = [f"{self.complete:g}"] if self.complete or not self.shared else []
        return " + ".join(parts + ([f"{self.shared:g} / ranks"] if self.shared else []))


NOTHING = Held(0, 0)

# ZeRO stage -> (between steps, gradients). In fp32, and at stage 0 in bf16, which is autocast over fp32 weights.
FP32_WEIGHTS = {
    0: (Held(12, 0), Held(4, 0)),
    1: (Held(4, 12), Held(4, 0)),
    2: (Held(4, 12), Held(0, 4)),  # gradients: at least those of each matrix that the rank has a part of
    3: (Held(0, 20), NOTHING),  # a second copy of the weights, and gradients that are never freed
}

# With 16-bit weights: their fp32 copy is divided with the moments. Gradients add up in fp32.
BIT16_WEIGHTS = {
    1: (Held(2, 12), Held(4, 0)),
    2: (Held(2, 12), Held(0, 4)),
    3: (Held(0, 18), NOTHING),
}


def held(stage: int, precision: str) -> tuple[Held, Held]:
    """Return (memory that a rank always holds, memory that the gradients of a step add), without offload, for any
    number of ranks.

    stage: the ZeRO stage. precision: "fp32", "bf16" or "fp16".
    """
    return FP32_WEIGHTS[stage] if precision == "fp32" or stage == 0 else BIT16_WEIGHTS[stage]


def held_bytes(stage: int, precision: str, ranks: int) -> tuple[float, float]:
    """Return (bytes that a rank always holds, bytes that the gradients of a step add) per parameter of the model,
    without offload.

    stage: the ZeRO stage. precision: "fp32", "bf16" or "fp16".
    """
    kept, gradients = held(stage, precision)
    return kept.on(ranks), gradients.on(ranks)


def markdown() -> str:
    """Return the Markdown table of ds_configs/README.md: bytes per parameter for each precision and ZeRO stage."""
    lines = [
        "| precision | ZeRO | between steps | gradients of a step | both on 8 ranks | on 1,024 |",
        "|---|---|---|---|---|---|",
    ]
    for name, precision, stages in (("fp32", "fp32", FP32_WEIGHTS), ("bf16, fp16", "bf16", BIT16_WEIGHTS)):
        for stage in stages:
            kept, gradients = held(stage, precision)
            sums = [f"{sum(held_bytes(stage, precision, ranks)):.4g}" for ranks in (8, 1024)]
            lines.append(f"| {name} | {stage} | {kept} | {gradients} | {sums[0]} | {sums[1]} |")
    return "\n".join(lines)
