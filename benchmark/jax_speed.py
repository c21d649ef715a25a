"""What share of a JAX environment's own speed is left in jax_envs.py and in pqn.py, in steps per second of processor
time, which other programs on the machine change little. (One thread of PyTorch; XLA's own are counted.)

    OMP_NUM_THREADS=1 taskset -c 0 python benchmark/jax_speed.py Breakout Asterix --out benchmark/results/jax/speed.csv

For each game of MinAtar, with 128 copies: gymnax's step alone (compiled for all copies, without resets and without
bringing anything to the host), jax_envs.py's with random actions, and all of pqn.py with the options of minatar.sh.
"""

import argparse
import csv
import sys
import tempfile
import time
from contextlib import chdir
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from collect import hardware

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gymnasium as gym
import gymnax

import pqn

OPTIONS = dict(num_envs=128, num_steps=32, num_minibatches=32, update_epochs=2, learning_rate=5e-4, end_e=0.05)
OPTIONS |= dict(exploration_fraction=0.1, q_lambda=0.65, reward_scale=1.0, hidden_sizes=(256, 128), num_eval_envs=0)
OPTIONS |= dict(device="cpu")  # what is measured is processor time
jax.config.update("jax_platforms", "cpu")
ROUNDS, STEPS, WARM_UP = 9, 300, 4


def rates(step):
    """Steps of all copies per second of processor time, in each of several rounds."""
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(STEPS):
            step()
        yield 128 * STEPS / (time.process_time() - start)


def engine(game):
    env, params = gymnax.make(f"{game}-MinAtar")
    keys = jax.random.split(jax.random.key(0), 128)
    step = jax.jit(jax.vmap(lambda key, state, action: env.step_env(key, state, action, params)[:4]))
    _, state = jax.vmap(lambda key: env.reset_env(key, params))(keys)
    actions = np.random.default_rng(0).integers(env.num_actions, size=128)
    step(keys, step(keys, state, actions)[1], actions)  # compiles, once more with the types of its own result

    def again():
        nonlocal state
        obs, state, reward, over = step(keys, state, actions)
        jax.block_until_ready(obs)

    return rates(again)


def wrapped(game):
    envs = gym.make_vec(f"jax_envs:{game}-MinAtar-v0", num_envs=128)
    envs.reset(seed=0)
    actions = np.random.default_rng(0).integers(envs.single_action_space.n, size=128, dtype=np.int32)
    envs.step(actions)
    return rates(lambda: envs.step(actions))


def script(game):
    """Of pqn.py: a rate for each rollout after the first few."""
    seen, log = [], pqn.Run.log
    watch = lambda *x: seen.append(time.process_time()) or log(*x)
    args = pqn.Args(env_id=f"jax_envs:{game}-MinAtar-v0", total_timesteps=128 * 32 * 24, **OPTIONS)
    with tempfile.TemporaryDirectory() as folder, chdir(folder), mock.patch.object(pqn.Run, "log", watch):
        pqn.main(args)
    return 128 * 32 / np.diff(seen)[WARM_UP:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("games", nargs="+", help="names of MinAtar games: Breakout, Asterix, ...")
    parser.add_argument("--out", type=Path, help="also write the table to this CSV")
    args = parser.parse_args()
    rows = [("game", "part", "steps_per_cpu_second", "low_quartile", "high_quartile", "share_of_engine")]
    for game in args.games:
        limit = None
        for part, measure in (("gymnax alone", engine), ("jax_envs.py", wrapped), ("pqn.py", script)):
            low, middle, high = np.percentile(list(measure(game)), (25, 50, 75))
            limit = limit or middle
            rows.append((game, part, *(f"{x:.0f}" for x in (middle, low, high)), f"{middle / limit:.3f}"))
            print(*rows[-1], flush=True)
    print(hardware("cpu"))
    if args.out:
        with open(args.out, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
