#!/usr/bin/env bash
# The early part of Craftax's curves, with memory and without: a thousandth or two of the authors' 1e9 steps. Their
# learning rate, λ, norms and layers; but 128 environments and not 1,024, smaller minibatches, and schedules that end with
# the run. (Craftax's observations are six times as long as those of Craftax-Classic, its layers so much slower.)
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1}

settings="--num-envs 128 --num-steps 64 --num-minibatches 8 --update-epochs 4 --learning-rate 3e-4 --end-e 0.005"
settings+=" --exploration-fraction 0.1 --q-lambda 0.5 --max-grad-norm 0.5 --reward-scale 1 --norm-type batch_norm"
settings+=" --normalize-input"
for world in "Craftax-Classic-Symbolic-v1 --total-timesteps 2000000" "Craftax-Symbolic-v1 --total-timesteps 1000000"; do
  echo "recurrent: python pqn_lstm.py --env-id jax_envs:$world $settings --hidden-sizes 512 --lstm-size 512"
  echo "feed-forward: python pqn.py --env-id jax_envs:$world $settings --hidden-sizes 512 512"
done | python benchmark/launch.py jax/craftax "$@"
