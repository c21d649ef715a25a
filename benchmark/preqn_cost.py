"""What an update of preqn.py costs, beside a plain DDPG update and beside the paper's way of making it.

    python benchmark/preqn_cost.py --out benchmark/results/preqn/cost.csv

All ways take turns within one run, on minibatches of the same replay buffer of random HalfCheetah steps, so that what
else the machine does falls on all of them alike. Numbers are medians of processor time, which another program's share
of the core does not count towards; they are for networks and minibatches of the default size, on one thread.
"""

import csv
import sys
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import preqn


@dataclass
class Args:
    out: Path  # the .csv to write
    updates: int = 150  # of each kind
    steps: int = 5_000  # random environment steps in the replay buffer


def ddpg_update(network, optimizer, minibatch, args, number):
    """A plain DDPG update: one Q with a target network, Adam, and the same actor."""
    obs, actions, rewards, next_obs, terminated = minibatch
    with torch.no_grad():
        next_values = network.slow.value(next_obs, network.slow.action(next_obs))
        targets = rewards + args.gamma * ~terminated * next_values
    loss = F.mse_loss(network.value(obs, actions), targets)
    preqn.step_adam(optimizer, loss, list(network.critics.parameters()))
    preqn.update_actor(network, optimizer, obs)
    ours = [*network.critics.parameters(), *network.actor.parameters()]
    with torch.no_grad():
        torch._foreach_lerp_(list(network.slow.parameters()), ours, 1 - args.target_decay)


def one_by_one_update(network, optimizer, minibatch, args, number):
    """PreQN as the paper describes its own code (§5.3): a backward pass for each pair to form K, and the gradients once
    more for the step."""
    obs, actions, rewards, next_obs, terminated = minibatch
    critic, weights = network.critics[0], list(network.critics[0].parameters())
    with torch.no_grad():
        q_values = network.value(obs, actions)
        errors = rewards + args.gamma * ~terminated * network.value(next_obs, network.action(next_obs)) - q_values
    rows = []
    for pair in torch.cat([obs, actions], 1).split(1):
        rows.append(torch.cat([x.flatten() for x in torch.autograd.grad(critic(pair), weights)]))
    jacobian = torch.stack(rows)
    z = torch.linalg.lstsq(jacobian @ jacobian.T, errors[:, None], driver="gelsd").solution[:, 0]
    direction = torch.autograd.grad(network.value(obs, actions) @ z, weights)
    preqn.line_search(critic, direction, lambda: network.value(obs, actions) - q_values, errors, args)
    preqn.update_actor(network, optimizer, obs)


def cholesky_update(*rest):
    """preqn.py's own with K + 1e-5 mean(diagonal) 1 factorised in place of the pseudo-inverse."""

    def solve(K, errors, _):
        ridge = 1e-5 * K.diagonal().mean()
        return torch.cholesky_solve(errors[:, None], torch.linalg.cholesky(K + ridge * torch.eye(len(K))))[:, 0]

    exact, preqn.least_squares = preqn.least_squares, solve
    try:
        preqn.preqn_update(*rest)
    finally:
        preqn.least_squares = exact


def timed(function, *args):
    start = time.thread_time()
    result = function(*args)
    return time.thread_time() - start, result


def parts_of_an_update(network, optimizer, minibatch, args):
    """Seconds of each part of preqn_update()."""
    obs, actions, rewards, next_obs, _ = minibatch
    critic, seconds = network.critics[0], {}
    with torch.no_grad():
        seconds["targets"], next_values = timed(lambda: network.value(next_obs, network.action(next_obs)))
    seconds["q_gradients"], (q_values, gradients) = timed(preqn.q_gradients, critic, obs, actions)
    errors = rewards + args.gamma * next_values - q_values
    seconds["kernel"], K = timed(preqn.kernel, gradients)
    seconds["least_squares"], z = timed(preqn.least_squares, K, errors, args.cutoff)
    seconds["weighted_sum"], direction = timed(preqn.weighted_sum, gradients, z)
    change = lambda: network.value(obs, actions) - q_values
    seconds["line_search"], _ = timed(preqn.line_search, critic, direction, change, errors, args)
    seconds["update_actor"], _ = timed(preqn.update_actor, network, optimizer, obs)
    return seconds


def main(args: Args):
    torch.set_num_threads(1)
    rows, device = [], torch.device("cpu")
    for activation in "sin", "relu":
        options = replace(preqn.Args(), activation=activation, num_steps=args.steps, num_eval_envs=0)
        envs = preqn.make_envs(options, 1, (0,))
        buffer = preqn.ReplayBuffer(args.steps, *preqn.spaces(envs), device)
        ways = {"DDPG": ddpg_update, "TD3": preqn.td3_update, "PreQN": preqn.preqn_update}
        ways |= {"PreQN, Cholesky": cholesky_update, "PreQN, one backward pass a pair": one_by_one_update}
        agents, seconds, parts = {}, {name: [] for name in ways}, []
        for name in ways:
            torch.manual_seed(1)
            one = replace(options, critic="td3" if name == "TD3" else "preqn")
            network = preqn.QNetwork(*preqn.spaces(envs), one)
            slow = deepcopy(network) if name == "DDPG" else None
            trained = [*network.critics.parameters(), *network.actor.parameters()]
            agents[name] = network, torch.optim.Adam(trained, one.learning_rate), one
            if slow:
                network.slow = slow
        buffer.add(preqn.Collector(envs, agents["PreQN"][0], options, device).collect(1.0)[0])
        for number in range(1, args.updates + 1):
            minibatch = buffer.sample(options.minibatch_size)
            for name, update in ways.items():
                if "one backward" in name and number % 5:
                    continue  # it takes long
                network, optimizer, one = agents[name]
                seconds[name].append(timed(update, network, optimizer, minibatch, one, number)[0])
            parts.append(parts_of_an_update(*agents["PreQN"][:2], minibatch, options))
        seconds["TD3"] = np.convolve(seconds["TD3"], [0.5, 0.5], "valid")  # every other one moves actor and targets
        ddpg = np.median(seconds["DDPG"])
        for name, times in seconds.items():
            rows.append((activation, name, f"{1e3 * np.median(times):.3g}", f"{np.median(times) / ddpg:.3g}"))
        for part in parts[0]:
            times = [x[part] for x in parts]
            rows.append(
                (activation, f"part: {part}", f"{1e3 * np.median(times):.3g}", f"{np.median(times) / ddpg:.3g}")
            )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("activation", "update", "milliseconds", "times_ddpg"), *rows])
    for row in rows:
        print("{:6}{:36}{:>8} ms{:>8} DDPG updates".format(*row))


if __name__ == "__main__":
    main(tyro.cli(Args))
