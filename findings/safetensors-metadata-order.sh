#!/bin/bash
# safetensors 0.8.0: the same tensors and the same metadata make a different file in each process.
#
# Guess:    safetensors sorts tensors and has no time stamps, so equal content is an equal file, and a hash tells whether
#           weights have changed.
# Instead:  The header's __metadata__ is written in the order of a Rust HashMap, which is random per process. With two or more
#           keys the file's hash changes from run to run; with none or one it does not. Readers are not affected.
# Output:   4 keys: several different files from 8 processes; 1 key: 1
. "$(dirname "$0")/venv.sh"
venv safetensors==0.8.0 numpy==2.4.6
write() {
    "$python" - "$1" "$scratch/file" <<'PYTHON'
import sys

import numpy as np
from safetensors.numpy import save_file

metadata = dict(list({"format": "pt", "step": "5", "seed": "1", "run": "a"}.items())[: int(sys.argv[1])])
save_file({"b": np.ones(2, np.float32), "a": np.ones(3, np.float32)}, sys.argv[2], metadata=metadata)
PYTHON
    sha256sum <"$scratch/file"
}
files() { for _ in 1 2 3 4 5 6 7 8; do write "$1"; done | sort -u | wc -l; }
four=$(files 4) one=$(files 1)
echo "4 keys: $four different files from 8 processes; 1 key: $one"
[ "$four" -gt 1 ] && [ "$one" = 1 ]
