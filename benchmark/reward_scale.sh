#!/usr/bin/env bash
# Which --reward-scale suits tasks whose rewards are of another size than CartPole's: one at the end, or -1 a step.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-3}

for scale in 0.1 1 10; do
  echo "scale_$scale: python pqn.py --env-id FrozenLake-v1 --total-timesteps 500000 --reward-scale $scale"
  echo "scale_$scale: python pqn.py --env-id Taxi-v3 --total-timesteps 500000 --reward-scale $scale"
done | python benchmark/launch.py reward_scale "$@"
