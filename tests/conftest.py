"""What the tests of the three scripts share: each runs in an empty folder of its own."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pqn_atari_envpool
import pqn_atari_lstm


@pytest.fixture
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


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
def small_body(monkeypatch):
    """The two Atari scripts with one dense layer in place of their convolutions: pictures may then have any size."""

    def small(QNetwork):
        def make(observation_space, action_space, args):
            network = QNetwork(observation_space, action_space, args)
            network.body = nn.Sequential(
                nn.Flatten(), nn.Linear(math.prod(observation_space.shape), 512), nn.LayerNorm(512), nn.Tanh()
            )
            return network

        return make

    for script in (pqn_atari_envpool, pqn_atari_lstm):
        monkeypatch.setattr(script, "QNetwork", small(script.QNetwork))


@pytest.fixture
def curves():
    """The curves of the run in a folder: for each name the steps and values of its points."""

    def curves(folder):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}

    return curves
