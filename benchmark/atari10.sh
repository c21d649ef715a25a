#!/usr/bin/env bash
# Atari-10: the ten games whose scores tell most about all 57 (Aitchison et al., 2023), 50M steps = 200M frames each.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-3}

for game in Amidar BattleZone Bowling DoubleDunk Frostbite KungFuMaster NameThisGame Phoenix Qbert Riverraid; do
  echo "python pqn_atari_envpool.py --env-id $game-v5 --total-timesteps 50000000 --compile"
done | python benchmark/launch.py atari10 "$@"
