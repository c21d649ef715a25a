#!/usr/bin/env bash
# Value decomposition against independent learners (each agent has a TD error of its own): MPE's simple_spread, with the
# authors' settings for it, at a tenth of their steps.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-3}

task="python pqn_vdn.py --env-id jax_envs:mpe-simple_spread-v3 --total-timesteps 1000000 --num-envs 256 --hidden-sizes 256 256"
task+=" --learning-rate 5e-4 --no-anneal-lr --end-e 0.1 --exploration-fraction 0.1 --gamma 0.9 --q-lambda 0.3 --max-grad-norm 1"
{
  echo "vdn: $task"
  echo "independent: $task --independent"
} | python benchmark/launch.py jax/teams "$@"
