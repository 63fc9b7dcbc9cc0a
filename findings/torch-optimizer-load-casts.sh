#!/bin/bash
# torch 2.13.0: an optimizer's load_state_dict rounds fp32 states to the type of the parameters.
#
# Guess:    load_state_dict(state_dict()) restores an optimizer. Optimizers for bf16 weights keep their moments in fp32.
# Instead:  Optimizer.load_state_dict converts every state tensor of a floating-point parameter to the parameter's type,
#           unless its name is "step". Moments in fp32 become bf16, and so does a counter of int64 with another name. No
#           warning follows. The next step of an optimizer that makes its moments once continues with bf16 moments, in
#           which small updates are lost. torch.save and torch.load on the way change nothing.
# Output:   saved:  exp_avg torch.float32 1.0010000467300415, tokens torch.int64 16777217
#           loaded: exp_avg torch.bfloat16 1.0000000000000000, tokens torch.bfloat16 16777216
. "$(dirname "$0")/venv.sh"
venv torch==2.13.0 numpy==2.4.6
"$python" -W ignore - <<'PYTHON'
import torch


class Momentum(torch.optim.Optimizer):
    """Keeps fp32 moments and a counter for bf16 weights."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-3})
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {"exp_avg": torch.full((4,), 1.001), "tokens": torch.tensor([2**24 + 1])}


weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
saved, loaded = Momentum([weight]), Momentum([weight])
loaded.load_state_dict(saved.state_dict())
shown = []
for label, optimizer in (("saved: ", saved), ("loaded:", loaded)):
    average, tokens = (optimizer.state[weight][name] for name in ("exp_avg", "tokens"))
    print(f"{label} exp_avg {average.dtype} {float(average[0]):.16f}, tokens {tokens.dtype} {int(tokens[0])}")
    shown.append((average.dtype, tokens.dtype))
assert shown[0] == (torch.float32, torch.int64)
assert shown[1] == (torch.bfloat16, torch.bfloat16), "load_state_dict keeps the types now"
PYTHON
