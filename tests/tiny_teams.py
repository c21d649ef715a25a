"""Small cooperative tasks for the tests, registered as `tiny_teams:<Name>-v0`."""

import gymnasium as gym
import numpy as np
import tiny_envs

PAYS = np.array([[0.0, 1.0, 0.5], [2.0, -1.0, 0.0]])  # what each action of the two agents of `Sum` adds to the reward


class Team(gym.Env):
    """Two agents with three actions each; what they see and may do is up to `show`."""

    observation_space = gym.spaces.Dict(
        {"agents_view": gym.spaces.Box(-9, 9, (2, 4)), "action_mask": gym.spaces.MultiBinary((2, 3))}
    )
    action_space = gym.spaces.MultiDiscrete([3, 3])

    def show(self):
        return {"agents_view": np.ones((2, 4), np.float32), "action_mask": np.ones((2, 3), np.int8)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.show(), {}


class Sum(Team):
    """One step, which pays the sum of what each agent does. Both see the same."""

    def step(self, actions):
        return self.show(), float(PAYS[0, actions[0]] + PAYS[1, actions[1]]), True, False, {}


class Strict(Team):
    """Each state allows each agent some actions, and at least one; no other may be taken. Nobody sees which."""

    def show(self):
        mask = self.np_random.random((2, 3)) < 0.5
        mask[np.arange(2), self.np_random.integers(3, size=2)] = True
        self.legal = mask
        return super().show() | {"action_mask": mask.astype(np.int8)}

    def step(self, actions):
        assert self.legal[np.arange(2), actions].all(), f"{actions} of {self.legal}"
        return self.show(), 1.0, bool(self.np_random.random() < 0.1), False, {}


class Grid(Team):
    """Every agent sees a picture."""

    observation_space = gym.spaces.Dict(
        {"agents_view": gym.spaces.Box(-9, 9, (2, 4, 5, 1)), "action_mask": gym.spaces.MultiBinary((2, 3))}
    )

    def show(self):
        return super().show() | {"agents_view": np.ones((2, 4, 5, 1), np.float32)}


class TeamCue(Team):
    """Shows each agent 1 or −1, then twice nothing, and then asks which it was: action 1 or 0, the third being illegal.
    The team is paid 0.5 for each right answer and −0.5 for each wrong one."""

    observation_space = gym.spaces.Dict(
        {"agents_view": gym.spaces.Box(-1, 1, (2, 2)), "action_mask": gym.spaces.MultiBinary((2, 3))}
    )

    def show(self):
        views = np.stack([self.cues * (self.steps == 0), np.full(2, self.steps == 3)], axis=1)
        return {"agents_view": views.astype(np.float32), "action_mask": np.tile(np.int8([1, 1, 0]), (2, 1))}

    def reset(self, *, seed=None, options=None):
        gym.Env.reset(self, seed=seed)
        self.steps, self.cues = 0, self.np_random.choice([-1, 1], size=2)
        return self.show(), {}

    def step(self, actions):
        asked, right = self.steps == 3, (actions == 1) == (self.cues == 1)
        self.steps += 1
        return self.show(), asked * float(np.where(right, 0.5, -0.5).sum()), asked, False, {}


class EventfulTeam(tiny_envs.Eventful):
    """Random views, masks, rewards and ends, which are kept in `first` and `steps`; info has a shaped reward."""

    single_observation_space = gym.spaces.Dict(
        {"agents_view": gym.spaces.Box(-9, 9, (2, 3)), "action_mask": gym.spaces.MultiBinary((2, 4))}
    )
    single_action_space = gym.spaces.MultiDiscrete([4, 4])
    made = []

    def observe(self):
        views = self.random.standard_normal((self.num_envs, 2, 3), dtype=np.float32)
        masks = self.random.random((self.num_envs, 2, 4)) < 0.5
        masks[..., 2] |= ~masks.any(2)
        return {"agents_view": views, "action_mask": masks.astype(np.int8)}

    def step(self, actions):
        shaped = np.round(self.random.random(self.num_envs) * ~self.phantom, 1)
        result = super().step(actions.sum(1))
        self.steps[-1] |= {"actions": actions.copy(), "shaped": shaped}
        return *result[:4], {"shaped_reward": shaped}


class EventfulAgent(tiny_envs.Eventful):
    """`tiny_envs.Eventful` with four actions, for a single agent."""

    single_action_space = gym.spaces.Discrete(4)
    made = []


class TeamOfOne(tiny_envs.Eventful):
    """The same as a team."""

    single_observation_space = gym.spaces.Dict(
        {"agents_view": gym.spaces.Box(-9, 9, (1, 3)), "action_mask": gym.spaces.MultiBinary((1, 4))}
    )
    single_action_space = gym.spaces.MultiDiscrete([4])
    made = []

    def as_team(self, obs):
        return {"agents_view": obs[:, None], "action_mask": np.ones((self.num_envs, 1, 4), np.int8)}

    def reset(self, **options):
        return self.as_team(super().reset(**options)[0]), {}

    def step(self, actions):
        obs, *rest = super().step(actions[:, 0])
        return self.as_team(obs), *rest


for task in (Sum, Strict, Grid, TeamCue):
    gym.register(f"{task.__name__}-v0", entry_point=task)
for task in (EventfulTeam, EventfulAgent, TeamOfOne):
    gym.register(f"{task.__name__}-v0", vector_entry_point=task)
