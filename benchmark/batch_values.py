"""Which Q-values should λ-returns stand on, where batch norm normalises? pqn.py, with those of a rollout in both ways.

    python benchmark/batch_values.py running values.csv --env-id ... --normalize-input --norm-type batch_norm
    python benchmark/batch_values.py batch values.csv ...

pqn.py's λ-returns are made of the values seen while acting, for which batch norm uses its running statistics
("running"). With "batch" they are made of the values of the same observations normalised by the statistics of random
groups of a minibatch's size, as in learning. Every third rollout the file gets a line: mean and largest |max_a Q(s, a)|
in both ways, and the largest of the observations as the running statistics normalise them. A run with "running" is
the same as pqn.py's own.
"""

import copy
import csv
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pqn  # noqa: E402


class Collector(pqn.Collector):
    statistics, path = "running", None  # what the command line says
    rollouts = 0

    def __init__(self, envs, network, args, device):
        super().__init__(envs, network, args, device)
        self.network, self.size = network, args.num_envs * args.num_steps // args.num_minibatches
        self.file = open(self.path, "w", buffering=1)  # only now: a refused command writes nothing
        csv.writer(self.file).writerow("step running_mean running_max batch_mean batch_max input_max".split())

    @torch.no_grad()
    def collect(self, epsilon):
        rollout, *episodes = super().collect(epsilon)
        obs, actions, values = rollout[:3]
        T, N = actions.shape
        states, learning = torch.cat([obs.flatten(0, 1), self.obs[:N]]), copy.deepcopy(self.network).train()
        batch_values, draw = torch.empty_like(values.flatten()), torch.Generator().manual_seed(self.rollouts)
        for group in torch.randperm(len(states), generator=draw).tensor_split(max(1, len(states) // self.size)):
            batch_values[group] = learning(states[group]).max(1).values
        batch_values = batch_values.view(T + 1, N)
        self.rollouts += 1
        if self.rollouts % 3 == 0:
            norm = self.network.body[0]
            normalised = (states.flatten(1).float() - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
            about = [x.item() for v in (values, batch_values) for x in (v.mean(), v.abs().max())]
            line = [self.rollouts * T * N, *(f"{x:.4g}" for x in (*about, normalised.abs().max()))]
            csv.writer(self.file).writerow(line)
        return (obs, actions, batch_values if self.statistics == "batch" else values, *rollout[3:]), *episodes


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("running", "batch"):
        pqn.fail("usage: batch_values.py running|batch FILE --env-id ... --normalize-input --norm-type batch_norm")
    Collector.statistics, Collector.path = sys.argv[1:3]
    del sys.argv[1:3]
    sys.path.append(str(Path.cwd()))  # where the module of an environment may lie
    args = pqn.parse_args()
    if not args.normalize_input:
        pqn.fail("batch_values.py is about normalised observations: add --normalize-input")
    pqn.Collector = Collector
    pqn.main(args)
