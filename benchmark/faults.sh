#!/usr/bin/env bash
# Does it matter that phantoms and truncations are treated right? Why these tasks and limits is said in faults.py.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-10}

for variant in right phantoms truncation both; do
  echo "$variant: python benchmark/faults.py --variant $variant --limit 20 --env-id CartPole-v1 --total-timesteps 500000"
  echo "$variant: python benchmark/faults.py --variant $variant --limit 100 --env-id Acrobot-v1 --total-timesteps 500000 --learning-rate 5e-4"
  echo "$variant: python benchmark/faults.py --variant $variant --limit 200 --env-id LunarLander-v3" \
    "--total-timesteps 1000000 --learning-rate 5e-4 --end-e 0.05 --exploration-fraction 0.3"
done | python benchmark/launch.py faults --measures greedy_curve greedy_mean "$@"
