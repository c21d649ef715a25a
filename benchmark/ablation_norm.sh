#!/usr/bin/env bash
# The paper's Fig. 6a in small: what does normalisation after each hidden layer change?
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-5}

for task in "CartPole-v1 --total-timesteps 500000" "Acrobot-v1 --total-timesteps 500000" \
  "LunarLander-v3 --total-timesteps 1000000 --learning-rate 5e-4 --end-e 0.05 --exploration-fraction 0.3"; do
  for norm in layer_norm batch_norm none; do
    echo "$norm: python pqn.py --env-id $task --norm-type $norm"
  done
done | python benchmark/launch.py ablation_norm "$@"
