"""Small Gymnasium environments whose values are known, registered for the tests as `tiny_envs:<Name>-v0`."""

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode


class PaysOne(gym.Env):
    """Pays 1 every step and shows how many steps have been made, round and round from 0 to 5. Ends after `end` steps,
    if that is given; starts at any of its observations, if it is cyclic."""

    observation_space, action_space = gym.spaces.Discrete(6), gym.spaces.Discrete(2)

    def __init__(self, end=None, cyclic=False):
        self.end, self.cyclic = end, cyclic

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.start = 0, int(self.np_random.integers(6)) if self.cyclic else 0
        return self.start, {}

    def step(self, action):
        self.steps += 1
        return (self.start + self.steps) % 6, 1.0, self.steps == self.end, False, {}


class Offset(gym.Env):
    """Spaces that do not start at 0. Of the actions 7, 8 and 9, which one pays depends on the observation."""

    observation_space, action_space = gym.spaces.Discrete(4, start=3), gym.spaces.Discrete(3, start=7)

    def show(self):
        self.shown = int(self.np_random.integers(3, 7))
        return self.shown

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.show(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        reward = float(action == 7 + self.shown % 3)
        return self.show(), reward, bool(self.np_random.random() < 0.1), False, {}


class BothFlags(gym.Env):
    """Every episode is one step long, and reported as terminated and truncated."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2, 3), np.float64), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros((2, 3)), {}

    def step(self, action):
        return np.ones((2, 3)), 1.0, True, True, {}


class Scalar(BothFlags):
    """Observations without a dimension."""

    observation_space = gym.spaces.Box(-1, 1, ())

    def reset(self, *, seed=None, options=None):
        return np.float32(0), super().reset(seed=seed)[1]

    def step(self, action):
        return np.float32(1), *super().step(action)[1:]


class BadReward(PaysOne):
    """Pays NaN from the 300th step of an episode on."""

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, reward if self.steps < 300 else float("nan"), *rest


class SameStep(gym.vector.VectorEnv):
    """Vectorised by itself, and resetting in the step that ends an episode."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, num_envs=1, **_):
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = gym.spaces.Discrete(2), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.zeros(self.num_envs, dtype=np.int64), {}


gym.register("TimeLimited-v0", entry_point=PaysOne, max_episode_steps=5)
gym.register("TimeLimitedCycle-v0", entry_point=PaysOne, kwargs={"cyclic": True}, max_episode_steps=5)
gym.register("Terminating-v0", entry_point=PaysOne, kwargs={"end": 5})
gym.register("Offset-v0", entry_point=Offset)
gym.register("BothFlags-v0", entry_point=BothFlags)
gym.register("Scalar-v0", entry_point=Scalar)
gym.register("BadReward-v0", entry_point=BadReward)
gym.register("SameStep-v0", entry_point=PaysOne, vector_entry_point=SameStep)
