#!/usr/bin/env bash
# Value decomposition against independent learners on EnvPool's LevelBasedForaging, which needs no JAX.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-3}

task="python pqn_vdn.py --env-id LevelBasedForaging-v0 --total-timesteps 500000 --hidden-sizes 128 128 --learning-rate 5e-4"
{
  echo "vdn: $task"
  echo "independent: $task --independent"
} | python benchmark/launch.py jax/foraging "$@"
