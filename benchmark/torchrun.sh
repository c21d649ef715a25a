#!/bin/bash
# One run on several GPUs and nodes with Slurm:
#   sbatch --nodes 2 --gpus-per-node 4 --cpus-per-task 32 benchmark/torchrun.sh pqn_atari_envpool.py --env-id Pong-v5
#SBATCH --ntasks-per-node 1
#SBATCH --signal TERM@120
# The nodes need a file system that they share: --resume looks for the checkpoint on each of them. scancel and the time
# limit end a run in order: it says so, is saved, and torchrun adds a traceback of its own. Tried without GPUs, on two
# nodes that Slurm 22.05 made out of one machine; not tried on a cluster.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}  # which srun does not take from sbatch
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" "$@"
