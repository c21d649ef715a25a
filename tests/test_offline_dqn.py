"""offline_dqn.py: its instruments against slow, literal ones on tiny networks; copies that train together against ones
that train alone; its data, refusals, checkpoints and what play.py makes of them."""

import csv
import importlib
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import tiny_envs  # noqa: F401 (registers its environments)
import torch
import torch.nn as nn

import offline_dqn as script
import play

ROOT = Path(__file__).parents[1]
NORMS = ("none", "layer_norm", "batch_norm", "weight_norm")
SMALL = dict(num_transitions=60, gradient_steps=8, measure_interval=4, eval_interval=8, measure_batch=12, batch_size=16)
SMALL |= dict(hidden_sizes=(8,), learning_rate=(0.01, 0.001), num_seeds=2, num_eval_envs=1)
SPACES = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Discrete(4)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make(copies=2, n=6, seed=0, spaces=SPACES, **options):
    """A network in double precision, a batch for it, and its Args; no bias or statistic is left at its first value."""
    args = script.Args(hidden_sizes=options.pop("hidden_sizes", (5, 4)), **options)
    network = script.QNetwork(*spaces, args, copies).double()
    network.initialise([torch.Generator().manual_seed(seed + i) for i in range(copies)])
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)
    for p in network.lengths:
        p.data *= 1 + 0.5 * torch.rand(p.shape, generator=random, dtype=torch.float64)
    for name, x in network.named_buffers():
        if name.startswith(("mean", "variance")):
            x.copy_(draw(*x.shape).abs() + 0.1)
    actions = torch.randint(4, (copies, n), generator=random)
    terminated = (torch.arange(n) % 3 == 1).expand(copies, n)
    batch = draw(copies, n, 3), actions, draw(copies, n), draw(copies, n, 3), terminated
    return network.eval(), batch, args


def gradient(network, value):
    """The gradient of a value of copy k with respect to all parameters, of which only that copy's are not 0."""
    parts = torch.autograd.grad(value, list(network.parameters()), retain_graph=True)
    return torch.cat([x.flatten() for x in parts])


def literal_gradients(network, batch, gamma, k):
    """For each transition of copy k, one by one: Δ, ∇Q(s, a), ∇ max Q(s', ·) and the discount."""
    obs, actions, rewards, next_obs, terminated = batch
    found = []
    for i in range(obs.shape[1]):
        value = network(obs[:, i : i + 1])[k, 0, actions[k, i]]
        following = network(next_obs[:, i : i + 1])[k, 0].max()
        discount = 0.0 if terminated[k, i] else gamma
        delta = value - rewards[k, i] - discount * following
        found.append((delta.detach(), gradient(network, value), gradient(network, following), discount))
    return found


def cosine(x, y):
    return float(x @ y / (x.norm() * y.norm()))


# --------------------------------------------------------------------------------------------------- instruments


def gram_of(network, batch, gamma):
    errors, _, next_actions, discount = script.td_errors(network, batch, gamma)
    obs, actions = torch.cat([batch[0], batch[3]], 1), torch.cat([batch[1], next_actions], 1)
    return *script.gram_matrix(network, obs, actions), errors.detach(), discount, next_actions


@pytest.mark.parametrize("action_input", [False, True])
@pytest.mark.parametrize("norm_type", NORMS)
def test_the_gram_matrix_is_that_of_gradients_taken_one_by_one(norm_type, action_input):
    network, batch, args = make(norm_type=norm_type, action_input=action_input)
    gram, *_ = gram_of(network, batch, 0.9)
    for k in range(2):
        rows = literal_gradients(network, batch, 0.9, k)
        gradients = torch.stack([g for _, g, _, _ in rows] + [h for _, _, h, _ in rows])
        torch.testing.assert_close(gram[k], gradients @ gradients.T)


@pytest.mark.parametrize("norm_type", NORMS)
def test_interference_is_the_mean_over_pairs_of_what_the_paper_defines(norm_type):
    network, batch, args = make(norm_type=norm_type)
    gram, _, errors, discount, _ = gram_of(network, batch, 0.9)
    rates = torch.tensor([0.3, 0.02], dtype=torch.float64)
    found = script.interference(gram, errors, discount, rates)
    for k in range(2):
        rows = literal_gradients(network, batch, 0.9, k)
        semi = [delta * q for delta, q, _, _ in rows]
        full = [delta * (q - discount * following) for delta, q, following, discount in rows]
        pairs = [(i, j) for i in range(6) for j in range(6)]
        qgi = np.mean([abs(cosine(rows[i][1], rows[j][1])) for i, j in pairs if i != j])
        dots = {(i, j): float(semi[i] @ full[j]) for i, j in pairs}
        second = np.mean([dots[i, j] ** 2 / float(rows[j][0]) ** 2 for i, j in pairs])
        expected = {"qgi": qgi, "sgi": np.mean([cosine(semi[i], semi[j]) for i, j in pairs])}
        expected |= {"mgi": np.mean([cosine(semi[i], full[j]) for i, j in pairs]), "dgi": np.mean(list(dots.values()))}
        expected["gi2"] = 2 * float(rates[k]) * expected["dgi"] - float(rates[k]) ** 2 * second
        assert {name: float(x[k]) for name, x in found.items()} == pytest.approx(expected, rel=1e-9)


def test_gi2_is_the_mean_decrease_of_the_loss_for_a_linear_q():
    network, batch, args = make(copies=1, hidden_sizes=(), norm_type="none")
    gram, _, errors, discount, before = gram_of(network, batch, 0.9)
    rate = 1e-3  # so small that no greedy action changes
    gi2 = script.interference(gram, errors, discount, torch.tensor([rate], dtype=torch.float64))["gi2"]
    decreases = []
    for delta, q, _, _ in literal_gradients(network, batch, 0.9, 0):
        moved = make(copies=1, hidden_sizes=(), norm_type="none")[0]
        nn.utils.vector_to_parameters(
            nn.utils.parameters_to_vector(network.parameters()) - rate * delta * q, moved.parameters()
        )
        after, _, actions, _ = script.td_errors(moved, batch, 0.9)
        assert torch.equal(actions, before)
        decreases.append(float((errors.square() - after.detach().square()).mean()))
    assert float(gi2) == pytest.approx(np.mean(decreases), rel=1e-9)


def test_a_dead_network_interferes_with_nothing_and_has_no_isometry():
    network, batch, args = make(norm_type="none")
    for p in network.parameters():
        p.data.zero_()
    gram, features, errors, discount, _ = gram_of(network, batch, 0.9)
    gram.zero_()
    found = script.interference(gram, errors, discount, torch.ones(2, dtype=torch.float64))
    assert all(x.eq(0).all() for x in found.values())
    assert script.isometry(features, 2).eq(0).all()


@pytest.mark.parametrize("norm_type", NORMS)
def test_a_small_step_multiplies_the_td_errors_by_one_plus_eta_a(norm_type):
    network, batch, args = make(norm_type=norm_type)
    gram, _, errors, discount, before = gram_of(network, batch, 0.9)
    a = discount.unsqueeze(2) * gram[:, 6:, :6] - gram[:, :6, :6]
    changes = []
    for eta in (1e-5, 1e-6):
        moved, *_ = make(norm_type=norm_type)
        loss = 0.5 * script.td_errors(moved, batch, 0.9)[0].square().sum()
        for p, g in zip(moved.parameters(), torch.autograd.grad(loss, list(moved.parameters())), strict=True):
            p.data -= eta * g
        after, _, actions, _ = script.td_errors(moved, batch, 0.9)
        assert torch.equal(actions, before)
        linear = errors + eta * (a @ errors.unsqueeze(2)).squeeze(2)
        changes.append(float((after.detach() - linear).norm() / (after.detach() - errors).norm()))
    assert changes[0] < 1e-2 and changes[1] < 0.2 * changes[0]  # what is left is of second order


def test_seem_is_the_largest_real_part_and_nan_only_where_the_kernel_is_not_finite():
    network, batch, args = make(copies=3, norm_type="none")
    gram, _, errors, discount, _ = gram_of(network, batch, 0.9)
    gram[1, 2, 3] = torch.inf
    found = script.seem(gram, discount)
    for k in (0, 2):
        a = [[discount[k, i] * gram[k, 6 + i, j] - gram[k, i, j] for j in range(6)] for i in range(6)]
        assert float(found[k]) == pytest.approx(np.linalg.eigvals(np.array(a)).real.max())
    assert found[1].isnan()


def test_isometry_is_one_for_orthogonal_samples_of_one_length_and_follows_its_formula():
    eye = 3 * torch.eye(4, dtype=torch.float64).unsqueeze(0)
    assert float(script.isometry(eye, 2)) == pytest.approx(1)
    x = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = []
    for start in (0, 3):  # two sets of three; the seventh sample is left over
        g = x[1, start : start + 3] @ x[1, start : start + 3].T
        expected.append(float(torch.linalg.det(g)) ** (1 / 3) / (float(g.trace()) / 3))
    assert float(script.isometry(x, 3)[1]) == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("depth", [2, 3])
def test_the_crash_is_foreseen_exactly_where_errors_follow_the_law(depth):
    steps = torch.arange(100, 200, 10, dtype=torch.float64)
    crash = torch.tensor([605.0, 250.0])
    errors = (1 - steps[:, None] / crash) ** -(depth / (2 * depth - 2))
    assert script.predicted_crash(steps, errors, depth).tolist() == pytest.approx(crash.tolist())
    assert script.predicted_crash(steps, 1 / steps[:, None], depth).isinf().all()  # these errors fall


def test_the_report_foresees_the_crash_of_a_network_whose_first_layer_is_larger(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    offline = importlib.import_module("offline")
    steps = np.arange(100.0, 150, 5)
    assert offline.crash_of_unbalanced(steps, 1 / np.sinh(0.01 * (300 - steps))) == pytest.approx(300, abs=0.1)


def test_alignments_compare_with_the_measurement_before():
    network, batch, args = make(norm_type="none")
    rates = torch.ones(2, dtype=torch.float64)
    first, before = script.measure(network, batch, rates, args)
    assert first["kernel_alignment"].tolist() == pytest.approx([1, 1]) and first["policy_alignment"].eq(1).all()
    for p in network.parameters():
        p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    second, after = script.measure(network, batch, rates, args, before)
    for k in range(2):
        expected = (before[0][k] * after[0][k]).sum() / (before[0][k].norm() * after[0][k].norm())
        assert float(second["kernel_alignment"][k]) == pytest.approx(float(expected)) and expected < 0.999
        assert float(second["policy_alignment"][k]) == float((before[1][k] == after[1][k]).double().mean())


def test_measuring_changes_nothing_of_the_network():
    network, batch, args = make(norm_type="batch_norm")
    network.train()
    before = {name: x.clone() for name, x in network.state_dict().items()}
    script.measure(network, batch, torch.ones(2, dtype=torch.float64), args)
    assert network.training and all(torch.equal(x, before[name]) for name, x in network.state_dict().items())


# ------------------------------------------------------------------------------------------ network and learning


@pytest.mark.parametrize("norm_type", NORMS)
def test_each_copy_computes_what_pytorchs_own_layers_do(norm_type):
    network, batch, args = make(norm_type=norm_type)
    network.train()
    for k in range(2):
        layers, width = [], 3
        for i, size in enumerate((5, 4, 4)):
            linear = nn.Linear(width, size).double()
            linear.weight.data, linear.bias.data = network.weights[i].data[k], network.biases[i].data[k, 0]
            if norm_type == "weight_norm" and i < 2:
                linear = nn.utils.parametrizations.weight_norm(linear)
                linear.parametrizations.weight.original0.data = network.lengths[i].data[k]
            norm = nn.LayerNorm(size, elementwise_affine=False) if norm_type == "layer_norm" else nn.Identity()
            if norm_type == "batch_norm":
                norm = nn.BatchNorm1d(size, affine=False).double()
                norm.running_mean.copy_(getattr(network, f"mean_{i}", torch.zeros(2, 1, size))[k, 0])
                norm.running_var.copy_(getattr(network, f"variance_{i}", torch.ones(2, 1, size))[k, 0])
            layers += [linear, norm, nn.ReLU()] if i < 2 else [linear]
            width = size
        reference, own = nn.Sequential(*layers), network
        torch.testing.assert_close(own(batch[0])[k], reference(batch[0][k]))
        if norm_type == "batch_norm":  # its running statistics move alike
            network, *_ = make(norm_type=norm_type)
            network.train()(batch[0])
            torch.testing.assert_close(network.variance_1[k, 0], reference[4].running_var)
            network, *_ = make(norm_type=norm_type)
            network.train()


def test_given_actions_have_the_values_that_all_actions_have():
    for action_input in (False, True):
        network, batch, _ = make(action_input=action_input)
        expected = network(batch[0]).gather(2, batch[1].unsqueeze(2)).squeeze(2)
        torch.testing.assert_close(network(batch[0], batch[1]), expected)


def test_a_step_follows_the_semi_gradient_and_a_terminated_transition_does_not_bootstrap():
    network, batch, args = make(copies=1, norm_type="none")
    rows = literal_gradients(network, batch, 0.9, 0)
    assert batch[4].any() and not batch[4].all()
    expected = nn.utils.parameters_to_vector(network.parameters()).detach()
    expected = expected - 0.1 * sum(delta * q for delta, q, _, _ in rows) / 6
    optimizer = script.Optimizer(network, torch.tensor([0.1]), args)
    largest = script.train_step(network, optimizer, batch, 0.9)
    torch.testing.assert_close(nn.utils.parameters_to_vector(network.parameters()).detach(), expected)
    values = make(copies=1, norm_type="none")[0](batch[0], batch[1])
    assert float(largest) == pytest.approx(float(values.detach().abs().max()))


@pytest.mark.parametrize("name, reference", [("sgd", torch.optim.SGD), ("adam", torch.optim.AdamW)])
def test_the_optimizer_is_pytorchs_with_a_rate_for_each_copy(name, reference):
    rates, decay = (0.1, 0.003), 0.2
    network, batch, args = make(optimizer=name, weight_decay=decay)
    optimizer = script.Optimizer(network, torch.tensor(rates, dtype=torch.float64), args)
    alone = [make()[0] for _ in rates]
    others = [reference(x.parameters(), lr=rate, weight_decay=decay) for x, rate in zip(alone, rates, strict=True)]
    for step in range(5):
        shifted = [batch[0] + step, *batch[1:]]
        script.train_step(network, optimizer, shifted, 0.9)
        for x, other in zip(alone, others, strict=True):
            other.zero_grad()
            (0.5 * script.td_errors(x, shifted, 0.9)[0].square().mean(1).sum()).backward()
            other.step()
    for k, x in enumerate(alone):
        for own, theirs in zip(network.parameters(), x.parameters(), strict=True):
            torch.testing.assert_close(own[k], theirs[k])


def test_weights_are_clamped_and_a_copy_that_is_not_finite_touches_no_other():
    network, batch, args = make(copies=3, norm_type="layer_norm", clamp=2.0)
    alone, *_ = make(copies=3, norm_type="layer_norm", clamp=2.0)
    rates = torch.tensor([0.1, 0.1, 1e9], dtype=torch.float64)
    optimizers = [script.Optimizer(x, rates, args) for x in (network, alone)]
    network.weights[0].data[1] = torch.nan
    for _ in range(3):
        for x, optimizer in zip((network, alone), optimizers, strict=True):
            script.train_step(x, optimizer, batch, 0.9)
    assert optimizers[0].weights[1].isnan().any()
    assert torch.equal(optimizers[0].weights[[0, 2]], optimizers[1].weights[[0, 2]])
    assert float(optimizers[0].weights[2].abs().max()) == 2


def test_dropout_is_for_training_alone_and_keeps_the_mean():
    network, batch, _ = make(dropout=0.5, hidden_sizes=(2000,), norm_type="none")
    still = network(batch[0])
    assert torch.equal(still, network(batch[0]))
    network.train()
    moving = torch.stack([network(batch[0]) for _ in range(400)])
    assert (moving[0] - moving[1]).abs().min() > 0
    torch.testing.assert_close(moving.mean(0), still, atol=0.1, rtol=0)


# ----------------------------------------------------------------------------------------------------------- data


def test_no_phantom_is_in_the_data_and_a_time_limit_is_no_termination():
    args = script.Args(env_id="tiny_envs:TimeLimited-v0", num_transitions=200)
    obs, actions, rewards, next_obs, terminated, truncated = script.collect(args, gym.spaces.Discrete(2), 1)
    assert len(obs) == 200 and (rewards == 1).all()  # a phantom pays nothing
    assert ((next_obs - obs) % 6 == 1).all()
    assert not terminated.any() and (truncated == (next_obs == 5)).all() and truncated.any()
    ends = script.collect(replace(args, env_id="tiny_envs:Terminating-v0"), gym.spaces.Discrete(2), 1)
    assert (ends[4] == (ends[3] == 5)).all() and not ends[5].any()


@pytest.mark.parametrize("env_id", ["MountainCar-v0", "Pendulum-v1"])
def test_uniform_states_cover_the_space_and_lead_where_the_environment_leads(env_id):
    args = script.Args(env_id=env_id, num_transitions=2000, uniform_states=True)
    action_space = script.spaces(script.make_envs(args, 1, (1,)))[1]
    obs, actions, rewards, next_obs, terminated, _ = script.collect(args, action_space, 1)
    velocity, bound = obs[:, -1], {"MountainCar-v0": 0.07, "Pendulum-v1": 8.0}[env_id]
    assert np.histogram(velocity, 4, (-bound, bound))[0].min() > 400
    table = script.action_table(action_space, args)
    if env_id == "MountainCar-v0":
        moved = np.clip(velocity + (table[actions] - 1) * 0.001 - 0.0025 * np.cos(3 * obs[:, 0]), -0.07, 0.07)
        at_the_wall = np.clip(obs[:, 0] + moved, -1.2, 0.6) <= -1.2
        assert terminated.any() and (rewards == -1).all()
        moved[at_the_wall & (moved < 0)] = 0
    else:
        assert table.flatten().tolist() == [-2, 0, 2]
        moved = np.clip(velocity + (15 * obs[:, 1] + 3 * table[actions].squeeze(1)) * 0.05, -8, 8)
        np.testing.assert_allclose(obs[:, 0] ** 2 + obs[:, 1] ** 2, 1, atol=1e-6)
    np.testing.assert_allclose(next_obs[:, -1], moved, atol=1e-5)


def test_a_box_of_actions_is_cut_evenly_and_combined():
    space = gym.spaces.Box(np.array([-1, 0], np.float32), np.array([1, 4], np.float32))
    table = script.action_table(space, script.Args(values_per_action=3))
    assert sorted(table.tolist()) == [[x, y] for x in (-1, 0, 1) for y in (0, 2, 4)]
    assert script.action_table(gym.spaces.Discrete(3, start=7), script.Args()).tolist() == [7, 8, 9]


def test_seeds_have_their_own_data_and_minibatches_and_learning_rates_of_a_seed_share_them():
    args = script.Args(**SMALL)
    _, _, data = script.make_data(replace(args, seed=5), "cpu")
    alone = script.make_data(replace(args, seed=6, num_seeds=1), "cpu")[2]
    assert all(x.shape[:2] == (2, 60) and torch.equal(x[1:], y) for x, y in zip(data, alone, strict=True))
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    obs, *_ = next(script.minibatches(data, generators, args, 1))
    assert obs.shape == (4, 16, 4) and torch.equal(obs[:2], obs[2:])
    for i, seed in enumerate((5, 6)):
        drawn = torch.randint(60, (1, 16), generator=torch.Generator().manual_seed(seed))[0]
        assert torch.equal(obs[i], data[0][i, drawn]) and torch.equal(obs[2 + i], data[0][i, drawn])


def test_the_toy_task_is_one_walk_in_eight_directions_shown_to_the_network():
    args = script.Args(env_id="toy", num_transitions=500, num_seeds=1)
    observation_space, action_space, data = script.make_data(args, "cpu")
    obs, actions, rewards, next_obs, terminated, truncated = (x[0] for x in data)
    network = script.QNetwork(observation_space, action_space, args)
    directions = {tuple(x) for x in (10 * network.described).round().int().tolist()}
    assert len(directions) == 8 and network.described.norm(dim=1).tolist() == pytest.approx([1] * 8)
    noise = next_obs - obs - 0.1 * network.described[actions]
    assert -1e-5 < noise.min() < 0.001 and 0.019 < noise.max() < 0.02001  # the walk drifts to the upper right
    assert torch.equal(next_obs[:-1], obs[1:]) and 0 <= obs[0].min() and obs[0].max() <= 1
    assert not rewards.any() and not terminated.any() and not truncated.any()


# ------------------------------------------------------------------------------------------------------ whole runs


def train(**options):
    """The folder of a run, its checkpoint and, for each row of its measures.csv, a dictionary."""
    args = script.Args(**SMALL | options)
    before = set(Path("runs").glob("*"))
    script.main(args)
    (folder,) = set(Path("runs").glob("*")) - before or {Path(args.resume)}
    with open(folder / "measures.csv", newline="") as file:
        return folder, torch.load(folder / "checkpoint.pt", weights_only=True), list(csv.DictReader(file))


@pytest.mark.parametrize("norm_type", NORMS)
def test_copies_that_train_together_are_those_that_train_alone(norm_type):
    _, together, rows = train(norm_type=norm_type)
    for i, (rate, seed) in enumerate([(0.01, 1), (0.01, 2), (0.001, 1), (0.001, 2)]):
        _, alone, own = train(norm_type=norm_type, learning_rate=(rate,), num_seeds=1, seed=seed)
        for name, x in alone["copies"].items():
            torch.testing.assert_close(together["copies"][name][i], x[0], rtol=1e-5, atol=1e-6)
        mine = [row for row in rows if (float(row["learning_rate"]), float(row["seed"])) == (rate, seed)]
        for name, least in ("loss", 1e-6), ("gi2", 1e-6), ("seem", 1e-6), ("norm", 1e-6), ("iso", 1e-4):
            # Six samples of so few features depend on one another: an isometry near 0 is rounding
            assert [float(r[name]) for r in mine] == pytest.approx([float(r[name]) for r in own], rel=1e-3, abs=least)


@pytest.mark.parametrize("options", [{"dropout": 0.3, "optimizer": "adam"}, {"norm_type": "batch_norm"}], ids=str)
def test_a_resumed_run_makes_the_same_bits_as_one_that_was_never_stopped(options):
    _, whole, rows = train(**options)
    folder, *_ = train(**options, gradient_steps=4)
    _, resumed, again = train(**options, resume=str(folder))
    assert all(torch.equal(x, resumed["copies"][name]) for name, x in whole["copies"].items())
    assert {**rows[-1], "return": ""} == {**again[-1], "return": ""} and len(rows) == len(again)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_after_the_next_measurement_and_resume_goes_on(signum, heeded_signals, monkeypatch):
    _, whole, _ = train()
    step, calls = script.train_step, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signum)
        return step(*args)

    monkeypatch.setattr(script, "train_step", interrupted)
    before = set(Path("runs").glob("*"))
    with pytest.raises(SystemExit) as exit:
        train()
    assert exit.value.code == 128 + signum and len(calls) == 4
    (folder,) = set(Path("runs").glob("*")) - before
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 4
    _, resumed, _ = train(resume=str(folder))
    assert all(torch.equal(x, resumed["copies"][name]) for name, x in whole["copies"].items())


def test_an_error_while_training_ends_in_one_line_that_tells_how_to_go_on(monkeypatch, capsys):
    def failing(*args):
        raise OSError("no space left")

    monkeypatch.setattr(script.Run, "log", failing)
    with pytest.raises(SystemExit) as exit:
        train()
    assert exit.value.code == 1 and capsys.readouterr().err == "error: no space left\n"


def test_a_full_disk_keeps_the_last_whole_checkpoint_and_measures(monkeypatch, capsys):
    def full(file):
        raise OSError("no space left")

    folder, *_ = train(gradient_steps=4)
    whole = {path: path.read_bytes() for path in (folder / "checkpoint.pt", folder / "measures.csv")}
    monkeypatch.setattr(script.os, "fsync", full)
    with pytest.raises(SystemExit) as exit:
        train(resume=str(folder))
    advice = f"--resume {folder} goes on from its last checkpoint"
    assert exit.value.code == 1 and capsys.readouterr().err == f"error: no space left; {advice}\n"
    assert all(path.read_bytes() == content for path, content in whole.items()) and not list(folder.glob("*.tmp"))


def test_measurements_stay_evenly_spaced_when_a_run_goes_on(capsys):
    folder, *_ = train(gradient_steps=4)
    with pytest.raises(SystemExit) as exit:
        train(resume=str(folder), gradient_steps=9, eval_interval=3, measure_interval=3)
    assert exit.value.code == 2 and "--measure-interval 3 does not divide the 4" in capsys.readouterr().err


def test_a_resumed_run_that_is_stopped_before_its_first_step_says_so(heeded_signals, monkeypatch, capsys):
    folder, *_ = train(gradient_steps=4)
    monkeypatch.setattr(script, "measure", lambda *args: os.kill(os.getpid(), signal.SIGTERM) or ({}, None))
    with pytest.raises(SystemExit) as exit:
        train(resume=str(folder))
    assert exit.value.code == 128 + signal.SIGTERM and "stopped at step 4" in capsys.readouterr().out


def test_same_seed_same_bits_and_another_seed_others():
    runs = [train(seed=seed)[1]["copies"] for seed in (1, 1, 3)]
    assert all(torch.equal(x, runs[1][name]) for name, x in runs[0].items())
    assert not torch.equal(runs[0]["weights.0"], runs[2]["weights.0"])


def test_a_divergence_is_dated_by_the_step_whose_minibatch_showed_it():
    _, _, rows = train(learning_rate=(1e5, 1e-4), norm_type="none", num_seeds=1, limit=1e3)
    at = {float(r["learning_rate"]): float(r["diverged_at"]) for r in rows[-2:]}
    assert at == {1e5: 2, 1e-4: -1}  # the first step moves the weights, the second one sees it


def test_play_plays_the_copy_with_the_best_last_return(capsys):
    folder, checkpoint, rows = train()
    best = max(rows[-4:], key=lambda row: float(row["return"]))
    i = rows[-4:].index(best)
    assert all(torch.equal(x[0], checkpoint["copies"][name][i]) for name, x in checkpoint["network"].items())
    assert checkpoint["eval_returns"][-1] == float(best["return"])
    returns = play.main(play.Args(run_folder=str(folder), episodes=3))
    assert len(returns) == 3 and (returns >= 8).all()


def test_the_toy_task_ends_with_its_measures_and_play_says_that_nothing_can_be_played(capsys):
    folder, *_ = train(env_id="toy")
    assert "play.py" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit:
        play.main(play.Args(run_folder=str(folder)))
    line = capsys.readouterr().err
    assert exit.value.code == 2 and line.count("\n") == 1 and "no environment to play" in line


def test_evaluation_reports_the_return_of_each_copys_own_first_episodes():
    args = script.Args(env_id="tiny_envs:Terminating-v0", num_eval_envs=3, hidden_sizes=(4,))
    network = script.QNetwork(gym.spaces.Discrete(6), gym.spaces.Discrete(2), args, copies=2)
    assert script.evaluate(network, args, 0, torch.device("cpu")).tolist() == [5, 5]
    endless = replace(args, env_id="tiny_envs:BadReward-v0", max_eval_steps=20)
    assert script.evaluate(network, endless, 0, torch.device("cpu")).tolist() == [20, 20]


def test_only_the_first_episode_of_each_environment_counts():
    args = script.Args(num_eval_envs=6, hidden_sizes=())
    network = script.QNetwork(gym.spaces.Box(-9, 9, (4,)), gym.spaces.Discrete(2), args, copies=2)
    network.weights[0].data[1, 1, 2:] = 1  # the second copy pushes to where the pole falls; the first one always left
    envs = script.make_envs(args, 12, (args.seed, 7, 3))
    obs, lengths, over = envs.reset()[0], np.zeros(12), np.zeros(12, dtype=bool)
    while not over.all():
        with torch.no_grad():
            values = network(torch.from_numpy(obs).view(2, 6, 4)).view(12, 2)
        obs, _, terminated, truncated, _ = envs.step(values.argmax(1).numpy())
        lengths += ~over
        over |= terminated | truncated
    assert lengths.max() > lengths.min() + 10  # the quick ones play on
    found = script.evaluate(network, args, 7, torch.device("cpu"))
    assert found.tolist() == pytest.approx(lengths.reshape(2, 6).mean(1).tolist())


def save_dataset(path="data.npz", **changes):
    random = np.random.default_rng(0)
    arrays = {"observations": random.normal(size=(40, 4)), "actions": random.integers(2, size=40)}
    arrays |= {"rewards": random.normal(size=40), "next_observations": random.normal(size=(40, 4))}
    arrays |= {"terminated": random.random(40) < 0.2, "truncated": random.random(40) < 0.2} | changes
    np.savez(path, **{name: x for name, x in arrays.items() if x is not None})
    return arrays


def test_a_users_data_set_is_what_every_seed_trains_on():
    arrays = save_dataset()
    _, _, data = script.make_data(script.Args(dataset="data.npz", num_seeds=2), "cpu")
    for x, name in zip(data, arrays, strict=True):
        np.testing.assert_allclose(x.numpy(), np.stack([arrays[name]] * 2), rtol=1e-6)
    _, checkpoint, _ = train(dataset="data.npz")
    assert checkpoint["step"] == 8


@pytest.fixture
def save_minari(tmp_path, monkeypatch):
    """Makes a Minari data set `tiny-v0` of two episodes, of 3 steps and of 2, in which observation t is t."""
    pytest.importorskip("h5py")
    minari = pytest.importorskip("minari")
    (tmp_path / "minari").mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    from minari.data_collector import EpisodeBuffer

    def save(action_space, observation_space=None, observe=lambda times: [np.full(4, t, np.float32) for t in times]):
        parts = []
        for first, T in (0, 3), (10, 2):
            flags = [t == T - 1 for t in range(T)]
            parts.append(
                EpisodeBuffer(
                    observations=observe(range(first, first + T + 1)),
                    actions=[action_space.sample() * 0 + getattr(action_space, "start", 0) + t % 2 for t in range(T)],
                    rewards=[0.5 * t for t in range(T)],
                    terminations=[first == 0 and flag for flag in flags],
                    truncations=[first == 10 and flag for flag in flags],
                )
            )
        spaces = {"action_space": action_space, "observation_space": observation_space or gym.spaces.Box(-99, 99, (4,))}
        with warnings.catch_warnings(action="ignore"):  # it would like to know the author
            minari.create_dataset_from_buffers("tiny-v0", parts, data_format="hdf5", **spaces)

    return save


def test_no_transition_of_a_minari_data_set_leads_over_the_end_of_an_episode(save_minari):
    save_minari(gym.spaces.Discrete(2, start=5))
    args = script.Args(minari="tiny-v0", num_seeds=2, num_transitions=7)
    obs, actions, rewards, next_obs, terminated, truncated = (x[1].tolist() for x in script.make_data(args, "cpu")[2])
    assert obs == [[t] * 4 for t in (0, 1, 2, 10, 11)] and next_obs == [[t] * 4 for t in (1, 2, 3, 11, 12)]
    assert actions == [0, 1, 0, 0, 1] and rewards == [0, 0.5, 1, 0, 0.5]
    assert terminated == [False, False, True, False, False] and truncated == [False] * 4 + [True]
    assert train(minari="tiny-v0")[1]["step"] == 8


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def refusal(monkeypatch, capsys):
    """The one line in which the script refuses its command line, with exit code 2 and nothing new on the disk."""

    def refusal(*options):
        capsys.readouterr()
        before = set(Path().rglob("*"))
        monkeypatch.setattr(sys, "argv", ["offline_dqn.py", *map(str, options)])
        with pytest.raises(SystemExit) as exit:
            script.main(script.parse_args())
        output = capsys.readouterr()
        assert exit.value.code == 2 and output.err.startswith("error: ") and output.err.count("\n") == 1
        assert output.out == "" and set(Path().rglob("*")) == before
        return output.err

    return refusal


@pytest.mark.parametrize(
    "options, named",
    [
        ("--learning-rate 0.1 0", "--learning-rate"),
        ("--learning-rate nan", "--learning-rate"),
        ("--gamma 1.5", "--gamma"),
        ("--dropout 1", "--dropout"),
        ("--measure-batch 1", "--measure-batch"),
        ("--values-per-action 1", "--values-per-action"),
        ("--hidden-sizes 8 0", "--hidden-sizes"),
        ("--measure-interval 300", "--measure-interval"),
        ("--uniform-states", "--uniform-states"),
        ("--env-id MountainCar-v0 --uniform-states --dataset x.npz", "each say where"),
        ("--norm-type batch_norm --batch-size 1", "batch norm"),
        ("--env-id Nothing-v0", "Nothing"),
        ("--env-id tiny_envs:SameStep-v0", "NEXT_STEP"),
        ("--env-id tiny_envs:Scalar-v0 --device nowhere", "nowhere"),
        ("--env-id HalfCheetah-v5 --values-per-action 10", "10,000"),
        ("--resume nothing", "nothing"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, named, refusal):
    assert named in refusal(*options.split())


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rewards": None}, "rewards is not a file"),
        ({"rewards": np.zeros(39)}, "rewards"),
        ({"observations": np.zeros((40, 3))}, "observations"),
        ({"next_observations": np.full((40, 4), np.nan)}, "next_observations"),
        ({"actions": np.full(40, 2)}, "actions"),
        ({"actions": np.full(40, 0.5)}, "actions"),
        ({"actions": np.zeros(0)}, "observations"),
        ({"terminated": np.array(["no"] * 40)}, "terminated"),
        ({"truncated": np.full(40, 0.5)}, "truncated must be whole numbers from 0 to 1"),
        ({"rewards": np.full(40, 1e300)}, "rewards has values that are not finite"),
    ],
    ids="missing length width nan range fraction empty words half large".split(),
)
def test_a_bad_data_set_is_refused_by_name(changes, words, refusal):
    save_dataset(**changes)
    assert words in (line := refusal("--dataset", "data.npz")) and "data.npz" in line


@pytest.mark.parametrize("values", [6, -1, 0.5])
def test_discrete_observations_are_states_of_the_environment(values, refusal):
    save_dataset(observations=np.full(40, values), next_observations=np.zeros(40), actions=np.zeros(40))
    assert "observations must be whole numbers from 0 to 5" in refusal(
        "--env-id", "tiny_envs:Terminating-v0", "--dataset", "data.npz"
    )


def test_a_minari_data_set_that_does_not_fit_is_refused_by_name(save_minari, refusal):
    assert "--minari none-v0" in refusal("--minari", "none-v0")
    save_minari(gym.spaces.Box(-1, 1, (1,)))
    assert "Discrete ones are needed" in refusal("--minari", "tiny-v0")
    assert "leave one out" in refusal("--minari", "tiny-v0", "--dataset", "data.npz")


def test_a_minari_data_set_of_dictionaries_is_refused_by_name(save_minari, refusal):
    save_minari(gym.spaces.Discrete(2), gym.spaces.Dict(x=gym.spaces.Discrete(99)), lambda times: {"x": list(times)})
    assert "Box or Discrete ones are needed" in refusal("--minari", "tiny-v0")


def test_without_the_package_the_line_says_how_to_install_it(monkeypatch, refusal):
    monkeypatch.setitem(sys.modules, "minari", None)
    assert 'pip install "minari[hdf5]"' in refusal("--minari", "tiny-v0")


def test_a_file_that_is_no_data_set_is_refused(refusal):
    Path("data.npz").write_text("no")
    assert "data.npz" in refusal("--dataset", "data.npz")
    assert "missing.npz" in refusal("--dataset", "missing.npz")


def test_a_checkpoint_that_does_not_fit_or_is_over_is_refused(refusal):
    folder, *_ = train()
    assert "adds none" in refusal("--resume", folder)
    assert "not of Acrobot-v1" in refusal("--resume", folder, "--env-id", "Acrobot-v1")
    assert "another network" in refusal("--resume", folder, "--hidden-sizes", "9", "--gradient-steps", "12")
    (folder / "checkpoint.pt").write_bytes(b"x")
    assert "broken" in refusal("--resume", folder)


def test_the_command_runs_in_a_process_of_its_own_and_is_played():
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = "--env-id CartPole-v1 --num-transitions 200 --gradient-steps 20 --measure-interval 10 --eval-interval 20"
    words = [sys.executable, ROOT / "offline_dqn.py", *command.split(), "--learning-rate", "0.01", "--num-seeds", "2"]
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "learning rate 0.01, seed 2: last return" in done.stdout and "play.py runs/" in done.stdout
