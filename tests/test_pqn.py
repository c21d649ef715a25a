"""pqn.py: the parts against slow, literal versions of the paper's equations, and the script as a user runs it."""

import importlib
import math
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from literal import target as literal_target

import play
import pqn

ROOT = Path(__file__).parents[1]
SMALL = pqn.Args(num_envs=4, num_steps=8, num_minibatches=2, update_epochs=1, total_timesteps=320, hidden_sizes=(16,))


@pytest.fixture(autouse=True)
def in_an_empty_folder(in_an_empty_folder):
    pass


# ------------------------------------------------------------------------------------------------- Q(λ) targets


def random_rollout(T, N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(*shape, generator=generator)
    return draw(T, N) - 0.5, draw(T + 1, N) * 3, draw(T, N) < 0.15, draw(T, N) < 0.15


@pytest.mark.parametrize("gamma, q_lambda", [(0.99, 0.65), (0.9, 0.0), (0.9, 1.0), (1.0, 0.95), (0.0, 0.5)])
@pytest.mark.parametrize("T", [1, 2, 9])
def test_targets_are_those_of_the_definition(T, gamma, q_lambda):
    rollout = random_rollout(T, 300)
    targets = pqn.q_lambda_targets(*rollout, gamma, q_lambda)
    for n in range(300):
        column = [x[:, n].tolist() for x in rollout]
        literal = [literal_target(t, *column, gamma, q_lambda) for t in range(T)]
        assert targets[:, n].tolist() == pytest.approx(literal, abs=1e-5)


def test_lambda_0_is_one_step_q_learning():
    rewards, values, terminated, truncated = random_rollout(9, 300)
    targets = pqn.q_lambda_targets(rewards, values, terminated, truncated, 0.9, 0.0)
    assert torch.allclose(targets, rewards + 0.9 * values[1:] * ~terminated)


def test_lambda_1_is_the_discounted_sum_up_to_the_end_of_the_episode_or_rollout():
    rewards, values, terminated, truncated = random_rollout(9, 300)
    targets = pqn.q_lambda_targets(rewards, values, terminated, truncated, 0.9, 1.0)
    for n in range(300):
        for t in range(9):
            end = next((k for k in range(t, 9) if terminated[k, n] or truncated[k, n]), 8)
            total = sum(0.9 ** (k - t) * rewards[k, n] for k in range(t, end + 1))
            if not terminated[end, n]:
                total += 0.9 ** (end + 1 - t) * values[end + 1, n]
            assert targets[t, n].item() == pytest.approx(total.item(), abs=1e-5)


@pytest.mark.parametrize("flag", ["terminated", "truncated"])
def test_no_trace_crosses_the_end_of_an_episode(flag):
    rewards, values, _, _ = random_rollout(6, 1)
    flags = {"terminated": torch.zeros(6, 1, dtype=torch.bool), "truncated": torch.zeros(6, 1, dtype=torch.bool)}
    flags[flag][2] = True
    before = pqn.q_lambda_targets(rewards, values, **flags, gamma=0.9, q_lambda=0.8)
    rewards[3:], values[4:] = 100.0, -100.0  # the phantom step 3, and all that comes after it
    after = pqn.q_lambda_targets(rewards, values, **flags, gamma=0.9, q_lambda=0.8)
    assert torch.equal(before[:3], after[:3])
    assert not torch.isclose(before[3:], after[3:]).any()


def test_a_truncation_bootstraps_and_a_termination_wins_where_both_are_reported():
    one, yes, no = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool)
    target = lambda terminated, truncated: pqn.q_lambda_targets(
        one, torch.full((2, 1), 7.0), terminated, truncated, 0.5, 0.9
    ).item()
    assert target(no, yes) == 1 + 0.5 * 7
    assert target(yes, no) == target(yes, yes) == 1


# ---------------------------------------------------------------------------------------- network and training step


def network_for(env_id="CartPole-v1", **options):
    args = replace(SMALL, env_id=env_id, **options)
    envs = pqn.make_envs(args, 1, (0,))
    return pqn.QNetwork(*pqn.spaces(envs), args), args


def test_the_network_is_equation_5_with_the_layernorm_of_equation_6():
    network, _ = network_for(hidden_sizes=(16,))
    M, b = network.body[0].weight, network.body[0].bias
    x = torch.randn(7, 4)
    f = x @ M.T + b
    k = f.shape[1]
    centred = f - f.sum(1, keepdim=True) / k
    eq6 = centred / torch.sqrt((centred**2).sum(1, keepdim=True) / k + 1e-6) / math.sqrt(k)
    assert torch.all(eq6.norm(dim=1) <= 1)
    # PyTorch's LayerNorm lacks the 1/√k; nothing normalises the output
    expected = torch.relu(math.sqrt(k) * eq6) @ network.head.weight.T + network.head.bias
    assert torch.allclose(network(x), expected, atol=1e-5)


def test_weights_start_lecun_normal_and_biases_at_zero():
    torch.manual_seed(0)
    network, _ = network_for(hidden_sizes=(400, 300))
    for layer in (network.body[0], network.body[3], network.head):
        std = 1 / math.sqrt(layer.in_features)
        assert layer.weight.std().item() == pytest.approx(std, rel=0.1)
        assert layer.weight.abs().max() <= 2 * std / 0.8796 + 1e-6
        assert not layer.bias.any()


def test_every_norm_type_is_what_it_says():
    kinds = {"layer_norm": torch.nn.LayerNorm, "batch_norm": torch.nn.BatchNorm1d, "none": torch.nn.Identity}
    for name, kind in kinds.items():
        assert isinstance(network_for(norm_type=name)[0].body[1], kind)
    # As Flax has them by default, which the authors use
    assert network_for()[0].body[1].eps == 1e-6 and network_for(norm_type="batch_norm")[0].body[1].momentum == 0.01
    network, _ = network_for(normalize_input=True)
    assert isinstance(network.body[0], torch.nn.BatchNorm1d) and network.body[0].num_features == 4


class GradientDescent(pqn.RAdam):
    """The plain step along the gradient that step() has clipped."""

    def __init__(self, network, max_grad_norm, learning_rate):
        super().__init__(network, max_grad_norm, beta1=0.0)
        self.plain.fill_(learning_rate)


def network_for_pictures(*shape, **options):
    space = gym.spaces.Box(-np.inf, np.inf, shape, np.float32)
    return pqn.QNetwork(space, gym.spaces.Discrete(2), replace(pqn.Args(), hidden_sizes=(8,), **options)).eval()


@pytest.mark.parametrize("norm_type", ["layer_norm", "batch_norm", "none"])
def test_pictures_pass_through_a_convolution_with_its_norm_over_the_channels_of_each_position(norm_type):
    network, obs = network_for_pictures(6, 5, 4, conv_channels=7, norm_type=norm_type), torch.randn(3, 6, 5, 4)
    convolution, linear, norm = network.body[1], network.body[6], pqn.norm_layer(norm_type, 7).eval()
    for parameter in network.body[:3].parameters():
        torch.nn.init.normal_(parameter)
    norm.load_state_dict(network.body[2].state_dict())
    expected = torch.zeros(3, 4, 3, 7)
    for i in range(4):
        for j in range(3):
            patch = obs[:, i : i + 3, j : j + 3].permute(0, 3, 1, 2)  # channels first, as the weights have them
            expected[:, i, j] = norm((patch.unsqueeze(1) * convolution.weight).sum((2, 3, 4)) + convolution.bias).relu()
    torch.testing.assert_close(network.body[:6](obs.flatten(1)), expected.flatten(1))
    assert linear.in_features == 4 * 3 * 7
    torch.testing.assert_close(network(obs), network.head(network.body[6:](expected.flatten(1))))


def test_the_convolution_starts_he_normal():
    weight = network_for_pictures(6, 5, 4, conv_channels=5_000).body[1].weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 36), rel=0.02)


def test_pictures_are_flattened_on_request_or_where_no_patch_fits():
    obs = torch.randn(3, 6, 5, 4)
    network = network_for_pictures(6, 5, 4, conv_channels=0)
    torch.testing.assert_close(network(obs), network.head(network.body(obs.flatten(1))))
    assert network.body[0].in_features == 6 * 5 * 4 and network_for_pictures(2, 9, 1).body[0].in_features == 18


def test_one_step_of_one_environment_is_equation_1():
    torch.manual_seed(0)
    network, args = network_for(max_grad_norm=1e6)
    reference, _ = network_for()
    reference.load_state_dict(network.state_dict())
    optimizer = GradientDescent(network, args.max_grad_norm, learning_rate=0.05)
    state, action, reward, successor = torch.randn(1, 4), torch.tensor([1]), 0.7, torch.randn(1, 4)

    values = torch.stack([network(s).detach().max(1).values for s in (state, successor)])
    never = torch.zeros(1, 1, dtype=torch.bool)
    targets = pqn.q_lambda_targets(torch.tensor([[reward]]), values, never, never, 0.9, 0.0)
    pqn.train_step(network, optimizer, args, state, action, targets[0], ~never[0], torch.tensor(1))

    q_value = reference(state)[0, 1]
    delta = reward + 0.9 * reference(successor).max().item() - q_value.item()
    q_value.backward()
    expected = torch.cat([(p + 0.05 * delta * p.grad).flatten() for p in reference.parameters()])
    assert torch.allclose(optimizer.weights, expected, atol=1e-6)


@pytest.mark.parametrize("script", ["pqn", "pqn_atari_envpool", "pqn_atari_lstm", "pqn_lstm"])
def test_radam_is_pytorchs_after_clipping(script):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(30, 40), torch.nn.Linear(40, 5)]
    theirs = [p.detach().clone().requires_grad_() for layer in layers for p in layer.parameters()]
    network = torch.nn.Sequential(*layers)
    optimizer, reference = importlib.import_module(script).RAdam(network, 3.0), torch.optim.RAdam(theirs)
    for t in range(50):  # of which the first five are plain momentum
        learning_rate = 0.1 * (1 - t / 100)
        scale = 10 ** (t % 5 - 3)  # some gradients are longer than 3, others shorter
        for p, reference_p in zip(network.parameters(), theirs, strict=True):
            reference_p.grad = scale * torch.randn_like(p)
            p.grad.copy_(reference_p.grad)
        reference.param_groups[0]["lr"] = learning_rate
        expected = torch.nn.utils.clip_grad_norm_(theirs, 3.0)
        optimizer.prepare(learning_rate)
        assert optimizer.step().item() == pytest.approx(expected.item())
        reference.step()
        for p, reference_p in zip(network.parameters(), theirs, strict=True):
            assert torch.allclose(p, reference_p, rtol=1e-4, atol=1e-5), t


@pytest.mark.parametrize("max_grad_norm, clipped", [(0.01, True), (1e3, False)])
def test_the_gradient_is_clipped_to_its_norm(max_grad_norm, clipped):
    network, args = network_for(max_grad_norm=max_grad_norm)
    optimizer = GradientDescent(network, max_grad_norm, learning_rate=1.0)
    loss, _ = pqn.td_loss(network, *minibatch(), 0.0)
    loss.backward()
    gradient, before = optimizer.gradient.clone(), optimizer.weights.clone()
    _, _, norm = pqn.train_step(network, optimizer, args, *minibatch())
    assert norm.item() == pytest.approx(gradient.norm().item()) and norm > 0.01
    expected = gradient * (max_grad_norm / norm if clipped else 1)
    assert torch.allclose(before - optimizer.weights, expected, rtol=1e-3, atol=1e-6)


def minibatch(size=6):
    torch.manual_seed(3)
    real = torch.tensor([True, False, True, True, False, True])[:size]
    return torch.randn(size, 4), torch.randint(2, (size,)), torch.randn(size), real, real.sum()


@pytest.mark.parametrize("norm_type", ["layer_norm", "none"])
def test_phantoms_change_neither_loss_nor_gradient(norm_type):
    torch.manual_seed(0)
    network, _ = network_for(norm_type=norm_type)
    optimizer = pqn.RAdam(network, 10.0)

    def loss_and_gradient(obs, actions, targets, real):
        optimizer.gradient.zero_()
        loss, q_value = pqn.td_loss(network, obs, actions, targets, real, real.sum(), 0.0)
        loss.backward()
        return loss.item(), q_value.item(), optimizer.gradient.clone()

    obs, actions, targets, real, _ = minibatch()
    loss, q_value, gradient = loss_and_gradient(obs, actions, targets, real)
    changed = torch.where(real, targets, torch.tensor([0, 1e6, 0, 0, float("nan"), 0]))
    other = torch.where(real, actions, 1 - actions), changed
    loss2, q_value2, gradient2 = loss_and_gradient(obs, *other, real)
    assert (loss, q_value) == (loss2, q_value2) and torch.equal(gradient, gradient2)
    # and the mean is over the real ones
    alone = loss_and_gradient(obs[real], actions[real], targets[real], real[real])
    assert (loss, q_value) == pytest.approx(alone[:2], abs=1e-6) and torch.allclose(gradient, alone[2], atol=1e-6)


def test_a_minibatch_of_phantoms_changes_no_weight_and_no_optimiser_state(train):
    # Every episode of BothFlags is one step long: the second step is a phantom, and a minibatch by itself.
    one_step = dict(num_envs=1, num_steps=1, num_minibatches=1, num_eval_envs=0, schedule_timesteps=100)
    args = replace(SMALL, env_id="tiny_envs:BothFlags-v0", l2_coef=0.1, **one_step)
    results = [train(replace(args, total_timesteps=steps))[1] for steps in (1, 2, 3)]
    flat = lambda checkpoint: torch.cat([w.flatten() for w in checkpoint["network"].values()])
    state = lambda checkpoint: checkpoint["optimizer"]
    assert torch.equal(flat(results[0]), flat(results[1]))
    assert not torch.equal(flat(results[1]), flat(results[2]))
    assert [state(r)["steps"] for r in results] == [1, 1, 2]
    assert torch.equal(state(results[0])["mean"], state(results[1])["mean"])
    assert torch.equal(state(results[0])["square"], state(results[1])["square"])


def test_minibatches_of_phantoms_are_found_among_shuffled_ones(train, curves):
    # Half of each rollout are phantoms, and every minibatch is one transition.
    sizes = dict(num_envs=2, num_steps=2, num_minibatches=4, num_eval_envs=0, update_epochs=3, total_timesteps=80)
    folder, checkpoint = train(replace(SMALL, env_id="tiny_envs:BothFlags-v0", **sizes))
    assert checkpoint["optimizer"]["steps"] == 20 * 3 * 2
    assert all(math.isfinite(loss) for _, loss in curves(folder)["losses/td_loss"])


def test_l2_regularises_the_weights_of_the_last_layer_alone():
    network, _ = network_for()
    gradients = []
    for coefficient in (0.0, 0.3):
        network.zero_grad()
        pqn.td_loss(network, *minibatch(), coefficient)[0].backward()
        gradients.append({name: p.grad.clone() for name, p in network.named_parameters()})
    for name, p in network.named_parameters():
        extra = 0.3 * p.detach() if name == "head.weight" else torch.zeros_like(p)
        assert torch.allclose(gradients[1][name] - gradients[0][name], extra, atol=1e-6)


def test_the_optimiser_s_one_tensor_leaves_the_network_as_it_was_and_collect_every_gradient():
    network, _ = network_for(norm_type="batch_norm", hidden_sizes=(16, 8))
    x = torch.randn(9, 4)
    network.eval()
    before, named = network(x), {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = pqn.RAdam(network, 10.0)
    assert torch.equal(network(x), before)
    network(x).sum().backward()
    assert torch.equal(optimizer.gradient, torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert optimizer.gradient.any()
    optimizer.weights.mul_(2)
    assert all(torch.equal(p, 2 * named[name]) for name, p in network.named_parameters())


# --------------------------------------------------------------------------------------------------- environments


def collector_for(env_id, **options):
    args = replace(SMALL, env_id=env_id, **options)
    envs = pqn.make_envs(args, args.num_envs + args.num_eval_envs, (args.seed, 0))
    network = pqn.QNetwork(*pqn.spaces(envs), args)
    return pqn.Collector(envs, network, args, torch.device("cpu"))


@pytest.mark.parametrize("env_id", ["CartPole-v1", "tiny_envs:TimeLimited-v0"])
def test_returns_and_lengths_are_those_of_whole_episodes(env_id, monkeypatch):
    collector = collector_for(env_id, num_envs=3, num_eval_envs=2, num_steps=40)
    played = {i: [0] for i in range(5)}  # the lengths that the flags tell, counted one step at a time
    finished = []
    step_envs = pqn.step_envs

    def counting(envs, actions):
        result = step_envs(envs, actions)
        for i in range(5):
            if played[i][-1] == "ended":
                played[i][-1] = 0
            else:
                played[i][-1] += 1
                if result[2][i] or result[3][i]:
                    played[i].append("ended")
        return result

    monkeypatch.setattr(pqn, "step_envs", counting)
    for _ in range(8):
        _, train_episodes, eval_episodes = collector.collect(1.0)
        assert {i for i, _, _ in train_episodes} <= {0, 1, 2} and {i for i, _, _ in eval_episodes} <= {3, 4}
        finished += train_episodes + eval_episodes
    assert len(finished) >= 10
    for i in range(5):
        lengths = [length for env, _, length in finished if env == i]
        assert lengths == [n for n in played[i] if n != "ended"][: len(lengths)]
    assert all(episode_return == length for _, episode_return, length in finished)  # both pay 1 a step
    if "TimeLimited" in env_id:
        assert {length for _, _, length in finished} == {5}


@pytest.mark.parametrize("env_id, ends", [("TimeLimited-v0", "truncated"), ("Terminating-v0", "terminated")])
def test_the_step_after_an_episode_is_the_phantom(env_id, ends):
    collector = collector_for(f"tiny_envs:{env_id}", num_steps=20)
    for _ in range(2):  # the second rollout starts within an episode
        obs, _, _, rewards, terminated, truncated, real = collector.collect(1.0)[0]
        end = {"terminated": terminated, "truncated": truncated}
        assert torch.equal(real, obs != 5)  # the fifth step shows 5, and only a phantom starts there
        assert torch.equal(end.pop(ends), obs == 4) and not end.popitem()[1].any()
        assert torch.equal(rewards, real.float())
        assert torch.equal(obs[1:], (obs[:-1] + 1) % 6)


def test_greedy_environments_ignore_epsilon_and_training_ones_follow_it():
    collector = collector_for("CartPole-v1", num_envs=200, num_eval_envs=100, num_steps=1)
    collector.obs.copy_(torch.randn_like(collector.obs))
    greedy = collector.act.args[0](collector.obs).argmax(1)
    always, never = torch.ones(200, dtype=torch.bool), torch.zeros(200, dtype=torch.bool)
    opposite = 1 - greedy[:200]
    actions, values = collector.act(collector.obs, always, opposite)
    assert torch.equal(actions, torch.cat([opposite, greedy[200:]]))
    assert torch.equal(values, collector.act.args[0](collector.obs).max(1).values[:200])
    assert torch.equal(collector.act(collector.obs, never, opposite)[0], greedy)
    stored = collector.collect(0.5)[0][1]
    assert stored.shape == (1, 200)


def test_the_streams_of_neighbouring_seeds_do_not_overlap():
    starts = [pqn.make_envs(SMALL, 64, (seed, step)).reset()[0] for seed in (1, 2, 3) for step in (0, 2048)]
    rows = np.concatenate(starts)
    assert len(np.unique(rows, axis=0)) == len(rows)
    gymnasium = replace(SMALL, env_id="tiny_envs:Offset-v0")
    draws = [[e.unwrapped.np_random.random() for e in pqn.make_envs(gymnasium, 8, (s, 0)).envs] for s in (1, 2, 3)]
    assert len(np.unique(draws)) == 24


@pytest.mark.parametrize(
    "name, env_id",
    [
        *((name, "CartPole-v1") for name in ("pqn", "pqn_lstm", "offline_dqn")),
        *((name, "Pong-v5") for name in ("pqn_atari_envpool", "pqn_atari_lstm")),
        *((name, "LevelBasedForaging-v0") for name in ("pqn_vdn", "pqn_vdn_lstm")),
        ("preqn", "HalfCheetah-v5"),
    ],
)
def test_in_every_script_every_environment_has_a_stream_of_its_own(name, env_id, monkeypatch):
    script, given = importlib.import_module(name), []

    def make(*args, seed, **options):
        given.extend(seed)
        raise OSError

    monkeypatch.setattr(script.envpool, "make", make)
    for seed in ((1, 0, 0), (2, 0, 0), (1, 64, 0), (1, 0, 1 << 32)):  # seed, step, process
        with pytest.raises(SystemExit):
            script.make_envs(script.Args(env_id=env_id), 5, seed)
    assert len(set(given)) == 20


def test_the_same_seed_gives_the_same_streams():
    starts = [pqn.make_envs(SMALL, 8, (1, 0)).reset()[0] for _ in range(2)]
    assert np.array_equal(*starts)


# ------------------------------------------------------------------------------------------------ the whole script


@pytest.mark.parametrize("env_id", ["TimeLimitedCycle-v0", "Terminating-v0"])
def test_a_time_limit_does_not_lower_values_and_a_termination_does(env_id, train):
    options = dict(num_envs=8, num_steps=10, num_minibatches=1, num_eval_envs=0, total_timesteps=24_000, gamma=0.9)
    options |= dict(learning_rate=0.01, reward_scale=1.0, hidden_sizes=(64,))
    _, checkpoint = train(replace(SMALL, env_id=f"tiny_envs:{env_id}", **options))
    args = pqn.Args(**checkpoint["args"])
    network = pqn.QNetwork(*pqn.spaces(pqn.make_envs(args, 1, (0,))), args)
    network.load_state_dict(checkpoint["network"])
    values = network(torch.arange(5)).max(1).values.tolist()
    endless = [1 / (1 - 0.9)] * 5
    finite = [sum(0.9**k for k in range(5 - i)) for i in range(5)]
    assert values == pytest.approx(endless if env_id == "TimeLimitedCycle-v0" else finite, rel=0.05)


def test_a_user_s_run_leaves_curves_and_an_agent_that_play_evaluates_and_shows(curves, capsys):
    command = [sys.executable, str(ROOT / "pqn.py"), *"--total-timesteps 6200 --hidden-sizes 32 32 --seed 3".split()]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    (folder,) = Path("runs").glob("CartPole-v1__pqn__3__*")
    assert str(folder) in result.stdout and "\r" not in result.stdout
    points = curves(folder)
    names = "charts/episodic_return charts/episodic_length charts/SPS charts/learning_rate charts/epsilon "
    names += "losses/td_loss losses/q_values losses/grad_norm eval/episodic_return eval/episodic_length"
    assert set(points) == set(names.split())
    assert [step for step, _ in points["charts/epsilon"]] == [2048, 4096, 6144]
    assert points["charts/epsilon"][0][1] == 1 and points["charts/epsilon"][-1][1] == pytest.approx(0.2)
    assert all(0 < speed < 1e7 for _, speed in points["charts/SPS"])

    play.main(play.Args(str(folder), episodes=5, video="cartpole.mp4"))
    output = capsys.readouterr()
    assert "5 greedy episodes" in output.out and "training" in output.out and output.err == ""
    import imageio.v2 as imageio

    frames = imageio.mimread("cartpole.mp4", memtest=False)
    assert len(frames) > 5 and np.std(frames[0]) > 1 and not np.array_equal(frames[0], frames[-1])


def test_the_same_seed_gives_the_same_curves_and_weights_and_another_does_not(train, curves):
    args = replace(SMALL, total_timesteps=1600, log_interval=32)
    (a, first), (b, second), (_, other) = train(args), train(args), train(replace(args, seed=2))
    assert {n: p for n, p in curves(a).items() if n != "charts/SPS"} == {
        n: p for n, p in curves(b).items() if n != "charts/SPS"
    }
    assert len(curves(a)["losses/td_loss"]) == 50
    for name, weight in first["network"].items():
        assert torch.equal(weight, second["network"][name])
    assert not torch.equal(first["network"]["head.weight"], other["network"]["head.weight"])


def test_greedy_environments_do_not_change_what_is_learned(train):
    weights = [train(replace(SMALL, num_eval_envs=n))[1]["network"]["head.weight"] for n in (0, 5)]
    assert torch.allclose(*weights, atol=1e-6)


def test_broken_off_twice_and_resumed_a_run_ends_where_it_would_have(heeded_signals, train, curves, monkeypatch):
    args = replace(SMALL, num_envs=8, num_steps=25, num_eval_envs=0, total_timesteps=6_000)
    args = replace(args, log_interval=200, checkpoint_interval=1_000)
    collect, calls = pqn.Collector.collect, []

    def broken_off(*rollout):
        calls.append(len(calls))
        if len(calls) == 20:  # at step 3,800, of which the 800 since the last checkpoint are lost
            raise RuntimeError
        if len(calls) == 25:  # ends after this rollout, the fifth since step 3,000
            signal.raise_signal(signal.SIGTERM)
        return collect(*rollout)

    monkeypatch.setattr(pqn.Collector, "collect", broken_off)
    for code, step in ((1, 3_000), (128 + signal.SIGTERM, 4_000)):
        with pytest.raises(SystemExit) as exit:
            train(args)
        (folder,) = Path("runs").glob("*")
        stopped = torch.load(folder / "checkpoint.pt", weights_only=True)
        assert (exit.value.code, stopped["step"]) == (code, step)
        args = replace(pqn.Args(**stopped["args"]), resume=str(folder))
    _, checkpoint = train(args)
    assert checkpoint["step"] == 6_000 and checkpoint["optimizer"]["steps"] == 6_000 / 200 * 2
    points = curves(folder)
    assert [step for step, _ in points["charts/epsilon"]] == list(range(200, 6_001, 200))
    for step, value in points["charts/epsilon"]:
        assert value == pytest.approx(pqn.linear_schedule(1.0, 0.2, step - 200, 0.2 * 6_000))
    for step, value in points["charts/learning_rate"]:
        assert value == pytest.approx(1e-4 * (1 - (step - 100) / 6_000), abs=1e-9)


def test_a_resumed_run_keeps_its_schedules_beyond_its_first_length(monkeypatch, capsys, train, curves):
    folder, _ = train(replace(SMALL, log_interval=32))
    monkeypatch.setattr(sys, "argv", ["pqn.py", "--resume", str(folder), "--total-timesteps", "640"])
    args = pqn.parse_args()
    assert (args.total_timesteps, args.schedule_timesteps, args.hidden_sizes) == (640, 320, (16,))
    _, checkpoint = train(args)
    assert checkpoint["step"] == 640
    assert "the learning rate is 0" in capsys.readouterr().out
    points = curves(folder)
    assert [value for step, value in points["charts/learning_rate"] if step > 320] == [0.0] * 10
    assert [value for step, value in points["charts/epsilon"] if step > 320] == pytest.approx([0.2] * 10)


def test_a_resumed_run_has_the_random_state_of_one_run_and_fresh_environments(train, monkeypatch):
    folder, first = train(SMALL)
    args = replace(pqn.Args(**first["args"]), resume=str(folder), total_timesteps=352)
    seen, make_envs = [], pqn.make_envs
    monkeypatch.setattr(pqn, "make_envs", lambda args, n, seed: seen.append(seed) or make_envs(args, n, seed))
    _, second = train(args)
    assert seen == [(1, 320, 0)]
    torch.set_rng_state(first["rng_state"])
    torch.rand(8, 4), torch.randint(2, (8, 4)), torch.randperm(32)  # one rollout's exploration, one epoch's shuffle
    assert torch.equal(torch.get_rng_state(), second["rng_state"])


@pytest.mark.parametrize(
    "env_id", ["FrozenLake-v1", "Blackjack-v1", "tiny_envs:BothFlags-v0", "Catch-v0", "tiny_envs:Scalar-v0"]
)
@pytest.mark.parametrize("options", [{}, {"norm_type": "batch_norm", "normalize_input": True}])
def test_other_observations_and_norms_run(env_id, options, train, curves):
    folder, checkpoint = train(replace(SMALL, env_id=env_id, **options))
    assert checkpoint["step"] == 320 and "losses/td_loss" in curves(folder)


def test_spaces_that_do_not_start_at_zero(train):
    options = dict(total_timesteps=16_000, learning_rate=3e-3, hidden_sizes=(64,), gamma=0.5, q_lambda=0.0)
    _, checkpoint = train(replace(SMALL, env_id="tiny_envs:Offset-v0", **options))
    args = pqn.Args(**checkpoint["args"])
    network = pqn.QNetwork(*pqn.spaces(pqn.make_envs(args, 1, (0,))), args)
    network.load_state_dict(checkpoint["network"])
    shown = torch.arange(3, 7)
    assert torch.equal(network(shown).argmax(1), shown % 3)


def test_main_leaves_the_options_of_its_caller_as_they_were():
    args = replace(SMALL)
    before = asdict(args)
    pqn.main(args)
    assert asdict(args) == before


def test_batch_norm_collects_statistics_and_acts_by_them(train):
    _, checkpoint = train(replace(SMALL, normalize_input=True))
    assert checkpoint["network"]["body.0.num_batches_tracked"] == 20
    assert checkpoint["network"]["body.0.running_mean"].any()


@pytest.mark.parametrize(
    "env_id, options, threshold",
    [
        # The best score of Catch is 1, a random one is −0.6; CartPole's are 500 and 22.
        ("Catch-v0", dict(total_timesteps=80_000, learning_rate=2e-3, end_e=0.05, num_steps=32), 0.9),
        ("CartPole-v1", dict(total_timesteps=150_000, learning_rate=1e-3), 400),
    ],
)
def test_it_learns(env_id, options, threshold, train):
    folder, _ = train(pqn.Args(env_id=env_id, num_eval_envs=0, hidden_sizes=(64, 64), num_minibatches=8, **options))
    assert np.mean(play.main(play.Args(str(folder), episodes=50))) >= threshold


@pytest.mark.parametrize(
    "options, checkpoint",
    [
        (["nowhere"], {}),
        (["FOLDER", "--video", "x.avi"], {}),
        (["FOLDER", "--video", ".gif"], {}),
        (["FOLDER", "--video", "nowhere/x.gif"], {}),
        (["FOLDER", "--episodes", "0"], {}),
        (["FOLDER"], {"script": "baird"}),
        (["FOLDER"], {"script": 3}),
        (["FOLDER"], {"args": {"env_id": "CartPole-v1", "from_another_time": 1}}),
        (["FOLDER"], {"network": {}}),
    ],
)
def test_play_refuses_bad_input(options, checkpoint, train, monkeypatch, capsys):
    folder, good = train(SMALL)
    torch.save(good | checkpoint, folder / "checkpoint.pt")
    capsys.readouterr()
    options = [str(folder) if option == "FOLDER" else option for option in options]
    monkeypatch.setattr(sys, "argv", ["play.py", *options])
    with pytest.raises(SystemExit) as exit:
        play.main(play.tyro.cli(play.Args))
    assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1
