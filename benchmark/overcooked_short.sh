#!/usr/bin/env bash
# One kitchen of Overcooked in a fifth of the authors' steps, for a machine without GPU: a higher learning rate, fewer
# gradient steps on larger minibatches, and all schedules shortened with the run.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1}

python benchmark/launch.py jax/overcooked_short "$@" <<'COMMANDS'
python pqn_vdn.py --env-id jax_envs:overcooked-cramped_room-v0 --no-agent-index --total-timesteps 1000000 --shaping-timesteps 500000 --learning-rate 5e-4 --update-epochs 2 --num-minibatches 4 --hidden-sizes 256 --end-e 0.05
COMMANDS
