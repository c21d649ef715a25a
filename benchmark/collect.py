"""From a run to its line in a set of results, and the files of a set.

    python benchmark/collect.py runs/CartPole-v1__pqn__1__1700000000 benchmark/results/mine \\
        --command "python pqn.py --env-id CartPole-v1 --seed 1"

launch.py does this after each run. A set is a folder with two files: runs.csv has a line for each run, which says how
it was made and what came out, and curves.csv has its curves. They are taken from TensorBoard's files and thinned to
200 points at most, each the mean of neighbouring ones; the final agent is evaluated by play.py. A run that is added
takes the place of one with the same environment, variant and seed. Exit code 3: the run has steps to go; --unfinished
takes it as it is.
"""

import csv
import fcntl
import io
import math
import os
import socket
import subprocess
import sys
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from unittest import mock

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for play.py and the scripts that it loads

UNFINISHED = 3  # exit code
KEY = "env", "variant", "seed"
# An empty cell: not known, because the run is older than the column. steps_to_do are those of the whole run, distinct
# counts the greedy episodes that differ from each other, ±, min and max are over episodes.
MADE_BY = "command", "script_sha1", "commit", "date", "hardware", "threads", "torch"
MEASURED = "steps", "steps_to_do", "seconds", "steps_per_second", "train_return", "train_std"
MEASURED += "episodes", "distinct", "greedy_mean", "greedy_std", "greedy_min", "greedy_max"
RUN = *KEY, *MADE_BY, *MEASURED, "points"
POINT = "step", "seconds", "episodic_return", "eval_return"
TAGS = "charts/episodic_return", "eval/episodic_return"
TEXT = "env", "variant", "command", "script_sha1", "commit", "date", "hardware", "torch"
WHOLE = "seed", "steps", "points"


@dataclass
class Args:
    run_folder: tyro.conf.Positional[Path]
    """the folder of a run, as the script printed it"""
    set: tyro.conf.Positional[Path]
    """the set that it is added to"""
    command: str
    """the command that made it"""
    variant: str = ""
    """what to call it in tables and plots; the script's name if not given"""
    episodes: int = 100
    """greedy episodes to evaluate the agent in"""
    unfinished: bool = False
    """take it although it has steps to go"""
    script_sha1: str = ""
    """hash of the script that made it; launch.py gives it"""


class ResultError(Exception):
    """Names the file, and the line in it, that is not as it should be."""


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@dataclass
class Run:
    """One run: `about` has the columns of RUN, as far as they are known; `points` is (n, 4), NaN for no value."""

    about: dict
    points: np.ndarray

    @property
    def key(self):
        return tuple(self.about[name] for name in KEY)

    @property
    def unfinished(self):
        return self.about["steps"] < self.about["steps_to_do"]


# ---------------------------------------------------------------------------------------- from TensorBoard's files


def read_events(run_folder):
    """The curves of a run: (n, 4), the columns of POINT. A run that was resumed has left several files; the time
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


# ------------------------------------------------------------------------------------------ what is known of a run


def hardware(device="auto"):
    """The processor, how many of its cores this process may use, and the GPU, for a run that may use one."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = "" if device == "cpu" or not torch.cuda.is_available() else f"{torch.cuda.get_device_name()}, "
    return f"{gpu}{name}, {mine} of {os.cpu_count()} cores"


def commit():
    """The commit of this repository, marked where Python files differ from it; nothing outside of git."""
    git = lambda *words: subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)
    try:
        head = git("rev-parse", "--short=10", "HEAD").stdout.strip()
    except OSError:
        return ""
    return head + "-dirty" * bool(head and git("status", "--porcelain", "--", "*.py").stdout)


def evaluate(script, run_folder, episodes):
    """Returns of that many greedy episodes, and how many of these differ in what the agent sees. Deterministic
    episodes differ only if their starts do; on Atari, by the number of no-ops."""
    import torch

    import play

    seen, over = {}, set()

    def watch(envs, actions, *more, step_envs=script.step_envs):
        obs, *_, ended = result = step_envs(envs, actions, *more)
        obs = obs.cpu().numpy() if torch.is_tensor(obs) else obs  # of jax_envs.py on a GPU
        for i in range(len(obs)):
            if i not in over:
                seen[i] = zlib.crc32(np.ascontiguousarray(obs[i]), seen.get(i, 0))
        over.update(np.flatnonzero(ended).tolist())
        return result

    with mock.patch.object(script, "step_envs", watch):
        returns = play.main(play.Args(str(run_folder), episodes=episodes))
    return returns, len(set(seen.values()))


def collect(args: Args):
    """The run with everything that is known about it; plays the evaluation episodes."""
    import torch

    import play

    script = play.load_script(args.run_folder)
    checkpoint = script.load_checkpoint(args.run_folder)
    options = checkpoint["args"]
    if "num_envs" not in options:
        fail(f"{args.run_folder} was made by {script.__name__}.py: benchmark/offline.py takes its measures")
    rollout = options["num_envs"] * options["num_steps"]
    if not args.unfinished and checkpoint["step"] + rollout <= options["total_timesteps"]:
        print(f"{args.run_folder} has made {checkpoint['step']:,} of {options['total_timesteps']:,} steps")
        raise SystemExit(UNFINISHED)
    points = read_events(args.run_folder)
    points = points[points[:, 0] <= checkpoint["step"]]  # a run that is not over may have gone on meanwhile
    if not len(points):
        fail(f"there are no curves in {args.run_folder}")
    greedy, distinct = evaluate(script, args.run_folder, args.episodes)
    seconds, train = points[-1, 1], checkpoint["last_returns"] or [math.nan]
    spread = lambda x: np.std(x, ddof=1) if len(x) > 1 else math.nan
    about = {
        "env": options["env_id"].split(":")[-1],
        "variant": args.variant or checkpoint["script"],
        "seed": options["seed"],
        "command": args.command,
        "script_sha1": args.script_sha1,
        "commit": commit(),
        "date": date.today().isoformat(),
        "hardware": hardware(options["device"]),
        "threads": checkpoint.get("threads", torch.get_num_threads()),
        "torch": torch.__version__,
        "steps": checkpoint["step"],
        "steps_to_do": max(checkpoint["step"], options["total_timesteps"] // rollout * rollout),
        "seconds": seconds,
        "steps_per_second": points[-1, 0] / seconds,
        "train_return": np.mean(train),
        "train_std": spread(train),
        "episodes": args.episodes,
        "distinct": distinct,
        "greedy_mean": np.mean(greedy),
        "greedy_std": spread(greedy),
        "greedy_min": np.min(greedy),
        "greedy_max": np.max(greedy),
    }
    return Run(about, thin(points))


# --------------------------------------------------------------------------------------------- the files of a set


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


def write_csv(path, header, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *(map(cell, row) for row in rows)])
    write_whole(path, text.getvalue())


def write_lines(folder, runs):
    rows = ({**run.about, "points": len(run.points)} for run in runs)
    write_csv(Path(folder, "runs.csv"), RUN, ([row[name] for name in RUN] for row in rows))


def write_set(folder, runs):
    """The curves first: without its line in runs.csv a run is not there yet."""
    runs = sorted(runs, key=lambda run: run.key)
    write_csv(Path(folder, "curves.csv"), (*KEY, *POINT), ((*run.key, *point) for run in runs for point in run.points))
    write_lines(folder, runs)


def read_csv(path, columns):
    """The lines of a CSV with these columns, as dicts of text and numbers (NaN for empty cells), and a function that
    reports what is wrong with the last line."""
    line = 1

    def wrong(reason):
        raise ResultError(f"{path}, line {line}: {reason}")

    def value(name, written):
        if name in TEXT:
            return written
        if name in WHOLE and not (written.isdigit() and written == str(int(written))):
            wrong(f"{name} must be a whole number, not {written!r}")
        try:
            number = int(written) if name in WHOLE else float(written or "nan")
        except ValueError:
            number = math.inf
        if math.isinf(number) or (written and math.isnan(number)):
            wrong(f"{name} must be a number, not {written!r}")
        return number

    try:
        with open(path, newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if header != list(columns):
                wrong(f"expected the columns {','.join(columns)}, found {','.join(header)!r}")
            for cells in reader:
                line = reader.line_num
                if len(cells) != len(columns):
                    wrong(f"expected {len(columns)} values, found {len(cells)}")
                yield {name: value(name, written) for name, written in zip(columns, cells, strict=True)}, wrong
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ResultError(f"{path} cannot be read: {error}") from None


def read_set(folder) -> list[Run]:
    """The runs of a set or, in a folder without runs.csv, whatever runs TensorBoard has logged below it."""
    folder = Path(folder)
    if not (folder / "runs.csv").exists():
        return read_logs(folder)
    version = lambda: ((stat := (folder / "runs.csv").stat()).st_mtime_ns, stat.st_ino)
    before = version()
    try:
        runs = read_files(folder)
    except ResultError:
        if version() == before:
            raise
    return runs if version() == before else read_set(folder)  # a run was added while the two files were read


def read_files(folder):
    """The runs of runs.csv with their curves."""
    runs, curves = {}, {}
    for about, wrong in read_csv(folder / "runs.csv", RUN):
        run = Run(about, np.empty((0, len(POINT))))
        if run.key in runs:
            wrong(f"there is another line for {', '.join(map(str, run.key))}")
        runs[run.key], curves[run.key] = run, []
    for row, wrong in read_csv(folder / "curves.csv", (*KEY, *POINT)):
        key, point = tuple(row[name] for name in KEY), [row[name] for name in POINT]
        if key not in runs:  # whoever wrote it was killed before it could write runs.csv
            continue
        if math.isnan(point[0]) or math.isnan(point[1]):
            wrong("step or seconds missing")
        if curves[key] and point[0] <= curves[key][-1][0]:
            wrong(f"step {point[0]:.0f} does not come after {curves[key][-1][0]:.0f}")
        curves[key].append(point)
    for key, run in runs.items():
        if len(curves[key]) != run.about["points"]:
            here = f"{len(curves[key])} of {run.about['points']} points of {', '.join(map(str, key))}"
            raise ResultError(f"{folder / 'curves.csv'} has {here}")
        run.points = np.array(curves[key]).reshape(-1, len(POINT))
    return list(runs.values())


def read_logs(folder):
    """Runs as the scripts have logged them below a folder; of these only the curves are known."""
    if not folder.is_dir():
        raise ResultError(f"there is no folder {folder}")
    runs, found = [], {}
    for run_folder in sorted({file.parent for file in folder.rglob("events.out.tfevents.*")}):
        # launch.py's folder tells the variant, the run's own folder only the script
        owners = run_folder.resolve().parents[1].name, run_folder.name
        env, variant, seed = next((x.split("__")[:3] for x in owners if x.count("__") == 3), ("", "", ""))
        points = read_events(run_folder)
        if seed.isdigit() and len(points):
            about = dict.fromkeys(RUN, math.nan) | dict.fromkeys(TEXT, "")
            about |= {"env": env, "variant": variant, "seed": int(seed)}
            about |= {"steps": int(points[-1, 0]), "seconds": points[-1, 1]}
            about |= {"steps_per_second": points[-1, 0] / points[-1, 1]}
            runs.append(Run(about, thin(points)))
            other = found.setdefault(runs[-1].key, run_folder)
            if other != run_folder:
                what = f"both of {env}, {variant}, seed {seed}"
                raise ResultError(f"{other} and {run_folder} are {what}: they would count as two seeds, move one away")
    if not runs:
        raise ResultError(f"there are no results in {folder}: neither runs.csv nor runs of these scripts")
    return runs


@contextmanager
def locked(path):
    """Only one process at a time, on all machines that share the folder; a process that dies lets go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def add_to_set(folder, runs):
    """Tasks of a job array may do this at the same time. A run that is replaced loses its line before its curves
    change, so that its old figures never stand beside new curves, also where this is killed halfway."""
    with locked(Path("runs/lock")):
        there = read_set(folder) if Path(folder, "runs.csv").exists() else []
        new = {run.key for run in runs}
        kept = [run for run in there if run.key not in new]
        if len(kept) < len(there):
            write_lines(folder, kept)
        write_set(folder, [*kept, *runs])


def main(args: Args):
    if args.episodes < 1:
        fail(f"--episodes must be at least 1, not {args.episodes}")
    run = collect(args)
    try:
        add_to_set(args.set, [run])
    except (ResultError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main(tyro.cli(Args))
