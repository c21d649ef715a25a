#!/usr/bin/env bash
# CartPole with every default of pqn.py: the baseline of the ablations. classic.sh has a higher learning rate.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-10}

echo "python pqn.py --env-id CartPole-v1 --total-timesteps 500000" |
  python benchmark/launch.py cartpole_defaults "$@"
