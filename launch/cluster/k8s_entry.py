"""The command of each pod of a Kubernetes Job that `packspeed launch` has written: run the ranks of one node.

    python -m packspeed.launch.cluster.k8s_entry --nodes 2 --ranks 8 --master NAME-0.NAME --port 29500
        -- --config RUNFILE ...

The index of the node is in JOB_COMPLETION_INDEX, which Kubernetes sets in every pod of an Indexed Job. If a pod is
evicted, Kubernetes sends SIGTERM to it. The signal is passed on to the ranks only (local_launcher.run_launcher), which
save and exit with 75, and the pod exits with the same code.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from packspeed.launch.cluster.local_launcher import node_launcher_command, run_launcher
from packspeed.launch.config.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ranks of this pod until they end, and return their launcher's exit code.

    Returns 2 if JOB_COMPLETION_INDEX is not a valid index of a node.
    """
    parser = argparse.ArgumentParser(prog="packspeed.launch.cluster.k8s_entry", description="Run the ranks of one pod.")
    parser.add_argument("--nodes", type=int, required=True, help="number of nodes of the job")
    parser.add_argument("--ranks", type=int, required=True, help="number of ranks per node")
    parser.add_argument("--master", required=True, help="name or address of node 0")
    parser.add_argument("--port", type=int, required=True, help="port of torch's rendezvous on node 0")
    parser.add_argument("arguments", nargs="+", help="arguments of train.py, after --")
    args = parser.parse_args(argv)
    try:
        index = node_index(os.environ.get("JOB_COMPLETION_INDEX", ""), args.nodes)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    world_info = {f"node-{node}": list(range(args.ranks)) for node in range(args.nodes)}
    return run_launcher(node_launcher_command(world_info, index, args.master, args.port, args.arguments))


def node_index(text: str, nodes: int) -> int:
    """Return the node's index, 0 to nodes - 1, from the text of JOB_COMPLETION_INDEX. Raises ConfigError if it is
    invalid.
    """
    if not text.isdecimal() or int(text) >= nodes:
        raise ConfigError(
            f"JOB_COMPLETION_INDEX={text!r} must be a number below --nodes={nodes}. Kubernetes sets it in the pods of "
            "a Job with completionMode: Indexed."
        )
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
