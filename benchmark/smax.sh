#!/usr/bin/env bash
# Smax, the battle of 2 stalkers and 3 zealots: the authors' settings with a network a quarter as wide and a fifth of
# their steps. A greedy return above 1 is a battle won: 1 is paid for it, and up to 1 for the damage done on the way.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-2}

python benchmark/launch.py jax/smax "$@" <<'COMMANDS'
python pqn_vdn_lstm.py --env-id jax_envs:smax-2s3z-v0 --total-timesteps 2000000 --hidden-sizes 128 128 --lstm-size 128
COMMANDS
