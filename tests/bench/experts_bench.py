"""Compare a step with experts with a step of a dense model of the same FLOPs, and count routing flips in bf16.

    python tests/bench/experts_bench.py                          both, on this machine's CPUs or GPU
    python tests/bench/experts_bench.py --flips runs/moe_small   flips with the weights of a run, on its validation data

The forward and backward passes of the two models are timed alternately. A flip is a token for which a layer chooses
other experts: in bf16 than in fp32 with the same weights, or in bf16 in a batch of one row than in the full batch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from packspeed.launch.config.run_data import make_run_loader, open_data
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.inference.load_model import find_checkpoint, load_model
from packspeed.model.config import GPTConfig, flops_per_token, num_parameters
from packspeed.model.gpt import GPT, init_weights
from packspeed.model.moe import Router

LLAMA: dict[str, Any] = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False, "vocab_size": 8192}


def model_of(device: str, dtype: torch.dtype, **fields: Any) -> GPT:
    """Return a model with random weights."""
    model = GPT(GPTConfig(**LLAMA | fields))
    init_weights(model, 1)
    return model.to(device, dtype)


def step_s(model: GPT, tokens: torch.Tensor) -> float:
    """Return the seconds of one forward and backward pass."""
    start = time.perf_counter()
    model(tokens, tokens).backward()
    if tokens.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    for parameter in model.parameters():
        parameter.grad = None
    return seconds


def compare_steps(device: str, dtype: torch.dtype, rounds: int, width: int, experts: int, active: int) -> None:
    """Time steps of a model with experts and of a dense one alternately, and print the ratio of their times."""
    shape = {"n_layer": 4, "n_head": width // 64, "d_model": width, "max_seq_len": 512}
    dense = model_of(device, dtype, **shape, d_ff=2 * width)
    mixture = model_of(device, dtype, **shape, n_expert=experts, n_expert_active=active, d_expert=2 * width // active)
    tokens = torch.randint(0, 8192, (8, 512), device=device)
    times: dict[str, list[float]] = {"dense": [], "experts": []}
    for _ in range(rounds + 2):
        times["dense"].append(step_s(dense, tokens))
        times["experts"].append(step_s(mixture, tokens))
    ratios = [b / a for a, b in zip(times["dense"][2:], times["experts"][2:], strict=True)]
    flops = [flops_per_token(model.config, 512) for model in (dense, mixture)]
    ratio, ratio_of_least = statistics.median(ratios), min(times["experts"][2:]) / min(times["dense"][2:])
    medians = {name: statistics.median(values[2:]) for name, values in times.items()}
    print(
        f"{device} {dtype}: width {width}, {active} of {experts} experts of {2 * width // active}, 4,096 tokens, "
        f"{num_parameters(mixture.config) / 1e6:.0f} M parameters ({num_parameters(dense.config) / 1e6:.0f} M dense), "
        f"FLOPs {flops[1] / flops[0]:.3f} times: step {medians['experts']:.3f} s, dense {medians['dense']:.3f} s; "
        f"ratio {ratio:.2f} (median of {rounds} pairs), {ratio_of_least:.2f} (least)",
        flush=True,
    )


@torch.no_grad()
def choices(model: GPT, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the experts of every token in every layer, sorted: (layers, tokens, K)."""
    found: dict[int, list[torch.Tensor]] = {}
    routers = [module for module in model.modules() if isinstance(module, Router)]

    def keep(module: torch.nn.Module, inputs: object, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        found.setdefault(id(module), []).append(output[1].sort(1).values.cpu())

    hooks = [router.register_forward_hook(keep) for router in routers]
    for batch in batches:
        model.hidden(batch)
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.cat(found[id(router)]) for router in routers])


def count_flips(model: GPT, tokens: torch.Tensor, what: str) -> None:
    """Print the share of tokens whose experts change from fp32 to bf16, and from the full batch to single rows."""
    model.eval()
    exact = choices(model, [tokens])
    alone = choices(model, tokens.split(1))
    half = model.to(torch.bfloat16)
    rounded, rounded_alone = choices(half, [tokens]), choices(half, tokens.split(1))

    def share(a: torch.Tensor, b: torch.Tensor) -> list[float]:
        return [round(float((x != y).any(1).float().mean()), 5) for x, y in zip(a, b, strict=True)]

    print(f"{what}: share of {exact.size(1):,} tokens whose experts change, per layer")
    print(f"  fp32 to bf16                       {share(exact, rounded)}")
    print(f"  bf16, full batch to single rows    {share(rounded, rounded_alone)}")
    print(f"  fp32, full batch to single rows    {share(exact, alone)}", flush=True)


def validation_rows(config: dict[str, Any], rows: int) -> torch.Tensor:
    """Return validation windows of a run, (rows, T)."""
    run = RunFile.model_validate({**config, "model": {k: v for k, v in config["model"].items() if v is not None}})
    loader = make_run_loader(run, open_data(run))
    windows = min(rows, loader.val_available())
    return torch.from_numpy(loader.eval_batch(list(range(windows)), windows).tokens[:, :-1].astype("int64"))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--flips", type=Path, help="a run folder: only count flips, with its weights")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.flips:
        model, config = load_model(find_checkpoint(args.flips))
        count_flips(model, validation_rows(config, 64), str(args.flips))
        return
    for dtype in (torch.float32, torch.bfloat16):
        for experts, active in ((8, 2), (32, 4)):
            compare_steps(device, dtype, args.rounds, 512, experts, active)
    model = model_of("cpu", torch.float32, n_layer=4, n_head=8, d_model=512, max_seq_len=512, n_expert=32, d_expert=128)
    count_flips(model, torch.randint(0, 8192, (8, 512)), "random weights, 2 of 32 experts")


if __name__ == "__main__":
    main()
