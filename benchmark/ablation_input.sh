#!/usr/bin/env bash
# The paper's Fig. 6b in small: does batch-normalising the observations help, and is LayerNorm still needed then?
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-5}

for task in "CartPole-v1 --total-timesteps 500000" "Acrobot-v1 --total-timesteps 500000"; do
  for norm in layer_norm batch_norm none; do
    echo "$norm: python pqn.py --env-id $task --norm-type $norm"
    echo "$norm+input: python pqn.py --env-id $task --norm-type $norm --normalize-input"
  done
done | python benchmark/launch.py ablation_input "$@"
