"""Alias of launch/cluster/agent.py, so that `python -m packspeed.launch.node` of version 0.1 still works."""

import sys

from packspeed.launch.cluster.agent import main

if __name__ == "__main__":
    sys.exit(main())
