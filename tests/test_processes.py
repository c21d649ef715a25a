"""Several processes, as torchrun starts them: they learn what one would, stop together and leave one run behind."""

import importlib
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
import unittest.mock
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPTS = "pqn", "pqn_atari_envpool", "pqn_atari_lstm", "pqn_lstm", "pqn_vdn", "pqn_vdn_lstm"
# Its processes are copies of one that has imported everything, which takes longer than what they do
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload([*SCRIPTS, "test_processes"])


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")  # for what is imported in advance


def one_of_them(rank, ranks, port, folder, functions):
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "lo"}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored in what a shell starts with `&`
    torch.set_num_threads(1)
    for i, file in enumerate((f"out{rank}", f"err{rank}"), start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), i)
    for function, *args in functions:
        function(*args)


def start(*functions, ranks=2):
    """Processes that call the functions (each given with its arguments) one after the other, as torchrun's would."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = store.port, os.getcwd()
    started = [server.Process(target=one_of_them, args=(rank, ranks, *place, functions)) for rank in range(ranks)]
    for process in started:
        process.start()
        process.store = store  # which ends after all of them
    return started


def end(processes, timeout=300):
    """Their exit codes and what they wrote to stderr, all of them together."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    hanging = [process for process in processes if process.exitcode is None]
    for process in hanging:
        process.kill()
    errors = "".join(Path(f"err{rank}").read_text() for rank in range(len(processes)))
    assert not hanging, f"{len(hanging)} processes hang; {errors}"
    return [process.exitcode for process in processes], errors


# -------------------------------------------------------------------------------------------------- the same updates


class Recorded:
    """Environments whose transitions depend on nothing but the environment's number and the time, some of them
    phantoms; environment i of process r is number r * N + i of all."""

    def __init__(self, envs, numbers):
        self.envs, self.numbers, self.time = envs, numbers, 0
        for name in ("observation_space", "action_space", "metadata"):
            setattr(self, name, getattr(envs, name))

    def observe(self, space=None):
        space = self.observation_space if space is None else space
        if isinstance(space, gym.spaces.Dict):  # of a team
            return {name: self.observe(part) for name, part in space.items()}
        draw = [np.random.default_rng((self.time, i)) for i in self.numbers]
        if space.dtype == np.uint8:
            return np.stack([x.integers(0, 256, space.shape, dtype=np.uint8) for x in draw])
        return np.stack([x.normal(size=space.shape) for x in draw])

    def reset(self):
        return self.observe(), {}

    def step(self, actions):
        self.time += 1
        time_of_each = self.time + 3 * self.numbers
        terminated, truncated = time_of_each % 7 == 0, time_of_each % 11 == 0
        rewards = np.sin(time_of_each).astype(np.float32)
        return self.observe(), rewards, terminated, truncated, {"reward": rewards, "terminated": terminated}


def learn_from_records(name, options, together):
    """Runs main() on them. One process for all learns from the minibatches that `together` ones have between them."""
    script, shuffle = importlib.import_module(name), torch.randperm
    make, rank = script.make_envs, int(os.environ["RANK"])

    def make_envs(args, num_envs, seed):
        assert seed[2] == rank << 32, "every process needs streams of its own"
        return Recorded(make(args, num_envs, seed), np.arange(num_envs) + rank * num_envs)

    def randperm(n):
        order = shuffle(n // together)
        if name.endswith("lstm"):  # environments are shuffled
            parts = [order + process * len(order) for process in range(together)]
        else:
            N = options["num_envs"] // together
            parts = [order // N * N * together + process * N + order % N for process in range(together)]
        return torch.stack([part.view(options["num_minibatches"], -1) for part in parts], dim=1).flatten()

    script.make_envs, torch.randperm = make_envs, randperm if together > 1 else shuffle
    logged, log = [], script.Run.log

    def watch(run, *rest):
        log(run, *rest)
        logged[:] = run.last_returns[0]

    script.Run.log = watch
    torch.distributed.destroy_process_group = lambda: None  # the next script goes on with it
    with unittest.mock.patch.object(script, "RAdam", wraps=script.RAdam) as build:
        script.main(script.Args(**options, num_eval_envs=0, device="cpu"))
    torch.randperm = shuffle
    weights = build.call_args.args[0].state_dict()
    torch.save({**weights, "returns": torch.tensor(logged)}, f"{name}, process {rank} of those that are {together}")


SIZES = dict(num_envs=4, num_steps=6, num_minibatches=2, total_timesteps=24 * 4, learning_rate=1e-3, l2_coef=0.5)
ATARI = SIZES | dict(env_id="Pong-v5", precision="fp32", q_lambda=0.9)
RECURRENT = {"memory_window": 2, "lstm_size": 8}
RUNS = [("pqn", SIZES), ("pqn_atari_envpool", ATARI), ("pqn_atari_lstm", ATARI | RECURRENT)]
RUNS += [("pqn_lstm", SIZES | RECURRENT)]
TEAM = SIZES | dict(hidden_sizes=(32,), norm_type="layer_norm")
RUNS += [("pqn_vdn", TEAM), ("pqn_vdn_lstm", TEAM | RECURRENT | dict(normalize_input=False))]


def test_two_processes_make_the_updates_of_one_and_one_of_them_writes():
    for ranks, together in ((2, 1), (1, 2)):
        codes, errors = end(start(*[(learn_from_records, *run, together) for run in RUNS], ranks=ranks))
        assert codes == [0] * ranks and not errors, errors
        assert len(list(Path("runs").glob("*"))) == len(list(Path("runs").glob("*/events*"))) == len(RUNS) * together
    for name, _ in RUNS:
        which = "process 0 of those that are 1", "process 1 of those that are 1", "process 0 of those that are 2"
        first, second, one = (torch.load(f"{name}, {x}") for x in which)
        assert all(torch.equal(first[weights], second[weights]) for weights in first), name
        returns = [x.pop("returns").sort().values for x in (first, one)]  # both processes' episodes
        assert torch.allclose(*returns) and len(returns[0]) > 10, name
        assert all(torch.allclose(first[weights], one[weights], atol=2e-5) for weights in one), name


# ------------------------------------------------------------------------------------------------- ends of all kinds

OPTIONS = "--num-envs 4 --num-steps 16 --num-minibatches 2 --num-eval-envs 2 --device cpu --checkpoint-interval 64"


def command(options, rank_at_fault=None, fault=None):
    """The command line; in one process, with fault(script) called before the fourth rollout."""
    script, rollouts = importlib.import_module("pqn"), []
    collect = script.Collector.collect

    def faulty(*args):
        rollouts.append(None)
        if len(rollouts) == 4 and int(os.environ["RANK"]) == rank_at_fault:
            fault(script)
        return collect(*args)

    script.Collector.collect = faulty
    sys.argv = ["pqn.py", *options.split()]
    script.main(script.parse_args())


def no_reward(script):
    step = script.step_envs
    script.step_envs = lambda *args: (lambda obs, reward, *rest: (obs, reward * np.nan, *rest))(*step(*args))


def no_loss(script):
    loss = script.td_loss
    script.td_loss = lambda *args: tuple(x * np.inf for x in loss(*args))


def no_space(script):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, 2**17))


def no_process(script):
    os.kill(os.getpid(), signal.SIGKILL)


def no_memory(script):
    script.td_loss = unittest.mock.Mock(side_effect=torch.OutOfMemoryError("out of memory"))


def saved():
    (path,) = Path("runs").glob("*/checkpoint.pt")
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    "options, hint",
    [
        ("--num-envs 5", "--num-envs 5 cannot be shared out evenly among 2 processes"),
        ("--num-minibatches 64", "--num-minibatches 64 does not divide a rollout of 32 steps"),
        ("--norm-type batch_norm", "batch norm"),
        ("--resume nowhere", "no checkpoint"),
        ("--no-such-option", "--no-such-option"),
    ],
)
def test_a_refusal_is_printed_once(options, hint):
    codes, errors = end(start((command, f"{OPTIONS} {options}")))
    assert codes == [2, 2] and errors.count(hint) == 1, errors
    assert errors.count("error") == 1 or "no-such" in hint, errors
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "rank, fault, codes, hint",
    [
        (1, no_reward, [1, 1], "error in process 1: the environment returned a reward that is not finite"),
        (1, no_loss, [1, 1], "the loss or a weight is not finite"),
        (1, no_memory, [1, 1], "error in process 1: out of memory"),
        (0, no_space, [1, 1], "error in process 0: [Errno 27] File too large"),
        (0, no_process, [-9, 1], "error in process 1: another process of this run has ended"),
        (1, no_process, [1, -9], "error in process 0: another process of this run has ended"),
    ],
)
def test_what_ends_one_process_ends_all_with_one_line_and_a_whole_checkpoint(rank, fault, codes, hint):
    ended, errors = end(start((command, f"{OPTIONS} --total-timesteps 100000", rank, fault)))
    assert ended == codes, errors
    assert errors.count("\n") == 1 and hint in errors and "--resume runs/" in errors, errors
    assert saved()["step"] in (3 * 64, 4 * 64) and all(x.isfinite().all() for x in saved()["network"].values())


def wait_until(condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def checkpoints():
    """The times of their last change; each comes after a rollout that every process has finished."""
    return {path: path.stat().st_mtime_ns for path in Path("runs").glob("*/checkpoint.pt")}


def test_a_signal_to_one_process_stops_all_after_the_same_rollout_and_any_number_resumes():
    steps, options = 0, f"{OPTIONS} --total-timesteps 1000000"
    for ranks, signalled, signum in ((2, 1, signal.SIGTERM), (4, 0, signal.SIGINT)):
        before = checkpoints()
        processes = start((command, options), ranks=ranks)
        wait_until(lambda before=before: checkpoints() != before)
        os.kill(processes[signalled].pid, signum)
        codes, errors = end(processes)
        assert codes == [128 + signum] * ranks and errors == "\nstopping after this rollout\n" * (signalled == 0)
        assert saved()["step"] > steps and f"stopped at step {saved()['step']:,}" in Path("out0").read_text()
        (folder,), steps = Path("runs").glob("*"), saved()["step"]
        options = f"--resume {folder}"
    codes, errors = end(start((command, f"{options} --total-timesteps {steps + 128}"), ranks=1))
    assert codes == [0] and saved()["step"] == steps + 128
    assert saved()["optimizer"]["steps"] == saved()["step"] // 64 * 8


def test_torchrun_names_the_process_that_died():
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["--monitor-interval", "5", ROOT / "pqn.py"]  # in which a process has the time to say what it knows
    words += [*OPTIONS.split(), "--total-timesteps", "10000000"]
    with open("out", "w") as out:
        torchrun = subprocess.Popen(list(map(str, words)), stdout=out, stderr=out)
    wait_until(checkpoints)
    for pid in Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split():
        if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes():
            os.kill(int(pid), signal.SIGKILL)
    assert torchrun.wait(timeout=300) == 1
    output = Path("out").read_text()
    assert output.count("another process of this run has ended") == 1, output
    assert re.search(r"rank +: 1 .*\n +exitcode +: -9", output), output
    assert "Traceback" not in output.split("error in process 0")[0], output
