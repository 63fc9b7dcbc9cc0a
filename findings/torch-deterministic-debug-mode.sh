#!/bin/bash
# torch 2.13.0: the two switches for deterministic algorithms, one documented as another interface to the other, differ.
#
# Guess:    set_deterministic_debug_mode("error") does what use_deterministic_algorithms(True) does, as its documentation
#           says ("an alternative interface for this feature").
# Instead:  Only the second also sets inductor's deterministic mode. After the first, compiled reductions are still chosen
#           by timing them, so that two processes on a GPU can round differently although the flag reads True. And
#           use_deterministic_algorithms(False) turns off the mode that TORCHINDUCTOR_DETERMINISTIC=1 has asked for.
# Output:   use_deterministic_algorithms(True): flag True, inductor True
#           set_deterministic_debug_mode("error"): flag True, inductor False
#           TORCHINDUCTOR_DETERMINISTIC=1, then use_deterministic_algorithms(False): inductor False
. "$(dirname "$0")/venv.sh"
venv torch==2.13.0 numpy==2.4.6
"$python" -W ignore - <<'PYTHON'
import os

os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
import torch
from torch._inductor import config

asked_for = config.deterministic
torch.use_deterministic_algorithms(False)
after_false = config.deterministic
torch.use_deterministic_algorithms(True)
first = torch.are_deterministic_algorithms_enabled(), config.deterministic
torch.use_deterministic_algorithms(False)
torch.set_deterministic_debug_mode("error")
second = torch.are_deterministic_algorithms_enabled(), config.deterministic
print(f"use_deterministic_algorithms(True): flag {first[0]}, inductor {first[1]}")
print(f'set_deterministic_debug_mode("error"): flag {second[0]}, inductor {second[1]}')
print(f"TORCHINDUCTOR_DETERMINISTIC=1, then use_deterministic_algorithms(False): inductor {after_false}")
assert first == (True, True) and second == (True, False), "both switches do the same now"
assert asked_for and not after_false, "the environment variable is kept now"
PYTHON
