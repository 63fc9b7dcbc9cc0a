"""Train a run file: `deepspeed launch/train.py --config launch/configs/quickstart.yaml [--set key.path=value ...]`.

If the run has a checkpoint, the same command continues it from the newest complete one. With --fresh, the old run
folder is moved aside and the run starts at step 0. Exit codes: 0 finished, 1 failed, 2 wrong usage or config, 75
stopped by a signal (repeat the command to continue). The run file and the DeepSpeed JSON are checked before torch is
imported, so that a typing error is reported in a fraction of a second.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import sys
import time
from collections.abc import Sequence

from packspeed.data.errors import PackspeedError
from packspeed.data.storage.open_files import raise_open_file_limit
from packspeed.launch.config.unattended import continue_without_reader, end_process
from packspeed.launch.training.signals import stop_while_starting


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line of train.py. DeepSpeed's launcher appends the option --local_rank."""
    parser = argparse.ArgumentParser(prog="train.py", description="Train a GPT as described in a run file.")
    parser.add_argument("--config", required=True, help="the run file (YAML)")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="override a value of the run file; can be repeated",
    )
    parser.add_argument("--fresh", action="store_true", help="move an existing run folder aside and start at step 0")
    parser.add_argument(
        "--deepspeed_config", metavar="FILE", help="use this DeepSpeed JSON instead of the one in the run file"
    )
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Check the run file and the DeepSpeed JSON, then train. Returns the exit code.

    A PackspeedError is caught; rank 0 prints it as one paragraph.
    """
    stop_while_starting()  # before the other imports, which take seconds
    raise_open_file_limit()
    args = parse_args(argv)
    try:
        return _train(args)
    except PackspeedError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(2)  # when a rank exits, the launcher kills the others: let rank 0 print its error first
        return error.exit_code


def _train(args: argparse.Namespace) -> int:
    """Check the run file and the DeepSpeed JSON, then train. Returns the exit code; raises PackspeedError."""
    from packspeed.launch.config.deepspeed_json import load_ds_config
    from packspeed.launch.config.loading import load_run_file
    from packspeed.launch.config.run_data import open_data
    from packspeed.launch.engine.patches.check import check_sources
    from packspeed.launch.engine.quiet import DeepSpeedLogFilter
    from packspeed.launch.run_folder.heartbeat import LAUNCH_ID, Heartbeat, keep_logs

    overrides = list(args.overrides)
    if file := args.deepspeed_config:
        overrides.append(f"deepspeed={file if '/' in file else './' + file}")
    run = load_run_file(args.config, overrides)
    heartbeat: Heartbeat | None = None
    if LAUNCH_ID in os.environ:  # started by `packspeed launch`
        rank = int(os.environ.get("RANK", 0))
        keep_logs(run.folder / "logs", rank)
        heartbeat = Heartbeat(run.folder / "logs", rank, platform.node(), step=0)
        heartbeat("starting")
    with DeepSpeedLogFilter() as log_filter:
        dataset, ds_config = open_data(run), load_ds_config(run.deepspeed)
        check_sources()
        # This import loads torch and DeepSpeed, which takes seconds. Errors in the files have been reported before.
        if heartbeat:
            heartbeat("importing")
        # Looking for garbage while importing takes a fifth of the time, and there is little.
        gc.disable()
        from packspeed.launch.training.startup import start_training

        gc.freeze()
        gc.enable()
        return start_training(run, ds_config, dataset, args.fresh, log_filter, heartbeat)


if __name__ == "__main__":
    continue_without_reader()
    end_process(main())
