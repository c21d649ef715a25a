"""Would many seeds of pqn.py gain from one process, as one network with a leading dimension of seeds?

    python benchmark/many_seeds.py                        # CartPole, the defaults of pqn.py, on two cores
    python benchmark/many_seeds.py --hidden-sizes 120 84

What one seed costs for each gradient step on its minibatch and each time its environments act, in two ways: pqn.py's
own functions on one thread, with as many processes as the machine has cores beside each other (measured so: the
processes run at the same time); and the same arithmetic for 10 and 100 seeds in one process with all cores, eagerly
and compiled. The batched network takes the same steps as separate ones, which is checked first. Nothing else may run
on the machine meanwhile. Environments are left out: they cost the same either way.
"""

import argparse
import multiprocessing
import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box, Discrete

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pqn  # noqa: E402

SPACES = Box(-1, 1, (4,), np.float32), Discrete(2)
ACTING = 32 + 8  # environments, the greedy ones included
BATCH = 128  # transitions of a minibatch


def minibatch(generator):
    obs, targets = torch.randn(BATCH, 4, generator=generator), torch.randn(BATCH, generator=generator)
    return obs, torch.randint(2, (BATCH,), generator=generator), targets, torch.ones(BATCH, dtype=torch.bool), BATCH


class Batched:
    """The networks and optimisers of several seeds, as tensors with a leading dimension."""

    def __init__(self, networks):
        stack = lambda name: torch.stack([p.detach() for p in map(lambda n: n.get_parameter(name), networks)])
        names = [name for name, _ in networks[0].named_parameters()]
        flat = [stack(name).flatten(1) for name in names]
        self.weights = torch.cat(flat, 1).requires_grad_()
        self.shapes = [networks[0].get_parameter(name).shape for name in names]
        self.sizes = [x.shape[1] for x in flat]
        self.weights.grad, self.mean, self.square = (torch.zeros_like(self.weights) for _ in range(3))

    def forward(self, obs):
        """obs: seeds × batch × features."""
        parts = [w.view(-1, *shape) for w, shape in zip(self.weights.split(self.sizes, 1), self.shapes, strict=True)]
        x = obs
        while len(parts) > 2:
            weight, bias, scale, shift, *parts = parts
            x = F.layer_norm(torch.baddbmm(bias.unsqueeze(1), x, weight.mT), weight.shape[1:2], eps=1e-6)
            x = torch.addcmul(shift.unsqueeze(1), x, scale.unsqueeze(1)).relu()
        return torch.baddbmm(parts[1].unsqueeze(1), x, parts[0].mT)

    def step(self, obs, actions, targets, size):
        errors = targets - self.forward(obs).gather(2, actions.unsqueeze(2)).squeeze(2)
        self.weights.grad.zero_()
        (0.5 * errors.square().sum() / BATCH).backward()
        with torch.no_grad():  # as in pqn.RAdam, with a norm for each seed
            gradient = self.weights.grad
            norm = gradient.norm(dim=1, keepdim=True)
            torch._dynamo.graph_break()  # PyTorch 2.13 fails to compile what is before and after this together
            gradient = gradient * (10.0 / norm).clamp(max=1.0)
            self.mean.lerp_(gradient, 0.1)
            self.square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            self.weights.sub_(self.mean * (size / (self.square.sqrt() + 1e-8)))

    @torch.no_grad()
    def act(self, obs):
        return self.forward(obs).max(2)


def seconds(function, least=1.0):
    """Of one call, the median over batches of calls."""
    for _ in range(5):
        function()
    start, times, calls = time.perf_counter(), [], 0
    while time.perf_counter() - start < least or len(times) < 5:
        begin, calls = time.perf_counter(), calls + 1
        function()
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def separate(hidden_sizes, barrier, results):
    """One process of several: pqn.py's gradient step and acting, on one thread."""
    torch.set_num_threads(1)
    args = pqn.Args(hidden_sizes=hidden_sizes)
    network = pqn.QNetwork(*SPACES, args)
    optimizer = pqn.RAdam(network, args.max_grad_norm)
    batch, obs = minibatch(torch.Generator().manual_seed(0)), torch.randn(ACTING, 4)
    explore, actions = torch.zeros(32, dtype=torch.bool), torch.zeros(32, dtype=torch.int64)

    def learn():
        optimizer.prepare(1e-4)
        pqn.train_step(network, optimizer, args, *batch)

    barrier.wait()
    results.put((seconds(learn, 3.0), seconds(lambda: pqn.act(network, obs, explore, actions), 3.0)))


def check_same(hidden_sizes):
    """After ten steps, the batched networks' weights are those of networks trained one by one."""
    args, generator = pqn.Args(hidden_sizes=hidden_sizes), torch.Generator().manual_seed(1)
    networks = [pqn.QNetwork(*SPACES, args) for _ in range(3)]
    batched = Batched(networks)
    optimizers = [pqn.RAdam(network, 10.0) for network in networks]
    for _ in range(10):
        batches = [minibatch(generator) for _ in networks]
        for network, optimizer, batch in zip(networks, optimizers, batches, strict=True):
            optimizer.prepare(1e-4)
            optimizer.adaptive.fill_(1e-4)  # past the first steps, which are plain momentum
            optimizer.plain.zero_()
            pqn.train_step(network, optimizer, args, *batch)
        batched.step(*(torch.stack([batch[i] for batch in batches]) for i in range(3)), 1e-4)
    for weights, optimizer in zip(batched.weights, optimizers, strict=True):
        difference = (weights.detach() - optimizer.weights).abs().mean()
        assert difference < 1e-6, difference  # but for rounding; each weight has moved by up to 1e-3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[256, 256])
    hidden_sizes, cores = tuple(parser.parse_args().hidden_sizes), len(os.sched_getaffinity(0))
    check_same(hidden_sizes)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(cores), context.Queue()
    workers = [context.Process(target=separate, args=(hidden_sizes, barrier, results)) for _ in range(cores)]
    for worker in workers:
        worker.start()
    learning, acting = np.mean([results.get() for _ in workers], 0) / cores
    for worker in workers:
        worker.join()
    print(
        f"CartPole, hidden layers {hidden_sizes}, {cores} cores; µs for each seed's gradient step and acting, and for"
    )
    print("both as often as the defaults do them: one gradient step for each time the environments act")
    print(f"{'':34}{'learn':>9}{'act':>9}{'both':>9}{'gain':>7}")
    show = lambda name, a, b: print(f"{name:34}{a:9.1f}{b:9.1f}{a + b:9.1f}{base / (a + b):7.2f}")
    base = (learning + acting) * 1e6
    show(f"{cores} processes of one thread", learning * 1e6, acting * 1e6)
    torch.set_num_threads(cores)
    for seeds in (10, 100):
        generator = torch.Generator().manual_seed(0)
        batched = Batched([pqn.QNetwork(*SPACES, pqn.Args(hidden_sizes=hidden_sizes)) for _ in range(seeds)])
        batches = [minibatch(generator)[:3] for _ in range(seeds)]
        data, obs = [torch.stack(x) for x in zip(*batches, strict=True)], torch.randn(seeds, ACTING, 4)
        size = torch.tensor(1e-4)
        for name, how in (("", lambda f: f), (", compiled", torch.compile)):
            learn, act = how(partial(batched.step, *data, size)), how(partial(batched.act, obs))
            show(f"{seeds} seeds in one process{name}", seconds(learn) * 1e6 / seeds, seconds(act) * 1e6 / seeds)


if __name__ == "__main__":
    main()
