"""Does it matter to be right about where episodes end? pqn.py as it stands, against the same with two faults put in.

    python benchmark/faults.py --variant both --limit 20 --env-id CartPole-v1       # and pqn.py's other options
    benchmark/faults.sh

    right        nothing is changed
    phantoms     trains on the step after each episode as well: it leads from the old episode's last state to the new
                 one's first and ignores its action, as though every end took the agent back to the start for nothing
    truncation   an episode that is cut short counts as terminated: nothing is to be had after it
    both         both, as in scripts that know nothing of either

Only the training episodes are cut short, after `--limit` steps; the greedy environments and play.py's evaluation go on
for as long as the task allows. That is what a bootstrapped truncation is for: to learn from short episodes how to act
in long ones. Where every episode ends at the limit, each fault takes about one in `limit` of a state's successors away
(to nothing, or to the start), much like a discount of γ (1 − 1/limit) in place of γ. So it can show only where the
limit is short beside the horizon 1/(1 − γ) = 100 and rewards further away than the limit count:

    CartPole, 20      leaving the track takes longer: with the fault, little speaks against drifting
    Acrobot, 100      a swing up takes most of them, early ones more: the goal's value comes from across cut episodes
    LunarLander, 200  about the length of a good landing, whose reward comes last: slow ones are cut short before it

It could not show in MountainCar, whose goal pqn.py seldom finds with these settings, nor in Catch, whose episodes all
terminate after 9 steps: a tenth of the data are phantoms there, but nothing bootstraps from the states they start in.
"""

import argparse
import sys
import warnings
from pathlib import Path

import envpool
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pqn  # noqa: E402


class TwoPools:
    """The training environments, cut short, and the greedy ones, which are not, as one vector environment."""

    def __init__(self, training, *greedy):
        self.pools, self.num_training = [training, *greedy], training.config["num_envs"]
        self.observation_space, self.action_space = pqn.spaces(training)
        self.metadata = training.metadata

    def reset(self):
        return np.concatenate([pool.reset()[0] for pool in self.pools]), {}

    def step(self, actions):
        parts = zip(self.pools, np.split(actions, [self.num_training]), strict=False)
        results = [pool.step(part)[:4] for pool, part in parts]
        return *map(np.concatenate, zip(*results, strict=True)), {}


def cut_short(make_envs, limit):
    """make_envs() whose training environments are truncated after `limit` steps."""

    def make(args, num_envs, seed):
        greedy = make_envs(args, max(args.num_eval_envs, 1), (*seed[:2], 1))  # which also reports a wrong --env-id
        if args.env_id not in envpool.list_all_envs():
            pqn.fail(f"{args.env_id} is not one of EnvPool's")
        seeds = [int(s) >> 1 for s in np.random.SeedSequence(seed).generate_state(args.num_envs)]
        options = dict(env_type="gymnasium", num_envs=args.num_envs, seed=seeds, max_episode_steps=limit)
        with warnings.catch_warnings():  # about the precision of the bounds of observation spaces
            warnings.simplefilter("ignore")
            return TwoPools(envpool.make(args.env_id, **options), *[greedy] * (args.num_eval_envs > 0))

    return make


def with_faults(collect, variant):
    """Collector.collect() with the variant's faults in the rollout that it returns. (All that is assumed of pqn.py's
    insides stands here: the order of a rollout's tensors.)"""

    def collect_wrongly(collector, epsilon):
        (*rollout, terminated, truncated, real), *episodes = collect(collector, epsilon)
        if variant in ("truncation", "both"):
            terminated = terminated | truncated
        if variant in ("phantoms", "both"):
            real = torch.ones_like(real)
        return (*rollout, terminated, truncated, real), *episodes

    return collect_wrongly


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=["right", "phantoms", "truncation", "both"], required=True)
    parser.add_argument("--limit", type=int, required=True, help="steps after which a training episode is cut short")
    ours, sys.argv[1:] = parser.parse_known_args()
    if ours.limit < 1:
        pqn.fail(f"--limit must be at least 1, not {ours.limit}")
    pqn.make_envs = cut_short(pqn.make_envs, ours.limit)
    pqn.Collector.collect = with_faults(pqn.Collector.collect, ours.variant)
    pqn.main(pqn.parse_args())


if __name__ == "__main__":
    main()
