"""What the tests of the scripts share: each runs in an empty folder of its own."""

import ast
import signal
import sys
from pathlib import Path

import envpool
import pytest
import tiny_envs
import torch
import torch.nn as nn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

import pqn
import pqn_atari_envpool
import pqn_atari_lstm
import pqn_lstm
import pqn_vdn
import pqn_vdn_lstm
import preqn


@pytest.fixture
def in_an_empty_folder(tmp_path, monkeypatch):
    """And what a failed run leaves open there is closed before the folder is left."""
    opened = []
    for script in (pqn, pqn_atari_envpool, pqn_atari_lstm, pqn_lstm, pqn_vdn, pqn_vdn_lstm, preqn):
        watched = lambda *x, make=script.SummaryWriter, **names: opened.append(make(*x, **names)) or opened[-1]
        monkeypatch.setattr(script, "SummaryWriter", watched)
    # Files of one second are read in the order of their names, which end with a count: 9 would come after 10
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    monkeypatch.chdir(tmp_path)
    yield
    for writer in opened:
        writer.close()


@pytest.fixture
def train(in_an_empty_folder):
    """Runs a script's main() on options; the folder and the checkpoint that it leaves."""

    def train(args):
        before = set(Path("runs").glob("*"))
        sys.modules[type(args).__module__].main(args)
        (folder,) = set(Path("runs").glob("*")) - before or {Path(args.resume)}
        return folder, torch.load(folder / "checkpoint.pt", weights_only=True)

    return train


@pytest.fixture
def heeded_signals():
    """No signal is ignored, also where the tests were started with nohup. One that a script does not catch fails the
    test, and does not end the process."""

    def unnoticed(signum, _):
        raise AssertionError(f"{signal.Signals(signum).name} ends the process")

    before = {x: signal.signal(x, unnoticed) for x in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield unnoticed
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture
def small_body(monkeypatch):
    """The Atari scripts with one dense layer in place of their convolutions, over pictures shrunk to 4 × 4 pixels."""

    def small(QNetwork):
        def make(observation_space, action_space, args):
            network = QNetwork(observation_space, action_space, args)
            pixels = 16 * observation_space.shape[0]
            pool = nn.AdaptiveAvgPool2d((4, 4))
            network.body = nn.Sequential(pool, nn.Flatten(), nn.Linear(pixels, 512), nn.LayerNorm(512), nn.Tanh())
            return network

        return make

    for script in (pqn_atari_envpool, pqn_atari_lstm):
        monkeypatch.setattr(script, "QNetwork", small(script.QNetwork))


@pytest.fixture
def eventful_games(monkeypatch, small_body):
    """Both Atari scripts play `tiny_envs.EventfulAtari`, whatever game they are told."""
    monkeypatch.setattr(envpool, "make", lambda _, env_type, **kwargs: tiny_envs.EventfulAtari(**kwargs))


@pytest.fixture
def curves():
    """The curves of the run in a folder: for each name the steps and values of its points."""

    def curves(folder):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}

    return curves


@pytest.fixture
def what_a_script_consists_of():
    """The text of each function and class of a script, and of the lines that start it, by name."""

    def parts(script):
        source = Path(pqn.__file__).with_name(script).read_text()
        body = ast.parse(source).body
        text = {part.name: ast.get_source_segment(source, part) for part in body if hasattr(part, "name")}
        return text | {"__main__": ast.get_source_segment(source, body[-1])}

    return parts
