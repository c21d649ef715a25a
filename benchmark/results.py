"""From a finished run to the small CSV that is committed, and back.

    python benchmark/results.py runs/CartPole-v1__pqn__1__1700000000 benchmark/results/mine/CartPole-v1__pqn__1.csv \\
        --command "python pqn.py --env-id CartPole-v1 --seed 1"

launch.py does this after each run. The curves come from the run's TensorBoard files, thinned to 200 points at most
(each the mean of neighbouring ones); the agent is evaluated by play.py. The file's header says how it was made.
summary.csv holds a line for each of the files in its folder. All are written whole or not at all.
"""

import csv
import io
import math
import os
import socket
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for play.py and the scripts that it loads

COLUMNS = "step", "seconds", "episodic_return", "eval_return"
TAGS = "charts/episodic_return", "eval/episodic_return"
MADE_BY = "env", "variant", "seed", "command", "date", "hardware", "torch"
MEASURED = "steps", "seconds", "steps_per_second", "train_return", "train_std"
MEASURED += "greedy_mean", "greedy_std", "greedy_min", "greedy_max"
SUMMARY = "env", "seed", "variant", "command", *MEASURED


@dataclass
class Args:
    run_folder: tyro.conf.Positional[Path]
    """the folder of a finished run, as the script printed it"""
    result: tyro.conf.Positional[Path]
    """the CSV to write"""
    command: str
    """the command that made it, for the header"""
    variant: str = ""
    """what to call it in tables and plots; the script's name if not given"""
    episodes: int = 100
    """greedy episodes to evaluate the agent in"""


class ResultError(Exception):
    """Names the file, and the line in it, that is not as it should be."""


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@dataclass
class Run:
    """One run: `about` holds MADE_BY and MEASURED, as far as they are known; `points` is (n, 4), NaN for no value."""

    about: dict
    points: np.ndarray


# ---------------------------------------------------------------------------------------- from TensorBoard's files


def read_events(run_folder):
    """The curves of a run: (n, 4), the columns of COLUMNS. A run that was resumed has left several files; the time
    between them does not count, nor do points that a killed run wrote after its last checkpoint."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    points = np.empty((0, 4))
    for file in sorted(Path(run_folder).glob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        tags = events.Tags()
        if "charts/SPS" not in tags["scalars"]:
            continue
        first_step = events.Tensors("hyperparameters/text_summary")[0].step
        points = points[points[:, 0] <= first_step]
        before = np.interp(first_step, [0, *points[:, 0]], [0, *points[:, 1]])
        curves = [{e.step: e.value for e in events.Scalars(tag)} if tag in tags["scalars"] else {} for tag in TAGS]
        new = [
            (step, before + (step - first_step) / speed, *(curve.get(step, math.nan) for curve in curves))
            for step, speed in ((e.step, e.value) for e in events.Scalars("charts/SPS"))
        ]
        points = np.concatenate([points, np.array(new).reshape(-1, 4)])
    return points


def thin(points, most=200):
    """At most so many points. Each is the mean over its neighbours, at the step and second where they end."""
    size = max(1, math.ceil(len(points) / most))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    mean = lambda x: x[~np.isnan(x)].mean() if (~np.isnan(x)).any() else math.nan
    return np.array([(*group[-1, :2], mean(group[:, 2]), mean(group[:, 3])) for group in groups]).reshape(-1, 4)


def hardware():
    """The processor, how many of its cores this process may use, and the GPU."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{name}, {mine} of {os.cpu_count()} cores"


def collect(args: Args):
    """The run with everything that is known about it; plays the evaluation episodes."""
    import torch

    import play

    script = play.load_script(args.run_folder)
    checkpoint = script.load_checkpoint(args.run_folder)
    points = read_events(args.run_folder)
    if not len(points):
        fail(f"there are no curves in {args.run_folder}")
    greedy = play.main(play.Args(str(args.run_folder), episodes=args.episodes))
    steps, seconds = points[-1, :2]
    train = checkpoint["last_returns"] or [math.nan]
    about = {
        "env": checkpoint["args"]["env_id"],
        "variant": args.variant or checkpoint["script"],
        "seed": checkpoint["args"]["seed"],
        "command": args.command,
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "torch": torch.__version__,
        "steps": int(steps),
        "seconds": seconds,
        "steps_per_second": steps / seconds,
        "train_return": np.mean(train),
        "train_std": np.std(train),
        "greedy_mean": np.mean(greedy),
        "greedy_std": np.std(greedy),
        "greedy_min": np.min(greedy),
        "greedy_max": np.max(greedy),
    }
    return Run(about, thin(points))


# --------------------------------------------------------------------------------------------------- CSV files


def cell(value):
    """A number as it stands in the files: six digits, nothing for NaN."""
    if isinstance(value, int | str):
        return str(value)
    return "" if math.isnan(value) else f"{value:.0f}" if abs(value) >= 1e6 else f"{value:.6g}"


def write_whole(path, text):
    """Written beside the old file and then put in its place, so that there is never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def write_run(path, run: Run):
    header = [f"# {name}: {cell(run.about[name])}" for name in (*MADE_BY, *MEASURED)]
    rows = [",".join(map(cell, row)) for row in run.points]
    lines = [*header, f"# points: {len(rows)}", ",".join(COLUMNS), *rows]
    write_whole(path, "".join(f"{line}\n" for line in lines))


def read_run(path) -> Run:
    """What write_run() wrote; ResultError names the line where it is broken or incomplete."""
    about, points = {}, []
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ResultError(f"{path} cannot be read: {error}") from None
    number = 0
    header = [*MADE_BY, *MEASURED, "points"]

    def wrong(reason):
        raise ResultError(f"{path}, line {number}: {reason}")

    for number, line in enumerate(lines, start=1):
        if number <= len(header):
            name, colon, value = line.removeprefix("# ").partition(":")
            if not line.startswith("# ") or not colon or name != header[number - 1]:
                wrong(f"expected '# {header[number - 1]}: ...', found {line!r}")
            about[name] = value.strip()
            if name in ("seed", "steps", "points") and not about[name].isdigit():
                wrong(f"{name} must be a whole number, not {about[name]!r}")
            if name in ("seed", "steps", "points"):
                about[name] = int(about[name])
            elif name in MEASURED:
                about[name] = number_or(wrong, name, about[name])
        elif number == len(header) + 1:
            if line != ",".join(COLUMNS):
                wrong(f"expected '{','.join(COLUMNS)}', found {line!r}")
        else:
            cells = line.split(",")
            if len(cells) != len(COLUMNS):
                wrong(f"expected {len(COLUMNS)} values, found {len(cells)}: {line!r}")
            points.append([number_or(wrong, *named) for named in zip(COLUMNS, cells, strict=True)])
            if math.isnan(points[-1][0]) or math.isnan(points[-1][1]):
                wrong(f"step or seconds missing: {line!r}")
            if len(points) > 1 and points[-1][0] <= points[-2][0]:
                wrong(f"step {points[-1][0]:.0f} does not come after {points[-2][0]:.0f}")
    if about.get("points") != len(points):
        number += 1
        wrong(f"the file ends here, after {len(points)} of {about.get('points', '?')} points")
    return Run(about, np.array(points).reshape(-1, 4))


def number_or(wrong, name, written):
    """The number in a cell, NaN in an empty one."""
    try:
        value = float(written or "nan")
    except ValueError:
        value = math.inf
    if math.isinf(value) or (written and math.isnan(value)):
        wrong(f"{name} must be a number, not {written!r}")
    return value


def read_set(folder) -> list[Run]:
    """The runs of a set: its CSVs or, in a folder without any, whatever runs TensorBoard has logged below it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ResultError(f"there is no folder {folder}")
    files = sorted(file for file in folder.glob("*__*__*.csv"))
    if files:
        return sorted(map(read_run, files), key=lambda run: run.about["seed"])
    runs = []
    for run_folder in sorted({file.parent for file in folder.rglob("events.out.tfevents.*")}):
        # launch.py's folder tells the variant, the run's own folder only the script
        owners = run_folder.resolve().parents[1].name, run_folder.name
        env, variant, seed = next((x.split("__")[:3] for x in owners if x.count("__") == 3), ("", "", ""))
        points = read_events(run_folder)
        if seed.isdigit() and len(points):
            about = {"env": env, "variant": variant, "seed": int(seed)}
            about |= {"steps": int(points[-1, 0]), "seconds": points[-1, 1]}
            about |= {"steps_per_second": points[-1, 0] / points[-1, 1]}
            runs.append(Run(dict.fromkeys(MEASURED, math.nan) | about, thin(points)))
    if not runs:
        raise ResultError(f"there are no results in {folder}: neither CSV files nor runs of these scripts")
    return sorted(runs, key=lambda run: run.about["seed"])


def summarise(folder):
    """summary.csv, from the CSVs beside it."""
    runs = sorted(read_set(folder), key=lambda run: [run.about[name] for name in ("env", "variant", "seed")])
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows(
        [SUMMARY, *([cell(run.about[name]) for name in SUMMARY] for run in runs)]
    )
    write_whole(Path(folder, "summary.csv"), lines.getvalue())


def main(args: Args):
    if args.episodes < 1:
        fail(f"--episodes must be at least 1, not {args.episodes}")
    if not args.result.match("*__*__*.csv"):
        fail(f"{args.result} must be called <env>__<variant>__<seed>.csv")
    write_run(args.result, collect(args))


if __name__ == "__main__":
    main(tyro.cli(Args))
