#!/bin/bash
# triton 3.7.1: the interpreter converts 1.95 to 1.0 in e4m3: a carry out of the mantissa is lost.
#
# Guess:    TRITON_INTERPRET=1 gives the numbers of a GPU: x.to(tl.float8e4nv) rounds to the nearest, as cvt.rn does.
# Instead:  Rounding up adds 1 to the three bits of the mantissa and combines them with the exponent by "or". If all
#           three are 1, the carry falls on the exponent's last bit: where that is 0 it is added, where it is 1 it is
#           lost, and the result is half of what it should be. Ties round up, not to even.
# Output:   x       interpreter  torch
#           1.95    1.0          2.0
#           3.95    4.0          4.0
#           1.0625  1.125        1.0
. "$(dirname "$0")/venv.sh"
venv torch==2.13.0 numpy==2.4.6 triton==3.7.1
cat >"$scratch/convert.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def convert(x, out, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out + index, tl.load(x + index).to(tl.float8e4nv))


x = torch.tensor([1.95, 3.95, 1.0625, 1.0])
out = torch.empty(4, dtype=torch.float8_e4m3fn)
convert[(1,)](x, out, BLOCK=4)
found, expected = out.float().tolist(), x.to(torch.float8_e4m3fn).float().tolist()
print("x       interpreter  torch")
for row in zip(x.tolist(), found, expected):
    print(f"{row[0]:<7.5g} {row[1]:<12} {row[2]}")
assert expected == [2.0, 4.0, 1.0, 1.0]
assert found == [1.0, 4.0, 1.125, 1.0], found
PYTHON
TRITON_INTERPRET=1 "$python" "$scratch/convert.py"
