"""play.py: whose agents it finds, what it counts and shows, and what it says when a video cannot be written."""

import re
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import imageio
import numpy as np
import pytest
import torch

import play
import pqn

ROOT = Path(__file__).parents[1]
SMALL = pqn.Args(num_envs=4, num_steps=8, num_minibatches=2, update_epochs=1, total_timesteps=320, hidden_sizes=(16,))


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder():
    return trained()


def trained(**options):
    before = set(Path("runs").glob("*"))
    pqn.main(replace(SMALL, **options))
    (folder,) = set(Path("runs").glob("*")) - before
    return folder


def rename_script(folder, name):
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save(checkpoint | {"script": name}, folder / "checkpoint.pt")


@pytest.mark.parametrize("name", ["my_agent", "pqn-mine"])
def test_a_renamed_copy_of_a_script_is_found_in_the_working_directory(name, folder, monkeypatch):
    shutil.copy(ROOT / "pqn.py", f"{name}.py")
    rename_script(folder, name)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert len(play.main(play.Args(str(folder), episodes=3))) == 3
    sys.modules.pop(name)


@pytest.mark.parametrize("name", ["nowhere", "baird", "../pqn", "os"])
def test_nothing_is_imported_that_is_not_a_script_of_agents(name, folder, capsys):
    rename_script(folder, name)
    with pytest.raises(SystemExit) as exit:
        play.main(play.Args(str(folder), episodes=3))
    assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_every_episode_counts_once_and_ends_where_the_environment_says(folder):
    returns = play.main(play.Args(str(trained(env_id="tiny_envs:TimeLimited-v0")), episodes=7))
    assert list(returns) == [5.0] * 7
    assert list(play.main(play.Args(str(folder), episodes=4, max_steps=3))) == [3.0] * 4


def test_a_quick_environment_counts_with_its_first_episode_alone(folder, monkeypatch):
    ends = iter([[(0, 1.0, 1)], [(0, 9.0, 1)], [(1, 2.0, 3)]])
    monkeypatch.setattr(pqn.Collector, "collect", lambda *_, **__: (None, [], next(ends)))
    assert list(play.main(play.Args(str(folder), episodes=2))) == [1.0, 2.0]


def test_small_returns_are_shown_with_the_decimals_they_need():
    assert play.summary([0, 1, 1, 1]) == "0.750 ± 0.433 (min 0.000, max 1.000)"
    assert play.summary([-200.0, 100.0]) == "-50.0 ± 150.0 (min -200.0, max 100.0)"


def test_progress_is_shown_while_the_episodes_last(folder, monkeypatch, capsys):
    seconds = iter(range(0, 10_000, 11))
    monkeypatch.setattr(play.time, "monotonic", lambda: next(seconds))
    play.main(play.Args(str(folder), episodes=3))
    assert re.search(r"^\d of 3 episodes are over after 1 steps$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("video", ["x.mp4", "x.gif"])
def test_a_video_shows_the_first_episode_from_its_start_to_its_end(video, folder, capsys):
    returns = play.main(play.Args(str(folder), episodes=2, video=video))
    frames = imageio.v2.mimread(video, memtest=False)
    assert f"{int(returns[0])} frames, return {returns[0]:.1f}" in capsys.readouterr().out
    assert len(frames) >= 5 and np.std(frames[0]) > 1 and not np.array_equal(frames[0], frames[-1])


@pytest.mark.parametrize("video", ["x.mp4", "x.gif"])
def test_a_full_disk_costs_the_video_and_not_the_results(video, folder, capfd):
    Path(video).write_text("an older film")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(SystemExit) as exit:
            play.main(play.Args(str(folder), episodes=2, video=video))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    out, err = capfd.readouterr()
    assert exit.value.code == 1 and "return" in out and "frames" not in out
    assert err.splitlines()[-1].startswith(f"error: the video {video} could not be finished: ")
    assert Path(video).read_text() == "an older film"


def test_a_film_that_is_interrupted_leaves_an_older_one_and_nothing_else(folder):
    Path("x.mp4").write_text("an older film")
    code = f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import play
add, calls = play.Film.add, []
def interrupted(*args):
    calls.append(add(*args))
    if len(calls) == 4:
        raise KeyboardInterrupt
play.Film.add = interrupted
play.main(play.Args({str(folder)!r}, episodes=2, video="x.mp4"))"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode
    assert Path("x.mp4").read_text() == "an older film" and not list(Path().glob("unfinished*"))


@pytest.mark.parametrize("options", [{"episodes": 0}, {"max_steps": 0}, {"fps": 0}, {"seed": -1}, {"video": "x.avi"}])
def test_bad_options_get_one_line_and_exit_code_2(options, folder, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        play.main(play.Args(str(folder), **options))
    assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1
