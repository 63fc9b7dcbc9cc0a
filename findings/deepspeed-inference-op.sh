#!/bin/bash
# DeepSpeed 0.19.8 with torch 2.13.0: training on a CPU compiles an op that it never calls, and leaves 69 MB per rank behind.
#
# Guess:    With torch's own optimizer, training on CPUs has nothing to compile: gloo moves the gradients.
# Instead:  deepspeed.init_distributed compiles its op for all-reduce through shared memory, which takes some 25 s on two
#           cores, and stops if there is no C++ compiler. Only inference_all_reduce calls the op, and training does not.
#           Each rank's buffer in /dev/shm keeps its name, which contains the port, so each run leaves new files, which
#           take the host's memory until someone removes them.
# Output:   compiled: deepspeed_shm_comm
#           calls in 3 steps on 2 ranks: gloo:all_reduce yes, inference_all_reduce no
#           left in /dev/shm: 2 files, 138.4 MB
. "$(dirname "$0")/venv.sh"
venv torch==2.13.0 numpy==2.4.6 deepspeed==0.19.8 ninja==1.13.2 setuptools==84.2.1
export TORCHDYNAMO_DISABLE=1 TORCH_EXTENSIONS_DIR=$scratch/ops LOCAL_SIZE=2 # which DeepSpeed's launcher sets
port=29723
cat >"$scratch/train.py" <<'PYTHON'
import deepspeed
import torch

deepspeed.init_distributed("gloo")
torch.manual_seed(0)
model = torch.nn.Linear(16, 16)
config = {"train_batch_size": 2, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
    for _ in range(3):
        engine.backward(engine(torch.ones(1, 16)).square().mean())
        engine.step()
names = " ".join(event.name for event in profile.events())
if torch.distributed.get_rank() == 0:
    said = {name: "yes" if name in names else "no" for name in ("gloo:all_reduce", "inference_all_reduce")}
    print("calls in 3 steps on 2 ranks: " + ", ".join(f"{name} {answer}" for name, answer in said.items()))
PYTHON
"$python" -W ignore -m torch.distributed.run --nproc_per_node 2 --master_addr 127.0.0.1 --master_port $port \
    "$scratch/train.py" >"$scratch/out" 2>"$scratch/log" || { cat "$scratch/log" >&2; exit 2; }
compiled=$(cd "$scratch/ops" && printf '%s ' */*.so)
calls=$(grep '^calls' "$scratch/out")
files=(/dev/shm/deepspeed_allreduce_buffer_"$(id -u)"_127.0.0.1_${port}_*)
left="left in /dev/shm: ${#files[@]} files, $(cat "${files[@]}" | wc -c | awk '{printf "%.1f", $1 / 1e6}') MB"
rm -f "${files[@]}"
printf '%s\n' "compiled: $(basename -a $compiled | sed 's/\.so$//' | paste -sd ' ')" "$calls" "$left"
[[ $compiled == "deepspeed_shm_comm/deepspeed_shm_comm.so " && $calls == *"gloo:all_reduce yes, inference_all_reduce no" &&
    $left == "left in /dev/shm: 2 files, 138.4 MB" ]]
