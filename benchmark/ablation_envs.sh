#!/usr/bin/env bash
# The paper's Fig. 6e in small: the number of environments at the same number of steps. A rollout has 2,048 steps
# throughout, so that gradient steps and minibatches stay the same too; what shrinks is its length, and with it the
# reach of the λ-returns.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-10}

while read -r task; do
  echo "envs_32: $task"
  for envs in 2 8 128 512; do
    echo "envs_$envs: $task --num-envs $envs --num-steps $((2048 / envs))"
  done
done <<'COMMANDS' | python benchmark/launch.py ablations/envs "$@"
python pqn.py --env-id CartPole-v1 --total-timesteps 500000
python pqn.py --env-id Acrobot-v1 --total-timesteps 500000 --learning-rate 5e-4
COMMANDS
