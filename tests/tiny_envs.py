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


class Cue(gym.Env):
    """Shows 1 or −1, then three times nothing, and then asks which it was: action 1 or 0 pays 1 if it is right and −1
    if not."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)

    def show(self):
        return np.array([self.cue * (self.steps == 0), self.steps == 4], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.cue = 0, int(self.np_random.choice([-1, 1]))
        return self.show(), {}

    def step(self, action):
        asked, right = self.steps == 4, (action == 1) == (self.cue == 1)
        self.steps += 1
        return self.show(), asked * (1.0 if right else -1.0), asked, False, {}


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


class Failing(PaysOne):
    """Raises an error in the 300th step of an episode."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def step(self, action):
        if self.steps == 299:
            raise self.error("level7.map")
        return super().step(action)


class Empty(PaysOne):
    """Observations without a single number."""

    observation_space = gym.spaces.Box(-1, 1, (0,))

    def reset(self, *, seed=None, options=None):
        return np.zeros(0, np.float32), super().reset(seed=seed)[1]


class SameStep(gym.vector.VectorEnv):
    """Vectorised by itself, and resetting in the step that ends an episode."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, num_envs=1, **_):
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = gym.spaces.Discrete(2), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.zeros(self.num_envs, dtype=np.int64), {}


class Eventful(gym.vector.VectorEnv):
    """Random pictures, rewards and ends. What happens is kept in `first` and `steps`, the environments in `made`."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
    single_observation_space, single_action_space = gym.spaces.Box(-9, 9, (3,)), gym.spaces.Discrete(3)
    made = []

    def __init__(self, num_envs=1, **_):
        self.num_envs = num_envs
        self.made.append(self)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.random = np.random.default_rng(seed)
        self.phantom, self.steps, self.first = np.zeros(self.num_envs, dtype=bool), [], self.observe()
        return self.first, {}

    def observe(self):
        return self.random.standard_normal((self.num_envs, 3), dtype=np.float32)

    def event(self, probability):
        return (self.random.random(self.num_envs) < probability) & ~self.phantom

    def step(self, actions):
        score = np.round(3 * self.random.standard_normal(self.num_envs) + actions, 1) * ~self.phantom
        terminated, truncated = self.event(0.15), self.event(0.15)
        return *self.keep(actions, score, score, terminated, truncated, terminated | truncated), {}

    def keep(self, actions, score, rewards, terminated, truncated, over):
        """Records a step; what it returns but for the `info`."""
        self.phantom = terminated | truncated
        self.steps.append(dict(actions=actions.copy(), obs=self.observe(), score=score, rewards=rewards, over=over))
        self.steps[-1] |= dict(terminated=terminated, truncated=truncated)
        return self.steps[-1]["obs"].copy(), rewards.copy(), terminated.copy(), truncated.copy()


class EventfulAtari(Eventful):
    """The same in the manner of EnvPool's Atari games: clipped rewards, lives, and truncations that hide an end."""

    action_space = Eventful.single_action_space

    def __init__(self, num_envs, seed, stack_num, **_):
        super().__init__(num_envs)
        self.observation_space = gym.spaces.Box(0, 255, (stack_num, 4, 4), np.uint8)
        self.random = np.random.default_rng(seed)

    def observe(self):
        return self.random.integers(256, size=(self.num_envs, *self.observation_space.shape), dtype=np.uint8)

    def step(self, actions):
        score = np.round(30 * self.random.standard_normal(self.num_envs) + 10 * actions) * ~self.phantom
        life, game, truncated = self.event(0.1), self.event(0.1), self.event(0.15)
        shown = (life | game) & ~truncated
        result = self.keep(actions, score, np.sign(score), shown | game, truncated, game | truncated)
        return *result[:2], shown, truncated, {"reward": score, "terminated": game.astype(np.int32)}


gym.register("Eventful-v0", entry_point=PaysOne, vector_entry_point=Eventful)
gym.register("TimeLimited-v0", entry_point=PaysOne, max_episode_steps=5)
gym.register("TimeLimitedCycle-v0", entry_point=PaysOne, kwargs={"cyclic": True}, max_episode_steps=5)
gym.register("Terminating-v0", entry_point=PaysOne, kwargs={"end": 5})
gym.register("Offset-v0", entry_point=Offset)
gym.register("Cue-v0", entry_point=Cue)
gym.register("BothFlags-v0", entry_point=BothFlags)
gym.register("Scalar-v0", entry_point=Scalar)
gym.register("BadReward-v0", entry_point=BadReward)
gym.register("Empty-v0", entry_point=Empty)
for error in (OSError, RuntimeError, FloatingPointError):
    gym.register(f"{error.__name__}-v0", entry_point=Failing, kwargs={"error": error})
gym.register("SameStep-v0", entry_point=PaysOne, vector_entry_point=SameStep)
