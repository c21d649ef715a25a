"""Adds a run of offline_dqn.py to a set, or makes tables and figures of the sets; offline.sh calls this.

python benchmark/offline.py means runs/CartPole-v1__offline_dqn__1__1700000000 table1.csv layer_norm
python benchmark/offline.py report benchmark/results/offline
"""

import csv
import io
import sys
from collections import defaultdict
from pathlib import Path

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import torch
from collect import fail, write_whole

with plt.rc_context():  # the figures here keep a style of their own
    from report import t_quantile

sys.path.insert(0, str(Path(__file__).parents[1]))
import offline_dqn as script  # noqa: E402

MEASURES = "return loss q qgi sgi mgi dgi gi2 iso seem_normalised norm kernel_alignment policy_alignment".split()


def load(folder):
    """{column: (measurements, copies)} of a run, and its options."""
    with open(Path(folder, "measures.csv"), newline="") as file:
        columns, *rows = csv.reader(file)
    table = np.array(rows, dtype=float)
    copies = len(np.unique(table[:, :2], axis=0))
    options = torch.load(Path(folder, "checkpoint.pt"), map_location="cpu", weights_only=True)["args"]
    return {name: x.reshape(-1, copies) for name, x in zip(columns, table.T, strict=True)}, options


def add(path, rows):
    """Adds rows, dictionaries, in the place of those of the same variant and task, in six significant digits."""
    path, old, columns, text = Path(path), [], list(rows[0]), io.StringIO()
    if path.exists():
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != columns:
                fail(f"{path} has other columns than {','.join(columns)}")
            old = list(reader)
    key = lambda row: (row["task"], row["variant"])
    rows = [{k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in row.items()} for row in rows]
    kept = [row for row in old if key(row) not in {key(row) for row in rows}]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(kept + rows)
    write_whole(path, text.getvalue())


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
        row |= {"first_step": int(table["step"][1, k]), "first_seem": table["seem_normalised"][1, k]}
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


# ------------------------------------------------------------------------------------------------------- report
PAPER = {  # [1], Table 1: random, none, LN, BN, WN; of CartPole's row only one number is known
    "Acrobot-v1": (-452.604, -384.0, -267.2, -477.6, -409.6),
    "Pendulum-v1": (-1281.860, -1323.2, -792.8, -1433.7, -1376.5),
    "CartPole-v1": (np.nan, 163.5, np.nan, np.nan, np.nan),
    "MountainCar-v0": (-194.632, -163.8, -122.2, -169.0, -166.6),
}
NORMS = {"none": "none", "layer_norm": "LN", "batch_norm": "BN", "weight_norm": "WN"}
SIGN = 1e-3  # a SEEM counts as positive above this share of the kernel's mean diagonal: rounding is far below


def read(path):
    """The rows of a set, numbers as numbers."""
    with open(path, newline="") as file:
        rows = [dict(row) for row in csv.DictReader(file)]
    words = "task", "variant", "optimizer"
    return [{k: v if k in words else float(v) for k, v in row.items()} for row in rows]


def groups(rows, *names):
    found = defaultdict(list)
    for row in rows:
        found[tuple(row[name] for name in names)].append(row)
    return found


def column(rows, name):
    return np.array([row[name] for row in rows])


def markdown(header, rows):
    line = lambda cells: "| " + " | ".join(cells) + " |\n"
    return line(header) + "|" + " --- |" * len(header) + "\n" + "".join(map(line, rows)) + "\n"


def interval(values):
    """Mean over seeds and half of its 95% interval, as far as there are seeds for them."""
    mean = f"{np.mean(values):.1f}" if values else ""
    if len(values) < 2:
        return mean
    return f"{mean} ± {t_quantile(len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5:.1f}"


def tasks_of(rows):
    return [task for task in PAPER if any(row["task"] == task for row in rows)]


def returns(rows, path):
    """[1]'s Table 1: of each seed the mean over learning rates and evaluations, of the seeds mean and interval."""
    tasks = tasks_of(rows)
    figure, axes = plt.subplots(1, len(tasks), figsize=(4 * len(tasks), 3.6), layout="constrained", squeeze=False)
    table, best = [], []
    for axis, task in zip(axes[0], tasks, strict=True):
        published = PAPER[task] if rows[0]["optimizer"] == "sgd" else (np.nan,) * 5  # the table is of SGD
        cells, rates = [task, str(int(column([r for r in rows if r["task"] == task], "steps")[0]))], [task]
        first = [
            np.mean(column(x, "first_return"))
            for x in groups([r for r in rows if r["task"] == task and r["variant"] == "none"], "seed").values()
        ]
        values = [interval(first)]
        for norm in NORMS:
            mine = [r for r in rows if (r["task"], r["variant"]) == (task, norm)]
            values.append(interval([column(x, "return").mean() for x in groups(mine, "seed").values()]))
            if not mine:
                rates.append("")
                continue
            by_rate = {rate[0]: column(x, "return").mean() for rate, x in groups(mine, "learning_rate").items()}
            rate = max(by_rate, key=by_rate.get)
            colour = {"none": "#D55E00", "layer_norm": "#0072B2", "batch_norm": "#009E73", "weight_norm": "#CC79A7"}[
                norm
            ]
            axis.semilogx(sorted(by_rate), [by_rate[x] for x in sorted(by_rate)], "o-", color=colour, label=NORMS[norm])
            axis.set(title=task, xlabel="learning rate", ylabel="return")
            rates.append(f"{by_rate[rate]:.1f} ({rate:.2g}), {sum(column(mine, 'diverged_at') >= 0)} of {len(mine)}")
        for value, paper in zip(values, published, strict=True):
            cells.append(f"{value} [{'' if np.isnan(paper) else f'{paper:.1f}'}]" if value else "")
        table.append(cells)
        best.append(rates)
    axes[0, 0].legend()
    figure.savefig(path, dpi=80)
    names = list(NORMS.values())
    text = markdown(["task", "steps", "random", *names], table)
    return (
        text
        + "Best learning rate: its mean return (the rate), copies that diverged\n\n"
        + markdown(["task", *names], best)
    )


def spearman(x, y):
    rank = lambda v: np.argsort(np.argsort(v))
    return np.corrcoef(rank(x), rank(y))[0, 1] if len(x) > 2 else np.nan


def interference(rows, path):
    """[1]'s Fig. 1 and 2: a point for each learning rate, with and without LayerNorm, the mean of its seeds."""
    metrics = "qgi sgi mgi dgi gi2 iso".split()
    tasks = tasks_of(rows)
    figure, axes = plt.subplots(2, len(tasks), figsize=(3.75 * len(tasks), 7), layout="constrained", squeeze=False)
    table, pairs = [], []
    for (upper, lower), task in zip(axes.T, tasks, strict=True):
        points = []
        for (norm, _), x in groups([r for r in rows if r["task"] == task], "variant", "learning_rate").items():
            if norm in ("none", "layer_norm"):
                point = {name: column(x, name).mean() for name in (*metrics, "loss")}
                points.append(point | {"ln": norm == "layer_norm", "bounded": (column(x, "diverged_at") < 0).all()})
        for kept, label in ((points, "all"), ([p for p in points if p["bounded"]], "none diverged")):
            cells = [f"{spearman(column(kept, m), column(kept, 'loss')):.2f}" for m in metrics]
            table.append([task, f"{label}: {len(kept)}", *cells])
        plain, ln = ([p for p in points if p["ln"] == kind] for kind in (False, True))
        cells = [""] * 10
        if plain and ln:  # both in the order of the learning rates
            change = {m: column(ln, m) - column(plain, m) for m in (*metrics, "loss")}
            fell = [f"{sum(change[m] < 0)}" for m in ("loss", "sgi", "gi2")]
            cells = [f"{len(ln)}", *fell, *(f"{sum(np.sign(change[m]) == np.sign(change['loss']))}" for m in metrics)]
        pairs.append([task, *cells])
        for axis, metric, scale in ((upper, "sgi", "linear"), (lower, "gi2", "symlog")):
            for kind, colour in ((False, "#D55E00"), (True, "#0072B2")):
                mine = [p for p in points if p["ln"] == kind and p["bounded"]]  # the others are 20 decades away
                axis.scatter(column(mine, metric), column(mine, "loss"), c=colour)
            axis.set(yscale="log", xlabel=metric.upper().replace("GI2", "GI₂"), title=task, ylabel="loss")
            if scale == "symlog":
                axis.set_xscale("symlog", linthresh=1e-4)
                axis.xaxis.get_major_locator().set_params(numticks=5)
    figure.suptitle("LayerNorm blue, none orange; learning rates with which no seed diverged")
    figure.savefig(path, dpi=80)
    names = [m.upper() for m in metrics]
    text = markdown(["task", "points", *names], table) + "LayerNorm against none at each learning rate: at how many\n\n"
    header = ["task", "of", "loss falls", "SGI falls", "GI2 falls", *(f"{name} changes as the loss" for name in names)]
    return text + markdown(header, pairs)


def crash_of_unbalanced(t, u):
    """Where the α e^(−κt) − β e^(κt) that fits 1/‖u‖ best reaches 0. In a two-layer ReLU network the squared weights of
    the first layer less those of the second, D, stay the same. In one direction of growth Q is the product of the
    layers' lengths and the kernel goes with the sum of their squares: u' = cu √(D² + 4u²), and so (1/u)'' = (cD)²/u."""
    fits = []
    for rate in np.geomspace(1e-4, 0.1, 1000):
        terms = np.stack([np.exp(-rate * (t - t[-1])), -np.exp(rate * (t - t[-1]))], axis=1) * u[:, None]  # sum to 1
        (alpha, beta), *_ = np.linalg.lstsq(terms, np.ones(len(t)))
        if min(alpha, beta) > 0:
            error = np.square(terms @ (alpha, beta) - 1).sum()
            fits.append((error, t[-1] + np.log(alpha / beta) / (2 * rate)))
    return min(fits)[1]


def toy(rows, path):
    """[2]'s Fig. 2 and 10 (crash steps) and 4 (Adam)."""
    figure, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    crashes, growth = [], []
    for (variant, seed), x in groups(rows, "variant", "seed").items():
        t, u, at = column(x, "step"), column(x, "loss") ** 0.5, x[0]["diverged_at"]
        if variant in ("sgd_2", "sgd_3"):
            depth = int(variant[-1])
            power, axis = (2 * depth - 2) / depth, axes[depth - 2]
            foreseen = [column(x, "crash")[t <= share * at][-1] / at - 1 for share in (0.8, 0.9, 0.95)]
            window = (t >= 0.74 * at) & (t <= 0.83 * at)
            fit = script.predicted_crash(torch.tensor(t[window]), torch.tensor(u[window])[:, None], depth)
            foreseen.insert(0, float(fit) / at - 1)
            foreseen += [crash_of_unbalanced(t[window], u[window]) / at - 1] if depth == 2 else []
            cells = [f"{100 * error:+.1f}%" for error in foreseen] + [""] * (depth - 2)
            crashes.append([variant, f"{seed:.0f}", f"{at:.0f}", *cells])
            axis.plot(t / at, u**-power / (u**-power)[t >= 0.7 * at][0])
            name = "1/‖u‖" if depth == 2 else "1/‖u‖^(4/3)"
            axis.set(title=f"SGD, {depth} layers: {name}", xlabel="step / crash step", ylim=(0, 3))
        elif "adam" in variant:
            late, depth = t >= 1000, int(variant[-1])
            slope = np.polyfit(t[late], column(x, "norm")[late], 1)[0]
            powers = [np.polyfit(np.log(t[late]), np.log(y[late]), 1)[0] for y in (column(x, "q"), u)]
            weights = {2: 1201, 3: 41401}[depth]
            eta = x[0]["learning_rate"] * weights**0.5
            growth.append([variant, f"{seed:.0f}", f"{slope:.4f}", f"{slope / eta:.2f}", f"{adam(depth):.2f}"])
            growth[-1] += [f"{power:.2f}" for power in powers]
            axes[2].plot(t, column(x, "norm") / eta, label=f"{depth} layers" if seed == 1 else None)
            axes[3].loglog(t[1:], column(x, "q")[1:], label=f"{depth} layers" if seed == 1 else None)
    axes[2].set(title="Adam: ‖θ‖ / (η√P)", xlabel="step")
    axes[3].set(title="Adam: mean |Q|", xlabel="step")
    axes[2].legend()
    figure.savefig(path, dpi=80)
    text = markdown(
        ["run", "seed", "diverged at", "fit to 74-83%", "at 80%", "at 90%", "at 95%", "sinh, 74-83%"], crashes
    )
    header = ["run", "seed", "slope of ‖θ‖", "/ η√P", "Adam with g ∝ t^(2L−1)", "power of Q", "power of u"]
    return text + markdown(header, growth)


def adam(depth, first=1000, last=2000):
    """The mean step between two of them, in units of η, of Adam with gradients that grow as t^(2L−1)."""
    m = v = total = 0.0
    for t in range(1, last + 1):
        g = float(t) ** (2 * depth - 1)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        total += (t > first) * (m / (1 - 0.9**t)) / (v / (1 - 0.999**t)) ** 0.5
    return total / (last - first)


def seem(rows):
    """[2]'s Fig. 3 and 6: what SEEM says at one step, and what happens by the end of the run."""
    table, counts = [], {at: np.zeros((2, 2), int) for at in (0, 100, 200)}
    for (variant,), x in groups(rows, "variant").items():
        cells = {at: [] for at in counts}
        diverged, leads = [], []
        for copy in groups(x, "seed").values():
            t, sign = column(copy, "step"), column(copy, "seem_normalised") > SIGN
            end = copy[0]["diverged_at"]
            diverged.append(end >= 0)
            if end >= 0:
                negative = np.flatnonzero(~sign)
                since = (
                    t[negative[-1] + 1]
                    if len(negative) and negative[-1] + 1 < len(t)
                    else t[0]
                    if not len(negative)
                    else end
                )
                leads.append(1 - since / end)
            for at in counts:
                if at <= t[-1]:
                    counts[at][int(sign[t == at][0]), int(end >= 0)] += 1
                    cells[at].append(sign[t == at][0])
        last = [column(copy, "seem_normalised")[-1] for copy in groups(x, "seed").values()]
        table.append([variant, f"{sum(diverged)} of {len(diverged)}"])
        table[-1] += [f"{sum(cells[at])} of {len(cells[at])}" for at in counts]
        table[-1] += [f"{np.median(last):.2g}", f"{100 * np.median(leads):.0f}%" if leads else ""]
    header = ["normalisation, γ", "diverged", *(f"SEEM > 0 at {at}" for at in counts), "median at the end"]
    text = markdown([*header, "positive for this share of the way before"], table)
    cells = [[str(at), *(str(n) for n in counts[at].flatten()[[3, 2, 1, 0]])] for at in counts]
    names = ["step", "> 0 and diverged", "> 0 and did not", "not > 0 and diverged", "not > 0 and did not"]
    return text + markdown(names, cells)


def seem_of_tasks(rows):
    """The same for the runs of Table 1: at their first measurement, for copies that had not diverged by then."""
    table = []
    for task in tasks_of(rows):
        for norm in NORMS:
            mine = [r for r in rows if (r["task"], r["variant"]) == (task, norm)]
            if not mine:
                continue
            running = [r for r in mine if not 0 <= r["diverged_at"] <= r["first_step"]]
            positive, later = column(running, "first_seem") > SIGN, column(running, "diverged_at") >= 0
            cells = [positive & later, positive & ~later, ~positive & later, ~positive & ~later]
            table.append([task, NORMS[norm], str(len(mine) - len(running)), *(str(int(c.sum())) for c in cells)])
    header = [
        "task",
        "norm",
        "diverged before",
        "> 0, diverged later",
        "> 0, did not",
        "not > 0, diverged",
        "not > 0, did not",
    ]
    return markdown(header, table)


def ntk(path, width=10_000, side=41):
    """[2]'s Fig. 5: k(x₀, x) / k(x₀, x₀) of a two-layer network over the plane, with and without LayerNorm."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    grid = torch.linspace(-4, 4, side)
    points = torch.cat([torch.tensor([[0.1, 0.2]]), torch.cartesian_prod(grid, grid)]).unsqueeze(0)
    table = []
    for axis, norm in zip(axes, ("none", "layer_norm"), strict=True):
        args = script.Args(hidden_sizes=(width,), norm_type=norm)
        network = script.QNetwork(gym.spaces.Box(-9, 9, (2,)), gym.spaces.Discrete(1), args)
        network.initialise([torch.Generator().manual_seed(1)])
        kernel = []
        for part in points[:, 1:].split(side, 1):
            both = torch.cat([points[:, :1], part], 1)
            gram = script.gram_matrix(network, both, torch.zeros(1, both.shape[1], dtype=torch.int64))[0]
            kernel.append(gram[0, 0, 1:] / gram[0, 0, 0])
        kernel = torch.stack(kernel)
        picture = axis.imshow(kernel.T, origin="lower", extent=(-4, 4, -4, 4), cmap="viridis")
        figure.colorbar(picture)
        axis.set(title={"none": "no normalisation", "layer_norm": "LayerNorm"}[norm])
        axis.plot(0.1, 0.2, "r+")
        corners = [kernel[i, j] for i, j in ((-1, -1), (0, 0), (0, -1), (-1, 0))]
        table.append([norm, f"{kernel.max():.2f}", f"{kernel.min():.2f}", *(f"{c:.2f}" for c in corners)])
    figure.savefig(path, dpi=80)
    return markdown(["", "largest", "smallest", "at (4, 4)", "(−4, −4)", "(−4, 4)", "(4, −4)"], table)


def report(folder):
    """All tables to tables.md, all figures beside it."""
    plt.switch_backend("Agg")
    folder = Path(folder)
    parts = {}
    for path in sorted(folder.glob("table1*.csv")):  # of SGD and, where it was made, of Adam
        rows, end = read(path), path.stem.removeprefix("table1")
        parts["Mean return" + end.replace("_", ", ")] = returns(rows, folder / f"returns{end}.png")
        parts["Correlation with the loss" + end.replace("_", ", ")] = interference(
            rows, folder / f"interference{end}.png"
        )
        parts["SEEM, tasks of Table 1" + end.replace("_", ", ")] = seem_of_tasks(rows)
    parts["Crash steps and Adam, toy task"] = toy(read(folder / "toy.csv"), folder / "toy.png")
    parts["SEEM, toy task"] = seem(read(folder / "seem.csv"))
    parts["NTK relative to its value at (0.1, 0.2)"] = ntk(folder / "ntk.png")
    text = "".join(f"## {title}\n\n{part}" for title, part in parts.items())
    (folder / "tables.md").write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
