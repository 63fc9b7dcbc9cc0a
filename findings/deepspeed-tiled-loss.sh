#!/bin/bash
# DeepSpeed 0.19.8 with torch 2.13.0: the gradient of TiledFusedLogitsLoss ignores a factor on the head's weights.
#
# Guess:    (loss / 2).backward() halves every gradient, whichever function has computed the loss.
# Instead:  TiledFusedLogitsLoss makes the gradient of the head in its forward pass, with the factor 1, and its backward
#           pass multiplies only the gradient of the hidden states by the factor. DeepSpeed itself divides the loss by the
#           number of accumulated micro batches, so with accumulation the head learns that many times too fast, in silence.
# Output:   factor 1: gradient of x 1.000, of the head 1.000 of the true one
#           factor 1/2: gradient of x 1.000, of the head 2.000 of the true one
#           factor 1/4: gradient of x 1.000, of the head 4.000 of the true one
. "$(dirname "$0")/venv.sh"
venv torch==2.13.0 numpy==2.4.6 deepspeed==0.19.8 ninja==1.13.2 setuptools==84.2.1
cat >"$scratch/tiled.py" <<'PYTHON'
import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

torch.manual_seed(0)
head = torch.nn.Linear(16, 50, bias=False)
hidden, labels = torch.randn(2, 32, 16), torch.randint(0, 50, (2, 32))


def loss_of(module: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(module(x).flatten(0, -2), y.flatten())


def gradients(tiled: bool, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    head.weight.grad, x = None, hidden.clone().requires_grad_()
    if tiled:
        loss = TiledFusedLogitsLoss.apply(loss_of, head, x, labels, None, 4, [head.weight], "mean")
    else:
        loss = loss_of(head, x, labels)
    (loss * factor).backward()
    return x.grad, head.weight.grad


for name, factor in (("1", 1.0), ("1/2", 0.5), ("1/4", 0.25)):
    ratios = [(a.norm() / b.norm()).item() for a, b in zip(gradients(True, factor), gradients(False, factor))]
    print(f"factor {name}: gradient of x {ratios[0]:.3f}, of the head {ratios[1]:.3f} of the true one")
PYTHON
output=$("$python" -W ignore "$scratch/tiled.py" 2>"$scratch/log" | grep "^factor") || { cat "$scratch/log" >&2; exit 2; }
printf '%s\n' "$output"
[[ $(sed 's/.*head \([0-9.]*\) .*/\1/' <<<"$output" | xargs) == "1.000 2.000 4.000" ]]
