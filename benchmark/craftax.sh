#!/usr/bin/env bash
# The early part of Craftax's curves, with memory and without: Craftax-Classic's first million of the authors' 1e9 steps,
# and half a million of Craftax's, whose observations are six times as long. The options are those of their recurrent
# agent, but for 128 environments and not 1,024, smaller minibatches, and schedules that end with the run.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1}

settings="--num-envs 128 --num-steps 64 --num-minibatches 8 --update-epochs 4 --learning-rate 3e-4 --end-e 0.005"
settings+=" --exploration-fraction 0.1 --q-lambda 0.5 --max-grad-norm 0.5 --reward-scale 1 --norm-type batch_norm"
settings+=" --normalize-input"
for world in "Craftax-Classic-Symbolic-v1 --total-timesteps 1000000" "Craftax-Symbolic-v1 --total-timesteps 500000"; do
  echo "recurrent: python pqn_lstm.py --env-id jax_envs:$world $settings --hidden-sizes 512 --lstm-size 512"
  echo "feed-forward: python pqn.py --env-id jax_envs:$world $settings --hidden-sizes 512 512"
done | python benchmark/launch.py jax/craftax "$@"
