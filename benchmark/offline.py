"""Adds a run of offline_dqn.py to a set of benchmark/results/offline; see offline.sh, which calls this.

python benchmark/offline.py means runs/CartPole-v1__offline_dqn__1__1700000000 table1.csv layer_norm
"""

import csv
import sys
from pathlib import Path

import numpy as np
import torch

MEASURES = "return loss q qgi sgi mgi dgi gi2 iso seem_normalised norm kernel_alignment policy_alignment".split()


def load(folder):
    """{column: (measurements, copies)} of a run, and its options."""
    with open(Path(folder, "measures.csv"), newline="") as file:
        columns, *rows = csv.reader(file)
    table = np.array(rows, dtype=float)
    copies = len(np.unique(table[:, :2], axis=0))
    options = torch.load(Path(folder, "checkpoint.pt"), weights_only=True)["args"]
    return {name: x.reshape(-1, copies) for name, x in zip(columns, table.T, strict=True)}, options


def add(path, rows):
    """Adds rows, dictionaries, in the place of those of the same variant and task, in six significant digits."""
    old = []
    if Path(path).exists():
        with open(path, newline="") as file:
            old = list(csv.DictReader(file))
    key = lambda row: (row["task"], row["variant"])
    rows = [{k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in row.items()} for row in rows]
    kept = [row for row in old if key(row) not in {key(row) for row in rows}]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept + rows)


def means(folder, path, variant):
    """For each copy the mean of each measure over the run but its start, and the return at the start."""
    table, options = load(folder)
    rows = []
    for k in range(table["step"].shape[1]):
        row = {"task": options["env_id"], "variant": variant, "optimizer": options["optimizer"]}
        row |= {"steps": int(table["step"][-1, k]), "learning_rate": table["learning_rate"][0, k]}
        row |= {"seed": int(table["seed"][0, k]), "diverged_at": int(table["diverged_at"][-1, k])}
        row |= {"largest_norm": float(table["norm"][:, k].max()), "first_return": table["return"][0, k]}
        row |= {name: float(np.nanmean(table[name][1:, k])) for name in MEASURES}
        rows.append(row)
    add(path, rows)


def curves(folder, path, variant):
    """Each measurement of each copy, up to where it diverges."""
    table, options = load(folder)
    names = "step loss q norm seem seem_normalised kernel_alignment policy_alignment crash".split()
    rows = []
    for k in range(table["step"].shape[1]):
        row = {"task": options["env_id"], "variant": variant, "learning_rate": table["learning_rate"][0, k]}
        row |= {"seed": int(table["seed"][0, k]), "diverged_at": int(table["diverged_at"][-1, k])}
        row |= {"last_step": int(table["step"][-1, k])}
        for t, step in enumerate(table["step"][:, k]):
            if row["diverged_at"] < 0 or step <= row["diverged_at"]:
                rows.append(row | {name: float(table[name][t, k]) for name in names})
    add(path, rows)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
