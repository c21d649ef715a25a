#!/usr/bin/env bash
# The paper's Fig. 6b in small: does batch-normalising the observations help, and is LayerNorm still needed then? And
# what if they are normalised by running statistics instead, in training too (running_input.py)?
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-10}

while read -r task; do
  echo "layer_norm: $task"
  echo "layer_norm+input: $task --normalize-input"
  for norm in batch_norm none; do
    echo "$norm: $task --norm-type $norm"
    echo "$norm+input: $task --norm-type $norm --normalize-input"
  done
  echo "layer_norm+running: ${task/pqn.py/benchmark/running_input.py} --normalize-input"
  echo "none+running: ${task/pqn.py/benchmark/running_input.py} --norm-type none --normalize-input"
done <<'COMMANDS' | python benchmark/launch.py ablations/input "$@"
python pqn.py --env-id CartPole-v1 --total-timesteps 500000
python pqn.py --env-id Acrobot-v1 --total-timesteps 500000 --learning-rate 5e-4
COMMANDS
