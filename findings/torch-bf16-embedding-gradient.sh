#!/bin/bash
# torch 2.13.0 on a CPU: in bf16 the embedding gradient of a frequent token stops growing.
#
# Guess:    The backward pass of an embedding adds the rows of a token in fp32 and rounds once, as sum, cumsum, index_add
#           and scatter_add do with bf16 tensors on the same CPU.
# Instead:  It adds row by row in bf16. With 8 bits of mantissa 256 + 1 is 256: a token that occurs 1,000 times in the batch,
#           each time with a gradient of 1, gets 256. index_put_(accumulate=True) does the same; fp16 stops at 2,048.
# Output:   embedding, 1000 times 1: bfloat16 256, float16 1000, float32 1000
#           embedding, 5000 times 1: bfloat16 256, float16 2048, float32 5000
#           bfloat16, 1000 times 1: index_put_ 256, index_add_ 1000, scatter_add_ 1000, sum 1000, cumsum 1000
. "$(dirname "$0")/venv.sh"
venv torch==2.13.0 numpy==2.4.6
"$python" - <<'PYTHON'
import torch

types = (torch.bfloat16, torch.float16, torch.float32)


def gradient(dtype: torch.dtype, times: int) -> float:
    weight = torch.zeros(10, 4, dtype=dtype, requires_grad=True)
    torch.nn.functional.embedding(torch.full((times,), 3), weight).sum().backward()
    return weight.grad[3, 0].item()


for times in (1000, 5000):
    got = [gradient(dtype, times) for dtype in types]
    print(f"embedding, {times} times 1: " + ", ".join(f"{str(t)[6:]} {g:.0f}" for t, g in zip(types, got)))
    assert got == [256, min(times, 2048), times], "the accumulation has changed"

index, ones = torch.full((1000,), 3), torch.ones(1000, 4, dtype=torch.bfloat16)
zeros = lambda: torch.zeros(10, 4, dtype=torch.bfloat16)
others = {
    "index_put_": zeros().index_put_((index,), ones, accumulate=True)[3, 0],
    "index_add_": zeros().index_add_(0, index, ones)[3, 0],
    "scatter_add_": zeros().scatter_add_(0, index[:, None].expand(-1, 4), ones)[3, 0],
    "sum": ones[:, 0].sum(),
    "cumsum": ones[:, 0].cumsum(0)[-1],
}
print("bfloat16, 1000 times 1: " + ", ".join(f"{name} {value:.0f}" for name, value in others.items()))
assert [value.item() for value in others.values()] == [256, 1000, 1000, 1000, 1000]
PYTHON
