#!/usr/bin/env bash
# Does an Atari agent learn in bf16 on the CPU as it does in fp32? (Processors with avx512_bf16 or amx_bf16.)
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-3}

for precision in fp32 bf16; do
  echo "$precision: python pqn_atari_envpool.py --env-id Breakout-v5 --total-timesteps 500000 --compile --precision $precision"
done | python benchmark/launch.py ablations/precision "$@"
