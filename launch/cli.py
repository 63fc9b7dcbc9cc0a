"""The `packspeed` command. Each command imports what it needs when it runs: inspect must not wait for torch.

Exit codes: 0 done, 1 the thing asked about failed, 2 wrong usage or config, 75 saved and stopped on a signal.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from packspeed.launch.commands import cluster as cluster_commands
from packspeed.launch.commands import data as data_commands
from packspeed.launch.commands import model as model_commands
from packspeed.launch.commands import run as run_commands
from packspeed.launch.commands.run import Overrides

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Pretrain GPTs with DeepSpeed."
)


data_commands.register(app)


model_commands.register(app)


run_commands.register(app)


cluster_commands.register(app)


ops_app = typer.Typer(no_args_is_help=True, help="DeepSpeed's compiled ops.")


app.add_typer(ops_app, name="ops")


@app.command()
def train(
    run_file: Annotated[Path, typer.Argument(help="The run file (YAML).")],
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option(help="Move an existing run folder aside and start at step 0.")] = False,
    ranks: Annotated[int | None, typer.Option(help="Ranks on this machine; default: all GPUs, else the cores.")] = None,
) -> None:
    """Train on this machine: checks both files, then runs deepspeed launch/train.py."""
    from packspeed.launch.cluster.local_launcher import default_ranks, launcher_command, run_launcher
    from packspeed.launch.config.batch import solve_batch
    from packspeed.launch.config.deepspeed_json import load_ds_config
    from packspeed.launch.config.errors import ConfigError
    from packspeed.launch.config.loading import load_run_file

    run = load_run_file(run_file, overrides or [])
    load_ds_config(run.deepspeed)
    count = ranks if ranks is not None else default_ranks(run)
    if count < 1:
        raise ConfigError(f"--ranks {count}: at least one rank is needed.")
    solve_batch(run.global_batch, run.data.seq_len, count, run.train.micro_batch)
    arguments = ["--config", str(run_file), *(f"--set={o}" for o in overrides or []), *(["--fresh"] if fresh else [])]
    raise typer.Exit(run_launcher(launcher_command(count, arguments)))


@app.command()
def reshard(
    run: Annotated[Path, typer.Argument(help="A run folder, or one checkpoint in it.")],
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Convert a checkpoint ahead, so that it resumes at once with other ranks, another ZeRO stage or precision."""
    from packspeed.launch.checkpoint.reshard import resharded_folder
    from packspeed.launch.inference.generate import find_checkpoint

    def say(line: str) -> None:
        print(line, file=sys.stderr if json_output else sys.stdout, flush=True)

    checkpoint = find_checkpoint(run)
    folder = resharded_folder(checkpoint, None, say)
    print(json.dumps({"checkpoint": str(checkpoint), "universal": str(folder)}) if json_output else f"ready: {folder}")


@app.command()
def prove(
    run_file: Annotated[Path, typer.Argument(help="The run file (YAML).")],
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="Steps of the shortened run.")] = 18,
    ranks: Annotated[int | None, typer.Option(help="Ranks on this machine; default as in train.")] = None,
    other_ranks: Annotated[int | None, typer.Option(help="Ranks of the second resume; default half as many.")] = None,
    seed: Annotated[int | None, typer.Option(help="Repeats a proof: when and whom the kill hits.")] = None,
    keep: Annotated[bool, typer.Option(help="Keep the runs of a proof that held.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Prove that this run resumes exactly: kill it at a random step, resume, compare. Exit code 1: it does not."""
    from packspeed.launch.trials import prove as proofs

    chosen = proofs.seed_of_the_day() if seed is None else seed
    plan = proofs.make_plan(run_file, overrides or [], steps, ranks, other_ranks, chosen)
    legs = proofs.prove(plan, lambda line: print(line, file=sys.stderr if json_output else sys.stdout, flush=True))
    found = proofs.report(plan, legs, chosen)
    if found["ok"] and not keep:
        shutil.rmtree(plan.folder)
    if json_output:
        print(json.dumps(found))
    else:
        print("proved." if found["ok"] else f"NOT proved (--seed {chosen} repeats it); the runs are in {plan.folder}")
    raise typer.Exit(0 if found["ok"] else 1)


@app.command()
def schema() -> None:
    """Print the JSON Schema of run files, for editors."""
    from packspeed.launch.config.run_file import RunFile

    print(json.dumps(RunFile.model_json_schema(), indent=2))


@ops_app.command("build")
def ops_build(
    run_file: Annotated[
        Path | None, typer.Argument(help="Build what this run file needs; default: what most runs need.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Compile DeepSpeed's ops and our kernels now, with progress, instead of in silence at the first step."""
    from packspeed.launch.config.batch import solve_batch
    from packspeed.launch.config.deepspeed_json import load_ds_config, resolve_ds_config
    from packspeed.launch.config.loading import load_run_file
    from packspeed.launch.engine import ops
    from packspeed.launch.engine.build import resolve_kernels

    device = ops.device_type()
    names = [ops.SHM_COMM, ops.FUSED_ADAM] if device == "cpu" else [ops.FUSED_ADAM]
    if run_file is not None:
        run = load_run_file(run_file, overrides or [])
        plan = solve_batch(run.global_batch, run.data.seq_len, 1, 1)
        names = ops.needed_ops(resolve_ds_config(run, load_ds_config(run.deepspeed), plan, "fp32"), device)
    missing = ops.build_ops(names, lambda line: print(line, flush=True))
    for name, why in missing.items():
        print(f"note: {why}\nRuns go on with {ops.SUBSTITUTES[name]}.")
    built = [name.removesuffix("Builder") for name in names if name not in missing]
    print(f"ops are built: {', '.join(built) or 'none'}; kernels: {resolve_kernels('auto', print)}")


def main() -> None:
    """Entry point: expected errors become one paragraph on stderr and their exit code."""
    try:
        app()
    except Exception as error:
        from packspeed.data.errors import PackspeedError

        if not isinstance(error, PackspeedError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
