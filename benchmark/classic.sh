#!/usr/bin/env bash
# Classic control and LunarLander: the first table of the README. About 20 minutes on two cores with WORKERS=2.
# What SEEDS, WORKERS, RESULTS, OPTIONS and so on do is said in launch.py.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-10}

python benchmark/launch.py classic "$@" <<'COMMANDS'
python pqn.py --env-id CartPole-v1 --total-timesteps 500000 --learning-rate 2.5e-4
python pqn.py --env-id Acrobot-v1 --total-timesteps 500000 --learning-rate 5e-4
python pqn.py --env-id MountainCar-v0 --total-timesteps 500000
python pqn.py --env-id LunarLander-v3 --total-timesteps 1000000 --learning-rate 5e-4 --end-e 0.05 --exploration-fraction 0.3
COMMANDS
