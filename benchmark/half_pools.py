"""Would collecting be faster if one half of the environments stepped while the network acts for the other?

    python benchmark/half_pools.py                                # Breakout, the settings of pqn_atari_envpool.py
    OMP_NUM_THREADS=1 python benchmark/half_pools.py --script pqn --rollouts 100       # and any option of the script

Collects rollouts in three ways in turn and compares their times: all environments step, then the network acts for all
of them, as the script does it; two halves do so one after the other, which shows what halving costs; and each half
steps while the network acts for the other half. Nothing is stored and nothing learned. Both halves are synchronous, so
the last way too would give the same transitions at every run. Nothing else may run meanwhile.
"""

import argparse
import importlib
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from report import markdown  # noqa: E402
from speed import cores_in_use, machine  # noqa: E402


class Half:
    """Some environments, what they showed last, and the actions that the network chose for that."""

    def __init__(self, script, network, args, num_envs, seed):
        self.envs = script.make_envs(args, num_envs, (seed, 0))
        self.network, self.random_actions = network, torch.zeros(num_envs, dtype=torch.int64)
        self.explore = torch.zeros(num_envs, dtype=torch.bool)
        self.obs = torch.from_numpy(self.envs.reset()[0])

    def act(self, script):
        self.actions = script.act(self.network, self.obs, self.explore, self.random_actions)[0].numpy()

    def send(self):
        self.envs.send(self.actions.astype(np.int32))

    def receive(self):
        self.obs = torch.from_numpy(self.envs.recv()[0])


def in_turn(script, parts, num_steps):
    for _ in range(num_steps):
        for part in parts:
            part.act(script)
            part.send()
            part.receive()


def overlapping(script, parts, num_steps):
    first, second = parts
    first.act(script)
    for t in range(num_steps):
        first.send()
        if t > 0:
            second.receive()
        second.act(script)
        first.receive()
        second.send()
        first.act(script)
    second.receive()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = "pqn_atari_envpool", "pqn"
    parser.add_argument("--script", choices=names, default=names[0], help="whose environments and network")
    parser.add_argument("--rollouts", type=int, default=12, help="rollouts collected in each way")
    args, options = parser.parse_known_args()
    script = importlib.import_module(args.script)
    settings = tyro.cli(script.Args, args=options)
    if hasattr(settings, "precision"):
        settings = replace(settings, precision=script.pick_precision(settings.precision, torch.device("cpu")))
        script.keep_freed_memory()
    num_envs, seconds = settings.num_envs + settings.num_eval_envs, {}
    if busy := round(cores_in_use(), 1):
        print(f"Careful: other processes keep {busy} cores busy, which spoils the measurement.\n")
    torch.manual_seed(0)
    one = script.make_envs(settings, 1, (0, 0))
    network = script.QNetwork(*script.spaces(one), settings).eval()
    whole = [Half(script, network, settings, num_envs, seed=1)]
    halves = [Half(script, network, settings, num_envs // 2, seed) for seed in (2, 3)]
    ways = {
        "all at once": lambda: in_turn(script, whole, settings.num_steps),
        "two halves in turn": lambda: in_turn(script, halves, settings.num_steps),
        "one half steps while the other acts": lambda: overlapping(script, halves, settings.num_steps),
    }
    for _ in range(args.rollouts + 1):  # the first warms up
        for name, collect in ways.items():
            start = time.perf_counter()
            collect()
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    ratios = {name: np.divide(x[1:], seconds["all at once"][1:]) for name, x in seconds.items()}
    rows = []
    for name, x in seconds.items():
        low, median, high = np.percentile(ratios[name], [25, 50, 75])
        rows.append([name, f"{1000 * np.median(x[1:]):,.2f}", f"{median:.2f} [{low:.2f}, {high:.2f}]"])
    print(f"`{' '.join([args.script + '.py', *options])}`, {num_envs} × {settings.num_steps} steps; {machine()}\n")
    print(markdown(["collecting", "ms per rollout", "times the first [quartiles]"], rows))


if __name__ == "__main__":
    main()
