#!/bin/bash
# One run on several GPUs and nodes with Slurm:
#   sbatch --nodes 2 --gpus-per-node 4 benchmark/torchrun.sh pqn_atari_envpool.py --env-id Pong-v5
#SBATCH --ntasks-per-node 1
#SBATCH --signal TERM@120
# Not tried on a cluster. With a file system that all nodes share, --resume finds the checkpoint on each of them.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" "$@"
