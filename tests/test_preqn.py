"""preqn.py: the kernel and the step against one backward pass per sample, the least-squares problem, the line search,
what enters the replay buffer and what its updates bootstrap from, resuming, refusals, and runs as a whole."""

import csv
import math
import os
import signal
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import play
import preqn

ROOT = Path(__file__).parents[1]
SMALL = dict(num_envs=2, num_steps=5, num_eval_envs=1, total_timesteps=60, start_steps=20, learning_starts=16)
SMALL |= dict(minibatch_size=16, hidden_sizes=(8, 8), buffer_size=1000)


class Counting(gym.Env):
    """Shows the episode and the step in it, pays the step, and ends after `end` steps, if that is given. Its actions
    lie between bounds that differ, and are kept."""

    observation_space = gym.spaces.Box(-9, 9, (1, 2))
    action_space = gym.spaces.Box(np.float32([[-2, 1, 5]]), np.float32([[2, 1.5, 6]]))
    actions = []

    def __init__(self, end=None):
        self.end, self.episode = end, -1

    def show(self):
        return np.float32([[self.episode, self.step_number]])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_number = self.episode + 1, 0
        return self.show(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.actions.append(action)
        self.step_number += 1
        return self.show(), float(self.step_number), self.step_number == self.end, False, {}


class Failing(Counting):
    def step(self, action):
        if self.episode == 3:
            raise RuntimeError("level7.map")
        return super().step(action)


class Unbounded(Counting):
    action_space = gym.spaces.Box(-np.inf, 1, (2,))


class Integers(Counting):
    action_space = gym.spaces.Box(0, 5, (2,), np.int32)


class NoFinite(Counting):
    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, math.nan if self.episode == 3 else reward, *rest


gym.register("Cut-v0", entry_point=Counting, max_episode_steps=4)
gym.register("Ending-v0", entry_point=Counting, kwargs={"end": 4})
gym.register("BothEnds-v0", entry_point=Counting, kwargs={"end": 4}, max_episode_steps=4)
gym.register("FailingPush-v0", entry_point=Failing, max_episode_steps=4)
gym.register("Unbounded-v0", entry_point=Unbounded)
gym.register("Integers-v0", entry_point=Integers)
gym.register("NoFinite-v0", entry_point=NoFinite, max_episode_steps=4)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arguments(**options):
    return preqn.Args(**dict(env_id="Cut-v0") | SMALL | options)


def network_for(args, seed=0):
    torch.manual_seed(seed)
    network = preqn.QNetwork(Counting.observation_space, Counting.action_space, args).double()
    with torch.no_grad():  # biases too, which are 0 at first
        for weights in network.parameters():
            weights.add_(0.3 * torch.randn_like(weights))
    return network


def random_minibatch(n=16, seed=1, twice=False):
    random = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=random)
    batch = [normal(n, 1, 2), normal(n, 3).tanh(), normal(n), normal(n, 1, 2), torch.rand(n, generator=random) < 0.4]
    if twice:
        batch = [torch.cat([x, x[: n // 2]]) for x in batch]
    return batch


def gradients_one_by_one(critic, pairs):
    """Φ: a column for each pair, of its own backward pass by all weights."""
    columns = []
    for pair in pairs:
        gradients = torch.autograd.grad(critic(pair[None]).squeeze(), list(critic.parameters()))
        columns.append(torch.cat([x.flatten() for x in gradients]))
    return torch.stack(columns, 1)


ARCHITECTURES = [("sin", False, (8, 8)), ("relu", False, (16,)), ("tanh", True, (8, 7, 6)), ("relu", True, (8, 8))]


# ------------------------------------------------------------------------------------------- the kernel and the step


@pytest.mark.parametrize("activation, layer_norm, hidden_sizes", ARCHITECTURES)
def test_kernel_and_step_are_those_of_one_backward_pass_per_sample(activation, layer_norm, hidden_sizes):
    args = arguments(activation=activation, layer_norm=layer_norm, hidden_sizes=hidden_sizes)
    critic, (obs, actions, z, *_) = network_for(args).critics[0], random_minibatch()
    pairs = torch.cat([obs.flatten(1), actions], 1)
    q_values, gradients = preqn.q_gradients(critic, obs, actions)
    phi = gradients_one_by_one(critic, pairs)
    assert torch.allclose(q_values, critic(pairs).squeeze(1))
    assert torch.allclose(preqn.kernel(gradients), phi.T @ phi, rtol=1e-9)
    step = torch.cat([x.flatten() for x in preqn.weighted_sum(gradients, z)])
    assert torch.allclose(step, phi @ z, rtol=1e-9)
    shapes = [x.shape for x in preqn.weighted_sum(gradients, z)]
    assert shapes == [w.shape for w in critic.parameters()]


@pytest.mark.parametrize("layer_norm", [False, True])
def test_layer_norm_comes_before_the_activation_and_weights_start_as_said(layer_norm):
    args = arguments(layer_norm=layer_norm, hidden_sizes=(300, 200))
    torch.manual_seed(0)
    mlp, x = preqn.MLP(4, 2, args), torch.randn(6, 4)
    expected = x
    for i, layer in enumerate(mlp.layers):
        bound = math.sqrt(6 / sum(layer.weight.shape))
        assert 0.9 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()
        expected = expected @ layer.weight.T
        if i < 2 and layer_norm:
            expected = (expected - expected.mean(1, keepdim=True)) / expected.std(1, keepdim=True, unbiased=False)
        expected = expected.sin() if i < 2 else expected
    assert torch.allclose(mlp(x), expected, atol=2e-3)  # the norm divides by √(σ² + 1e-5)


def test_no_gradients_of_single_samples_are_stored(monkeypatch):
    args = arguments(hidden_sizes=(64, 64))
    network, passes, grad = network_for(args), [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *x, **names: passes.append(x) or grad(*x, **names))
    _, gradients = preqn.q_gradients(network.critics[0], *random_minibatch(n=32)[:2])
    assert len(passes) == 1
    assert sum(x.numel() for pair in gradients for x in pair) == 32 * (5 + 64 + 64 + 64 + 64 + 1)


@pytest.mark.parametrize("hidden_sizes, twice", [((32, 32), False), ((32, 32), True), ((2,), False), ((2,), True)])
def test_the_step_is_the_natural_gradient_also_where_the_batch_is_rank_deficient(hidden_sizes, twice):
    """Lemma 4: Φ (ΦᵀΦ)† Δ = (ΦΦᵀ)† Φ Δ. A network with 2 hidden units has fewer weights than the batch has pairs."""
    args = arguments(hidden_sizes=hidden_sizes, activation="tanh")
    critic, (obs, actions, errors, *_) = network_for(args).critics[0], random_minibatch(twice=twice)
    _, gradients = preqn.q_gradients(critic, obs, actions)
    phi = gradients_one_by_one(critic, torch.cat([obs.flatten(1), actions], 1))
    rank = min(phi.shape[0], 16)
    assert torch.linalg.matrix_rank(phi) == rank and (rank < phi.shape[1]) == (twice or hidden_sizes == (2,))
    if twice:
        errors = errors + 0.1 * torch.arange(len(errors))  # the same pair with two errors: K Z = Δ has no solution
    z = preqn.least_squares(preqn.kernel(gradients), errors, 1e-12)
    step = torch.cat([x.flatten() for x in preqn.weighted_sum(gradients, z)])
    natural = torch.linalg.pinv(phi @ phi.T, rtol=1e-12, hermitian=True) @ phi @ errors
    assert torch.allclose(step, natural, rtol=1e-5, atol=1e-8)
    assert torch.allclose(
        phi.T @ step, phi.T @ torch.linalg.lstsq(phi.T, errors[:, None], driver="gelsd").solution[:, 0]
    )


def test_of_all_solutions_the_shortest_is_taken_and_small_eigenvalues_count_as_none():
    vectors = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    K = vectors @ torch.diag(torch.tensor([4.0, 1.0, 0.1, 1e-3, 0.0]).double()) @ vectors.T
    errors = vectors.sum(1)
    for cutoff, inverse in ((1e-6, [0.25, 1, 10, 1000, 0]), (1e-3, [0.25, 1, 10, 0, 0]), (0.2, [0.25, 1, 0, 0, 0])):
        expected = vectors @ torch.tensor(inverse, dtype=torch.float64)
        assert torch.allclose(preqn.least_squares(K, errors, cutoff), expected, rtol=1e-6)


def test_the_step_of_float32_on_a_batch_with_a_pair_drawn_twice_is_that_of_float64():
    args = arguments(hidden_sizes=(64, 64))
    critic, batch, steps = network_for(args).critics[0], random_minibatch(n=64, twice=True), []
    for dtype in torch.float32, torch.float64:
        obs, actions, errors = (x.to(dtype) for x in batch[:3])
        _, gradients = preqn.q_gradients(critic.to(dtype), obs, actions)
        z = preqn.least_squares(preqn.kernel(gradients), errors, args.cutoff)
        steps.append(torch.cat([x.flatten().double() for x in preqn.weighted_sum(gradients, z)]))
    assert torch.cosine_similarity(*steps, dim=0) > 0.9999


def test_a_kernel_that_is_not_finite_is_an_error_of_its_own():
    with pytest.raises(FloatingPointError, match="not finite"):
        preqn.least_squares(torch.full((3, 3), math.nan), torch.zeros(3), 1e-5)


def test_row_ratio_condition_and_rank_are_as_the_paper_defines_them():
    K = torch.tensor([[4.0, -2.0, 0.0], [-2.0, 4.0, 0.0], [0.0, 0.0, 1e-9]], dtype=torch.float64)
    facts = preqn.describe(K, arguments(cutoff=1e-5))
    assert facts["row_ratio"] == pytest.approx((2 / 4 + 2 / 4 + 0) / 3 / 3)
    assert facts["diagonal"] == pytest.approx(8 / 3) and facts["rank"] == 2
    assert facts["log10_condition"] == pytest.approx(7)  # no more is told
    assert preqn.describe(K[:2, :2], arguments())["log10_condition"] == pytest.approx(math.log10(6 / 2))


# ------------------------------------------------------------------------------------------------------ line search


def searched(cosine_of, **options):
    """A line search over one weight that starts at 1 and is to be moved by 1; the cosine depends on where it is."""
    critic = torch.nn.Linear(1, 1, bias=False)
    critic.weight.data.fill_(1.0)
    to_cosine = lambda c: torch.tensor([c, math.sqrt(1 - c * c)])  # its cosine with (1, 0)
    change = lambda: to_cosine(cosine_of(critic.weight.item() - 1))
    args = arguments(critic_step=0.8, alignment=0.9, **options)
    result = preqn.line_search(critic, [torch.ones(1, 1)], change, torch.tensor([1.0, 0.0]), args)
    return *result, critic.weight.item()


@pytest.mark.parametrize("limit, halvings", [(1.0, 0), (0.5, 1), (0.11, 3)])
def test_the_longest_step_that_is_aligned_is_taken(limit, halvings):
    cosines, accepted, weight = searched(lambda step: 0.95 if step <= limit else 0.5)
    assert accepted and cosines == pytest.approx([0.5] * halvings + [0.95])
    assert weight == pytest.approx(1 + 0.8 / 2**halvings)


@pytest.mark.parametrize("max_halvings", [0, 3])
def test_where_no_step_is_aligned_the_weights_are_left_as_they_were(max_halvings):
    cosines, accepted, weight = searched(lambda step: 0.89, max_halvings=max_halvings)
    assert not accepted and weight == 1.0 and cosines == pytest.approx([0.89] * (max_halvings + 1))


def test_an_alignment_that_is_not_a_number_is_none():
    assert searched(lambda step: math.nan, max_halvings=2)[1:] == (False, 1.0)


@pytest.mark.parametrize("size, alignment, rejected", [(1e-4, 0.97, 0), (30.0, 1.0, 1)])
def test_an_update_reports_what_it_did_to_q(size, alignment, rejected):
    args = arguments(critic_step=size, alignment=alignment, max_halvings=0, hidden_sizes=(64, 64), cutoff=1e-7)
    network, minibatch = network_for(args), random_minibatch()
    optimizer = torch.optim.Adam(network.actor.parameters(), 1e-3)
    obs, actions, rewards, next_obs, terminated = minibatch
    before, weights = network.value(obs, actions), [w.clone() for w in network.critics.parameters()]
    errors = rewards + 0.99 * ~terminated * network.value(next_obs, network.action(next_obs)) - before
    metrics = preqn.preqn_update(network, optimizer, minibatch, args, 0)
    change = network.value(obs, actions) - before
    assert metrics["rejected"] == rejected
    if rejected:
        assert "alignment" not in metrics and metrics["proposed_alignment"] < 1
        assert all(torch.equal(w, old) for w, old in zip(network.critics.parameters(), weights, strict=True))
    else:  # to first order, every Q on the minibatch makes this share of the way to its target (Eq. 20)
        assert torch.allclose(change, size * errors, rtol=0.02, atol=0.02 * size)
        assert metrics["alignment"] == pytest.approx(torch.cosine_similarity(change, errors, dim=0).item(), abs=1e-6)
    assert metrics["td_loss"] == pytest.approx(0.5 * errors.square().mean().item())
    assert metrics["rank"] == 16


# ----------------------------------------------------------------------------------------------------- whole updates


def literal_targets(network, minibatch, gamma):
    """r + γ (1 − d) Q(s′, μ(s′)), one transition after the other."""
    targets = []
    for _, _, reward, next_obs, terminated in zip(*minibatch, strict=True):
        bootstrap = network.value(next_obs[None], network.action(next_obs[None])).item()
        targets.append(reward.item() + (0.0 if terminated else gamma * bootstrap))
    return torch.tensor(targets, dtype=torch.float64)


@pytest.mark.parametrize("activation, layer_norm", [("sin", False), ("relu", True)])
def test_updates_are_those_of_a_literal_algorithm_1(activation, layer_norm):
    args = arguments(
        activation=activation, layer_norm=layer_norm, critic_step=0.8, alignment=0.99, cutoff=1e-9, gamma=0.9
    )
    args = replace(args, max_halvings=60)
    network, expected = network_for(args), network_for(args)
    optimizer = torch.optim.Adam(network.actor.parameters(), 1e-2)
    moments, halvings = [(torch.zeros_like(w), torch.zeros_like(w)) for w in expected.actor.parameters()], []
    for t in range(1, 6):
        minibatch = random_minibatch(n=24, seed=t)
        metrics = preqn.preqn_update(network, optimizer, minibatch, args, number=t)

        obs, actions = minibatch[:2]
        pairs, critic = torch.cat([obs.flatten(1), actions], 1), expected.critics[0]
        before = critic(pairs).detach().squeeze(1)
        errors = literal_targets(expected, minibatch, 0.9) - before
        phi = gradients_one_by_one(critic, pairs)
        z = np.linalg.pinv((phi.T @ phi).numpy(), rcond=1e-9, hermitian=True) @ errors.numpy()
        start = torch.nn.utils.parameters_to_vector(critic.parameters()).detach()
        size = 0.8
        while True:
            torch.nn.utils.vector_to_parameters(start + size * (phi @ torch.from_numpy(z)), critic.parameters())
            cosine = torch.cosine_similarity(critic(pairs).detach().squeeze(1) - before, errors, dim=0).item()
            if cosine >= 0.99:
                break
            size /= 2
        halvings.append(round(math.log2(0.8 / size)))
        assert metrics["halvings"] == halvings[-1] and metrics["alignment"] == pytest.approx(cosine, abs=1e-6)
        value = sum(expected.value(s[None], expected.action(s[None])).squeeze() for s in obs) / len(obs)
        gradients = torch.autograd.grad(value, list(expected.actor.parameters()))
        for w, g, (mean, square) in zip(expected.actor.parameters(), gradients, moments, strict=True):
            mean.mul_(0.9).add_(0.1 * g)
            square.mul_(0.999).add_(0.001 * g * g)
            w.data += 1e-2 * (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)  # upwards
    assert max(halvings) > 0
    for w, theirs in zip(network.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(w, theirs, rtol=1e-5, atol=1e-7)


def test_td3_learns_as_published_with_the_smaller_of_two_slow_q():
    args = arguments(critic="td3", target_decay=0.9, gamma=0.9)
    network, expected = network_for(args), network_for(args)
    with torch.no_grad():
        for w in [*network.target.parameters(), *expected.target.parameters()]:
            w.mul_(1.1)
    parts = lambda network: [*network.critics.parameters(), *network.actor.parameters()]
    optimizer, theirs = (torch.optim.Adam(parts(x), 1e-2) for x in (network, expected))
    for number in range(4):
        obs, actions, rewards, next_obs, terminated = minibatch = random_minibatch(n=24, seed=number)
        torch.manual_seed(number)
        metrics = preqn.td3_update(network, optimizer, minibatch, args, number)

        torch.manual_seed(number)
        noise, targets = 0.2 * torch.randn(24, 3), []
        for i in range(24):
            action = (expected.target.action(next_obs[i : i + 1]) + noise[i].clamp(-0.5, 0.5)).clamp(-1, 1)
            smaller = min(expected.target.value(next_obs[i : i + 1], action, k).item() for k in (0, 1))
            targets.append(rewards[i].item() + (0.0 if terminated[i] else 0.9 * smaller))
        targets = torch.tensor(targets, dtype=torch.float64)
        before = expected.value(obs, actions).detach()
        theirs.zero_grad()
        sum((expected.value(obs, actions, k) - targets).square().mean() for k in (0, 1)).backward(
            inputs=list(expected.critics.parameters())
        )
        theirs.step()
        change = expected.value(obs, actions).detach() - before
        alignment = torch.cosine_similarity(change, targets - before, dim=0).item()
        assert metrics["alignment"].item() == pytest.approx(alignment, abs=1e-5)
        if number % 2:
            theirs.zero_grad()
            (-expected.value(obs, expected.action(obs)).mean()).backward(inputs=list(expected.actor.parameters()))
            theirs.step()
            with torch.no_grad():
                for slow, w in zip(expected.target.parameters(), parts(expected), strict=True):
                    slow.mul_(0.9).add_(0.1 * w)
        for w, other in zip(network.parameters(), expected.parameters(), strict=True):
            assert torch.allclose(w, other, rtol=1e-5, atol=1e-7), number


# --------------------------------------------------------------------------------- environments and the replay buffer


def collected(env_id, rollouts=2, epsilon=1.0, num_steps=7, **options):
    args = arguments(env_id=env_id, num_envs=2, num_steps=num_steps, **options)
    torch.manual_seed(0)
    Counting.actions.clear()
    envs = preqn.make_envs(args, 3, (1,))
    network = preqn.QNetwork(*preqn.spaces(envs), args)
    collector = preqn.Collector(envs, network, args, torch.device("cpu"))
    return [collector.collect(epsilon) for _ in range(rollouts)], network


@pytest.mark.parametrize("env_id, terminal", [("Cut-v0", False), ("Ending-v0", True), ("BothEnds-v0", True)])
def test_phantoms_never_enter_and_only_a_termination_is_terminal(env_id, terminal):
    rollouts, _ = collected(env_id)
    (obs, _, rewards, next_obs, terminated) = (torch.cat(x) for x in zip(*(r[0] for r in rollouts), strict=True))
    assert len(obs) == 2 * 12  # 14 steps of 2 environments, of which the 5th and the 10th are phantoms
    (episode, step), (next_episode, next_step) = obs[:, 0].T, next_obs[:, 0].T
    assert torch.equal(episode, next_episode) and torch.equal(next_step, step + 1) and torch.equal(rewards, next_step)
    assert torch.equal(terminated, (next_step == 4) & terminal)
    episode = lambda i: (i, 10.0, 4)
    assert rollouts[0][1:] == ([episode(0), episode(1)], [episode(2)])
    assert rollouts[1][1:] == ([episode(0), episode(1)] * 2, [episode(2)] * 2)


def test_a_phantom_stays_out_where_it_is_the_first_step_of_a_rollout():
    rollouts, _ = collected("Cut-v0", rollouts=3, num_steps=4)
    assert [len(r[0][0]) for r in rollouts] == [2 * 4, 2 * 3, 2 * 3]
    obs, _, rewards, *_ = (torch.cat(x) for x in zip(*(r[0] for r in rollouts), strict=True))
    assert torch.equal(obs[:, 0, 1] + 1, rewards)


@pytest.mark.parametrize("env_id, bootstraps", [("Cut-v0", True), ("Ending-v0", False), ("BothEnds-v0", False)])
@pytest.mark.parametrize("critic", ["preqn", "td3"])
def test_a_truncation_bootstraps_and_a_termination_does_not(env_id, bootstraps, critic):
    args = arguments(critic=critic, gamma=0.5)
    rollouts, _ = collected(env_id)
    last = [x[rollouts[0][0][2] == 4] for x in rollouts[0][0]]  # the transitions that end an episode
    minibatch = [x.double() if x.is_floating_point() else x for x in last]
    network = network_for(args)
    with torch.no_grad():  # Q is 10 everywhere, up to little
        for part in [network, *([network.target] if critic == "td3" else [])]:
            for mlp in part.critics:
                mlp.layers[-1].weight.mul_(1e-6)
                mlp.layers[-1].bias.fill_(10.0)
    optimizer = torch.optim.Adam(network.parameters(), 1e-9)
    update = preqn.td3_update if critic == "td3" else preqn.preqn_update
    metrics = update(network, optimizer, minibatch, args, 0)
    error = 4 + 0.5 * 10 * bootstraps - 10
    assert float(metrics["td_loss"]) == pytest.approx(0.5 * error**2, rel=1e-3)


def test_actions_fill_the_environment_s_bounds_and_the_buffer_keeps_them_between_minus_1_and_1():
    rollouts, _ = collected("Cut-v0", rollouts=20)
    taken, stored = np.concatenate(Counting.actions), torch.cat([r[0][1] for r in rollouts])
    assert np.allclose(taken.min(0), [-2, 1, 5], atol=0.1) and np.allclose(taken.max(0), [2, 1.5, 6], atol=0.1)
    assert stored.min() < -0.97 and stored.max() > 0.97 and abs(stored.mean()) < 0.1 and stored.abs().max() <= 1


def test_training_actions_have_noise_and_those_beside_have_none():
    rollouts, network = collected("Cut-v0", rollouts=60, epsilon=0.0, action_noise=0.1)
    obs, actions = (torch.cat([r[0][i] for r in rollouts]) for i in range(2))
    noise = actions - network.action(obs).detach()
    inside = network.action(obs).detach().abs() < 0.6
    assert 0.09 < noise[inside].std() < 0.11 and actions.abs().max() <= 1
    plain = network.action(torch.tensor([[[1.0, 0.0]]])).detach().numpy()  # its first reset was for the seed
    low, high = Counting.action_space.low, Counting.action_space.high
    assert np.allclose(Counting.actions[2], low + (plain + 1) / 2 * (high - low), atol=1e-6)  # the third environment


def test_the_buffer_keeps_the_last_transitions_and_draws_from_those_that_are_there():
    buffer = preqn.ReplayBuffer(10, Counting.observation_space, Counting.action_space, torch.device("cpu"))
    for start in range(0, 28, 4):
        i = torch.arange(start, start + 4).float()
        buffer.add(
            [i.view(4, 1, 1).expand(4, 1, 2), i.view(4, 1).expand(4, 3), i, i.view(4, 1, 1).expand(4, 1, 2) + 1, i > 9]
        )
        there = range(max(0, start + 4 - 10), start + 4)
        assert len(buffer) == len(there)
        obs, actions, rewards, next_obs, terminated = buffer.sample(500)
        assert set(rewards.tolist()) == set(there)
        assert torch.equal(obs[:, 0, 1], rewards) and torch.equal(actions[:, 2], rewards)
        assert torch.equal(next_obs[:, 0, 0], rewards + 1) and torch.equal(terminated, rewards > 9)


# -------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("critic", ["preqn", "td3"])
def test_the_same_seed_gives_the_same_bits_and_another_one_does_not(critic, train):
    (_, one), (_, same), (_, other) = (train(arguments(critic=critic, seed=seed)) for seed in (3, 3, 4))
    assert all(torch.equal(w, same["network"][name]) for name, w in one["network"].items())
    assert not all(torch.equal(w, other["network"][name]) for name, w in one["network"].items())


@pytest.mark.parametrize("num_steps", [1, 3, 4])
def test_the_actor_of_td3_moves_at_every_second_update_however_long_a_rollout_is(num_steps, train, monkeypatch):
    moved, update = [], preqn.td3_update

    def look(network, *rest):
        before = deepcopy(network.actor)
        metrics = update(network, *rest)
        pairs = zip(before.parameters(), network.actor.parameters(), strict=True)
        moved.append(not all(torch.equal(*pair) for pair in pairs))
        return metrics

    monkeypatch.setattr(preqn, "td3_update", look)
    folder, saved = train(arguments(critic="td3", num_envs=1, num_steps=num_steps, total_timesteps=39))
    train(replace(preqn.Args(**saved["args"]), resume=str(folder), total_timesteps=60))
    assert len(moved) > 30 and all(one != other for one, other in zip(moved, moved[1:], strict=False))


@pytest.mark.parametrize("critic", ["preqn", "td3"])
def test_a_resumed_run_starts_from_exactly_what_was_saved(critic, train, monkeypatch):
    folder, saved = train(arguments(critic=critic))
    seen, update = [], getattr(preqn, f"{critic}_update")

    def look(network, optimizer, *rest):
        seen.append(deepcopy((network.state_dict(), optimizer.state_dict())))
        return update(network, optimizer, *rest)

    random_states, collect = [], preqn.Collector.collect
    watched = lambda *x: random_states.append(torch.get_rng_state()) or collect(*x)
    monkeypatch.setattr(preqn.Collector, "collect", watched)
    monkeypatch.setattr(preqn, f"{critic}_update", look)
    args = replace(preqn.Args(**saved["args"]), resume=str(folder), total_timesteps=80, learning_rate=0.5)
    _, checkpoint = train(args)
    network, optimizer = seen[0]
    assert torch.equal(random_states[0], saved["rng_state"])
    assert all(torch.equal(network[name], w) for name, w in saved["network"].items())
    for i, state in saved["optimizer"]["state"].items():
        assert all(torch.equal(optimizer["state"][i][name], x) for name, x in state.items())
    assert optimizer["param_groups"][0]["lr"] == 0.5  # options of the command line stand
    kept = [[x[: saved["buffer"]["added"]] for x in c["buffer"]["data"]] for c in (saved, checkpoint)]
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))
    assert checkpoint["buffer"]["added"] == len(checkpoint["buffer"]["data"][0]) > saved["buffer"]["added"] > 40
    assert checkpoint["step"] == 80


def test_without_a_saved_buffer_learning_waits_until_there_is_enough_again(train, monkeypatch):
    folder, saved = train(arguments(save_buffer=False))
    assert saved["buffer"] is None
    lengths, update = [], preqn.preqn_update
    monkeypatch.setattr(preqn, "preqn_update", lambda *x: lengths.append(1) or update(*x))
    train(replace(preqn.Args(**saved["args"]), resume=str(folder), total_timesteps=70))
    assert len(lengths) == 0  # 10 steps, of which 2 are phantoms: 8 transitions
    train(replace(preqn.Args(**saved["args"]), resume=str(folder), total_timesteps=100))
    assert len(lengths) == 20  # from the second rollout on


def test_a_run_is_random_first_and_makes_an_update_for_every_step_once_it_learns(train, monkeypatch, curves):
    epsilons, updates, collect, update = [], [], preqn.Collector.collect, preqn.preqn_update
    monkeypatch.setattr(preqn.Collector, "collect", lambda c, epsilon: epsilons.append(epsilon) or collect(c, epsilon))
    monkeypatch.setattr(preqn, "preqn_update", lambda *x: updates.append(x[-1]) or update(*x))
    folder, _ = train(arguments(log_interval=20))
    assert epsilons == [1, 1, 0, 0, 0, 0]  # --start-steps 20, 10 steps a rollout
    # of 20 steps at most 18 are transitions, so the third rollout is the first one to be learned from
    assert updates in ([*range(20, 60)], [*range(10, 60)])
    names = "td_loss q_values rejected proposed_alignment halvings alignment diagonal row_ratio log10_condition rank"
    expected = {f"losses/{name}" for name in names.split()} | {"charts/SPS"}
    expected |= {f"{group}/episodic_{kind}" for group in ("charts", "eval") for kind in ("return", "length")}
    logged = curves(folder)
    assert set(logged) == expected and [step for step, _ in logged["charts/SPS"]] == [20, 40, 60]


def test_the_defaults_are_those_of_appendix_b():
    args = preqn.Args()
    names = "gamma minibatch_size hidden_sizes learning_rate critic_step num_envs num_steps learning_starts start_steps"
    names += " alignment action_noise target_decay activation critic layer_norm"
    values = [0.99, 256, (256, 256), 1e-3, 0.1, 1, 50, 5000, 5000, 0.97, 0.1, 0.995, "sin", "preqn", False]
    assert [getattr(args, name) for name in names.split()] == values


def test_it_learns_the_value_of_being_paid_one(train):
    """γ = 0.5 and pay of 1 a step: Q is 2 where only time limits end episodes."""

    class Pays(Counting):
        def step(self, action):
            obs, _, *rest = super().step(action)
            return obs * 0, 1.0, *rest

    gym.register("Pays-v0", entry_point=Pays, max_episode_steps=4)
    try:
        _, checkpoint = train(arguments(env_id="Pays-v0", gamma=0.5, total_timesteps=400))
    finally:
        del gym.registry["Pays-v0"]
    network = preqn.QNetwork(Counting.observation_space, Counting.action_space, arguments())
    network.load_state_dict(checkpoint["network"])
    obs = torch.zeros(1, 1, 2)
    assert network.value(obs, network.action(obs)).item() == pytest.approx(2, abs=0.1)


def test_a_saved_agent_is_played_without_noise(train):
    folder, _ = train(arguments(env_id="Pendulum-v1", learning_starts=40))
    assert len(play.main(play.Args(str(folder), episodes=3))) == 3


def test_the_analysis_leaves_a_figure_and_rows_of_every_architecture(in_an_empty_folder, monkeypatch):
    args = arguments(env_id="Ending-v0", analyse="there/kernels")
    preqn.analyse(args, torch.device("cpu"), samples=12, networks=2)
    rows = list(csv.DictReader(open("there/kernels.csv")))
    assert len(rows) == 3 * 2 * 7 * 2 and Path("there/kernels.png").stat().st_size > 10_000
    assert {(row["layers"], row["width"]) for row in rows} == {
        *((("2", w)) for w in ("32", "64", "128", "256")),
        *(((n, "64")) for n in ("1", "3", "4")),
    }
    taken = np.concatenate(Counting.actions[-12:])
    assert np.isin(taken, np.stack([Counting.action_space.low, Counting.action_space.high])).all()


def test_an_analysis_that_is_interrupted_leaves_the_old_rows(in_an_empty_folder, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    Path("kernels.csv").write_text("old")
    monkeypatch.setattr(preqn, "describe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        preqn.analyse(arguments(env_id="Ending-v0", analyse="kernels"), torch.device("cpu"), samples=12, networks=2)
    assert Path("kernels.csv").read_text() == "old"


# ------------------------------------------------------------------------------------------- refusals and interruptions


@pytest.fixture
def refusal(in_an_empty_folder, monkeypatch, capsys):
    def refusal(*options):
        capsys.readouterr()
        before = set(Path().rglob("*"))
        monkeypatch.setattr(sys, "argv", ["preqn.py", *map(str, options)])
        with pytest.raises(SystemExit) as exit:
            preqn.main(preqn.parse_args())
        output = capsys.readouterr()
        assert exit.value.code == 2 and output.err.startswith("error: ") and output.err.count("\n") == 1
        assert output.out == "" and set(Path().rglob("*")) == before
        return output.err

    return refusal


BAD = [
    ("--env-id CartPole-v1", "pqn.py takes Discrete"),
    ("--env-id Pong-v5", "pqn.py takes Discrete"),
    ("--env-id HalfCheetah-v4x", "cannot make"),
    ("--env-id Unbounded-v0", "bounded real"),
    ("--env-id Integers-v0 --total-timesteps 50", "bounded real"),
    ("--alignment 1.5", "--alignment"),
    ("--alignment nan", "--alignment"),
    ("--critic-step 0", "--critic-step"),
    ("--critic-step nan", "--critic-step"),
    ("--cutoff 0", "--cutoff"),
    ("--cutoff 1", "--cutoff"),
    ("--max-halvings=-1", "--max-halvings"),
    ("--action-noise=-0.1", "--action-noise"),
    ("--gamma 1.01", "--gamma"),
    ("--minibatch-size 0", "--minibatch-size"),
    ("--buffer-size 100", "--buffer-size"),
    ("--buffer-size 1e16", "no memory for --buffer-size"),
    ("--learning-starts 0", "--learning-starts"),
    ("--hidden-sizes 0", "--hidden-sizes"),
    ("--total-timesteps 49", "no rollout of 50 steps"),
    ("--device nonsense", "--device"),
    ("--resume nowhere", "no checkpoint"),
    ("--analyse=", "--analyse"),
    ("--analyse /proc/nowhere/x --env-id Pendulum-v1", "cannot write"),
]


@pytest.mark.parametrize("options, hint", BAD)
def test_bad_options_get_one_line_and_exit_code_2_before_anything_is_written(options, hint, refusal):
    assert hint in refusal(*options.split())


def test_a_checkpoint_of_another_task_critic_buffer_or_network_is_refused(train, refusal):
    folder, saved = train(arguments())
    resume = lambda *options: refusal("--resume", folder, "--total-timesteps", 80, *options)
    assert "--env-id Cut-v0" in resume("--env-id", "Ending-v0")
    assert "--critic preqn" in resume("--critic", "td3")
    assert "--buffer-size 1000" in resume("--buffer-size", 2000)
    assert "another network" in resume("--hidden-sizes", 9)
    for name in ("buffer", "optimizer", "network", "rng_state", "step"):
        torch.save(saved | {name: "nonsense"}, folder / "checkpoint.pt")
        assert "version" in resume()
        torch.save({k: v for k, v in saved.items() if k != name}, folder / "checkpoint.pt")
        assert f"'{name}'" in resume()


def test_what_it_shares_with_pqn_is_the_same_text(what_a_script_consists_of):
    ours, theirs = what_a_script_consists_of("preqn.py"), what_a_script_consists_of("pqn.py")
    same = {name for name in set(ours) & set(theirs) if ours[name] == theirs[name]}
    assert same == {"spaces", "say", "__main__"}
    assert what_a_script_consists_of("play.py")["fail"].split('"""')[2] == ours["fail"].split('"""')[2]


@pytest.mark.parametrize(
    "env_id, hint", [("FailingPush-v0", "level7.map"), ("NoFinite-v0", "reward that is not finite")]
)
def test_an_error_in_the_environment_ends_the_run_with_its_last_checkpoint(env_id, hint, in_an_empty_folder, capsys):
    with pytest.raises(SystemExit) as exit:
        preqn.main(arguments(env_id=env_id, checkpoint_interval=10))
    last = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 1 and last.startswith("error: ") and hint in last and "goes on from its last" in last
    assert torch.load(next(Path("runs").glob("*/checkpoint.pt")))["step"] == 20


def test_q_that_diverges_stops_the_run_and_is_never_saved(in_an_empty_folder, capsys):
    with pytest.raises(SystemExit) as exit:
        preqn.main(arguments(critic_step=1e29, alignment=-1.0, checkpoint_interval=10))
    errors = capsys.readouterr().err
    assert exit.value.code == 1 and errors.count("\n") == 1 and "finite" in errors
    for path in Path("runs").glob("*/checkpoint.pt"):
        assert all(w.isfinite().all() for w in torch.load(path)["network"].values())


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda x: x.name)
def test_a_signal_ends_the_run_saved(signum, heeded_signals, in_an_empty_folder, monkeypatch, capfd):
    calls, collect = [], preqn.Collector.collect

    def interrupt(collector, epsilon):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signum)
        return collect(collector, epsilon)

    monkeypatch.setattr(preqn.Collector, "collect", interrupt)
    with pytest.raises(SystemExit) as exit:
        preqn.main(arguments())
    (folder,) = Path("runs").glob("*")
    assert exit.value.code == 128 + signum and f"go on with --resume {folder}" in capfd.readouterr().out
    checkpoint = torch.load(folder / "checkpoint.pt")
    assert checkpoint["step"] == 30 and checkpoint["buffer"]["added"] >= 22


def test_a_user_trains_on_envpool(in_an_empty_folder):
    options = "--env-id HalfCheetah-v5 --total-timesteps 100 --start-steps 50 --learning-starts 50 --hidden-sizes 16"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = lambda *words: subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)
    result = command(ROOT / "preqn.py", *options.split())
    assert result.returncode == 0 and result.stderr == "", result.stderr
    (folder,) = Path("runs").glob("*")
    assert f"evaluate the final agent with python play.py {folder}" in result.stdout
    checkpoint = torch.load(folder / "checkpoint.pt")
    assert checkpoint["step"] == 100 == checkpoint["buffer"]["added"]
    assert checkpoint["buffer"]["data"][0].shape == (100, 17)
