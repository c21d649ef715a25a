"""Evaluates and shows a saved agent: every episode greedy, in an environment of its own.

    python play.py runs/CartPole-v1__pqn__1__1700000000
    python play.py runs/Breakout-v5__pqn_atari_envpool__1__1700000000 --episodes 30 --video breakout.mp4

The script that trained the agent, or your copy of it, must lie beside this one or in the working directory.
"""

import atexit
import importlib
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import imageio
import numpy as np
import torch
import tyro


@dataclass
class Args:
    run_folder: tyro.conf.Positional[str]  # the folder of the run, as the script that trained the agent printed it
    episodes: int = 100  # episodes to play, all at the same time
    seed: int = 0  # seed of the episodes; none of them has been seen in training
    max_steps: int = 100_000  # an episode that lasts longer is cut short, and counted as it is
    device: str = "auto"  # any torch device; "auto" takes CUDA when present
    video: str = ""  # save the first episode as this .mp4 or .gif
    fps: int = 30  # frames per second of the video


def load_script(folder):
    """The script that made the checkpoint: it knows the environment, the network and how the agent acts."""
    path = Path(folder, "checkpoint.pt")
    if not os.path.isfile(path):
        fail(f"there is no checkpoint in {folder!r}: name a run's folder, runs/...")
    try:
        name = Path(torch.load(path, map_location="cpu", weights_only=True)["script"]).name
    except Exception:
        fail(f"{path} is broken, or no checkpoint of this project")
    for place in (Path(__file__).parent, Path.cwd()):
        script = place / f"{name}.py"
        if script.is_file() and "class Collector" in script.read_text():
            sys.path.append(str(place))
            return importlib.import_module(name)
    fail(f"{path} was made by {name}.py, which is neither beside play.py nor in the working directory")


def main(args: Args):
    check(args)
    script = load_script(args.run_folder)
    checkpoint = script.load_checkpoint(args.run_folder)
    device = script.pick_device(args.device)
    trained = script.Args(**checkpoint["args"])
    # The environments that act greedily in training do so here, without any to train on
    sizes = {"num_envs": 0, "num_eval_envs": args.episodes, "num_steps": 1}
    played = replace(trained, **{name: size for name, size in sizes.items() if hasattr(trained, name)})
    options = {"render_mode": "rgb_array"} if args.video else {}
    envs = script.make_envs(played, args.episodes, (args.seed, 2**32), **options)
    try:
        network = script.QNetwork(*script.spaces(envs), played)
        network.load_state_dict(checkpoint["network"])
    except (TypeError, AttributeError, RuntimeError) as error:
        fail(f"the checkpoint in {args.run_folder} does not fit {script.__name__}.py: {str(error).splitlines()[0]}")
    network.to(device).eval()
    collector = script.Collector(envs, network, played, device)

    film = Film(args) if args.video else None
    returns, lengths = np.full(args.episodes, np.nan), np.zeros(args.episodes)
    shown = time.monotonic()
    for step in range(args.max_steps):
        if args.video and np.isnan(returns[0]):
            film.add(envs, collector.obs)
        for i, episode_return, length in collector.collect(epsilon=0.0)[-1]:
            if np.isnan(returns[i]):  # only its first episode: quick ones do not count more often
                returns[i], lengths[i] = episode_return, length
        over = np.count_nonzero(~np.isnan(returns))
        if over == args.episodes:
            break
        if time.monotonic() - shown > (0.2 if sys.stdout.isatty() else 10):
            shown, end = time.monotonic(), "\r" if sys.stdout.isatty() else "\n"
            print(f"{over} of {args.episodes} episodes are over after {step + 1:,} steps", end=end, flush=True)
    cut = np.isnan(returns)
    returns[cut], lengths[cut] = collector.returns[cut], collector.lengths[cut]

    print(f"{trained.env_id}, step {checkpoint['step']:,}, {args.episodes} greedy episodes".ljust(70))
    print(f"  return   {summary(returns)}")
    print(f"  length   {summary(lengths)}" + (f", {cut.sum()} cut short at {args.max_steps:,}" if cut.any() else ""))
    if checkpoint["last_returns"]:
        print(f"  training {summary(checkpoint['last_returns'])}, the last {len(checkpoint['last_returns'])} episodes")
    if args.video:
        print(f"  video    {args.video}, {film.close()} frames, return {returns[0]:.1f}")
    return returns


# ------------------------------------------------------------------------------------------------- bookkeeping
def fail(message, code=2):
    """Ends the program with one line for the user; with code 2, nothing has been played."""
    print("error:", " ".join(message.split())[:500], file=sys.stderr)
    raise SystemExit(code)


def check(args: Args):
    for name, least in (("episodes", 1), ("max_steps", 1), ("fps", 1), ("seed", 0)):
        if getattr(args, name) < least:
            fail(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    if args.video and Path(args.video).suffix not in (".mp4", ".gif"):
        fail(f"--video {args.video} must be a file ending in .mp4 or .gif")
    if args.video and (Path(args.video).is_dir() or not os.access(Path(args.video).parent, os.W_OK)):
        fail(f"--video {args.video} cannot be written there")


def summary(x):
    """Mean and spread, with the decimals that small numbers need."""
    digits = 3 if np.abs(x).max() < 10 else 1
    mean, std, low, high = (f"{value:.{digits}f}" for value in (np.mean(x), np.std(x), np.min(x), np.max(x)))
    return f"{mean} ± {std} (min {low}, max {high})"


class Film:
    """The first episode as a video, which takes an older one's place when it is whole. What goes wrong with it is told
    after the results."""

    def __init__(self, args: Args):
        self.path, self.fps, self.pictures, self.frames, self.problem = args.video, args.fps, [], 0, None
        self.unfinished = Path(args.video).with_name(f"unfinished-{Path(args.video).name}")
        try:
            options = {"fps": self.fps, "macro_block_size": 2}
            self.writer = imageio.v2.get_writer(self.unfinished, **options) if self.path.endswith(".mp4") else None
            atexit.register(self.unfinished.unlink, missing_ok=True)
        except (OSError, ValueError) as error:
            fail(f"cannot write --video {self.path}: {error}")

    def add(self, envs, obs):
        """A picture by the environment or, where EnvPool cannot draw it, the observation if that is a picture."""
        try:
            picture = np.asarray(envs.render())
            picture = picture[0] if picture.ndim == 4 else picture
        except Exception as error:
            if obs.ndim != 3 or hasattr(envs.observation_space, "spaces"):  # what a team sees is no picture
                fail(f"no video: {error}")
            scaled = obs[0].cpu().numpy().astype(np.float64)
            scaled = (scaled - scaled.min()) / max(np.ptp(scaled), 1e-8) * 255
            picture = np.kron(scaled, np.ones((32, 32)))[..., None].repeat(3, axis=2).astype(np.uint8)
        height, width = picture.shape[0] // 2 * 2, picture.shape[1] // 2 * 2  # codecs want them even
        self.frames += 1
        try:
            if self.writer is None:
                self.pictures.append(picture[:height, :width])
            elif not self.problem:
                self.writer.append_data(picture[:height, :width])
        except OSError as error:
            self.problem = error

    def close(self):
        """Finishes the file and reads it again, for a codec may fail without a word; how many frames it has."""
        try:
            if self.writer is None:
                options = {"extension": ".gif", "loop": 0, "duration": 1000 / self.fps}
                self.unfinished.write_bytes(imageio.v3.imwrite("<bytes>", self.pictures, **options))
            else:
                self.writer.close()
                with imageio.v2.get_reader(self.unfinished) as film:
                    self.problem = self.problem or (film.count_frames() != self.frames and "frames are missing")
            if not self.problem:
                self.unfinished.replace(self.path)
        except OSError as error:
            self.problem = f"{str(error).splitlines()[0]} (is the disk full?)"
        if self.problem:
            fail(f"the video {self.path} could not be finished: {self.problem}", code=1)
        return self.frames


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # where the module of an environment may lie
    try:
        main(tyro.cli(Args))
    except KeyboardInterrupt:
        fail("interrupted before all episodes were over", code=130)
