"""pqn_vdn_lstm.py: what follows from a team and memory together. Its siblings' tests cover what it shares with them."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import literal
import numpy as np
import pytest
import tiny_teams
import torch

import play
import pqn_lstm
import pqn_vdn
import pqn_vdn_lstm

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SIZES = dict(num_envs=6, num_steps=7, num_eval_envs=2, num_minibatches=3, update_epochs=2, seed=7, hidden_sizes=(16, 8))
SIZES |= dict(lstm_size=8, norm_type="layer_norm", normalize_input=False)
OPTIONS = SIZES | dict(schedule_timesteps=300, exploration_fraction=0.6, start_e=0.8, end_e=0.1, gamma=0.9)
OPTIONS |= dict(log_interval=84, learning_rate=3e-3, l2_coef=0.01, q_lambda=0.7, reward_scale=0.3, max_grad_norm=0.5)
SMALL = pqn_vdn_lstm.Args(**SIZES | dict(total_timesteps=84))


@pytest.fixture(autouse=True)
def in_an_empty_folder(in_an_empty_folder):
    pass


def test_what_the_scripts_share_is_the_same_text(what_a_script_consists_of):
    ours, recurrent, teams = map(what_a_script_consists_of, ("pqn_vdn_lstm.py", "pqn_lstm.py", "pqn_vdn.py"))
    differ = "Args make_envs step_envs act Collector QNetwork td_loss main".split()
    assert {name for name in set(ours) & set(recurrent) if ours[name] != recurrent[name]} == set(differ)
    assert set(ours) - set(recurrent) == {"pack"} and ours["pack"] == teams["pack"]


# ------------------------------------------------------------------------------------------------------ the network


def network_for(agents=2, **options):
    parts = {
        "agents_view": gym.spaces.Box(-9, 9, (agents, 3)),
        "action_mask": gym.spaces.MultiBinary((agents, 4)),
    }
    torch.manual_seed(0)
    actions = gym.spaces.MultiDiscrete([4] * agents)
    return pqn_vdn_lstm.QNetwork(gym.spaces.Dict(parts), actions, replace(SMALL, **options))


def random_sequences(L=6, B=5, agents=2):
    views, masks = torch.randn(L, B, agents, 3), torch.rand(L, B, agents, 4) < 0.6
    masks[..., 1] |= ~masks.any(3)
    starts = torch.rand(L, B) < 0.3
    starts[0, 0], starts[1, 1] = True, True
    state = torch.randn(B * agents, 8), torch.randn(B * agents, 8)
    return torch.cat([views, masks], 3), torch.randint(4, (L, B, agents)), starts, state


@pytest.mark.parametrize("agent_index", [True, False])
def test_every_agent_remembers_by_itself_and_forgets_where_an_episode_starts(agent_index):
    """Against the definition: one environment, one agent, one step at a time."""
    network = network_for(agent_index=agent_index)
    obs, last_actions, starts, state = random_sequences()
    q_values, after = network(obs, last_actions, starts, state)
    for b in range(5):
        for i in range(2):
            hidden, cell = (x[2 * b + i] for x in state)
            for t in range(6):
                index = torch.eye(2)[i] if agent_index else torch.zeros(0)
                features = network.body(torch.cat([obs[t, b, i, :3], index])[None])[0]
                step = features, last_actions[t, b, i], starts[t, b]
                expected, hidden, cell = literal.remember(network, *step, hidden, cell)
                expected[obs[t, b, i, 3:] == 0] = -torch.inf
                assert torch.allclose(q_values[t, b, i], expected, atol=1e-5)
            for x, last in zip(after, (hidden, cell), strict=True):
                assert torch.allclose(x[2 * b + i], last, atol=1e-5)


def test_batch_norm_is_over_all_steps_environments_and_agents_of_a_minibatch():
    network = network_for(norm_type="batch_norm", normalize_input=True).train()
    obs, *rest = random_sequences()
    network(obs, *rest)
    seen = torch.cat([obs[..., :3], torch.eye(2).expand(6, 5, 2, 2)], 3).flatten(0, 2)
    assert torch.allclose(network.body[0].running_mean, 0.01 * seen.mean(0), atol=1e-6)


@pytest.mark.parametrize("window", [0, 2, 7])
def test_what_is_stored_reproduces_what_was_played(window):
    args = replace(SMALL, env_id="tiny_teams:EventfulTeam-v0", memory_window=window)
    envs = pqn_vdn_lstm.make_envs(args, 8, (1, 0))
    network = pqn_vdn_lstm.QNetwork(*pqn_vdn_lstm.spaces(envs), args)
    collector = pqn_vdn_lstm.Collector(envs, network, args, CPU)
    for rollout in range(8):
        state = [x[:12].clone() for x in collector.state]
        (obs, last_actions, starts, hidden, cell, actions, *_, real), *_ = collector.collect(0.0)
        kept = [x.view(12, 8) for x in (hidden, cell)]
        q_values, _ = network(obs, last_actions, starts, kept)
        assert len(obs) == window + 7 + 1
        assert torch.equal(q_values[window:-1].argmax(3)[real], actions[real])
        if window and rollout:  # before the first one there is nothing to replay
            _, replayed = network(obs[:window], last_actions[:window], starts[:window], kept)
            assert all(torch.allclose(*x, atol=1e-5) for x in zip(state, replayed, strict=True))


# ---------------------------------------------------------------------------------------------------- what it learns


@pytest.mark.parametrize("options", [{}, {"memory_window": 3, "num_minibatches": 6}], ids=["", "window"])
def test_a_resumed_run_ends_where_a_literal_one_does(options, monkeypatch, train, curves):
    monkeypatch.setattr(tiny_teams.EventfulTeam, "made", [])
    args = pqn_vdn_lstm.Args(**OPTIONS | options, env_id="tiny_teams:EventfulTeam-v0")
    literal.compare_a_resumed_run(literal.RecurrentTeamAlgorithm1, args, tiny_teams.EventfulTeam.made, train, curves)


@pytest.mark.parametrize("normed", [{}, {"norm_type": "batch_norm", "normalize_input": True}], ids=["", "batch norm"])
def test_a_team_of_one_learns_what_pqn_lstm_does(normed, train):
    alone = pqn_lstm.Args(**OPTIONS | normed, env_id="tiny_teams:EventfulAgent-v0", total_timesteps=210)
    team = pqn_vdn_lstm.Args(**OPTIONS | normed, env_id="tiny_teams:TeamOfOne-v0", total_timesteps=210)
    (_, alone), (_, team) = train(alone), train(replace(team, agent_index=False))
    for name, weights in alone["network"].items():
        assert torch.allclose(weights, team["network"][name], rtol=1e-4, atol=1e-6), name
    assert alone["last_returns"] == pytest.approx(team["last_returns"])


def test_a_team_remembers_what_the_feed_forward_one_cannot(train):
    options = dict(env_id="tiny_teams:TeamCue-v0", num_envs=16, num_steps=15, num_eval_envs=16, num_minibatches=2)
    options |= dict(total_timesteps=16 * 15 * 60, learning_rate=2e-3, anneal_lr=False, end_e=0.05, reward_scale=1.0)
    options |= dict(hidden_sizes=(32,), update_epochs=2, max_grad_norm=10.0, exploration_fraction=0.2)
    folder, recurrent = train(pqn_vdn_lstm.Args(**options, lstm_size=32))
    _, feed_forward = train(pqn_vdn.Args(**options))
    greedy = [checkpoint["eval_returns"] for checkpoint in (recurrent, feed_forward)]
    assert np.mean(greedy[0]) > 0.9 and abs(np.mean(greedy[1])) < 0.5
    assert np.mean(play.main(play.Args(str(folder), episodes=40))) > 0.9


def test_no_illegal_action_is_ever_taken_neither_in_training_nor_when_played(train):
    folder, _ = train(replace(SMALL, env_id="tiny_teams:Strict-v0", total_timesteps=420, start_e=0.5, end_e=0.5))
    play.main(play.Args(str(folder), episodes=5, max_steps=20))


def test_every_agent_counts_where_a_small_network_takes_one_thread(train, monkeypatch):
    chosen, args = [], replace(SMALL, env_id="tiny_teams:Sum-v0", total_timesteps=42, update_epochs=1)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    train(replace(args, lstm_size=1000))  # 4M weights, and in a step of a minibatch 2 environments of 2 agents
    assert chosen == []
    train(args)
    assert chosen == [1]


# ------------------------------------------------------------------------------------------------ as a user runs it


@pytest.mark.parametrize(
    "options, hint",
    [
        ("--env-id CartPole-v1", "not for teams"),
        ("--env-id tiny_teams:Grid-v0", "pqn_vdn.py takes grids"),
        ("--env-id SearchAndRescue-v0", "action_mask"),
        ("--num-minibatches 7", "128 environments"),
        ("--memory-window 4", "--normalize-input"),
        ("--memory-window 4 --norm-type layer_norm", "--normalize-input"),
        ("--memory-window 129 --norm-type layer_norm --no-normalize-input", "--memory-window 129 is more"),
        ("--total-timesteps 100", "16384"),
        ("--lstm-size 0", "--lstm-size"),
    ],
)
def test_bad_options_get_one_line_and_exit_code_2_before_anything_is_written(options, hint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pqn_vdn_lstm.py", *options.split()])
    with pytest.raises(SystemExit) as exit:
        pqn_vdn_lstm.main(pqn_vdn_lstm.parse_args())
    output = capsys.readouterr()
    assert exit.value.code == 2 and output.err.startswith("error: ") and output.err.count("\n") == 1
    assert hint in output.err and output.out == "" and not Path("runs").exists()


def test_the_defaults_are_the_published_settings_for_smax_without_their_window_and_with_half_the_norm():
    args = pqn_vdn_lstm.Args()
    names = "total_timesteps num_envs num_steps update_epochs num_minibatches start_e end_e exploration_fraction"
    names += " learning_rate anneal_lr gamma q_lambda max_grad_norm hidden_sizes lstm_size reward_scale norm_type"
    values = [1e7, 128, 128, 4, 16, 1, 0.01, 0.1, 2.5e-4, True, 0.99, 0.85, 0.5, (512, 512), 512, 10, "batch_norm"]
    assert {name: getattr(args, name) for name in names.split()} == dict(zip(names.split(), values, strict=True))
    assert args.normalize_input and args.memory_window == 0


def test_a_user_s_run_leaves_curves_and_an_agent_that_play_evaluates_and_shows(curves, capsys):
    options = "--total-timesteps 4200 --num-envs 16 --num-steps 16 --update-epochs 1 --hidden-sizes 32 --lstm-size 16"
    command = [sys.executable, str(ROOT / "pqn_vdn_lstm.py"), *options.split(), "--seed", "3"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    (folder,) = Path("runs").glob("LevelBasedForaging-v0__pqn_vdn_lstm__3__*")
    assert str(folder) in result.stdout
    assert {"losses/td_loss", "charts/epsilon"} <= set(curves(folder))
    play.main(play.Args(str(folder), episodes=3))
    assert "3 greedy episodes" in capsys.readouterr().out
