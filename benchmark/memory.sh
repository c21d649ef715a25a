#!/usr/bin/env bash
# MemoryChain: a bit is shown when an episode starts and asked for when it ends. With the LSTM and without it.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-2}

task="--env-id jax_envs:MemoryChain-bsuite-v0 --total-timesteps 50000"
{
  echo "recurrent: python pqn_lstm.py $task"
  echo "feed-forward: python pqn.py $task"
} | python benchmark/launch.py jax/memory "$@"
