"""`packspeed generate`: generate text with a checkpoint.

Some imports are inside the function, because they load torch, which takes 1 s. --help and usage errors come
without that delay.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from packspeed.launch.commands.options import CheckpointStep, Json, RunOrCheckpoint, TokenizerFile
from packspeed.launch.config.errors import ConfigError


def generate(
    run: RunOrCheckpoint,
    prompt: Annotated[list[str] | None, typer.Option(help="The text to continue (repeatable).")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Generate at most this many tokens.")] = 200,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Divide the logits by this number; 0 = always take the most likely token.")
    ] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the K most likely tokens; 0 = from all.")] = 200,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Sample from the most likely tokens whose probabilities sum to at least this number."
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random numbers.")] = 1337,
    num_samples: Annotated[
        int, typer.Option(min=1, help="Number of texts per prompt. The seed is raised by 1 for each further text.")
    ] = 1,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Read prompts from the terminal, one per line, and continue each.")
    ] = False,
    checkpoint: CheckpointStep = None,
    tokenizer: TokenizerFile = None,
    json_output: Json = False,
) -> None:
    """Continue prompts with a checkpoint of a run, on the CPU or one GPU.

    The checkpoint may have been written at any ZeRO stage.
    """
    prompts = prompt or [""]
    if interactive and (json_output or prompt or num_samples > 1):
        raise ConfigError(
            "--interactive reads prompts from the terminal: leave out --prompt, --num-samples and --json."
        )
    if top_p == 0.0:
        raise ConfigError(
            "--top-p 0 leaves no token to choose: give a number above 0, or --temperature 0 for the most likely token."
        )
    from packspeed.launch.inference.generate import SamplingSettings, TextGenerator, generate_all, run_dialog

    settings = SamplingSettings(max_new_tokens, temperature, top_k, top_p, seed)
    generator = TextGenerator(run, checkpoint, tokenizer)
    if interactive:
        print("Type the beginning of a text. Ctrl-C stops a continuation, Ctrl-D quits.", file=sys.stderr)
        run_dialog(generator, settings, lambda: input("> "), _print_piece)
        return
    if len(prompts) * num_samples == 1:
        if not json_output:
            _print_piece(prompts[0])
        (result,) = generator.generate(prompts, settings, on_text=None if json_output else _print_piece)
        facts = {
            "checkpoint": str(generator.checkpoint),
            "prompt": result.prompt,
            "text": result.text,
            "tokens": result.tokens,
        }
        print(json.dumps(facts) if json_output else "")
        return
    results = generate_all(generator, prompts, settings, num_samples)
    if json_output:
        print(json.dumps(results))
        return
    for sample in results["samples"]:
        print(f"{sample['prompt']}{sample['text']}\n{'-' * 40}", flush=True)


def _print_piece(text: str) -> None:
    """Print a piece of generated text at once and without a newline, so that the next piece follows it."""
    print(text, end="", flush=True)
