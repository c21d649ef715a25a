#!/usr/bin/env bash
# The paper's Fig. 6a in small: what does normalisation after each hidden layer change?
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-10}

while read -r task; do
  echo "layer_norm: $task"
  echo "batch_norm: $task --norm-type batch_norm"
  echo "none: $task --norm-type none"
done <<'COMMANDS' | python benchmark/launch.py ablations/norm "$@"
python pqn.py --env-id CartPole-v1 --total-timesteps 500000
python pqn.py --env-id Acrobot-v1 --total-timesteps 500000 --learning-rate 5e-4
python pqn.py --env-id LunarLander-v3 --total-timesteps 1000000 --learning-rate 5e-4 --end-e 0.05 --exploration-fraction 0.3
COMMANDS
