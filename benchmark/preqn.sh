#!/usr/bin/env bash
# PreQN on three tasks (the curves of benchmark/results/preqn); how well its updates and TD3's move Q to their targets
# (alignment); kernels at initialisation; the cost of an update. Short runs: what one core can train in an hour or two.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SEEDS=${SEEDS:-1-2} EPISODES=${EPISODES:-20} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
results=benchmark/results/preqn

printf '%s\n' "sin: python preqn.py --env-id HalfCheetah-v5 --total-timesteps 30000" \
  "sin: python preqn.py --env-id Swimmer-v5 --total-timesteps 20000" \
  "sin: python preqn.py --env-id Pendulum-v1 --total-timesteps 10000 --start-steps 1000 --learning-starts 1000" |
  python benchmark/launch.py preqn "$@"

for critic in preqn td3; do
  for activation in sin relu; do
    echo "${critic}_$activation: python preqn.py --env-id HalfCheetah-v5 --total-timesteps 10000" \
      "--critic $critic --activation $activation --log-interval 500"
  done
done | RESULTS=$results/alignment python benchmark/launch.py preqn_alignment "$@"
[[ "$*" == *--list* ]] && exit

python benchmark/preqn_report.py runs/preqn --out $results/updates --curves $results/curves.csv
python benchmark/preqn_report.py runs/alignment --out $results/alignment/updates
for env in HalfCheetah-v5 Walker2d-v5 Ant-v5; do
  python preqn.py --env-id $env --analyse $results/kernels_$env
done
python benchmark/preqn_cost.py --out $results/cost.csv
