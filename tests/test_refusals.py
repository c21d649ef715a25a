"""What is refused, in one line and before anything is written; and what damaged files, full disks, signals and errors
inside an environment leave of a run. The scripts share nearly all of this word for word: most tests take pqn.py."""

import fcntl
import os
import resource
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pqn
import pqn_atari_envpool
import pqn_atari_lstm
import pqn_lstm

ROOT = Path(__file__).parents[1]
SCRIPTS = {module.__name__: module for module in (pqn, pqn_atari_envpool, pqn_atari_lstm, pqn_lstm)}
SMALL = pqn.Args(num_envs=4, num_steps=8, num_minibatches=2, update_epochs=1, total_timesteps=320, hidden_sizes=(16,))
LONGER = "--total-timesteps", "640"


@pytest.fixture(autouse=True)
def in_an_empty_folder(in_an_empty_folder):
    pass


@pytest.fixture
def refusal(monkeypatch, capsys):
    """The one line in which a script refuses its command line, with exit code 2 and no new folder."""

    def refusal(script, *options):
        capsys.readouterr()
        before = set(Path().rglob("*"))
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, options)])
        with pytest.raises(SystemExit) as exit:
            SCRIPTS[script].main(SCRIPTS[script].parse_args())
        output = capsys.readouterr()
        assert exit.value.code == 2 and output.err.startswith("error: ") and output.err.count("\n") == 1
        assert output.out == "" and set(Path().rglob("*")) == before
        return output.err

    return refusal


def during_rollout(number, act, monkeypatch):
    """Has `act` called in the middle of a run, as its n-th rollout begins."""
    collect, calls = pqn.Collector.collect, []

    def acting_collect(*args):
        calls.append(len(calls))
        if len(calls) == number:
            act()
        return collect(*args)

    monkeypatch.setattr(pqn.Collector, "collect", acting_collect)


# -------------------------------------------------------------------------------------------------------- options


def zero(names):
    return [(f"--{name} 0", f"--{name}") for name in names.split()]


ALL = zero("num-envs num-steps num-minibatches update-epochs total-timesteps log-interval checkpoint-interval")
ALL += zero("schedule-timesteps learning-rate max-grad-norm")
ALL += [(f"--{name} nan", f"--{name}") for name in "learning-rate gamma q-lambda max-grad-norm l2-coef".split()]
ALL += [
    (f"--{name}", f"--{name.split('=')[0]}") for name in "num-eval-envs=-1 q-lambda=-0.1 seed=-1 l2-coef=-1".split()
]
ALL += [
    ("--learning-rate inf", "--learning-rate"),
    ("--l2-coef inf", "--l2-coef"),
    ("--gamma 1.01", "--gamma"),
    ("--start-e 2", "--start-e"),
    ("--exploration-fraction 1.5", "--exploration-fraction"),
    ("--device nonsense", "--device"),
    ("--resume nowhere", "no checkpoint"),
    ("--resume=", "no checkpoint"),
    (f"--resume {'a' * 300}", "no checkpoint"),
]
ATARI = zero("noop-max frame-skip stack-num max-episode-steps") + [
    ("--env-id Breakout", "Breakout-v5"),
    ("--env-id pong", "Pong-v5"),
    ("--env-id CartPole-v1", "pqn.py"),
    ("--env-id Breakout-v4", "Breakout-v5"),
    ("--repeat-action-probability 1.5", "--repeat-action-probability"),
    ("--max-episode-steps 3000000000", "cannot make"),
    ("--total-timesteps 100", "4096"),
]
VECTORS = zero("reward-scale hidden-sizes") + [
    ("--env-id CartPool-v1", "CartPole"),
    ("--env-id cartpole-v1", "CartPole"),
    ("--env-id CartPole-v7", "`v1`"),
    ("--env-id no_such_module:Env-v0", "no_such_module"),
    ("--env-id Pendulum-v1", "Discrete"),
    ("--env-id MiniGrid-Empty-5x5-v0", "Box or Discrete"),
    ("--env-id tiny_envs:Empty-v0", "not empty"),
    ("--env-id Pong-v5", "channels first"),
    ("--env-id tiny_envs:SameStep-v0", "NEXT_STEP"),
    ("--total-timesteps 100", "2048"),
]
RECURRENT = zero("lstm-size") + [
    ("--num-envs 10 --num-minibatches 4", "does not divide 10 environments"),
    ("--memory-window=-1", "--memory-window"),
    ("--memory-window 4 --norm-type batch_norm", "batch norm"),
]
BAD_OPTIONS = {
    "pqn": [
        *VECTORS,
        ("--num-minibatches 7", "2048"),
        ("--num-minibatches 2048 --norm-type batch_norm", "batch norm"),
        ("--num-minibatches 2048 --normalize-input", "batch norm"),
    ],
    "pqn_atari_envpool": [
        *ATARI,
        ("--num-minibatches 7", "4096"),
        ("--num-minibatches 4096 --norm-type batch_norm", "batch norm"),
    ],
    "pqn_atari_lstm": [*ATARI, *RECURRENT, ("--memory-window 33", "--memory-window 33 is more")],
    "pqn_lstm": [
        *VECTORS,
        *RECURRENT,
        ("--memory-window 65", "--memory-window 65 is more"),
        ("--memory-window 4 --normalize-input", "batch norm"),
    ],
}


@pytest.mark.parametrize("script, options, hint", [(s, *bad) for s in SCRIPTS for bad in ALL + BAD_OPTIONS[s]])
def test_bad_options_get_one_line_and_exit_code_2_before_anything_is_written(script, options, hint, refusal):
    assert hint in refusal(script, *options.split())


@pytest.mark.parametrize("script", SCRIPTS)
def test_compiling_without_a_compiler_is_refused(script, refusal, monkeypatch):
    monkeypatch.setenv("CXX", "nonexistent")
    assert "CXX" in refusal(script, "--compile")


def test_what_a_run_was_started_with_matters_only_where_it_is_asked_for_again(train, refusal, monkeypatch):
    """A compiled run is loaded where nothing can be compiled, and one of 4 environments by 3 processes."""
    folder, checkpoint = train(SMALL)
    checkpoint["args"]["compile"] = True
    torch.save(checkpoint, folder / "checkpoint.pt")
    monkeypatch.setenv("CXX", "nonexistent")
    assert "CXX" in refusal("pqn", "--resume", folder, *LONGER)
    monkeypatch.setattr(sys, "argv", ["pqn.py", "--resume", str(folder), "--no-compile", *LONGER])
    pqn.main(pqn.parse_args())
    with monkeypatch.context() as patched:
        patched.setattr(pqn, "processes", lambda: (0, 3))
        assert pqn.load_checkpoint(folder)["step"] == 640
    with pytest.raises(SystemExit):
        pqn.check(SMALL, ranks=3)


def test_a_user_sees_the_same_and_may_keep_an_environment_in_the_working_directory():
    entry_point = "gymnasium.envs.classic_control:PendulumEnv"
    Path("mine.py").write_text(f"import gymnasium\ngymnasium.register('Mine-v0', entry_point='{entry_point}')")
    command = [sys.executable, str(ROOT / "pqn.py"), "--env-id", "mine:Mine-v0"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == "" and not Path("runs").exists()
    assert result.stderr.count("\n") == 1 and "PQN needs Discrete ones" in result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_1e4_is_a_whole_number_and_fractions_stay_what_they_are(script, monkeypatch):
    options = "--total-timesteps 1e4 --checkpoint-interval=2.5e3 --max-grad-norm 2.5e0 --learning-rate 1e-3"
    monkeypatch.setattr(sys, "argv", [script, *options.split(), "--env-id", "v1e4", "--wandb-entity", "team-1e5"])
    args = SCRIPTS[script].parse_args()
    assert (args.total_timesteps, args.checkpoint_interval) == (10_000, 2_500)
    assert (args.max_grad_norm, args.learning_rate) == (2.5, 1e-3)
    assert (args.env_id, args.wandb_entity) == ("v1e4", "team-1e5")


def test_what_weights_and_biases_refuses_is_one_line_before_anything_is_written(monkeypatch, refusal):
    def init(**_):
        raise RuntimeError("no API key:\n log in")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    assert refusal("pqn", "--track").endswith(": no API key: log in\n")


def test_weights_and_biases_gets_the_options_and_the_name_of_the_run_so_that_it_can_be_resumed(monkeypatch, train):
    seen = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: seen.append(options)))
    folder, _ = train(replace(SMALL, track=True, wandb_project_name="mine", wandb_entity="us"))
    (options,) = seen
    assert options["config"]["num_envs"] == 4 and options["config"]["schedule_timesteps"] == 320
    expected = dict(project="mine", entity="us", sync_tensorboard=True, id=folder.name, resume="allow")
    assert {name: options[name] for name in expected} == expected


def test_a_folder_that_cannot_be_made_is_an_error_of_one_line(refusal):
    Path("runs").write_text("a file")
    assert "cannot open the run" in refusal("pqn")


# ---------------------------------------------------------------------------------------------------- checkpoints


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_checkpoints_that_do_not_fit_are_refused_and_execute_nothing(train, refusal):
    folder, good = train(SMALL)
    path = folder / "checkpoint.pt"
    resume = lambda *options: refusal("pqn", "--resume", folder, *options)
    assert "between step 320 and" in resume()
    assert "CartPole-v1" in resume("--env-id", "Acrobot-v1", *LONGER)
    assert "another network" in resume("--hidden-sizes", "20", *LONGER)
    assert "another network" in resume("--norm-type", "batch_norm", *LONGER)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "broken" in resume(*LONGER)
    path.write_bytes(b"")
    assert "broken" in resume(*LONGER)
    torch.save({"script": "pqn", "args": Malicious()}, path)
    assert "broken" in resume(*LONGER) and not Path("executed").exists()
    for missing in set(good) - {"threads"}:
        torch.save({name: value for name, value in good.items() if name != missing}, path)
        assert f"'{missing}'" in resume(*LONGER)
    torch.save(good | {"script": "baird"}, path)
    assert "baird.py" in resume(*LONGER)
    torch.save(good | {"args": {"env_id": "CartPole-v1", "from_another_time": 1}}, path)
    assert "version" in resume(*LONGER)
    torch.save(good | {"optimizer": {0: {"step": 3}}}, path)
    assert "version" in resume(*LONGER)


WRONG_TYPES = dict(script=3, step="many", last_returns=7, eval_returns=[None], network=[], rng_state=3, optimizer=None)


@pytest.mark.parametrize("name", [*WRONG_TYPES, "args", "args.num_envs", "args.gamma", "optimizer.steps"])
def test_a_field_of_the_wrong_type_is_refused_in_one_line(name, train, refusal):
    folder, checkpoint = train(SMALL)
    outer, _, inner = name.partition(".")
    if inner:
        checkpoint[outer][inner] = None
    else:
        checkpoint[outer] = WRONG_TYPES.get(outer)
    torch.save(checkpoint, folder / "checkpoint.pt")
    message = refusal("pqn", "--resume", folder, *LONGER)
    assert "version" in message or "--num-envs must be a whole number" in message


@pytest.mark.parametrize("changed", [{"step": 1.5}, {"optimizer.steps": "three"}, {"args.num_envs": 4.0}])
def test_a_number_of_another_type_is_refused_in_one_line(changed, train, refusal):
    folder, checkpoint = train(SMALL)
    ((name, value),) = changed.items()
    *outer, inner = name.split(".")
    (checkpoint[outer[0]] if outer else checkpoint)[inner] = value
    torch.save(checkpoint, folder / "checkpoint.pt")
    assert "number" in refusal("pqn", "--resume", folder, *LONGER) or name != "args.num_envs"


def test_one_flipped_bit_in_any_tensor_or_field_is_refused(train, refusal):
    folder, checkpoint = train(SMALL)
    path = folder / "checkpoint.pt"
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        records = [info for info in archive.infolist() if info.file_size]
        contents = [archive.read(info) for info in records]
    assert len(records) >= len(checkpoint["network"]) + 3
    for k, (info, content) in enumerate(zip(records, contents, strict=True)):
        start = whole.index(content, info.header_offset)
        damaged = bytearray(whole)
        damaged[start + len(content) * k // len(records)] ^= 1 << k % 8
        path.write_bytes(damaged)
        assert "broken" in refusal("pqn", "--resume", folder, *LONGER), info.filename


@pytest.mark.parametrize(
    "script, options, hint",
    [
        ("pqn", "", "pqn_atari_lstm.py"),
        ("pqn_atari_lstm", "--lstm-size 9", "another network"),
        ("pqn_atari_lstm", "--stack-num 2", "another network"),
        ("pqn_atari_lstm", "--env-id Qbert-v5", "is of Pong-v5"),
    ],
)
def test_a_checkpoint_of_another_script_game_or_network_is_refused(script, options, hint, train, refusal):
    sizes = dict(num_envs=2, num_steps=2, num_eval_envs=0, num_minibatches=1, total_timesteps=4, lstm_size=8)
    folder, _ = train(pqn_atari_lstm.Args(env_id="Pong-v5", update_epochs=1, **sizes))
    assert hint in refusal(script, "--resume", folder, *LONGER, *options.split())


def test_a_checkpoint_is_swapped_and_not_written_over(train):
    folder, checkpoint = train(SMALL)
    before, whole = folder / "before.pt", (folder / "checkpoint.pt").read_bytes()
    os.link(folder / "checkpoint.pt", before)
    args = replace(pqn.Args(**checkpoint["args"]), resume=str(folder))
    network = pqn.QNetwork(*pqn.spaces(pqn.make_envs(args, 1, (0,))), args)
    optimizer = pqn.RAdam(network, 10.0)
    pqn.Run(args, optimizer.weights, checkpoint).save(0, network, optimizer)
    assert before.read_bytes() == whole != (folder / "checkpoint.pt").read_bytes()


def test_a_checkpoint_is_on_the_disk_before_it_takes_the_place_of_the_old_one(train, monkeypatch):
    done, fsync, swap = [], os.fsync, os.replace
    monkeypatch.setattr(pqn.os, "fsync", lambda file: done.append(os.fstat(file).st_size) or fsync(file))
    monkeypatch.setattr(pqn.os, "replace", lambda old, new: done.append("swapped") or swap(old, new))
    folder, _ = train(SMALL)
    assert done == [(folder / "checkpoint.pt").stat().st_size, "swapped"]


def test_checkpoints_are_made_when_their_interval_is_over_and_at_the_end(monkeypatch, train):
    saved, save = [], pqn.Run.save
    monkeypatch.setattr(pqn.Run, "save", lambda run, step, *args: saved.append(step) or save(run, step, *args))
    train(replace(SMALL, checkpoint_interval=100))  # rollouts are of 32 steps
    assert saved == [128, 224, 320, 320]


def test_a_full_disk_stops_the_run_in_one_line_and_keeps_the_last_whole_checkpoint(train, capsys):
    folder, checkpoint = train(replace(SMALL, hidden_sizes=(256, 256), device="cpu"))
    whole = (folder / "checkpoint.pt").read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, before[1]))
    try:
        with pytest.raises(SystemExit) as exit:
            pqn.main(replace(pqn.Args(**checkpoint["args"]), resume=str(folder), total_timesteps=640))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    errors = capsys.readouterr().err
    assert exit.value.code == 1 and "File too large" in errors and errors.count("\n") == 1
    assert f"--resume {folder}" in errors
    assert (folder / "checkpoint.pt").read_bytes() == whole and not list(folder.glob("*.tmp"))


def test_a_second_process_in_the_same_folder_is_refused_while_the_first_is_at_work(train, refusal, monkeypatch, capsys):
    folder, _ = train(SMALL)
    seen = []
    second = lambda: seen.append(refusal("pqn", "--resume", folder, *LONGER))
    during_rollout(5, second, monkeypatch)
    train(replace(SMALL, resume=str(folder), total_timesteps=640))
    assert "another process is at work in it" in seen[0]
    assert train(replace(SMALL, resume=str(folder), total_timesteps=672))[1]["step"] == 672  # the lock is free again


def test_a_folder_whose_lock_another_program_holds_is_refused(train, refusal):
    folder, _ = train(SMALL)
    with open(folder / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process" in refusal("pqn", "--resume", folder, *LONGER)


# -------------------------------------------------------------------------------------------------------- signals


SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.mark.parametrize("signum", SIGNALS, ids=[x.name for x in SIGNALS])
def test_a_signal_is_acknowledged_at_once_and_ends_the_run_after_this_rollout(
    signum, heeded_signals, train, monkeypatch, capfd
):
    said = []

    def interrupt():
        os.kill(os.getpid(), signum)
        said.append(capfd.readouterr().err)
        assert signal.getsignal(signum) == signal.SIG_DFL  # a second one ends the process

    with monkeypatch.context() as patch:
        during_rollout(3, interrupt, patch)
        with pytest.raises(SystemExit) as exit:
            train(SMALL)
    output = capfd.readouterr()
    assert said == ["\nstopping after this rollout\n"] and output.err == ""
    assert exit.value.code == 128 + signum
    assert {signal.getsignal(signum) for signum in SIGNALS} == {heeded_signals}
    (folder,) = Path("runs").glob("*")
    assert "stopped at step 96" in output.out and f"go on with --resume {folder}" in output.out
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 96


@pytest.mark.parametrize("signum", SIGNALS, ids=[x.name for x in SIGNALS])
def test_a_signal_that_is_ignored_stays_ignored(signum, heeded_signals, train, monkeypatch, capfd):
    signal.signal(signum, signal.SIG_IGN)
    during_rollout(3, lambda: os.kill(os.getpid(), signum), monkeypatch)
    assert train(SMALL)[1]["step"] == 320
    assert capfd.readouterr().err == "" and signal.getsignal(signum) == signal.SIG_IGN


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGINT], ids=["terminal", "pipe"])
def test_a_run_whose_terminal_or_pipe_has_been_closed_is_saved(signum):
    """A terminal that is closed sends SIGHUP; Ctrl-C ends the other side of a pipe, too."""
    reader, writer = os.openpty() if signum == signal.SIGHUP else os.pipe()
    options = f"--num-envs 4 --num-steps 8 --num-minibatches 2 --hidden-sizes 16 --total-timesteps {10**9}"
    command = [sys.executable, str(ROOT / "pqn.py"), *options.split(), "--checkpoint-interval", "1000"]
    own = {"stderr": writer, "start_new_session": True} if signum == signal.SIGHUP else {}
    own |= {"env": os.environ | {"OMP_NUM_THREADS": "1"}}
    own |= {"preexec_fn": lambda: signal.signal(signum, signal.SIG_DFL)}  # under nohup, for example, it is ignored
    run = subprocess.Popen(command, stdout=writer, **own)
    os.close(writer)
    while run.poll() is None and not (made := list(Path("runs").glob("*/checkpoint.pt"))):
        pass
    os.close(reader)
    made[0].unlink()
    run.send_signal(signum)
    assert run.wait() == 128 + signum and made[0].exists()


def test_a_signal_in_the_last_rollout_finds_nothing_to_stop(heeded_signals, train, monkeypatch, capsys):
    during_rollout(10, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)  # of 10
    assert train(SMALL)[1]["step"] == 320
    assert "done at step 320" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- while it runs


@pytest.mark.parametrize("error", ["OSError", "RuntimeError", "FloatingPointError"])
def test_an_error_inside_an_environment_is_shown_with_its_place_and_with_the_last_checkpoint(error, train, capsys):
    args = replace(SMALL, env_id=f"tiny_envs:{error}-v0", total_timesteps=3200, checkpoint_interval=320)
    with pytest.raises(SystemExit) as exit:
        pqn.main(args)
    errors = capsys.readouterr().err.splitlines()
    (folder,) = Path("runs").glob("*")
    assert exit.value.code == 1 and errors[0].startswith("Traceback") and any("tiny_envs.py" in line for line in errors)
    assert errors[-2].endswith("level7.map")
    assert errors[-1] == f"error: level7.map; --resume {folder} goes on from its last checkpoint"
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 960
    # The lock is free, although the run has failed
    assert train(replace(args, resume=str(folder), total_timesteps=1120))[1]["step"] == 1120


def test_an_error_before_the_first_checkpoint_promises_none(capsys):
    with pytest.raises(SystemExit) as exit:
        pqn.main(replace(SMALL, env_id="tiny_envs:OSError-v0", total_timesteps=3200))
    assert exit.value.code == 1 and capsys.readouterr().err.endswith("\nerror: level7.map\n")


def test_a_value_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(capsys):
    args = replace(SMALL, env_id="tiny_envs:BadReward-v0", total_timesteps=3200, checkpoint_interval=320)
    with pytest.raises(SystemExit) as exit:
        pqn.main(args)
    errors = capsys.readouterr().err
    assert exit.value.code == 1 and errors.count("\n") == 1
    assert errors.startswith("error: the environment returned a reward that is not finite; --resume runs/")
    (folder,) = Path("runs").glob("*")
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 960
    assert all(weight.isfinite().all() for weight in checkpoint["network"].values())


def test_a_weight_that_is_not_finite_is_never_saved(train, capsys):
    with pytest.raises(SystemExit) as exit:
        train(replace(SMALL, learning_rate=1e29, anneal_lr=False, checkpoint_interval=1, num_minibatches=1))
    assert exit.value.code == 1 and "a weight is not finite" in capsys.readouterr().err
    for checkpoint in Path("runs").glob("*/checkpoint.pt"):
        assert all(weights.isfinite().all() for weights in torch.load(checkpoint)["network"].values())


def test_the_hyperparameter_table_names_every_option_and_the_device_that_was_used(train):
    folder, _ = train(replace(SMALL, device="cpu"))
    events = EventAccumulator(str(folder)).Reload()
    (text,) = events.Tensors("hyperparameters/text_summary")
    rows = text.tensor_proto.string_val[0].decode().splitlines()
    assert "|device|cpu|" in rows and "|num_envs|4|" in rows and "|hidden_sizes|(16,)|" in rows
    assert len(rows) == 2 + len(pqn.fields(SMALL))


def test_in_a_pipe_progress_is_a_whole_line_every_10_seconds(monkeypatch, capsys):
    clock = SimpleNamespace(monotonic=lambda: 100.0, time_ns=pqn.time.time_ns)
    monkeypatch.setattr(pqn, "time", clock)
    run = pqn.Run(replace(SMALL, schedule_timesteps=320), torch.zeros(5), None)
    shown = []
    for now in (101.0, 109.0, 111.0, 120.0, 122.0):
        clock.monotonic = lambda now=now: now
        capsys.readouterr()
        run.log(32, 0.5, 1e-4, ([], []), torch.zeros(3), 0)
        shown.append(capsys.readouterr().out)
    assert [text.count("\n") for text in shown] == [0, 0, 1, 0, 1]
    assert (
        shown[2]
        == "32/320 steps, 3/s, 0:01:39 left, return of the last 0 episodes -, greedy while training -, ε 0.500\n"
    )


def test_the_progress_line_is_cut_on_a_narrow_terminal_and_never_wraps(monkeypatch, capsys):
    clock = SimpleNamespace(monotonic=lambda: 100.0, time_ns=pqn.time.time_ns)
    monkeypatch.setattr(pqn, "time", clock)
    args = replace(SMALL, total_timesteps=1_000_000, schedule_timesteps=1_000_000)
    run = pqn.Run(args, torch.zeros(5), {"step": 50_000, "last_returns": [], "eval_returns": []})
    run.live, clock.monotonic = True, lambda: 120.0
    fields = "250,000/1,000,000 steps", "10,000/s", "0:01:15 left"
    fields += "return of the last 100 episodes 23.0 ± 1.0", "greedy while training 468.8 ± 0.0", "ε 0.500"
    for columns in range(1, 150):
        monkeypatch.setattr(pqn.shutil, "get_terminal_size", lambda *_, size=columns: os.terminal_size((size, 24)))
        capsys.readouterr()
        run.shown = 0.0
        run.log(250_000, 0.5, 1e-4, ([(0, 22.0, 9), (1, 24.0, 9)] * 50, [(5, 468.8, 9)]), torch.zeros(3), 0)
        assert capsys.readouterr().out == "\r\033[K" + ", ".join(fields)[: columns - 1]
