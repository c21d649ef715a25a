"""Evaluates and shows a saved agent: every episode greedy, in an environment of its own.

python play.py runs/CartPole-v1__pqn__1__1700000000
python play.py runs/Breakout-v5__pqn_atari_envpool__1__1700000000 --episodes 30 --video breakout.mp4
"""

import importlib
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro


@dataclass
class Args:
    run_folder: tyro.conf.Positional[str]
    """the folder of the run, as the script that trained the agent printed it"""
    episodes: int = 100
    """episodes to play, all at the same time"""
    seed: int = 0
    """seed of the episodes; none of them has been seen in training"""
    max_steps: int = 100_000
    """an episode that is still going on after this many steps is cut short, and counted as it is"""
    device: str = "auto"
    """any torch device; "auto" takes CUDA when present"""
    video: str = ""
    """save the first episode as this .mp4 or .gif"""
    fps: int = 30
    """frames per second of the video"""


def fail(message):
    """Ends the program for a reason that the user can mend."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def load_script(folder):
    """The script that made the checkpoint: it knows the environment, the network and how the agent acts."""
    path = Path(folder, "checkpoint.pt")
    if not os.path.isfile(path):
        fail(f"there is no checkpoint in {folder!r}: name a run's folder, runs/...")
    try:
        name = str(torch.load(path, map_location="cpu", weights_only=True)["script"])
    except Exception:
        fail(f"{path} is broken, or no checkpoint of this project")
    if not (name.isidentifier() and name.startswith("pqn") and Path(__file__).with_name(f"{name}.py").is_file()):
        fail(f"{path} was made by {name}.py, which is not beside play.py")
    return importlib.import_module(name)


def picture(envs, obs):
    """An RGB picture of the first environment; where EnvPool cannot draw it, its observation if that is a picture."""
    try:
        frame = np.asarray(envs.render())
        frame = frame[0] if frame.ndim == 4 else frame
    except Exception as error:
        if obs.ndim != 3:
            fail(f"no video: {' '.join(str(error).split())}")
        scaled = (obs[0] - obs[0].min()) / max(np.ptp(obs[0]), 1e-8) * 255
        frame = np.kron(scaled, np.ones((32, 32)))[..., None].repeat(3, axis=2).astype(np.uint8)
    return frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]  # video codecs want even sides


def open_video(args):
    import imageio.v2 as imageio

    options = {"loop": 0, "duration": 1000 / args.fps} if args.video.endswith(".gif") else {"fps": args.fps}
    if args.video.endswith(".mp4"):
        options["macro_block_size"] = 2
    try:
        return imageio.get_writer(args.video, **options)
    except (OSError, ValueError) as error:
        fail(f"cannot write --video {args.video}: {error}")


def main(args: Args):
    for wrong, message in [
        (args.episodes < 1, f"--episodes must be at least 1, not {args.episodes}"),
        (args.max_steps < 1, f"--max-steps must be at least 1, not {args.max_steps}"),
        (args.seed < 0, f"--seed must not be negative, not {args.seed}"),
        (args.fps < 1, f"--fps must be at least 1, not {args.fps}"),
        (
            args.video and Path(args.video).suffix not in (".mp4", ".gif"),
            f"--video {args.video} must be a file ending in .mp4 or .gif",
        ),
        (
            args.video and (Path(args.video).is_dir() or not os.access(Path(args.video).parent, os.W_OK)),
            f"--video {args.video} cannot be written there",
        ),
    ]:
        if wrong:
            fail(message)
    script = load_script(args.run_folder)
    checkpoint = script.load_checkpoint(args.run_folder)
    device = script.pick_device(args.device)
    try:
        trained = script.Args(**checkpoint["args"])
        # The environments that act greedily in training do so here, without any to train on.
        played = replace(trained, num_envs=0, num_eval_envs=args.episodes, num_steps=1)
        envs = script.make_envs(played, args.episodes, (args.seed, 2**32), render=bool(args.video))
        network = script.QNetwork(*script.spaces(envs), played)
        network.load_state_dict(checkpoint["network"])
    except (TypeError, AttributeError, RuntimeError) as error:
        fail(f"the checkpoint in {args.run_folder} does not fit {script.__name__}.py: {str(error).splitlines()[0]}")
    network.to(device).eval()
    collector = script.Collector(envs, network, played, device)

    returns, lengths, frames = np.full(args.episodes, np.nan), np.zeros(args.episodes), 0
    film = open_video(args) if args.video else None
    for _ in range(args.max_steps):
        if film and np.isnan(returns[0]):
            film.append_data(picture(envs, collector.obs.cpu().numpy()))
            frames += 1
        for i, episode_return, length in collector.collect(epsilon=0.0)[-1]:
            if np.isnan(returns[i]):  # only its first episode: quick ones do not count more often
                returns[i], lengths[i] = episode_return, length
        if not np.isnan(returns).any():
            break
    cut = np.isnan(returns)
    returns[cut], lengths[cut] = collector.returns[cut], collector.lengths[cut]
    if film:
        film.close()

    summary = lambda x: f"{np.mean(x):.1f} ± {np.std(x):.1f} (min {np.min(x):.1f}, max {np.max(x):.1f})"
    print(f"{trained.env_id}, step {checkpoint['step']:,}, {args.episodes} greedy episodes")
    print(f"  return   {summary(returns)}")
    print(f"  length   {summary(lengths)}" + (f", {cut.sum()} cut short at {args.max_steps:,}" if cut.any() else ""))
    if checkpoint["last_returns"]:
        print(f"  training {summary(checkpoint['last_returns'])}, the last {len(checkpoint['last_returns'])} episodes")
    if args.video:
        print(f"  video    {args.video}, {frames} frames, return {returns[0]:.1f}")
    return returns


if __name__ == "__main__":
    main(tyro.cli(Args))
