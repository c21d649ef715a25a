"""jax_envs.py: its compiled steps against the packages' own, taken one by one; ends, limits, streams and masks."""

import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

import pqn
import pqn_lstm
import pqn_vdn
import pqn_vdn_lstm

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # what is compiled here runs a few times
for package in ("gymnax", "jaxmarl", "craftax"):
    pytest.importorskip(package)
jax, jax_envs = pytest.importorskip("jax"), pytest.importorskip("jax_envs")
jax.config.update("jax_platforms", "cpu")
jnp = jax.numpy

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages


# --------------------------------------------------------------------------------- a game whose every step is known


def dice(end=4, limit=6):
    """A state that begins with a weak type, as in many games. Ends after `end` steps that were not with action 0, and
    has a limit of `limit` steps; the observation has a random number of the reset and one of the step."""

    def show(state, number):
        return jnp.stack([state["start"], state["steps"].astype(float), number])

    def reset(key):
        state = {"steps": jnp.asarray(0), "active": 0, "start": jax.random.uniform(key)}
        return show(state, 0.0), state

    def step(key, state, action):
        state = state | {"steps": state["steps"] + 1, "active": state["active"] + jnp.int32(action > 0)}
        over = state["active"] >= end
        return show(state, jax.random.uniform(key)), state, action * 10 + 1, over, state["steps"] >= limit, {"odd": 5}

    return jax_envs.Game(reset, step, gym.spaces.Discrete(3))


@pytest.fixture(scope="module")
def played():
    """30 steps of five copies: all that was returned and done, and the environment."""
    envs = jax_envs.JaxVectorEnv(dice, num_envs=5)
    actions = np.random.default_rng(0).integers(3, size=(30, 5))
    actions[:, 4] = np.arange(30) % 7 % 3 > 0  # which ends at its limit, at times together with its end
    first, _ = envs.reset(seed=1)
    return first, actions, [envs.step(a) for a in actions], envs


def test_steps_are_those_of_the_game_and_the_step_after_an_end_is_a_reset(played):
    first, actions, steps, _ = played
    keys = jnp.asarray(np.random.SeedSequence(1).generate_state(10).reshape(5, 2))
    game, kinds = dice(), set()
    for n in range(5):
        key, reset_key = jax.random.split(keys[n])
        obs, state = game.reset(reset_key)
        assert np.allclose(first[n], obs)
        over = False
        for t, (shown, rewards, terminated, truncated, info) in enumerate(steps):
            key, step_key, reset_key = jax.random.split(key, 3)
            if over:
                (obs, state), reward, ends, odd = game.reset(reset_key), 0.0, (False, False), 0
            else:
                obs, state, reward, *ends, more = game.step(step_key, state, int(actions[t, n]))
                ends, odd = tuple(map(bool, ends)), more["odd"]
                kinds.add(ends)
            assert np.allclose(shown[n], obs) and rewards[n] == reward and info["odd"][n] == odd
            assert (terminated[n], truncated[n]) == ends
            over = any(ends)
    assert kinds == {(False, False), (True, False), (False, True), (True, True)}


def test_types_and_shapes_are_those_of_the_spaces(played):
    first, _, ((obs, rewards, terminated, truncated, _), *_), envs = played
    for shown in first, obs:
        assert shown.shape == envs.observation_space.shape == (5, 3)
        assert shown.dtype == envs.observation_space.dtype == np.float32
    assert (rewards.dtype, terminated.dtype, truncated.dtype) == (np.float32, bool, bool)
    assert envs.single_action_space == gym.spaces.Discrete(3)
    assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP


def test_nothing_is_compiled_twice(played):
    envs = played[-1]
    envs.reset(seed=2)
    envs.step(np.zeros(5, np.int64))
    envs.reset()
    envs.step(np.zeros(5, np.int32))
    assert envs.compiled_step._cache_size() == envs.compiled_reset._cache_size() == 1


def test_every_copy_and_seed_has_a_stream_of_its_own_and_the_same_seed_the_same(played):
    envs, seen = played[-1], []
    for seed in (1, 2, 1):
        obs = [envs.reset(seed=seed)[0]] + [envs.step(np.zeros(5))[0] for _ in range(3)]
        seen.append([obs[0][:, 0], *(x[:, 2] for x in obs[1:])])
    assert np.array_equal(seen[0], seen[2])
    assert len(np.unique(seen[:2])) == 2 * 4 * 5
    again = envs.reset()[0][:, 0]  # new episodes, in the same streams
    assert not np.isin(again, seen[0]).any()


def test_a_seed_for_each_copy_does_not_depend_on_its_neighbours(played):
    envs = played[-1]
    a, b = envs.reset(seed=[5, 6, 7, 8, 9])[0], envs.reset(seed=[9, 8, 7, 6, 5])[0]
    assert np.array_equal(a, b[::-1])


# --------------------------------------------------------------------------------------------------- the packages


FAMILIES = {
    "Catch-bsuite-v0": ({}, None),
    "DiscountingChain-bsuite-v0": ({"max_steps_in_episode": 4}, 4),
    "mpe-simple_spread-v3": ({"max_steps": 4}, 5),  # its limit comes a step late
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    options, limit = FAMILIES[request.param]
    envs = gym.make_vec(f"jax_envs:{request.param}", num_envs=3, render_mode="rgb_array", **options)
    return request.param, envs, limit


def by_hand(name, options):
    """reset(key), and step(key, state, action) -> (views, state, reward, terminated), straight from the packages."""
    if name.endswith("bsuite-v0"):
        import gymnax

        env, params = gymnax.make(name.removesuffix("-v0"))
        params = params.replace(**options)
        return lambda key: env.reset_env(key, params), lambda *x: env.step_env(*x, params)[:4]
    import jaxmarl

    env = jaxmarl.make("MPE_simple_spread_v3", **options)
    views = lambda obs: jnp.stack([obs[agent] for agent in env.agents])

    def reset(key):
        obs, state = env.reset(key)
        return views(obs), state

    def step(key, state, actions):
        obs, state, rewards, _, _ = env.step_env(key, state, dict(zip(env.agents, actions, strict=True)))
        return views(obs), state, sum(rewards.values()), False  # only the limit ends it

    return reset, step


def test_a_step_is_the_package_s_own_over_ends_and_limits(family):
    name, envs, limit = family
    reset, step = map(jax.jit, by_hand(name, FAMILIES[name][0]))
    space, rng = envs.single_action_space, np.random.default_rng(0)
    highest = space.n if hasattr(space, "n") else space.high + 1
    views = lambda obs: obs["agents_view"] if isinstance(obs, dict) else obs
    first, _ = envs.reset(seed=3)
    keys = [jax.random.split(key) for key in np.random.SeedSequence(3).generate_state(6).reshape(3, 2)]
    states = []
    for n, (_, reset_key) in enumerate(keys):
        obs, state = reset(reset_key)
        assert np.allclose(views(first)[n], obs, atol=1e-5)
        states.append(state)
    keys, lengths, over, seen = [key for key, _ in keys], [0] * 3, [False] * 3, set()
    for _ in range(14):
        actions = rng.integers(highest, size=(3, *space.shape))
        shown, rewards, terminated, truncated, _ = envs.step(actions)
        for n in range(3):
            keys[n], step_key, reset_key = jax.random.split(keys[n], 3)
            if over[n]:
                (obs, states[n]), reward, ends, lengths[n] = reset(reset_key), 0.0, (False, False), 0
            else:
                obs, states[n], reward, ended = step(step_key, states[n], jnp.asarray(actions[n], jnp.int32))
                lengths[n] += 1
                ends = bool(ended), lengths[n] == limit
            assert np.allclose(views(shown)[n], obs, atol=1e-5) and rewards[n] == pytest.approx(float(reward), abs=1e-4)
            assert (terminated[n], truncated[n]) == ends
            over[n] = any(ends)
            seen.add(ends)
    assert seen == {(False, False), (True, False) if limit is None else (False, True)}
    assert envs.compiled_step._cache_size() == envs.compiled_reset._cache_size() == 1


def test_the_first_copy_is_drawn_where_the_package_can_draw_it(family):
    name, envs, _ = family
    envs.reset(seed=1)
    if name.startswith("DiscountingChain"):
        return
    first = envs.render()
    for _ in range(4):
        envs.step(np.zeros_like(envs.action_space.sample()))
    assert first.dtype == np.uint8 and first.ndim == 3 and first.shape[2] == 3
    assert not np.array_equal(first, envs.render())


def test_the_scripts_train_in_it(family, tmp_path, monkeypatch):
    name, envs, _ = family
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gym, "make_vec", lambda *_, **__: envs)
    scripts = (pqn_vdn, pqn_vdn_lstm) if name.startswith("mpe") else (pqn,)
    for script in scripts:
        args = script.Args(env_id=f"jax_envs:{name}", num_envs=2, num_eval_envs=1, num_steps=8, num_minibatches=2)
        script.main(replace(args, update_epochs=1, total_timesteps=64, hidden_sizes=(16,)))
    assert len(list(Path("runs").glob("*/checkpoint.pt"))) == len(scripts)


@pytest.mark.parametrize("script", [pqn, pqn_lstm])
def test_a_rollout_of_tensors_as_a_gpu_gives_them_is_that_of_arrays(script):
    """On a CPU, whose tensors share JAX's memory as a GPU's do. Stored observations must outlive the next step."""
    args = script.Args(num_envs=3, num_eval_envs=1, num_steps=12, hidden_sizes=(8,))
    rollouts, kinds = [], set()
    for gives_tensors in False, True:
        envs = jax_envs.JaxVectorEnv(dice, num_envs=4)
        assert not envs.gives_tensors  # there is no GPU here
        envs.reset(seed=1)
        envs.gives_tensors = gives_tensors
        step = envs.step
        envs.step = lambda actions, step=step: (result := step(actions), kinds.add(type(result[0])))[0]
        torch.manual_seed(1)
        network = script.QNetwork(*script.spaces(envs), args).eval()
        collector = script.Collector(envs, network, args, torch.device("cpu"))
        rollouts.append([[x.clone() for x in collector.collect(0.5)[0]] for _ in range(2)])
    assert kinds == {np.ndarray, torch.Tensor}
    assert all(torch.equal(a, b) for r, s in zip(*rollouts, strict=True) for a, b in zip(r, s, strict=True))


def test_the_long_memory_chain_asks_after_100_steps():
    envs = gym.make_vec("jax_envs:MemoryChain100-bsuite-v0", num_envs=1)
    envs.reset(seed=1)
    ended = [bool(envs.step(np.zeros(1, np.int32))[2][0]) for _ in range(101)]
    assert ended == [False] * 100 + [True]


def test_the_reward_on_the_way_to_a_soup_is_in_the_info_and_not_in_the_reward():
    env = SimpleNamespace(**vars(stub_team()), agent_view_size=5)
    env.step_env = lambda *x: (*stub_team().step_env(*x)[:4], {"shaped_reward": {"a": 3.0, "b": 2.0}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxmarl.make", lambda name, layout: env)
        game = jax_envs.overcooked_game("cramped_room")
    *_, reward, terminated, truncated, info = game.step(None, game.reset(None)[1], jnp.array([0, 0]))
    assert (reward, info) == (1.0, {"shaped_reward": 5.0}) and not terminated and not truncated


@dataclass
class Params:
    max_timesteps: int = 5
    replace = replace


@pytest.mark.parametrize("dies_at, ends", [(3, (True, False)), (5, (True, True)), (9, (False, True))])
def test_craftax_tells_a_death_from_the_limit_also_on_the_limit_s_step(dies_at, ends, monkeypatch):
    def step_env(key, state, action, params):
        state = SimpleNamespace(timestep=state.timestep + 1)
        over = (state.timestep >= params.max_timesteps) | (state.timestep >= dies_at)
        return jnp.zeros(2), state, 0.0, over, {}

    start = lambda key, params: (jnp.zeros(2), SimpleNamespace(timestep=jnp.asarray(0)))
    env = SimpleNamespace(default_params=Params(), reset_env=start, step_env=step_env)
    env.action_space = lambda params: SimpleNamespace(n=2)
    monkeypatch.setattr("craftax.craftax_env.make_craftax_env_from_name", lambda name, auto_reset: env)
    game = jax_envs.craftax_game("Craftax-Symbolic-v1")
    _, state = game.reset(None)
    for _ in range(min(dies_at, 5)):
        _, state, _, *flags, _ = game.step(None, state, 0)
    assert tuple(map(bool, flags)) == ends


@dataclass
class Stub:
    """A team of two kinds of agents."""

    agents: tuple = ("a", "b")
    num_allies: int = 2
    done: bool = False
    alive: tuple = (True, True, True)
    action_space: object = lambda agent: SimpleNamespace(n={"a": 2, "b": 3}[agent])
    reset: object = None
    step_env: object = None
    get_avail_actions: object = None
    state: object = field(default=None)


def stub_team(done=False, alive=(True, True, True)):
    env = Stub()
    obs = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0]), "world_state": jnp.zeros(9)}
    env.state = SimpleNamespace(state=SimpleNamespace(unit_alive=jnp.array(alive)))
    env.reset = lambda key: (obs, env.state)
    env.step_env = lambda *_: (obs, env.state, {"a": 1.0, "b": 10.0}, {"a": True, "__all__": jnp.array(done)}, {})
    env.get_avail_actions = lambda state: {"a": jnp.array([1, 0, 1]), "b": jnp.array([0, 1, 0])}
    return env


def test_agents_of_several_kinds_see_padded_vectors_and_may_not_do_what_others_can():
    game = jax_envs.team_game(stub_team(), sum, terminated=lambda state: True)
    obs, state = game.reset(None)
    assert obs["agents_view"].tolist() == [[1, 2], [3, 0]]
    assert obs["action_mask"].tolist() == [[True, True, False], [True, True, True]]
    assert game.step(None, state, jnp.array([0, 0]))[2] == 11.0
    assert game.action_space.shape == (2,) and game.action_space.high.tolist() == [2, 2]


@pytest.mark.parametrize(
    "done, alive, ends",
    [
        (False, (True, True, True), (False, False)),
        (True, (True, True, True), (False, True)),
        (True, (True, True, False), (True, False)),
        (True, (False, False, True), (True, False)),
    ],
)
def test_a_battle_ends_when_it_is_decided_and_is_cut_short_at_its_limit(done, alive, ends, monkeypatch):
    monkeypatch.setattr("jaxmarl.make", lambda name, scenario: stub_team(done, alive))
    game = jax_envs.smax_game("3m")
    obs, state, reward, *flags, _ = game.step(None, game.reset(None)[1], jnp.array([0, 0]))
    assert tuple(map(bool, flags)) == ends and reward == 1.0
    assert obs["action_mask"].tolist() == [[True, False, True], [False, True, False]]


# ------------------------------------------------------------------------------------------------ as a user sees it


@pytest.mark.parametrize("name", jax_envs.NAMES)
def test_a_step_of_every_environment_takes_its_own_results_so_that_it_is_compiled_once(name):
    """Traced, not compiled: shapes and types of what a reset and a step return."""
    envs = gym.make_vec(name, num_envs=3, vectorization_mode="vector_entry_point").unwrapped
    key, actions = jax.ShapeDtypeStruct((3, 2), np.uint32), jax.ShapeDtypeStruct(envs.action_space.shape, np.int32)
    *reset, first = jax.eval_shape(envs.pure_reset, key)
    *stepped, (obs, *signals, _) = jax.eval_shape(envs.pure_step, *reset, actions)
    kind = lambda x: (x.shape, x.dtype, x.weak_type)
    assert jax.tree.map(kind, (*reset, first)) == jax.tree.map(kind, (*stepped, obs))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), signals) == [((3,), np.float32), ((3,), bool), ((3,), bool)]
    spaces = envs.observation_space
    spaces = spaces.spaces if isinstance(obs, dict) else spaces
    assert jax.tree.map(lambda x: x.shape, obs) == jax.tree.map(lambda space: space.shape, spaces)


def test_without_the_packages_there_is_one_clear_line(tmp_path):
    (tmp_path / "jax.py").write_text("raise ImportError('No module named jax')")
    command = [sys.executable, str(ROOT / "pqn.py"), "--env-id", "jax_envs:Breakout-MinAtar-v0"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert "requirements-jax.txt" in result.stderr
