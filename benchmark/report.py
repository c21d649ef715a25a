"""Tables and figures from sets of results, as launch.py leaves them, or from whatever runs there are below a folder.

    python benchmark/report.py benchmark/results/classic                     # table.md and figures, into that folder
    python benchmark/report.py benchmark/results/ablations/lambda --baseline lambda_0.95
    python benchmark/report.py benchmark/results/atari5 benchmark/results/mine --out comparison
    python benchmark/report.py runs --out figures                            # runs that launch.py did not start
    python benchmark/report.py benchmark/results/classic benchmark/results/atari_cpu --targets time_to_target.md

Intervals are 95% ones: Student's t for a mean over seeds, Welch's t for a difference of two; ± and they divide by
n - 1. For normally distributed returns they cover what they say; for exponentially distributed ones a mean's interval
covers 88% at 5 seeds and 90% at 10. (Simulated. Percentiles of a bootstrap cover 84% and 89% even of normal ones.) A
table says how many comparisons it makes, and marks those that hold for all of them together (Holm).

On five Atari games or more, human-normalised scores are summed up by the interquartile mean, median, mean, optimality
gap and performance profile of Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice"
(NeurIPS 2021), with their intervals: percentiles of 2,000 resamples of each game's seeds. These cover less than they
say: simulated, 81% to 83% with 3 seeds of 5 games, 87% to 92% with 5. Nothing depends on the date or on chance:
the same sets give the same files.
"""

import re
import shlex
from dataclasses import dataclass
from inspect import getdoc
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import tyro
from collect import POINT, ResultError, fail, read_set, write_whole
from matplotlib.ticker import EngFormatter
from published import AFTAB_50M, CLEANRL, RANDOM_AND_HUMAN, TARGETS

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
}
MEASURES = {
    "greedy_mean": "greedy return",  # of the final agent, by play.py
    "train_return": "training return",  # of the last 100 training episodes
    "greedy_curve": "greedy return, mean over the curve",  # of the greedy environments during training
}
SPREAD = {"greedy_mean": "greedy_std", "train_return": "train_std"}  # over the episodes of one agent


@dataclass
class Args:
    sets: tyro.conf.Positional[tuple[Path, ...]]
    """one set of results, or several to compare"""
    out: Path | None = None
    """folder for table and figures; the first set's if not given"""
    baseline: str = ""
    """what the others are compared with; the first one if not given"""
    measures: tuple[Literal["greedy_mean", "train_return", "greedy_curve"], ...] = ("greedy_mean", "train_return")
    """what the table compares: greedy return of the final agent, training return at the end, mean of the greedy curve;
    scores and the figure of final results are of the first"""
    targets: Path | None = None
    """write only the table of times to the targets, to this file"""


# -------------------------------------------------------------------------------------------------- statistics


def student(df):
    """Angles θ from 0 to π/2, and the share of Student's t with df degrees of freedom that lies within ±√df tan θ. (Its
    density is proportional to cos(θ)^(df - 1) there.)"""
    angles, step = np.linspace(0, np.pi / 2, 4001, retstep=True)
    share = np.append(0, np.cumsum(np.cos(angles[:-1] + step / 2) ** (df - 1)))
    return angles, share / share[-1]


def t_quantile(df, inside=0.95):
    angles, share = student(df)
    return np.sqrt(df) * np.tan(np.interp(inside, share, angles))


def mean_interval(x):
    """95% interval of the mean along the first axis."""
    half = t_quantile(len(x) - 1) * x.std(0, ddof=1) / np.sqrt(len(x))
    return x.mean(0) - half, x.mean(0) + half


def welch(x, y):
    """Difference of two means, the ends of its 95% interval and its two-sided p."""
    difference, parts = x.mean() - y.mean(), np.array([x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)])
    if not parts.any():
        return difference, difference, difference, float(difference == 0)
    error, df = np.sqrt(parts.sum()), parts.sum() ** 2 / (parts**2 / [len(x) - 1, len(y) - 1]).sum()
    angles, share = student(df)
    half = t_quantile(df) * error
    p = 1 - np.interp(np.arctan(abs(difference) / error / np.sqrt(df)), angles, share)
    return difference, difference - half, difference + half, p


def holm(p):
    """Adjusted p-values: below 0.05 for the comparisons that hold for all of them together."""
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(np.sort(p) * np.arange(len(p), 0, -1))
    return np.minimum(1, adjusted)[np.argsort(order)]


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
        runs = read_set(folder) or fail(f"there are no runs in {folder}")
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
    if name == "greedy_curve":  # the mean over steps, straight lines between the points
        known = [(run.points[:, 0], run.points[~np.isnan(run.points[:, 3])]) for run in runs]
        return np.array([np.interp(x, p[:, 0], p[:, 3]).mean() if len(p) else np.nan for x, p in known])
    return np.array([run.about[name] for run in runs])


def labels_of(groups):
    return list(dict.fromkeys(label for _, label in groups))


def normalise(args, groups):
    """{label: {game: human-normalised scores}} of the games that have them."""
    normalised = {}
    for (env, label), runs in groups.items():
        scores, game = values(runs, args.measures[0]), env.removesuffix("-v5")
        if game in RANDOM_AND_HUMAN and not np.isnan(scores).any():
            random, human = RANDOM_AND_HUMAN[game]
            normalised.setdefault(label, {})[env] = (scores - random) / (human - random)
    return normalised


# -------------------------------------------------------------------------------------------------------- tables


def number(x):
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"


def between(low, high):
    return f"[{number(low)}, {number(high)}]"


def markdown(header, rows):
    return "".join(f"| {' | '.join(row)} |\n" for row in [header, ["---"] * len(header), *rows])


def compare(args, groups, baseline):
    """{(environment, label, measure): (difference, low, high, p, p by Holm)} where there are seeds enough."""
    found = {}
    for (env, label), runs in groups.items():
        for name in args.measures:
            x, other = values(runs, name), values(groups.get((env, baseline), []), name)
            if label != baseline and min(len(x), len(other)) > 1 and not np.isnan([*x, *other]).any():
                found[env, label, name] = welch(x, other)
    adjusted = holm([p for *_, p in found.values()])
    return {key: (*result, p) for (key, result), p in zip(found.items(), adjusted, strict=True)}


def measured(runs, name, games):
    """Mean and spread over seeds and, of Atari games, over the episodes of each seed."""
    x = values(runs, name)
    if np.isnan(x).any():
        return ""
    over_seeds = f" ± {number(x.std(ddof=1))}" if len(x) > 1 else ""
    spread = values(runs, SPREAD[name]).mean() if games and name in SPREAD else np.nan  # NaN of a single episode
    return number(x.mean()) + over_seeds + ("" if np.isnan(spread) else f" (games ± {number(spread)})")


def steps_made(runs):
    parts = [f"{values(runs, 'steps').mean():,.0f}"]
    for about in (run.about for run in runs if run.unfinished):
        parts.append(f"**unfinished**: seed {about['seed']} at {about['steps']:,} of {about['steps_to_do']:,.0f}")
    return "; ".join(parts)


def table(args, groups, baseline, normalised):
    """One row for each environment and label, and how sure what it says is. Columns that stay empty are left out."""
    several, found, rows = len(labels_of(groups)) > 1, compare(args, groups, baseline), []
    for (env, label), runs in groups.items():
        scores, script = normalised.get(label, {}).get(env), Path((runs[0].about["command"] + " - -").split()[1]).stem
        row = {"environment": env, "variant": label * several, "seeds": str(len(runs))}
        for name in args.measures:
            x = values(runs, name)
            row[MEASURES[name]] = measured(runs, name, scores is not None)
            if several:
                difference, *ends, _, p = found.get((env, label, name), [np.nan] * 5)
                told = f"{number(difference)} {between(*ends)}" + "\\*" * bool(p < 0.05)
                row[f"{MEASURES[name]}, difference from {baseline}"] = "" if np.isnan(difference) else told
            else:
                known = len(x) > 1 and not np.isnan(x).any()
                row[f"95% interval ({MEASURES[name]})"] = between(*mean_interval(x)) if known else ""
        row["human-normalised"] = "" if scores is None else number(scores.mean())
        row["distinct games"] = ", ".join(f"{n:.0f}" for n in values(runs, "distinct") if n == n)
        published = CLEANRL.get(script, {}) if not several or scores is not None else {}
        row["CleanRL's training return"] = published.get(env, "")
        row["aftab's greedy return at 50M"] = number(AFTAB_50M[env]) if env in AFTAB_50M else ""
        row["steps"], row["steps/s"] = steps_made(runs), f"{np.median(values(runs, 'steps_per_second')):,.0f}"
        row["minutes"] = f"{values(runs, 'seconds').mean() / 60:.1f}"
        rows.append(row)
    header = [name for name in rows[0] if any(row[name] for row in rows)]
    text = markdown(header, [[row[name] for name in header] for row in rows])
    if any(len(runs) > 1 for runs in groups.values()):
        text += "\n±: standard deviation over seeds (n - 1). In brackets: 95% intervals (Student's, Welch's t)."
    if found:
        alone, together = (sum(result[i] < 0.05 for result in found.values()) for i in (3, 4))
        text += (
            f" The table makes {len(found)} comparisons: {alone} of their intervals leave out 0, {together} of these "
        )
        text += "also at 5% for all comparisons together (Holm, marked \\*)."
    return text.rstrip("\n") + "\n"


def aggregate_table(normalised, groups):
    rows = []
    for label, games in normalised.items():
        scores = list(games.values())
        cells = [number(statistic(scores)) for statistic in AGGREGATES.values()]
        if max(map(len, scores)) > 1:
            ends = [between(*bootstrap(statistic, scores)) for statistic in AGGREGATES.values()]
            cells = [f"{cell} {end}" for cell, end in zip(cells, ends, strict=True)]
        of = f"{len(scores)} games, {sum(map(len, scores))} runs"
        unfinished = sum(run.unfinished for env in games for run in groups[env, label])
        of += f", **unfinished**: {unfinished}" * bool(unfinished)
        rows.append([label, of, *cells])
    return markdown(["human-normalised", "of", *AGGREGATES], rows)


def made_by(groups):
    """The commands behind a table, for each machine and commit that ran them."""
    blocks = {}
    for about in (run.about for runs in groups.values() for run in runs if run.about["command"]):
        count = lambda name, about=about: "unknown" if about[name] != about[name] else f"{about[name]:.0f}"
        where = f"{about['hardware']}; threads: {count('threads')}; torch {about['torch']}; commit "
        where += f"{about['commit'] or 'unknown'}; {count('episodes')} greedy episodes for each agent"
        dates, commands = blocks.setdefault(where, (set(), {}))
        dates.add(about["date"])
        commands.setdefault(about["command"].removesuffix(f" --seed {about['seed']}"), []).append(about["seed"])
    parts = []
    for where, (dates, commands) in sorted(blocks.items()):
        lines = [
            f"{command} --seed {' '.join(map(str, sorted(seeds)))}\n" for command, seeds in sorted(commands.items())
        ]
        parts.append(f"On {where}; {', '.join(sorted(dates))}.\n\n```\n{''.join(lines)}```\n")
    return "\n".join(parts)


def time_to_target(groups):
    """The minutes of training until the mean of five points of a curve in a row first reached the target: the median
    over seeds, of which one that never reaches it counts as infinite, and the fastest and slowest that do."""
    rows = []
    for wanted, curve, target in TARGETS:
        for runs in (runs for (env, _), runs in groups.items() if env == wanted):
            minutes, column = [], POINT.index(curve)
            for points in (run.points[~np.isnan(run.points[:, column])] for run in runs):
                reached = (i for i in range(5, len(points) + 1) if points[i - 5 : i, column].mean() > target - 1e-6)
                minutes += [points[i - 1, 1] / 60 for i in reached][:1]
            about, median = runs[0].about, np.median(minutes + [np.inf] * (len(runs) - len(minutes)))
            taken = f"{median:.2f}" if np.isfinite(median) else "not reached"
            taken += f" ({min(minutes):.2f} to {max(minutes):.2f})" if len(minutes) > 1 else ""
            commits = ", ".join(sorted({run.about["commit"] or "unknown" for run in runs}))
            command = about["command"].removesuffix(f" --seed {about['seed']}")
            name = f"{'greedy' if curve == 'eval_return' else 'training'} {wanted} ≥ {target}"
            rows.append([name, taken, f"{len(minutes)} of {len(runs)}", about["hardware"], f"`{command}`", commits])
    return markdown(["target", "minutes", "seeds that reach it", "hardware", "command", "commit"], rows)


# ------------------------------------------------------------------------------------------------------- figures


def save(figure, out, name):
    figure.savefig(out / f"{name}.png", metadata={"Software": None})
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
    """The mean of the curves (runs, points), and its interval; between two curves the space between them, for the
    interval of two says nothing."""
    colour = COLOURS[i % len(COLOURS)]
    ax.plot(x, curves.mean(0), color=colour, linestyle=STYLES[i % len(STYLES)], label=label)
    if len(curves) > 1:
        low, high = mean_interval(curves) if len(curves) > 2 else np.sort(curves, axis=0)
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
    labels = labels_of(groups)
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
    labels = labels_of(groups)
    figure, axes = panels(list(dict.fromkeys(env for env, _ in groups)), height=0.8 + 0.28 * len(labels))
    for (env, label), runs in groups.items():
        scores, i = values(runs, args.measures[0]), labels.index(label)
        scores = scores[~np.isnan(scores)]
        if not len(scores):
            continue
        colour = COLOURS[i % len(COLOURS)]
        axes[env].plot(scores, np.full(len(scores), i), "o", color=colour, alpha=0.35, markersize=4, markeredgewidth=0)
        axes[env].plot(scores.mean(), i, "|", color=colour, markersize=14, markeredgewidth=2.5)
        if len(scores) > 2:
            axes[env].plot(mean_interval(scores), [i, i], color=colour, linewidth=2.5)
    for ax in axes.values():
        ax.set_yticks(range(len(labels)), labels)
        ax.set_ylim(len(labels) - 0.5, -0.5)
    figure.supxlabel(MEASURES[args.measures[0]], fontsize=9)
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
    if not (args.sets and args.measures):
        fail("name a set, such as benchmark/results/classic, and a measure")
    out = args.out or args.sets[0]
    if args.targets and args.targets.is_dir():
        fail(f"--targets {args.targets} is a folder: name a file in it, such as time_to_target.md")
    try:
        groups, baseline = read_groups(args)
        (args.targets.parent if args.targets else out).mkdir(parents=True, exist_ok=True)
    except (ResultError, OSError) as error:
        fail(error)
    options = [*map(str, args.sets), *["--out", str(args.out)] * (args.out is not None)]
    options += ["--baseline", args.baseline] * bool(args.baseline)
    options += ["--measures", *args.measures] * (args.measures != Args.measures)
    options += ["--targets", str(args.targets)] * (args.targets is not None)
    again = f"Made by `python benchmark/report.py {shlex.join(options)}`\n"
    if args.targets:
        write_whole(args.targets, f"{time_to_target(groups)}\n{getdoc(time_to_target)}\n\n{again}")
        return print(args.targets.read_text())
    normalised = normalise(args, groups)
    parts = [table(args, groups, baseline, normalised), made_by(groups), again]
    if len({env for games in normalised.values() for env in games}) >= 5:  # of fewer games they would say little
        parts.insert(1, aggregate_table(normalised, groups))
        draw_profiles(normalised, out)
    write_whole(out / "table.md", "\n".join(filter(None, parts)))
    draw_curves(groups, out)
    if len(labels_of(groups)) > 1:
        draw_final(args, groups, out)
    print((out / "table.md").read_text())
    print(f"table and figures are in {out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
