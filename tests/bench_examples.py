"""What the tests of benchmark/ share: runs with known figures, and a folder of their own to be in."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]

import collect  # noqa: E402
import report  # noqa: E402


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = "SEEDS WORKERS CORES OPTIONS RESULTS EPISODES OMP_NUM_THREADS SLURM_ARRAY_TASK_ID SLURM_SUBMIT_DIR"
    for name in settings.split():
        monkeypatch.delenv(name, raising=False)
    # Files of one second are read in the order of their names, which end with a count: 9 would come after 10
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def example(env="CartPole-v1", variant="pqn", seed=1, level=1.0, points=5, command="python toy.py", **about):
    """A run whose returns are all `level`."""
    about = {"env": env, "variant": variant, "seed": seed, "command": f"{command} --seed {seed}", **about}
    about = {"script_sha1": "abc", "commit": "c0ffee", "date": "2026-01-01", "hardware": "a CPU"} | about
    about = {"torch": "2.0", "threads": 1, "steps_per_second": 2.0 * points, "seconds": 50.0} | about
    about = {"steps": 100 * points, "steps_to_do": 100 * points, "episodes": 100, "distinct": 29} | about
    steps = 100.0 * np.arange(1, points + 1)
    curves = np.stack([steps, steps / 10, np.full(points, level), np.full(points, level)], 1)
    return collect.Run(dict.fromkeys(collect.RUN[:-1], float(level)) | about, curves)


def write(folder, *runs):
    collect.write_set(folder, runs)
    return Path(folder)


def log(folder, start, steps, speed, returns=None):
    """A TensorBoard file as the scripts write it, of a session that began at step `start`."""
    with SummaryWriter(folder) as writer:
        writer.add_text("hyperparameters", "...", start)
        for step in steps:
            writer.add_scalar("charts/SPS", speed, step)
            if returns is not None:
                writer.add_scalar("charts/episodic_return", returns, step)
            if returns and step % 200 == 0:
                writer.add_scalar("eval/episodic_return", -returns, step)


def colours(file, top=0.0, right=1.0):
    """The share of each of the palette's colours in a PNG, or in the part of it that holds no legend."""
    pixels = (plt.imread(file)[..., :3] * 255).round().astype(int)
    pixels = pixels[int(top * len(pixels)) :, : int(right * pixels.shape[1])]
    wanted = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in report.COLOURS]
    return [(pixels == colour).all(-1).mean() for colour in wanted]
