"""PreQN, the preconditioned Q-network of "Towards Characterizing Divergence in Deep Q-Learning" (Achiam et al., 2019).

Q-learning for continuous actions without target network, second Q or adaptive critic optimizer. Each step of the critic
solves for the weights that move Q on the minibatch straight towards its targets, to first order, and is checked before
it is taken. This file is all of it, in the style of DDPG (Algorithm 1); equation numbers are the paper's. After main()
comes only bookkeeping.

    python preqn.py --env-id HalfCheetah-v5
    python preqn.py --env-id Pendulum-v1 --total-timesteps 20000 --activation relu
    python preqn.py --env-id HalfCheetah-v5 --critic td3     # to compare with: TD3's critics, with target networks
    python preqn.py --env-id Walker2d-v5 --analyse kernels   # no training: Fig. 1, into kernels.csv and kernels.png
    python preqn.py --resume runs/HalfCheetah-v5__preqn__1__1700000000 --total-timesteps 2000000
    python play.py runs/HalfCheetah-v5__preqn__1__1700000000
"""

import csv
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
import warnings
import zipfile
from collections import deque
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from itertools import product
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
Whole = Annotated[int, "a whole number of at least 0", lambda x: isinstance(x, int) and x >= 0]
Share = Annotated[float, "in [0, 1]", lambda x: 0 <= x <= 1]
Positive = Annotated[float, "positive and below 1e30", lambda x: 0 < x < 1e30]


@dataclass
class Args:
    env_id: str = "HalfCheetah-v5"  # an EnvPool id, or any other Gymnasium id (`module:Name-v0` imports it first)
    total_timesteps: Count = 1_000_000  # environment steps of the whole run, all environments together
    seed: Annotated[int, "in [0, 2^63)", lambda x: 0 <= x < 2**63] = 1  # every environment draws its own stream from it
    device: str = "auto"  # any torch device; "auto" takes CUDA when present
    resume: str | None = None  # go on with the run in this folder; the other options default to those it started with
    # instead of training, measure the kernels of networks at initialisation (Fig. 1) into <this>.csv and <this>.png
    analyse: Annotated[str | None, "a name, as in results/name", lambda x: x is None or Path(x).name] = None
    num_envs: Count = 1  # environments stepped in parallel
    num_steps: Count = 50  # steps in each environment between two rounds of learning, with an update for every step
    num_eval_envs: Whole = 4  # further environments that act without noise beside the training ones, only to be watched

    start_steps: Whole = 5_000  # actions are uniformly random until then
    learning_starts: Count = 5_000  # transitions in the replay buffer before the first update
    buffer_size: Count = 1_000_000  # transitions that the replay buffer keeps
    minibatch_size: Count = 256  # transitions, drawn with replacement, in each update
    action_noise: Annotated[float, "in [0, 10]", lambda x: 0 <= x <= 10] = 0.1  # σ of the noise on actions in [-1, 1]
    gamma: Share = 0.99  # discount factor γ
    learning_rate: Positive = 1e-3  # learning rate of Adam, for the actor and for TD3's critics

    critic: Literal["preqn", "td3"] = "preqn"  # how Q is learned
    critic_step: Positive = 0.1  # α of PreQN's proposed step; 1 would take Q to its targets
    # η: a step of PreQN is taken if the cosine between what it does to Q and what it should do is at least this
    alignment: Annotated[float, "in [-1, 1]", lambda x: -1 <= x <= 1] = 0.97
    max_halvings: Annotated[int, "in [0, 100]", lambda x: 0 <= x <= 100] = 10  # of a step before it is given up
    # eigenvalues of the kernel below this share of the largest one count as 0 (below 1e-7 they are rounding errors)
    cutoff: Annotated[float, "in [1e-7, 1)", lambda x: 1e-7 <= x < 1] = 1e-7
    target_decay: Share = 0.995  # share of TD3's target networks that an update of theirs keeps

    activation: Literal["sin", "relu", "tanh"] = "sin"  # of actor and critic
    # width of each hidden layer of actor and critic
    hidden_sizes: Annotated[tuple[int, ...], "at least 1 each", lambda x: min(x, default=1) >= 1] = (256, 256)
    layer_norm: bool = False  # LayerNorm, without scale and shift, before each activation
    log_interval: Count = 2_000  # environment steps between two points of the curves (one rollout at least)
    checkpoint_interval: Count = 100_000  # environment steps between checkpoints (there is always one at the end)
    save_buffer: bool = True  # with the checkpoint. Without, a resumed run fills a new one before it learns again
    track: bool = False  # mirror the curves to Weights & Biases (needs `pip install wandb`)
    wandb_project_name: str = "pqn"  # the Weights & Biases project
    wandb_entity: str | None = None  # the Weights & Biases team


# ------------------------------------------------------------------------------------------------ environments
def make_envs(args: Args, num_envs: int, seed: tuple[int, ...], **options):
    """A vector environment in which every copy has a random stream of its own, unless it is vectorised itself and gets
    one seed for all. (EnvPool's own seed + i for copy i would let runs with neighbouring seeds share streams.)"""
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
    real = isinstance(action_space, gym.spaces.Box) and action_space.dtype.kind == "f"
    if not real or 0 in action_space.shape or not action_space.is_bounded():
        fail(f"{args.env_id} has {action_space} actions: PreQN needs bounded real ones, pqn.py takes Discrete ones")
    if not isinstance(observation_space, gym.spaces.Box) or 0 in observation_space.shape:
        fail(f"{args.env_id} has {observation_space} observations: PreQN needs Box ones, and not empty")
    if (mode := envs.metadata.get("autoreset_mode")) != gym.vector.AutoresetMode.NEXT_STEP:
        fail(f"{args.env_id} resets in mode {mode}: PreQN needs AutoresetMode.NEXT_STEP")
    return envs


def spaces(envs):
    space = lambda name: getattr(envs, f"single_{name}", None) or getattr(envs, name)
    return space("observation_space"), space("action_space")


def step_envs(envs, actions):
    """One step of every environment, in NumPy arrays. `actions` are (N, numbers in [-1, 1]), whatever the bounds.

    EnvPool and Gymnasium reset on the step *after* an episode's end. So `obs` is the true successor even where an
    episode ends, and the step after it is a phantom: its action is ignored, it only brings a new episode's first
    observation. `ended` says where one ends, be it in a terminal state or by a time limit.
    """
    space = spaces(envs)[1]
    scaled = space.low + (actions.reshape(-1, *space.shape) + 1) / 2 * (space.high - space.low)
    obs, rewards, terminated, truncated, _ = envs.step(scaled.clip(space.low, space.high).astype(space.dtype))
    return obs, rewards, terminated, terminated | truncated


@torch.no_grad()
def act(network, obs, explore, random_actions, noise):
    """μ(s) with noise, or random actions, in the training environments, plain μ(s) in the others."""
    actions = network.action(obs)
    N = len(explore)
    actions[:N] = torch.where(explore[:, None], random_actions, (actions[:N] + noise).clamp(-1, 1))
    return actions


class Collector:
    """Steps the environments and hands out what they do. The first N are learned from; those after them act without
    noise, and only their returns are kept."""

    def __init__(self, envs, network, args: Args, device):
        obs = envs.reset()[0]
        T, N, num_envs = args.num_steps, args.num_envs, args.num_envs + args.num_eval_envs
        self.envs, self.device, self.action_noise = envs, device, args.action_noise
        self.act = partial(act, network)
        self.obs = torch.zeros(obs.shape, device=device)
        self.stored_obs = torch.zeros((T + 1, N, *obs.shape[1:]), device=device)
        self.actions = torch.zeros((T, N, math.prod(spaces(envs)[1].shape)), device=device)
        self.rewards = np.zeros((T, N), dtype=np.float32)  # this and what follows stay on the host
        self.terminated, self.real = (np.zeros((T, N), dtype=bool) for _ in range(2))
        self.ended = np.zeros(num_envs, dtype=bool)  # by the last step, which makes the next one a phantom
        self.returns, self.lengths = np.zeros(num_envs), np.zeros(num_envs, dtype=np.int64)
        self.obs.copy_(torch.from_numpy(obs))

    def collect(self, epsilon):
        """One rollout, its actions uniformly random with probability ε: the transitions (s, a, r, s′, d), phantoms left
        out; and (environment, return, length) of the episodes that ended in it, in the training environments and in
        the others. d is True where s′ is terminal; where a time limit cuts the episode, s′ has a value like any other.
        """
        T, N = self.rewards.shape
        episodes, eval_episodes = [], []
        # Drawn on the host, so that every device explores alike
        explore = (torch.rand(T, N) < epsilon).to(self.device)
        random_actions = torch.empty(self.actions.shape).uniform_(-1, 1).to(self.device)
        noise = self.action_noise * torch.randn(self.actions.shape).to(self.device)
        for t in range(T):
            self.stored_obs[t] = self.obs[:N]
            actions = self.act(self.obs, explore[t], random_actions[t], noise[t])
            self.actions[t] = actions[:N]
            self.real[t] = ~self.ended[:N]
            self.lengths += ~self.ended
            obs, rewards, terminated, self.ended = step_envs(self.envs, actions.cpu().numpy())
            self.obs.copy_(torch.from_numpy(obs))
            self.rewards[t], self.terminated[t] = rewards[:N], terminated[:N]
            self.returns += rewards
            for i in np.flatnonzero(self.ended):
                (episodes if i < N else eval_episodes).append((int(i), float(self.returns[i]), int(self.lengths[i])))
                self.returns[i] = self.lengths[i] = 0
        self.stored_obs[T] = self.obs[:N]
        if not np.isfinite(self.rewards).all():
            raise FloatingPointError("the environment returned a reward that is not finite")
        rewards, terminated, real = (
            torch.from_numpy(x).to(self.device) for x in (self.rewards, self.terminated, self.real)
        )
        rollout = self.stored_obs[:-1], self.actions, rewards, self.stored_obs[1:], terminated
        return [x[real] for x in rollout], episodes, eval_episodes


class ReplayBuffer:
    """The last transitions (s, a, r, s′, d). On a CPU, memory is only taken up as they come."""

    def __init__(self, size, observation_space, action_space, device):
        obs, actions = (size, *observation_space.shape), (size, math.prod(action_space.shape))
        try:
            self.data = [torch.empty(shape, device=device) for shape in (obs, actions, (size,), obs)]
        except RuntimeError as error:
            fail(f"no memory for --buffer-size {size}: {error}")
        self.data.append(torch.empty(size, dtype=torch.bool, device=device))
        self.added = 0  # transitions that have ever been added: the next one takes the place of the oldest

    def __len__(self):
        return min(self.added, len(self.data[0]))

    def add(self, transitions):
        n = len(transitions[0])
        places = torch.arange(self.added, self.added + n, device=self.data[0].device) % len(self.data[0])
        for stored, new in zip(self.data, transitions, strict=True):
            stored[places] = new
        self.added += n

    def sample(self, n):
        drawn = torch.randint(len(self), (n,)).to(self.data[0].device)
        return [stored[drawn] for stored in self.data]


# ----------------------------------------------------------------------------------------------------- network
class MLP(nn.Module):
    """Linear → LayerNorm, if asked for → activation for each hidden layer, then a linear layer. The paper does not say
    how its weights are initialised: here as by TensorFlow's dense layers, Glorot-uniform, biases 0."""

    def __init__(self, inputs, outputs, args: Args):
        super().__init__()
        sizes = (inputs, *args.hidden_sizes, outputs)
        self.layers = nn.ModuleList(nn.Linear(*size) for size in zip(sizes, sizes[1:], strict=False))
        for layer in self.layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.activation, self.layer_norm = getattr(torch, args.activation), args.layer_norm

    def forward(self, x, seen=None):
        """`seen`, if given, gets the inputs and the outputs of every linear layer: all that has weights."""
        for i, layer in enumerate(self.layers):
            if i > 0:
                x = self.activation(F.layer_norm(x, x.shape[1:]) if self.layer_norm else x)
            inputs, x = x, layer(x)
            if seen is not None:
                seen.append((inputs, x))
        return x


class QNetwork(nn.Module):
    """Q(s, a), and the actor μ(s) that stands for its greedy action. TD3 has two Q, and a slow copy of everything."""

    def __init__(self, observation_space, action_space, args: Args):
        super().__init__()
        inputs, outputs = math.prod(observation_space.shape), math.prod(action_space.shape)
        self.critics = nn.ModuleList(MLP(inputs + outputs, 1, args) for _ in range(1 + (args.critic == "td3")))
        self.actor = MLP(inputs, outputs, args)
        if args.critic == "td3":
            self.target = deepcopy(self)

    def action(self, obs):
        return self.actor(obs.flatten(1)).tanh()

    def value(self, obs, actions, critic=0):
        return self.critics[critic](torch.cat([obs.flatten(1), actions], 1)).squeeze(1)


# ------------------------------------------------------------------------------------------------------ PreQN
def q_gradients(critic, obs, actions):
    """Q(s_i, a_i) of a minibatch, and the gradients of each of them by the weights, from one backward pass: for every
    linear layer (a, b) with rows a_i, its inputs, and b_i, the gradients at its outputs. Then ∇Q_i is b_i a_iᵀ for its
    weight and b_i for its bias. (The backward pass is that of Σ Q_i; as no layer mixes samples, it mixes nothing.)"""
    seen = []
    q_values = critic(torch.cat([obs.flatten(1), actions], 1), seen).squeeze(1)
    inputs, outputs = zip(*seen, strict=True)
    gradients = torch.autograd.grad(q_values.sum(), outputs)
    return q_values.detach(), [(a.detach(), b) for a, b in zip(inputs, gradients, strict=True)]


def kernel(gradients):
    """The neural tangent kernel on a minibatch (Eq. 9): K_ij = ∇Q_i·∇Q_j = Σ_layers (a_i·a_j + 1) (b_i·b_j)."""
    return sum((a @ a.T + 1) * (b @ b.T) for a, b in gradients)


def least_squares(K, errors, cutoff: float):
    """The shortest least-squares solution Z of K Z = Δ (Eq. 22). A pair that was drawn twice makes K singular."""
    if not K.isfinite().all():
        raise FloatingPointError("the gradients of Q are not finite: --critic-step or rewards too high?")
    eigenvalues, vectors = torch.linalg.eigh(K)
    inverse = torch.where(eigenvalues > cutoff * eigenvalues[-1], 1 / eigenvalues, 0.0)
    return vectors @ (inverse * (vectors.T @ errors))


def weighted_sum(gradients, z):
    """Σ_i z_i ∇Q_i (Eq. 23), in the order of the critic's parameters."""
    return [part for a, b in gradients for part in ((b * z[:, None]).T @ a, b.T @ z)]


@torch.no_grad()
def line_search(critic, direction, change, errors, args: Args):
    """Halves the step θ′ = θ + α direction until cos(Q_θ′ − Q_θ, T*Q_θ − Q_θ) ≥ η (Eq. 24), or leaves θ as it was.
    `change` says what the weights as they are do to Q. The cosines of all steps that were tried; was the last taken?"""
    weights = list(critic.parameters())
    before, cosines = [w.clone() for w in weights], []
    for halvings in range(args.max_halvings + 1):
        for w, start, way in zip(weights, before, direction, strict=True):
            torch.add(start, way, alpha=args.critic_step / 2**halvings, out=w)
        cosines.append(F.cosine_similarity(change(), errors, dim=0).item())
        if cosines[-1] >= args.alignment:
            return cosines, True
    for w, start in zip(weights, before, strict=True):
        w.copy_(start)
    return cosines, False


def preqn_update(network, optimizer, minibatch, args: Args, number: int):
    """Lines 10 to 14 of Algorithm 1; what is logged of it."""
    obs, actions, rewards, next_obs, terminated = minibatch
    with torch.no_grad():
        next_values = network.value(next_obs, network.action(next_obs))
    q_values, gradients = q_gradients(network.critics[0], obs, actions)
    errors = rewards + args.gamma * ~terminated * next_values - q_values  # Δ_i
    K = kernel(gradients)
    direction = weighted_sum(gradients, least_squares(K, errors, args.cutoff))
    change = lambda: network.value(obs, actions) - q_values
    cosines, accepted = line_search(network.critics[0], direction, change, errors, args)
    update_actor(network, optimizer, obs)
    metrics = {"td_loss": 0.5 * errors.square().mean(), "q_values": q_values.mean(), "rejected": 1 - accepted}
    metrics |= {"proposed_alignment": cosines[0], "halvings": len(cosines) - 1}
    metrics |= {"alignment": cosines[-1]} if accepted else {}
    return metrics | (describe(K, args) if number % args.num_steps == 0 else {})


def update_actor(network, optimizer, obs):
    """Up the gradient of mean Q(s, μ(s)) by the actor's weights (line 14)."""
    loss = -network.value(obs, network.action(obs)).mean()
    step_adam(optimizer, loss, list(network.actor.parameters()))


def step_adam(optimizer, loss, weights):
    """A step of these weights alone, for Adam leaves out what has no gradient."""
    optimizer.zero_grad()
    for w, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
        w.grad = gradient
    optimizer.step()


def describe(K, args: Args):
    """What a kernel is like: mean diagonal and row ratio R_i = (1/N) Σ_{j≠i} |K_ij| / K_ii (§5.1), condition, rank."""
    diagonal, eigenvalues = K.diagonal(), torch.linalg.eigvalsh(K)
    facts = {"diagonal": diagonal.mean(), "row_ratio": ((K.abs().sum(1) / diagonal - 1) / len(K)).mean()}
    smallest = eigenvalues[0].clamp(min=1e-7 * eigenvalues[-1])  # where float32 leaves nothing to tell
    facts["log10_condition"] = (eigenvalues[-1] / smallest).log10()
    return facts | {"rank": (eigenvalues > args.cutoff * eigenvalues[-1]).sum()}


# ---------------------------------------------------------------------------------------------- TD3, to compare with
def td3_update(network, optimizer, minibatch, args: Args, number: int):
    """The update of TD3 (Fujimoto et al., 2018) with its published constants; what is logged of it."""
    obs, actions, rewards, next_obs, terminated = minibatch
    with torch.no_grad():
        noise = (0.2 * torch.randn(actions.shape)).clamp(-0.5, 0.5).to(actions.device)  # target policy smoothing
        next_actions = (network.target.action(next_obs) + noise).clamp(-1, 1)
        next_values = torch.minimum(*(network.target.value(next_obs, next_actions, k) for k in range(2)))
        targets = rewards + args.gamma * ~terminated * next_values
    described = number % args.num_steps == 0
    facts = describe(kernel(q_gradients(network.critics[0], obs, actions)[1]), args) if described else {}
    q_values = [network.value(obs, actions, k) for k in range(2)]
    loss = sum(F.mse_loss(q, targets) for q in q_values)
    step_adam(optimizer, loss, list(network.critics.parameters()))
    with torch.no_grad():
        before = q_values[0].detach()
        errors = targets - before
        cosine = F.cosine_similarity(network.value(obs, actions) - before, errors, dim=0)
    if number % 2 == 1:  # the actor and all targets move at every second update
        update_actor(network, optimizer, obs)
        ours = [*network.critics.parameters(), *network.actor.parameters()]
        with torch.no_grad():
            torch._foreach_lerp_(list(network.target.parameters()), ours, 1 - args.target_decay)
    metrics = {"td_loss": 0.5 * errors.square().mean(), "q_values": before.mean(), "alignment": cosine}
    return metrics | facts


# -------------------------------------------------------------------------------------------------------- main
def main(args: Args):
    # Set up: nothing is written before everything has been checked
    device = pick_device(args.device)
    check(args)
    if args.analyse is not None:
        return analyse(args, device)
    checkpoint = None if args.resume is None else load_checkpoint(args.resume)
    step = checkpoint["step"] if checkpoint else 0  # environment steps so far, of all environments together
    batch_size = args.num_envs * args.num_steps
    if step + batch_size > args.total_timesteps:
        fail(f"no rollout of {batch_size} steps fits between step {step} and --total-timesteps {args.total_timesteps}")
    envs = make_envs(args, args.num_envs + args.num_eval_envs, (args.seed, step))  # new seeds on --resume
    torch.manual_seed(args.seed)
    network = QNetwork(*spaces(envs), args).to(device)
    learned = [network.actor, network.critics] if args.critic == "td3" else [network.actor]
    optimizer = torch.optim.Adam([w for part in learned for w in part.parameters()], args.learning_rate)
    buffer = ReplayBuffer(args.buffer_size, *spaces(envs), device)
    if checkpoint:
        restore(checkpoint, network, optimizer, buffer)
    update = td3_update if args.critic == "td3" else preqn_update
    weights = nn.utils.parameters_to_vector(network.parameters())
    if not os.getenv("OMP_NUM_THREADS") and len(weights) < 500_000:
        torch.set_num_threads(1)  # several gain little on so small a network, and stall where other programs run

    with Run(args, weights, checkpoint) as run:  # Ctrl-C, SIGTERM and SIGHUP set run.stopped
        collector = Collector(envs, network, args, device)
        while step + batch_size <= args.total_timesteps and not run.stopped:
            # Collect
            epsilon = float(step < args.start_steps)
            transitions, episodes, eval_episodes = collector.collect(epsilon)
            buffer.add(transitions)
            step += batch_size

            # Learn: as many updates as there were steps
            updates = []
            if len(buffer) >= args.learning_starts:
                for number in range(step - batch_size, step):  # through the whole run, for TD3's delay
                    minibatch = buffer.sample(args.minibatch_size)
                    updates.append(update(network, optimizer, minibatch, args, number))
            if not all(w.isfinite().all() for w in network.parameters()):
                raise FloatingPointError("a weight is not finite: --critic-step, --learning-rate or rewards too high?")

            # Log
            run.log(step, (episodes, eval_episodes), updates)

            # Checkpoint
            if step % args.checkpoint_interval < batch_size:
                run.save(step, network, optimizer, buffer)
        run.save(step, network, optimizer, buffer)
    run.finish(step)


# ------------------------------------------------------------------------------- the kernel at initialisation (Fig. 1)
def analyse(args: Args, device, samples=1000, networks=3):
    """Diagonals and row ratios of the kernels of random critics (§5.1, Appendix C) on pairs of a "rails-random" policy,
    which pushes every action to one of its bounds: over the width of 2 layers, and over the depth at width 64."""
    import matplotlib.pyplot as plt

    envs = make_envs(args, 1, (args.seed, 0))
    torch.manual_seed(args.seed)
    try:
        Path(args.analyse).parent.mkdir(parents=True, exist_ok=True)
        file = open(f"{args.analyse}.csv", "a", newline="")  # what it has stays until there is something better
    except OSError as error:
        fail(f"cannot write {args.analyse}.csv: {error.strerror}")
    obs, ended, pairs = envs.reset()[0], False, []
    while len(pairs) < samples:
        action = torch.empty(1, math.prod(spaces(envs)[1].shape)).uniform_(-1, 1).sign()
        if not ended:
            pairs.append((torch.from_numpy(obs).float(), action))
        obs, _, _, (ended,) = step_envs(envs, action.numpy())
    obs, actions = (torch.cat(x).to(device) for x in zip(*pairs, strict=True))

    rows, shapes = [], [(width,) * 2 for width in (32, 64, 128, 256)] + [(64,) * depth for depth in (1, 3, 4)]
    for activation, layer_norm, hidden_sizes in product(("tanh", "relu", "sin"), (False, True), shapes):
        one = replace(args, activation=activation, layer_norm=layer_norm, hidden_sizes=hidden_sizes)
        names = {"env": args.env_id, "activation": activation + ", LayerNorm" * layer_norm}
        names |= {"layers": len(hidden_sizes), "width": hidden_sizes[0]}
        for network in range(networks):
            critic = QNetwork(*spaces(envs), one).to(device).critics[0]
            facts = describe(kernel(q_gradients(critic, obs, actions)[1]), args)
            rows.append(names | {"network": network} | {name: f"{float(value):.5g}" for name, value in facts.items()})
    with file:
        file.truncate(0)
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

    plt.switch_backend("Agg")  # into a file, screen or not
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    panels = product(("diagonal", "row_ratio"), (("width", "layers", 2), ("layers", "width", 64)))
    for panel, (quantity, (over, other, fixed)) in zip(axes.flat, panels, strict=True):
        for i, activation in enumerate(dict.fromkeys(row["activation"] for row in rows)):
            points = {}
            for row in rows:
                if row["activation"] == activation and row[other] == fixed:
                    points.setdefault(row[over], []).append(float(row[quantity]))
            x, y = zip(*sorted(points.items()), strict=True)
            style = {"color": f"C{i // 2}", "fmt": ("o-", "s:")[i % 2], "markersize": 4, "capsize": 2}
            panel.errorbar(x, np.mean(y, axis=1), yerr=np.std(y, axis=1), label=activation, **style)
        panel.set(xlabel=f"{over}, at {fixed} {other}".replace("64 width", "width 64"), xticks=x)
        panel.set(ylabel=f"mean {quantity.replace('_', ' ')}", yscale="log" if quantity == "diagonal" else "linear")
        panel.grid(alpha=0.25)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.suptitle(f"{args.env_id}: kernels of {networks} random critics on {samples} rails-random pairs, ± their σ")
    figure.savefig(f"{args.analyse}.png", dpi=80)
    print(f"{args.analyse}.csv, {args.analyse}.png")


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
        for name in ("env_id", "critic", "buffer_size"):
            if (before := getattr(saved, name)) != (now := getattr(args, name)):
                fail(f"the checkpoint in {args.resume} is of --{name.replace('_', '-')} {before}, not of {now}")
    return args


def check(args: Args):
    """Refuses options that are out of range or do not fit together."""
    for option in fields(args):
        words, allowed = getattr(option.type, "__metadata__", ("", lambda _: True))
        if not allowed(value := getattr(args, option.name)):
            fail(f"--{option.name.replace('_', '-')} must be {words}, not {value}")
    if args.buffer_size < max(args.learning_starts, args.num_envs * args.num_steps):
        fail(f"--buffer-size {args.buffer_size} is less than --learning-starts or than a rollout")


def pick_device(name):
    """The device, tried out. "auto" is a GPU, and the CPU where there is none."""
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


def restore(checkpoint, network, optimizer, buffer):
    try:
        network.load_state_dict(checkpoint["network"])
        # With the learning rate of the options, which may be a new one
        optimizer.load_state_dict(checkpoint["optimizer"] | {"param_groups": optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(checkpoint["rng_state"])
        if (saved := checkpoint["buffer"]) is not None:
            for stored, kept in zip(buffer.data, saved["data"], strict=True):
                stored[: len(kept)] = kept.to(stored)
            buffer.added = int(saved["added"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        fail(f"the checkpoint is of another network, environment or version: {error}")


class Run:
    """What a run leaves behind and shows: its folder, curves, checkpoint and a line now and then. Within `with`,
    the first Ctrl-C, SIGTERM or SIGHUP sets `stopped`, and the second one ends the process at once."""

    def __init__(self, args: Args, weights, checkpoint):
        checkpoint = checkpoint or {"step": 0, "last_returns": [], "eval_returns": []}
        self.args, self.first_step, self.live = args, checkpoint["step"], sys.stdout.isatty()
        self.last_returns = [deque(checkpoint[name], 100) for name in ("last_returns", "eval_returns")]
        self.episodes, self.metrics = ([], []), {}  # since the last point of the curves
        self.stopped = 0  # the signal that it stops for
        self.started = self.shown = time.monotonic()
        self.speed = 0.0
        name = re.sub(r"[^\w.-]", "-", args.env_id) + f"__{Path(__file__).stem}__{args.seed}"
        self.folder = Path(args.resume or f"runs/{name}__{time.time_ns() // 1_000_000}")
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
        device = f"{weights.device} ({torch.get_num_threads()} CPU threads)"
        say(f"{self.folder}: {args.env_id} on {device}, {len(weights):,} parameters")

    def log(self, step, episodes, updates):
        """A point of every curve, the mean since the last one, when --log-interval is over; and the progress line."""
        for kept, last, ended in zip(self.episodes, self.last_returns, episodes, strict=True):
            kept.extend(ended)
            last.extend(episode_return for _, episode_return, _ in ended)
        for update in updates:
            for name, value in update.items():
                self.metrics.setdefault(f"losses/{name}", []).append(float(value))
        total, batch_size, now = self.args.total_timesteps, self.args.num_envs * self.args.num_steps, time.monotonic()
        self.speed = (step - self.first_step) / (now - self.started)
        if step % self.args.log_interval < batch_size or step + batch_size > total:
            points = {"charts/SPS": self.speed} | {name: np.mean(values) for name, values in self.metrics.items()}
            for group, ended in zip(("charts", "eval"), self.episodes, strict=True):
                if ended:
                    _, points[f"{group}/episodic_return"], points[f"{group}/episodic_length"] = np.mean(ended, axis=0)
            for name, value in points.items():
                self.writer.add_scalar(name, value, step)
            self.episodes, self.metrics = ([], []), {}
        if now - self.shown > (0.2 if self.live else 10):  # a live line on a terminal, plain ones in a pipe
            self.shown, left = now, timedelta(seconds=int((total - step) / self.speed))
            line = f"{step:,}/{total:,} steps, {self.speed:,.0f}/s, {left} left, {self.summary()}"
            say(f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}" if self.live else line + "\n", end="")

    def summary(self):
        train, greedy = (f"{np.mean(x):.1f} ± {np.std(x):.1f}" if x else "-" for x in self.last_returns)
        return f"return of the last {len(self.last_returns[0])} episodes {train}, greedy while training {greedy}"

    def save(self, step, network, optimizer, buffer):
        """Written beside the old checkpoint and then put in its place, so that there is a whole one at any time."""
        content, unfinished = io.BytesIO(), self.folder / "checkpoint.pt.tmp"
        state = {"script": Path(__file__).stem, "args": asdict(self.args), "threads": torch.get_num_threads()}
        state |= {"network": network.state_dict(), "rng_state": torch.get_rng_state(), "step": step}
        state |= {"optimizer": optimizer.state_dict(), "buffer": None}
        if self.args.save_buffer:  # cloned, as torch.save() would write the unused part of its memory too
            kept = [stored[: len(buffer)].clone() for stored in buffer.data]
            state["buffer"] = {"data": kept, "added": buffer.added}
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
        self.writer.close()
        say(f"{'done' if done else 'stopped'} at step {step:,}, {self.speed:,.0f} steps/s, {self.summary()}")
        say("evaluate the final agent with python play.py" if done else "go on with --resume", self.folder)
        if not done:
            raise SystemExit(128 + self.stopped)

    def __enter__(self):
        def stop(signum, _):
            self.stopped = signum
            signal.signal(signum, signal.SIG_DFL)
            with suppress(OSError):
                os.write(2, b"\nstopping after this rollout\n")

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
            if "step_envs" in functions or not isinstance(error, FloatingPointError | OSError | torch.OutOfMemoryError):
                traceback.print_exception(error)
            saved = f"; --resume {self.folder} goes on from its last checkpoint"
            fail((str(error) or kind.__name__) + saved * (self.folder / "checkpoint.pt").exists(), code=1)


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # where the module of an environment may lie
    main(parse_args())
