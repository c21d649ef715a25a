#!/usr/bin/env bash
# The five games that CleanRL publishes PQN's curves for, 10M steps (40M frames) each.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-3}

for game in Breakout SpaceInvaders Pong MsPacman BeamRider; do
  echo "python pqn_atari_envpool.py --env-id $game-v5 --total-timesteps 10000000 --compile"
done | python benchmark/launch.py atari5 "$@"
