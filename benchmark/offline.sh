#!/usr/bin/env bash
# offline_dqn.py: Table 1 and Fig. 1-2 of "How Does Layer Normalization Improve Deep Q-learning?"; crash steps, Adam's
# growth, SEEM and the NTK maps of "Understanding, Predicting and Better Resolving Q-Value Divergence in Offline-RL".
# Without arguments all of it; `benchmark/offline.sh table1` or `toy` or `seem` or `report` one part, and
# `table1 CartPole-v1 Acrobot-v1` only these tasks.
# STEPS and SEEDS set the gradient steps and the number of seeds of Table 1's runs: 40,000 and 3, as on the page.
# OPTIMIZER=adam makes a set of its own, table1_adam.csv: Table 1 was trained with SGD.
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
  local task norm start set=table1 optimizer=${OPTIMIZER:-sgd}
  [ "$optimizer" = sgd ] || set=table1_$optimizer
  [ $# -gt 0 ] || set -- CartPole-v1 MountainCar-v0 Acrobot-v1 Pendulum-v1
  for task in "$@"; do
    case $task in MountainCar-v0 | Pendulum-v1) start=--uniform-states ;; *) start= ;; esac
    for norm in none layer_norm batch_norm weight_norm; do
      # shellcheck disable=SC2086
      run means $set $norm --optimizer "$optimizer" --env-id "$task" --norm-type $norm $start --num-seeds "${SEEDS:-3}" \
        --gradient-steps "${STEPS:-40000}" --measure-interval 500 --eval-interval 500 --num-eval-envs 3
    done
  done
}

toy() {  # 100 state-action pairs of a walk on the plane, all of them in every step
  local all="--env-id toy --num-transitions 100 --measure-batch 100 --norm-type none" layers
  # shellcheck disable=SC2086
  run curves toy sgd_2 $all --hidden-sizes 200 --learning-rate 0.01 --num-seeds 5 \
    --gradient-steps 1000 --measure-interval 5
  # shellcheck disable=SC2086
  run curves toy sgd_3 $all --hidden-sizes 200 200 --learning-rate 0.01 --num-seeds 5 \
    --gradient-steps 1000 --measure-interval 5
  for layers in "200" "200 200"; do
    # shellcheck disable=SC2086
    run curves toy "adam_$(wc -w <<< "x $layers")" $all --hidden-sizes $layers --optimizer adam --num-seeds 3 \
      --learning-rate 1e-3 --gradient-steps 2000 --measure-interval 100 --eval-interval 2000 --limit 1e20
  done
}

seem() {
  local norm gamma all="--env-id toy --num-transitions 100 --measure-batch 100 --hidden-sizes 200 --learning-rate 0.01"
  all="$all --num-seeds 5 --gradient-steps 1000 --measure-interval 50"
  for gamma in 0.5 0.9 0.99; do
    for norm in none layer_norm batch_norm weight_norm; do
      # shellcheck disable=SC2086
      run curves seem "${norm}_$gamma" $all --norm-type $norm --gamma $gamma
    done
  done
  # shellcheck disable=SC2086
  run curves seem dropout_0.99 $all --norm-type none --gamma 0.99 --dropout 0.1
  # shellcheck disable=SC2086
  run curves seem weight_decay_0.99 $all --norm-type none --gamma 0.99 --weight-decay 0.01
}

refuse() {
  echo "error: unknown: $1; known are table1 [TASK ...], toy, seem and report" >&2
  exit 2
}

part=${1:-all}
shift $(($# > 0))
for word in "$@"; do  # only table1 takes more words, and no options
  case "$part $word" in "table1 -"*) refuse "$word" ;; "table1 "*) ;; *) refuse "$word" ;; esac
done
case $part in
  table1) table1 "$@" ;;
  toy) toy ;;
  seem) seem ;;
  report) python benchmark/offline.py report "$results" ;;
  all)
    toy
    seem
    table1
    python benchmark/offline.py report "$results"
    ;;
  *) refuse "$part" ;;
esac
