"""Recurrent PQN on Atari: an LSTM over single frames, after "Simplifying Deep Temporal Difference Learning" (Gallici et
al., ICLR 2025), which reports recurrent agents for other environments.

The agent of pqn_atari_envpool.py with memory in place of stacked frames: a minibatch is whole sequences of some
environments, unrolled from the state they were played with, and Q(λ) returns are computed along them with the network
as it is at that moment. After main() comes only bookkeeping.

    python pqn_atari_lstm.py --env-id Breakout-v5
    python pqn_atari_lstm.py --resume runs/Pong-v5__pqn_atari_lstm__1__1700000000 --total-timesteps 2e7
    python play.py runs/Pong-v5__pqn_atari_lstm__1__1700000000 --video pong.mp4
"""

import ctypes
import difflib
import fcntl
import io
import math
import os
import re
import shutil
import signal
import sys
import time
import traceback
import zipfile
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import envpool
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from envpool.atari.registration import atari_game_list
from torch.utils.tensorboard import SummaryWriter

# The type of an option says which values it may have, in words and as a test: see check()
Count = Annotated[int, "a whole number of at least 1", lambda x: isinstance(x, int) and x >= 1]
Whole = Annotated[int, "a whole number of at least 0", lambda x: isinstance(x, int) and x >= 0]
Share = Annotated[float, "in [0, 1]", lambda x: 0 <= x <= 1]
Positive = Annotated[float, "positive and below 1e30", lambda x: 0 < x < 1e30]


@dataclass
class Args:
    env_id: str = "Breakout-v5"  # one of EnvPool's 104 Atari games
    total_timesteps: Count = 10_000_000  # environment steps of the whole run, all environments together
    seed: Annotated[int, "in [0, 2^63)", lambda x: 0 <= x < 2**63] = 1  # every environment draws its own stream from it
    device: str = "auto"  # any torch device; "auto" takes CUDA when present
    # arithmetic of the network's body; "auto" is bf16 where that is native. On CUDA, fp32 has TF32 convolutions
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    cuda_graph: bool = True  # on CUDA, capture acting, targets and gradient step as graphs
    compile: bool = False  # compile the gradient step: minutes at the start, less time for each step
    resume: str | None = None  # go on with the run in this folder; the other options default to those it started with
    num_envs: Count = 128  # environments stepped in parallel
    num_steps: Count = 32  # steps in each environment between two rounds of learning
    num_eval_envs: Whole = 8  # further environments that act greedily beside the training ones and are not trained on
    episodic_life: bool = True  # a lost life ends the episode for learning (never for the logged returns)
    reward_clip: bool = True  # learn from the sign of the rewards (the logged returns are the game's own)
    # chance that a frame repeats the last action instead: sticky actions, 0.25 in the literature
    repeat_action_probability: Share = 0.0
    frame_skip: Count = 4  # frames that each action is repeated for
    stack_num: Count = 1  # frames in an observation
    noop_max: Count = 30  # a game, or life, starts with up to this many no-ops
    use_fire_reset: bool = True  # press FIRE after that, where the game has it
    full_action_space: bool = False  # all 18 actions, not only those with an effect in this game
    max_episode_steps: Count = 27_000  # steps after which a game is cut short (27,000 × 4 frames are 30 minutes)

    learning_rate: Positive = 2.5e-4  # learning rate of RAdam
    anneal_lr: bool = False  # let the learning rate fall linearly to 0 over the schedule
    # environment steps that both schedules (learning rate, ε) are laid out for; the length of the run if not given
    schedule_timesteps: Annotated[int | None, "at least 1", lambda x: x is None or x >= 1] = None
    start_e: Share = 1.0  # ε of the first rollout
    end_e: Share = 0.001  # ε at the end of its decay
    exploration_fraction: Share = 0.1  # share of the schedule over which ε decays linearly
    gamma: Share = 0.99  # discount factor γ
    q_lambda: Share = 0.65  # λ of the Q(λ) returns; 0 is one-step Q-learning
    num_minibatches: Count = 32  # minibatches, each one gradient step and whole sequences of some environments
    update_epochs: Count = 2  # passes over each rollout
    max_grad_norm: Positive = 10.0  # the gradient's norm is clipped to this

    lstm_size: Count = 128  # width of the LSTM
    # bias of the forget gate at the start: at 0 half of the memory is gone after a step, at 4 after 38
    forget_bias: Annotated[float, "in [-20, 20]", lambda x: -20 <= x <= 20] = 0.0
    # steps of the previous rollout that are replayed to warm the state up, without loss
    memory_window: Whole = 0
    # normalisation before each ReLU: over the channels at each position, over the whole feature map, over the batch
    norm_type: Literal["layer_norm", "layer_norm_map", "batch_norm", "none"] = "layer_norm"
    # ℓ² regularisation of the output layer, as in Eq. 9
    l2_coef: Annotated[float, "in [0, 1e30)", lambda x: 0 <= x < 1e30] = 0.0
    log_interval: Count = 4_000  # environment steps between two points of the curves (one rollout at least)
    checkpoint_interval: Count = 250_000  # environment steps between checkpoints (there is always one at the end)
    track: bool = False  # mirror the curves to Weights & Biases (needs `pip install wandb`)
    wandb_project_name: str = "pqn"  # the Weights & Biases project
    wandb_entity: str | None = None  # the Weights & Biases team


# ------------------------------------------------------------------------------------------------ environments
def make_envs(args: Args, num_envs: int, seed: tuple[int, ...], **options):
    """A vector environment in which every copy has a random stream of its own. (Given a single seed, EnvPool seeds
    copy i with seed + i, and runs with neighbouring seeds would share all but one of their streams.)"""
    seeds = [int(s) >> 1 for s in np.random.SeedSequence(seed).generate_state(num_envs)]  # EnvPool takes an int32
    games = {f"{game.replace('_', '')}-v5": f"{game.title().replace('_', '')}-v5" for game in atari_game_list}
    if args.env_id not in games.values():
        close = difflib.get_close_matches(args.env_id.lower(), games, n=1)
        hint = f"did you mean {games[close[0]]}?" if close else "pqn.py is for other environments"
        fail(f"{args.env_id!r} is no Atari game of EnvPool: {hint}")
    names = "episodic_life reward_clip repeat_action_probability frame_skip stack_num noop_max use_fire_reset"
    options |= {name: getattr(args, name) for name in f"{names} full_action_space max_episode_steps".split()}
    try:
        return envpool.make(args.env_id, env_type="gymnasium", num_envs=num_envs, seed=seeds, **options)
    except Exception as error:
        fail(f"cannot make {args.env_id}: {error}")


def spaces(envs):
    """Observation and action space of one environment."""
    return envs.observation_space, envs.action_space


def step_envs(envs, actions):
    """One step of every environment, in NumPy arrays.

    EnvPool resets on the step *after* an episode's end. So `obs` is the true successor even where an episode ends, and
    the step after it is a phantom: its action is ignored, it only brings a new episode's (or life's) first observation.
    `score` and `over` are what the logged returns count: the game's own points, and the end of the whole game. A game
    that ends on the very step of its time limit is reported as truncated; `info` knows better. (Not of a lost life.)
    """
    obs, rewards, terminated, truncated, info = envs.step(actions.astype(np.int32))
    game_over = info["terminated"].astype(bool)
    score, over = info["reward"], game_over | truncated
    return obs, rewards, terminated | game_over, truncated, score, over


@torch.no_grad()
def act(network, obs, last_actions, starts, hidden, cell, explore, random_actions):
    """ε-greedy actions of the training environments, greedy ones of the others; the state after this observation."""
    q_values, state = network(obs[None], last_actions[None], starts[None], (hidden, cell))
    actions = q_values[0].argmax(1)
    N = len(explore)
    actions[:N] = torch.where(explore, random_actions, actions[:N])
    return actions, state


class Collector:
    """Steps the environments. What the first N do is stored, to train on; the rest act greedily, for their returns.

    What the network sees has W + T + 1 rows: a window of W from the rollout before, this one's T, and the observation
    after them. A row holds an observation, the action before it, and whether a new episode starts with it.
    """

    def __init__(self, envs, network, args: Args, device):
        obs = torch.from_numpy(envs.reset()[0])
        T, N, num_envs = args.num_steps, args.num_envs, args.num_envs + args.num_eval_envs
        self.window = W = min(args.memory_window, T)
        self.envs, self.device, self.num_actions = envs, device, int(spaces(envs)[1].n)
        self.act = capture(partial(act, network), args, device)
        dtype = obs.dtype if obs.dtype in (torch.uint8, torch.int32, torch.int64) else torch.float32
        self.host_obs = torch.zeros(obs.shape, dtype=dtype, pin_memory=device.type == "cuda")
        self.obs = self.host_obs.to(device)  # the same tensor on a CPU
        self.host_starts = torch.ones(num_envs, dtype=torch.bool, pin_memory=device.type == "cuda")
        self.starts = self.host_starts.to(device)  # where the observation at hand is the first of an episode
        self.last_actions = torch.zeros(num_envs, dtype=torch.int64, device=device)
        self.state = network.lstm.initial_state(num_envs, device)
        self.stored_obs = torch.zeros((W + T + 1, N, *obs.shape[1:]), dtype=dtype, device=device)
        self.stored_last_actions = torch.zeros((W + T + 1, N), dtype=torch.int64, device=device)
        self.stored_starts = torch.zeros((W + T + 1, N), dtype=torch.bool, device=device)
        self.stored_state, self.next_state = (network.lstm.initial_state(N, device) for _ in range(2))
        self.actions = torch.zeros((T, N), dtype=torch.int64, device=device)
        self.rewards = np.zeros((T, N), dtype=np.float32)  # this and what follows stay on the host
        self.terminated, self.truncated, self.real = (np.zeros((T, N), dtype=bool) for _ in range(3))
        self.ended = np.zeros(num_envs, dtype=bool)  # by the last step, which makes the next one a phantom
        self.returns, self.lengths = np.zeros(num_envs), np.zeros(num_envs, dtype=np.int64)
        self.observe(obs.numpy(), np.ones(num_envs, dtype=bool))

    def observe(self, obs, starts):
        if on_host := isinstance(obs, np.ndarray):  # and not a tensor, as some environments on a GPU give
            np.copyto(self.host_obs.numpy(), obs, casting="unsafe")  # PyTorch's copy would wake all of its threads
        self.obs.copy_(self.host_obs if on_host else obs, non_blocking=True)
        np.copyto(self.host_starts.numpy(), starts)
        self.starts.copy_(self.host_starts, non_blocking=True)

    def store(self, row):
        N = self.actions.shape[1]
        self.stored_obs[row], self.stored_last_actions[row] = self.obs[:N], self.last_actions[:N]
        self.stored_starts[row] = self.starts[:N]

    def collect(self, epsilon):
        """One rollout: what the network sees, from which state, and tensors of T × N; and (environment, return, length)
        of the episodes that ended in it, in the training environments and in the greedy ones."""
        (T, N), (rank, ranks), W = self.rewards.shape, processes(), self.window
        episodes, eval_episodes, mine = [], [], slice(rank * N, (rank + 1) * N)
        # Drawn on the host and for all processes, so that every device and any number of them explore alike
        explore = (torch.rand(T, N * ranks)[:, mine] < epsilon).to(self.device)
        random_actions = torch.randint(self.num_actions, (T, N * ranks))[:, mine].to(self.device)
        for stored in (self.stored_obs, self.stored_last_actions, self.stored_starts):
            stored[:W] = stored[T : T + W].clone()
        for stored, state in zip(self.stored_state, self.next_state, strict=True):
            stored.copy_(state)
        for t in range(T):
            if t == T - W:
                self.keep_state()  # from which the next rollout's window is replayed
            self.store(W + t)
            seen = self.obs, self.last_actions, self.starts, *self.state
            actions, self.state = self.act(*seen, explore[t], random_actions[t])
            self.actions[t] = actions[:N]
            self.last_actions.copy_(actions)
            self.real[t] = ~self.ended[:N]
            obs, rewards, terminated, truncated, score, over = step_envs(self.envs, actions.cpu().numpy())
            # The observation that ends an episode still sees its memory, for it bootstraps a truncation. The phantom
            # step after it brings the first observation of the next one, which must not see it.
            self.observe(obs, starts=self.ended)
            self.rewards[t], self.terminated[t], self.truncated[t] = rewards[:N], terminated[:N], truncated[:N]
            self.returns += score
            self.lengths += ~self.ended
            self.ended = terminated | truncated
            for i in np.flatnonzero(over):
                (episodes if i < N else eval_episodes).append((int(i), float(self.returns[i]), int(self.lengths[i])))
                self.returns[i] = self.lengths[i] = 0
        self.store(W + T)
        if W == 0:
            self.keep_state()
        if not np.isfinite(self.rewards).all():
            raise FloatingPointError("the environment returned a reward that is not finite")
        rest = (torch.from_numpy(x).to(self.device) for x in (self.rewards, self.terminated, self.truncated, self.real))
        hidden, cell = (x.unsqueeze(0) for x in self.stored_state)  # the environments are the second dimension
        seen = self.stored_obs, self.stored_last_actions, self.stored_starts, hidden, cell
        return (*seen, self.actions, *rest), episodes, eval_episodes

    def keep_state(self):
        for kept, state in zip(self.next_state, self.state, strict=True):
            kept.copy_(state[: len(kept)])


# ----------------------------------------------------------------------------------------------------- network
class QNetwork(nn.Module):
    """The Nature CNN; layer → norm → ReLU everywhere but at the output (Eq. 5). Its features and the one-hot last
    action enter an LSTM, whose output a linear layer turns into one value per action."""

    def __init__(self, observation_space, action_space, args: Args):
        super().__init__()
        self.dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        self.num_actions = int(action_space.n)
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
        self.lstm = LSTM(512 + self.num_actions, args.lstm_size, args.forget_bias)
        self.head = initialise(nn.Linear(args.lstm_size, self.num_actions), scale=1)

    def forward(self, obs, last_actions, starts, state):
        """Q-values (L, B, A) along L steps of B environments, and the state after them."""
        L, B = starts.shape
        # uint8 up to here; channels last is the layout in which convolutions and the norms over channels are fastest
        with torch.autocast(obs.device.type, self.dtype, enabled=self.dtype == torch.bfloat16):
            scaled = obs.flatten(0, 1).to(self.dtype) / 255
            features = self.body(scaled.contiguous(memory_format=torch.channels_last))
        actions = F.one_hot(last_actions, self.num_actions) * ~starts.unsqueeze(2)
        outputs, state = self.lstm(torch.cat([features.float().view(L, B, -1), actions], dim=2), starts, state)
        return self.head(outputs), state


class LSTM(nn.Module):
    """An LSTM whose state is zeroed where an episode starts, which PyTorch's own cannot do within a sequence. What
    does not depend on the state is one matrix product for all steps."""

    def __init__(self, inputs, size, forget_bias):
        super().__init__()
        self.size = size
        self.input = initialise(nn.Linear(inputs, 4 * size), scale=1)
        nn.init.constant_(self.input.bias[size : 2 * size], forget_bias)
        self.recurrent = nn.Parameter(
            torch.cat([nn.init.orthogonal_(torch.empty(size, size)) for _ in range(4)], dim=1)
        )

    def initial_state(self, sequences, device):
        return torch.zeros(sequences, self.size, device=device), torch.zeros(sequences, self.size, device=device)

    def forward(self, inputs, starts, state):
        hidden, cell = state
        goes_on, outputs = (~starts).unsqueeze(2).float(), []
        for gates, keep in zip(self.input(inputs).unbind(), goes_on.unbind(), strict=True):
            hidden, cell = hidden * keep, cell * keep
            gates = torch.addmm(gates, hidden, self.recurrent)
            write, forget, read = gates[:, : 3 * self.size].sigmoid().chunk(3, dim=1)
            cell = forget * cell + write * gates[:, 3 * self.size :].tanh()
            hidden = read * cell.tanh()
            outputs.append(hidden)
        return torch.stack(outputs), (hidden, cell)


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels, at each position by itself: what Flax's LayerNorm does, on (N, H, W, C)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def norm_layer(norm_type, channels, *positions):
    if norm_type == "layer_norm":  # Eq. 6 without its factor 1/√k, with a learned scale and shift
        return (ChannelLayerNorm if positions else nn.LayerNorm)(channels, eps=1e-6)
    if norm_type == "layer_norm_map":  # what CleanRL's PQN does
        return nn.LayerNorm((channels, *positions), eps=1e-6)
    if norm_type == "batch_norm":  # Flax keeps 0.99 of the running statistics at each step: PyTorch's momentum 0.01
        return (nn.BatchNorm2d if positions else nn.BatchNorm1d)(channels, momentum=0.01)
    return nn.Identity()


def initialise(layer, scale):
    """Weights as in Flax: a normal distribution cut off at 2σ, He's for scale 2 and LeCun's for 1; biases 0."""
    std = math.sqrt(scale / layer.weight[0].numel()) / 0.87962566103423978  # the σ of N(0, 1) after the cut
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(layer.bias)
    return layer


# ---------------------------------------------------------------------------------------------- Q(λ) and learning
def q_lambda_targets(rewards, values, terminated, truncated, gamma: float, q_lambda: float):
    """λ-returns (Algorithm 1, line 10), backwards in time from R_T = max_a Q(s_T, a):

        R_t = r_t                                                  where the episode terminates at s_{t+1},
        R_t = r_t + γ max_a Q(s_{t+1}, a)                          where it is cut short there,
        R_t = r_t + γ [λ R_{t+1} + (1 − λ) max_a Q(s_{t+1}, a)]    everywhere else.

    rewards, terminated, truncated: (T, N); values: (T + 1, N), max_a Q(s_t, a). The target of a phantom step means
    nothing: td_loss() leaves it out, and no trace leads from it to a real step.
    """
    trace = gamma * q_lambda * ~(terminated | truncated)
    # The weight of max_a Q(s_{t+1}, a) is 0 in the first case, γ in the second and γ − γλ in the third
    base = rewards + (gamma * ~terminated - trace) * values[1:]
    targets = torch.empty_like(rewards)
    future = values[-1]
    for t in reversed(range(len(rewards))):  # R_t = base_t + trace_t R_{t+1}
        future = torch.addcmul(base[t], trace[t], future, out=targets[t])
    return targets


def td_loss(network, args: Args, obs, last_actions, starts, hidden, cell, *rest):
    """½ mean (R − Q(s, a))² over the `count` real transitions of some sequences (Algorithm 1, line 14), with the
    λ-returns of the same Q-values; their mean Q(s, a). Several processes count them together: each has its part of
    these means, and of the gradient."""
    actions, rewards, terminated, truncated, real, count = rest
    window, state = len(obs) - len(actions) - 1, (hidden[0], cell[0])
    if window:
        with torch.no_grad():
            _, state = network(obs[:window], last_actions[:window], starts[:window], state)
    all_values, _ = network(obs[window:], last_actions[window:], starts[window:], state)
    next_values = all_values.detach().amax(2)
    targets = q_lambda_targets(rewards, next_values, terminated, truncated, args.gamma, args.q_lambda)
    q_values = all_values[:-1].gather(2, actions.unsqueeze(2)).squeeze(2)
    errors = torch.where(real, targets - q_values, 0.0)
    loss = 0.5 * errors.square().sum() / count
    if args.l2_coef:  # its gradient is the coefficient times w, the last layer's part of Eq. 9
        loss = loss + 0.5 * args.l2_coef * network.head.weight.square().sum()
    return loss, torch.where(real, q_values.detach(), 0.0).sum() / count


class RAdam:
    """Clipping, then the update of torch.optim.RAdam (Liu et al., 2020). All weights lie in one tensor and all
    gradients in another, of which the network sees views: a dozen operations a step, not a dozen per layer."""

    def __init__(self, network, max_grad_norm, beta1=0.9, beta2=0.999, eps=1e-8):
        self.max_grad_norm, self.beta1, self.beta2, self.eps = max_grad_norm, beta1, beta2, eps
        layers = list(network.parameters())
        sizes = [p.numel() for p in layers]
        self.weights = torch.cat([p.detach().flatten() for p in layers])
        self.gradient, self.mean, self.square = (torch.zeros_like(self.weights) for _ in range(3))
        for p, weights, gradient in zip(layers, self.weights.split(sizes), self.gradient.split(sizes), strict=True):
            p.data, p.grad = weights.view_as(p), gradient.view_as(p)
        self.steps = 0
        self.plain, self.adaptive = self.weights.new_zeros(2)  # see prepare()

    def prepare(self, learning_rate):
        """Sets how far the next step() goes: in tensors, so that it is compiled once and not for every length."""
        self.steps += 1
        t, decay1, decay2 = self.steps, self.beta1**self.steps, self.beta2**self.steps
        size = learning_rate / (1 - decay1)
        rho_inf = 2 / (1 - self.beta2) - 1
        rho = rho_inf - 2 * t * decay2 / (1 - decay2)  # ρ_t: how many gradients `square` averages, in effect
        rectified = rho > 5  # until then they are too few to divide by, and the step is plain momentum
        if rectified:
            trust = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)  # r_t²
            size *= math.sqrt(trust * (1 - decay2))
        self.plain.fill_(0.0 if rectified else size)
        self.adaptive.fill_(size if rectified else 0.0)

    def step(self):
        """Moves the weights along the clipped gradient; returns its norm before clipping."""
        norm = self.gradient.norm()
        self.gradient.mul_((self.max_grad_norm / norm).clamp(max=1.0))
        self.mean.lerp_(self.gradient, 1 - self.beta1)
        self.square.mul_(self.beta2).addcmul_(self.gradient, self.gradient, value=1 - self.beta2)
        self.weights.sub_(self.mean * (self.adaptive / (self.square.sqrt() + self.eps) + self.plain))
        return norm


def train_step(network, optimizer, args: Args, *minibatch):
    """One gradient step on a minibatch, the rollout of some of the environments; loss, mean Q-value, gradient norm."""
    loss, q_value = td_loss(network, args, *minibatch)
    optimizer.gradient.zero_()
    loss.backward()
    add_up(optimizer.gradient)
    return torch.stack([loss.detach(), q_value, optimizer.step()])


def minibatches(data, args: Args):
    """--update-epochs times the rollout, its environments shuffled and dealt out to --num-minibatches, each with the
    number of its real transitions; before it, how many epochs are done. One of nothing but phantoms is left out."""
    real = data[-1]
    for epoch in range(args.update_epochs):
        order = torch.randperm(real.shape[1]).to(real.device).view(args.num_minibatches, -1)
        counts = add_up(real[:, order].sum((0, 2)))
        for i, (rows, count, any_real) in enumerate(zip(order, counts, counts.tolist(), strict=True)):
            if any_real:  # index_select copies whole rows: on a CPU five times as fast as x[:, rows]
                yield epoch + i / args.num_minibatches, (*(x.index_select(1, rows) for x in data), count)


def linear_schedule(start, end, step, duration):
    return start + (end - start) * min(1.0, step / duration) if duration else end


# -------------------------------------------------------------------------------------------------------- main
def main(args: Args):
    # Set up: nothing is written before everything has been checked
    device = pick_device(args.device)
    rank, ranks = processes()
    check(args, ranks)
    keep_freed_memory()
    checkpoint = None if args.resume is None else load_checkpoint(args.resume)
    step = checkpoint["step"] if checkpoint else 0  # environment steps so far, of all environments together
    batch_size = args.num_envs * args.num_steps
    if step + batch_size > args.total_timesteps:
        fail(f"no rollout of {batch_size} steps fits between step {step} and --total-timesteps {args.total_timesteps}")
    # Saved with the run, so that --resume with a longer --total-timesteps does not stretch the schedules
    args = replace(args, schedule_timesteps=args.schedule_timesteps or args.total_timesteps)
    args = replace(args, precision=pick_precision(args.precision, device))
    horizon, final_rate = args.schedule_timesteps, 0.0 if args.anneal_lr else args.learning_rate
    share = {"num_envs": args.num_envs // ranks, "num_eval_envs": args.num_eval_envs * (rank == 0)}
    mine = replace(args, **share, l2_coef=args.l2_coef / ranks)  # what this one of several processes does
    envs = make_envs(args, mine.num_envs + mine.num_eval_envs, (args.seed, step, rank << 32))  # new seeds on --resume
    torch.manual_seed(args.seed)
    network = QNetwork(*spaces(envs), args)
    optimizer = RAdam(network.to(device), args.max_grad_norm)
    if checkpoint:
        restore(checkpoint, network, optimizer)
    if not os.getenv("OMP_NUM_THREADS") and len(optimizer.weights) * max(80, batch_size / args.num_minibatches) < 16e6:
        torch.set_num_threads(1)  # more threads gain little in so short steps, and stall beside other programs
    learn = partial(torch.compile(train_step) if args.compile else train_step, network, optimizer, mine)
    learn = capture(learn, args, device)

    with Run(args, optimizer.weights, checkpoint) as run:  # Ctrl-C, SIGTERM and SIGHUP set run.stopped
        collector = Collector(envs, network, mine, device)
        while step + batch_size <= args.total_timesteps and not run.stopped:
            # Collect
            epsilon = linear_schedule(args.start_e, args.end_e, step, args.exploration_fraction * horizon)
            network.eval()
            rollout, episodes, eval_episodes = collector.collect(epsilon)

            # Compute targets and learn
            network.train()
            metrics, updates = torch.zeros(3, device=device), 0
            for epochs, minibatch in minibatches(rollout, args):
                now = step + batch_size * epochs / args.update_epochs
                learning_rate = linear_schedule(args.learning_rate, final_rate, now, horizon)
                optimizer.prepare(learning_rate)
                metrics += learn(*minibatch)
                updates += 1
            if not (metrics.isfinite().all() & optimizer.weights.isfinite().all()):
                raise FloatingPointError("the loss or a weight is not finite: --learning-rate or rewards too high?")
            step += batch_size

            # Log
            run.log(step, epsilon, learning_rate, (episodes, eval_episodes), metrics, updates)

            # Checkpoint
            if step % args.checkpoint_interval < batch_size:
                run.save(step, network, optimizer)
        run.save(step, network, optimizer)
    del learn  # the process group waits until no CUDA graph holds its operations
    run.finish(step)


# ------------------------------------------------------------------------------------------------- bookkeeping
def fail(message, code=2):
    """Ends the program with one line for the user, by the first process to fail; with code 2, nothing is written."""
    (rank, ranks), is_first = processes(), True
    with suppress(RuntimeError):  # all processes share a counter, which may have ended with another of them
        is_first = ranks == 1 or dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    if is_first:
        print(f"error{f' in process {rank}' * (ranks > 1)}:", " ".join(message.split())[:500], file=sys.stderr)
    raise SystemExit(code)


def say(*words, end="\n"):
    with suppress(OSError):  # of a terminal or pipe that has been closed: the run goes on, and can be saved
        return print(*words, end=end, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def parse_args():
    """The command line, where 1e6 is a whole number. With --resume, it replaces options of the run that goes on."""
    whole = lambda match: f"{float(match[0]):.0f}" if float(match[0]).is_integer() else match[0]
    words = [re.sub(r"(?<![^=])\d+(\.\d+)?e\d+$", whole, word) for word in sys.argv[1:]]
    cli = partial(tyro.cli, Args, args=words, console_outputs=processes()[0] == 0)
    if (args := cli()).resume is not None:
        saved = Args(**load_checkpoint(args.resume)["args"])
        args = cli(default=saved)
        if args.env_id != saved.env_id:
            fail(f"the checkpoint in {args.resume} is of {saved.env_id}, not of {args.env_id}")
    return args


def check(args: Args, ranks: int = 1):
    """Refuses options that are out of range or do not fit together."""
    for option in fields(args):
        words, allowed = getattr(option.type, "__metadata__", ("", lambda _: True))
        if not allowed(value := getattr(args, option.name)):
            fail(f"--{option.name.replace('_', '-')} must be {words}, not {value}")
    if args.num_envs % ranks:
        fail(f"--num-envs {args.num_envs} cannot be shared out evenly among {ranks} processes")
    if args.num_envs // ranks % args.num_minibatches:
        fail(f"--num-minibatches {args.num_minibatches} does not divide {args.num_envs // ranks} environments")
    if args.norm_type == "batch_norm" and (args.memory_window > 0 or ranks > 1):
        fail("batch norm needs all steps of a minibatch in one process, and none of them twice in a --memory-window")
    if args.memory_window > args.num_steps:
        fail(f"--memory-window {args.memory_window} is more than the --num-steps {args.num_steps} of a rollout")
    if args.compile and not shutil.which(os.environ.get("CXX", "g++")):
        fail("--compile needs a C++ compiler: install g++, or name another one in CXX")


def pick_device(name):
    """The device, tried out. "cuda" is this process's GPU; so is "auto", or the CPU where there is none."""
    try:
        mine = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" or torch.cuda.is_available() else "cpu"
        (there := torch.zeros(1, device=mine if name in ("auto", "cuda") else name)).cpu()
        if there.device.type == "cuda":
            torch.cuda.set_device(there.device)
        return there.device
    except Exception as error:
        fail(f"--device {name} cannot be used: {error}")


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


def capture(function, args: Args, device):
    """On CUDA, `function` of tensors as a CUDA graph, which replays all of its kernels with a single launch; elsewhere
    `function` itself. The first calls run as they are, which warms everything up; the next one is recorded."""
    if device.type != "cuda" or not args.cuda_graph:
        return function
    calls, stream, graph, inputs, outputs = 0, torch.cuda.Stream(device), None, None, None

    def replay(*tensors):
        nonlocal calls, graph, inputs, outputs
        calls += 1
        inputs = inputs or [tensor.clone() for tensor in tensors]  # a graph reads and writes where it always did
        for own, tensor in zip(inputs, tensors, strict=True):
            own.copy_(tensor)
        if calls <= 3:
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                outputs = function(*inputs)
            torch.cuda.current_stream(device).wait_stream(stream)
            return outputs
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = function(*inputs)
        graph.replay()
        return outputs

    return replay


def processes():
    """Which of the processes that torchrun started this is, and how many they are; 0 and 1 without torchrun."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo" + ",cuda:nccl" * torch.cuda.is_available(), timeout=timedelta(minutes=10))
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def add_up(tensor):
    """Replaces the tensor by its sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def load_checkpoint(folder, script=Path(__file__).stem):
    if not os.path.isfile(path := Path(folder, "checkpoint.pt")):
        fail(f"there is no checkpoint in {folder!r}: name a run's folder, runs/...")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # which executes no code
        damaged = zipfile.ZipFile(path).testzip()  # checks the sums that torch.load() does not look at
        if damaged or checkpoint["script"] != script:
            raise ValueError("its data are damaged" if damaged else f"it was made by {checkpoint['script']}.py")
        sum([len(range(checkpoint["step"])), *checkpoint["last_returns"], *checkpoint["eval_returns"]])  # are numbers
        check(replace(Args(**checkpoint["args"]), compile=False))  # main() looks at what can be done here and now
        return checkpoint
    except Exception as error:
        fail(f"{path} is broken, or was not made by this version of {script}.py: {error}")


def restore(checkpoint, network, optimizer):
    try:
        network.load_state_dict(checkpoint["network"])
        optimizer.mean.copy_(checkpoint["optimizer"]["mean"])
        optimizer.square.copy_(checkpoint["optimizer"]["square"])
        optimizer.steps = int(checkpoint["optimizer"]["steps"])
        torch.set_rng_state(checkpoint["rng_state"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        fail(f"the checkpoint is of another network, environment or version: {error}")


class Run:
    """What a run leaves behind and shows: its folder, curves, checkpoint and a line now and then. Within `with`,
    the first Ctrl-C, SIGTERM or SIGHUP sets `stopped`, and the second one ends the process at once."""

    def __init__(self, args: Args, weights, checkpoint):
        checkpoint = checkpoint or {"step": 0, "last_returns": [], "eval_returns": []}
        self.args, self.first_step, self.live = args, checkpoint["step"], sys.stdout.isatty()
        self.last_returns = [deque(checkpoint[name], 100) for name in ("last_returns", "eval_returns")]
        self.episodes, self.metrics, self.updates = ([], []), np.zeros(3), 0  # since the last point of the curves
        self.signal = self.stopped = 0  # the last signal, and the one that all processes have agreed to stop for
        self.started = self.shown = time.monotonic()
        name = re.sub(r"[^\w.-]", "-", args.env_id) + f"__{Path(__file__).stem}__{args.seed}"
        self.folder = Path(args.resume or f"runs/{name}__{time.time_ns() // 1_000_000}")
        if processes()[0] > 0:  # the first process writes and shows what all of them do
            self.save = lambda *_: None
            return
        try:
            if args.track:
                import wandb

                names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "sync_tensorboard": True}
                wandb.init(**names, id=self.folder.resolve().name, config=asdict(args), resume="allow")
            self.folder.mkdir(parents=True, exist_ok=args.resume is not None)
            self.lock = open(self.folder / "lock", "w")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until the process ends, however it ends
            # Points that a killed run wrote after its last checkpoint are dropped
            self.writer = SummaryWriter(self.folder, purge_step=self.first_step + 1 if args.resume else None)
        except Exception as error:  # of the file system or of Weights & Biases
            reason = "another process is at work in it" if isinstance(error, BlockingIOError) else error
            fail(f"cannot open the run {self.folder}: {reason}")
        rows = "".join(f"|{k}|{v}|\n" for k, v in (asdict(args) | {"device": weights.device}).items())
        self.writer.add_text("hyperparameters", f"|option|value|\n|-|-|\n{rows}", self.first_step)
        device = f"{weights.device} ({torch.get_num_threads()} CPU threads)" + ", compiling first" * args.compile
        say(f"{self.folder}: {args.env_id} on {device}, {len(weights):,} parameters")
        if args.anneal_lr and args.total_timesteps > args.schedule_timesteps:
            say(f"from step {args.schedule_timesteps:,} on the learning rate is 0: see --schedule-timesteps")

    def log(self, step, epsilon, learning_rate, episodes, metrics, updates):
        """A point of every curve, the mean since the last one, when --log-interval is over; and the progress line."""
        everyone = [(self.signal, self.folder, episodes, metrics.tolist())] * processes()[1]
        if dist.is_initialized():
            dist.all_gather_object(everyone, everyone[0])
        signals, paths, lists, sums = zip(*everyone, strict=True)
        self.stopped, self.folder = max(signals), paths[0]  # several processes stop after the same rollout
        self.metrics += np.sum(sums, 0) / (1, 1, len(sums))  # each has its part of the first two, and the whole norm
        self.updates += updates
        for kept, last, *ended in zip(self.episodes, self.last_returns, *lists, strict=True):
            kept.extend(sum(ended, []))
            last.extend(episode_return for _, episode_return, _ in sum(ended, []))
        if processes()[0] > 0:
            return
        total, batch_size, now = self.args.total_timesteps, self.args.num_envs * self.args.num_steps, time.monotonic()
        self.speed = (step - self.first_step) / (now - self.started)
        if step % self.args.log_interval < batch_size or step + batch_size > total:
            points = {"charts/SPS": self.speed, "charts/epsilon": epsilon, "charts/learning_rate": learning_rate}
            if self.updates:
                names = "losses/td_loss", "losses/q_values", "losses/grad_norm"
                points |= zip(names, self.metrics / self.updates, strict=True)
            for group, ended in zip(("charts", "eval"), self.episodes, strict=True):
                if ended:
                    _, points[f"{group}/episodic_return"], points[f"{group}/episodic_length"] = np.mean(ended, axis=0)
            for name, value in points.items():
                self.writer.add_scalar(name, value, step)
            self.episodes, self.metrics, self.updates = ([], []), np.zeros(3), 0
        if now - self.shown > (0.2 if self.live else 10):  # a live line on a terminal, plain ones in a pipe
            self.shown, left = now, timedelta(seconds=int((total - step) / self.speed))
            line = f"{step:,}/{total:,} steps, {self.speed:,.0f}/s, {left} left, {self.summary()}, ε {epsilon:.3f}"
            say(f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}" if self.live else line + "\n", end="")

    def summary(self):
        train, greedy = (f"{np.mean(x):.1f} ± {np.std(x):.1f}" if x else "-" for x in self.last_returns)
        return f"return of the last {len(self.last_returns[0])} episodes {train}, greedy while training {greedy}"

    def save(self, step, network, optimizer):
        """Written beside the old checkpoint and then put in its place, so that there is a whole one at any time."""
        content, unfinished = io.BytesIO(), self.folder / "checkpoint.pt.tmp"
        state = {"script": Path(__file__).stem, "args": asdict(self.args), "threads": torch.get_num_threads()}
        state |= {"network": network.state_dict(), "rng_state": torch.get_rng_state(), "step": step}
        state |= {"optimizer": {name: getattr(optimizer, name) for name in ("mean", "square", "steps")}}
        state |= zip(("last_returns", "eval_returns"), map(list, self.last_returns), strict=True)
        torch.save(state, content)  # to memory: on a full disk torch.save() does not say what is wrong
        try:
            with open(unfinished, "wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, self.folder / "checkpoint.pt")
        finally:
            unfinished.unlink(missing_ok=True)
        self.writer.flush()

    def finish(self, step):
        done = step + self.args.num_envs * self.args.num_steps > self.args.total_timesteps
        if processes()[0] == 0:
            self.writer.close()
            say(f"{'done' if done else 'stopped'} at step {step:,}, {self.speed:,.0f} steps/s, {self.summary()}")
            say("evaluate the final agent with python play.py" if done else "go on with --resume", self.folder)
        if dist.is_initialized():
            dist.destroy_process_group()
        if not done:
            raise SystemExit(128 + self.stopped)

    def __enter__(self):
        def stop(signum, _):
            self.signal = signum
            signal.signal(signum, signal.SIG_DFL)
            with suppress(OSError):
                os.write(2, b"\nstopping after this rollout\n" * (processes()[0] == 0))

        signals = [x for x in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(x) != signal.SIG_IGN]
        self.handlers = {signum: signal.signal(signum, stop) for signum in signals}
        return self

    def __exit__(self, kind, error, where):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        self.lock = None  # closed, and so released
        say(end="\n" * self.live)  # what comes next starts below the progress line
        if isinstance(error, Exception):
            functions = {frame.name for frame in traceback.extract_tb(where)}
            if functions & {"add_up", "all_gather_object"}:
                error = ConnectionError(f"another process of this run has ended, or cannot be reached: {error}")
            if "step_envs" in functions or not isinstance(error, FloatingPointError | OSError | torch.OutOfMemoryError):
                traceback.print_exception(error)
            saved = f"; --resume {self.folder} goes on from its last checkpoint"
            fail((str(error) or kind.__name__) + saved * (self.folder / "checkpoint.pt").exists(), code=1)


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # where the module of an environment may lie
    main(parse_args())
