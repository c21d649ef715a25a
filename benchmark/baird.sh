#!/usr/bin/env bash
# Baird's counterexample and the theory behind it: the README's figures and tables, and further settings. About ten
# minutes on one core; there are no seeds to launch, as each script takes all of its seeds in one batch.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
results=benchmark/results
scratch=$(mktemp -d)
trap 'rm -r "$scratch"' EXIT

python baird.py --out $results/baird
python td_stability.py --out $results/td_stability

# Other ℓ² coefficients and activations, Eq. 9 on the last layer alone: one table
python baird.py --l2 0.01 0.25 --sweep 1 1 0 --out "$scratch/gelu"
python baird.py --activation relu --sweep 1 1 0 --out "$scratch/relu"
python baird.py --activation tanh --sweep 1 1 0 --out "$scratch/tanh"
python baird.py --last-layer-only --sweep 1 1 0 --out "$scratch/last"
{
  cat "$scratch/gelu_table.csv"
  tail -n +2 "$scratch/relu_table.csv"
  tail -n +2 "$scratch/tanh_table.csv"
  grep "w only" "$scratch/last_table.csv"
} > $results/baird_reference.csv

# Sampled transitions; five times as many updates
python baird.py --sampled --out "$scratch/sampled"
python baird.py --updates 100000 --sweep 0.001 1 7 --out "$scratch/long"
cp "$scratch/sampled_table.csv" $results/baird_sampled_table.csv
cp "$scratch/long_table.csv" $results/baird_long_table.csv
