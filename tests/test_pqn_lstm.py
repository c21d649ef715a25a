"""pqn_lstm.py: recurrence over vector observations, and what it is good for. Its siblings' tests cover what it shares
with them word for word; test_main.py compares its main() with a literal one."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from literal import remember

import play
import pqn
import pqn_lstm

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SIZES = dict(num_envs=4, num_steps=6, num_eval_envs=2, num_minibatches=2, update_epochs=2, hidden_sizes=(16,))
SMALL = pqn_lstm.Args(**SIZES, lstm_size=8, total_timesteps=240)


@pytest.fixture(autouse=True)
def in_an_empty_folder(in_an_empty_folder):
    pass


def test_what_the_scripts_share_is_the_same_text(what_a_script_consists_of):
    names = "pqn_lstm.py", "pqn.py", "pqn_atari_lstm.py"
    ours, feed_forward, atari = map(what_a_script_consists_of, names)
    recurrence = "act LSTM train_step minibatches".split()
    differ = set(recurrence) - {"LSTM"} | set("Args Collector QNetwork td_loss check main".split())
    assert {name for name in set(ours) & set(feed_forward) if ours[name] != feed_forward[name]} == differ
    assert set(ours) - set(feed_forward) == {"LSTM"} and set(feed_forward) <= set(ours)
    assert all(ours[name] == atari[name] for name in recurrence)
    without_graphs = atari["Collector"].replace("capture(partial(act, network), args, device)", "partial(act, network)")
    assert ours["Collector"] == without_graphs


# ----------------------------------------------------------------------------------------------------- recurrence


def network_for(observation_space, **options):
    torch.manual_seed(0)
    return pqn_lstm.QNetwork(observation_space, gym.spaces.Discrete(3), replace(SMALL, **options))


def random_sequences(obs):
    L, B = obs.shape[:2]
    starts = torch.rand(L, B) < 0.3
    starts[0, 0], starts[1, 1] = True, True
    return obs, torch.randint(3, (L, B)), starts, (torch.randn(B, 8), torch.randn(B, 8))


def one_by_one(network, obs, last_actions, starts, state):
    """The definition: one environment, one step at a time, forgetting everything where an episode starts."""
    q_values = torch.zeros(*starts.shape, 3)
    for b in range(starts.shape[1]):
        hidden, cell = state[0][b], state[1][b]
        for t in range(starts.shape[0]):
            features = network.body(obs[t, b].flatten()[None])[0]
            step = features, last_actions[t, b], starts[t, b]
            q_values[t, b], hidden, cell = remember(network, *step, hidden, cell)
    return q_values


@pytest.mark.parametrize("shape", [(4,), (2, 3), (6, 5, 4)], ids=["vector", "matrix", "picture"])
def test_unrolling_equals_stepping_one_by_one_in_values_and_gradients(shape):
    network = network_for(gym.spaces.Box(-9, 9, shape))
    inputs, gradients, values = random_sequences(torch.randn(7, 5, *shape)), [], []
    for unroll in (network, lambda *inputs: (one_by_one(network, *inputs), None)):
        network.zero_grad()
        q_values, _ = unroll(*inputs)
        (q_values * torch.arange(q_values.numel()).view_as(q_values)).sum().backward()
        values.append(q_values.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert torch.allclose(*values, atol=1e-5)
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-2 * gradients[0].abs().mean())


def test_the_forget_bias_is_the_forget_gate_s_and_keeps_what_the_state_holds():
    network = network_for(gym.spaces.Box(-9, 9, (4,)), forget_bias=20.0)
    assert network.lstm.input.bias.unflatten(0, (4, 8))[:, 0].tolist() == [0, 20, 0, 0]
    torch.nn.init.constant_(network.lstm.input.bias[:8], -20)  # nothing is written
    torch.nn.init.zeros_(network.lstm.input.weight)
    cell = torch.randn(5, 8)
    starts = torch.zeros(7, 5, dtype=torch.bool)
    _, (_, after) = network(torch.randn(7, 5, 4), torch.randint(3, (7, 5)), starts, (torch.zeros(5, 8), cell))
    assert torch.allclose(cell, after, atol=1e-4)


def test_discrete_observations_are_seen_as_one_hot_vectors_also_where_they_do_not_start_at_0():
    discrete = network_for(gym.spaces.Discrete(4, start=3))
    vectors = network_for(gym.spaces.Box(0, 1, (4,)))
    obs = torch.randint(3, 7, (7, 5))
    rest = random_sequences(obs)[1:]
    assert torch.equal(discrete(obs, *rest)[0], vectors(torch.eye(4)[obs - 3], *rest)[0])


@pytest.mark.parametrize("window", [0, 2, 6])
def test_what_is_stored_reproduces_what_was_played(window):
    args = replace(SMALL, env_id="tiny_envs:Eventful-v0", memory_window=window)
    envs = pqn_lstm.make_envs(args, 6, (1, 0))
    network = pqn_lstm.QNetwork(*pqn_lstm.spaces(envs), args)
    collector = pqn_lstm.Collector(envs, network, args, CPU)
    ends = 0
    for rollout in range(8):
        state = [x[:4].clone() for x in collector.state]
        (obs, last_actions, starts, hidden, cell, actions, *_, real), *_ = collector.collect(0.0)
        q_values, _ = network(obs, last_actions, starts, (hidden[0], cell[0]))
        assert len(obs) == window + 6 + 1
        assert torch.equal(q_values[window:-1].argmax(2)[real], actions[real])
        if window and rollout:  # before the first one there is nothing to replay
            _, replayed = network(obs[:window], last_actions[:window], starts[:window], (hidden[0], cell[0]))
            assert all(torch.allclose(*x, atol=1e-5) for x in zip(state, replayed, strict=True))
        ends += (~real).sum()
    assert ends > 10


# ---------------------------------------------------------------------------------------------------------- memory


def test_it_remembers_what_the_feed_forward_agent_cannot(train):
    options = dict(env_id="tiny_envs:Cue-v0", num_envs=16, num_steps=18, num_eval_envs=16, num_minibatches=2)
    options |= dict(total_timesteps=16 * 18 * 60, learning_rate=2e-3, anneal_lr=False, end_e=0.05, reward_scale=1.0)
    options |= dict(hidden_sizes=(32,), update_epochs=2)
    (folder, recurrent), (_, feed_forward) = train(pqn_lstm.Args(**options, lstm_size=32)), train(pqn.Args(**options))
    greedy = [checkpoint["eval_returns"] for checkpoint in (recurrent, feed_forward)]
    assert [len(returns) for returns in greedy] == [100, 100]
    assert np.mean(greedy[0]) > 0.9 and abs(np.mean(greedy[1])) < 0.5
    assert np.mean(play.main(play.Args(str(folder), episodes=40))) > 0.9


# -------------------------------------------------------------------------------------------------- the whole script


def test_a_resumed_run_makes_the_same_bits_as_one_that_was_never_stopped(train):
    """In an environment without chance, stopped after a rollout that ended with a phantom: new environments then start
    where the old ones would have gone on, and the state is that of a new episode."""
    args = replace(SMALL, env_id="tiny_envs:TimeLimited-v0", total_timesteps=240, schedule_timesteps=240)
    _, whole = train(args)
    folder, first = train(replace(args, total_timesteps=120))
    _, resumed = train(replace(pqn_lstm.Args(**first["args"]), resume=str(folder), total_timesteps=240))
    assert whole["step"] == resumed["step"] == 240
    assert all(torch.equal(whole["network"][name], resumed["network"][name]) for name in whole["network"])
    assert torch.equal(whole["rng_state"], resumed["rng_state"])


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "tiny_envs:BothFlags-v0", "Catch-v0", "tiny_envs:Scalar-v0"])
@pytest.mark.parametrize("options", [{}, {"norm_type": "batch_norm", "normalize_input": True}])
def test_other_observations_and_norms_run(env_id, options, train, curves):
    folder, checkpoint = train(replace(SMALL, env_id=env_id, **options))
    assert checkpoint["step"] == 240 and "losses/td_loss" in curves(folder)


def test_a_minibatch_of_phantoms_is_no_gradient_step(train):
    # Every episode is one step long: every second rollout of one step is nothing but phantoms.
    sizes = dict(num_envs=2, num_steps=1, num_minibatches=2, num_eval_envs=0, total_timesteps=8)
    _, checkpoint = train(replace(SMALL, env_id="tiny_envs:BothFlags-v0", **sizes))
    assert checkpoint["optimizer"]["steps"] == 2 * 2 * 2
    assert all(weights.isfinite().all() for weights in checkpoint["network"].values())


def test_a_user_s_run_leaves_curves_and_an_agent_that_play_evaluates_and_films(curves, capsys):
    options = "--total-timesteps 4200 --hidden-sizes 32 --lstm-size 16 --update-epochs 1 --memory-window 4 --seed 3"
    command = [sys.executable, str(ROOT / "pqn_lstm.py"), *options.split()]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    (folder,) = Path("runs").glob("CartPole-v1__pqn_lstm__3__*")
    assert str(folder) in result.stdout
    assert {"losses/td_loss", "eval/episodic_return"} <= set(curves(folder))
    play.main(play.Args(str(folder), episodes=3, video="cartpole.gif"))
    assert "3 greedy episodes" in capsys.readouterr().out and Path("cartpole.gif").stat().st_size > 1000
