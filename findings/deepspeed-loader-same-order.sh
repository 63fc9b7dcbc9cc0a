#!/bin/bash
# DeepSpeed 0.19.8 with torch 2.13.0: the loader that deepspeed.initialize makes has one order for all epochs.
#
# Guess:    deepspeed.initialize(training_data=...) returns a loader that shuffles, so it shuffles anew in each epoch. So does
#           its RepeatingLoader, which starts the loader again at the end of the data.
# Instead:  The loader has a DistributedSampler, whose order changes only with set_epoch, and DeepSpeed never calls it. The
#           caller has to: loader.data_sampler.set_epoch(epoch).
# Output:   three epochs: 40732516 40732516 40732516, after set_epoch(1): 54267310
. "$(dirname "$0")/venv.sh"
venv torch==2.13.0 numpy==2.4.6 deepspeed==0.19.8 ninja==1.13.2 setuptools==84.2.1
export RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29719
cat >"$scratch/loader.py" <<'PYTHON'
import deepspeed
import torch
from deepspeed.runtime.dataloader import RepeatingLoader

config = {"train_batch_size": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
_, _, loader, _ = deepspeed.initialize(model=torch.nn.Linear(1, 1), training_data=list(range(8)), config=config)


def epoch(batches) -> str:
    return "".join(str(i) for _ in range(len(loader)) for i in next(batches).tolist())


repeating = iter(RepeatingLoader(loader))
three = [epoch(repeating) for _ in range(3)]
loader.data_sampler.set_epoch(1)
other = epoch(iter(loader))
print(f"three epochs: {' '.join(three)}, after set_epoch(1): {other}")
assert len(set(three)) == 1 and other != three[0], "the epochs differ now"
PYTHON
"$python" -W ignore "$scratch/loader.py" 2>"$scratch/log" | grep "^three" || { cat "$scratch/log" >&2; exit 1; }
