"""pqn_atari_envpool.py: what it does differently from pqn.py, whose tests cover the blocks that the two share."""

import ast
import gc
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import play
import pqn_atari_envpool as atari

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SMALL = atari.Args(
    env_id="Pong-v5", num_envs=4, num_steps=8, num_eval_envs=2, num_minibatches=2, total_timesteps=64, precision="fp32"
)


@pytest.fixture(autouse=True)
def in_an_empty_folder(in_an_empty_folder):
    pass


def network_for(**options):
    args = replace(SMALL, **options)
    return atari.QNetwork(*atari.spaces(atari.make_envs(args, 1, (0,))), args)


def collector_for(**options):
    torch.manual_seed(0)
    args = replace(SMALL, **options)
    envs = atari.make_envs(args, args.num_envs + args.num_eval_envs, (args.seed, 0))
    return atari.Collector(envs, atari.QNetwork(*atari.spaces(envs), args), args, CPU)


def test_what_the_scripts_share_is_the_same_text(what_a_script_consists_of):
    ours, theirs = what_a_script_consists_of("pqn_atari_envpool.py"), what_a_script_consists_of("pqn.py")
    differ = "Args make_envs spaces step_envs Collector QNetwork norm_layer check main".split()  # the algorithm does
    assert {name for name in set(ours) & set(theirs) if ours[name] != theirs[name]} == set(differ)


# -------------------------------------------------------------------------------------------------------- network


def test_the_network_is_the_nature_cnn_with_a_norm_after_every_layer_but_the_last():
    network = network_for(stack_num=3, full_action_space=True)
    obs = torch.randint(0, 256, (5, 3, 84, 84), dtype=torch.uint8)
    shapes = []
    for module in network.body:
        module.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape[1:])))
    assert network(obs).shape == (5, 18) and network(obs).dtype == torch.float32
    assert shapes[:13:3] == [(32, 20, 20), (64, 9, 9), (64, 7, 7), (3136,), (512,)]
    kinds = [type(module).__name__ for module in network.body]
    assert kinds == ["Conv2d", "ChannelLayerNorm", "ReLU"] * 3 + ["Flatten", "Linear", "LayerNorm", "ReLU"]
    scales = [module.weight.numel() for module in network.body if isinstance(module, torch.nn.LayerNorm)]
    assert scales == [32, 64, 64, 512]


def normalises_each_position_by_itself(norm):
    x = torch.randn(2, 32, 20, 20)
    before = norm(x)
    x[:, :, :10] = 100 * torch.randn(2, 32, 10, 20)  # the other half of the positions
    alone = torch.allclose(norm(x)[:, :, 10:], before[:, :, 10:], atol=1e-5)
    channels = before[:, :, 3, 5]
    return alone and torch.allclose(channels.mean(1), torch.zeros(2), atol=1e-5)


def test_layernorm_is_over_the_channels_at_each_position():
    assert normalises_each_position_by_itself(atari.norm_layer("layer_norm", 32, 20, 20))
    for other in ("layer_norm_map", "batch_norm", "none"):
        assert not normalises_each_position_by_itself(atari.norm_layer(other, 32, 20, 20)), other


def test_layernorm_is_equation_6_at_every_position():
    x = torch.randn(3, 32, 4, 5)
    mean = x.mean(1, keepdim=True)
    eq6 = (x - mean) / torch.sqrt(((x - mean) ** 2).mean(1, keepdim=True) + 1e-6) / 32**0.5
    assert torch.allclose(atari.norm_layer("layer_norm", 32, 4, 5)(x), 32**0.5 * eq6, atol=1e-5)


@pytest.mark.parametrize("positions", [(), (20, 20)])
def test_norms_have_the_constants_of_flax_which_the_authors_use(positions):
    assert atari.norm_layer("layer_norm", 32, *positions).eps == 1e-6
    assert atari.norm_layer("batch_norm", 32, *positions).momentum == 0.01


def test_the_whole_map_norm_is_the_one_of_other_ports():
    norm = atari.norm_layer("layer_norm_map", 32, 20, 20)
    assert norm.weight.shape == (32, 20, 20)
    assert norm(torch.randn(2, 32, 20, 20) * 5 + 3).mean((1, 2, 3)).abs().max() < 1e-5


def test_weights_start_he_normal_and_in_the_output_layer_lecun_normal():
    torch.manual_seed(0)
    for layer in network_for().modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            scale = 1 if layer.weight.shape[0] == 6 else 2
            assert layer.weight.std().item() == pytest.approx((scale / layer.weight[0].numel()) ** 0.5, rel=0.05)
            assert not layer.bias.any()


def test_bf16_computes_nearly_the_same_q_values_and_gradients():
    networks = [network_for(precision=precision) for precision in ("fp32", "bf16")]
    networks[1].load_state_dict(networks[0].state_dict())
    obs = collector_for(num_envs=8, num_eval_envs=0).obs
    data = obs, torch.arange(8) % 6, torch.randn(8), torch.ones(8, dtype=torch.bool), torch.tensor(8)
    q_values, gradients = [], []
    for network in networks:
        q_values.append(network(obs))
        atari.td_loss(network, *data, 0.0)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert q_values[1].dtype == torch.float32 and not torch.equal(*q_values)
    assert torch.allclose(*q_values, atol=0.05)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


# ----------------------------------------------------------------------------------------------------- environments


def test_observations_are_uint8_from_the_game_to_the_network():
    collector = collector_for()
    seen = []
    collector.act.args[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    obs = collector.collect(1.0)[0][0]
    assert {obs.dtype, collector.obs.dtype, collector.host_obs.dtype, *seen} == {torch.uint8}
    assert obs.shape == (8, 4, 4, 84, 84) and obs.float().std() > 1


def decimal(byte):
    return (byte >> 4) * 10 + (byte & 15)


@pytest.mark.parametrize("game, hundreds, units", [("Breakout-v5", 76, 77), ("SpaceInvaders-v5", 102, 104)])
def test_returns_are_the_scores_that_the_console_itself_counts(game, hundreds, units, small_body):
    """The game keeps its score in the console's memory, in decimal digits; rewards are clipped and lives are lost."""
    scores, lost_lives, clipped = {}, [], []
    collector = collector_for(env_id=game, num_envs=4, num_steps=50)
    step = collector.envs.step

    def watch(actions):
        obs, rewards, terminated, truncated, info = step(actions)
        clipped.extend(rewards)
        lost_lives.extend(terminated & (info["terminated"] == 0))
        for i in np.flatnonzero(info["terminated"]):
            ram = info["ram"][i].astype(int)
            scores.setdefault(int(i), []).append(100 * (decimal(ram[hundreds]) % 100) + decimal(ram[units]))
        return obs, rewards, terminated, truncated, info

    collector.envs = type("Watched", (), {"step": staticmethod(watch), "action_space": collector.envs.action_space})()
    finished = []
    while len(finished) < 8:
        _, train_episodes, eval_episodes = collector.collect(1.0)
        finished += train_episodes + eval_episodes
    assert {i: [score for env, score, _ in finished if env == i] for i in scores} == scores
    assert any(lost_lives) and max(clipped) == 1 and sum(map(sum, scores.values())) > 0


def test_a_lost_life_ends_the_trace_but_not_the_game(small_body):
    collector = collector_for(env_id="Breakout-v5", num_steps=110, num_eval_envs=0)
    rollout, finished, _ = collector.collect(1.0)
    _, _, _, _, terminated, truncated, real = rollout
    assert terminated.sum() >= 4 and not finished and not truncated.any()
    assert torch.equal(~real[1:], terminated[:-1])
    assert collector.lengths.tolist() == real.sum(0).tolist()  # phantoms are not counted
    whole = collector_for(env_id="Breakout-v5", num_steps=110, num_eval_envs=0, episodic_life=False)
    assert not whole.collect(1.0)[0][4].any()


def test_the_time_limit_bootstraps_and_ends_the_game(small_body):
    collector = collector_for(max_episode_steps=6, num_steps=14)
    rollout, finished, finished_eval = collector.collect(1.0)
    _, _, _, _, terminated, truncated, real = rollout
    assert not terminated.any()
    assert torch.equal(truncated.any(1).nonzero().flatten(), torch.tensor([5, 12]))
    assert torch.equal((~real).any(1).nonzero().flatten(), torch.tensor([6, 13]))
    assert [length for _, _, length in finished + finished_eval] == [6] * 12


def test_a_game_over_on_the_last_step_of_the_time_limit_does_not_bootstrap():
    def play_to_the_end(**options):
        envs = atari.make_envs(replace(SMALL, env_id="Breakout-v5", num_envs=1, **options), 1, (3,))
        envs.reset()
        step, elapsed, over = envs.step, 0, False
        while not over:
            info = step(np.array([1], dtype=np.int32))
            envs.step = lambda _, result=info: result
            _, _, terminated, truncated, _, (over,) = atari.step_envs(envs, np.array([1]))
            elapsed = int(info[4]["elapsed_step"][0])
        return bool(terminated[0]), bool(truncated[0]), elapsed

    terminated, truncated, length = play_to_the_end()
    assert terminated and not truncated
    assert play_to_the_end(max_episode_steps=length) == (True, True, length)
    assert play_to_the_end(max_episode_steps=length - 1) == (False, True, length - 1)


def test_every_atari_option_reaches_envpool(monkeypatch):
    changed = dict(
        episodic_life=False,
        reward_clip=False,
        repeat_action_probability=0.25,
        frame_skip=3,
        stack_num=2,
        noop_max=7,
        use_fire_reset=False,
        full_action_space=True,
        max_episode_steps=99,
    )
    assert all(getattr(atari.Args(), name) != value for name, value in changed.items())
    envs = atari.make_envs(replace(SMALL, **changed), 2, (0,))
    config = envs.spec.config
    assert {name: getattr(config, name) for name in changed} == changed
    assert envs.action_space.n == 18 and envs.reset()[0].shape == (2, 2, 84, 84)


@pytest.mark.parametrize("game", ["UpNDown-v5", "Jamesbond-v5", "PrivateEye-v5", "Et-v5"])
def test_games_whose_names_are_several_words_can_be_made(game):
    assert atari.make_envs(replace(SMALL, env_id=game), 1, (0,)).reset()[0].shape == (1, 4, 84, 84)


# -------------------------------------------------------------------------------------------------- the whole script


@pytest.mark.parametrize("game", ["Pong-v5", "Adventure-v5"])  # Adventure's picture is not as high as Pong's
def test_a_run_can_be_resumed_played_and_filmed(game, train, curves, small_body):
    options = dict(num_steps=16, num_minibatches=4, max_episode_steps=20, log_interval=64)
    folder, checkpoint = train(replace(SMALL, env_id=game, total_timesteps=256, **options))
    assert folder.name.startswith(f"{game}__pqn_atari_envpool__1__") and checkpoint["step"] == 256
    _, checkpoint = train(replace(atari.Args(**checkpoint["args"]), resume=str(folder), total_timesteps=384))
    assert checkpoint["step"] == 384 and checkpoint["args"]["max_episode_steps"] == 20
    assert checkpoint["optimizer"]["steps"] == 384 / 64 * 8
    points = curves(folder)
    assert [step for step, _ in points["losses/td_loss"]] == list(range(64, 385, 64))
    assert len(points["charts/episodic_return"]) > 0

    play.main(play.Args(str(folder), episodes=3, video="game.gif"))
    import imageio.v2 as imageio

    frames = imageio.mimread("game.gif")
    assert len(frames) >= 10 and frames[0].shape[:2] == (210, 160)


def test_the_same_seed_gives_the_same_weights(train):
    weights = [train(replace(SMALL, device="cpu"))[1]["network"] for _ in range(2)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_main_leaves_the_options_of_its_caller_as_they_were():
    args = replace(SMALL, precision="auto")
    before = asdict(args)
    atari.main(args)
    assert asdict(args) == before


@pytest.mark.parametrize("norm_type", ["layer_norm_map", "batch_norm", "none"])
def test_the_other_norms_run(norm_type, train):
    folder, _ = train(replace(SMALL, norm_type=norm_type, num_envs=2, num_steps=4, total_timesteps=16))
    assert list(play.main(play.Args(str(folder), episodes=2, max_steps=3))) == [0, 0]


def test_scores_are_counted_over_the_game_when_an_agent_is_played(train, small_body):
    folder, _ = train(replace(SMALL, env_id="SpaceInvaders-v5", max_episode_steps=300))
    returns = play.main(play.Args(str(folder), episodes=2))
    assert min(returns) >= 0 and all(score % 5 == 0 for score in returns) and max(returns) > 0


# ------------------------------------------------------------------------------------------------------------- CUDA


def test_on_a_cpu_capturing_changes_nothing():
    assert atari.capture(max, atari.Args(), CPU) is max


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
def test_a_captured_function_sees_new_inputs():
    double = atari.capture(lambda x, y: x * 2 + y, atari.Args(), torch.device("cuda"))
    fixed = torch.ones(3, device="cuda")
    for i in range(10):
        fixed.fill_(i)
        assert torch.equal(double(torch.full((3,), i, device="cuda"), fixed), torch.full((3,), 3 * i, device="cuda"))


def test_a_minibatch_of_phantoms_is_no_gradient_step(train):
    # Every game is one step long, and every minibatch one transition: half of them are phantoms.
    sizes = dict(num_envs=2, num_steps=2, num_minibatches=4, num_eval_envs=0, max_episode_steps=1)
    _, checkpoint = train(replace(SMALL, total_timesteps=12, **sizes))
    assert checkpoint["optimizer"]["steps"] == 3 * 2 * 2
    assert all(weights.isfinite().all() for weights in checkpoint["network"].values())


@needs_cuda
@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}, {"norm_type": "batch_norm"}, {"anneal_lr": True}])
def test_captured_and_uncaptured_runs_agree(monkeypatch, options, train):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    weights = []
    for cuda_graph in (True, False):
        # ε = 1: a rounding difference must not lead to other actions
        args = replace(SMALL, device="cuda", cuda_graph=cuda_graph, end_e=1.0, num_minibatches=4, **options)
        _, checkpoint = train(replace(args, total_timesteps=640))
        assert checkpoint["optimizer"]["steps"] == 20 * 2 * 4
        weights.append(torch.cat([w.float().flatten() for w in checkpoint["network"].values()]))
    assert torch.allclose(*weights, atol=1e-3)


@needs_cuda
def test_the_defaults_need_less_than_2_gib_of_device_memory():
    gc.collect()  # graphs of earlier tests hold memory
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    atari.main(atari.Args(env_id="Pong-v5", device="cuda", total_timesteps=8192))
    assert torch.cuda.max_memory_reserved() < 2 * 2**30


@pytest.mark.parametrize("script", ["pqn", "pqn_atari_envpool", "pqn_atari_lstm", "pqn_lstm"])
def test_every_option_is_described(script):
    source = (ROOT / f"{script}.py").read_text()
    arguments = next(node for node in ast.parse(source).body if getattr(node, "name", "") == "Args").body
    lines = source.splitlines()
    for option in arguments:
        above = lines[option.lineno - 2].strip().startswith("#")
        assert above or "  # " in lines[option.end_lineno - 1], option.target.id
