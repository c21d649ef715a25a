#!/usr/bin/env bash
# Overcooked with the authors' settings (5M steps; every cook sees itself first, so that no index is needed).
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-3}

for layout in ${LAYOUTS:-cramped_room coord_ring forced_coord}; do
  echo "python pqn_vdn.py --env-id jax_envs:overcooked-$layout-v0 --no-agent-index"
done | python benchmark/launch.py jax/overcooked "$@"
