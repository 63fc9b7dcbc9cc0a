"""`packspeed ops build`: compile DeepSpeed's ops before the first run needs them.

The imports inside the function load torch and DeepSpeed, 4 s: --help must not wait for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from packspeed.launch.commands.options import Overrides
from packspeed.launch.config.batch import solve_batch
from packspeed.launch.config.deepspeed_json import load_ds_config, resolve_ds_config
from packspeed.launch.config.loading import load_run_file


def build(
    run_file: Annotated[
        Path | None, typer.Argument(help="Build the ops that this run file needs. Default: those that most runs need.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Compile DeepSpeed's ops and Packspeed's kernels now, with progress.

    Otherwise the first training step compiles them, without a message.
    """
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
        print(f"note: {why}\nRuns continue with {ops.SUBSTITUTES[name]}.")
    built = [name.removesuffix("Builder") for name in names if name not in missing]
    print(f"ops built: {', '.join(built) or 'none'}; kernels: {resolve_kernels('auto', print)}")
