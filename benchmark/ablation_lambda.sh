#!/usr/bin/env bash
# The paper's Fig. 6c in small: λ from one-step Q-learning (0) to the discounted sum of the whole rollout (1).
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-5}

for task in "CartPole-v1 --total-timesteps 500000" \
  "LunarLander-v3 --total-timesteps 1000000 --learning-rate 5e-4 --end-e 0.05 --exploration-fraction 0.3"; do
  for lambda in 0 0.3 0.65 0.95 1; do
    echo "lambda_$lambda: python pqn.py --env-id $task --q-lambda $lambda"
  done
done | python benchmark/launch.py ablation_lambda "$@"
