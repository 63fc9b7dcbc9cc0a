"""Compare the losses of variants of Muon after a few steps: python tests/bench/muon_bench.py TEXT [STEPS] [SEED ...]

A GPT of 4 layers and 128 channels learns the characters of TEXT, 1,536 of them per step, with one thread, without
DeepSpeed. The loss is that of the last tenth of the text. Prints a line per variant and seed.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch

from packspeed.launch.config.run_file import OptimizerSection
from packspeed.launch.engine.groups import MATRICES, optimizer_groups
from packspeed.launch.engine.muon import Matrix, Muon, Round
from packspeed.model.config import GPTConfig
from packspeed.model.gpt import GPT, init_weights, stacked_matrices

LENGTH, ROWS, WARMUP, DECAY = 64, 24, 20, 0.4
ADAM_LR, MUON_LR = 3e-3, 0.02
VARIANTS: dict[str, dict[str, Any]] = {
    "quintic, 5 iterations": {},
    "fused matrices": {"split_fused": False},
    "quintic, 3 iterations": {"ns_steps": 3},
    "polar_express, 5 iterations": {"ns_coefficients": "polar_express"},
    "polar_express, 3 iterations": {"ns_coefficients": "polar_express", "ns_steps": 3},
    "NorMuon 0.95": {"row_beta": 0.95},
    "NorMuon 0.99": {"row_beta": 0.99},
}


def make_muon(model: GPT, settings: OptimizerSection) -> Muon:
    """Return a Muon optimizer for one process, which has complete matrices."""
    optimizer = Muon(optimizer_groups(model, settings), functools.partial(torch.optim.AdamW, lr=ADAM_LR), settings)
    matrices = []
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = next(group["params"] for group in optimizer.param_groups if group["name"] == MATRICES)
    for p in parameters:
        start = 0
        for rows, columns in stacked_matrices(names[p], p.shape, model.config, settings.split_fused):
            matrices.append(Matrix(rows, columns, p, start, [(0, rows * columns)]))
            start += rows * columns
    optimizer.rounds = {parameters[0]: [Round(matrices, 0, True, None)]}
    return optimizer


def windows(tokens: torch.Tensor, starts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and labels, (rows, LENGTH) each, of the windows of `tokens` that begin at `starts`."""
    rows = torch.stack([tokens[start : start + LENGTH + 1] for start in starts])
    return rows[:, :-1], rows[:, 1:].contiguous()


def train(tokens: torch.Tensor, vocab_size: int, steps: int, seed: int, options: dict[str, Any]) -> float:
    """Train a model and return its validation loss."""
    model = GPT(GPTConfig(
        n_layer=4, n_head=4, d_model=128, vocab_size=vocab_size, max_seq_len=LENGTH, position="rope", qk_norm=True,
        norm="rmsnorm", bias=False, tie_embeddings=False,
    ))  # fmt: skip
    init_weights(model, seed)
    settings = OptimizerSection(name="muon", lr=ADAM_LR, weight_decay=0.01, **options)
    optimizer, generator = make_muon(model, settings), torch.Generator().manual_seed(seed)
    cut = len(tokens) * 9 // 10
    for step in range(steps):
        shape = min(1.0, (step + 1) / WARMUP, (steps - step) / (DECAY * steps))
        for group in optimizer.param_groups:
            group["lr"] = shape * (MUON_LR if group["name"] == MATRICES else ADAM_LR)
            group["momentum"] = 0.85 + 0.1 * min(1.0, step / 100)
        starts = torch.randint(cut - LENGTH, (ROWS,), generator=generator).tolist()
        model(*windows(tokens, starts)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    starts = list(range(cut, len(tokens) - LENGTH, LENGTH))
    with torch.no_grad():
        parts = [starts[i : i + 200] for i in range(0, len(starts), 200)]
        total = sum(float(model(*windows(tokens, part))) * len(part) for part in parts)
    return total / len(starts)


def main() -> None:
    """Train every variant with every seed."""
    torch.set_num_threads(1)
    text = Path(sys.argv[1]).read_text()
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([number[character] for character in text])
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 300
    for seed in map(int, sys.argv[3:] or ["1", "2"]):
        for name, options in VARIANTS.items():
            print(f"seed {seed}, {name}: {train(tokens, len(number), steps, seed, options):.4f}", flush=True)


if __name__ == "__main__":
    main()
