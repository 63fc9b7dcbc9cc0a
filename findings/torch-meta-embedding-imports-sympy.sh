#!/bin/bash
# torch 2.13.0: an embedding on the meta device, which has no data, imports torch's compiler and sympy.
#
# Guess:    A model on the meta device costs nothing: no memory is filled, so it is created in milliseconds.
# Instead:  torch.nn.Embedding's init calls normal_, which on a meta tensor runs Python decompositions, and with them come
#           torch._dynamo and sympy: 1.8 s and 155 MB, measured once, for the first one in a process. Linear, whose init
#           is uniform_, and LayerNorm do not do it. A command that only wants the shapes of a GPT pays for its embedding.
# Output:   Linear: 0 of torch._dynamo, sympy imported; LayerNorm: 0; Embedding: 2
. "$(dirname "$0")/venv.sh"
venv torch==2.13.0 numpy==2.4.6
count() {
    "$python" - "$1" <<'PYTHON'
import sys

import torch

arguments = {"Linear": (4, 4), "LayerNorm": (4,), "Embedding": (4, 4)}[sys.argv[1]]
assert "sympy" not in sys.modules and "torch._dynamo" not in sys.modules
with torch.device("meta"):
    getattr(torch.nn, sys.argv[1])(*arguments)
print(("sympy" in sys.modules) + ("torch._dynamo" in sys.modules))
PYTHON
}
linear=$(count Linear) norm=$(count LayerNorm) embedding=$(count Embedding)
echo "Linear: $linear of torch._dynamo, sympy imported; LayerNorm: $norm; Embedding: $embedding"
[ "$linear $norm $embedding" = "0 0 2" ]
