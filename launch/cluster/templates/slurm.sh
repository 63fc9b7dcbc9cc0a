#!/usr/bin/env bash
#SBATCH --job-name=gpt2-124m
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
# 120 s before the time limit, all ranks get USR1, save and exit with 75. The job is then put back into
# the queue and continues from there. After any other failure the job ends. To continue, submit it again.
set -uo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export WORLD_SIZE=$((SLURM_JOB_NUM_NODES * 8)) LOCAL_SIZE=8
code=0
# One task per rank. --kill-on-bad-exit=0: a rank that has saved must not kill the others. --wait: if a rank dies, the
# others are killed after this many seconds. srun does not inherit --cpus-per-task.
srun --ntasks-per-node=8 --cpus-per-task=8 --kill-on-bad-exit=0 --wait=300 \
    bash -c 'trap "" USR1; RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"' rank \
    python launch/train.py --config launch/configs/gpt2_124m.yaml || code=$?
if [ "$code" -eq 75 ]; then
    # The requeue ends this script. If the script exited before that, the job could be marked as failed.
    scontrol requeue "$SLURM_JOB_ID" && sleep 300
fi
exit "$code"
