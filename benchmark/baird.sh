#!/usr/bin/env bash
# Baird's counterexample and the theory behind it: the tables and figures of benchmark/results/theory. About a quarter
# of an hour on one core; there are no seeds to launch, as each script takes all of its seeds in one batch.
set -euo pipefail
[ $# = 0 ] || { echo "error: baird.sh takes no options: baird.py and td_stability.py do" >&2; exit 2; }
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
results=benchmark/results/theory
scratch=$(mktemp -d)
trap 'rm -r "$scratch"' EXIT

further() {  # another setting, whose lines go below those of baird.py's defaults
  python baird.py "$@" --out "$scratch/further"
  tail -n +2 "$scratch/further.csv" >> $results/baird.csv
  tail -n +2 "$scratch/further_predictions.csv" >> $results/baird_predictions.csv
}

python baird.py --out $results/baird
further --updates 100000 --sweep 0.001 0.0562341325 8
for scale in 10 100 1000; do
  further --m-scale $scale --updates 50000 --probes 0 --l2 --sweep 1 1 0
done
further --activation tanh --l2 --sweep 1 1 0
further --activation relu --l2 --sweep 1 1 0
further --sampled --l2 --sweep 1 1 0
python td_stability.py --out $results/td_stability
