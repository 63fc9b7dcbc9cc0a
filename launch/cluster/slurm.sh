#!/usr/bin/env bash
#SBATCH --job-name=packspeed
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
# sbatch launch/cluster/slurm.sh RUNFILE      one task per GPU; saves 5 minutes before the limit and requeues itself
set -uo pipefail
run_file=${1:?usage: sbatch launch/cluster/slurm.sh RUNFILE}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) LOCAL_SIZE=$SLURM_NTASKS_PER_NODE
code=0
srun --kill-on-bad-exit=0 bash -c \
    'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID exec python launch/train.py --config "$0"' \
    "$run_file" || code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
