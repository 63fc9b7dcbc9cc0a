"""Alias of launch/cluster/agent.py, so that the command of version 0.1, `python -m packspeed.launch.node`, still
works.
"""

import sys

from packspeed.launch.cluster.agent import main

if __name__ == "__main__":
    sys.exit(main())
