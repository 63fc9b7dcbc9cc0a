#!/bin/bash
# torchdata 0.11.0 with torch 2.13.0: the order of a shuffled StatefulDataLoader depends on whether it has workers.
#
# Guess:    StatefulDataLoader is a drop-in replacement for DataLoader: with one seed both give one order, whatever
#           num_workers is, as DataLoader does.
# Instead:  There are three orders. StatefulDataLoader has its own sampler, which draws its seed another way, and with workers
#           it creates the sampler's iterator once for its first state and again for the data, so that the first
#           permutation is thrown away: epoch 1 with workers is epoch 2 without. A generator passed in changes nothing.
# Output:   DataLoader         0 workers, two epochs: 3752081694 | 1327590648    (1 and 2 workers: the same)
#           StatefulDataLoader 0 workers, two epochs: 4175390862 | 6795043218
#           StatefulDataLoader 1 workers, two epochs: 6795043218 | 2906741385    (2 workers: the same)
. "$(dirname "$0")/venv.sh"
venv torch==2.13.0 numpy==2.4.6 torchdata==0.11.0
"$python" -W ignore - <<'PYTHON'
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader


def epochs(loader_class: type, workers: int) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    loader = loader_class(list(range(10)), batch_size=5, shuffle=True, num_workers=workers, generator=generator)
    return ["".join(str(i) for batch in loader for i in batch.tolist()) for _ in range(2)]


orders = {(c.__name__, w): epochs(c, w) for c in (DataLoader, StatefulDataLoader) for w in (0, 1, 2)}
for (name, workers), order in orders.items():
    print(f"{name:<18} {workers} workers, two epochs: {' | '.join(order)}")
plain, stateful = [[orders[name, w] for w in (0, 1, 2)] for name in ("DataLoader", "StatefulDataLoader")]
assert plain[0] == plain[1] == plain[2]
assert stateful[0] != plain[0] and stateful[1] == stateful[2] != stateful[0], "the orders have changed"
assert stateful[1][0] == stateful[0][1], "epoch 1 with workers is no longer epoch 2 without"
PYTHON
