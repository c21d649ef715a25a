#!/usr/bin/env bash
# Smax, battles of two stalkers and three zealots a side, and of three marines: the authors' settings with a network a
# quarter as wide and a fifth of their steps. A return above 1 is a battle won: 1 is paid for it, and up to 1 for the
# damage done on the way.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-2}

for map in 2s3z 3m; do
  echo "python pqn_vdn_lstm.py --env-id jax_envs:smax-$map-v0 --total-timesteps 2000000 --hidden-sizes 128 128 --lstm-size 128"
done | python benchmark/launch.py jax/smax "$@"
