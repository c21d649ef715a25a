"""Environments of JAX packages (gymnax, Craftax, JaxMARL) as vector environments of Gymnasium.

    pip install -r requirements-jax.txt
    python pqn.py --env-id jax_envs:Breakout-MinAtar-v0
    python pqn_vdn.py --env-id jax_envs:overcooked-cramped_room-v0
    python jax_envs.py                    # the names of all of them

All copies of an environment are stepped by one compiled function. As in EnvPool and Gymnasium the step that ends an
episode returns the episode's true last observation, and the step after it ignores its action and returns the first
observation of a new one. Time limits are truncations, ends of the task terminations; where both fall on one step, both
are said (for a team only the end). Every copy has a random stream of its own.

A team of agents has one reward and, as EnvPool's Jumanji tasks have it, observations of two parts: `agents_view`, what
each agent sees, and `action_mask`, which actions are legal for each of them now.

JAX computes on the CPU unless its own GPU version is installed. There the observations of single agents stay on the
GPU, as tensors of PyTorch (DLPack); a team's observations, and what is small, come to the host as NumPy arrays. No GPU
version has been tried: the tests hand the tensors over on a CPU.
"""

import os
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

try:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take most of a GPU that PyTorch needs
    import jax
    import jax.numpy as jnp
except ImportError as error:
    raise ImportError(f"jax_envs.py needs the packages of requirements-jax.txt: {error}") from None

MINATAR = "Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders"
BSUITE = "Catch", "DeepSea", "DiscountingChain", "MemoryChain", "UmbrellaChain"
MISC = "FourRooms", "MetaMaze", "Pong"
CRAFTAX = "Craftax-Symbolic-v1", "Craftax-Classic-Symbolic-v1"
OVERCOOKED = "cramped_room", "asymm_advantages", "coord_ring", "forced_coord", "counter_circuit"
SMAX = "3m", "2s3z", "8m", "25m", "3s5z", "5m_vs_6m", "10m_vs_11m", "27m_vs_30m", "3s5z_vs_3s6z", "3s_vs_5z", "6h_vs_8z"
SMAX += "smacv2_5_units", "smacv2_10_units", "smacv2_20_units"


@dataclass
class Game:
    """One environment, in pure functions."""

    reset: Callable  # key -> observation, state
    step: Callable  # key, state, action -> observation, state, reward, terminated, truncated, info; it never resets
    action_space: gym.Space
    draw: Callable | None = None  # state -> picture


# ------------------------------------------------------------------------------------------------- single agents
def gymnax_game(name, **params):
    """A game of gymnax; keywords replace its parameters, as in max_steps_in_episode=100."""
    import gymnax
    from gymnax.visualize import Visualizer

    env, defaults = gymnax.make(name)
    params = defaults.replace(**params)

    def step(key, state, action):
        obs, state, reward, terminated, _ = env.step_env(key, state, action, params)
        return obs, state, reward, terminated, env.is_truncated(state, params), {}

    def draw(state):
        visualizer = Visualizer(env, params, [state])
        visualizer.init()
        return picture(visualizer.fig)

    return Game(lambda key: env.reset_env(key, params), step, discrete(env.action_space(params)), draw)


def craftax_game(name, **params):
    """Craftax, which says "done" for an end and the time limit alike: its own limit is switched off, and kept here."""
    from craftax.craftax_env import make_craftax_env_from_name

    env = make_craftax_env_from_name(name, auto_reset=False)
    params = env.default_params.replace(**params)
    endless = params.replace(max_timesteps=jnp.iinfo(jnp.int32).max)

    def step(key, state, action):
        obs, state, reward, terminated, _ = env.step_env(key, state, action, endless)
        return obs, state, reward, terminated, state.timestep >= params.max_timesteps, {}

    return Game(lambda key: env.reset_env(key, params), step, discrete(env.action_space(params)))


# --------------------------------------------------------------------------------------------------------- teams
def team_game(env, reward, terminated, legal=None, info=lambda info: {}, draw=None):
    """A team of JaxMARL. `reward` makes one of the agents' rewards. All of these environments say "done" for an end
    and for the time limit alike, some of them a step after it: `terminated` tells from the last state which it is."""
    num_actions = [int(env.action_space(agent).n) for agent in env.agents]
    everything = jnp.arange(max(num_actions)) < jnp.array(num_actions)[:, None]

    def show(obs, state):
        views = [jnp.asarray(obs[agent]) for agent in env.agents]
        if views[0].ndim == 1:  # agents of several kinds may see vectors of several lengths
            views = [jnp.pad(view, (0, max(map(len, views)) - len(view))) for view in views]
        mask = everything if legal is None else jnp.stack([legal(state)[agent] for agent in env.agents]).astype(bool)
        return {"agents_view": jnp.stack(views), "action_mask": mask}

    def reset(key):
        obs, state = env.reset(key)
        return show(obs, state), state

    def step(key, state, actions):
        obs, state, rewards, done, more = env.step_env(key, state, dict(zip(env.agents, actions, strict=True)))
        ended = done["__all__"]
        natural = ended & terminated(state)
        total = reward([rewards[agent] for agent in env.agents])
        return show(obs, state), state, total, natural, ended & ~natural, info(more)

    highest = np.full(len(env.agents), max(num_actions) - 1)
    return Game(reset, step, gym.spaces.Box(0, highest, dtype=np.int32), draw)


def one_for_all(rewards):
    """The reward where every agent gets the team's."""
    return rewards[0]


def overcooked_game(layout, **options):
    """Two cooks, who get 20 for every soup they serve. What JaxMARL pays for the steps on the way to a soup is not
    part of the reward: info["shaped_reward"] has it, the sum of both cooks'."""
    import jaxmarl
    from jaxmarl.environments.overcooked import overcooked_layouts
    from jaxmarl.viz.overcooked_visualizer import OvercookedVisualizer

    env = jaxmarl.make("overcooked", layout=overcooked_layouts[layout], **options)
    border = env.agent_view_size - 2

    def draw(state):
        grid = np.asarray(state.maze_map)[border:-border, border:-border]
        directions, hands = np.asarray(state.agent_dir_idx), np.asarray(state.agent_inv)
        return OvercookedVisualizer._render_grid(grid, agent_dir_idx=directions, agent_inv=hands)

    shaped = lambda info: {"shaped_reward": sum(info["shaped_reward"].values())}
    return team_game(env, one_for_all, terminated=lambda state: False, info=shaped, draw=draw)


def mpe_game(name, **options):
    """Particles that move in a plane, for 26 steps; the team's reward is the sum of its agents'."""
    import jaxmarl

    env = jaxmarl.make(name, **options)

    def draw(state):
        from jaxmarl.environments.mpe import MPEVisualizer

        with redirect_stdout(None):
            return picture(MPEVisualizer(env, [state]).fig)

    return team_game(env, sum, terminated=lambda state: False, draw=draw)


def smax_game(scenario, **options):
    """A battle against the heuristic enemy of JaxMARL. One that is decided on the limit's step has ended there."""
    import jaxmarl
    from jaxmarl.environments.smax import map_name_to_scenario

    env = jaxmarl.make("HeuristicEnemySMAX", scenario=map_name_to_scenario(scenario), **options)

    def decided(state):
        alive = state.state.unit_alive
        return ~(alive[: env.num_allies].any() & alive[env.num_allies :].any())

    return team_game(env, one_for_all, decided, env.get_avail_actions)


def hanabi_game(**options):
    """Players take turns: who is not asked has one legal action, to do nothing."""
    import jaxmarl

    env = jaxmarl.make("hanabi", **options)
    return team_game(env, one_for_all, terminated=lambda state: True, legal=env.get_legal_moves)


# ------------------------------------------------------------------------------------------- vector environments
class JaxVectorEnv(gym.vector.VectorEnv):
    """Copies of a game, all of them stepped by one call of a compiled function."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_modes": ["rgb_array"]}

    def __init__(self, make_game, *names, num_envs=1, render_mode=None, **options):
        self.num_envs, self.render_mode = num_envs, render_mode
        self.game = make_game(*names, **options)
        obs, self.types = jax.eval_shape(self.game.reset, jax.random.PRNGKey(0))
        self.single_observation_space = observation_space(obs)
        self.single_action_space = self.game.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.gives_tensors = jax.default_backend() == "gpu" and torch.cuda.is_available() and not isinstance(obs, dict)
        self.keys = None
        self.compiled_reset, self.compiled_step = jax.jit(self.pure_reset), jax.jit(self.pure_step)

    def pure_reset(self, keys):
        keys, reset_keys = split(keys, 2)
        obs, state = jax.vmap(self.game.reset)(reset_keys)
        return keys, self.typed(state), jnp.zeros(self.num_envs, bool), self.shown(obs)

    def pure_step(self, keys, state, ended, actions):
        """One step of every copy; those whose episode ended in the step before are reset instead."""
        keys, step_keys, reset_keys = split(keys, 3)
        obs, state, rewards, terminated, truncated, info = jax.vmap(self.game.step)(step_keys, state, actions)
        stepped = self.shown(obs), self.typed(state)

        def reset_one(waiting):
            i = jnp.argmax(waiting[0])
            obs, state = self.game.reset(reset_keys[i])
            fresh = False, self.shown(obs), self.typed(state)
            return jax.tree.map(lambda x, new: x.at[i].set(new), waiting, fresh)

        # One after the other: few episodes end in the same step, and a new world of Craftax costs as much as many steps
        _, obs, state = jax.lax.while_loop(lambda waiting: waiting[0].any(), reset_one, (ended, *stepped))
        rewards, info = jax.tree.map(lambda x: jnp.where(ended, 0, x).astype(jnp.float32), (rewards, info))
        terminated, truncated = terminated & ~ended, truncated & ~ended
        return keys, state, terminated | truncated, (obs, rewards, terminated, truncated, info)

    def typed(self, state):
        """The state in fixed types: one that JAX takes for "some integer" (a weak type) would compile a step twice."""
        return jax.tree.map(lambda x, like: jax.lax.convert_element_type(x, like.dtype), state, self.types)

    def shown(self, obs):
        space = self.single_observation_space
        cast = lambda x, space: jnp.asarray(x, space.dtype)
        return {k: cast(x, space[k]) for k, x in obs.items()} if isinstance(obs, dict) else cast(obs, space)

    def reset(self, *, seed=None, options=None):
        """Starts new episodes. `seed` is one for all copies, who still have streams of their own, or one for each."""
        if seed is not None or self.keys is None:
            words = lambda seed, count: np.random.SeedSequence(seed).generate_state(2 * count).reshape(count, 2)
            each = not (seed is None or np.isscalar(seed))
            self.keys = jnp.asarray(np.concatenate([words(x, 1) for x in seed]) if each else words(seed, self.num_envs))
        self.keys, self.state, self.ended, obs = self.compiled_reset(self.keys)
        return jax.tree.map(np.array, obs), {}

    def step(self, actions):
        actions = np.asarray(actions, np.int32)
        self.keys, self.state, self.ended, result = self.compiled_step(self.keys, self.state, self.ended, actions)
        # Not copies, but JAX's own memory where that can be shared: nothing may be written to it
        obs = torch.from_dlpack(result[0]) if self.gives_tensors else jax.tree.map(np.asarray, result[0])
        return obs, *jax.tree.map(np.asarray, result[1:])

    def render(self):
        """The first copy."""
        if self.game.draw is None:
            raise NotImplementedError("there is no drawing of this environment")
        return self.game.draw(jax.tree.map(lambda x: x[0], self.state))


def split(keys, parts):
    """From one key for each copy, several keys for each copy."""
    return jnp.unstack(jax.vmap(partial(jax.random.split, num=parts))(keys), axis=1)


def discrete(space):
    if not hasattr(space, "n"):
        raise ValueError(f"its actions are {space}: only discrete ones are supported")
    return gym.spaces.Discrete(int(space.n))


def observation_space(obs):
    """The space of observations of these shapes and types. The packages' own bounds are not kept: not all are true."""
    if isinstance(obs, dict):
        return gym.spaces.Dict({name: observation_space(x) for name, x in obs.items()})
    if obs.dtype == bool:
        return gym.spaces.MultiBinary(obs.shape)
    if jnp.issubdtype(obs.dtype, jnp.integer):
        return gym.spaces.Box(jnp.iinfo(obs.dtype).min, jnp.iinfo(obs.dtype).max, obs.shape, obs.dtype)
    return gym.spaces.Box(-np.inf, np.inf, obs.shape, np.float32)


def picture(figure):
    """What a package has drawn with Matplotlib."""
    import matplotlib.pyplot as plt

    figure.canvas.draw()
    pixels = np.array(figure.canvas.buffer_rgba())[..., :3]
    plt.close(figure)
    return pixels


def register():
    """Tells Gymnasium all names. (A `module:Name-v0` of Gymnasium imports the module first.)"""
    games = {f"{name}-MinAtar-v0": (gymnax_game, f"{name}-MinAtar") for name in MINATAR}
    games |= {f"{name}-bsuite-v0": (gymnax_game, f"{name}-bsuite") for name in BSUITE}
    # With the authors' length; the MemoryChain above has gymnax's, which is 5
    games |= {"MemoryChain100-bsuite-v0": (partial(gymnax_game, memory_length=100), "MemoryChain-bsuite")}
    games |= {f"{name}-misc-v0": (gymnax_game, f"{name}-misc") for name in MISC}
    games |= {name: (craftax_game, name) for name in CRAFTAX}
    games |= {f"overcooked-{name}-v0": (overcooked_game, name) for name in OVERCOOKED}
    games |= {"mpe-simple_spread-v3": (mpe_game, "MPE_simple_spread_v3"), "hanabi-v0": (hanabi_game,)}
    games |= {f"smax-{name}-v0": (smax_game, name) for name in SMAX}
    for name, game in games.items():
        gym.register(name, vector_entry_point=partial(JaxVectorEnv, *game))
    return games


NAMES = list(register())

if __name__ == "__main__":
    print(*NAMES, sep="\n")
