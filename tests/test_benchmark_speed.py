"""benchmark/batch_values.py, faults.py, half_pools.py, precision_error.py, running_input.py and speed.py."""

import copy
import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from bench_examples import colours, in_an_empty_folder  # noqa: F401

import batch_values  # isort: skip
import faults  # isort: skip
import half_pools  # isort: skip
import precision_error  # isort: skip
import running_input  # isort: skip
import pqn  # isort: skip
import speed  # isort: skip

plt.rcParams["savefig.dpi"] = 60


def test_only_training_episodes_are_cut_short_and_each_variant_has_its_faults_alone():
    args = replace(pqn.Args(), num_envs=4, num_eval_envs=3, num_steps=40, hidden_sizes=(8,))
    make_envs = faults.cut_short(pqn.make_envs, 7)
    for variant in ("right", "phantoms", "truncation", "both"):
        envs = make_envs(args, 7, (1, 0))
        torch.manual_seed(0)
        collector = pqn.Collector(envs, pqn.QNetwork(*pqn.spaces(envs), args), args, torch.device("cpu"))
        collect = faults.with_faults(pqn.Collector.collect, variant)
        (_, _, _, rewards, terminated, truncated, real), finished, finished_eval = collect(collector, 0.1)
        assert {length for _, _, length in finished} == {7} and {i for i, _, _ in finished} == {0, 1, 2, 3}
        assert min(length for _, _, length in finished_eval) > 7 and {i for i, _, _ in finished_eval} <= {4, 5, 6}
        assert truncated[6].all() and truncated.sum() == 20
        assert torch.equal(terminated, truncated if variant in ("truncation", "both") else truncated & False)
        phantoms = (rewards == 0) if variant in ("right", "truncation") else (rewards == 9)
        assert torch.equal(real, ~phantoms)


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
    monkeypatch.setattr(speed, "cores_in_use", lambda: 1.5)
    monkeypatch.setattr(sys, "argv", ["speed.py", "--script", *cost, "--num-envs", "4"])
    speed.main()
    out = capsys.readouterr().out
    assert "pqn_atari_lstm.py takes 2.25 times the wall time per step of pqn.py" in out and "1.50 times" in out
    assert "Careful: other processes keep 1.5 cores busy" in out


@pytest.mark.parametrize("name", ["preqn", "pqn_vdn", "play", "no_such_script"])
def test_speed_refuses_a_script_that_it_cannot_measure_before_anything_runs(name, monkeypatch, capsys):
    monkeypatch.setattr(speed, "cores_in_use", lambda: 1 / 0)
    monkeypatch.setattr(speed.importlib, "import_module", lambda name: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["speed.py", "--script", "pqn", name])
    with pytest.raises(SystemExit) as exit:
        speed.main()
    message = capsys.readouterr().err
    assert exit.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    assert name in message and "pqn_atari_lstm" in message


def test_only_seconds_of_work_on_our_own_cores_count_as_busy(monkeypatch):
    monkeypatch.setattr(speed.os, "sysconf", lambda _: 100)
    stat = "cpu 9 9 9 9 9 9 9 9 9 9\ncpu0 1 2 4 1000 2000 8 16 32 0 0\ncpu1 100 0 0 5 0 0 0 0 0 0\ncpu12 7 0 0 5 5\n"
    assert speed.busy_seconds(stat, {0}) == 0.63 and speed.busy_seconds(stat, {0, 1}) == 1.63
    assert speed.busy_seconds(stat, {12, 1}) == 1.07


def test_the_ceiling_steps_the_greedy_environments_too(monkeypatch):
    stepped = []
    script = SimpleNamespace(
        make_envs=lambda args, num_envs, seed: stepped.append(num_envs) or SimpleNamespace(reset=lambda: None),
        spaces=lambda envs: (None, SimpleNamespace(n=2)),
        step_envs=lambda envs, actions: stepped.append(len(actions)),
    )
    args = SimpleNamespace(num_envs=5, num_eval_envs=3, num_steps=2, seed=1)
    assert len(speed.ceiling(script, args, 6)) == 6 - speed.WARM_UP and stepped == [8] * 13


SWEEP = (
    "--num-steps 4 --num-minibatches 2 --num-eval-envs 0 --hidden-sizes 8 --rollouts 6 --out out --sweep num_envs 2 8"
)


def sweep(monkeypatch, *options, busy=0.0):
    monkeypatch.setattr(speed, "cores_in_use", lambda: busy)
    monkeypatch.setattr(sys, "argv", ["speed.py", *SWEEP.split(), *options])
    speed.main()


def test_a_sweep_leaves_a_csv_whose_plot_can_be_drawn_again(monkeypatch, capsys):
    chosen = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    sweep(monkeypatch)
    assert chosen == 2 * [speed.THREADS, 1, 1]  # main() runs twice for each value
    assert capsys.readouterr().out.count("| whole script |") == 2
    plot = Path("out/pqn__num_envs.png")
    drawn = plot.read_bytes()
    plot.unlink()
    monkeypatch.setattr(sys, "argv", ["speed.py", "--plot", "out/pqn__num_envs.csv"])
    speed.main()
    assert plot.read_bytes() == drawn
    table = Path("out/pqn__num_envs.csv")  # what was measured may lie on one another: speeds far apart show every line
    about, header, *rows = table.read_text().splitlines()
    for i, row in enumerate(rows):
        num_envs, part, *_, share = row.split(",")
        rows[i] = f"{num_envs},{part},{2 ** (i % 6)},{2 ** (i % 6)},{2 ** (i % 6)},{share}"
    table.write_text("\n".join([about, header, *rows, ""]))
    speed.main()
    assert min(colours(plot, right=0.6)[:6]) > 1e-4


def test_a_sweep_that_is_interrupted_keeps_what_it_measured(monkeypatch):
    parts = {"learning": (2.0, 1.0, 4.0), "the rest": (1.0, 1.0, 1.0)}
    result = {"seconds": parts, "batch": 8, "flops": 3, "gradient_step": [1.0], "peak": 6.0}
    monkeypatch.setattr(speed, "measure", mock.Mock(side_effect=[result, KeyboardInterrupt]))
    for name in ("show", "machine"):
        monkeypatch.setattr(speed, name, lambda *_: "")
    with pytest.raises(KeyboardInterrupt):
        sweep(monkeypatch)
    about, *rows = Path("out/pqn__num_envs.csv").read_text().splitlines()
    header = "num_envs,part,steps_per_second,low,high,share_of_matmul_peak"
    assert about.startswith("# pqn.py") and rows == [header, "2,learning,4,2,8,0.5000"]


def test_a_sweep_replaces_nothing_and_is_not_made_on_a_busy_machine_unless_forced(monkeypatch, capsys):
    measured = []
    monkeypatch.setattr(speed, "measure", lambda script, options, _: measured.append(options) or {})
    for name in ("show", "machine", "sweep_rows", "plot_sweep"):
        monkeypatch.setattr(speed, name, lambda *_: [])
    Path("out").mkdir()
    there = Path("out/pqn__num_envs.csv")
    there.write_text("precious")
    for busy, removed, hint in ((0, False, f"{there} is there already"), (0.5, True, "0.5 cores busy")):
        if removed:
            there.unlink()
        with pytest.raises(SystemExit) as exit:
            sweep(monkeypatch, busy=busy)
        message = capsys.readouterr().err
        assert exit.value.code == 2 and message.count("\n") == 1 and hint in message and not measured
        assert removed or there.read_text() == "precious"
    there.write_text("precious")
    sweep(monkeypatch, "--force", busy=0.5)
    assert len(measured) == 2 and there.read_text() != "precious"


def test_running_statistics_of_the_input_make_no_observation_depend_on_the_others():
    args = replace(pqn.Args(), normalize_input=True, hidden_sizes=(8,))
    space, actions = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32), gym.spaces.Discrete(2)
    network, reference = running_input.QNetwork(space, actions, args), pqn.QNetwork(space, actions, args)
    layer, obs = network.body[0], 5 + 2 * torch.randn(100, 3)
    few = network(obs[:2])
    torch.testing.assert_close(layer.running_mean, 5e-4 * obs[:2].mean(0))
    torch.testing.assert_close(few, network.eval()(obs)[:2])  # as when acting, whatever else is in the minibatch
    network.train()
    for _ in range(9_000):
        layer(obs)
    torch.testing.assert_close(layer.running_mean, obs.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(layer(obs), (obs - obs.mean(0)) / obs.std(0), atol=0.1, rtol=0)
    reference.load_state_dict(network.state_dict())  # play.py plays it as pqn.py's
    torch.testing.assert_close(reference.eval()(obs), network.eval()(obs))


def test_lambda_returns_stand_on_the_values_of_acting_or_on_those_of_learning(monkeypatch, tmp_path):
    args = replace(pqn.Args(), num_envs=4, num_eval_envs=1, num_steps=6, num_minibatches=1, hidden_sizes=(8,))
    args = replace(args, norm_type="batch_norm", normalize_input=True)
    rollouts = {}
    monkeypatch.setattr(batch_values.Collector, "path", tmp_path / "values.csv")
    for statistics in ("pqn.py", "running", "batch"):
        monkeypatch.setattr(batch_values.Collector, "statistics", statistics)
        envs = pqn.make_envs(args, 5, (1, 0))
        torch.manual_seed(1)
        network = pqn.QNetwork(*pqn.spaces(envs), args)
        network(5 + torch.randn(50, 4))  # so that the running statistics are none of these states'
        collector = (pqn if statistics == "pqn.py" else batch_values).Collector(
            envs, network.eval(), args, torch.device("cpu")
        )
        before = copy.deepcopy(network.state_dict())
        rollouts[statistics] = [collector.collect(0.5)[0] for _ in range(3)][-1]
        for name, tensor in network.state_dict().items():
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
        envs.close()
    for mine, reference in zip(rollouts["running"], rollouts["pqn.py"], strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=0)
    obs, values = rollouts["batch"][0], rollouts["batch"][2]
    states = torch.cat([obs.flatten(0, 1), collector.obs[:4]])
    torch.testing.assert_close(values, network.train()(states).max(1).values.view(7, 4))  # one group: all states
    _, line = (tmp_path / "values.csv").read_text().splitlines()
    step, *about = line.split(",")
    means = (
        rollouts["running"][2].mean(),
        rollouts["running"][2].abs().max(),
        values.mean(),
        values.abs().max(),
    )  # they act alike
    assert step == "72" and about[:4] == [f"{x:.4g}" for x in means]
    normalised = (states - before["body.0.running_mean"]) / (before["body.0.running_var"] + 1e-5).sqrt()
    assert about[4] == f"{normalised.abs().max():.4g}"


def test_half_pools_step_every_environment_as_often_in_each_way_and_one_half_while_the_other_acts(capsys, monkeypatch):
    log = []

    class Half(half_pools.Half):
        def __init__(self, script, network, args, num_envs, seed):
            super().__init__(script, network, args, num_envs, seed)
            self.size = num_envs

        def act(self, script):
            log.append(("act", self.size))
            super().act(script)

        def send(self):
            log.append(("send", self.size))
            super().send()

        def receive(self):
            super().receive()
            log.append(("receive", self.size))

    monkeypatch.setattr(half_pools, "Half", Half)
    monkeypatch.setattr(half_pools, "cores_in_use", lambda: 0.0)
    options = "--script pqn --rollouts 1 --num-envs 6 --num-eval-envs 2 --num-steps 3".split()
    monkeypatch.setattr(sys, "argv", ["half_pools.py", *options])
    half_pools.main()
    out = capsys.readouterr().out
    assert [out.count(way) for way in ("all at once", "two halves in turn", "while the other acts")] == [1, 1, 1]
    rollout = len(log) // 2  # of the three ways, one after the other
    whole, turn, overlap = log[:9], log[9:27], log[27:rollout]
    assert (
        whole == [("act", 8), ("send", 8), ("receive", 8)] * 3 and turn == [("act", 4), ("send", 4), ("receive", 4)] * 6
    )
    again = "send receive act receive send act"
    assert [what for what, _ in overlap] == f"act send act receive send act {again} {again} receive".split()
    assert log[rollout:] == log[:rollout]


def test_the_error_of_bf16_is_told_from_what_differs_anyway(train, monkeypatch, capsys):
    script = precision_error.script
    args = replace(script.Args(), env_id="Pong-v5", num_envs=4, num_steps=8, num_eval_envs=2, num_minibatches=4)
    folder, _ = train(replace(args, total_timesteps=64, precision="fp32"))
    monkeypatch.setattr(precision_error, "ROLLOUTS", 2)
    errors = "error", "other action", "Q lost there", "weights", "biases"
    same = precision_error.measure(folder, ("fp32", "fp32"))
    assert [same[name] for name in errors] == [0] * 5 and same["gap"] > 0 and same["Q, σ"] > 0
    rounded = precision_error.measure(folder)
    assert 0 < rounded["error"] < 0.02 and 0 < rounded["weights"] < 0.5

    forward = script.QNetwork.forward

    def in_bf16(change):
        same = lambda self, q: q
        changed = lambda self, obs: (change if self.dtype == torch.bfloat16 else same)(self, forward(self, obs))
        monkeypatch.setattr(script.QNetwork, "forward", changed)
        return precision_error.measure(folder)

    shifted = in_bf16(lambda _, q: q + 1)
    assert shifted["error"] == pytest.approx(1, abs=0.02) and shifted["other action"] < 0.2
    assert shifted["weights"] > 10 * rounded["weights"] and shifted["biases"] > 10 * rounded["biases"]
    biased = in_bf16(lambda self, q: q + 20 * (self.head.bias - self.head.bias.detach()))  # only in its gradient
    assert biased["biases"] > 10 * rounded["biases"]
    assert biased["weights"] == pytest.approx(rounded["weights"], rel=1e-3)
    turned = in_bf16(lambda _, q: -q)
    assert turned["other action"] == 1 and turned["Q lost there"] > turned["gap"]

    capsys.readouterr()
    precision_error.main([str(folder), str(folder)])
    header, line, *runs = capsys.readouterr().out.splitlines()
    assert len(runs) == 2 and {row.count("|") for row in (header, line, *runs)} == {10}
    for wrong in ([], ["--help"]):
        with pytest.raises(SystemExit) as error:
            precision_error.main(wrong)
        assert error.value.code == 2
