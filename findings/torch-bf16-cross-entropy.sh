#!/bin/bash
# torch 2.13.0 on a CPU: cross_entropy over bf16 logits is wrong by far more than the rounding of its result.
#
# Guess:    The loss is rounded to bf16 once: log(50) = 3.912 becomes 3.906 or 3.922.
# Instead:  The rows' losses are added in bf16 too. All rows have the same loss, 3.906, and yet their mean is 3.984, and it
#           depends on how many rows there are. reduction="none" followed by mean() gives 3.906, as mean() adds in fp32.
# Output:   rows          8     64    256   4096
#           cross_entropy 3.891 3.938 3.984 3.984
#           none, mean()  3.906 3.906 3.906 3.906
#           fp32 logits   3.912 3.912 3.912 3.912
. "$(dirname "$0")/venv.sh"
venv torch==2.13.0 numpy==2.4.6
"$python" - <<'PYTHON'
import math

import torch
from torch.nn.functional import cross_entropy

rows = (8, 64, 256, 4096)
direct, by_mean, fp32 = [], [], []
for count in rows:
    logits, targets = torch.zeros(count, 50, dtype=torch.bfloat16), torch.zeros(count, dtype=torch.long)
    direct.append(cross_entropy(logits, targets).item())
    by_mean.append(cross_entropy(logits, targets, reduction="none").mean().item())
    fp32.append(cross_entropy(logits.float(), targets).item())
print("rows         ", *(f"{count:<5}" for count in rows))
for name, losses in (("cross_entropy", direct), ("none, mean() ", by_mean), ("fp32 logits  ", fp32)):
    print(name, *(f"{loss:.3f}" for loss in losses))
assert direct[-1] == 3.984375 and len(set(direct)) > 1, "the mean has changed"
assert set(by_mean) == {3.90625} and abs(fp32[-1] - math.log(50)) < 1e-5
PYTHON
