#!/usr/bin/env bash
# The early part of Craftax's curves: Craftax-Classic's first million of the authors' 1e9 steps, and half a million of
# Craftax's, whose observations are six times as long. The options are those of their recurrent agent, but for 128
# environments and not 1,024, smaller minibatches, batch norm for their batch renormalisation, and schedules that end
# with the run; without memory also LayerNorm, with the observations normalised by batch norm and without.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1}

classic="--env-id jax_envs:Craftax-Classic-Symbolic-v1 --total-timesteps 1000000"
whole="--env-id jax_envs:Craftax-Symbolic-v1 --total-timesteps 500000"
settings="--num-envs 128 --num-steps 64 --num-minibatches 8 --update-epochs 4 --learning-rate 3e-4 --end-e 0.005"
settings+=" --exploration-fraction 0.1 --q-lambda 0.5 --max-grad-norm 0.5 --reward-scale 1"
batch_norm="--norm-type batch_norm --normalize-input"
{
  echo "recurrent: python pqn_lstm.py $classic $settings $batch_norm --hidden-sizes 512 --lstm-size 512"
  echo "batch_norm: python pqn.py $classic $settings $batch_norm --hidden-sizes 512 512"
  echo "input_norm: python pqn.py $classic $settings --normalize-input --hidden-sizes 512 512"
  echo "layer_norm: python pqn.py $classic $settings --hidden-sizes 512 512"
  echo "recurrent: python pqn_lstm.py $whole $settings $batch_norm --hidden-sizes 512 --lstm-size 512"
  echo "layer_norm: python pqn.py $whole $settings --hidden-sizes 512 512"
} | python benchmark/launch.py jax/craftax "$@"
