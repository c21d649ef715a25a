"""pqn_atari_lstm.py: recurrence, resets and memory; its sibling's tests cover what the two share."""

from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from literal import remember
from literal import target as literal_target

import play
import pqn_atari_envpool as atari
import pqn_atari_lstm as recurrent

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SMALL = recurrent.Args(
    env_id="Breakout-v5",
    num_envs=4,
    num_steps=8,
    num_eval_envs=2,
    num_minibatches=2,
    total_timesteps=64,
    precision="fp32",
    lstm_size=16,
)


@pytest.fixture(autouse=True)
def in_an_empty_folder(in_an_empty_folder):
    pass


def network_for(**options):
    torch.manual_seed(0)
    args = replace(SMALL, **options)
    return recurrent.QNetwork(*recurrent.spaces(recurrent.make_envs(args, 1, (0,))), args)


def collector_for(**options):
    torch.manual_seed(0)
    args = replace(SMALL, **options)
    envs = recurrent.make_envs(args, args.num_envs + args.num_eval_envs, (args.seed, 0))
    return recurrent.Collector(envs, recurrent.QNetwork(*recurrent.spaces(envs), args), args, CPU)


def test_what_the_scripts_share_is_the_same_text(what_a_script_consists_of):
    ours, theirs = what_a_script_consists_of("pqn_atari_lstm.py"), what_a_script_consists_of("pqn_atari_envpool.py")
    differ = "Args Collector act QNetwork td_loss train_step minibatches check main".split()  # the algorithm does
    assert {name for name in set(ours) & set(theirs) if ours[name] != theirs[name]} == set(differ)


# ----------------------------------------------------------------------------------------------------- recurrence


def random_sequences(L=7, B=5):
    generator = torch.Generator().manual_seed(1)
    obs = torch.randint(0, 256, (L, B, 1, 84, 84), dtype=torch.uint8, generator=generator)
    starts = torch.rand(L, B, generator=generator) < 0.3
    starts[0, 0], starts[1, 1] = True, True
    last_actions = torch.randint(4, (L, B), generator=generator)
    state = torch.randn(B, 16, generator=generator), torch.randn(B, 16, generator=generator)
    return obs, last_actions, starts, state


def one_by_one(network, obs, last_actions, starts, state):
    """The definition: one environment, one step at a time, forgetting everything where an episode starts."""
    q_values = torch.zeros(*starts.shape, 4)
    for b in range(starts.shape[1]):
        hidden, cell = state[0][b], state[1][b]
        for t in range(starts.shape[0]):
            features = network.body(obs[t, b][None].float() / 255)[0]
            step = features, last_actions[t, b], starts[t, b]
            q_values[t, b], hidden, cell = remember(network, *step, hidden, cell)
    return q_values


def test_unrolling_equals_stepping_one_by_one_in_values_and_gradients():
    network, inputs = network_for(), random_sequences()
    gradients, values = [], []
    for unroll in (network, lambda *inputs: (one_by_one(network, *inputs), None)):
        network.zero_grad()
        q_values, _ = unroll(*inputs)
        (q_values * torch.arange(q_values.numel()).view_as(q_values)).sum().backward()
        values.append(q_values.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert torch.allclose(*values, atol=1e-5)
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-2 * gradients[0].abs().mean())


def test_the_state_that_is_returned_continues_the_sequence():
    network, (obs, last_actions, starts, state) = network_for(), random_sequences()
    whole, _ = network(obs, last_actions, starts, state)
    first, middle = network(obs[:3], last_actions[:3], starts[:3], state)
    second, _ = network(obs[3:], last_actions[3:], starts[3:], middle)
    assert torch.allclose(whole, torch.cat([first, second]), atol=1e-5)


def test_nothing_before_a_start_influences_anything_after_it():
    network, (obs, last_actions, starts, state) = network_for(), random_sequences()
    starts[:], starts[4, :3] = False, True  # three of five environments start an episode at step 4
    before, _ = network(obs, last_actions, starts, state)
    obs[:4], last_actions[:5], state = 255 - obs[:4], 3 - last_actions[:5], (state[0] + 1, state[1] - 1)
    after, _ = network(obs, last_actions, starts, state)
    assert torch.allclose(before[4:, :3], after[4:, :3], atol=1e-6)
    assert not torch.isclose(before[4:, 3:], after[4:, 3:], atol=1e-6).all()


def test_recurrent_weights_start_orthogonal_and_the_state_at_zero():
    lstm = network_for().lstm
    for gate in lstm.recurrent.split(16, dim=1):
        assert torch.allclose(gate @ gate.T, torch.eye(16), atol=1e-5)
    assert not any(x.any() for x in lstm.initial_state(3, CPU))


def test_what_is_stored_reproduces_what_was_played(eventful_games):
    for window in (0, 3, 8):
        collector = collector_for(num_steps=8, memory_window=window, num_envs=6)
        network = collector.act.args[0]
        for rollout in range(8):
            state = [x[:6].clone() for x in collector.state]
            (obs, last_actions, starts, hidden, cell, actions, _, _, _, real), _, _ = collector.collect(0.0)
            assert len(obs) == window + 8 + 1 and not real.all()
            q_values, _ = network(obs, last_actions, starts, (hidden[0], cell[0]))
            assert torch.equal(q_values[window:-1].argmax(2)[real], actions[real])
            if window and rollout:  # before the first one there is nothing to replay
                _, replayed = network(obs[:window], last_actions[:window], starts[:window], (hidden[0], cell[0]))
                for a, b in zip(state, replayed, strict=True):
                    assert torch.allclose(a, b, atol=1e-5)


def test_memory_ends_with_the_first_observation_of_an_episode_and_not_with_the_last_of_the_one_before(small_body):
    collector = collector_for(max_episode_steps=5, num_steps=13)
    _, last_actions, starts, _, _, actions, _, _, truncated, real = collector.collect(1.0)[0]
    assert starts[0].all()
    assert torch.equal(starts[1:], ~real)  # the first observation of an episode follows a phantom
    assert truncated[4].all() and not starts[5].any() and starts[6].all()
    assert torch.equal(last_actions[1:], actions)
    starts = collector.collect(1.0)[0][2]  # the last step was a phantom's predecessor: 13 = 2 × (5 + 1) + 1
    assert torch.equal(starts.any(1).nonzero().flatten() % 6, torch.tensor([5, 5]))


# ------------------------------------------------------------------------------------------------ targets and loss


def sequences_to_learn(window):
    obs, last_actions, starts, state = random_sequences(L=window + 7)
    generator = torch.Generator().manual_seed(2)
    flag = lambda: torch.rand(6, 5, generator=generator) < 0.2
    rewards, actions = torch.rand(6, 5, generator=generator), torch.randint(4, (6, 5), generator=generator)
    return obs, last_actions, starts, state[0][None], state[1][None], actions, rewards, flag(), flag(), ~flag()


@pytest.mark.parametrize("window", [0, 3])
def test_loss_and_gradient_are_those_of_literal_targets_that_are_constants(window):
    network, args = network_for(), replace(SMALL, gamma=0.9, q_lambda=0.7)
    data = sequences_to_learn(window)
    loss, q_value = recurrent.td_loss(network, args, *data, data[-1].sum())
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in network.parameters()])

    obs, last_actions, starts, hidden, cell, actions, rewards, terminated, truncated, real = data
    state = hidden[0], cell[0]
    if window:
        with torch.no_grad():
            _, state = network(obs[:window], last_actions[:window], starts[:window], state)
    q_values, _ = network(obs[window:], last_actions[window:], starts[window:], state)
    values = q_values.detach().max(2).values
    errors, taken = [], []
    for t, b in real.nonzero().tolist():
        column = [x[:, b].tolist() for x in (rewards, values, terminated, truncated)]
        taken.append(q_values[t, b, actions[t, b]])
        errors.append(literal_target(t, *column, 0.9, 0.7) - taken[-1])
    expected = 0.5 * torch.stack(errors).square().mean()
    network.zero_grad()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert q_value.item() == pytest.approx(torch.stack(taken).mean().item(), rel=1e-5)
    assert torch.allclose(gradient, torch.cat([p.grad.flatten() for p in network.parameters()]), atol=1e-5)


def test_the_bootstrap_of_a_truncation_remembers_the_episode():
    """The last observation of an episode that is cut short is seen with the state of that episode."""
    network, args = network_for(), replace(SMALL, gamma=1.0, q_lambda=0.5)
    obs, last_actions, starts, hidden, cell, actions, *_ = sequences_to_learn(0)
    no = torch.zeros(6, 5, dtype=torch.bool)
    truncated, only_that_step = no.clone(), no.clone()
    starts[:], truncated[2], starts[4], only_that_step[2] = False, True, True, True
    losses = []
    for state in (hidden, hidden + 1):  # a memory from the beginning of the episode
        values, _ = network(obs, last_actions, starts, (state[0], cell[0]))
        data = obs, last_actions, starts, state, cell, actions, torch.zeros(6, 5), no, truncated, only_that_step
        data += (only_that_step.sum(),)
        losses.append(recurrent.td_loss(network, args, *data)[0].item())
        errors = values[3].max(1).values - values[2].gather(1, actions[2][:, None])[:, 0]
        assert losses[-1] == pytest.approx(0.5 * errors.square().mean().item(), rel=1e-4)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_phantoms_change_neither_loss_nor_gradient():
    network = network_for()
    *seen, actions, rewards, terminated, truncated, real = sequences_to_learn(0)
    terminated = torch.zeros_like(real)
    truncated[:-1], truncated[-1] = ~real[1:], False  # a phantom follows the end of an episode
    results = []
    for changed in (False, True):
        network.zero_grad()
        other_rewards = torch.where(real, rewards, 1e6) if changed else rewards
        other_actions = torch.where(real, actions, 3 - actions) if changed else actions
        data = other_actions, other_rewards, terminated, truncated, real, real.sum()
        loss, _ = recurrent.td_loss(network, SMALL, *seen, *data)
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in network.parameters()])))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


# ---------------------------------------------------------------------------------------------------------- memory


class Cues:
    """Lights up its left or right half, then nothing for three steps, then asks: action 0 for left, 1 for right."""

    observation_space, action_space = gym.spaces.Box(0, 255, (1, 4, 4), np.uint8), gym.spaces.Discrete(2)

    def __init__(self, num_envs, seed, **_):
        self.random, self.num_envs = np.random.default_rng(seed), num_envs

    def reset(self):
        self.cues, self.time = self.random.integers(2, size=self.num_envs), np.zeros(self.num_envs, dtype=int)
        return self.observe(), {}

    def observe(self):
        obs = np.zeros((self.num_envs, 1, 4, 4), dtype=np.uint8)
        for i in range(self.num_envs):
            if self.time[i] == 0:
                obs[i, 0, :, 2 * self.cues[i] :][:, :2] = 255
            elif self.time[i] == 4:
                obs[i, 0, ::2] = 255
        return obs

    def step(self, actions):
        phantom, asked = self.time == 5, self.time == 4
        rewards = np.where(asked, np.where(actions == self.cues, 1.0, -1.0), 0.0).astype(np.float32)
        self.time = np.where(phantom, 0, self.time + 1)
        self.cues = np.where(phantom, self.random.integers(2, size=self.num_envs), self.cues)
        info = {"reward": rewards, "terminated": asked.astype(np.int32)}
        return self.observe(), rewards, asked, np.zeros_like(asked), info


def test_it_remembers_what_the_feed_forward_agent_cannot(monkeypatch, train, small_body):
    options = dict(env_id="Pong-v5", num_envs=16, num_steps=18, num_eval_envs=16, num_minibatches=2, precision="fp32")
    options |= dict(total_timesteps=16 * 18 * 60, learning_rate=2e-3, end_e=0.05, stack_num=1)
    monkeypatch.setattr(recurrent.envpool, "make", lambda _, env_type, **kwargs: Cues(**kwargs))
    greedy = [
        train(args)[1]["eval_returns"] for args in (recurrent.Args(**options, lstm_size=32), atari.Args(**options))
    ]
    assert [len(returns) for returns in greedy] == [100, 100]
    assert np.mean(greedy[0]) > 0.9 and abs(np.mean(greedy[1])) < 0.5


# -------------------------------------------------------------------------------------------------- the whole script


def test_a_run_can_be_resumed_played_and_filmed(train, small_body):
    options = dict(num_steps=16, num_minibatches=4, memory_window=4, max_episode_steps=20)
    folder, checkpoint = train(replace(SMALL, total_timesteps=256, **options))
    assert folder.name.startswith("Breakout-v5__pqn_atari_lstm__1__")
    _, checkpoint = train(replace(recurrent.Args(**checkpoint["args"]), resume=str(folder), total_timesteps=384))
    assert checkpoint["step"] == 384 and checkpoint["optimizer"]["steps"] == 384 / 64 * 8
    play.main(play.Args(str(folder), episodes=3, video="game.gif"))
    assert Path("game.gif").stat().st_size > 1000


def test_a_minibatch_of_phantoms_is_no_gradient_step(train):
    # Every game is one step long: every second rollout of one step is nothing but phantoms.
    sizes = dict(num_envs=2, num_steps=1, num_minibatches=2, num_eval_envs=0, max_episode_steps=1)
    _, checkpoint = train(replace(SMALL, total_timesteps=8, **sizes))
    assert checkpoint["optimizer"]["steps"] == 2 * 2 * 2
    assert all(weights.isfinite().all() for weights in checkpoint["network"].values())


def test_the_same_seed_gives_the_same_weights(train, small_body):
    weights = [train(replace(SMALL, memory_window=2))[1]["network"] for _ in range(2)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"memory_window": 3}])
def test_captured_and_uncaptured_runs_agree(monkeypatch, options, train):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    weights = []
    for cuda_graph in (True, False):
        args = replace(SMALL, device="cuda", cuda_graph=cuda_graph, total_timesteps=640, end_e=1.0, **options)
        _, checkpoint = train(args)
        weights.append(torch.cat([w.float().flatten() for w in checkpoint["network"].values()]))
    assert torch.allclose(*weights, atol=1e-3)
