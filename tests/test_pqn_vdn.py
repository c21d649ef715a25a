"""pqn_vdn.py: what differs from pqn.py, which is what teams need, and the script as a user runs it."""

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
import pqn
import pqn_vdn
import pqn_vdn_lstm

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SIZES = dict(num_envs=6, num_steps=7, num_eval_envs=2, num_minibatches=3, update_epochs=2, seed=7, hidden_sizes=(16, 8))
OPTIONS = SIZES | dict(schedule_timesteps=300, exploration_fraction=0.6, start_e=0.8, end_e=0.1, gamma=0.9)
OPTIONS |= dict(log_interval=84, learning_rate=3e-3, l2_coef=0.01, q_lambda=0.7, reward_scale=0.3, max_grad_norm=0.5)
SMALL = pqn_vdn.Args(**SIZES | dict(hidden_sizes=(16,), total_timesteps=84))


@pytest.fixture(autouse=True)
def in_an_empty_folder(in_an_empty_folder):
    pass


def test_what_the_scripts_share_is_the_same_text(what_a_script_consists_of):
    ours, theirs = what_a_script_consists_of("pqn_vdn.py"), what_a_script_consists_of("pqn.py")
    differ = "Args make_envs step_envs act Collector QNetwork norm_layer td_loss train_step check main".split()
    assert {name for name in set(ours) & set(theirs) if ours[name] != theirs[name]} == set(differ)
    atari = what_a_script_consists_of("pqn_atari_envpool.py")
    assert ours["ChannelLayerNorm"] == atari["ChannelLayerNorm"]


# ----------------------------------------------------------------------------------- masks, acting and the network


def network_for(view_shape, agents=2, actions=4, **options):
    parts = {
        "agents_view": gym.spaces.Box(-9, 9, (agents, *view_shape)),
        "action_mask": gym.spaces.MultiBinary((agents, actions)),
    }
    space = gym.spaces.Dict(parts)
    return pqn_vdn.QNetwork(space, gym.spaces.MultiDiscrete([actions] * agents), replace(SMALL, **options))


def random_obs(batch, masked=True, agents=2, actions=4):
    masks = torch.rand(batch, agents, actions) < 0.5 if masked else torch.ones(batch, agents, actions, dtype=bool)
    masks[..., 1] |= ~masks.any(2)
    return torch.cat([torch.randn(batch, agents, 3), masks], 2), masks


def test_random_actions_are_the_legal_ones_all_as_likely():
    torch.manual_seed(0)
    network = network_for((3,))
    obs, legal = random_obs(1)
    obs, legal = obs.expand(6000, -1, -1), legal[0]
    actions, _ = pqn_vdn.act(network, obs, torch.ones(6000, 2, dtype=bool), torch.randint(2**27, (6000, 2)))
    for i in range(2):
        shares = torch.bincount(actions[:, i], minlength=4) / 6000
        assert shares.tolist() == pytest.approx((legal[i] / legal[i].sum()).tolist(), abs=0.03)


def test_greedy_actions_and_values_are_those_of_the_best_legal_action():
    torch.manual_seed(0)
    network = network_for((3,))
    obs, legal = random_obs(500)
    everything_legal = torch.cat([obs[..., :3], torch.ones(500, 2, 4)], 2)
    explore = torch.zeros(400, 2, dtype=bool)
    actions, values = pqn_vdn.act(network, obs, explore, torch.randint(2**27, (400, 2)))
    with torch.no_grad():
        q_values = network(everything_legal).tolist()
    outdone = 0
    for n in range(500):
        for i in range(2):
            best = max((a for a in range(4) if legal[n, i, a]), key=lambda a: q_values[n][i][a])
            assert actions[n, i] == best and (n >= 400 or values[n, i].item() == pytest.approx(q_values[n][i][best]))
            outdone += max(q_values[n][i]) > q_values[n][i][best]
    assert outdone > 100 and values.shape == (400, 2)  # an illegal action would often have been better


def test_no_illegal_action_is_ever_taken_neither_in_training_nor_when_played(train):
    folder, _ = train(replace(SMALL, env_id="tiny_teams:Strict-v0", total_timesteps=420, start_e=0.5, end_e=0.5))
    play.main(play.Args(str(folder), episodes=5, max_steps=20))


def test_where_nothing_is_legal_the_first_action_is():
    masks = np.ones((5, 2, 4), np.int8)
    masks[2, 1] = 0
    for script in pqn_vdn, pqn_vdn_lstm:
        packed = torch.from_numpy(script.pack({"agents_view": np.ones((5, 2, 3), np.float32), "action_mask": masks}))
        assert packed[2, 1].tolist() == [1, 1, 1, 1, 0, 0, 0] and packed.sum() == 5 * 2 * 7 - 3
    assert not masks[2, 1].any()  # the environment's own array is left as it is
    assert (network_for((3,))(packed)[2, 1] > -torch.inf).tolist() == [True, False, False, False]


def test_random_actions_are_legal_also_where_q_values_are_not_numbers():
    network = network_for((3,))
    torch.nn.init.constant_(network.head.bias, torch.nan)
    obs, legal = random_obs(50)
    actions, _ = pqn_vdn.act(network, obs, torch.ones(50, 2, dtype=bool), torch.randint(2**27, (50, 2)))
    assert legal.gather(2, actions.unsqueeze(2)).all()


def test_agents_who_see_the_same_are_told_apart_by_their_index_and_by_nothing_else():
    obs = torch.cat([torch.randn(5, 1, 3).expand(-1, 2, -1), torch.ones(5, 2, 4)], 2)
    told_apart, alike = network_for((3,))(obs), network_for((3,), agent_index=False)(obs)
    assert torch.equal(alike[:, 0], alike[:, 1]) and not torch.isclose(told_apart[:, 0], told_apart[:, 1]).any()
    # The index is that of the agent also where another one sees something else
    network = network_for((3,))
    changed = obs.clone()
    changed[:, 0, :3] += 1
    assert torch.equal(network(obs)[:, 1], network(changed)[:, 1])


def test_grids_go_through_padded_convolutions_and_keep_their_layout():
    network = network_for((4, 5, 26), hidden_sizes=(512, 512))
    kinds = [type(layer).__name__ for layer in network.convolutions]
    assert kinds == ["Conv2d", "ChannelLayerNorm", "ReLU"] * 3
    assert [layer.kernel_size for layer in network.convolutions[::3]] == [(5, 5), (3, 3), (3, 3)]
    assert [layer.out_channels for layer in network.convolutions[::3]] == [32] * 3
    assert network.body[0].in_features == 4 * 5 * 32 + 2
    views, seen = torch.randn(3, 2, 4, 5, 26), []
    network.convolutions.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    obs = torch.cat([views.flatten(2), torch.ones(3, 2, 4)], 2)
    assert network(obs).shape == (3, 2, 4)
    assert torch.equal(seen[0], views.flatten(0, 1).permute(0, 3, 1, 2))  # height × width × channels in the views
    for norm_type in "batch_norm", "none":
        assert network_for((4, 5, 26), norm_type=norm_type)(obs).isfinite().all()


# --------------------------------------------------------------------------------------------- value decomposition


@pytest.mark.parametrize("independent", [False, True], ids=["vdn", "independent"])
def test_a_resumed_run_ends_where_a_literal_one_does(independent, monkeypatch, train, curves):
    monkeypatch.setattr(tiny_teams.EventfulTeam, "made", [])
    args = pqn_vdn.Args(**OPTIONS, env_id="tiny_teams:EventfulTeam-v0", shaping_timesteps=100, independent=independent)
    literal.compare_a_resumed_run(literal.TeamAlgorithm1, args, tiny_teams.EventfulTeam.made, train, curves)


def test_a_team_of_one_learns_what_pqn_does(train):
    alone = pqn.Args(**OPTIONS, env_id="tiny_teams:EventfulAgent-v0", total_timesteps=210)
    team = pqn_vdn.Args(**OPTIONS, env_id="tiny_teams:TeamOfOne-v0", total_timesteps=210, agent_index=False)
    (_, alone), (_, team) = train(alone), train(team)
    for name, weights in alone["network"].items():
        assert torch.allclose(weights, team["network"][name], rtol=1e-4, atol=1e-6), name
    assert alone["last_returns"] == pytest.approx(team["last_returns"])


@pytest.mark.parametrize("independent", [False, True], ids=["vdn", "independent"])
def test_values_of_a_team_add_up_and_those_of_independent_learners_are_expectations(independent, train):
    """The reward is c_1[a_1] + c_2[a_2], all actions are random: VDN learns that sum, and each independent learner its
    own part and the mean of the other's."""
    args = pqn_vdn.Args(env_id="tiny_teams:Sum-v0", independent=independent, start_e=1, end_e=1, num_eval_envs=0)
    args = replace(args, learning_rate=1e-2, hidden_sizes=(32,), total_timesteps=40_000, num_minibatches=8)
    _, checkpoint = train(args)
    network = network_for((4,), actions=3, hidden_sizes=(32,))
    network.load_state_dict(checkpoint["network"])
    with torch.no_grad():
        q_values = network(torch.ones(1, 2, 7))[0].numpy()
    if independent:
        assert q_values == pytest.approx(tiny_teams.PAYS + tiny_teams.PAYS.mean(1)[::-1, None], abs=0.15)
    else:
        joint = q_values[0][:, None] + q_values[1]
        assert joint == pytest.approx(tiny_teams.PAYS[0][:, None] + tiny_teams.PAYS[1], abs=0.05)


# ------------------------------------------------------------------------------------------------ as a user runs it


@pytest.mark.parametrize(
    "options, hint",
    [
        ("--env-id CartPole-v1", "not for teams"),
        ("--env-id MMST-v0", "agents_view"),
        ("--env-id SearchAndRescue-v0", "action_mask"),
        ("--env-id LevelBasedForagin-v0", "LevelBasedForagin"),
        ("--num-minibatches 7", "1024"),
        ("--shaping-timesteps=-1", "--shaping-timesteps"),
        ("--total-timesteps 100", "1024"),
        ("--hidden-sizes 0", "--hidden-sizes"),
        ("--num-minibatches 1024 --norm-type batch_norm", "batch norm"),
    ],
)
def test_bad_options_get_one_line_and_exit_code_2_before_anything_is_written(options, hint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pqn_vdn.py", *options.split()])
    with pytest.raises(SystemExit) as exit:
        pqn_vdn.main(pqn_vdn.parse_args())
    output = capsys.readouterr()
    assert exit.value.code == 2 and output.err.startswith("error: ") and output.err.count("\n") == 1
    assert hint in output.err and output.out == "" and not Path("runs").exists()


BOX, BITS, ACTIONS = gym.spaces.Box(-9, 9, (2, 3)), gym.spaces.MultiBinary((2, 4)), gym.spaces.MultiDiscrete([4, 4])


@pytest.mark.parametrize(
    "view, mask, actions, hint",
    [
        (gym.spaces.Dict({"a": gym.spaces.Discrete(2)}), BITS, ACTIONS, "not for teams"),
        (gym.spaces.Box(-9, 9, (2,)), BITS, ACTIONS, "not for teams"),
        (gym.spaces.Box(-9, 9, (3, 3)), BITS, ACTIONS, "not for teams"),
        (gym.spaces.Box(-9, 9, (2, 0)), BITS, ACTIONS, "not for teams"),
        (BOX, gym.spaces.Dict({"a": gym.spaces.Discrete(2)}), ACTIONS, "not for teams"),
        (BOX, gym.spaces.Discrete(2), ACTIONS, "not for teams"),
        (BOX, gym.spaces.MultiBinary(2), ACTIONS, "not for teams"),
        (BOX, gym.spaces.MultiBinary((2, 4, 4)), ACTIONS, "not for teams"),
        (BOX, BITS, gym.spaces.Discrete(4), "for each agent"),
        (BOX, BITS, gym.spaces.MultiDiscrete([4, 4, 4]), "for each agent"),
        (BOX, BITS, gym.spaces.MultiDiscrete([4, 4], start=[1, 1]), "from 0 on"),
        (BOX, BITS, gym.spaces.Box(1, 4, (2,), np.int32), "from 0 on"),
        (BOX, BITS, gym.spaces.Box(-1, 1, (2,)), "Discrete"),
    ],
)
@pytest.mark.parametrize("script", [pqn_vdn, pqn_vdn_lstm])
def test_other_spaces_are_refused_in_one_line(script, view, mask, actions, hint, monkeypatch, capsys):
    parts = gym.spaces.Dict({"agents_view": view, "action_mask": mask})
    monkeypatch.setattr(tiny_teams.Team, "observation_space", parts)
    monkeypatch.setattr(tiny_teams.Team, "action_space", actions)
    monkeypatch.setattr(tiny_teams.Team, "show", lambda self: self.observation_space.sample())
    with pytest.raises(SystemExit) as exit:
        script.make_envs(script.Args(env_id="tiny_teams:Sum-v0"), 2, (1,))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and hint in error


def test_a_checkpoint_of_another_script_or_team_is_refused(train, capsys):
    folder, _ = train(replace(SMALL, env_id="tiny_teams:Sum-v0"))
    longer = dict(total_timesteps=168, resume=str(folder))
    for args, hint in (
        (pqn.Args(resume=str(folder)), "pqn_vdn.py"),
        (replace(SMALL, **longer, env_id="tiny_teams:Sum-v0", agent_index=False), "another network"),
    ):
        with pytest.raises(SystemExit) as exit:
            sys.modules[type(args).__module__].main(args)
        assert exit.value.code == 2 and hint in capsys.readouterr().err


def test_the_defaults_are_the_published_settings_for_overcooked():
    args = pqn_vdn.Args()
    names = "total_timesteps num_envs num_steps update_epochs num_minibatches start_e end_e exploration_fraction"
    names += " learning_rate anneal_lr gamma q_lambda max_grad_norm hidden_sizes reward_scale shaping_timesteps"
    values = [5e6, 64, 16, 4, 16, 1, 0.2, 0.2, 7.5e-5, True, 0.99, 0.5, 10, (512, 512), 1, 2.5e6]
    assert {name: getattr(args, name) for name in names.split()} == dict(zip(names.split(), values, strict=True))


def test_a_user_s_run_leaves_curves_and_an_agent_that_play_evaluates_and_shows(curves, capsys):
    options = "--total-timesteps 4200 --num-steps 32 --update-epochs 1 --hidden-sizes 32 --seed 3"
    command = [sys.executable, str(ROOT / "pqn_vdn.py"), *options.split()]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    (folder,) = Path("runs").glob("LevelBasedForaging-v0__pqn_vdn__3__*")
    assert str(folder) in result.stdout
    assert {"losses/td_loss", "charts/epsilon"} <= set(curves(folder))
    play.main(play.Args(str(folder), episodes=3))
    assert "3 greedy episodes" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # EnvPool cannot draw it, and what the agents see is no picture
        play.main(play.Args(str(folder), episodes=3, video="foraging.gif"))
    assert "error: no video" in capsys.readouterr().err and not Path("foraging.gif").exists()
