"""Where a script's time goes, and how close to the limit it is, on the machine at hand.

    python benchmark/speed.py --script pqn_atari_envpool
    python benchmark/speed.py --script pqn_atari_envpool pqn_atari_lstm                   # and their ratio
    python benchmark/speed.py --script pqn --num-envs 1024 --num-eval-envs 0              # any option of the script
    python benchmark/speed.py --script pqn --num-envs 32 --num-steps 64 --num-minibatches 16 --update-epochs 4 \\
        --hidden-sizes 120 84 --num-eval-envs 0                                           # with CleanRL's network
    python benchmark/speed.py --script pqn --sweep num_envs 8 32 128 512 2048             # also a CSV and its plot
    python benchmark/speed.py --script pqn --sweep hidden_sizes 64,64 256,256 1024,1024
    python benchmark/speed.py --script pqn_atari_envpool --sweep num_minibatches 64 32 16 8
    python benchmark/speed.py --plot benchmark/results/speed/pqn__num_envs.csv            # draws it again

Three runs: EnvPool alone with random actions, which is the ceiling; the script's main() as it stands; and main() again
with a clock around the functions that it calls (waiting for the GPU before and after each, which costs a little, so
the whole script's speed comes from the run without clocks). Numbers are medians over the rollouts after the first few,
in brackets the quartiles. Steps are those of the training environments. The greedy ones are stepped beside them, by
the script and by EnvPool alone: the share of the ceiling is the time that EnvPool alone takes to step all of a
rollout's environments, divided by the time that the script takes for the rollout. The floating-point operations of a
gradient step are counted by PyTorch, and compared with a large matrix product in the same precision, the best of
several. Nothing else may run meanwhile: a sweep is refused on a machine that is not idle, anything else says so.
"""

import argparse
import csv
import importlib
import io
import os
import re
import resource
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack, chdir, redirect_stdout
from datetime import date
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from collect import ResultError, commit, fail, hardware, read_events, write_whole
from report import COLOURS, STYLES, markdown, save
from torch.utils.flop_counter import FlopCounterMode

SCRIPTS = "pqn", "pqn_lstm", "pqn_atari_envpool", "pqn_atari_lstm"
PARTS = {"act": "acting", "q_lambda_targets": "targets", "train_step": "learning"}
WARM_UP = 4  # rollouts; CUDA graphs are recorded in them
THREADS = torch.get_num_threads()  # before a script chooses


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def busy_seconds(stat, cores):
    """Seconds that these cores were not idle, all of them together, in the text of /proc/stat."""
    lines = [line.split() for line in stat.splitlines() if re.match(r"cpu\d", line)]
    ticks = [list(map(int, ticks)) for name, *ticks in lines if int(name[3:]) in cores]
    return sum(sum(x[:3] + x[5:8]) for x in ticks) / os.sysconf("SC_CLK_TCK")  # without idle and iowait


def cores_in_use():
    """How many of the cores that this process may use are kept busy by others, measured over a second."""
    stat, cores = Path("/proc/stat"), os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    if not stat.exists():
        return 0.0
    others = lambda: busy_seconds(stat.read_text(), cores) - time.process_time()
    before, start = others(), time.perf_counter()
    time.sleep(1)
    return (others() - before) / (time.perf_counter() - start)


def machine():
    made = f"commit {commit() or 'unknown'}, {date.today()}"
    return f"{hardware()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {made}"


def quartiles(values):
    return np.percentile(values, [50, 25, 75])


def ceiling(script, args, rollouts):
    """Seconds that EnvPool takes for each rollout's steps when nothing has to be thought about."""
    num_envs = args.num_envs + args.num_eval_envs
    envs = script.make_envs(args, num_envs, (args.seed, 0))
    envs.reset()
    actions = np.random.default_rng(0).integers(script.spaces(envs)[1].n, size=(args.num_steps, num_envs))
    seconds = []
    for _ in range(rollouts):
        start = time.perf_counter()
        for t in range(args.num_steps):
            script.step_envs(envs, actions[t])
        seconds.append(time.perf_counter() - start)
    return seconds[WARM_UP:]


def run_main(script, args, rollouts):
    """Seconds per rollout of main(), from its own curves."""
    args.total_timesteps, args.log_interval = rollouts * args.num_envs * args.num_steps, 1
    with tempfile.TemporaryDirectory() as folder, chdir(folder), redirect_stdout(io.StringIO()):
        script.main(args)
        (run_folder,) = Path("runs").glob("*")
        return np.diff(read_events(run_folder)[:, 1])[WARM_UP:]


class Clock:
    """Adds up the seconds that each part takes in each rollout."""

    def __init__(self, device):
        self.device, self.rollouts, self.flops = device, [], 0

    def timed(self, function, part):
        def wrapper(*args, **kwargs):
            if part == "learning" and not self.flops:
                with FlopCounterMode(display=False) as counter:
                    result = function(*args, **kwargs)
                self.flops = counter.get_total_flops()
                return result
            wait(self.device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            wait(self.device)
            self.rollouts[-1][part] += time.perf_counter() - start
            return result

        return wrapper

    def patches(self, script):
        """main() with a clock around its parts. What becomes a CUDA graph is timed from outside of it."""

        def collect(collector, *args, original=script.Collector.collect):
            self.rollouts.append(defaultdict(float))
            return original(collector, *args)

        def capture(function, *args):
            name = getattr(function, "func", function).__name__
            return self.timed(script_capture(function, *args), PARTS.get(name, name))

        yield mock.patch.object(script.Collector, "collect", collect)
        yield mock.patch.object(script, "step_envs", self.timed(script.step_envs, "stepping"))
        if script_capture := getattr(script, "capture", None):
            yield mock.patch.object(script, "capture", capture)
        else:
            for name, part in PARTS.items():
                yield mock.patch.object(script, name, self.timed(getattr(script, name), part))


def matmul_peak(device, dtype):
    """FLOP/s of a large matrix product, the best of five."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        wait(device)
        start = time.perf_counter()
        a @ b
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds[1:])


def measure(script, options, rollouts):
    """All there is to know about the script with these options, as a dict of (median, quartile, quartile) and more."""
    torch.set_num_threads(THREADS)  # the script chooses for itself, after what it did for another value of a sweep
    args = lambda: tyro.cli(script.Args, args=options)
    device, settings = script.pick_device(args().device), args()
    precision = script.pick_precision(settings.precision, device) if hasattr(settings, "precision") else "fp32"
    clock = Clock(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    whole = run_main(script, args(), rollouts)
    memory = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)}
    if device.type == "cuda":
        memory["GPU"] = torch.cuda.max_memory_allocated(device)
    with ExitStack() as stack:
        for patch in clock.patches(script):
            stack.enter_context(patch)
        clocked = run_main(script, args(), rollouts)
    timed = clock.rollouts[WARM_UP + 1 :]  # read_events() gives the times between rollouts: one fewer
    seconds = {"EnvPool alone": ceiling(script, settings, rollouts)}
    order = ["stepping", *PARTS.values()]
    for part in sorted(timed[0], key=lambda part: order.index(part) if part in order else len(order)):
        seconds[part] = [rollout[part] for rollout in timed]
    rest = np.array(clocked) - [sum(rollout.values()) for rollout in timed]
    seconds |= {"the rest": np.maximum(rest, 0), "whole script": whole}
    batch = settings.num_envs * settings.num_steps
    gradient_steps = settings.update_epochs * settings.num_minibatches
    peak = matmul_peak(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    return {
        "seconds": {part: quartiles(x) for part, x in seconds.items()},
        "clocked": np.median(clocked),
        "batch": batch,
        "minibatch": batch // settings.num_minibatches,
        "gradient_step": quartiles(seconds["learning"]) / gradient_steps,
        "flops": clock.flops,
        "peak": peak,
        "precision": precision,
        "memory": memory,
    }


def show(name, options, result):
    """The result as markdown."""
    batch, seconds = result["batch"], result["seconds"]
    limit = batch / seconds["EnvPool alone"][0]
    rows = []
    for part, (median, low, high) in seconds.items():
        speed = f"{batch / median:,.0f} [{batch / high:,.0f}, {batch / low:,.0f}]" if median > 0 else ""
        of_limit = f"{batch / median / limit:.2f}" if part in ("EnvPool alone", "whole script") else ""
        of_time = f"{median / result['clocked']:.0%}" if part not in ("EnvPool alone", "whole script") else ""
        rows.append([part, f"{1000 * median:,.2f}", speed, of_limit, of_time])
    header = ["part", "ms per rollout", "steps/s [quartiles]", "share of the ceiling", "share of the time"]
    step, flops = result["gradient_step"][0], result["flops"]
    memory = ", ".join(f"{where} {size / 2**20:,.0f} MiB" for where, size in result["memory"].items())
    return f"""`{" ".join([name, *options])}`, {batch:,} steps a rollout; {machine()}

{markdown(header, rows)}
Learning: {1000 * step:.2f} ms a gradient step on {result["minibatch"]:,} transitions, {flops / 1e9:.3g} GFLOP, \
{flops / step / 1e9:,.0f} GFLOP/s: {flops / step / result["peak"]:.1%} of the {result["peak"] / 1e9:,.0f} GFLOP/s of a \
large matrix product in {result["precision"]}. Peak memory so far: {memory}.
"""


# --------------------------------------------------------------------------------------------------------- sweeps


def sweep_rows(option, results):
    """One row for each value of the option and part of the time."""
    yield option, "part", "steps_per_second", "low", "high", "share_of_matmul_peak"
    for value, result in results.items():
        share = result["flops"] / result["gradient_step"][0] / result["peak"]
        for part, (median, low, high) in result["seconds"].items():
            if part != "the rest":
                speeds = [f"{result['batch'] / x:.0f}" for x in (median, high, low)]
                yield value, part, *speeds, f"{share:.4f}" if part == "learning" else ""


def plot_sweep(path):
    """Steps/s of each part against the option that was swept."""
    try:
        (option, *_), *rows = csv.reader(line for line in path.read_text().splitlines() if not line.startswith("#"))
        rows = [(value, part, *map(float, speeds)) for value, part, *speeds, _ in rows]
    except (OSError, ValueError) as error:
        raise ResultError(f"{path} is not a sweep's CSV: {error}") from None
    values = list(dict.fromkeys(value for value, *_ in rows))
    figure, ax = plt.subplots(figsize=(5.5, 3.5))
    for i, part in enumerate(dict.fromkeys(part for _, part, *_ in rows)):
        speeds = np.array([row[2:] for row in rows if row[1] == part])
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)], "label": part}
        ax.errorbar(range(len(values)), speeds[:, 0], np.abs(speeds[:, 1:] - speeds[:, :1]).T, marker="o", **style)
    ax.set(yscale="log", xlabel=option.replace("_", " "), ylabel="steps/s", xticks=range(len(values)))
    ax.set_xticklabels(values)
    figure.legend(loc="outside right center", frameon=False)
    save(figure, path.parent, path.stem)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--script", nargs="+", default=["pqn"], help=f"of {', '.join(SCRIPTS)}")
    parser.add_argument("--rollouts", type=int, default=24, help="rollouts in each of the three runs")
    parser.add_argument("--sweep", nargs="+", metavar=("OPTION", "VALUE"), help="measure at several values")
    parser.add_argument("--out", type=Path, default=Path("benchmark/results/speed"), help="folder for a sweep")
    parser.add_argument("--force", action="store_true", help="sweep on a busy machine, replace a sweep that is there")
    parser.add_argument("--plot", type=Path, help="only draw this CSV of a sweep again")
    args, options = parser.parse_known_args()
    try:
        if args.plot:
            return plot_sweep(args.plot)
    except ResultError as error:
        fail(error)
    root = Path(__file__).resolve().parents[1]
    for name in args.script:
        if name not in SCRIPTS:
            fail(f"--script measures {', '.join(SCRIPTS)}, not {name}")
    if args.sweep and len(args.script) > 1:
        fail("--sweep measures one --script at a time")
    if args.rollouts < WARM_UP + 2:
        fail(f"--rollouts must be at least {WARM_UP + 2}, not {args.rollouts}")
    sys.path.insert(0, str(root))
    scripts = {f"{name}.py": importlib.import_module(name) for name in args.script}
    path = args.out.resolve() / f"{args.script[0]}__{args.sweep[0]}.csv" if args.sweep else None
    busy = cores_in_use()
    if path and path.exists() and not args.force:
        fail(f"{path} is there already: --out writes elsewhere, --force replaces it")
    if busy > 0.1:
        said = f"other processes keep {busy:.1f} cores busy, which spoils the measurement"
        if path and not args.force:
            fail(f"{said}: wait, or add --force")
        print(f"Careful: {said}.\n")
    if not args.sweep:
        cost = {}
        for name, script in scripts.items():
            result = measure(script, options, args.rollouts)
            cost[name] = result["seconds"]["whole script"][0] / result["batch"]
            print(show(name, options, result), flush=True)
        first = next(iter(cost))
        for name in [*cost][1:]:
            print(f"{name} takes {cost[name] / cost[first]:.2f} times the wall time per step of {first}.")
        return
    ((name, script),) = scripts.items()
    option, *values = args.sweep
    results = {}
    for value in values:
        swept = [*options, f"--{option.replace('_', '-')}", *value.split(",")]
        results[value] = measure(script, swept, args.rollouts)
        print(show(name, swept, results[value]), flush=True)
        lines = io.StringIO(f"# {' '.join([name, *options])}; {machine()}\n")
        lines.seek(0, os.SEEK_END)
        csv.writer(lines, lineterminator="\n").writerows(sweep_rows(option, results))
        write_whole(path, lines.getvalue())  # after every value, so that nothing is lost when it is interrupted
    plot_sweep(path)
    print(f"{path} and its plot are written")


if __name__ == "__main__":
    main()
