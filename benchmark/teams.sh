#!/usr/bin/env bash
# Value decomposition against independent learners (each agent has a TD error of its own) on two cooperative tasks.
# MPE has the authors' settings, at a tenth of their steps; LevelBasedForaging has none of theirs.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-3}

while read -r task; do
  echo "vdn: $task"
  echo "independent: $task --independent"
done <<'COMMANDS' | python benchmark/launch.py jax/teams "$@"
python pqn_vdn.py --env-id LevelBasedForaging-v0 --total-timesteps 500000 --hidden-sizes 128 128 --learning-rate 5e-4 --end-e 0.05
python pqn_vdn.py --env-id jax_envs:mpe-simple_spread-v3 --total-timesteps 1000000 --num-envs 256 --hidden-sizes 256 256 --learning-rate 5e-4 --no-anneal-lr --end-e 0.1 --exploration-fraction 0.1 --gamma 0.9 --q-lambda 0.3 --max-grad-norm 1
COMMANDS
