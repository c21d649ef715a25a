#!/usr/bin/env bash
# The recurrent agent on the games of atari5.sh, with the same options.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-3}

for game in Breakout Pong SpaceInvaders MsPacman BeamRider; do
  echo "python pqn_atari_lstm.py --env-id $game-v5 --total-timesteps 10000000 --compile"
done | python benchmark/launch.py lstm "$@"
