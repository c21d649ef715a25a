"""Is it normalised observations that harm, or batch norm? pqn.py with its --normalize-input changed in one respect.

    python benchmark/running_input.py --env-id CartPole-v1 --normalize-input       # and pqn.py's other options
    benchmark/ablation_input.sh

pqn.py's --normalize-input is the paper's: while learning, batch norm normalises the observations of a minibatch by the
mean and variance of that minibatch. Here they are normalised by the running mean and variance throughout, as when
acting. These move slowly, by 5e-4 of the difference with each gradient step. play.py plays such an agent as any other
of pqn.py, for the two differ in learning only.
"""

import sys
from pathlib import Path

import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pqn  # noqa: E402


class RunningNorm(nn.BatchNorm1d):
    """Batch norm whose output never depends on the other observations of the minibatch."""

    def forward(self, x):
        if self.training:
            super().forward(x)  # for what it does to the running statistics
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class QNetwork(pqn.QNetwork):
    def __init__(self, observation_space, action_space, args):
        super().__init__(observation_space, action_space, args)
        if not args.normalize_input:
            pqn.fail("running_input.py is about the input: add --normalize-input")
        self.body[0] = RunningNorm(self.inputs, momentum=5e-4)


if __name__ == "__main__":
    pqn.QNetwork = QNetwork
    sys.path.append(str(Path.cwd()))  # where the module of an environment may lie
    pqn.main(pqn.parse_args())
