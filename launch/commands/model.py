"""The commands on a run's model: generate, eval, export, import. torch is imported when one of them runs."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

Run = Annotated[Path, typer.Argument(help="A run folder, or one checkpoint in it.")]


Step = Annotated[
    int | None, typer.Option("--checkpoint", min=0, metavar="STEP", help="That step's; default: the newest.")
]


TokenizerFile = Annotated[str | None, typer.Option(help="Instead of the run's own: a name or a file.")]


Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def register(app: typer.Typer) -> None:
    """Add these commands to the `packspeed` command."""
    app.command()(generate)
    app.command("eval")(eval_)
    app.command()(export)
    app.command("import")(import_)


def _say(piece: str) -> None:
    print(piece, end="", flush=True)


def generate(
    run: Run,
    prompt: Annotated[list[str] | None, typer.Option(help="The text to continue (repeatable).")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="0: all tokens.")] = 200,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 1337,
    num_samples: Annotated[int, typer.Option(min=1, help="Continuations of each prompt; seeds count up.")] = 1,
    interactive: Annotated[bool, typer.Option("--interactive", help="Continue every line that is typed.")] = False,
    checkpoint: Step = None,
    tokenizer: TokenizerFile = None,
    json_output: Json = False,
) -> None:
    """Continue prompts with a run's newest checkpoint, from any ZeRO stage, on the CPU or one GPU."""
    from packspeed.launch.config.errors import ConfigError
    from packspeed.launch.inference.generate import Sampling, Writer, converse, write_many

    prompts = prompt or [""]
    if interactive and (json_output or prompt or num_samples > 1):
        raise ConfigError(
            "--interactive reads its prompts from the terminal: leave --prompt, --num-samples, --json out."
        )
    if top_p == 0.0:
        raise ConfigError("--top-p 0 keeps no token: give a number above 0, or --temperature 0 for the likeliest.")
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    writer = Writer(run, checkpoint, tokenizer)
    if interactive:
        print("Type the beginning of a text. Ctrl-C stops a continuation, Ctrl-D ends.", file=sys.stderr)
        converse(writer, sampling, lambda: input("> "), _say)
        return
    if len(prompts) * num_samples == 1:
        if not json_output:
            _say(prompts[0])
        (text,) = writer.write(prompts, sampling, say=None if json_output else _say)
        known = {"checkpoint": str(writer.checkpoint), "prompt": text.prompt, "text": text.text, "tokens": text.tokens}
        print(json.dumps(known) if json_output else "")
        return
    result = write_many(writer, prompts, sampling, num_samples)
    if json_output:
        print(json.dumps(result))
        return
    for each in result["samples"]:
        print(f"{each['prompt']}{each['text']}\n{'-' * 40}", flush=True)


def eval_(
    run: Run,
    data: Annotated[str | None, typer.Option(metavar="DIR", help="A prepared dataset; default: the run's own.")] = None,
    split: Annotated[str, typer.Option(help="val or train.")] = "val",
    seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens of a window; default: the run's.")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="Less than seq_len: windows overlap.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The first so many; default: all.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Instead: tasks of lm-evaluation-harness, by comma.")] = None,
    include_path: Annotated[str | None, typer.Option(metavar="DIR", help="A folder of task files.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task.")] = None,
    checkpoint: Step = None,
    tokenizer: TokenizerFile = None,
    json_output: Json = False,
) -> None:
    """Measure a run's model: perplexity and bits per byte on a dataset, or tasks of lm-evaluation-harness."""
    from packspeed.launch.config.errors import ConfigError

    if tasks is not None:
        from packspeed.launch.inference.lm_eval_adapter import run_tasks

        settings: dict[str, Any] = {"include_path": include_path, "num_fewshot": num_fewshot, "limit": limit}
        with redirect_stdout(sys.stderr):  # the harness prints as it goes
            found = run_tasks(run, tasks.split(","), step=checkpoint, tokenizer=tokenizer, **settings)
        lines = [
            f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in rows.items() if isinstance(value, float))
            for task, rows in found["results"].items()
        ]
        _show(found, lines, json_output)
        return
    if split not in ("train", "val"):
        raise ConfigError(f"--split {split}: there is train and val.")
    from packspeed.launch.inference.perplexity import evaluate

    found = evaluate(
        run, data=data, split=split, step=checkpoint, seq_len=seq_len, stride=stride, max_tokens=max_tokens
    )
    lines = [
        f"{each['data']} ({each['split']}): perplexity {each['perplexity']:.4f} per token, loss {each['loss']:.4f}, "
        f"{each['bits_per_byte'] or float('nan'):.4f} bits per byte; {each['tokens']:,} tokens, {each['bytes']:,} bytes"
        for each in found["results"]
    ]
    _show(found, lines, json_output)


def export(
    run: Run,
    out: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.")],
    to: Annotated[str, typer.Option(help="The format: hf, what Hugging Face transformers loads.")] = "hf",
    dtype: Annotated[str, typer.Option(help="Of the weights: fp32, bf16 or fp16.")] = "fp32",
    checkpoint: Step = None,
    shard_size: Annotated[float, typer.Option(min=1e-6, help="Most that a weight file holds, in 1e9 bytes.")] = 2.0,
    tokenizer: TokenizerFile = None,
    json_output: Json = False,
) -> None:
    """Write a run's model for other tools: safetensors, config, tokenizer, model card."""
    from packspeed.launch.config.errors import ConfigError
    from packspeed.launch.convert.export import export_hf

    if to != "hf":
        raise ConfigError(f"--to {to}: there is only hf.")
    found = export_hf(run, out, dtype=dtype, step=checkpoint, shard_bytes=int(shard_size * 1e9), tokenizer=tokenizer)
    line = (
        f"{found['path']}: {found['architecture']} in {found['dtype']}, {found['bytes'] / 1e6:,.1f} MB in "
        f"{len(found['files'])} file(s), from {found['checkpoint']}"
    )
    _show(found, [line], json_output)


def import_(
    kind: Annotated[str, typer.Argument(metavar="hf|nanogpt", help="What is imported.")],
    source: Annotated[Path, typer.Argument(help="hf: a folder with config.json and safetensors; nanogpt: a ckpt.pt.")],
    out: Annotated[Path, typer.Option(help="The run folder to make, <runs_dir>/<name>.")],
    data: Annotated[str | None, typer.Option(help="The dataset to go on with, for the run file.")] = None,
    json_output: Json = False,
) -> None:
    """Make a run folder from another project's weights; `packspeed train` goes on from them at step 0."""
    from packspeed.launch.config.errors import ConfigError
    from packspeed.launch.convert.import_weights import import_hf, import_nanogpt

    if kind not in ("hf", "nanogpt"):
        raise ConfigError(f"import {kind}: there is hf and nanogpt.")
    found = (import_hf if kind == "hf" else import_nanogpt)(source, out, data)
    lines = [
        f"{found['path']}: {found['parameters']:,} parameters from {found['source']}",
        *(f"note: {note}" for note in found["notes"]),
        f"next: look through {found['run_file']}, then packspeed train {found['run_file']}",
    ]
    _show(found, lines, json_output)


def _show(facts: dict[str, Any], lines: list[str], json_output: bool) -> None:
    print(json.dumps(facts) if json_output else "\n".join(lines))
