"""Alias of launch/cluster/agent.py: scripts rendered by version 0.1 run `python -m packspeed.launch.node`."""

from packspeed.launch.cluster.agent import main

if __name__ == "__main__":
    main()
