"""Tables and figures from result sets: the CSVs that launch.py leaves, or whatever runs there are below a folder.

    python benchmark/report.py benchmark/results/classic                     # table.md and figures, into that folder
    python benchmark/report.py benchmark/results/ablation_lambda --baseline lambda_0.95
    python benchmark/report.py benchmark/results/atari5 benchmark/results/mine --out comparison
    python benchmark/report.py runs --out figures                            # runs that launch.py did not start

Curves are means over seeds, bands and brackets 95% bootstrap intervals (percentiles of 2,000 resamples of the seeds).
On two Atari games or more, the human-normalised scores are summed up by the interquartile mean, median, mean,
optimality gap and performance profile of Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical
Precipice" (NeurIPS 2021), their intervals resampling the seeds of each game by themselves. Nothing depends on the date
or on chance: the same CSVs give the same files.
"""

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import EngFormatter
from results import ResultError, fail, read_set, summarise

# Okabe and Ito's colours, told apart by everybody, in an order that keeps neighbours apart in grey print too
COLOURS = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000"
STYLES = "-", "--", "-.", ":"
plt.rcParams |= {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "svg.hashsalt": "pqn",  # else the names within an SVG are random
}


@dataclass
class Args:
    sets: tyro.conf.Positional[tuple[Path, ...]]
    """one result set, or several to compare"""
    out: Path | None = None
    """folder for table and figures; the first set's if not given"""
    baseline: str = ""
    """what the others are compared with; the first one if not given"""
    score: Literal["greedy_mean", "train_return"] = "greedy_mean"
    """what counts as a run's score: play.py's evaluation, or the last 100 training episodes"""


# -------------------------------------------------------------------------------------------------- statistics


def bootstrap(statistic, samples, resamples=2000):
    """95% interval of statistic(samples) for a list of arrays, each of which is resampled along its first axis."""
    rng = np.random.default_rng(0)
    draws = [statistic([x[rng.integers(len(x), size=len(x))] for x in samples]) for _ in range(resamples)]
    return np.percentile(draws, [2.5, 97.5], axis=0)


def mean(samples):
    """The mean over games of each game's mean over runs."""
    return np.mean([np.mean(x) for x in samples])


def median(samples):
    """The median over games of each game's mean over runs."""
    return np.median([np.mean(x) for x in samples])


def iqm(samples):
    """The mean of the middle half of all runs on all games."""
    scores = np.sort(np.concatenate(samples))
    cut = len(scores) // 4
    return scores[cut : len(scores) - cut].mean()


def optimality_gap(samples):
    """How far the runs fall short of 1 on average; more than 1 counts as 1."""
    return 1 - np.minimum(np.concatenate(samples), 1).mean()


def profile(samples, thresholds):
    """The share of all runs on all games whose score is above each threshold."""
    return (np.concatenate(samples) > np.reshape(thresholds, (-1, 1))).mean(1)


AGGREGATES = {"IQM": iqm, "median": median, "mean": mean, "optimality gap": optimality_gap}


# ------------------------------------------------------------------------------------------------ reading the sets


def naturally(words):
    """A sort key in which lambda_9 comes before lambda_10."""
    return [[float(x) if i % 2 else x for i, x in enumerate(re.split(r"(\d+(?:\.\d+)?)", word))] for word in words]


def read_groups(args):
    """{(environment, label): runs}, and the label that the others are compared with."""
    groups = {}
    names = [folder.resolve().name for folder in args.sets]
    if len(set(names)) < len(names):
        fail(f"sets that are compared need names of their own, not {' and '.join(map(str, args.sets))}")
    for folder in args.sets:
        runs = read_set(folder)
        several = len({run.about["variant"] for run in runs}) > 1
        for run in runs:
            variant = run.about["variant"]
            label = variant if len(args.sets) == 1 else f"{folder.name}: {variant}" if several else folder.name
            groups.setdefault((run.about["env"].split(":")[-1], label), []).append(run)
    labels = sorted({label for _, label in groups}, key=lambda label: naturally([label]))
    if len(args.sets) > 1:  # in the order in which they were given
        labels.sort(key=lambda label: [folder.name for folder in args.sets].index(label.split(": ")[0]))
    if args.baseline and args.baseline not in labels:
        fail(f"--baseline {args.baseline} is none of {', '.join(labels)}")
    envs = sorted({env for env, _ in groups}, key=lambda env: naturally([env]))
    ordered = {(env, label): groups[env, label] for env in envs for label in labels if (env, label) in groups}
    return ordered, args.baseline or labels[0]


def values(runs, name):
    return np.array([run.about[name] for run in runs])


# -------------------------------------------------------------------------------------------------------- tables


def number(x):
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"


def with_interval(statistic, samples):
    x = number(statistic(samples))
    if max(map(len, samples)) == 1:
        return x
    low, high = bootstrap(statistic, samples)
    return f"{x} [{number(low)}, {number(high)}]"


def markdown(header, rows):
    return "".join(f"| {' | '.join(row)} |\n" for row in [header, ["---"] * len(header), *rows])


def table(args, groups, baseline, normalised):
    """One row for each environment and label, and how they were made."""
    labels = list(dict.fromkeys(label for _, label in groups))
    rows = []
    for (env, label), runs in groups.items():
        row = [env] + [label] * (len(labels) > 1) + [str(len(runs))]
        for name in ("train_return", "greedy_mean"):
            x = values(runs, name)
            spread = f" ± {number(x.std())}" if len(x) > 1 else ""
            row.append("" if np.isnan(x).any() else number(x.mean()) + spread)
        score = values(runs, args.score)
        row.append("" if np.isnan(score).any() else with_interval(mean, [score]).partition(" ")[2])
        if len(labels) > 1:
            other = values(groups.get((env, baseline), []), args.score)
            compared = label != baseline and len(other) and not np.isnan([*score, *other]).any()
            difference = lambda samples: samples[0].mean() - samples[1].mean()
            row.append(with_interval(difference, [score, other]) if compared else "")
        if normalised:
            row.append(number(normalised[label][env].mean()) if env in normalised[label] else "")
        row += [f"{values(runs, 'steps').mean():,.0f}", f"{np.median(values(runs, 'steps_per_second')):,.0f}"]
        rows.append([*row, f"{values(runs, 'seconds').mean() / 60:.1f}"])
    header = ["environment"] + ["variant"] * (len(labels) > 1) + ["seeds", "training return", "greedy return"]
    header += [f"95% interval ({'greedy' if args.score == 'greedy_mean' else 'training'})"]
    header += [f"difference from {baseline}"] * (len(labels) > 1) + ["human-normalised"] * bool(normalised)
    return markdown([*header, "steps", "steps/s", "minutes"], rows)


def aggregate_table(normalised):
    rows = []
    for label, games in normalised.items():
        scores = list(games.values())
        cells = [with_interval(statistic, scores) for statistic in AGGREGATES.values()]
        rows.append([label, f"{len(scores)} games, {sum(map(len, scores))} runs", *cells])
    return markdown(["human-normalised", "of", *AGGREGATES], rows)


def made_by(groups):
    """The commands, machines and dates behind a table."""
    known = [run.about for runs in groups.values() for run in runs if "command" in run.about]
    seeds = {}
    for about in known:
        command = about["command"].removesuffix(f" --seed {about['seed']}")
        seeds.setdefault(command, []).append(int(about["seed"]))
    distinct = lambda name: ", ".join(sorted({about[name] for about in known}))
    lines = [f"{command} --seed {' '.join(map(str, sorted(n)))}" for command, n in sorted(seeds.items())]
    if not lines:
        return ""
    return (
        f"On {distinct('hardware')}; torch {distinct('torch')}; {distinct('date')}.\n\n```\n"
        + "\n".join(lines)
        + "\n```\n"
    )


def normalise(args, groups):
    """{label: {game: human-normalised scores}}, for the games that have them; empty for fewer than two games."""
    if not any(env.endswith("-v5") for env, _ in groups):
        return {}
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from pqn_atari_envpool import RANDOM_AND_HUMAN

    normalised = {}
    for (env, label), runs in groups.items():
        scores, game = values(runs, args.score), env.removesuffix("-v5")
        if game in RANDOM_AND_HUMAN and not np.isnan(scores).any():
            random, human = RANDOM_AND_HUMAN[game]
            normalised.setdefault(label, {})[env] = (scores - random) / (human - random)
    return normalised if len({env for games in normalised.values() for env in games}) > 1 else {}


# ------------------------------------------------------------------------------------------------------- figures


def save(figure, out, name):
    for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        figure.savefig(out / f"{name}.{ending}", metadata=metadata)
    plt.close(figure)


def panels(names, width=3.3, height=2.5):
    """A figure with one panel for each name, four in a row (eight where there are many)."""
    columns = min(len(names), 4 if len(names) <= 12 else 8)
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows + 0.4), squeeze=False)
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    for ax, name in zip(axes.flat, names, strict=False):
        ax.set_title(name, fontsize=10)
    return figure, dict(zip(names, axes.flat, strict=False))


def draw_band(ax, x, curves, i, label):
    """The mean of the curves (runs, points), and its interval where there are several."""
    colour = COLOURS[i % len(COLOURS)]
    ax.plot(x, curves.mean(0), color=colour, linestyle=STYLES[i % len(STYLES)], label=label)
    if len(curves) > 1:
        low, high = bootstrap(lambda samples: samples[0].mean(0), [curves])
        ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def resample(runs, column, against, points=200):
    """The runs' curves on common steps (`against` 0) or seconds (1), as long as all of them last."""
    known = [run.points[~np.isnan(run.points[:, column])] for run in runs]
    known = [p for p in known if len(p)]
    if not known:
        return None, None
    first, last = max(p[0, against] for p in known), min(p[-1, against] for p in known)
    if first >= last:
        return None, None
    x = np.linspace(first, last, points)
    return x, np.array([np.interp(x, p[:, against], p[:, column]) for p in known])


def draw_curves(groups, out):
    """Return against steps and against wall time. Of several labels the greedy return, of one the training's too."""
    labels = list(dict.fromkeys(label for _, label in groups))
    envs = list(dict.fromkeys(env for env, _ in groups))
    has_greedy = any((~np.isnan(run.points[:, 3])).any() for runs in groups.values() for run in runs)
    for against, name in ((0, "curves_steps"), (1, "curves_time")):
        figure, axes = panels(envs)
        for (env, label), runs in groups.items():
            lines = [(labels.index(label), 3 if has_greedy else 2, label)]
            if len(labels) == 1:
                lines = [(0, 3, "greedy"), (1, 2, "training (ε-greedy)")]
            for i, column, line in lines:
                x, curves = resample(runs, column, against)
                if x is not None:
                    draw_band(axes[env], x / (1, 60)[against], curves, i, line)
        if against == 0:
            for ax in axes.values():
                ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        figure.supxlabel(("environment steps", "minutes")[against], fontsize=9)
        figure.supylabel(
            "return" if len(labels) == 1 else f"{'greedy' if has_greedy else 'training'} return", fontsize=9
        )
        handles = {line.get_label(): line for ax in axes.values() for line in ax.get_lines()}
        ncols = max(1, int(figure.get_figwidth() / (0.7 + 0.08 * max(map(len, handles), default=0))))
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=ncols, frameon=False)
        save(figure, out, name)


def draw_final(args, groups, out):
    """The score of each label: its runs as dots, their mean and its interval as a bar."""
    labels = list(dict.fromkeys(label for _, label in groups))
    figure, axes = panels(list(dict.fromkeys(env for env, _ in groups)), height=0.8 + 0.28 * len(labels))
    for (env, label), runs in groups.items():
        scores, i = values(runs, args.score), labels.index(label)
        scores = scores[~np.isnan(scores)]
        if not len(scores):
            continue
        colour = COLOURS[i % len(COLOURS)]
        axes[env].plot(scores, np.full(len(scores), i), "o", color=colour, alpha=0.35, markersize=4, markeredgewidth=0)
        axes[env].plot(scores.mean(), i, "|", color=colour, markersize=14, markeredgewidth=2.5)
        if len(scores) > 1:
            axes[env].plot(bootstrap(mean, [scores]), [i, i], color=colour, linewidth=2.5)
    for ax in axes.values():
        ax.set_yticks(range(len(labels)), labels)
        ax.set_ylim(len(labels) - 0.5, -0.5)
    figure.supxlabel("greedy return" if args.score == "greedy_mean" else "training return", fontsize=9)
    save(figure, out, "final")


def draw_profiles(normalised, out):
    """Performance profiles: which share of the runs scores above τ."""
    highest = np.quantile(np.concatenate([x for games in normalised.values() for x in games.values()]), 0.95)
    thresholds = np.linspace(0, np.clip(1.1 * highest, 1, 8), 200)
    figure, axes = panels([""], width=5, height=3.2)
    for i, (label, games) in enumerate(normalised.items()):
        scores, style = list(games.values()), {"color": COLOURS[i % len(COLOURS)]}
        axes[""].plot(thresholds, profile(scores, thresholds), linestyle=STYLES[i % len(STYLES)], label=label, **style)
        if max(map(len, scores)) > 1:
            low, high = bootstrap(lambda samples: profile(samples, thresholds), scores)
            axes[""].fill_between(thresholds, low, high, alpha=0.2, linewidth=0, **style)
    axes[""].set(xlabel="human-normalised score τ", ylabel="share of runs above τ", ylim=(0, 1))
    axes[""].legend(frameon=False)
    save(figure, out, "profiles")


def main(args: Args):
    if not args.sets:
        fail("name a result set, such as benchmark/results/classic")
    try:
        groups, baseline = read_groups(args)
        for folder in args.sets:
            if list(folder.glob("*__*__*.csv")):
                summarise(folder)
    except ResultError as error:
        fail(error)
    normalised, out = normalise(args, groups), args.out or args.sets[0]
    out.mkdir(parents=True, exist_ok=True)
    parts = [table(args, groups, baseline, normalised), made_by(groups)]
    if normalised:
        parts.insert(1, aggregate_table(normalised))
        draw_profiles(normalised, out)
    options = [*map(str, args.sets), *["--out", str(args.out)] * (args.out is not None)]
    options += ["--baseline", args.baseline] * bool(args.baseline) + ["--score", args.score] * (
        args.score != Args.score
    )
    parts.append(f"Table and figures: `python benchmark/report.py {shlex.join(options)}`\n")
    (out / "table.md").write_text("\n".join(filter(None, parts)))
    draw_curves(groups, out)
    if len({label for _, label in groups}) > 1:
        draw_final(args, groups, out)
    print((out / "table.md").read_text())
    print(f"table and figures are in {out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
