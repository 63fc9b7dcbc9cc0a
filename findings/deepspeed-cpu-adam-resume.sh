#!/bin/bash
# DeepSpeed 0.19.8 with torch 2.13.0: CPU Adam resumed from its complete state takes another step than without the resume.
#
# Guess:    Parameters, both moments and the step are all there is to Adam, so a resume from them is exact on one CPU.
# Instead:  The kernel keeps beta^t as a running product, which is in no state_dict. After a resume the step jumps, and it
#           takes pow(beta, t), which now and then rounds otherwise: after 5 steps the next one differs in the last bits,
#           after 3, 4, 6 and 8 it does not. A test with one resume point can pass by luck.
# Output:   resumed after 3: equal, 4: equal, 5: differs at step 6 by 2.4e-07, 6: equal, 8: equal
. "$(dirname "$0")/venv.sh"
venv torch==2.13.0 numpy==2.4.6 deepspeed==0.19.8 ninja==1.13.2 setuptools==84.2.1
cat >"$scratch/adam.py" <<'PYTHON'
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam

LAST = 16


def noise(seed: int) -> torch.Tensor:
    return torch.randn(1000, generator=torch.Generator().manual_seed(seed))


def steps(weights: torch.Tensor, state: dict | None, first: int, last: int) -> tuple[list[torch.Tensor], dict]:
    """The weights after each of the steps first to last, and the optimizer's state then."""
    parameter = torch.nn.Parameter(weights.clone())
    optimizer = DeepSpeedCPUAdam([parameter], lr=1e-3)
    if state is not None:
        optimizer.load_state_dict(state)
    curve = []
    for step in range(first, last + 1):
        parameter.grad = noise(step)
        optimizer.step()
        curve.append(parameter.detach().clone())
    return curve, optimizer.state_dict()


uninterrupted, _ = steps(noise(0), None, 1, LAST)
words = []
for stop in (3, 4, 5, 6, 8):
    curve, state = steps(noise(0), None, 1, stop)
    resumed, _ = steps(curve[-1], state, stop + 1, LAST)
    wrong = [i for i, weights in enumerate(resumed) if not torch.equal(weights, uninterrupted[stop + i])]
    gap = max((a - b).abs().max().item() for a, b in zip(resumed, uninterrupted[stop:]))
    words.append(f"{stop}: " + (f"differs at step {stop + 1 + wrong[0]} by {gap:.1e}" if wrong else "equal"))
print("resumed after " + ", ".join(words))
different = [word for word in words if "differs" in word]
assert different and len(different) < len(words), "all resumes are exact now, or none is"
PYTHON
"$python" -W ignore "$scratch/adam.py" 2>"$scratch/log" | grep "^resumed" || { cat "$scratch/log" >&2; exit 1; }
