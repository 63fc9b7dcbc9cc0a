"""Find the best learning rate of several widths, with and without muP: python tests/bench/mup_bench.py TEXT

One model per width and learning rate, of 2 layers with heads of 32 channels, trained by AdamW for the same steps on the
same batches of TEXT's bytes, in one process. Prints the loss of each on the same rows of the last tenth of TEXT, which
is not trained on (mean over the seeds), the best rate of each width by a parabola through the lowest loss and its
neighbours, and how far these rates are apart. --standard adds the models without muP, which takes as long again.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from packspeed.launch.config.run_file import TrainSection
from packspeed.launch.engine.groups import optimizer_groups, set_rates
from packspeed.model.config import GPTConfig
from packspeed.model.gpt import GPT, init_weights
from packspeed.model.mup import scales

HEAD, BASE, SEQ_LEN, HELD_OUT_ROWS = 32, 64, 64, 512


def final_loss(data: torch.Tensor, width: int, lr: float, steps: int, rows: int, seed: int, mup: bool) -> float:
    """Train one model on the first nine tenths of `data`, and return its loss on rows of the last tenth."""
    shape: dict[str, Any] = {"n_layer": 2, "n_head": width // HEAD, "d_model": width, "vocab_size": 256}
    config = GPTConfig(
        **shape, max_seq_len=SEQ_LEN, norm="rmsnorm", position="rope", qk_norm=True, bias=False,
        mup={"base_width": BASE} if mup else None,
    )  # fmt: skip
    model = GPT(config)
    init_weights(model, seed)
    settings = {"name": "adamw", "lr": lr, "weight_decay": 0.0}
    schedule = {"name": "linear", "warmup_steps": steps // 10}
    train = TrainSection(steps=steps, global_batch_tokens=rows * SEQ_LEN, optimizer=settings, schedule=schedule)
    options = train.optimizer
    optimizer = torch.optim.AdamW(optimizer_groups(model, options), lr=lr, betas=options.betas, fused=True)
    border, draw = len(data) * 9 // 10, np.random.default_rng(seed)
    for step in range(steps):
        batch = windows(data, draw.integers(0, border - SEQ_LEN - 1, rows))
        set_rates(optimizer.param_groups, step, train, scales(config))
        optimizer.zero_grad()
        model(batch[:, :-1], batch[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    held_out = windows(data, np.linspace(border, len(data) - SEQ_LEN - 1, HELD_OUT_ROWS).astype(np.int64))
    with torch.no_grad():
        return float(model(held_out[:, :-1], held_out[:, 1:]))


def windows(data: torch.Tensor, starts: np.ndarray) -> torch.Tensor:
    """Return the SEQ_LEN + 1 bytes of `data` from each start on, (starts, SEQ_LEN + 1)."""
    return torch.stack([data[start : start + SEQ_LEN + 1] for start in starts.tolist()])


def best(rates: list[float], losses: list[float]) -> float:
    """Return the learning rate at the minimum of a parabola in log(rate) through the lowest loss and its neighbours."""
    at = int(np.argmin(losses))
    if at in (0, len(rates) - 1) or not np.isfinite(losses[at - 1 : at + 2]).all():
        return rates[at]
    x = np.log(rates[at - 1 : at + 2])
    a, b, _ = np.polyfit(x, losses[at - 1 : at + 2], 2)
    return math.exp(-b / (2 * a)) if a > 0 else rates[at]


def main() -> None:
    """Print a table for muP, and with --standard one for models without it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--widths", default="64,128,256,512")
    parser.add_argument("--rates", default="0.004,0.008,0.016,0.032")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--standard", action="store_true")
    options = parser.parse_args()
    data = torch.frombuffer(bytearray(options.text.read_bytes()), dtype=torch.uint8).long()
    widths, rates = [int(w) for w in options.widths.split(",")], [float(r) for r in options.rates.split(",")]
    seeds = [int(s) for s in options.seeds.split(",")]
    for mup in (True, False) if options.standard else (True,):
        print(f"{'muP' if mup else 'standard'}: loss over learning rates, {options.steps} steps of {options.rows} rows")
        print("width  " + "".join(f"{rate:>9g}" for rate in rates) + "     best")
        optima = []
        for width in widths:
            losses = [
                float(np.mean([final_loss(data, width, rate, options.steps, options.rows, s, mup) for s in seeds]))
                for rate in rates
            ]
            optima.append(best(rates, losses))
            print(f"{width:<7}" + "".join(f"{x:9.4f}" for x in losses) + f"{optima[-1]:9.4f}", flush=True)
        print(f"the best rates differ by a factor of {max(optima) / min(optima):.2f}\n", flush=True)


if __name__ == "__main__":
    main()
