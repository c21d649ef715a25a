"""benchmark/launch.py on toy commands, and from a real run to its line in a set."""

import importlib
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import tyro
from bench_examples import ROOT, example, in_an_empty_folder, write  # noqa: F401

import collect  # isort: skip
import faults  # isort: skip
import launch  # isort: skip
import offline_dqn  # isort: skip
import play  # isort: skip
import pqn  # isort: skip
import report  # isort: skip

# A checkpoint that says how many of 2 parts are done: a run makes one, waits if it is told to, and makes the other.
TRAIN = """
import os, signal, sys, time
from pathlib import Path
with open("../calls.txt", "a") as calls:
    print(os.environ.get("OMP_NUM_THREADS"), *sys.argv[1:], file=calls)
checkpoint = Path("runs/run/checkpoint.pt")
if checkpoint.exists() and checkpoint.read_text() == "2":
    sys.exit("has done 2 parts already")
def asked(*_):
    Path("asked").touch()
    if "--stubborn" not in sys.argv:
        sys.exit(130)
if "--crash" in sys.argv:
    sys.exit("everything is broken")
checkpoint.parent.mkdir(parents=True, exist_ok=True)
if "--wait" in sys.argv and "--resume" not in sys.argv:
    signal.signal(signal.SIGINT, asked)
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(checkpoint.write_text("2") and None))
    signal.alarm(120)
    checkpoint.write_text("1")
    Path("starting").write_text(str(os.getpid()))
    Path("starting").rename("ready")
    while True:
        time.sleep(0.05)  # pause() would miss a signal that comes just before it
checkpoint.write_text("2")
"""
EVALUATE = f"""
import csv, sys
from pathlib import Path
option = lambda name: sys.argv[sys.argv.index(name) + 1]
parts = int(Path(sys.argv[1], "checkpoint.pt").read_text())
if parts < 2 and "--unfinished" not in sys.argv:
    sys.exit({collect.UNFINISHED})
words = option("--command").split()
row = dict.fromkeys({collect.RUN}, "1") | dict(command=option("--command"), variant=option("--variant"), seed=words[-1])
row |= dict(env=words[words.index("--env-id") + 1].split(":")[-1], episodes=option("--episodes"))
row |= dict(script_sha1=option("--script-sha1"), steps=100 * parts, steps_to_do=200)
point = [row["env"], row["variant"], row["seed"], 1, 1, 1, 1]
for name, *lines in ("runs", row, row.values()), ("curves", {collect.KEY + collect.POINT}, point):
    with open(Path(sys.argv[2], name + ".csv"), "w") as file:
        csv.writer(file).writerows(lines)
"""
A, B = "python toy.py --env-id A-v1", "b: python toy.py --env-id mod:B-v1 --x 3"
WAITING = "python toy.py --env-id A-v1 --wait"
SET = Path("benchmark/results/toys")


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """toy.py in place of a training script, and another in place of the evaluation; no figures."""
    Path("toy.py").write_text(TRAIN)
    Path("here").mkdir()
    Path("here/collect.py").write_text(EVALUATE)
    monkeypatch.setattr(launch, "HERE", tmp_path / "here")
    monkeypatch.setattr(report, "main", lambda args: Path("reported").write_text(f"{args.sets[0]} {args.baseline}"))
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


def keys():
    return {run.key for run in collect.read_set(SET)}


def test_every_command_runs_for_every_seed_and_finished_ones_are_skipped(toys, capsys):
    assert run_list(toys, [A, "", "# a comment", B], SEEDS="1-2 5", OPTIONS="--y 4") == 0
    assert calls() == [
        f"None --env-id {rest} --y 4 --seed {seed}" for seed in (1, 2, 5) for rest in ("A-v1", "mod:B-v1 --x 3")
    ]
    assert keys() == {(*name, seed) for name in (("A-v1", "toy"), ("B-v1", "b")) for seed in (1, 2, 5)}
    assert "6 ran, 0 failed, 0 stopped, 0 skipped" in capsys.readouterr().out
    assert Path("reported").read_text() == f"{SET} toy"
    assert run_list(toys, [A, B], SEEDS="2-3") == 0
    assert calls()[6:] == ["None --env-id A-v1 --y 4 --seed 3", "None --env-id mod:B-v1 --x 3 --y 4 --seed 3"]
    assert "2 ran, 0 failed, 0 stopped, 2 skipped" in capsys.readouterr().out and len(keys()) == 8


def test_only_the_same_command_script_and_evaluation_count_as_finished(toys, capsys):
    run_list(toys, [A])
    assert run_list(toys, [A]) == 0 and len(calls()) == 1
    assert run_list(toys, [A], EPISODES=7) == 0 and len(calls()) == 1  # evaluated again, not trained
    assert [run.about["episodes"] for run in collect.read_set(SET)] == [7]
    Path("toy.py").write_text(TRAIN + "# better")
    assert run_list(toys, [A]) == 0 and len(calls()) == 2 and len(keys()) == 1
    capsys.readouterr()
    assert run_list(toys, [A + " --changed"]) == 2
    message = capsys.readouterr().err
    assert "A-v1__toy__1 of another command" in message and message.count("\n") == 1 and len(calls()) == 2
    assert run_list(toys, [A + " --changed"], RESULTS="elsewhere/toys") == 0 and len(calls()) == 3


def test_a_seed_that_is_written_twice_is_used_once(toys):
    assert run_list(toys, [A], SEEDS="2-3 1 2 1-2") == 0
    assert [call.split()[-1] for call in calls()] == ["2", "3", "1"]


def test_where_the_set_does_not_know_the_script_the_command_decides(toys):
    write(SET, example("A-v1", "toy", 1, command=A, script_sha1=""))
    assert run_list(toys, [A], SEEDS="1-2") == 0
    assert calls() == ["None --env-id A-v1 --seed 2"] and len(keys()) == 2


def test_a_launcher_killed_between_the_last_checkpoint_and_the_evaluation_goes_on(toys):
    run_list(toys, [A])
    (folder,) = Path("runs/toys").glob("A-v1*")
    for file in (SET / "runs.csv", folder / "runs.csv"):
        file.unlink()
    assert (folder / "runs/run/checkpoint.pt").read_text() == "2"
    assert run_list(toys, [A]) == 0 and len(calls()) == 1 and len(keys()) == 1


def test_a_script_that_changes_under_a_running_list_is_not_run_in_its_place(toys, capsys):
    toys.setattr(launch.Runner, "pin", lambda _: Path("toy.py").write_text(TRAIN + "# changed"))
    assert run_list(toys, [A]) == 1
    assert "its script has changed" in capsys.readouterr().out and not calls()


def test_a_crash_is_reported_and_does_not_stop_the_rest(toys, capsys):
    assert run_list(toys, ["python toy.py --env-id Bad-v1 --crash", A], SEEDS="1 2") == 1
    out = capsys.readouterr().out
    assert "2 ran, 2 failed" in out and out.count("Bad-v1__toy__2 failed: exit code 1, runs/toys/Bad-v1__toy__2") == 2
    assert "log.txt: everything is broken" in out
    assert keys() == {("A-v1", "toy", 1), ("A-v1", "toy", 2)}
    assert run_list(toys, ["python toy.py --env-id Bad-v1 --crash", A]) == 1
    assert len(calls()) == 6 and "0 ran, 2 failed, 0 stopped, 2 skipped" in capsys.readouterr().out


def launch_in_background(lines, ignored=(), **settings):
    """The list in a process of its own, whatever signals this one ignores."""
    code = "import launch, sys; from pathlib import Path; from unittest import mock\n"
    code += "sys.modules['report'] = mock.Mock(); launch.HERE = Path('here').resolve(); launch.main()"

    def dispositions():
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN if signum in ignored else signal.default_int_handler)
            if signum not in (*ignored, signal.SIGINT):
                signal.signal(signum, signal.SIG_DFL)

    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmark"), "PYTHONUNBUFFERED": "1"} | settings
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    words = [sys.executable, "-c", code, "toys"]
    process = subprocess.Popen(words, env=environment, preexec_fn=dispositions, **pipes)
    process.stdin.write("\n".join(lines))
    process.stdin.close()
    process.stdin = None
    return process


def wait_for(pattern, count, process):
    while len(list(Path().glob(pattern))) < count:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupt_stops_every_run_in_order_and_the_next_launch_resumes_them(signum, toys):
    process = launch_in_background([WAITING], WORKERS="2", CORES="0", SEEDS="1-3")
    wait_for("runs/toys/*/ready", 2, process)
    process.send_signal(signum)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(list(Path().glob("runs/toys/*/asked"))) == 2 and len(calls()) == 2
    assert "0 ran, 0 failed, 3 stopped, 0 skipped" in out and not (SET / "runs.csv").exists()
    assert run_list(toys, [WAITING], SEEDS="1-2") == 0
    assert {line.split(" --wait ")[1] for line in calls()[2:]} == {f"--seed {i} --resume runs/run" for i in (1, 2)}


def test_under_nohup_a_closed_terminal_stops_nothing(toys):
    process = launch_in_background([WAITING], ignored=[signal.SIGHUP])
    wait_for("runs/toys/*/ready", 1, process)
    (ready,) = Path().glob("runs/toys/*/ready")
    process.send_signal(signal.SIGHUP)
    os.kill(int(ready.read_text()), signal.SIGHUP)  # a run inherits that it is ignored
    os.kill(int(ready.read_text()), signal.SIGUSR1)
    assert "1 ran, 0 failed, 0 stopped" in process.communicate(timeout=60)[0] and process.returncode == 0


def test_a_second_interrupt_kills_a_run_that_does_not_end(toys):
    process = launch_in_background(["python toy.py --env-id A-v1 --wait --stubborn"])
    wait_for("runs/toys/*/ready", 1, process)
    process.send_signal(signal.SIGTERM)
    wait_for("runs/toys/*/asked", 1, process)
    process.send_signal(signal.SIGTERM)
    assert "1 stopped" in process.communicate(timeout=60)[0] and process.returncode == 130


def test_a_run_whose_launcher_was_killed_is_waited_for_and_then_resumed(toys):
    killed = launch_in_background([WAITING])
    wait_for("runs/toys/*/ready", 1, killed)
    killed.kill()
    killed.communicate()
    second = launch_in_background([WAITING])
    lines = iter(second.stdout.readline, "")
    assert any("A-v1__toy__1: waiting for the process that is at work in runs/toys/A-v1" in line for line in lines)
    assert len(calls()) == 1
    (ready,) = Path().glob("runs/toys/*/ready")
    os.kill(int(ready.read_text()), signal.SIGINT)
    assert "1 ran, 0 failed" in second.communicate(timeout=60)[0] and second.returncode == 0
    assert calls()[1:] == ["None --env-id A-v1 --wait --seed 1 --resume runs/run"] and len(keys()) == 1


def test_a_run_that_is_not_over_can_be_added_as_it_is_while_it_goes_on(toys, capsys):
    process = launch_in_background([WAITING])
    wait_for("runs/toys/*/ready", 1, process)
    assert run_list(toys, [WAITING, A], "--unfinished") == 2  # the two are of the same name
    assert run_list(toys, [WAITING], "--unfinished", SEEDS="1-2") == 0
    (run,) = collect.read_set(SET)
    assert run.unfinished and run.about["steps"] == 100 and len(calls()) == 1 and process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert run_list(toys, [WAITING], SEEDS="1") == 0
    (run,) = collect.read_set(SET)
    assert not run.unfinished and len(calls()) == 2
    Path("toy.py").write_text(TRAIN + "# another version, of which a finished run is not given up for half a one")
    process = launch_in_background([WAITING])
    wait_for("runs/toys/*/ready", 2, process)
    assert run_list(toys, [WAITING], "--unfinished") == 0 and not collect.read_set(SET)[0].unfinished
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)


def test_a_set_that_cannot_be_written_or_read_is_refused_before_anything_runs(toys, capsys):
    Path("file").touch()
    assert run_list(toys, [A], RESULTS="file") == 2
    (write("broken", example()) / "curves.csv").write_text("")
    assert run_list(toys, [A], RESULTS="broken") == 2
    toys.setattr(launch.tempfile, "TemporaryFile", mock.Mock(side_effect=OSError(30, "Read-only file system")))
    assert run_list(toys, [A], RESULTS="readonly") == 2
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) == 3 and "file" in messages[0] and "broken/curves.csv" in messages[1]
    assert "Read-only" in messages[2] and not calls()


def test_workers_share_the_cores_and_run_one_thread_each(toys):
    pinned = []
    toys.setattr(os, "sched_getaffinity", lambda _: {9, 3, 5, 7})
    toys.setattr(os, "sched_setaffinity", lambda _, cores: pinned.append(cores))
    assert run_list(toys, [A], SEEDS="1-2", WORKERS=2) == 0
    assert sorted(pinned) == [[3, 5], [7, 9]]
    assert [call.split()[0] for call in calls()] == ["1", "1"] and len(keys()) == 2
    assert run_list(toys, [A], SEEDS="3-4", OMP_NUM_THREADS=2, CORES=0) == 0
    assert len(pinned) == 2 and [call.split()[0] for call in calls()[2:]] == ["2", "2"]


def test_a_slurm_task_runs_its_own_command_alone(toys, capsys):
    assert run_list(toys, [A, B], "--list", SEEDS="1-2") == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 4 and listed[2] == "python toy.py --env-id A-v1 --seed 2"
    assert run_list(toys, [A, B], SLURM_ARRAY_TASK_ID=3) == 0
    assert calls() == ["None --env-id A-v1 --seed 2"] and not Path("reported").exists()
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
        ([A + " --x 'open"], {}, "No closing quotation: python toy.py"),
        ([A], {"OPTIONS": '--x "open'}, "No closing quotation: --x"),
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


NO_LISTS = "baird", "offline", "torchrun"
LISTS = sorted(file.name for file in (ROOT / "benchmark").glob("*.sh") if file.stem not in NO_LISTS)


@pytest.mark.parametrize("name", LISTS)
def test_the_commands_of_the_lists_are_ones_that_the_scripts_accept(name, monkeypatch):
    monkeypatch.setenv("CXX", "sh")  # any program that there is, for --compile
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "SEEDS": "7"}
    words = [ROOT / "benchmark" / name, "--list"]
    listed = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    commands = [shlex.split(line) for line in listed.stdout.splitlines()]
    assert len(commands) >= 1
    for _, path, *options in commands:
        module = importlib.import_module(Path(path).stem)
        if module is faults:
            options = options[4:]  # --variant and --limit
        if Path(path).parent.name == "benchmark":
            module = pqn  # whose options it takes
        args = tyro.cli(module.Args, args=options)
        module.check(args)
        assert args.seed == 7


def test_a_real_run_ends_as_a_line_of_a_set_and_a_table(monkeypatch, capfd):
    options = "--num-envs 4 --num-steps 50 --num-minibatches 2 --hidden-sizes 16 --total-timesteps 3000"
    Path("pqn.py").symlink_to(ROOT / "pqn.py")
    command = f"python pqn.py --env-id CartPole-v1 {options} --log-interval 200"
    assert run_list(monkeypatch, [command], EPISODES=3) == 0
    (run,) = collect.read_set(SET)
    assert run.key == ("CartPole-v1", "pqn", 1) and run.about["command"] == f"{command} --seed 1"
    assert run.about["torch"] == torch.__version__ and run.about["script_sha1"] == launch.hash_code("pqn.py")
    head = ""
    if shutil.which("git"):
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert head.startswith(run.about["commit"].removesuffix("-dirty")) and bool(head) == bool(run.about["commit"])
    assert run.about["threads"] >= 1 and run.about["episodes"] == run.about["distinct"] == 3
    assert run.points[:, 0].tolist() == list(range(200, 3001, 200)) and (np.diff(run.points[:, 1]) > 0).all()
    assert run.about["steps"] == run.about["steps_to_do"] == 3000 and run.about["seconds"] == run.points[-1, 1]
    (checkpoint,) = Path("runs/toys").glob("*/runs/*/checkpoint.pt")
    last_returns = torch.load(checkpoint, weights_only=True)["last_returns"]
    assert run.about["train_return"] == pytest.approx(np.mean(last_returns), rel=1e-5)
    assert run.about["train_std"] == pytest.approx(np.std(last_returns, ddof=1), rel=1e-5)
    assert np.nanmean(run.points[:, 2]) == pytest.approx(np.mean(last_returns), rel=0.3)
    assert 8 <= run.about["greedy_min"] <= run.about["greedy_mean"] <= run.about["greedy_max"] <= 500
    assert f"{command} --seed 1" in capfd.readouterr().out and (SET / "curves_steps.png").exists()

    # The same agent with more steps to do: refused, unless it is taken as it is
    saved = torch.load(checkpoint, weights_only=True)
    saved["args"]["total_timesteps"], saved["step"] = 4100, 2800
    torch.save(saved, checkpoint)
    args = collect.Args(checkpoint.parent, Path("mine"), command, episodes=2)
    with pytest.raises(SystemExit) as exit:
        collect.main(args)
    assert exit.value.code == collect.UNFINISHED and "2,800 of 4,100 steps" in capfd.readouterr().out
    args.unfinished = True
    collect.main(args)
    (run,) = collect.read_set("mine")
    assert run.unfinished and (run.about["steps"], run.about["steps_to_do"]) == (2800, 4000)
    assert run.points[-1, 0] == 2800 and run.about["script_sha1"] == ""


@pytest.mark.parametrize("device, there, named", [("auto", True, True), ("auto", False, False), ("cpu", True, False)])
def test_a_gpu_is_named_where_the_run_may_have_used_it(device, there, named, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert collect.hardware(device).startswith("a GPU, ") == named and " cores" in collect.hardware(device)


def test_a_run_of_offline_dqn_is_refused_in_one_line(monkeypatch, capsys):
    options = asdict(offline_dqn.Args())
    script = SimpleNamespace(__name__="offline_dqn", load_checkpoint=lambda _: {"args": options, "step": 1})
    monkeypatch.setattr(play, "load_script", lambda _: script)
    with pytest.raises(SystemExit) as exit:
        collect.main(collect.Args(Path("runs/run"), Path("set"), "python offline_dqn.py"))
    message = capsys.readouterr().err
    assert exit.value.code == 2 and message.startswith("error: runs/run") and message.count("\n") == 1
    assert "benchmark/offline.py" in message and not Path("set").exists()


@pytest.mark.parametrize(
    "steps, name", [(None, "jax/minatar"), ("10000000", "jax/minatar"), ("1000000", "jax/minatar_short")]
)
def test_minatar_of_another_length_is_another_set(steps, name):
    Path("bin").mkdir()
    Path("bin/python").write_text('#!/bin/sh\ncat > /dev/null\necho "$*"\n')
    Path("bin/python").chmod(0o755)
    environment = os.environ | {"PATH": f"{Path('bin').resolve()}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": "."}
    environment |= {"STEPS": steps} if steps else {}
    words = [ROOT / "benchmark/minatar.sh", "--list"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == f"benchmark/launch.py {name} --list\n"
