"""PQN on Atari: the agent of "Simplifying Deep Temporal Difference Learning" (Gallici et al., ICLR 2025).

Q-learning without replay buffer and without target network: LayerNorm keeps it stable, many EnvPool games played in
parallel make its data diverse, Q(λ) returns make it fast. This file is all of it; it differs from pqn.py in the
games, the convolutional network, its arithmetic and CUDA graphs. Equation and algorithm numbers are the paper's.

    python pqn_atari_envpool.py --env-id Breakout-v5
    python pqn_atari_envpool.py --env-id Pong-v5 --total-timesteps 50000000     # the paper's 200M frames
    python pqn_atari_envpool.py --resume runs/Pong-v5__pqn_atari_envpool__1__1700000000 --total-timesteps 20000000
    python play.py runs/Pong-v5__pqn_atari_envpool__1__1700000000 --video pong.mp4
"""

import ctypes
import difflib
import importlib.util
import io
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import envpool
import numpy as np
import torch
import torch.nn as nn
import tyro
from envpool.atari.registration import atari_game_list
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    env_id: str = "Breakout-v5"
    """one of EnvPool's 104 Atari games"""
    total_timesteps: int = 10_000_000
    """environment steps of the whole run, all environments together"""
    seed: int = 1
    """seed of the run; every environment draws its own stream from it"""
    device: str = "auto"
    """any torch device; "auto" takes CUDA when present"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """arithmetic of the network's body; "auto" is bf16 where that is native. On CUDA, fp32 has TF32 convolutions"""
    cuda_graph: bool = True
    """on CUDA, capture acting, targets and gradient step as graphs"""
    resume: str | None = None
    """go on with the run in this folder; the other options default to those it was started with"""

    num_envs: int = 128
    """environments stepped in parallel"""
    num_steps: int = 32
    """steps in each environment between two rounds of learning"""
    num_eval_envs: int = 8
    """further environments that act greedily beside the training ones and are never trained on"""
    episodic_life: bool = True
    """a lost life ends the episode for learning (never for the logged returns)"""
    reward_clip: bool = True
    """learn from the sign of the rewards (the logged returns are the game's own)"""
    repeat_action_probability: float = 0.0
    """chance that a frame repeats the last action instead: sticky actions, 0.25 in the literature"""
    frame_skip: int = 4
    """frames that each action is repeated for"""
    stack_num: int = 4
    """frames in an observation"""
    noop_max: int = 30
    """a game starts with up to this many no-ops"""
    use_fire_reset: bool = True
    """press FIRE at the start of a game that waits for it"""
    full_action_space: bool = False
    """all 18 actions, not only those with an effect in this game"""
    max_episode_steps: int = 27_000
    """steps after which a game is cut short (27,000 × 4 frames are 30 minutes)"""

    learning_rate: float = 2.5e-4
    """learning rate of RAdam"""
    anneal_lr: bool = False
    """let the learning rate fall linearly to 0 over the schedule"""
    schedule_timesteps: int | None = None
    """environment steps that both schedules (learning rate, ε) are laid out for; the length of the run if not given"""
    start_e: float = 1.0
    """ε of the first rollout"""
    end_e: float = 0.001
    """ε at the end of its decay"""
    exploration_fraction: float = 0.1
    """share of the schedule over which ε decays linearly"""
    gamma: float = 0.99
    """discount factor γ"""
    q_lambda: float = 0.65
    """λ of the Q(λ) returns; 0 is one-step Q-learning"""
    num_minibatches: int = 32
    """minibatches, each one gradient step, that a rollout is divided into"""
    update_epochs: int = 2
    """passes over each rollout"""
    max_grad_norm: float = 10.0
    """the gradient's norm is clipped to this"""

    norm_type: Literal["layer_norm", "layer_norm_map", "batch_norm", "none"] = "layer_norm"
    """normalisation before each ReLU: over the channels at each position, over the whole feature map, over the batch"""
    l2_coef: float = 0.0
    """ℓ² regularisation of the output layer's weights: the coefficient of w in Eq. 9"""

    log_interval: int = 4_000
    """environment steps between two points of the curves (one rollout at least)"""
    checkpoint_interval: int = 250_000
    """environment steps between two checkpoints (there is always one at the end)"""
    track: bool = False
    """mirror the curves to Weights & Biases (needs `pip install wandb`)"""
    wandb_project_name: str = "pqn"
    """the Weights & Biases project"""
    wandb_entity: str | None = None
    """the Weights & Biases team"""


# Scores of a random player and of a human one (no-op starts, 30 minutes a game) in the 57 games of the literature
# fmt: off
RANDOM_AND_HUMAN = {
    "Alien": (227.8, 7127.7), "Amidar": (5.8, 1719.5), "Assault": (222.4, 742.0), "Asterix": (210.0, 8503.3),
    "Asteroids": (719.1, 47388.7), "Atlantis": (12850.0, 29028.1), "BankHeist": (14.2, 753.1),
    "BattleZone": (2360.0, 37187.5), "BeamRider": (363.9, 16926.5), "Berzerk": (123.7, 2630.4),
    "Bowling": (23.1, 160.7), "Boxing": (0.1, 12.1), "Breakout": (1.7, 30.5), "Centipede": (2090.9, 12017.0),
    "ChopperCommand": (811.0, 7387.8), "CrazyClimber": (10780.5, 35829.4), "Defender": (2874.5, 18688.9),
    "DemonAttack": (152.1, 1971.0), "DoubleDunk": (-18.6, -16.4), "Enduro": (0.0, 860.5),
    "FishingDerby": (-91.7, -38.7), "Freeway": (0.0, 29.6), "Frostbite": (65.2, 4334.7), "Gopher": (257.6, 2412.5),
    "Gravitar": (173.0, 3351.4), "Hero": (1027.0, 30826.4), "IceHockey": (-11.2, 0.9), "Jamesbond": (29.0, 302.8),
    "Kangaroo": (52.0, 3035.0), "Krull": (1598.0, 2665.5), "KungFuMaster": (258.5, 22736.3),
    "MontezumaRevenge": (0.0, 4753.3), "MsPacman": (307.3, 6951.6), "NameThisGame": (2292.3, 8049.0),
    "Phoenix": (761.4, 7242.6), "Pitfall": (-229.4, 6463.7), "Pong": (-20.7, 14.6), "PrivateEye": (24.9, 69571.3),
    "Qbert": (163.9, 13455.0), "Riverraid": (1338.5, 17118.0), "RoadRunner": (11.5, 7845.0), "Robotank": (2.2, 11.9),
    "Seaquest": (68.4, 42054.7), "Skiing": (-17098.1, -4336.9), "Solaris": (1236.3, 12326.7),
    "SpaceInvaders": (148.0, 1668.7), "StarGunner": (664.0, 10250.0), "Surround": (-10.0, 6.5),
    "Tennis": (-23.8, -8.3), "TimePilot": (3568.0, 5229.2), "Tutankham": (11.4, 167.6), "UpNDown": (533.4, 11693.2),
    "Venture": (0.0, 1187.5), "VideoPinball": (16256.9, 17667.9), "WizardOfWor": (563.5, 4756.5),
    "YarsRevenge": (3092.9, 54576.9), "Zaxxon": (32.5, 9173.3),
}
# fmt: on


# ------------------------------------------------------------------------------------------------ environments


def make_envs(args: Args, num_envs: int, seed: tuple[int, ...], render: bool = False):
    """A vector environment in which every copy has a random stream of its own. (Given a single seed, EnvPool seeds
    copy i with seed + i, and runs with neighbouring seeds would share all but one of their streams.)"""
    seeds = [int(s) >> 1 for s in np.random.SeedSequence(seed).generate_state(num_envs)]  # EnvPool takes an int32
    try:
        return envpool.make(
            args.env_id,
            env_type="gymnasium",
            num_envs=num_envs,
            seed=seeds,
            episodic_life=args.episodic_life,
            reward_clip=args.reward_clip,
            repeat_action_probability=args.repeat_action_probability,
            frame_skip=args.frame_skip,
            stack_num=args.stack_num,
            noop_max=args.noop_max,
            use_fire_reset=args.use_fire_reset,
            full_action_space=args.full_action_space,
            max_episode_steps=args.max_episode_steps,
            **({"render_mode": "rgb_array"} if render else {}),
        )
    except Exception as error:
        fail(f"cannot make {args.env_id}: {' '.join(str(error).split())[:200] or type(error).__name__}")


def spaces(envs):
    """Observation and action space of one environment."""
    return envs.observation_space, envs.action_space


def step_envs(envs, actions):
    """One step of every environment, in NumPy arrays.

    EnvPool resets on the *next* step: `obs` is the true successor even where an episode ends, and the step after it
    is a phantom, which ignores its action and only brings the first observation of a new episode (or life).
    `score` and `over` are the reward and the end of the game as a person would count them. A game that ends on the
    very step of its time limit is reported as truncated only; `info` knows better. (Of a life lost there it does not.)
    """
    obs, rewards, terminated, truncated, info = envs.step(actions.astype(np.int32))
    game_over = info["terminated"].astype(bool)
    return obs, rewards, terminated | game_over, truncated, info["reward"], game_over | truncated


class Collector:
    """Steps the environments and stores what they do. The training environments come first; those after them act
    greedily, are counted apart and are not stored."""

    def __init__(self, envs, network, args: Args, device):
        observation_space, action_space = spaces(envs)
        T, N, num_envs = args.num_steps, args.num_envs, args.num_envs + args.num_eval_envs
        self.envs, self.device, self.num_actions = envs, device, int(action_space.n)
        self.act = capture(partial(act, network), args, device)
        dtype = torch.uint8
        shape, on_cuda = observation_space.shape, device.type == "cuda"
        self.host_obs = torch.zeros((num_envs, *shape), dtype=dtype, pin_memory=on_cuda)
        self.obs = self.host_obs.to(device)  # the same tensor on a CPU
        self.stored_obs = torch.zeros((T, N, *shape), dtype=dtype, device=device)
        self.actions = torch.zeros((T, N), dtype=torch.int64, device=device)
        self.values = torch.zeros((T + 1, N), device=device)
        # These stay on the host until the rollout is over.
        self.rewards = np.zeros((T, N), dtype=np.float32)
        self.terminated, self.truncated, self.phantom = (np.zeros((T, N), dtype=bool) for _ in range(3))
        self.ended = np.zeros(num_envs, dtype=bool)  # by the last step, which makes the next one a phantom
        self.returns, self.lengths = np.zeros(num_envs), np.zeros(num_envs, dtype=np.int64)
        self.observe(envs.reset()[0])

    def observe(self, obs):
        self.host_obs.copy_(torch.from_numpy(obs))
        self.obs.copy_(self.host_obs, non_blocking=True)

    def collect(self, epsilon):
        """One rollout: its tensors (T, N), values with a row more, and the (environment, return, length) of the
        episodes that ended in it, in the training and in the greedy environments."""
        T, N = self.rewards.shape
        finished, finished_eval = [], []
        # Drawn on the host, so that every device explores alike
        explore = (torch.rand(T, N) < epsilon).to(self.device)
        random_actions = torch.randint(self.num_actions, (T, N)).to(self.device)
        for t in range(T):
            self.stored_obs[t] = self.obs[:N]
            actions, self.values[t] = self.act(self.obs, explore[t], random_actions[t])
            self.actions[t] = actions[:N]
            self.phantom[t] = self.ended[:N]
            obs, rewards, terminated, truncated, score, over = step_envs(self.envs, actions.cpu().numpy())
            self.observe(obs)
            self.rewards[t], self.terminated[t], self.truncated[t] = rewards[:N], terminated[:N], truncated[:N]
            self.returns += score
            self.lengths += ~self.ended
            self.ended = terminated | truncated
            for i in np.flatnonzero(over):
                (finished if i < N else finished_eval).append((int(i), float(self.returns[i]), int(self.lengths[i])))
                self.returns[i] = self.lengths[i] = 0
        _, self.values[T] = self.act(self.obs, explore[0], random_actions[0])
        on_host = self.rewards, self.terminated, self.truncated, ~self.phantom
        rewards, terminated, truncated, real = (torch.from_numpy(x).to(self.device) for x in on_host)
        rollout = self.stored_obs, self.actions, rewards, self.values, terminated, truncated, real
        return rollout, finished, finished_eval


@torch.no_grad()
def act(network, obs, explore, random_actions):
    """ε-greedy actions of the training environments, greedy ones of the others; max_a Q(s, a) of the former."""
    values, actions = network(obs).max(1)
    N = len(explore)
    actions[:N] = torch.where(explore, random_actions, actions[:N])
    return actions, values[:N]


# ----------------------------------------------------------------------------------------------------- network


class QNetwork(nn.Module):
    """The Nature CNN; layer → norm → ReLU everywhere but at the output (Eq. 5)."""

    def __init__(self, observation_space, action_space, args: Args):
        super().__init__()
        self.dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        self.body = nn.Sequential(
            initialise(nn.Conv2d(observation_space.shape[0], 32, kernel_size=8, stride=4), scale=2),
            norm_layer(args.norm_type, 32, 20, 20),
            nn.ReLU(),
            initialise(nn.Conv2d(32, 64, kernel_size=4, stride=2), scale=2),
            norm_layer(args.norm_type, 64, 9, 9),
            nn.ReLU(),
            initialise(nn.Conv2d(64, 64, kernel_size=3, stride=1), scale=2),
            norm_layer(args.norm_type, 64, 7, 7),
            nn.ReLU(),
            nn.Flatten(),
            initialise(nn.Linear(64 * 7 * 7, 512), scale=2),
            norm_layer(args.norm_type, 512),
            nn.ReLU(),
        )
        self.head = initialise(nn.Linear(512, int(action_space.n)), scale=1)

    def forward(self, obs):
        # uint8 up to here; channels last is the layout in which convolutions and the norms over channels are fastest
        with torch.autocast(obs.device.type, self.dtype, enabled=self.dtype == torch.bfloat16):
            scaled = obs.to(self.dtype) / 255
            features = self.body(scaled.contiguous(memory_format=torch.channels_last))
        return self.head(features.float())  # bf16 has 3 digits: too few to tell the Q-values of two actions apart


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels, at each position by itself: what Flax's LayerNorm does, on (N, H, W, C)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def norm_layer(norm_type, channels, *positions):
    if norm_type == "layer_norm":  # Eq. 6, its 1/√k aside; learned scale and shift
        return (ChannelLayerNorm if positions else nn.LayerNorm)(channels, eps=1e-6)
    if norm_type == "layer_norm_map":  # what PyTorch ports of PQN do
        return nn.LayerNorm((channels, *positions), eps=1e-6)
    if norm_type == "batch_norm":  # Flax keeps 0.99 of the running statistics at each step: PyTorch's momentum 0.01
        return (nn.BatchNorm2d if positions else nn.BatchNorm1d)(channels, momentum=0.01)
    return nn.Identity()


def initialise(layer, scale):
    """Weights as Flax draws them: He-normal for scale 2, LeCun-normal for 1, cut off at 2σ; no bias at first."""
    std = math.sqrt(scale / layer.weight[0].numel()) / 0.87962566103423978  # the σ of what the cut leaves of N(0, 1)
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(layer.bias)
    return layer


# ---------------------------------------------------------------------------------------------- Q(λ) and learning


def q_lambda_targets(rewards, values, terminated, truncated, gamma: float, q_lambda: float):
    """λ-returns (Algorithm 1, line 10), backwards in time from R_T = max_a Q(s_T, a):

        R_t = r_t                                                  where the episode terminates at s_{t+1},
        R_t = r_t + γ max_a Q(s_{t+1}, a)                          where it is cut short there,
        R_t = r_t + γ [λ R_{t+1} + (1 − λ) max_a Q(s_{t+1}, a)]    everywhere else.

    rewards, terminated, truncated: (T, N); values: (T + 1, N), max_a Q(s_t, a). The step after the end of an episode
    is a phantom: its target means nothing and is never used, and no trace leads from it to a real step.
    """
    trace = gamma * q_lambda * ~(terminated | truncated)
    # R_t = base_t + trace_t R_{t+1}: all but the recursion in one go
    base = rewards + (gamma * ~terminated - trace) * values[1:]
    targets = torch.empty_like(rewards)
    future = values[-1]
    for t in reversed(range(len(rewards))):
        future = torch.addcmul(base[t], trace[t], future, out=targets[t])
    return targets


def td_loss(network, obs, actions, targets, real, l2_coef: float):
    """½ mean (R − Q(s, a))² over the real transitions of a minibatch (Algorithm 1, line 14); their mean Q(s, a)."""
    q_values = network(obs).gather(1, actions.unsqueeze(1)).squeeze(1)
    errors = torch.where(real, targets - q_values, 0.0)
    count = real.sum()
    loss = 0.5 * errors.square().sum() / count
    if l2_coef:  # its gradient is the coefficient times w, the last layer's part of Eq. 9
        loss = loss + 0.5 * l2_coef * network.head.weight.square().sum()
    return loss, torch.where(real, q_values.detach(), 0.0).sum() / count


def flatten_parameters(network):
    """Moves all parameters into one tensor and their gradients into another, of which the network sees views:
    clipping and RAdam then take a handful of operations, not a handful per layer."""
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in network.parameters()]))
    flat.grad = torch.zeros_like(flat)
    start = 0
    for p in network.parameters():
        part = slice(start, start + p.numel())
        p.data, p.grad = flat.data[part].view_as(p), flat.grad[part].view_as(p)
        start += p.numel()
    return flat


class RAdam:
    """The update of torch.optim.RAdam (Liu et al., 2020) on a single tensor, with far less overhead. prepare() comes
    before each step() and sets its two step sizes: tensors, where a CUDA graph of step() finds them."""

    def __init__(self, parameters, beta1=0.9, beta2=0.999, eps=1e-8):
        self.parameters, self.steps = parameters, 0
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.mean, self.square = torch.zeros_like(parameters.data), torch.zeros_like(parameters.data)
        self.plain, self.adaptive = (torch.zeros((), device=parameters.device) for _ in range(2))

    def prepare(self, learning_rate):
        """Plain momentum, until enough gradients (ρ_t > 5) make the adaptive step reliable."""
        self.steps += 1
        t, decay1, decay2 = self.steps, self.beta1**self.steps, self.beta2**self.steps
        size = learning_rate / (1 - decay1)
        if size > torch.finfo(torch.float32).max:
            size = math.inf  # it leaves no finite weight, which stops the run
        longest = 2 / (1 - self.beta2) - 1  # ρ_∞
        length = longest - 2 * t * decay2 / (1 - decay2)  # ρ_t
        rectified = length > 5
        if rectified:
            trust = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)  # r_t²
            size *= math.sqrt(trust * (1 - decay2))
        self.plain.fill_(0.0 if rectified else size)
        self.adaptive.fill_(size if rectified else 0.0)

    def step(self):
        gradient = self.parameters.grad
        self.mean.lerp_(gradient, 1 - self.beta1)
        self.square.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        self.parameters.data.sub_(self.mean * (self.adaptive / (self.square.sqrt() + self.eps) + self.plain))

    def state_dict(self):
        return {"mean": self.mean, "square": self.square, "steps": self.steps}

    def load_state_dict(self, state):
        self.mean.copy_(state["mean"])
        self.square.copy_(state["square"])
        self.steps = state["steps"]


def train_step(network, parameters, optimizer, args: Args, *minibatch):
    """One gradient step on a minibatch (obs, actions, targets, real); the loss, the mean Q-value and the norm of the
    gradient."""
    loss, q_value = td_loss(network, *minibatch, args.l2_coef)
    parameters.grad.zero_()
    loss.backward()
    grad_norm = parameters.grad.norm()
    parameters.grad.mul_((args.max_grad_norm / grad_norm).clamp(max=1.0))
    optimizer.step()
    return torch.stack([loss.detach(), q_value, grad_norm])


def capture(function, args: Args, device):
    """On CUDA, `function` of tensors as a CUDA graph, which replays all of its kernels with a single launch; elsewhere
    `function` itself. The first calls run as they are, which warms everything up; the next one is recorded."""
    if device.type != "cuda" or not args.cuda_graph:
        return function
    calls, stream, graph, inputs, outputs = 0, torch.cuda.Stream(device), None, None, None

    def replay(*tensors):
        nonlocal calls, graph, inputs, outputs
        calls += 1
        if calls <= 3:
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                outputs = function(*tensors)
            torch.cuda.current_stream(device).wait_stream(stream)
            return outputs
        if graph is None:
            graph, inputs = torch.cuda.CUDAGraph(), tensors
            with torch.cuda.graph(graph):
                outputs = function(*inputs)
        for recorded, tensor in zip(inputs, tensors, strict=True):  # a graph reads and writes where it always did
            if recorded.data_ptr() != tensor.data_ptr():
                recorded.copy_(tensor)
        graph.replay()
        return outputs

    return replay


def why_not_finite(metrics, rewards):
    """What to tell the user when a loss or a gradient is not finite."""
    if not np.isfinite(rewards).all():
        return "the environment returned a reward that is not finite"
    name = "a weight" if metrics.isfinite().all() else "a gradient" if metrics[0].isfinite() else "the loss"
    return f"{name} is not finite: rewards or --learning-rate too high, or an observation that is not finite"


def linear_schedule(start, end, step, duration):
    return start + (end - start) * min(1.0, step / duration) if duration else end


# ------------------------------------------------------------------------------- errors, progress and checkpoints


def fail(message):
    """Ends the program for a reason that the user can mend."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check(args: Args):
    """Every reason to refuse a run."""
    given = {name: (f"--{name.replace('_', '-')}", value) for name, value in asdict(args).items()}
    counts = "total_timesteps num_envs num_steps num_minibatches update_epochs log_interval checkpoint_interval".split()
    counts += "frame_skip stack_num noop_max max_episode_steps".split()
    shares = "gamma q_lambda start_e end_e exploration_fraction repeat_action_probability".split()
    rates = "learning_rate max_grad_norm".split()
    batch_size = args.num_envs * args.num_steps
    games = ["".join(word.capitalize() for word in game.split("_")) + "-v5" for game in atari_game_list]
    close = difflib.get_close_matches(args.env_id, games, n=3, cutoff=0.5)
    checks = [
        (
            args.env_id not in games,
            f"{args.env_id!r} is no Atari game of EnvPool" + (f", did you mean {' or '.join(close)}?" if close else ""),
        ),
        *[(value < 1, f"{option} must be at least 1, not {value}") for option, value in map(given.get, counts)],
        *[
            (not 0 <= value <= 1, f"{option} must lie in [0, 1], not {value}")
            for option, value in map(given.get, shares)
        ],
        *[
            (not 0 < value < math.inf, f"{option} must be positive and finite, not {value}")
            for option, value in map(given.get, rates)
        ],
        (not 0 <= args.l2_coef < math.inf, f"--l2-coef must be finite and not negative, not {args.l2_coef}"),
        (args.num_eval_envs < 0, f"--num-eval-envs must not be negative, not {args.num_eval_envs}"),
        (not 0 <= args.seed < 2**63, f"--seed must lie in [0, 2^63), not {args.seed}"),
        (
            batch_size % max(args.num_minibatches, 1) > 0,
            f"--num-minibatches {args.num_minibatches} does not divide the {batch_size} steps of a rollout "
            f"(--num-envs {args.num_envs} × --num-steps {args.num_steps})",
        ),
        (
            args.norm_type == "batch_norm" and batch_size == args.num_minibatches,
            "batch norm needs minibatches of two steps or more: lower --num-minibatches",
        ),
        (
            args.total_timesteps < batch_size,
            f"--total-timesteps {args.total_timesteps} is less than one rollout of {batch_size} steps",
        ),
        (
            args.schedule_timesteps is not None and args.schedule_timesteps < 1,
            f"--schedule-timesteps must be at least 1, not {args.schedule_timesteps}",
        ),
        (
            args.track and getattr(importlib.util.find_spec("wandb"), "origin", None) is None,
            "--track needs Weights & Biases: pip install wandb",
        ),
    ]
    for wrong, message in checks:
        if wrong:
            fail(message)


def pick_device(name):
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        device = torch.zeros(1, device=device).cpu().to(device).device  # tried out, and with its index
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device
    except Exception as error:
        fail(f"--device {name} cannot be used: {str(error).splitlines()[0][:200]}")


def pick_precision(name, device):
    if name != "auto":
        return name
    if device.type == "cpu":
        native = getattr(torch.cpu, "get_capabilities", dict)()
        return "bf16" if native.get("avx512_bf16") or native.get("amx_bf16") else "fp32"
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def keep_freed_memory():
    """Has glibc keep what large tensors free. By default it goes back to the system, and every page of the next tensor
    is a fault: on a CPU that doubles the time of acting."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
    except (AttributeError, OSError, TypeError):
        pass  # another C library


def open_run(args, first_step):
    """The run's folder and its TensorBoard writer."""
    name, started = re.sub(r"[^\w.-]", "-", args.env_id), int(time.time())
    try:
        while (folder := Path("runs", f"{name}__{Path(__file__).stem}__{args.seed}__{started}")).exists():
            started += 1
        folder = folder if args.resume is None else Path(args.resume)
        if args.track:
            import wandb

            wandb.init(
                project=args.wandb_project_name,
                entity=args.wandb_entity,
                id=folder.resolve().name,
                config=asdict(args),
                sync_tensorboard=True,
                resume="allow",
            )
        folder.mkdir(parents=True, exist_ok=args.resume is not None)
        # Points that a killed run wrote after its last checkpoint are dropped.
        writer = SummaryWriter(folder, purge_step=None if args.resume is None else first_step + 1)
    except Exception as error:  # of the file system or of Weights & Biases
        fail(f"cannot open the run {folder}: {' '.join(str(error).split())}")
    rows = "".join(f"|{name}|{value}|\n" for name, value in asdict(args).items())
    writer.add_text("hyperparameters", f"|option|value|\n|-|-|\n{rows}", first_step)
    return folder, writer


class Progress:
    """One live line on a terminal, a plain line every ten seconds in a pipe."""

    def __init__(self, args, first_step):
        self.total, self.first_step, self.live = args.total_timesteps, first_step, sys.stdout.isatty()
        self.started = self.shown = time.monotonic()

    def speed(self, step):
        return (step - self.first_step) / (time.monotonic() - self.started)

    def show(self, step, last_returns, eval_returns, epsilon):
        if time.monotonic() - self.shown < (0.2 if self.live else 10):
            return
        self.shown = time.monotonic()
        left = timedelta(seconds=int((self.total - step) / self.speed(step)))
        train, greedy = (f"{np.mean(returns):.1f}" if returns else "-" for returns in (last_returns, eval_returns))
        line = f"{step:,}/{self.total:,} steps, {self.speed(step):,.0f}/s, {left} left, "
        line += f"return {train}, greedy {greedy}, ε {epsilon:.3f}"
        if self.live:
            line = "\r\033[K" + line[: shutil.get_terminal_size().columns - 1]
        print(line, end="" if self.live else "\n", flush=True)

    def close(self):
        print("\r\033[K" if self.live else "", end="", flush=True)


def save_checkpoint(folder, checkpoint):
    """Written beside the old one and then put in its place, so that there is a whole one at any time."""
    unfinished, content = folder / "checkpoint.pt.tmp", io.BytesIO()
    torch.save(checkpoint, content)  # not into the file: its error on a full disk hides the system's
    try:
        with open(unfinished, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, folder / "checkpoint.pt")
    finally:
        unfinished.unlink(missing_ok=True)


def load_checkpoint(folder, script=Path(__file__).stem):
    path = Path(folder, "checkpoint.pt")
    if not os.path.isfile(path):
        fail(f"there is no checkpoint in {folder!r}: name a run's folder, runs/...")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # which executes no code
        needed = {"script", "args", "step", "network", "optimizer", "rng_state", "last_returns", "eval_returns"}
        whole = needed <= set(checkpoint) and "env_id" in checkpoint["args"]
    except Exception:
        whole = False
    if not whole:
        fail(f"{path} is broken, or no checkpoint of this project")
    if checkpoint["script"] != script:
        fail(f"{path} was made by {checkpoint['script']}.py, not by {script}.py")
    return checkpoint


def parse_args():
    """The command line. With --resume, what it does not say is as in the run that goes on."""
    args = tyro.cli(Args)
    if args.resume is None:
        return args
    saved = load_checkpoint(args.resume)["args"]
    try:
        args = tyro.cli(Args, default=Args(**saved))
    except TypeError:
        fail(f"the checkpoint in {args.resume} was made by another version of this script")
    if args.env_id != saved["env_id"]:
        fail(f"the checkpoint in {args.resume} is of {saved['env_id']}, not of {args.env_id}")
    return args


@contextmanager
def stop_on_signal():
    """A list that the first Ctrl-C or SIGTERM enters, so that the run ends in order. A second one ends it at once."""
    signals = []

    def note(signum, _):
        signals.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


# -------------------------------------------------------------------------------------------------------- main


def main(args: Args):
    # Set up: nothing is written before everything has been checked
    check(args)
    device = pick_device(args.device)
    keep_freed_memory()
    # The horizon is saved, so that a resumed run keeps it.
    args = replace(args, schedule_timesteps=args.schedule_timesteps or args.total_timesteps)
    args.precision = pick_precision(args.precision, device)
    checkpoint = None if args.resume is None else load_checkpoint(args.resume)
    global_step = first_step = checkpoint["step"] if checkpoint else 0
    batch_size = args.num_envs * args.num_steps
    minibatch_size = batch_size // args.num_minibatches
    if first_step + batch_size > args.total_timesteps:
        fail(f"{args.resume} has done {first_step} steps already: ask for more with --total-timesteps")
    envs = make_envs(args, args.num_envs + args.num_eval_envs, (args.seed, first_step))  # fresh seeds after --resume
    torch.manual_seed(args.seed)
    network = QNetwork(*spaces(envs), args)
    if checkpoint:
        try:
            network.load_state_dict(checkpoint["network"])
        except RuntimeError:
            fail(f"the checkpoint in {args.resume} is of another network or another environment")
    network.to(device)
    parameters = flatten_parameters(network)
    optimizer = RAdam(parameters)
    compute_targets = capture(partial(q_lambda_targets, gamma=args.gamma, q_lambda=args.q_lambda), args, device)
    train = capture(partial(train_step, network, parameters, optimizer, args), args, device)
    collector = Collector(envs, network, args, device)
    last_returns, eval_returns = deque(maxlen=100), deque(maxlen=100)
    if checkpoint:
        try:
            optimizer.load_state_dict(checkpoint["optimizer"])
            torch.set_rng_state(checkpoint["rng_state"])
        except (KeyError, RuntimeError, TypeError):
            fail(f"the checkpoint in {args.resume} was made by another version of this script")
        last_returns.extend(checkpoint["last_returns"])
        eval_returns.extend(checkpoint["eval_returns"])
    folder, writer = open_run(args, first_step)
    progress = Progress(args, first_step)

    def save():
        state = {"script": Path(__file__).stem, "args": asdict(args), "step": global_step}
        state |= {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"rng_state": torch.get_rng_state()}
        state |= {"last_returns": list(last_returns), "eval_returns": list(eval_returns)}
        save_checkpoint(folder, state)
        writer.flush()

    final_rate = 0.0 if args.anneal_lr else args.learning_rate
    metrics, updates, episodes, eval_episodes = torch.zeros(3, device=device), 0, [], []  # since the last point
    try:
        with stop_on_signal() as stopped:
            print(
                f"{folder}: {args.env_id} on {device} in {args.precision}, {parameters.numel():,} parameters",
                flush=True,
            )
            if args.anneal_lr and args.total_timesteps > args.schedule_timesteps:
                print(f"from step {args.schedule_timesteps:,} on the learning rate is 0: see --schedule-timesteps")
            while global_step + batch_size <= args.total_timesteps and not stopped:
                # Collect
                decay_steps = args.exploration_fraction * args.schedule_timesteps
                epsilon = linear_schedule(args.start_e, args.end_e, global_step, decay_steps)
                network.eval()
                rollout, finished, finished_eval = collector.collect(epsilon)
                obs, actions, rewards, values, terminated, truncated, real = rollout
                episodes, eval_episodes = episodes + finished, eval_episodes + finished_eval

                # Compute targets
                targets = compute_targets(rewards, values, terminated, truncated)

                # Learn
                network.train()
                data = [x.flatten(0, 1) for x in (obs, actions, targets, real)]
                real_on_host = torch.as_tensor(~collector.phantom).flatten()
                for epoch in range(args.update_epochs):
                    permutation = torch.randperm(batch_size)
                    # A minibatch of nothing but phantoms is no step at all
                    any_real = real_on_host[permutation].view(-1, minibatch_size).any(1).tolist()
                    permutation = permutation.to(device)
                    shuffled = zip(*(x[permutation].split(minibatch_size) for x in data), strict=True)
                    for i, minibatch in enumerate(shuffled):
                        done = global_step + batch_size * (epoch + i / args.num_minibatches) / args.update_epochs
                        learning_rate = linear_schedule(args.learning_rate, final_rate, done, args.schedule_timesteps)
                        if any_real[i]:
                            optimizer.prepare(learning_rate)
                            metrics += train(*minibatch)
                            updates += 1
                if not (metrics.isfinite().all() and parameters.isfinite().all()):
                    raise FloatingPointError(
                        f"step {global_step + batch_size}: {why_not_finite(metrics, collector.rewards)}"
                    )
                global_step += batch_size

                # Log
                last_returns.extend(episode_return for _, episode_return, _ in finished)
                eval_returns.extend(episode_return for _, episode_return, _ in finished_eval)
                if global_step % args.log_interval < batch_size or global_step + batch_size > args.total_timesteps:
                    points = {"charts/SPS": progress.speed(global_step), "charts/epsilon": epsilon}
                    points["charts/learning_rate"] = learning_rate
                    if updates:
                        names = "losses/td_loss", "losses/q_values", "losses/grad_norm"
                        points |= zip(names, (metrics / updates).tolist(), strict=True)
                    for group, ended in (("charts", episodes), ("eval", eval_episodes)):
                        if ended:
                            _, mean_return, mean_length = np.mean(ended, axis=0)
                            points |= {f"{group}/episodic_return": mean_return, f"{group}/episodic_length": mean_length}
                            if (game := args.env_id.removesuffix("-v5")) in RANDOM_AND_HUMAN:
                                random, human = RANDOM_AND_HUMAN[game]
                                points[f"{group}/human_normalized_score"] = (mean_return - random) / (human - random)
                    for name, value in points.items():
                        writer.add_scalar(name, value, global_step)
                    metrics.zero_()
                    updates, episodes, eval_episodes = 0, [], []
                progress.show(global_step, last_returns, eval_returns, epsilon)

                # Checkpoint
                if global_step % args.checkpoint_interval < batch_size:
                    save()
            save()
            if global_step + batch_size > args.total_timesteps:
                stopped.clear()  # by a signal that came when nothing was left to stop
        writer.close()
    except (FloatingPointError, OSError) as error:
        progress.close()
        saved = (folder / "checkpoint.pt").exists()
        print(f"error: {error}" + f"; --resume {folder} goes on from its last checkpoint" * saved, file=sys.stderr)
        raise SystemExit(1) from None
    progress.close()
    mean = lambda returns: f"{np.mean(returns):.1f} ± {np.std(returns):.1f}" if returns else "none ended"
    print(f"{'stopped' if stopped else 'done'} at step {global_step:,}, {progress.speed(global_step):,.0f} steps/s")
    print(f"return of the last {len(last_returns)} episodes {mean(last_returns)}, greedy {mean(eval_returns)}")
    print(f"{'go on with --resume' if stopped else 'evaluate and watch with python play.py'} {folder}", flush=True)
    if stopped:
        raise SystemExit(128 + stopped[0])


if __name__ == "__main__":
    main(parse_args())
