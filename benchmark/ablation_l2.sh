#!/usr/bin/env bash
# ℓ² on the output layer (Eq. 9), with LayerNorm and without normalisation: how much does each need?
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-10}

while read -r task; do
  echo "layer_norm_0: $task"
  echo "none_0: $task --norm-type none"
  for l2 in 0.001 0.01 0.1; do
    echo "layer_norm_$l2: $task --l2-coef $l2"
    echo "none_$l2: $task --norm-type none --l2-coef $l2"
  done
done <<'COMMANDS' | python benchmark/launch.py ablations/l2 "$@"
python pqn.py --env-id CartPole-v1 --total-timesteps 500000
python pqn.py --env-id Acrobot-v1 --total-timesteps 500000 --learning-rate 5e-4
COMMANDS
