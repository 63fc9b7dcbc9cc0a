#!/bin/bash
# megatron-core 0.16.1: token files (.bin, .idx) take four bytes a token from a vocabulary of 65,500 on, not from 65,537.
#
# Guess:    A vocabulary of 65,536 tokens has the ids 0 to 65,535, which are exactly uint16's, and Megatron uses uint16 if the
#           ids fit, as other formats of token files do.
# Instead:  DType.optimal_dtype, which tools/preprocess_data.py calls, compares with 65,500. A vocabulary of 65,536 tokens makes
#           files of int32, twice as large, and a reader that derives the width from the
#           vocabulary alone, in place of the index, reads every second token as 0.
# Output:   65499: uint16, 65500: int32, 65536: int32
#           vocabulary 65536, tokens 1, 2, 3: 12 bytes, read as uint16 [1, 0, 2, 0, 3, 0]
. "$(dirname "$0")/venv.sh"
venv torch==2.13.0 numpy==2.4.6 megatron-core==0.16.1
cat >"$scratch/width.py" <<'PYTHON'
import sys

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

widths = {size: np.dtype(DType.optimal_dtype(size)).name for size in (65499, 65500, 65536)}
print(", ".join(f"{size}: {width}" for size, width in widths.items()))
builder = IndexedDatasetBuilder(sys.argv[1] + "/t.bin", dtype=DType.optimal_dtype(65536))
builder.add_document(torch.tensor([1, 2, 3]), [3])
builder.finalize(sys.argv[1] + "/t.idx")
read = np.fromfile(sys.argv[1] + "/t.bin", np.uint16)
print(f"vocabulary 65536, tokens 1, 2, 3: {read.nbytes} bytes, read as uint16 {read.tolist()}")
assert list(widths.values()) == ["uint16", "int32", "int32"], "the limit has changed"
PYTHON
"$python" -W ignore "$scratch/width.py" "$scratch"
