"""The train entry: `deepspeed launch/train.py --config launch/configs/quickstart.yaml [--set key.path=value ...]`.

The same command again continues the run from its newest complete checkpoint; `--fresh` moves the old folder aside.
Exit codes: 0 finished, 1 failed, 2 wrong usage or config, 75 stopped on a signal (start it again).
Both files are checked before torch is imported, so that a typo is answered in a fraction of a second.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from packspeed.data.errors import PackspeedError
from packspeed.launch.training.signals import stop_while_starting


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of train.py; --local_rank is what DeepSpeed's launcher appends."""
    parser = argparse.ArgumentParser(prog="train.py", description="Train a GPT as described in a run file.")
    parser.add_argument("--config", required=True, help="the run file (YAML)")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="override a setting of the run file; repeatable",
    )
    parser.add_argument("--fresh", action="store_true", help="move an existing run folder aside, start at step 0")
    parser.add_argument("--deepspeed_config", metavar="FILE", help="DeepSpeed JSON, instead of the run file's")
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Check both files, then train. An expected error becomes one paragraph on rank 0 and an exit code."""
    stop_while_starting()  # before the other imports: a second here, later ten for torch and DeepSpeed
    args = parse_args(argv)
    try:
        return _train(args)
    except PackspeedError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(2)  # the launcher kills all ranks at the first exit: let rank 0 print first
        return error.exit_code


def _train(args: argparse.Namespace) -> int:
    from packspeed.launch.config.deepspeed_json import load_ds_config
    from packspeed.launch.config.loading import load_run_file
    from packspeed.launch.config.run_data import open_data
    from packspeed.launch.engine.patches.check import check_sources
    from packspeed.launch.engine.quiet import DeepSpeedLogFilter
    from packspeed.launch.run_folder.heartbeat import LAUNCH_ID, keep_logs

    overrides = list(args.overrides)
    if file := args.deepspeed_config:
        overrides.append(f"deepspeed={file if '/' in file else './' + file}")
    run = load_run_file(args.config, overrides)
    if LAUNCH_ID in os.environ:  # started by `packspeed launch`
        keep_logs(run.folder / "logs", int(os.environ.get("RANK", 0)))
    with DeepSpeedLogFilter() as log_filter:
        dataset, ds_config = open_data(run), load_ds_config(run.deepspeed)
        check_sources()
        # Only now torch and DeepSpeed, which take seconds to import: a typo is answered before.
        from packspeed.launch.training.startup import start_training

        return start_training(run, ds_config, dataset, args.fresh, log_filter)


if __name__ == "__main__":
    sys.exit(main())
