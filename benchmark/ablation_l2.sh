#!/usr/bin/env bash
# ℓ² on the output layer (Eq. 9), with LayerNorm and without normalisation: how much does each need?
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-5}

for task in "CartPole-v1 --total-timesteps 500000" "Acrobot-v1 --total-timesteps 500000"; do
  for norm in layer_norm none; do
    for l2 in 0 0.001 0.01 0.1; do
      echo "${norm}_$l2: python pqn.py --env-id $task --norm-type $norm --l2-coef $l2"
    done
  done
done | python benchmark/launch.py ablation_l2 "$@"
