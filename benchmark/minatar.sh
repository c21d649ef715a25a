#!/usr/bin/env bash
# MinAtar by pqn.py with the authors' settings. Runs of another length than their 10M STEPS are a set of their own,
# minatar_short, in which a network that sees no picture, only a vector, is trained as well.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-3} STEPS=${STEPS:-10000000}
set=jax/minatar
[ "$STEPS" = 10000000 ] || set=jax/minatar_short

for game in ${GAMES:-Breakout SpaceInvaders Asterix Freeway}; do
  command="python pqn.py --env-id jax_envs:$game-MinAtar-v0 --total-timesteps $STEPS --num-envs 128"
  command+=" --num-steps 32 --num-minibatches 32 --update-epochs 2 --learning-rate 5e-4 --end-e 0.05"
  command+=" --exploration-fraction 0.1 --q-lambda 0.65 --reward-scale 1 --num-eval-envs 16"
  echo "convolution: $command --hidden-sizes 128"
  [ $set = jax/minatar ] || echo "flat: $command --conv-channels 0 --hidden-sizes 256 128"
done | python benchmark/launch.py $set "$@"
