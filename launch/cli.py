"""The `packspeed` command: a table of commands, whose modules are imported when the command runs.

COMMANDS maps the words of a command to its function and to one line of help. `packspeed --help` prints these lines and
imports none of the modules, so it takes 0.2 s; importing torch and DeepSpeed would take 2 s.
tests/test_commands.py checks that the lines of help equal the docstrings of the functions.

Exit codes: 0 = done, 1 = failed, 2 = wrong usage or config, 75 = saved and stopped by a signal (repeat the command).
"""

from __future__ import annotations

import errno
import gc
import importlib
import io
import os
import sys
from typing import Any, NamedTuple, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from packspeed.data.errors import PackspeedError
from packspeed.data.storage.open_files import raise_open_file_limit
from packspeed.launch.config.unattended import end_process


class Target(NamedTuple):
    """A command's function, as "module:function" in the package packspeed.launch.commands, and its line of help."""

    function: str
    help: str


# Shown in this order by `packspeed --help`; "ops build" is the command `build` of the group `ops`.
COMMANDS = {
    "prepare": Target("prepare:prepare", "Turn text into a token dataset. Run it again to continue after a crash."),
    "inspect": Target("inspect:inspect", "Print what a dataset contains, or what a run will read from each dataset."),
    "verify": Target("inspect:verify", "Check every byte of a dataset: hashes, indices, token ids, document ends."),
    "audit": Target("audit:audit", "List the documents in a training step, or the steps that saw a document."),
    "import-data": Target(
        "exchange:import_data", "Make a dataset from Megatron, nanoGPT, llm.c, modded-nanogpt, numpy or MosaicML files."
    ),
    "export-data": Target("exchange:export_data", "Write a dataset in another project's format."),
    "generate": Target("generate:generate", "Continue prompts with a checkpoint of a run, on the CPU or one GPU."),
    "eval": Target(
        "evaluate:evaluate", "Measure a model: perplexity and bits per byte, or lm-evaluation-harness tasks."
    ),
    "export": Target("convert:export", "Export a model: safetensors, config, tokenizer and model card."),
    "import": Target("convert:import_", "Make a run folder from the weights of another project, to train from there."),
    "bench": Target("bench:bench", "Measure step time, tokens/s, MFU and memory of a run on this machine."),
    "explain": Target("explain:explain", "Print every effective setting, who set it, and what is wrong with it."),
    "plan": Target("plan:plan", "Predict memory, step time and cost of a run, with their errors."),
    "goodput": Target("observe:goodput", "Show where the wall-clock time of a run went, over all restarts."),
    "report": Target("observe:report", "Write an HTML report that compares runs; it needs no network."),
    "watch": Target("observe:watch", "Follow a run from its files, in another terminal or on another host."),
    "launch": Target("launch:launch", "Train on the hosts of a hostfile; restart after failures."),
    "doctor": Target("doctor:doctor", "Check that every host is ready to train. Exit code 1: a check failed."),
    "rehearse": Target(
        "rehearse:rehearse", "Rehearse a cluster job on this machine: tiny model, CPU ranks, optional faults."
    ),
    "train": Target(
        "train:train", "Train on this machine: check the configuration, then run deepspeed launch/train.py."
    ),
    "mup-check": Target(
        "mup_check:mup_check", "Check that activations and their changes do not depend on the width (muP)."
    ),
    "sweep": Target("sweep:sweep", "Train every combination of some values and seeds, and compare the losses."),
    "reshard": Target(
        "reshard:reshard", "Convert a checkpoint now, so that it resumes without delay in another layout."
    ),
    "prove": Target("prove:prove", "Prove that a run resumes exactly: kill it at a random step, resume, compare."),
    "schema": Target("schema:schema", "Print the schema of run files, as JSON Schema or as Markdown."),
    "tokenizer train": Target("tokenizer:train", "Train a byte-level BPE tokenizer."),
    "ops build": Target("ops:build", "Compile DeepSpeed's ops and Packspeed's kernels now, with progress."),
}

GROUPS = {"tokenizer": "Train tokenizers.", "ops": "DeepSpeed's compiled ops."}


class LazyCommand(TyperCommand):
    """A command whose module is imported when it is used. Until then, only its name and its line of help are known."""

    def __init__(self, name: str, target: Target) -> None:
        super().__init__(name, help=target.help)
        self.target = target

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **extra: Any) -> Any:
        """Import the command's module, and parse `args` with the command that is defined there.

        Returns the context of that command. Click then invokes it.
        """
        module, _, function = self.target.function.partition(":")
        real = typer.Typer(add_completion=False)
        real.command(self.name)(getattr(importlib.import_module(f"packspeed.launch.commands.{module}"), function))
        return typer.main.get_command(real).make_context(info_name, args, *more, **extra)


class CommandTable(TyperGroup):
    """The top-level group of commands, made from COMMANDS, with a sub-group for each name in GROUPS."""

    def __init__(self, **attributes: Any) -> None:
        attributes["commands"] = {words: LazyCommand(words, t) for words, t in COMMANDS.items() if " " not in words}
        for group, text in GROUPS.items():
            children: dict[str, Any] = {
                words.split()[1]: LazyCommand(words.split()[1], target)
                for words, target in COMMANDS.items()
                if words.startswith(f"{group} ")
            }
            attributes["commands"][group] = TyperGroup(name=group, commands=children, help=text, no_args_is_help=True)
        super().__init__(**attributes)


app = typer.Typer(cls=CommandTable, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def packspeed() -> None:
    """Pretrain GPTs with DeepSpeed."""


def command() -> NoReturn:
    """Run the `packspeed` command as main() does, then end the process at once. The console script calls this.

    After an exception that main() does not handle, Python ends the process, with a traceback.
    """
    try:
        main()
    except SystemExit as ended:
        if isinstance(ended.code, str) and sys.stderr is not None:
            print(ended.code, file=sys.stderr)
        end_process(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
    end_process(0)


def main() -> None:
    """Run the `packspeed` command with the arguments in sys.argv.

    Here, and nowhere else, a PackspeedError becomes one paragraph on stderr and an exit code.
    """
    gc.set_threshold(50_000)  # with Python's 700, collections take a tenth of the time of the imports
    raise_open_file_limit()
    if sys.stdout is None:  # started with a closed stdout
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
    if isinstance(sys.stdout, io.TextIOWrapper):  # escape characters that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # a full disk or a closed pipe must raise here, not when the interpreter exits
    except PackspeedError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes stdout again when it exits
        if error.errno != errno.EPIPE:  # a closed pipe, as in `packspeed explain run.yaml | head`, is not an error
            print(f"error: {error.filename or 'standard output'}: {error.strerror or error}.", file=sys.stderr)
        sys.exit(1)
