"""`packspeed ops build`: compile DeepSpeed's ops before the first run needs them.

Some imports are inside the function, because they load torch and DeepSpeed, which takes 2 s. --help comes without that
delay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from packspeed.launch.commands.options import Overrides
from packspeed.launch.config.batch import solve_batch
from packspeed.launch.config.deepspeed_json import load_ds_config, resolve_ds_config
from packspeed.launch.config.layout import Layout
from packspeed.launch.config.loading import load_run_file


def build(
    run_file: Annotated[
        Path | None,
        typer.Argument(help="Build the ops that this run file needs. Default: the ops that AdamW runs need."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Compile DeepSpeed's ops and Packspeed's kernels now, with progress.

    Without this command, the start of the first run compiles them.
    """
    from packspeed.launch.engine import ops
    from packspeed.launch.engine.build import resolve_kernels
    from packspeed.launch.engine.hardware import keep_memory

    names = [ops.FUSED_ADAM]
    if run_file is not None:
        run = load_run_file(run_file, overrides or [])
        plan = solve_batch(run.global_batch, run.data.seq_len, Layout(), 1)
        names = ops.needed_ops(resolve_ds_config(run, load_ds_config(run.deepspeed), plan, "fp32"))
    missing = ops.build_ops(names, lambda line: print(line, flush=True))
    for name, why in missing.items():
        print(f"note: {why}\nRuns use {ops.SUBSTITUTES[name]} instead.")
    keep_memory(sizes_vary=False, note=print)  # compiles the allocator that runs on CPUs use
    built = [name.removesuffix("Builder") for name in names if name not in missing]
    print(f"ops built: {', '.join(built) or 'none'}; kernels: {resolve_kernels('auto', print)}")
