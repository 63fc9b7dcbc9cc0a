"""Measure the time of attention with a sliding window at several row lengths, with C++ and with torch's kernels.

    python tests/bench/window_bench.py [WINDOW]

Prints CPU seconds of one thread per 1,000 tokens, forward and backward. With a window they should not grow with the
length.
"""

from __future__ import annotations

import sys
import time

import torch

from packspeed.model import attention, native_kernels

HEADS, KV_HEADS, WIDTH = 4, 2, 64
LENGTHS = (1024, 2048, 4096, 8192)


def seconds(module: object, dtype: torch.dtype, length: int, window: int | None) -> float:
    """Return the least of three times of a forward and a backward pass over one row."""
    x = torch.randn(1, length, HEADS + 2 * KV_HEADS, WIDTH, dtype=dtype, requires_grad=True)
    best = float("inf")
    for _ in range(3):
        began = time.process_time()
        y = module.attend(*x.split([HEADS, KV_HEADS, KV_HEADS], dim=2), None, window)  # type: ignore[attr-defined]
        y.sum().backward()
        best = min(best, time.process_time() - began)
    return best


def main() -> None:
    """Print a table: one line per kernel, dtype and window, one column per length."""
    torch.set_num_threads(1)
    window = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    print(f"CPU seconds per 1,000 tokens at {LENGTHS} tokens; {HEADS} heads of {WIDTH}, {KV_HEADS} key-value heads")
    for name, module in (("C++", native_kernels), ("torch", attention)):
        for dtype in (torch.float32, torch.bfloat16):
            for wide in (None, window):
                each = [seconds(module, dtype, length, wide) / length * 1000 for length in LENGTHS]
                kind = str(dtype).removeprefix("torch.")
                print(f"{name:6}{kind:10}window {wide or 'none':<6}", *(f"{s:8.3f}" for s in each))


if __name__ == "__main__":
    main()
