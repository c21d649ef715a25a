#!/usr/bin/env bash
# MemoryChain: a bit is shown when an episode starts and asked for when it ends. With the LSTM and without it, over
# gymnax's length of 5 with default options, and over the authors' length of 100 with their options.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-2}

task="--env-id jax_envs:MemoryChain-bsuite-v0 --total-timesteps 50000"
hundred="--env-id jax_envs:MemoryChain100-bsuite-v0 --total-timesteps 100000 --num-steps 128 --learning-rate 1e-3"
hundred+=" --no-anneal-lr --end-e 0.01 --exploration-fraction 0.1 --reward-scale 1"
{
  echo "recurrent: python pqn_lstm.py $task"
  echo "feed-forward: python pqn.py $task"
  echo "recurrent: python pqn_lstm.py $hundred --memory-window 4"
  echo "recurrent_forget_4: python pqn_lstm.py $hundred --memory-window 4 --forget-bias 4"
  echo "feed-forward: python pqn.py $hundred"
} | python benchmark/launch.py jax/memory "$@"
