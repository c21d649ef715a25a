"""Offline deep Q-learning without target network, and instruments that say why normalisation keeps it stable.

Collects a data set with random actions, trains Q-networks on it by plain semi-gradient steps, and measures on the way
what two papers explain their divergence with; equation numbers name the paper:
    [1]  "How Does Layer Normalization Improve Deep Q-learning?": gradient interference, isometry
    [2]  "Understanding, Predicting and Better Resolving Q-Value Divergence in Offline-RL" (Yue et al., NeurIPS 2023):
         the self-excite eigenvalue measure (SEEM) of the neural tangent kernel; the step at which training must crash
Every learning rate with every seed is a copy, and all copies train as one network with a leading dimension K; their
measurements are in measures.csv in the run's folder. After main() comes only bookkeeping.

    python offline_dqn.py --env-id CartPole-v1 --norm-type layer_norm
    python offline_dqn.py --env-id Pendulum-v1 --uniform-states --norm-type none --learning-rate 0.01 0.001
    python offline_dqn.py --env-id toy --num-transitions 100 --norm-type none --learning-rate 0.01 --measure-interval 10
    python play.py runs/CartPole-v1__offline_dqn__1__1700000000
"""

import copy
import csv
import fcntl
import io
import math
import os
import re
import signal
import sys
import time
import traceback
import warnings
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import envpool
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter

# The type of an option says which values it may have, in words and as a test: see check()
Count = Annotated[int, "a whole number of at least 1", lambda x: isinstance(x, int) and x >= 1]
Share = Annotated[float, "in [0, 1]", lambda x: 0 <= x <= 1]
Positive = Annotated[float, "positive and below 1e30", lambda x: 0 < x < 1e30]
Rates = Annotated[tuple[float, ...], "positive, and at least one", lambda x: x and all(0 < y < 1e30 for y in x)]


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # an EnvPool id, any other Gymnasium id, or "toy": the walk of [2]'s published code
    gradient_steps: Count = 10_000  # gradient steps of the run, made by every copy
    # copies have this seed, the next one and so on: each seed has its own data set, first weights and minibatches
    seed: Annotated[int, "in [0, 2^62)", lambda x: 0 <= x < 2**62] = 1
    num_seeds: Count = 3  # copies of each learning rate
    device: str = "auto"  # any torch device; "auto" takes CUDA when present
    resume: str | None = None  # go on with the run in this folder; the other options default to those it started with
    dataset: str | None = None  # train on the transitions in this .npz file, whose layout load_dataset() tells
    minari: str | None = None  # train on this Minari data set (first `pip install "minari[hdf5]"; minari download ID`)
    # transitions that are collected otherwise, for each seed
    num_transitions: Annotated[int, "at least 2", lambda x: x >= 2] = 10_000
    uniform_states: bool = False  # each of them starts in a state drawn uniformly (MountainCar-v0, Pendulum-v1)
    # a Box action space is cut into so many even values in each dimension, and all their combinations are the actions
    values_per_action: Annotated[int, "at least 2", lambda x: x >= 2] = 3
    # learning rates, each a copy of every seed; the default are the nine of [1]'s Table 1
    learning_rate: Rates = (0.1, 10**-1.5, 0.01, 10**-2.5, 0.001, 10**-3.5, 1e-4, 10**-4.5, 1e-5)
    optimizer: Literal["sgd", "adam"] = "sgd"  # without momentum; with the usual β of 0.9 and 0.999
    batch_size: Count = 128  # transitions in a minibatch; at least as many as there are: all of them in every step
    gamma: Share = 0.99  # discount factor γ
    weight_decay: Share = 0.0  # every step shrinks the weights by this times the learning rate, as AdamW does
    clamp: Positive = 1e6  # weights are kept within ± this ([1], Appendix G)
    limit: Positive = 1e6  # a copy has diverged when a |Q| in its minibatch exceeds this ([2], Fig. 3)
    # width of each hidden layer
    hidden_sizes: Annotated[tuple[int, ...], "at least 1 each", lambda x: min(x, default=1) >= 1] = (128,)
    # of each hidden layer, before its ReLU and without learned scale or shift (weight norm learns its length g)
    norm_type: Literal["layer_norm", "batch_norm", "weight_norm", "none"] = "layer_norm"
    dropout: Annotated[float, "in [0, 1)", lambda x: 0 <= x < 1] = 0.0  # share of hidden units left out in training
    # the action is an input of the network ([2], §2), not one of its outputs ([1], §2); of the toy task always
    action_input: bool = False
    measure_interval: Count = 1_000  # gradient steps between two measurements
    measure_batch: Annotated[int, "at least 2", lambda x: x >= 2] = 128  # transitions of each seed that they take
    eval_interval: Count = 1_000  # gradient steps between two evaluations; a multiple of --measure-interval
    num_eval_envs: Count = 3  # greedy episodes of each copy in an evaluation
    max_eval_steps: Count = 10_000  # an episode that lasts longer is cut short, and counted as it is
    checkpoint_interval: Count = 5_000  # gradient steps between checkpoints (there is always one at the end)


# ------------------------------------------------------------------------------------------------ environments
def make_envs(args: Args, num_envs: int, seed: tuple[int, ...], **options):
    """A vector environment in which every copy has a random stream of its own, unless it is vectorised itself and gets
    one seed for all. (EnvPool's own seed + i for copy i would let runs with neighbouring seeds share streams.)"""
    if args.env_id == "toy":
        fail("the toy task is a data set: there is no environment to play in")
    seeds = [int(s) >> 1 for s in np.random.SeedSequence(seed).generate_state(num_envs)]  # EnvPool takes an int32
    try:
        with warnings.catch_warnings(action="ignore"):  # about the precision of the bounds of observation spaces
            if args.env_id in envpool.list_all_envs():
                envs = envpool.make(args.env_id, env_type="gymnasium", num_envs=num_envs, seed=seeds, **options)
            else:
                envs = gym.make_vec(args.env_id, num_envs=num_envs, **options)
                envs.reset(seed=seeds if isinstance(envs, gym.vector.SyncVectorEnv) else seeds[0])
            observation_space, action_space = spaces(envs)
    except Exception as error:  # Gymnasium's says what the name may have been meant to be
        fail(f"cannot make {args.env_id}: {error}")
    vector = isinstance(action_space, gym.spaces.Box) and action_space.is_bounded() and len(action_space.shape) == 1
    few = args.values_per_action ** action_space.shape[0] <= 10_000 if vector else False
    if not few and not isinstance(action_space, gym.spaces.Discrete):
        fail(f"{args.env_id} has {action_space} actions: Discrete ones are needed, or at most 10,000 combinations")
    if not isinstance(observation_space, gym.spaces.Box | gym.spaces.Discrete) or 0 in observation_space.shape:
        fail(f"{args.env_id} has {observation_space} observations: Box or Discrete ones are needed, and not empty")
    if (mode := envs.metadata.get("autoreset_mode")) != gym.vector.AutoresetMode.NEXT_STEP:
        fail(f"{args.env_id} resets in mode {mode}: AutoresetMode.NEXT_STEP is needed")
    return envs


def spaces(envs):
    space = lambda name: getattr(envs, f"single_{name}", None) or getattr(envs, name)
    return space("observation_space"), space("action_space")


def action_table(action_space, args: Args):
    """What the environment is told for each action: (A,) or (A, dimensions)."""
    if args.env_id == "toy":  # directions on a plane
        return np.array([(math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)) for k in range(8)], dtype=np.float32)
    if isinstance(action_space, gym.spaces.Discrete):
        return action_space.start + np.arange(action_space.n, dtype=np.int32)
    values = np.linspace(action_space.low, action_space.high, args.values_per_action, dtype=np.float32)
    return np.stack(np.meshgrid(*values.T, indexing="ij"), axis=-1).reshape(-1, values.shape[1])


class Collector:
    """Steps environments in which the copies of a network act greedily, each in as many as the others."""

    def __init__(self, envs, network, args: Args, device):
        self.envs, self.network, self.obs = envs, network, torch.as_tensor(envs.reset()[0]).to(device)
        self.table = action_table(spaces(envs)[1], args)
        self.ended = np.zeros(len(self.obs), dtype=bool)  # by the last step, which makes the next one a phantom
        self.returns, self.lengths = np.zeros(len(self.obs)), np.zeros(len(self.obs), dtype=np.int64)

    @torch.no_grad()
    def collect(self, epsilon):
        """One greedy step, whatever `epsilon` is; (environment, return, length) of the episodes it ended."""
        values = self.network(self.obs.unflatten(0, (self.network.copies, -1)))
        actions = self.table[values.argmax(2).flatten().cpu().numpy()]
        obs, rewards, terminated, truncated, _ = self.envs.step(actions)
        self.obs = torch.as_tensor(obs).to(self.obs)
        self.returns += rewards
        self.lengths += ~self.ended
        self.ended = terminated | truncated
        episodes = [(int(i), float(self.returns[i]), int(self.lengths[i])) for i in np.flatnonzero(self.ended)]
        self.returns[self.ended] = self.lengths[self.ended] = 0
        return (episodes,)


def evaluate(network, args: Args, step, device):
    """The mean return of --num-eval-envs greedy episodes for each copy, (K,): the same after --resume."""
    if args.env_id == "toy":
        return np.full(network.copies, np.nan)  # there is no episode to play
    envs = make_envs(args, network.copies * args.num_eval_envs, (args.seed, step, 3))
    collector = Collector(envs, copy.deepcopy(network).eval(), args, device)
    returns = np.full(len(collector.obs), np.nan)
    for _ in range(args.max_eval_steps):
        for i, episode_return, _ in collector.collect(epsilon=0.0)[-1]:
            returns[i] = episode_return if np.isnan(returns[i]) else returns[i]  # quick ones do not count more often
        if not np.isnan(returns).any():
            break
    return np.where(np.isnan(returns), collector.returns, returns).reshape(network.copies, -1).mean(1)


# -------------------------------------------------------------------------------------------------------- data
def make_data(args: Args, device):
    """Observation and action space, and the transitions of every seed: tensors of (S, M, ...)."""
    if args.env_id == "toy":
        observation_space, action_space = gym.spaces.Box(-np.inf, np.inf, (2,)), gym.spaces.Discrete(8)
    else:
        observation_space, action_space = spaces(make_envs(args, 1, (args.seed,)))
    if args.dataset is not None or args.minari is not None:  # which all seeds share
        parts = [load_dataset(args, observation_space, action_space)] * args.num_seeds
    else:
        parts = [collect(args, action_space, args.seed + i) for i in range(args.num_seeds)]
    types = torch.float32, torch.int64, torch.float32, torch.float32, torch.bool, torch.bool
    data = [torch.from_numpy(np.stack(x)) for x in zip(*parts, strict=True)]
    return observation_space, action_space, [x.to(device, dtype) for x, dtype in zip(data, types, strict=True)]


def collect(args: Args, action_space, seed):
    """--num-transitions with uniformly random actions, as load_dataset() lists them. EnvPool and Gymnasium reset on the
    step *after* an episode's end: that phantom step, whose action is ignored, is left out."""
    random, table, M = np.random.default_rng((seed, 1)), action_table(action_space, args), args.num_transitions
    if args.env_id == "toy":  # one walk without reward or end, whose steps and noise are those of [2]'s published code
        actions, none = random.integers(8, size=M), np.zeros(M)
        steps = 0.1 * table[actions] + 0.02 * random.random((M, 2))
        states = random.random(2) + np.concatenate([np.zeros((1, 2)), steps.cumsum(0)])
        return states[:-1], actions, none, states[1:], none, none
    if args.uniform_states:
        return collect_uniformly(args.env_id, random.integers(len(table), size=M), table, random)
    envs = make_envs(args, 10, (seed, 2))
    obs, ended, kept = envs.reset()[0].copy(), np.zeros(10, dtype=bool), []
    while sum(len(transitions[1]) for transitions in kept) < M:
        actions = random.integers(len(table), size=10)
        next_obs, rewards, terminated, truncated, _ = envs.step(table[actions])
        next_obs = next_obs.cpu().numpy() if torch.is_tensor(next_obs) else next_obs  # of jax_envs.py on a GPU
        kept.append([x[~ended].copy() for x in (obs, actions, rewards, next_obs, terminated, truncated)])
        obs, ended = next_obs.copy(), terminated | truncated
    arrays = [np.concatenate(x)[:M] for x in zip(*kept, strict=True)]
    finite = all(np.isfinite(x).all() for x in arrays)
    return arrays if finite else fail(f"{args.env_id} returned an observation or a reward that is not finite")


def collect_uniformly(env_id, actions, table, random):
    """The same, where each transition starts in a state of its own, drawn uniformly ([1], Appendix G)."""
    low, high = ((-1.2, -0.07), (0.6, 0.07)) if env_id == "MountainCar-v0" else ((-math.pi, -8), (math.pi, 8))
    env, kept = gym.make(env_id).unwrapped, []
    env.reset()
    for action, state in zip(actions, random.uniform(low, high, (len(actions), 2)), strict=True):
        env.state = state
        obs = state if env_id == "MountainCar-v0" else (math.cos(state[0]), math.sin(state[0]), state[1])
        next_obs, reward, terminated, truncated, _ = env.step(table[action])
        kept.append((obs, action, reward, next_obs, terminated, truncated))
    return [np.array(x) for x in zip(*kept, strict=True)]


def load_dataset(args: Args, observation_space, action_space):
    """The transitions in a file of numpy.savez(), M of them, or the same from a Minari data set:

    observations, next_observations    (M, *shape of an observation)
    actions, rewards                   (M,); actions are whole numbers from 0, the rows of action_table()
    terminated, truncated              (M,) true where the episode ended in the next observation, or was cut short there
    """
    names = ("observations", "actions", "rewards", "next_observations", "terminated", "truncated")
    source = f"--dataset {args.dataset}" if args.minari is None else f"--minari {args.minari}"
    refuse = lambda words: fail(f"{source}: {words}")
    try:
        if args.minari is not None:
            arrays = load_minari(args.minari)
        else:
            with np.load(args.dataset) as file:
                arrays = [file[name] for name in names]
    except Exception as error:
        kind = "a file of numpy.savez()" if args.minari is None else "a Minari data set"
        install = ': pip install "minari[hdf5]"' * isinstance(error, ImportError)
        refuse(f"cannot be read as {kind}: {error}{install}")
    M, allowed = len(np.atleast_1d(arrays[1])), {"actions": range(len(action_table(action_space, args)))}
    allowed |= {"terminated": range(2), "truncated": range(2)}
    if isinstance(observation_space, gym.spaces.Discrete):
        states = range(int(observation_space.start), int(observation_space.start + observation_space.n))
        allowed |= {"observations": states, "next_observations": states}
    for name, array in zip(names, arrays, strict=True):
        shape = (M, *(observation_space.shape if "observations" in name else ()))
        if array.shape != shape:
            refuse(f"{name} must have the shape {shape}, not {array.shape}")
        if array.dtype.kind not in "biuf" or not (np.abs(array.astype(float)) < 1e38).all():
            refuse(f"{name} has values that are not finite numbers below 1e38")
        if name in allowed and not np.isin(array, allowed[name]).all():
            refuse(f"{name} must be whole numbers from {allowed[name][0]} to {allowed[name][-1]}")
    return arrays if M > 1 else refuse("two transitions are needed at least")


def load_minari(name):
    """The six arrays. An episode of T steps has T + 1 observations in a Minari data set: the successor of its last step
    is among them, and no transition leads from an episode to the next."""
    import minari

    data = minari.load_dataset(name)
    if not isinstance(data.action_space, gym.spaces.Discrete):
        raise TypeError(f"it has {data.action_space} actions: Discrete ones are needed")
    if not isinstance(data.observation_space, gym.spaces.Box | gym.spaces.Discrete):
        raise TypeError(f"it has {data.observation_space} observations: Box or Discrete ones are needed")
    start = data.action_space.start
    episodes = [
        (x.observations[:-1], x.actions - start, x.rewards, x.observations[1:], x.terminations, x.truncations)
        for x in data.iterate_episodes()
    ]
    return [np.concatenate(x) for x in zip(*episodes, strict=True)]


def minibatches(data, generators, args: Args, number):
    """Minibatches, drawn with replacement by the generator of each seed, whose copies share them."""
    M, n = data[0].shape[1], args.batch_size
    draw = lambda x: torch.randint(M, (number, n), generator=x) if n < M else torch.arange(M).expand(number, M)
    for rows in torch.stack([draw(generator) for generator in generators], 1).to(data[0].device):
        yield take(data, rows, args)


def take(data, rows, args: Args):
    """These rows (S, n) of all but `truncated`, for each copy: (K, n, ...). Copy i has rate i // S and seed i % S."""
    rows = rows.to(data[0].device).repeat(len(args.learning_rate), 1)
    seeds = torch.arange(len(rows), device=rows.device).unsqueeze(1) % args.num_seeds
    return [x[seeds, rows] for x in data[:5]]


# ----------------------------------------------------------------------------------------------------- network
class QNetwork(nn.Module):
    """K copies of linear → norm → ReLU for each hidden layer, then linear, to one value per action ([1], Eq. 3)."""

    def __init__(self, observation_space, action_space, args: Args, copies=1):
        super().__init__()
        self.copies, self.norm_type, self.dropout = copies, args.norm_type, args.dropout
        self.discrete = isinstance(observation_space, gym.spaces.Discrete)
        self.first = int(observation_space.start) if self.discrete else 0
        self.inputs = int(observation_space.n) if self.discrete else math.prod(observation_space.shape)
        table = action_table(action_space, args)
        described = None  # what the network is shown of each action
        if args.action_input or args.env_id == "toy":
            described = torch.as_tensor(table if table.ndim == 2 else np.eye(len(table)), dtype=torch.float32)
        self.register_buffer("described", described, persistent=False)
        ends = (self.inputs, len(table)) if described is None else (self.inputs + described.shape[1], 1)
        sizes = [ends[0], *args.hidden_sizes, ends[1]]
        make = lambda shapes: nn.ParameterList([nn.Parameter(torch.zeros(copies, *shape)) for shape in shapes])
        self.weights = make(zip(sizes[1:], sizes, strict=False))
        self.biases = make((1, size) for size in sizes[1:])
        self.lengths = make((size, 1) for size in args.hidden_sizes if args.norm_type == "weight_norm")
        for i, size in enumerate(args.hidden_sizes if args.norm_type == "batch_norm" else ()):
            self.register_buffer(f"mean_{i}", torch.zeros(copies, 1, size))
            self.register_buffer(f"variance_{i}", torch.ones(copies, 1, size))

    def initialise(self, generators):
        """PyTorch's default for linear layers, by one generator for each seed; the same for all learning rates."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            for p in (weight, bias):
                for i, generator in enumerate(generators):
                    p.data[i :: len(generators)] = 2 * torch.rand(p.shape[1:], generator=generator) - 1
                p.data *= weight.shape[2] ** -0.5
        for length, weight in zip(self.lengths, self.weights, strict=False):
            length.data = weight.data.norm(dim=2, keepdim=True)

    def forward(self, obs, actions=None, layers=None):
        """The values of all actions, (K, n, A), or of the given ones, (K, n). A list `layers` receives of each linear
        layer the input, the output and, under weight norm, g/‖v‖ and v/‖v‖ of the rows of W."""
        if self.discrete:
            obs = F.one_hot(obs.long() - self.first, self.inputs)
        x = obs.flatten(2).to(self.biases[0].dtype)
        K, n, _ = x.shape
        if self.described is not None:
            chosen = self.described.repeat(K, n, 1) if actions is None else self.described[actions]
            x = torch.cat([x.repeat_interleave(chosen.shape[1] // n, 1), chosen], 2)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            scale = direction = None
            if i < len(self.lengths):  # W = g v/‖v‖ for each row
                norm = weight.norm(dim=2, keepdim=True)
                scale, direction = self.lengths[i] / norm, weight / norm
                weight = self.lengths[i] * direction
            y = torch.baddbmm(bias, x, weight.mT)
            if layers is not None:
                layers.append((x, y, scale, direction))
            if i + 1 < len(self.weights):
                if self.norm_type == "layer_norm":
                    y = F.layer_norm(y, y.shape[2:])  # [1], Eq. 2
                x = F.relu(self.batch_norm(y, i) if self.norm_type == "batch_norm" else y)
                if self.dropout and self.training:  # drawn on the host, alike for every device
                    x = x * (torch.rand(x.shape) >= self.dropout).to(x) / (1 - self.dropout)
        if self.described is not None:
            return y.view(K, n, -1) if actions is None else y.squeeze(2)
        return y if actions is None else y.gather(2, actions.unsqueeze(2)).squeeze(2)

    def batch_norm(self, y, i):
        """As in PyTorch's own layer: in training by the minibatch's statistics, of s and of s' apart."""
        mean, variance = getattr(self, f"mean_{i}"), getattr(self, f"variance_{i}")
        if self.training:
            running, n, mean = (mean, variance), y.shape[1], y.mean(1, keepdim=True)
            variance = (y - mean).square().mean(1, keepdim=True)
            running[0].lerp_(mean.detach(), 0.1)
            running[1].lerp_(variance.detach() * n / (n - 1), 0.1)
        return (y - mean) * torch.rsqrt(variance + 1e-5)


# ---------------------------------------------------------------------------------------------------- learning
def td_errors(network, batch, gamma: float):
    """Δ = Q(s, a) − r − γ max_a' Q(s', a') ([1], Eq. 4; [2]'s u), whose target carries no gradient; Q(s, a);
    the greedy actions at s'; γ or, where the episode terminated, 0. A truncation bootstraps."""
    obs, actions, rewards, next_obs, terminated = batch
    with torch.no_grad():
        next_values, next_actions = network(next_obs).max(2)
        discount = gamma * (~terminated).to(rewards)
        targets = rewards + discount * next_values
    values = network(obs, actions)
    return values - targets, values, next_actions, discount


def train_step(network, optimizer, batch, gamma: float):
    """One step down the semi-gradient Δ ∇Q(s, a), its mean over the minibatch ([1], Eq. 1); each copy's largest |Q|."""
    errors, values, *_ = td_errors(network, batch, gamma)
    loss = 0.5 * errors.square().mean(1).sum()  # of all copies: the gradient of each is that of its own
    optimizer.step(torch.autograd.grad(loss, list(network.parameters())))
    return values.detach().abs().amax(1)


class Optimizer:
    """SGD or Adam (Kingma & Ba, 2015), with a learning rate for every copy. All weights lie in one tensor, (K, P), of
    which the network sees views. What a copy does depends on no other copy, even where it is not finite."""

    def __init__(self, network, learning_rates, args: Args):
        layers = list(network.parameters())
        self.weights = torch.cat([p.detach().flatten(1) for p in layers], 1)
        for p, weights in zip(layers, self.weights.split([p[0].numel() for p in layers], 1), strict=True):
            p.data = weights.view_as(p)
        self.learning_rates = learning_rates.to(self.weights).unsqueeze(1)
        self.mean, self.square = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.steps, self.adam = 0, args.optimizer == "adam"
        self.weight_decay, self.clamp = args.weight_decay, args.clamp

    def step(self, gradients, beta1=0.9, beta2=0.999, eps=1e-8):
        self.steps += 1
        move = torch.cat([g.flatten(1) for g in gradients], 1)
        if self.adam:
            self.mean.lerp_(move, 1 - beta1)
            self.square.lerp_(move.square(), 1 - beta2)
            move = self.mean / (1 - beta1**self.steps) / ((self.square / (1 - beta2**self.steps)).sqrt() + eps)
        if self.weight_decay:
            move = move + self.weight_decay * self.weights
        self.weights.sub_(move.mul_(self.learning_rates)).clamp_(-self.clamp, self.clamp)


# ------------------------------------------------------------------------------------------------- instruments
def gram_matrix(network, obs, actions):
    """G_ij = ⟨∇Q(x_i), ∇Q(x_j)⟩ over all parameters of each copy ([2], §2), (K, n, n); and the last hidden layer.

    Where a linear layer has input a_i and output y_i, and b_i = ∂Q(x_i)/∂y_i, the gradient of W is b_i a_iᵀ and that of
    the bias b_i: G sums (A Aᵀ + 1) ∘ (B Bᵀ) over the layers. One backward pass gives every B, as no sample depends on
    another: batch norm has its running statistics here. Where W = g v/‖v‖, the gradient of g is b_i v̂ᵀa_i, and that of
    v is g/‖v‖ times what of b_i a_iᵀ is at right angles to v̂."""
    layers, gram = [], 0
    total = network(obs, actions, layers).sum()
    for (a, _, scale, direction), b in zip(layers, torch.autograd.grad(total, [x[1] for x in layers]), strict=True):
        squared, along = (1, 0 * b) if scale is None else (scale.mT.square(), b * (a @ direction.mT))
        gram = gram + (a @ a.mT) * ((b * squared) @ b.mT) + b @ b.mT + (along * (1 - squared)) @ along.mT
    return gram.detach(), layers[-1][0].detach()


def interference(gram, errors, discount, learning_rates):
    """Gradient interference ([1]) of n transitions, each (K,). `gram` is of their (s, a) and then (s', greedy a').
    With the errors Δ, the learning rate η, h = Q(s, a) − γ max Q(s', ·), g_i = Δ_i ∇Q_i and f_j = Δ_j ∇h_j,
        QGI₊ = mean |cos(∇Q_i, ∇Q_j)| over i ≠ j    (Eq. 6)        MGI = mean cos(g_i, f_j)    (Eq. 9)
        SGI = mean cos(g_i, g_j)                    (Eq. 8)        DGI = mean ⟨g_i, f_j⟩       (Appendix F)
        GI₂ = 2η DGI − η² mean ⟨g_i, f_j⟩² / Δ_j²   (Eq. 11)
    GI₂ is the loss Δ_j² that a step on transition i alone takes from transition j, exactly so where Q is linear."""
    n = errors.shape[1]
    own, cross, following = gram[:, :n, :n], gram[:, :n, n:], gram[:, n:, n:].diagonal(dim1=1, dim2=2)
    mixed = own - cross * discount.unsqueeze(1)  # ⟨∇Q_i, ∇h_j⟩
    squared = own.diagonal(dim1=1, dim2=2)
    full = squared - 2 * discount * cross.diagonal(dim1=1, dim2=2) + discount.square() * following
    cosine = lambda x, a, b: (x / a.sqrt().unsqueeze(2) / b.sqrt().unsqueeze(1)).nan_to_num(0)  # a gradient may be 0
    cosines, mixed_cosines = cosine(own, squared, squared), cosine(mixed, squared, full.clamp(min=0))
    products, mean = errors.unsqueeze(2) * errors.unsqueeze(1), lambda x: x.mean((1, 2))
    qgi = (cosines.abs().sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)) / (n * (n - 1))
    dgi, second = mean(products * mixed), mean((errors.unsqueeze(2) * mixed).square())
    found = {"qgi": qgi, "sgi": mean(products.sign() * cosines), "mgi": mean(products.sign() * mixed_cosines)}
    return found | {"dgi": dgi, "gi2": 2 * learning_rates * dgi - learning_rates.square() * second}


def seem(gram, discount):
    """SEEM, the largest real part of an eigenvalue of A = γ G(X*, X) − G(X, X) ([2], Theorem 3), where X* are the
    (s', greedy a'). A small step on the sum of the losses is u ← (I + ηA) u (Theorem 1). NaN where A is not finite."""
    n = discount.shape[1]
    a = discount.unsqueeze(2) * gram[:, n:, :n] - gram[:, :n, :n]
    finite = a.isfinite().all(2).all(1)
    largest = torch.linalg.eigvals(torch.where(finite[:, None, None], a, 0)).real.amax(1)
    return torch.where(finite, largest, torch.nan)


def isometry(features, k):
    """ISO_k ([1], Appendix C): the mean of det(G)^{1/k} / (tr(G)/k) over sets of k samples, G their inner products.
    It is 1 where they are orthogonal and of one length, and 0 where they are linearly dependent."""
    sets = features[:, : features.shape[1] // k * k].unflatten(1, (-1, k))
    volume = (torch.linalg.slogdet(sets @ sets.mT).logabsdet / k).exp()
    return (volume / (sets.square().sum((2, 3)) / k)).nan_to_num(0, 0, 0).mean(1)


def predicted_crash(steps, errors, depth):
    """The step at which training must crash: where the line through 1/‖u‖^((2L−2)/L) reaches 0, which falls linearly in
    an L-layer ReLU network under SGD ([2], Eq. 2, 23). steps (T,), ‖u‖ (T, K) -> (K,); infinite if it does not fall."""
    inverse = errors ** -((2 * depth - 2) / depth)
    centred = (steps - steps.mean())[:, None]
    slope = (centred * inverse).sum(0) / centred.square().sum()
    return torch.where(slope < 0, steps.mean() - inverse.mean(0) / slope, torch.inf)


def measure(network, batch, learning_rates, args: Args, before=None):
    """All of these for each copy, in double precision, on its measuring transitions: {name: (K,)}. And what the next
    call needs as `before`: the kernel and the greedy actions, whose change is measured too ([2], Fig. 1)."""
    network, batch = copy.deepcopy(network).double().eval(), [x.double() if x.is_floating_point() else x for x in batch]
    errors, values, next_actions, discount = td_errors(network, batch, args.gamma)
    (obs, actions, _, next_obs, _), n = batch, errors.shape[1]
    gram, features = gram_matrix(network, torch.cat([obs, next_obs], 1), torch.cat([actions, next_actions], 1))
    errors, kernel = errors.detach(), gram[:, :n, :n]
    eigenvalue, k = seem(gram, discount), min(network.inputs + len(network.biases[-1][0, 0]), n, features.shape[2])
    found = {"loss": errors.square().mean(1), "q": values.detach().abs().mean(1)}
    found |= interference(gram, errors, discount, learning_rates) | {"iso": isometry(features[:, :n], k)}
    found |= {"seem": eigenvalue, "seem_normalised": eigenvalue / kernel.diagonal(dim1=1, dim2=2).mean(1)}
    found["norm"] = sum(p.detach().square().sum((1, 2)) for p in network.parameters()).sqrt()
    old_kernel, old_actions = before or (kernel, next_actions)
    found["kernel_alignment"] = F.cosine_similarity(kernel.flatten(1), old_kernel.flatten(1))
    found["policy_alignment"] = (next_actions == old_actions).double().mean(1)
    return found, (kernel, next_actions)


# -------------------------------------------------------------------------------------------------------- main
def main(args: Args):
    # Set up: nothing is written before everything has been checked
    device = pick_device(args.device)
    check(args)
    checkpoint = None if args.resume is None else load_checkpoint(args.resume)
    step = checkpoint["step"] if checkpoint else 0  # gradient steps so far, of every copy
    if step >= args.gradient_steps:
        fail(f"the run has made {step} gradient steps already: --gradient-steps {args.gradient_steps} adds none")
    if step % args.measure_interval:
        fail(f"--measure-interval {args.measure_interval} does not divide the {step} gradient steps already made")
    observation_space, action_space, data = make_data(args, device)
    learning_rates = torch.tensor(args.learning_rate, dtype=torch.float64).repeat_interleave(args.num_seeds).to(device)
    network = QNetwork(observation_space, action_space, args, copies=len(learning_rates))
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(args.num_seeds)]
    network.initialise(generators)
    optimizer = Optimizer(network.to(device), learning_rates, args)
    torch.manual_seed(args.seed)  # of dropout
    rows = [torch.randperm(data[0].shape[1], generator=x)[: args.measure_batch] for x in generators]
    measured = take(data, torch.stack(rows), args)
    diverged_at = torch.full(learning_rates.shape, -1, device=device)
    if checkpoint:
        restore(checkpoint, network, optimizer, generators, diverged_at)
    if not os.getenv("OMP_NUM_THREADS"):
        torch.set_num_threads(1)  # several gain little on so small networks, and stall where other programs run

    with Run(args, optimizer.weights, checkpoint) as run:  # Ctrl-C, SIGTERM and SIGHUP set run.stopped
        measures, before = measure(network, measured, learning_rates, args)
        if not checkpoint:
            run.log(step, learning_rates, measures, diverged_at, evaluate(network, args, step, device))
        while step < args.gradient_steps and not run.stopped:
            # Learn
            network.train()
            for batch in minibatches(data, generators, args, args.measure_interval):
                largest = train_step(network, optimizer, batch, args.gamma)
                step += 1
                diverged_at = torch.where((diverged_at < 0) & ~(largest <= args.limit), step, diverged_at)

            # Measure, evaluate, log
            measures, before = measure(network, measured, learning_rates, args, before)
            over = step >= args.gradient_steps
            returns = evaluate(network, args, step, device) if over or step % args.eval_interval == 0 else None
            run.log(step, learning_rates, measures, diverged_at, returns)

            # Checkpoint
            if step % args.checkpoint_interval < args.measure_interval:
                run.save(step, network, optimizer, generators, diverged_at)
        run.save(step, network, optimizer, generators, diverged_at)
    run.finish(step)


# ------------------------------------------------------------------------------------------------- bookkeeping
def fail(message, code=2):
    """Ends the program with one line for the user; with code 2, nothing is written."""
    print("error:", " ".join(message.split())[:500], file=sys.stderr)
    raise SystemExit(code)


def say(*words, end="\n"):
    with suppress(OSError):  # of a terminal or pipe that has been closed: the run goes on, and can be saved
        return print(*words, end=end, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def parse_args():
    """The command line, where 1e6 is a whole number. With --resume, it replaces options of the run that goes on."""
    whole = lambda match: f"{float(match[0]):.0f}" if float(match[0]).is_integer() else match[0]
    words = [re.sub(r"(?<![^=])\d+(\.\d+)?e\d+$", whole, word) for word in sys.argv[1:]]
    cli = partial(tyro.cli, Args, args=words)
    if (args := cli()).resume is not None:
        saved = Args(**load_checkpoint(args.resume)["args"])
        args = cli(default=saved)
        if args.env_id != saved.env_id:
            fail(f"the checkpoint in {args.resume} is of {saved.env_id}, not of {args.env_id}")
    return args


def check(args: Args):
    """Refuses options that are out of range or do not fit together."""
    for option in fields(args):
        words, allowed = getattr(option.type, "__metadata__", ("", lambda _: True))
        if not allowed(value := getattr(args, option.name)):
            fail(f"--{option.name.replace('_', '-')} must be {words}, not {value}")
    if (args.dataset is not None) + (args.minari is not None) + args.uniform_states > 1:
        fail("--dataset, --minari and --uniform-states each say where the data come from: leave all but one out")
    if args.uniform_states and args.env_id not in ("MountainCar-v0", "Pendulum-v1"):
        fail(f"--uniform-states knows the states of MountainCar-v0 and Pendulum-v1, not those of {args.env_id}")
    if args.eval_interval % args.measure_interval or args.gradient_steps % args.measure_interval:
        fail("--measure-interval must divide --eval-interval and --gradient-steps")
    if args.batch_size < 2 and args.norm_type == "batch_norm":
        fail("batch norm needs two transitions or more in a minibatch")


def pick_device(name):
    """The device, tried out. "auto" is CUDA, and the CPU where there is none."""
    try:
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        (there := torch.zeros(1, device=auto if name == "auto" else name)).cpu()
        return there.device
    except Exception as error:
        fail(f"--device {name} cannot be used: {error}")


def load_checkpoint(folder, script=Path(__file__).stem):
    if not os.path.isfile(path := Path(folder, "checkpoint.pt")):
        fail(f"there is no checkpoint in {folder!r}: name a run's folder, runs/...")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # which executes no code
        damaged = zipfile.ZipFile(path).testzip()  # checks the sums that torch.load() does not look at
        if damaged or checkpoint["script"] != script:
            raise ValueError("its data are damaged" if damaged else f"it was made by {checkpoint['script']}.py")
        sum([len(range(checkpoint["step"])), *checkpoint["last_returns"], *checkpoint["eval_returns"]])  # are numbers
        check(Args(**checkpoint["args"]))
        return checkpoint
    except Exception as error:
        fail(f"{path} is broken, or was not made by this version of {script}.py: {error}")


def restore(checkpoint, network, optimizer, generators, diverged_at):
    try:
        network.load_state_dict(checkpoint["copies"])
        optimizer.mean.copy_(checkpoint["optimizer"]["mean"])
        optimizer.square.copy_(checkpoint["optimizer"]["square"])
        optimizer.steps = int(checkpoint["optimizer"]["steps"])
        for generator, state in zip(generators, checkpoint["generators"], strict=True):
            generator.set_state(state)
        diverged_at.copy_(checkpoint["diverged_at"])
        torch.set_rng_state(checkpoint["rng_state"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        fail(f"the checkpoint is of another network, environment or version: {error}")


class Run:
    """What a run leaves behind and shows: its folder, curves, checkpoint and a line now and then. Within `with`,
    the first Ctrl-C, SIGTERM or SIGHUP sets `stopped`, and the second one ends the process at once."""

    def __init__(self, args: Args, weights, checkpoint):
        self.args, self.first_step = args, checkpoint["step"] if checkpoint else 0
        # What stands in measures.csv: its columns, and (K, columns) for each measurement
        self.columns, self.table = (checkpoint["columns"], checkpoint["table"]) if checkpoint else ([], [])
        self.stopped = 0  # the last signal
        self.started = self.shown = time.monotonic()
        self.speed = 0.0
        name = re.sub(r"[^\w.-]", "-", args.env_id) + f"__{Path(__file__).stem}__{args.seed}"
        self.folder = Path(args.resume or f"runs/{name}__{time.time_ns() // 1_000_000}")
        try:
            self.folder.mkdir(parents=True, exist_ok=args.resume is not None)
            self.lock = open(self.folder / "lock", "w")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until the process ends, however it ends
            # Points that a killed run wrote after its last checkpoint are dropped
            self.writer = SummaryWriter(self.folder, purge_step=self.first_step + 1 if args.resume else None)
        except Exception as error:  # of the file system
            reason = "another process is at work in it" if isinstance(error, BlockingIOError) else error
            fail(f"cannot open the run {self.folder}: {reason}")
        K, P = weights.shape
        say(f"{self.folder}: {args.env_id} on {weights.device}, {K} copies of {P:,} parameters each")

    def column(self, name):  # (measurements, K)
        return torch.stack(self.table)[:, :, self.columns.index(name)]

    def log(self, step, learning_rates, measures, diverged_at, returns):
        """A row of measures.csv for every copy, a point of every curve for every learning rate, the progress line."""
        S, K = self.args.num_seeds, len(learning_rates)
        values = {"learning_rate": learning_rates, "seed": torch.arange(K) % S + self.args.seed, "step": step}
        values |= {"diverged_at": diverged_at, "return": math.nan if returns is None else returns, **measures}
        self.columns = [*values, "crash"]
        values = [torch.as_tensor(x).cpu().double().expand(K) for x in (*values.values(), math.nan)]
        self.table.append(torch.stack(values, 1))
        steps, errors = self.column("step")[-10:, 0], self.column("loss")[-10:].sqrt()  # in the mean: ‖u‖/√n
        self.table[-1][:, -1] = predicted_crash(steps, errors, len(self.args.hidden_sizes) + 1)
        for name, x in zip(self.columns[4:], self.table[-1].T[4:], strict=True):
            for rate, mean in zip(self.args.learning_rate, x.view(-1, S).nanmean(1).tolist(), strict=True):
                if not math.isnan(mean):
                    self.writer.add_scalar(f"{name}/learning_rate_{rate:g}", mean, step)
        now, total = time.monotonic(), self.args.gradient_steps
        self.speed = (step - self.first_step) / (now - self.started)
        if now - self.shown > 10 and self.speed:
            self.shown, left = now, timedelta(seconds=int((total - step) / self.speed))
            words = f"{step:,}/{total:,} steps, {self.speed:,.0f}/s, {left} left"
            say(f"{words}, {(diverged_at >= 0).sum()} of {K} copies diverged")

    def save(self, step, network, optimizer, generators, diverged_at):
        """Written beside the old files and then put in their place, so that there are whole ones at any time."""
        content, table = io.BytesIO(), io.StringIO(newline="")
        state = {"script": Path(__file__).stem, "args": asdict(self.args), "threads": torch.get_num_threads()}
        evaluated = [row for row in self.column("return") if not row.isnan().all()] or [torch.zeros(network.copies)]
        best, copies = int(evaluated[-1].nan_to_num(-math.inf).argmax()), network.state_dict()  # play.py plays it
        state |= {"network": {name: x[best : best + 1].clone() for name, x in copies.items()}, "copies": copies}
        state |= {"rng_state": torch.get_rng_state(), "step": step, "diverged_at": diverged_at, "last_returns": []}
        state |= {"generators": [generator.get_state() for generator in generators]}
        state |= {"optimizer": {name: getattr(optimizer, name) for name in ("mean", "square", "steps")}}
        state |= {"table": self.table, "columns": self.columns, "eval_returns": [float(row[best]) for row in evaluated]}
        csv.writer(table).writerows([self.columns, *torch.cat(self.table).tolist()])
        torch.save(state, content)  # to memory: on a full disk torch.save() does not say what is wrong
        for name, data in {"measures.csv": table.getvalue().encode(), "checkpoint.pt": content.getbuffer()}.items():
            unfinished = self.folder / f"{name}.tmp"
            try:
                with open(unfinished, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(unfinished, self.folder / name)
            finally:
                unfinished.unlink(missing_ok=True)
        self.writer.flush()

    def finish(self, step):
        done = step >= self.args.gradient_steps
        self.writer.close()
        steps, returns, crash = self.column("step")[:, 0], self.column("return"), self.column("crash")
        for i, (rate, seed, _, at) in enumerate(self.table[-1][:, :4].tolist()):
            words, evaluated = f"learning rate {rate:.2g}, seed {seed:.0f}", returns[~returns[:, i].isnan(), i]
            words += f": last return {evaluated[-1]:.1f}" if len(evaluated) else ""
            if at >= 0:
                foreseen = crash[(steps <= 0.8 * at).sum() - 1, i]
                words += f", diverged at step {at:.0f} (foreseen at 80% of the way: {foreseen:.0f})"
            say(words)
        say(f"{'done' if done else 'stopped'} at step {step:,}, {self.speed:,.0f} steps/s of every copy")
        advice = "its measures.csv is in" if self.args.env_id == "toy" else "evaluate the best copy with python play.py"
        say(advice if done else "go on with --resume", self.folder)
        if not done:
            raise SystemExit(128 + self.stopped)

    def __enter__(self):
        def stop(signum, _):
            self.stopped = signum
            signal.signal(signum, signal.SIG_DFL)
            with suppress(OSError):
                os.write(2, b"\nstopping after the next measurement\n")

        signals = [x for x in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(x) != signal.SIG_IGN]
        self.handlers = {signum: signal.signal(signum, stop) for signum in signals}
        return self

    def __exit__(self, kind, error, where):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        self.lock = None  # closed, and so released
        if isinstance(error, Exception):
            if not isinstance(error, FloatingPointError | OSError | torch.OutOfMemoryError):
                traceback.print_exception(error)
            saved = f"; --resume {self.folder} goes on from its last checkpoint"
            fail((str(error) or kind.__name__) + saved * (self.folder / "checkpoint.pt").exists(), code=1)


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # where the module of an environment may lie
    main(parse_args())
