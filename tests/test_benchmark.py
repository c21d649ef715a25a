"""benchmark/: the launcher on toy commands, result files, statistics against known values, and the figures."""

import csv
import importlib
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]

import correctness  # noqa: E402
import launch  # noqa: E402
import report  # noqa: E402
import results  # noqa: E402
import speed  # noqa: E402

import pqn  # noqa: E402

COMMITTED = sorted(ROOT.glob("benchmark/results/*/table.md"))


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "SEEDS WORKERS CORES OPTIONS RESULTS EPISODES OMP_NUM_THREADS SLURM_ARRAY_TASK_ID".split():
        monkeypatch.delenv(name, raising=False)


def example(env="CartPole-v1", variant="pqn", seed=1, level=1.0, points=5, command="python toy.py"):
    """A run whose returns are all `level`."""
    about = {"env": env, "variant": variant, "seed": seed, "command": f"{command} --seed {seed}", "date": "2026-01-01"}
    about |= {"hardware": "a CPU, 1 of 2 cores", "torch": "2.0"} | dict.fromkeys(results.MEASURED, float(level))
    about |= {"steps": 100 * points, "seconds": 50.0, "steps_per_second": 2.0 * points}
    steps = 100.0 * np.arange(1, points + 1)
    return results.Run(about, np.stack([steps, steps / 10, np.full(points, level), np.full(points, level)], 1))


def write(folder, *runs):
    for run in runs:
        name = "{env}__{variant}__{seed}.csv".format(**run.about)
        results.write_run(Path(folder, name), run)
    return Path(folder)


# ------------------------------------------------------------------------------------------------ the launcher

TRAIN = """
import json, os, signal, sys
from pathlib import Path
with open("../calls.txt", "a") as calls:
    print(os.environ.get("OMP_NUM_THREADS"), *sys.argv[1:], file=calls)
def asked(*_):
    Path("asked").touch()
    if "--stubborn" not in sys.argv:
        sys.exit(130)
if "--crash" in sys.argv:
    sys.exit("everything is broken")
Path("runs/run").mkdir(parents=True, exist_ok=True)
if "--wait" in sys.argv and "--resume" not in sys.argv:
    signal.signal(signal.SIGINT, asked)
    signal.alarm(120)
    Path("runs/run/checkpoint.pt").touch()
    Path("ready").touch()
    while True:
        signal.pause()
"""
EVALUATE = """
import sys
from pathlib import Path
out, command = Path(sys.argv[2]), sys.argv[sys.argv.index("--command") + 1]
out.parent.mkdir(parents=True, exist_ok=True)
out.write_text(Path(__file__).with_name("template.csv").read_text().replace("COMMAND --seed 1", command))
"""


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """toy.py in place of a training script, and another in place of the evaluation."""
    Path("toy.py").write_text(TRAIN)
    here = tmp_path / "here"
    results.write_run(here / "template.csv", example(command="COMMAND"))
    (here / "results.py").write_text(EVALUATE)
    (here / "report.py").write_text('import sys; open("reported", "w").write(" ".join(sys.argv[1:]))')
    monkeypatch.setattr(launch, "HERE", here)
    return monkeypatch


def run_list(monkeypatch, lines, *options, **settings):
    """launch.py on these lines, in this process; its exit code."""
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    monkeypatch.setattr(sys, "argv", ["launch.py", "toys", *options])
    try:
        return launch.main() or 0
    except SystemExit as exit:
        return exit.code


def calls():
    file = Path("runs/toys/calls.txt")
    return file.read_text().splitlines() if file.exists() else []


A, B = "python toy.py --env-id A-v1", "b: python toy.py --env-id mod:B-v1 --x 3"


def test_every_command_runs_for_every_seed_and_finished_ones_are_skipped(toys, capsys):
    assert run_list(toys, [A, "", "# a comment", B], SEEDS="1-2 5", OPTIONS="--y 4") == 0
    assert calls() == [
        f"None --env-id {rest} --y 4 --seed {seed}" for seed in (1, 2, 5) for rest in ("A-v1", "mod:B-v1 --x 3")
    ]
    files = {f"{name}__{seed}.csv" for name in ("A-v1__toy", "B-v1__b") for seed in (1, 2, 5)}
    folder = Path("benchmark/results/toys")
    assert {file.name for file in folder.glob("*")} == files | {"summary.csv"}
    assert len(list(csv.DictReader(open(folder / "summary.csv")))) == 6
    assert "6 ran, 0 failed, 0 stopped, 0 skipped" in capsys.readouterr().out
    assert Path("reported").read_text() == "benchmark/results/toys --baseline toy"

    (folder / "A-v1__toy__2.csv").unlink()
    (trained,) = Path("runs/toys").glob("A-v1__toy__2__*/trained")
    trained.unlink()
    assert run_list(toys, [A, B]) == 0
    assert calls()[6:] == ["None --env-id A-v1 --y 4 --seed 2"]
    assert "1 ran, 0 failed, 0 stopped, 5 skipped" in capsys.readouterr().out


def test_a_run_of_another_version_of_the_script_is_not_taken_for_its_own(toys):
    run_list(toys, [A])
    result = Path("benchmark/results/toys/A-v1__toy__1.csv")
    result.unlink()
    assert run_list(toys, [A]) == 0 and len(calls()) == 1  # trained already
    result.unlink()
    Path("toy.py").write_text(TRAIN + "# better")
    assert run_list(toys, [A]) == 0 and len(calls()) == 2


def test_a_crash_is_reported_and_does_not_stop_the_rest(toys, capsys):
    assert run_list(toys, ["python toy.py --env-id Bad-v1 --crash", A], SEEDS="1 2") == 1
    out = capsys.readouterr().out
    assert "2 ran, 2 failed" in out and out.count("Bad-v1__toy__2 failed: exit code 1, runs/toys/Bad-v1__toy__2") == 2
    assert "log.txt: everything is broken" in out
    assert len(list(Path("benchmark/results/toys").glob("A-v1*"))) == 2
    assert run_list(toys, ["python toy.py --env-id Bad-v1 --crash", A]) == 1
    assert len(calls()) == 6 and "0 ran, 2 failed, 0 stopped, 2 skipped" in capsys.readouterr().out


def test_an_incomplete_result_is_named_and_made_again_without_training_again(toys, capsys):
    run_list(toys, [A])
    file = Path("benchmark/results/toys/A-v1__toy__1.csv")
    whole = file.read_text()
    file.write_text(whole[:-20])
    assert run_list(toys, [A]) == 0
    assert f"{file}, line" in capsys.readouterr().out
    assert file.read_text() == whole and len(calls()) == 1


def test_the_result_of_another_command_is_neither_overwritten_nor_taken_for_its_own(toys, capsys):
    run_list(toys, [A])
    assert run_list(toys, [A + " --changed"]) == 2
    assert "A-v1__toy__1.csv was made by another command" in capsys.readouterr().err
    assert len(calls()) == 1
    assert run_list(toys, [A + " --changed"], RESULTS="elsewhere/toys") == 0
    assert len(calls()) == 2


def launch_in_background(lines, **settings):
    code = "import sys, launch; from pathlib import Path; launch.HERE = Path('here').resolve(); launch.main()"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmark")} | settings
    process = subprocess.Popen(
        [sys.executable, "-c", code, "toys"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    process.stdin.write("\n".join(lines))
    process.stdin.close()
    process.stdin = None
    return process


def wait_for(pattern, count, process):
    while len(list(Path().glob(pattern))) < count:
        assert process.poll() is None, process.stdout.read()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupt_stops_every_run_in_order_and_the_next_launch_resumes_them(signum, toys, capsys):
    waiting = "python toy.py --env-id A-v1 --wait"
    process = launch_in_background([waiting], WORKERS="2", CORES="0", SEEDS="1-3")
    wait_for("runs/toys/*/ready", 2, process)
    process.send_signal(signum)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(list(Path().glob("runs/toys/*/asked"))) == 2 and len(calls()) == 2
    assert "0 ran, 0 failed, 3 stopped, 0 skipped" in out
    assert not list(Path("benchmark").rglob("*.csv"))

    assert run_list(toys, [waiting], SEEDS="1-2") == 0
    assert {line.split(" --wait ")[1] for line in calls()[2:]} == {f"--seed {i} --resume runs/run" for i in (1, 2)}


def test_under_nohup_a_closed_terminal_stops_nothing(toys):
    Path("toy.py").write_text(TRAIN + "Path('ignored').write_text(str(signal.getsignal(signal.SIGHUP)))\n")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_list(toys, [A]) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    (ignored,) = Path("runs/toys").glob("*/ignored")  # a run inherits that, but not a handler
    assert ignored.read_text() == str(int(signal.SIG_IGN))


def test_a_second_interrupt_kills_a_run_that_does_not_end(toys):
    process = launch_in_background(["python toy.py --env-id A-v1 --wait --stubborn"])
    wait_for("runs/toys/*/ready", 1, process)
    process.send_signal(signal.SIGTERM)
    wait_for("runs/toys/*/asked", 1, process)
    process.send_signal(signal.SIGTERM)
    assert "1 stopped" in process.communicate(timeout=60)[0] and process.returncode == 130


def test_workers_share_the_cores_and_run_one_thread_each(toys):
    pinned = []
    toys.setattr(os, "sched_getaffinity", lambda _: {9, 3, 5, 7})
    toys.setattr(os, "sched_setaffinity", lambda _, cores: pinned.append(cores))
    assert run_list(toys, [A], SEEDS="1-2", WORKERS=2) == 0
    assert sorted(pinned) == [[3, 5], [7, 9]]
    assert [call.split()[0] for call in calls()] == ["1", "1"]
    assert run_list(toys, [A], SEEDS="3-4", OMP_NUM_THREADS=2, CORES=0) == 0
    assert len(pinned) == 2 and [call.split()[0] for call in calls()[2:]] == ["2", "2"]


def test_a_slurm_task_runs_its_own_command_alone(toys, capsys):
    assert run_list(toys, [A, B], "--list", SEEDS="1-2") == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 4 and listed[2] == "python toy.py --env-id A-v1 --seed 2"
    assert run_list(toys, [A, B], SLURM_ARRAY_TASK_ID=3) == 0
    assert calls() == ["None --env-id A-v1 --seed 2"]
    assert run_list(toys, [A, B], SLURM_ARRAY_TASK_ID=5) == 2
    assert "there is no command 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    "lines, settings, hint",
    [
        (["python no_such.py --env-id A-v1"], {}, "no_such.py"),
        (["rm -rf A-v1"], {}, "rm -rf"),
        (["python"], {}, "python"),
        ([A + " --seed 3"], {}, "--seed"),
        (["python toy.py"], {}, "--env-id"),
        ([A, A + " --x 1"], {}, "A-v1__toy__1"),
        ([], {}, "empty"),
        ([A], {"SEEDS": "1,2"}, "SEEDS"),
        ([A], {"SEEDS": "5-1"}, "SEEDS"),
        ([A], {"WORKERS": "0"}, "WORKERS"),
        ([A], {"WORKERS": "many"}, "WORKERS"),
        ([A], {"EPISODES": "-1"}, "EPISODES"),
        ([A], {"CORES": "100000"}, "CORES"),
    ],
)
def test_a_wrong_list_is_refused_in_one_line_before_anything_runs(lines, settings, hint, toys, capsys):
    assert run_list(toys, lines, **settings) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and hint in message
    assert not Path("runs").exists() and not Path("benchmark").exists()


LISTS = sorted(file.name for file in (ROOT / "benchmark").glob("*.sh") if file.name != "baird.sh")


@pytest.mark.parametrize("name", LISTS)
def test_the_commands_of_the_lists_are_ones_that_the_scripts_accept(name):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "SEEDS": "7"}
    listed = subprocess.run(
        [ROOT / "benchmark" / name, "--list"], capture_output=True, text=True, check=True, env=environment
    )
    commands = [shlex.split(line) for line in listed.stdout.splitlines()]
    assert len(commands) >= 1
    for _, path, *options in commands:
        module = importlib.import_module(Path(path).stem)
        if module is correctness:
            module, options = pqn, options[4:]  # --variant and --limit
        args = tyro.cli(module.Args, args=options)
        module.check(args)
        assert args.seed == 7


# ------------------------------------------------------------------------------------------------ result files


def log(folder, start, steps, speed, returns=None):
    """A TensorBoard file as the scripts write it, of a session that began at step `start`."""
    with SummaryWriter(folder) as writer:
        writer.add_text("hyperparameters", "...", start)
        for step in steps:
            writer.add_scalar("charts/SPS", speed, step)
            if returns is not None:
                writer.add_scalar("charts/episodic_return", returns, step)
            if returns and step % 200 == 0:
                writer.add_scalar("eval/episodic_return", -returns, step)


def test_a_resumed_run_counts_neither_the_time_between_nor_points_after_the_checkpoint():
    log("run", 0, [100, 200, 300, 400, 500], speed=100, returns=1)
    log("run", 300, [400, 500, 600], speed=50, returns=2)
    points = results.read_events("run")
    assert points[:, 0].tolist() == [100, 200, 300, 400, 500, 600]
    assert points[:, 1].tolist() == pytest.approx([1, 2, 3, 5, 7, 9])
    assert points[:, 2].tolist() == [1, 1, 1, 2, 2, 2]
    assert np.nan_to_num(points[:, 3]).tolist() == [0, -1, 0, -2, 0, -2]


def test_long_curves_are_thinned_by_averaging_and_missing_values_do_not_count():
    points = np.stack([np.arange(1.0, 1001), np.arange(1000) / 10, np.arange(1000.0), np.full(1000, np.nan)], 1)
    points[::2, 2] = np.nan
    thinned = results.thin(points)
    assert len(thinned) == 200 and np.isnan(thinned[:, 3]).all()
    assert thinned[0, :3].tolist() == [5, 0.4, 2] and thinned[1, :3].tolist() == [10, 0.9, 7]
    assert np.array_equal(results.thin(points[:200]), points[:200], equal_nan=True)


def test_a_result_is_read_as_it_was_written():
    run = example(points=7, level=-3.25)
    run.points[2, 3] = np.nan
    file = write("set", run) / "CartPole-v1__pqn__1.csv"
    again = results.read_run(file)
    assert {k: v for k, v in again.about.items() if k != "points"} == run.about
    assert np.array_equal(again.points, run.points, equal_nan=True)
    results.write_run(Path("set/again.csv"), again)
    assert Path("set/again.csv").read_text() == file.read_text()


LINES = len(results.MADE_BY) + len(results.MEASURED) + 2  # before the first point
BROKEN = {
    "a header line is missing": (lambda lines: lines[:3] + lines[4:], 4, "command"),
    "a number is none": (lambda lines: [*lines[:12], "# greedy_mean: good", *lines[13:]], 13, "greedy_mean"),
    "a cell is none": (lambda lines: [*lines[: LINES + 1], "200,20,1,x", *lines[LINES + 2 :]], LINES + 2, "'x'"),
    "a cell is infinite": (
        lambda lines: [*lines[: LINES + 1], "200,20,inf,1", *lines[LINES + 2 :]],
        LINES + 2,
        "'inf'",
    ),
    "a cell is missing": (lambda lines: [*lines[: LINES + 1], "200,20,1", *lines[LINES + 2 :]], LINES + 2, "found 3"),
    "the step is missing": (lambda lines: [*lines[:LINES], ",10,1,1", *lines[LINES + 1 :]], LINES + 1, "missing"),
    "the steps go back": (lambda lines: [*lines[: LINES + 2], *lines[LINES + 1 :]], LINES + 3, "after 200"),
    "the columns are others": (lambda lines: [*lines[: LINES - 1], "step", *lines[LINES:]], LINES, "episodic_return"),
    "the end is missing": (lambda lines: lines[:-2], LINES + 4, "after 3 of 5 points"),
    "all but the start is missing": (lambda lines: lines[:2], 3, "after 0 of ?"),
    "it is empty": (lambda lines: [], 1, "after 0 of ?"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_result_is_reported_by_name_and_line(case, capsys):
    breaks, line, hint = BROKEN[case]
    file = write("set", example()) / "CartPole-v1__pqn__1.csv"
    file.write_text("".join(f"{x}\n" for x in breaks(file.read_text().splitlines())))
    with pytest.raises(SystemExit) as exit:
        report.main(report.Args((Path("set"),)))
    message = capsys.readouterr().err
    assert exit.value.code == 2 and message.count("\n") == 1
    assert message.startswith(f"error: {file}, line {line}: ") and hint in message
    assert list(Path("set").iterdir()) == [file]


def test_a_real_run_ends_as_a_result_and_a_table(monkeypatch, capfd):
    options = "--num-envs 4 --num-steps 50 --num-minibatches 2 --hidden-sizes 16 --total-timesteps 3000"
    Path("pqn.py").symlink_to(ROOT / "pqn.py")
    command = f"python pqn.py --env-id CartPole-v1 {options} --log-interval 200"
    assert run_list(monkeypatch, [command], EPISODES=3) == 0
    folder = Path("benchmark/results/toys")
    run = results.read_run(folder / "CartPole-v1__pqn__1.csv")
    assert run.about["command"] == f"{command} --seed 1" and run.about["torch"] == torch.__version__
    assert run.points[:, 0].tolist() == list(range(200, 3001, 200)) and (np.diff(run.points[:, 1]) > 0).all()
    assert run.about["steps"] == 3000 and run.about["seconds"] == run.points[-1, 1]
    (checkpoint,) = Path("runs/toys").glob("*/runs/*/checkpoint.pt")
    last_returns = torch.load(checkpoint, weights_only=True)["last_returns"]
    assert run.about["train_return"] == pytest.approx(np.mean(last_returns), rel=1e-5)
    assert np.nanmean(run.points[:, 2]) == pytest.approx(np.mean(last_returns), rel=0.3)
    assert 8 <= run.about["greedy_min"] <= run.about["greedy_mean"] <= run.about["greedy_max"] <= 500
    assert f"{command} --seed 1" in capfd.readouterr().out
    assert (folder / "curves_steps.png").exists() and (folder / "summary.csv").exists()


# -------------------------------------------------------------------------------------------------- statistics


def test_aggregates_are_those_of_the_definitions():
    games = [np.array([0.0, 1.0, 2.0, 7.0]), np.array([3.0, 4.0, 5.0, 0.2])]
    assert report.mean(games) == pytest.approx((2.5 + 3.05) / 2)
    assert report.median([*games, np.array([9.0, 9.0, 9.0, 9.0])]) == pytest.approx(3.05)
    assert report.iqm(games) == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert report.iqm([np.arange(7.0)]) == 3 and report.iqm([np.array([0, 0, 0, 1, 1, 9.0])]) == 0.5
    assert report.optimality_gap(games) == pytest.approx(1 - (0 + 1 + 1 + 1 + 1 + 1 + 1 + 0.2) / 8)
    assert report.profile(games, [-1, 0, 1, 4.5, 7]).tolist() == [1, 7 / 8, 5 / 8, 2 / 8, 0]


def test_bootstrap_intervals_resample_the_seeds_of_each_game_by_themselves():
    constant = [np.full(5, 1.0), np.full(5, 9.0)]
    assert report.bootstrap(report.mean, constant).tolist() == [5, 5]
    x = np.random.default_rng(1).normal(size=400)
    low, high = report.bootstrap(report.mean, [x])
    assert low == pytest.approx(x.mean() - 1.96 * x.std() / 20, abs=0.01)
    assert high == pytest.approx(x.mean() + 1.96 * x.std() / 20, abs=0.01)


def test_human_normalised_scores_are_0_for_random_and_1_for_human_play(capsys):
    games = [("Pong-v5", -20.7), ("Breakout-v5", 30.5), ("Venture-v5", 593.75)]
    runs = [example(env, seed=seed, level=level) for env, level in games for seed in (1, 2)]
    report.main(report.Args((write("atari", *runs),)))
    out = capsys.readouterr().out
    column = out.splitlines()[0].split("|").index(" human-normalised ")
    assert [line.split("|")[column].strip() for line in out.splitlines()[2:5]] == ["1.00", "0.00", "0.50"]
    # of 0, 0, 0.5, 0.5, 1, 1
    assert "| 3 games, 6 runs | 0.50 [0.50, 0.50] | 0.50 [0.50, 0.50] | 0.50 [0.50, 0.50] | 0.50 [0.50, 0.50] |" in out
    assert Path("atari/profiles.svg").exists()


# ----------------------------------------------------------------------------------------- tables and figures


def colours(file, top=0.0, right=1.0):
    """The share of each of the palette's colours in a PNG, or in the part of it that holds no legend."""
    pixels = (plt.imread(file)[..., :3] * 255).round().astype(int)
    pixels = pixels[int(top * len(pixels)) :, : int(right * pixels.shape[1])]
    wanted = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in report.COLOURS]
    return [(pixels == colour).all(-1).mean() for colour in wanted]


def test_the_same_csvs_give_the_same_table_and_figures_and_others_do_not(monkeypatch):
    runs = [example(variant=v, seed=s, level=s**1.7 + (v == "b")) for v in "ab" for s in range(9)]
    folders = "results/first", "results/second", "results/other"
    for folder, changed in zip(folders, (0, 0, 1), strict=True):
        runs[-1].points[:, 3] += changed
        runs[-1].about["greedy_mean"] += changed
        write(folder, *runs)
        report.main(report.Args((Path(folder),)))
    names = {file.name for file in Path(folders[0]).iterdir() if file.suffix != ".csv"}
    stems = ("curves_steps", "curves_time", "final")
    assert names == {"table.md", *(f"{stem}.{ending}" for stem in stems for ending in ("png", "svg"))}
    for name in names:
        first, second, other = (Path(folder, name).read_bytes().replace(folder.encode(), b"") for folder in folders)
        assert first == second and first != other, name


def test_every_variant_is_drawn():
    runs = [example(variant=v, seed=s, level=s * i) for i, v in enumerate("abc") for s in (1, 2)]
    report.main(report.Args((write("set", *runs),)))
    for name in ("curves_steps", "curves_time", "final"):
        shares = colours(f"set/{name}.png", top=0.25 if name != "final" else 0)
        assert min(shares[:3]) > 3e-4 and max(shares[3:6]) == 0, name


def test_the_table_compares_with_the_baseline(capsys):
    small = [example(variant=f"envs_{n}", seed=s, level=n + s) for n in (2, 10) for s in (1, 2, 3)]
    report.main(report.Args((write("set", *small),), baseline="envs_10"))
    header, _, first, second, *_ = capsys.readouterr().out.splitlines()
    assert "difference from envs_10" in header
    assert first.startswith("| CartPole-v1 | envs_2 | 3 | 4.00 ± 0.82 | 4.00 ± 0.82 | [3.00, 5.00] | -8.00 [")
    assert second.startswith("| CartPole-v1 | envs_10 | 3 | 12.0 ± 0.82 | 12.0 ± 0.82 | [11.0, 13.0] |  |")
    report.main(report.Args((Path("set"),)))
    assert "difference from envs_2" in capsys.readouterr().out
    assert "`python benchmark/report.py set`" in Path("set/table.md").read_text()
    with pytest.raises(SystemExit) as exit:
        report.main(report.Args((Path("set"),), baseline="envs_3"))
    assert exit.value.code == 2 and "envs_2, envs_10" in capsys.readouterr().err


def test_one_run_has_no_spread_and_any_command_is_shown(capsys):
    runs = [example(seed=3), example(env="Acrobot-v1", seed=4)]
    runs[1].about["command"] = "python toy.py --seed 4 --fast"
    report.main(report.Args((write("set", *runs),)))
    out = capsys.readouterr().out
    assert "| CartPole-v1 | 1 | 1.00 | 1.00 |  |" in out and "±" not in out
    assert "\npython toy.py --seed 3\n" in out and "\npython toy.py --seed 4 --fast --seed 4\n" in out


@pytest.mark.parametrize("table", COMMITTED, ids=lambda path: path.parent.name)
def test_a_committed_table_is_what_the_committed_csvs_give(table, monkeypatch):
    *_, command = table.read_text().split("`")[:-1]
    words = shlex.split(command)
    assert words[:2] == ["python", "benchmark/report.py"]
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("draw_curves", "draw_final", "draw_profiles"):  # their sameness is shown above, at less expense
        monkeypatch.setattr(report, name, lambda *_: None)
    shutil.copytree(table.parent, Path("benchmark/results", table.parent.name))
    report.main(tyro.cli(report.Args, args=words[2:]))
    assert Path("benchmark/results", table.parent.name, "table.md").read_text() == table.read_text()
    assert Path("benchmark/results", table.parent.name, "summary.csv").read_text() == (
        table.with_name("summary.csv").read_text()
    )


def test_sets_are_compared_and_written_where_asked(capsys):
    before = write("sets/z_before", *(example(seed=s, level=s) for s in (1, 2)))
    after = write("sets/after", *(example(seed=s, level=s + 1) for s in (1, 2)))
    report.main(report.Args((before, after), out=Path("out")))
    header, _, first, second, *_ = capsys.readouterr().out.splitlines()
    assert "difference from z_before" in header
    assert "| z_before | 2 |" in first and "| after | 2 |" in second and "| 1.00 [0.00, 2.00] |" in second
    assert Path("out/final.png").exists() and not (before / "table.md").exists()
    namesake = write("others/after", example())
    with pytest.raises(SystemExit) as exit:
        report.main(report.Args((after, namesake), out=Path("out")))
    assert exit.value.code == 2 and "sets/after and others/after" in capsys.readouterr().err


def test_runs_that_were_not_launched_here_are_read_from_their_tensorboard_files(capsys):
    log("runs/something_else", 0, [100], speed=100, returns=1)
    for seed in (1, 2):
        log(f"runs/CartPole-v1__pqn__{seed}__17000000{seed}", 0, range(100, 1000, 100), speed=100, returns=seed)
    report.main(report.Args((Path("runs"),), out=Path("out")))
    assert "| CartPole-v1 | 2 |" in capsys.readouterr().out
    assert colours("out/curves_steps.png", top=0.25)[1] > 3e-4
    for variant in ("a", "b"):  # as launch.py arranges them
        log(f"sets/x/CartPole-v1__{variant}__1__00/runs/CartPole-v1__pqn__1__17", 0, [100, 200], speed=100, returns=1)
    report.main(report.Args((Path("sets"),), out=Path("out")))
    out = capsys.readouterr().out
    assert "| CartPole-v1 | a | 1 |" in out and "| CartPole-v1 | b | 1 |" in out
    with pytest.raises(SystemExit) as exit:
        report.main(report.Args((Path("out"),)))
    assert exit.value.code == 2 and "no results in out" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- correctness.py and speed.py


def test_only_training_episodes_are_cut_short_and_each_variant_has_its_faults_alone():
    args = replace(pqn.Args(), num_envs=4, num_eval_envs=3, num_steps=40, hidden_sizes=(8,))
    make_envs = correctness.cut_short(pqn.make_envs, 7)
    for variant in ("right", "phantoms", "truncation", "both"):
        envs = make_envs(args, 7, (1, 0))
        pqn.check(args, envs)
        torch.manual_seed(0)
        collector = pqn.Collector(envs, pqn.QNetwork(*pqn.spaces(envs), args), args, torch.device("cpu"))
        collect = correctness.with_faults(pqn.Collector.collect, variant)
        (_, _, rewards, _, terminated, truncated, real), finished, finished_eval = collect(collector, 0.1)
        assert {length for _, _, length in finished} == {7} and {i for i, _, _ in finished} == {0, 1, 2, 3}
        assert min(length for _, _, length in finished_eval) > 7 and {i for i, _, _ in finished_eval} <= {4, 5, 6}
        assert truncated[6].all() and truncated.sum() == 20
        assert torch.equal(terminated, truncated if variant in ("truncation", "both") else truncated & False)
        phantoms = (rewards == 0) if variant in ("right", "truncation") else (rewards == 9)
        assert torch.equal(real, ~phantoms) and np.array_equal(collector.phantom, phantoms.numpy())


@pytest.mark.parametrize("script, batch", [("pqn", 8), ("pqn_atari_envpool", 4)])
def test_speed_finds_every_part_and_counts_the_operations(script, batch):
    options = "--num-envs 4 --num-minibatches 2 --num-eval-envs 0 --update-epochs 1".split()
    options += ["--num-steps", str(batch // 2), "--device", "cpu"]
    options += ["--hidden-sizes", "16", "--norm-type", "none"] if script == "pqn" else ["--precision", "fp32"]
    result = speed.measure(importlib.import_module(script), options, rollouts=7)
    parts = ["EnvPool alone", "stepping", "acting", "targets", "learning", "the rest", "whole script"]
    assert list(result["seconds"]) == parts
    assert all((seconds > 0).all() for part, seconds in result["seconds"].items() if part != "the rest")
    weights = 8 * 8 * 4 * 32 * 20**2, 4 * 4 * 32 * 64 * 9**2, 3 * 3 * 64 * 64 * 7**2, 3136 * 512, 512 * 4
    weights = (4 * 16, 16 * 2) if script == "pqn" else weights
    # two operations per weight: forwards, for the gradient of each layer's weights, and of all inputs but the first's
    assert result["flops"] == 2 * batch * (3 * sum(weights) - weights[0])
    shown = speed.show("x", options, result)
    assert all(f"| {part} |" in shown for part in parts) and "matrix product in fp32" in shown


def test_speed_compares_scripts(monkeypatch, capsys):
    cost = {"pqn": 2.0, "pqn_atari_envpool": 3.0, "pqn_atari_lstm": 4.5}
    measured = lambda script, *_: {"seconds": {"whole script": [cost[script.__name__]]}, "batch": 1}
    monkeypatch.setattr(speed, "measure", measured)
    monkeypatch.setattr(speed, "show", lambda *_: "")
    monkeypatch.setattr(sys, "argv", ["speed.py", "--script", *cost, "--num-envs", "4"])
    speed.main()
    out = capsys.readouterr().out
    assert "pqn_atari_lstm.py takes 2.25 times the wall time per step of pqn.py" in out and "1.50 times" in out


def test_a_sweep_leaves_a_csv_whose_plot_can_be_drawn_again(monkeypatch, capsys):
    options = "--num-steps 4 --num-minibatches 2 --num-eval-envs 0 --hidden-sizes 8 --rollouts 6 --out out"
    monkeypatch.setattr(sys, "argv", ["speed.py", *options.split(), "--sweep", "num_envs", "2", "8"])
    speed.main()
    assert capsys.readouterr().out.count("| whole script |") == 2
    plot = Path("out/pqn__num_envs.png")
    drawn = plot.read_bytes()
    assert min(colours(plot, right=0.6)[:6]) > 1e-4
    plot.unlink()
    monkeypatch.setattr(sys, "argv", ["speed.py", "--plot", "out/pqn__num_envs.csv"])
    speed.main()
    assert plot.read_bytes() == drawn
