"""Alias of launch/cluster/k8s_entry.py. Kubernetes Jobs written by version 0.1 run `python -m packspeed.launch.pod`."""

import sys

from packspeed.launch.cluster.k8s_entry import main

if __name__ == "__main__":
    sys.exit(main())
