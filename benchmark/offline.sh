#!/usr/bin/env bash
# offline_dqn.py: Table 1 and Fig. 1-2 of "How Does Layer Normalization Improve Deep Q-learning?"; crash steps, Adam's
# growth, SEEM and the NTK maps of "Understanding, Predicting and Better Resolving Q-Value Divergence in Offline-RL".
# Without arguments all of it; `benchmark/offline.sh table1 CartPole-v1` or `toy` or `seem` or `report` one part.
# STEPS and SEEDS set the length of Table 1's runs.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# The C library would otherwise return large tensors to the system at every gradient step: a third of the time
export MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000
results=benchmark/results/offline

run() {  # what is made of the run, the set it is added to, the name of the variant, options of offline_dqn.py
  local kind=$1 set=$2 variant=$3 folder
  shift 3
  echo "$set $variant: python offline_dqn.py $*"
  folder=$(python offline_dqn.py "$@" | tee >(cat >&2) | sed -n "1s/: .*//p")
  python benchmark/offline.py "$kind" "$folder" "$results/$set.csv" "$variant"
}

table1() {
  for task in "$@"; do
    case $task in MountainCar-v0 | Pendulum-v1) start=--uniform-states ;; *) start= ;; esac
    for norm in none layer_norm batch_norm weight_norm; do
      # shellcheck disable=SC2086
      run means table1 "$norm" --env-id "$task" --norm-type $norm $start --num-seeds "${SEEDS:-3}" \
        --gradient-steps "${STEPS:-5000}" --measure-interval 500 --eval-interval 500 --num-eval-envs 3
    done
  done
}

case ${1:-all} in
  table1) shift; table1 "$@" ;;
  all) table1 CartPole-v1 MountainCar-v0 Acrobot-v1 Pendulum-v1 ;;
esac
