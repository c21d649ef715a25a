#!/usr/bin/env bash
# The paper's Fig. 6c in small: λ from one-step Q-learning (0) to the discounted sum of the whole rollout (1).
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-10}

while read -r task; do
  echo "lambda_0.95: $task"
  for lambda in 0 0.3 0.65 1; do
    echo "lambda_$lambda: $task --q-lambda $lambda"
  done
done <<'COMMANDS' | python benchmark/launch.py ablations/lambda "$@"
python pqn.py --env-id CartPole-v1 --total-timesteps 500000
python pqn.py --env-id Acrobot-v1 --total-timesteps 500000 --learning-rate 5e-4
python pqn.py --env-id LunarLander-v3 --total-timesteps 1000000 --learning-rate 5e-4 --end-e 0.05 --exploration-fraction 0.3
COMMANDS
