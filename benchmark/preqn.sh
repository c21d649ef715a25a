#!/usr/bin/env bash
# PreQN on two tasks (the curves of benchmark/results/preqn), then how well its steps and TD3's move Q towards its targets
# (alignment), kernels at initialisation and the cost of an update. Short runs: what two cores can train in an hour.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-2} EPISODES=${EPISODES:-20} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

printf '%s\n' "sin: python preqn.py --env-id HalfCheetah-v5 --total-timesteps 30000" \
  "sin: python preqn.py --env-id Swimmer-v5 --total-timesteps 20000" | python benchmark/launch.py preqn "$@"

for critic in preqn td3; do
  for activation in sin relu; do
    echo "${critic}_$activation: python preqn.py --env-id HalfCheetah-v5 --total-timesteps 10000" \
      "--critic $critic --activation $activation --log-interval 500"
  done
done | RESULTS=benchmark/results/preqn/alignment python benchmark/launch.py preqn_alignment "$@"
