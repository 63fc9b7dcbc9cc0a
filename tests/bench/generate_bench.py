"""Compare the speed of `packspeed generate` with transformers' generate() and with generation without a KV cache.

    python tests/bench/generate_bench.py [--prompts 8] [--new 32] [--rounds 3]

One model with random weights of GPT-2's family (6 layers, width 384, vocabulary 4,096, fp32) is imported as a run and
exported from it again. The three methods continue the same prompts of different lengths greedily in one batch, in
turn. Their tokens must be equal. The program prints medians and ratios.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from packspeed.launch.convert.export import export_hf
from packspeed.launch.convert.import_weights import import_hf
from packspeed.launch.inference.load_model import find_checkpoint, load_model
from packspeed.model.generate import stream
from packspeed.model.gpt import GPT

Rows = list[list[int]]


def ours(model: GPT, prompts: Rows, new: int) -> Rows:
    """Generate as `packspeed generate` does: with a KV cache, and all rows in one batch."""
    columns = [column.tokens for column in stream(model, prompts, new, temperature=0.0, seeds=range(len(prompts)))]
    return torch.stack(columns, 1).tolist()


def without_cache(model: GPT, prompts: Rows, new: int) -> Rows:
    """Generate with the same model without a cache: each token needs a forward pass of all tokens before it."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.zeros(len(prompts), int(lengths.max()) + new, dtype=torch.int64)
    rows = torch.arange(len(prompts))
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    with torch.no_grad():
        for step in range(new):
            logits = model(tokens[:, : int(lengths.max()) + step])
            tokens[rows, lengths + step] = logits[rows, lengths + step - 1].argmax(-1)
    return [tokens[row, len(prompt) : len(prompt) + new].tolist() for row, prompt in enumerate(prompts)]


def theirs(model: AutoModelForCausalLM, prompts: Rows, new: int) -> Rows:
    """Generate with transformers' generate(), with padding on the left as its documentation recommends."""
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    return model.generate(padded, attention_mask=mask, eos_token_id=None, **settings)[:, width:].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("prompts", 8), ("new", 32), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = {"n_positions": 512, "n_embd": 384, "n_layer": 6, "n_head": 6, "vocab_size": 4096}
        shape |= {"bos_token_id": 0, "eos_token_id": 0}
        GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(folder / "random")
        import_hf(folder / "random", folder / "run")
        export_hf(folder / "run", folder / "hf", tokenizer="bytes")
        model, hf = load_model(find_checkpoint(folder / "run"))[0], AutoModelForCausalLM.from_pretrained(folder / "hf")
    prompts = [torch.randint(4_096, (20 + 25 * row,)).tolist() for row in range(asked.prompts)]
    kinds = {
        "packspeed, KV cache": lambda: ours(model, prompts, asked.new),
        "transformers generate()": lambda: theirs(hf.eval(), prompts, asked.new),
        "packspeed, no cache": lambda: without_cache(model, prompts, asked.new),
    }
    seconds = {kind: [] for kind in kinds}
    for _ in range(asked.rounds):
        found = {}
        for kind, generate in kinds.items():
            start = time.perf_counter()
            found[kind] = generate()
            seconds[kind].append(time.perf_counter() - start)
        assert len({str(rows) for rows in found.values()}) == 1, "they do not write the same"
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    first = medians["packspeed, KV cache"]
    lengths = f"{len(prompts[0])} to {len(prompts[-1])}"
    print(f"{asked.prompts} prompts of {lengths} tokens, {asked.new} new each; {torch.get_num_threads()} threads")
    for kind, median in medians.items():
        print(f"{kind:<26}{asked.prompts * asked.new / median:>8.1f} tokens/s   {median / first:>6.2f} times our time")


if __name__ == "__main__":
    main()
