#!/bin/bash
# triton 3.7.1: a kernel that compiles for a GPU fails in Triton's own interpreter, because its scalar is a Python float.
#
# Guess:    TRITON_INTERPRET=1 runs the kernels that the compiler accepts, only slowly: all values in a kernel are tensors.
# Instead:  The compiler makes a scalar argument a tensor, so `eps.to(tl.float32)` is valid and a cubin comes out. The
#           interpreter passes a float as it is, and a float has no `to`. Liger 0.8.5's RMSNorm, LayerNorm and GeGLU fail so.
# Output:   compiled for sm_80: cubin
#           interpreted: AttributeError("'float' object has no attribute 'to'")
. "$(dirname "$0")/venv.sh"
venv torch==2.13.0 numpy==2.4.6 triton==3.7.1
cat >"$scratch/scale.py" <<'PYTHON'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def scale(x_ptr, factor, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(x_ptr + index, tl.load(x_ptr + index) * factor.to(tl.float32))


if sys.argv[1] == "compile":
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"x_ptr": "*fp32", "factor": "fp32", "BLOCK": "constexpr"}
    kernel = triton.compile(ASTSource(scale, signature=types, constexprs={"BLOCK": 8}), target=GPUTarget("cuda", 80, 32))
    print("compiled for sm_80:", [kind for kind in kernel.asm if kind == "cubin"][0])
else:
    try:
        scale[(1,)](torch.ones(8), 0.5, BLOCK=8)
    except Exception as error:
        print("interpreted:", error)
        assert "'float' object has no attribute 'to'" in str(error)
    else:
        raise SystemExit("the interpreter runs the kernel now")
PYTHON
"$python" "$scratch/scale.py" compile
TRITON_INTERPRET=1 "$python" "$scratch/scale.py" interpret
