#!/bin/bash
# torch 2.13.0: iterating over a DataLoader that is not shuffled changes every random number that follows.
#
# Guess:    With shuffle=False and num_workers=0 nothing about a DataLoader is random, so an evaluation between two training
#           steps leaves dropout masks as they are.
# Instead:  Each iterator draws a seed for its workers, also if it has none, from torch's default generator. One loader that
#           is iterated once more, for example by a validation that runs at another interval, gives other dropout masks
#           and another order of the training data in the next epoch. A generator of the loader's own prevents that.
# Output:   next random number: 0.4963 without a validation, 0.0885 after one, 0.4963 if the loader has its own generator
. "$(dirname "$0")/venv.sh"
venv torch==2.13.0 numpy==2.4.6
"$python" -W ignore - <<'PYTHON'
import torch
from torch.utils.data import DataLoader


def next_number(loader: DataLoader | None) -> float:
    torch.manual_seed(0)
    for _ in loader or []:
        pass
    return torch.rand(()).item()


none = next_number(None)
plain = next_number(DataLoader(list(range(4))))
own = next_number(DataLoader(list(range(4)), generator=torch.Generator().manual_seed(0)))
print(f"next random number: {none:.4f} without a validation, {plain:.4f} after one, "
      f"{own:.4f} if the loader has its own generator")
assert none != plain and none == own, "the loader leaves the generator alone now"
PYTHON
