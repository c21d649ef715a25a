"""What the updates of preqn.py did, from the runs of benchmark/preqn.sh: one CSV and one figure.

    python benchmark/preqn_report.py runs/preqn_alignment --out benchmark/results/preqn/alignment/updates

The CSV has a line for each point of the curves (the mean over the updates since the point before), the figure means
over seeds, with the range of the seeds where there are several. The folders of the runs are those that launch.py made.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

QUANTITIES = {
    "alignment": "cos(Q' - Q, target - Q)",
    "proposed_alignment": "the same before the line search",
    "halvings": "halvings of the step",
    "q_values": "mean Q",
    "row_ratio": "mean row ratio of the kernel",
    "log10_condition": "log10 of its condition (at most 7)",
}
FURTHER = "rejected", "rank", "diagonal", "td_loss"  # in the CSV alone
COLOURS = "#0072B2", "#D55E00", "#56B4E9", "#E69F00"


@dataclass
class Args:
    runs: tyro.conf.Positional[Path]  # folder of a list that launch.py ran
    out: Path  # <this>.csv and <this>.png are written
    curves: Path | None = None  # the set's curves.csv: its returns are drawn into <out>_returns.png, seed by seed


def read(folder):
    """One row for each point of each run that is not the beginning, where nothing is learned yet."""
    rows = []
    for run in sorted(folder.glob("*__*__*__*")):
        env, variant, seed, _ = run.name.split("__")
        for file in sorted(run.glob("runs/*/events.out.tfevents.*")):
            events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
            tags, points = events.Tags()["scalars"], {}
            for name in (*QUANTITIES, *FURTHER):
                for event in events.Scalars(f"losses/{name}") if f"losses/{name}" in tags else ():
                    points.setdefault(event.step, {})[name] = f"{event.value:.5g}"
            rows += [dict(env=env, variant=variant, seed=seed, step=step) | x for step, x in sorted(points.items())]
    return rows


def draw(rows, path):
    plt.switch_backend("Agg")
    label = lambda row: " ".join([row["env"]] * several + [row["variant"].replace("_", ", ")])
    several = len({row["env"] for row in rows}) > 1
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for panel, (quantity, title) in zip(axes.flat, QUANTITIES.items(), strict=True):
        for colour, name in zip(COLOURS, dict.fromkeys(map(label, rows)), strict=False):
            points = {}
            for row in rows:
                if label(row) == name and quantity in row:
                    points.setdefault(row["step"], []).append(float(row[quantity]))
            if points:
                x, y = zip(*sorted(points.items()), strict=True)
                panel.plot(x, [np.mean(values) for values in y], color=colour, label=name)
                low, high = ([end(values) for values in y] for end in (min, max))
                panel.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        panel.set(title=title, xlabel="environment steps")
        panel.grid(alpha=0.25)
    axes[0, 0].legend()
    figure.savefig(path, dpi=80)


def draw_returns(curves, path):
    """Each seed by itself, as an interval over two of them would hide what there is to see."""
    runs = {}
    for row in csv.DictReader(open(curves)):
        points = runs.setdefault(row["env"], {}).setdefault(row["seed"], ([], [], []))
        for values, name in zip(points, ("step", "eval_return", "episodic_return"), strict=True):
            values.append(float(row[name] or "nan"))
    plt.switch_backend("Agg")
    figure, axes = plt.subplots(1, len(runs), figsize=(13, 3.6), layout="constrained", squeeze=False)
    for panel, (env, seeds) in zip(axes.flat, runs.items(), strict=True):
        for colour, (seed, (step, greedy, training)) in zip(COLOURS, seeds.items(), strict=False):
            panel.plot(step, greedy, color=colour, label=f"seed {seed}, without noise")
            panel.plot(step, training, ":", color=colour, label=f"seed {seed}, training")
        panel.set(title=env, xlabel="environment steps", ylabel="return")
        panel.locator_params(axis="x", nbins=5)
        panel.grid(alpha=0.25)
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=80)


def main(args: Args):
    rows = read(args.runs)
    if not rows:
        sys.exit(f"error: there are no runs of preqn.py with updates in {args.runs}")
    with open(f"{args.out}.csv", "w", newline="") as file:
        names = ["env", "variant", "seed", "step", *QUANTITIES, *FURTHER]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, f"{args.out}.png")
    if args.curves:
        draw_returns(args.curves, f"{args.out}_returns.png")
    print(f"{args.out}.csv, {args.out}.png")


if __name__ == "__main__":
    main(tyro.cli(Args))
