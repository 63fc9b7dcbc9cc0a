#!/bin/bash
# torch 2.13.0 on a CPU: the fp32 vector norm of a large tensor is off in the third digit.
#
# Guess:    torch.norm is as exact as torch.sum, which adds in blocks: about 1e-7 at any size.
# Instead:  vector_norm keeps a few running fp32 sums. The larger they are, the more of each square is rounded away, always
#           downwards in the end. clip_grad_norm_, get_total_norm and _foreach_norm are the same kernel, so gradients are
#           clipped by a wrong norm. The square root of a sum of squares, two lines of Python, is right.
# Output:   100000 elements: norm off by -3.4e-07, sqrt of sum +4.4e-08
#           19000000 elements: norm off by -9.2e-04, sqrt of sum -5.3e-09
#           19000000 elements: get_total_norm off by -9.2e-04
. "$(dirname "$0")/venv.sh"
venv torch==2.13.0 numpy==2.4.6
"$python" - <<'PYTHON'
import torch

torch.manual_seed(0)
for size in (100_000, 19_000_000):
    x = torch.randn(size)
    exact = x.double().square().sum().sqrt().item()
    norm, by_sum = x.norm().item() / exact - 1, x.square().sum().sqrt().item() / exact - 1
    print(f"{size} elements: norm off by {norm:+.1e}, sqrt of sum {by_sum:+.1e}")
total = torch.nn.utils.get_total_norm([x]).item() / exact - 1
print(f"{size} elements: get_total_norm off by {total:+.1e}")
assert abs(norm) > 3e-4 and abs(total) > 3e-4, "the norm is exact now"
assert abs(by_sum) < 1e-6
PYTHON
