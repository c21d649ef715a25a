"""benchmark/collect.py's sets, and report.py's statistics against known values, tables and figures."""

import contextlib
import shlex
import shutil
import sys
import unittest.mock
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import tyro
from bench_examples import ROOT, colours, example, in_an_empty_folder, log, write  # noqa: F401

import collect  # isort: skip
import report  # isort: skip

plt.rcParams["savefig.dpi"] = 60
COMMITTED = sorted(ROOT.glob("benchmark/results/**/table.md"))


def table(folder, *sets, **options):
    """The rows of the table that report.py makes, as dicts."""
    report.main(report.Args(tuple(map(Path, sets or [folder])), out=Path(folder), **options))
    lines = [line for line in Path(folder, "table.md").read_text().splitlines() if line.startswith("| ")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]


# ------------------------------------------------------------------------------------------------------- sets


def test_a_resumed_run_counts_neither_the_time_between_nor_points_after_the_checkpoint():
    log("run", 0, [100, 200, 300, 400, 500], speed=100, returns=1)
    log("run", 300, [400, 500, 600], speed=50, returns=2)
    points = collect.read_events("run")
    assert points[:, 0].tolist() == [100, 200, 300, 400, 500, 600]
    assert points[:, 1].tolist() == pytest.approx([1, 2, 3, 5, 7, 9])
    assert points[:, 2].tolist() == [1, 1, 1, 2, 2, 2]
    assert np.nan_to_num(points[:, 3]).tolist() == [0, -1, 0, -2, 0, -2]


def test_long_curves_are_thinned_by_averaging_and_missing_values_do_not_count():
    points = np.stack([np.arange(1.0, 1001), np.arange(1000) / 10, np.arange(1000.0), np.full(1000, np.nan)], 1)
    points[::2, 2] = np.nan
    thinned = collect.thin(points)
    assert len(thinned) == 200 and np.isnan(thinned[:, 3]).all()
    assert thinned[0, :3].tolist() == [5, 0.4, 2] and thinned[1, :3].tolist() == [10, 0.9, 7]
    assert np.array_equal(collect.thin(points[:200]), points[:200], equal_nan=True)


def test_a_set_is_read_as_it_was_written_in_the_order_of_its_keys():
    runs = [example(seed=10, level=-3.25), example(seed=9), example("Acrobot-v1", variant='odd, "name"', seed=1)]
    runs[0].points[2, 3] = np.nan
    runs[1].about["distinct"] = np.nan
    folder = write("set", *runs)
    again = collect.read_set(folder)
    assert [run.key for run in again] == [runs[2].key, runs[1].key, runs[0].key]
    for run, expected in zip(again, [runs[2], runs[1], runs[0]], strict=True):
        about = {name: x for name, x in run.about.items() if name != "points" and x == x}
        assert about == {name: x for name, x in expected.about.items() if x == x}
        assert np.array_equal(run.points, expected.points, equal_nan=True)
    files = [(folder / name).read_text() for name in ("runs.csv", "curves.csv")]
    collect.write_set(folder, again)
    assert files == [(folder / name).read_text() for name in ("runs.csv", "curves.csv")]


def test_a_run_that_is_added_takes_the_place_of_its_namesake_and_of_no_other():
    write("set", example(seed=1), example(seed=2))
    collect.add_to_set(Path("set"), [example(seed=2, level=7), example(seed=3)])
    assert [(run.key[2], run.points[0, 2]) for run in collect.read_set("set")] == [(1, 1), (2, 7), (3, 1)]


def test_writers_that_add_at_the_same_time_lose_nothing():
    with ThreadPoolExecutor(4) as pool:  # a lock keeps threads apart as it does processes
        list(pool.map(lambda seed: collect.add_to_set("set", [example(seed=seed)]), range(20)))
    assert len(collect.read_set("set")) == 20


def test_a_set_whose_writer_was_killed_between_its_two_files_is_as_it_was(monkeypatch):
    write("set", example(seed=1))
    whole = collect.write_whole
    monkeypatch.setattr(collect, "write_whole", lambda path, text: whole(path, text) if "curves" in path.name else None)
    collect.add_to_set(Path("set"), [example(seed=2)])
    assert [run.key[2] for run in collect.read_set("set")] == [1]


class Killed(Exception):
    """In the place of the end of a process."""


@pytest.mark.parametrize("points", [5, 7])
@pytest.mark.parametrize("done", range(4))
def test_a_set_whose_writer_was_killed_while_it_replaced_a_run_has_it_as_it_was_or_is_or_not_at_all(
    done, points, monkeypatch
):
    write("set", example(seed=1), example(seed=2))
    whole, written = collect.write_whole, []

    def write_until_killed(path, text):
        if len(written) == done:
            raise Killed
        written.append(path)
        whole(path, text)

    with monkeypatch.context() as patched, contextlib.suppress(Killed):
        patched.setattr(collect, "write_whole", write_until_killed)
        collect.add_to_set(Path("set"), [example(seed=2, level=7, points=points)])
    first, *second = collect.read_set("set")
    assert first.key[2] == 1 and len(first.points) == 5 and first.about["greedy_mean"] == 1
    found = [(run.key[2], run.about["greedy_mean"], *set(run.points[:, 3])) for run in second]
    assert found == {0: [(2, 1, 1)], 3: [(2, 7, 7)]}.get(len(written), [])
    collect.add_to_set(Path("set"), [example(seed=3)])  # which drops curves without a line
    there = {row["seed"] for row, _ in collect.read_csv(Path("set/curves.csv"), collect.KEY + collect.POINT)}
    assert there == {run.key[2] for run in collect.read_set("set")} == {1, *(run.key[2] for run in second), 3}


@pytest.mark.parametrize("points", [5, 7])
def test_a_reader_between_whose_files_a_run_is_replaced_reads_both_again(points, monkeypatch):
    write("set", example(seed=1))
    read, more = collect.read_csv, [example(seed=1, level=7, points=points)]

    def read_csv(path, columns):
        if path.name == "curves.csv" and more:
            collect.add_to_set(Path("set"), [more.pop()])
        return read(path, columns)

    monkeypatch.setattr(collect, "read_csv", read_csv)
    (run,) = collect.read_set("set")
    assert run.about["greedy_mean"] == 7 and run.points[:, 3].tolist() == [7] * points


def line(number, column, value):
    """Puts a value into a cell of a CSV's line, counted from 1."""

    def change(lines):
        cells = lines[number - 1].split(",")
        cells[lines[0].split(",").index(column)] = value
        return [*lines[: number - 1], ",".join(cells), *lines[number:]]

    return change


BROKEN = {
    "a column is missing": ("runs", lambda lines: [x.partition(",")[2] for x in lines], "line 1: expected the columns"),
    "a number is none": ("runs", line(2, "greedy_mean", "good"), "line 2: greedy_mean must be a number, not 'good'"),
    "a seed is written as 01": ("runs", line(3, "seed", "01"), "line 3: seed must be a whole number, not '01'"),
    "a seed is there twice": ("runs", line(3, "seed", "1"), "line 3: there is another line for CartPole-v1, pqn, 1"),
    "a run has too few cells": ("runs", lambda lines: [*lines[:2], "a,b"], "line 3: expected 23 values, found 2"),
    "a cell is infinite": ("curves", line(4, "eval_return", "inf"), "line 4: eval_return must be a number, not 'inf'"),
    "the step is missing": ("curves", line(2, "step", ""), "line 2: step or seconds missing"),
    "the steps go back": ("curves", line(3, "step", "100"), "line 3: step 100 does not come after 100"),
    "the end is missing": ("curves", lambda lines: lines[:-2], " has 3 of 5 points of CartPole-v1, pqn, 2"),
    "there are more points": ("curves", lambda lines: [*lines, lines[-1].replace("500", "600")], " has 6 of 5 points"),
    "it is empty": ("curves", lambda lines: [], "line 1: expected the columns"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_set_is_reported_by_file_and_line(case, capsys):
    name, breaks, hint = BROKEN[case]
    file = write("set", example(), example(seed=2)) / f"{name}.csv"
    file.write_text("".join(f"{x}\n" for x in breaks(file.read_text().splitlines())))
    with pytest.raises(SystemExit) as exit:
        report.main(report.Args((Path("set"),)))
    message = capsys.readouterr().err
    assert exit.value.code == 2 and message.count("\n") == 1
    assert message.startswith(f"error: {file}") and hint in message
    assert {file.name for file in Path("set").iterdir()} == {"runs.csv", "curves.csv"}


def test_greedy_games_are_told_apart_by_what_the_agent_sees_in_their_first_episode(monkeypatch):
    # Of four games the first two are the same; what comes after their ends is not looked at.
    seen = np.array([[1, 1, 1, 2], [2, 2, 3, 2], [5, 6, 7, 8]], dtype=np.uint8)
    over = np.array([[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=bool)
    script = SimpleNamespace(step_envs=lambda envs, t: (seen[t][:, None], None, None, None, None, over[t]))

    def main(args):
        for t in range(3):
            script.step_envs(None, t)
        return np.arange(args.episodes)

    monkeypatch.setitem(
        sys.modules, "play", SimpleNamespace(main=main, Args=lambda _, episodes: SimpleNamespace(episodes=episodes))
    )
    returns, distinct = collect.evaluate(script, "run", 4)
    assert len(returns) == 4 and distinct == 3


# -------------------------------------------------------------------------------------------------- statistics


def test_students_t_is_the_one_of_the_tables():
    known = {1: 12.7062, 2: 4.30265, 4: 2.77645, 9: 2.26216, 30: 2.04227, 120: 1.97993}
    assert {df: report.t_quantile(df) for df in known} == pytest.approx(known, rel=1e-5)
    assert report.t_quantile(9, inside=0.99) == pytest.approx(3.24984, rel=1e-5)
    low, high = report.mean_interval(np.array([1.0, 2, 3, 4, 5]))
    assert (low, high) == pytest.approx((3 - 1.96324, 3 + 1.96324), rel=1e-5)  # 2.77645 √(2.5 / 5)


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_curves_of_three_seeds_are_shaded_by_their_interval_and_those_of_two_from_one_to_the_other(seeds):
    ax, curves = unittest.mock.Mock(), np.array([[1.0, 5.0], [3.0, 2.0], [2.0, 2.0]])[:seeds]
    report.draw_band(ax, [0, 1], curves, 0, "label")
    shaded = [[x.tolist() for x in call.args[1:]] for call in ax.fill_between.call_args_list]
    interval = [x.tolist() for x in report.mean_interval(curves)] if seeds == 3 else None
    assert shaded == {1: [], 2: [[[1.0, 2.0], [3.0, 5.0]]], 3: [interval]}[seeds]


def test_welchs_interval_and_p_are_those_of_a_worked_example():
    # Wikipedia's first example of Welch's t-test: t = -2.46, 25.0 degrees of freedom, p = 0.021
    x = np.array([27.5, 21.0, 19.0, 23.6, 17.0, 17.9, 16.9, 20.1, 21.9, 22.6, 23.1, 19.6, 19.0, 21.7, 21.4])
    y = np.array([27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2, 21.9, 22.1, 22.9, 20.5, 24.4])
    difference, low, high, p = report.welch(x, y)
    assert difference == pytest.approx(-2.1667, abs=1e-4) and p == pytest.approx(0.021, abs=5e-4)
    half = 2.0595 * abs(difference) / 2.46  # t of 25 degrees of freedom
    assert (low, high) == pytest.approx((difference - half, difference + half), abs=0.01)
    assert report.welch(y, x)[0] == -difference and report.welch(y, x)[3] == p
    assert report.welch(np.full(5, 500.0), np.full(10, 500.0)) == (0, 0, 0, 1)
    assert report.welch(np.full(5, 500.0), np.full(10, 400.0)) == (100, 100, 100, 0)


def test_holm_multiplies_the_smallest_p_by_the_number_of_comparisons_and_so_on():
    assert report.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert report.holm([0.9, 0.8]).tolist() == [1, 1] and len(report.holm([])) == 0


@pytest.mark.parametrize("n", [5, 10])
def test_intervals_cover_what_they_say(n):
    rng = np.random.default_rng(0)
    low, high = report.mean_interval(rng.normal(size=(n, 20_000)))
    assert ((low < 0) & (high > 0)).mean() == pytest.approx(0.95, abs=0.005)
    pairs = [report.welch(rng.normal(size=n), rng.normal(scale=3, size=10)) for _ in range(2000)]
    covered = np.mean([low < 0 < high for _, low, high, _ in pairs])
    assert covered == pytest.approx(0.95, abs=0.015)  # 0.943 and 0.952; standard error 0.005
    assert covered == pytest.approx(np.mean([p > 0.05 for *_, p in pairs]), abs=1e-3)


def test_aggregates_are_those_of_the_definitions():
    games = [np.array([0.0, 1.0, 2.0, 7.0]), np.array([3.0, 4.0, 5.0, 0.2])]
    assert report.mean(games) == pytest.approx((2.5 + 3.05) / 2)
    assert report.median([*games, np.array([9.0, 9.0, 9.0, 9.0])]) == pytest.approx(3.05)
    assert report.iqm(games) == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert report.iqm([np.arange(7.0)]) == 3 and report.iqm([np.array([0, 0, 0, 1, 1, 9.0])]) == 0.5
    assert report.optimality_gap(games) == pytest.approx(1 - (0 + 1 + 1 + 1 + 1 + 1 + 1 + 0.2) / 8)
    assert report.profile(games, [-1, 0, 1, 4.5, 7]).tolist() == [1, 7 / 8, 5 / 8, 2 / 8, 0]


def test_bootstrap_intervals_resample_the_seeds_of_each_game_by_themselves():
    constant = [np.full(5, 1.0), np.full(5, 9.0)]
    assert report.bootstrap(report.mean, constant).tolist() == [5, 5]
    x = np.random.default_rng(1).normal(size=400)
    low, high = report.bootstrap(report.mean, [x])
    assert (low, high) == pytest.approx((x.mean() - 1.96 * x.std() / 20, x.mean() + 1.96 * x.std() / 20), abs=0.01)


GAMES = {"Pong-v5": -20.7, "Breakout-v5": 30.5, "Venture-v5": 593.75, "Enduro-v5": 0.0, "Freeway-v5": 29.6}


def test_human_normalised_scores_are_0_for_random_and_1_for_human_play(capsys):
    runs = [example(env, seed=seed, level=level) for env, level in GAMES.items() for seed in (1, 2)]
    rows = {row["environment"]: row["human-normalised"] for row in table("out", write("atari", *runs))}
    assert rows == dict(zip(GAMES, ["0.00", "1.00", "0.50", "0.00", "1.00"], strict=True))
    out = capsys.readouterr().out  # of 0, 0, 0, 0, 0.5, 0.5, 1, 1, 1, 1
    assert "| 5 games, 10 runs | 0.50 [0.50, 0.50] | 0.50 [0.50, 0.50] | 0.50 [0.50, 0.50] | 0.50 [0.50, 0.50] |" in out
    assert Path("out/profiles.png").exists()


def test_figures_over_all_games_say_how_many_of_their_runs_are_unfinished(capsys):
    runs = [example(env, level=level) for env, level in GAMES.items()]
    table("out", write("atari", *runs, example("Pong-v5", seed=2, steps=300)))
    assert "| 5 games, 6 runs, **unfinished**: 1 |" in capsys.readouterr().out


def test_fewer_than_five_games_are_not_summed_up(capsys):
    runs = [example(env, level=level) for env, level in list(GAMES.items())[:4]]
    assert len(table("out", write("atari", *runs))) == 4
    assert "IQM" not in capsys.readouterr().out and not Path("out/profiles.png").exists()


# ----------------------------------------------------------------------------------------- tables and figures


def test_the_same_set_gives_the_same_table_and_figures_and_another_does_not():
    runs = [example(variant=v, seed=s, level=s**1.7 + (v == "b")) for v in "ab" for s in range(9)]
    folders = "results/first", "results/second", "results/other"
    for folder, changed in zip(folders, (0, 0, 1), strict=True):
        runs[-1].points[:, 3] += changed
        runs[-1].about["greedy_mean"] += changed
        write(folder, *runs)
        report.main(report.Args((Path(folder),)))
    names = {file.name for file in Path(folders[0]).iterdir() if file.suffix != ".csv"}
    assert names == {"table.md", "curves_steps.png", "curves_time.png", "final.png"}
    for name in names:
        first, second, other = (Path(folder, name).read_bytes().replace(folder.encode(), b"") for folder in folders)
        assert first == second and first != other, name


def test_every_variant_is_drawn():
    runs = [example(variant=v, seed=s, level=s * i) for i, v in enumerate("abc") for s in (1, 2)]
    report.main(report.Args((write("set", *runs),)))
    for name in ("curves_steps", "curves_time", "final"):
        shares = colours(f"set/{name}.png", top=0.25 if name != "final" else 0)
        assert min(shares[:3]) > 3e-4 and max(shares[3:6]) == 0, name


def test_the_table_compares_with_the_baseline_and_counts_its_comparisons(capsys):
    runs = [example(variant=f"envs_{n}", seed=s, level=n + s) for n in (2, 10) for s in (1, 2, 3)]
    runs += [example(variant="envs_12.5", seed=s, level=12.5 + s) for s in (1, 2, 3)]  # p = 0.038, twice
    small, *_, large = rows = table("set", write("set", *runs), baseline="envs_10")
    assert [row["variant"] for row in rows] == ["envs_2", "envs_10", "envs_12.5"]
    assert small["seeds"] == "3" and small["greedy return"] == small["training return"] == "4.00 ± 1.00"
    # 2.77645 √(2 / 3) on each side
    assert small["greedy return, difference from envs_10"] == "-8.00 [-10.3, -5.73]\\*"
    assert large["greedy return, difference from envs_10"] == "2.50 [0.23, 4.77]"
    assert rows[1]["greedy return, difference from envs_10"] == ""
    assert "4 comparisons: 4 of their intervals leave out 0, 2 of these also" in capsys.readouterr().out
    (row, *_) = table("set", baseline="envs_10", measures=("greedy_curve",))
    assert row["greedy return, mean over the curve"] == "4.00 ± 1.00" and "training return" not in row
    assert "--measures greedy_curve`" in Path("set/table.md").read_text()
    assert "greedy return, difference from envs_2" in table("set")[0]
    with pytest.raises(SystemExit) as exit:
        report.main(report.Args((Path("set"),), baseline="envs_3"))
    assert exit.value.code == 2 and "envs_2, envs_10" in capsys.readouterr().err


def test_the_mean_over_a_curve_is_over_its_steps_whether_they_have_a_value_or_not():
    run = example(points=5)
    run.points[:, 3] = [0, 4, np.nan, np.nan, 10]
    assert report.values([run], "greedy_curve") == [pytest.approx((0 + 4 + 6 + 8 + 10) / 5)]


def test_the_table_of_one_variant_has_the_means_intervals():
    rows = table("out", write("set", *(example(seed=s, level=s) for s in (1, 2, 3, 4, 5))))
    assert rows[0]["greedy return"] == "3.00 ± 1.58" and rows[0]["95% interval (greedy return)"] == "[1.04, 4.96]"
    assert not {"variant", "CleanRL's training return", "human-normalised"} & set(rows[0])  # nothing to say there


def test_atari_games_stand_beside_what_others_published_with_their_spread_over_games():
    made = {"command": "python pqn_atari_lstm.py --env-id Pong-v5", "greedy_std": 3.0, "train_std": 2.0}
    one, two = (example("Pong-v5", seed=s, level=10.0 * s, distinct=28 + s, **made) for s in (1, 2))
    (row,) = table("out", write("set", one, two))
    assert row["greedy return"] == "15.0 ± 7.07 (games ± 3.00)" and row["distinct games"] == "29, 30"
    assert row["training return"] == "15.0 ± 7.07 (games ± 2.00)"
    assert row["CleanRL's training return"] == "20.4 ± 0.1 at 10M" and row["aftab's greedy return at 50M"] == "21.0"
    (row,) = table("out", write("set", one))
    assert row["greedy return"] == "10.0 (games ± 3.00)"


def test_a_run_that_is_not_over_is_named_as_unfinished():
    runs = [example(seed=1), example(seed=2, steps=300), example("Acrobot-v1")]
    rows = table("out", write("set", *runs))
    assert rows[1]["steps"] == "400; **unfinished**: seed 2 at 300 of 500" and "unfinished" not in rows[0]["steps"]


def test_the_commands_stand_under_the_commit_and_the_machine_that_ran_them(capsys):
    runs = [example(seed=3), example(env="Acrobot-v1", seed=4, commit="", threads=np.nan), example(seed=12)]
    runs[1].about["command"] = "python toy.py --seed 4 --fast"
    table("out", write("set", *runs))
    out = capsys.readouterr().out
    known, unknown = out.split("\n\nOn ")[1:]
    assert known.startswith(
        "a CPU; threads: 1; torch 2.0; commit c0ffee; 100 greedy episodes for each agent; 2026-01-01"
    )
    assert unknown.startswith("a CPU; threads: unknown; torch 2.0; commit unknown; 100 greedy")
    assert "\npython toy.py --seed 3 12\n```" in known and "\npython toy.py --seed 4 --fast --seed 4\n```" in unknown
    assert "±" not in out.splitlines()[2]


def test_the_time_to_a_target_is_when_five_points_in_a_row_have_reached_it_on_average():
    runs = [example("Pong-v5", seed=s, points=10, level=0, command="python x.py --env-id Pong-v5") for s in (1, 2, 3)]
    for run, first in zip(runs, (2, 4, 99), strict=True):  # the third never reaches it
        run.points[first:, 3] = 18
        run.points[: first - 1, 3] = np.nan  # and one point of 0 before
    report.main(report.Args((write("set", *runs),), targets=Path("targets.md")))
    text = Path("targets.md").read_text()
    # Five points at 18 from the third on end at the seventh, after 70 s, and from the fifth on after 90 s.
    assert (
        "| greedy Pong-v5 ≥ 18 | 1.50 (1.17 to 1.50) | 2 of 3 | a CPU | `python x.py --env-id Pong-v5` | c0ffee |"
        in text
    )
    assert text.count("≥") == 1
    report.main(report.Args((write("set", *runs[1:]),), targets=Path("targets.md")))
    assert "| not reached | 1 of 2 |" in Path("targets.md").read_text()


@pytest.mark.parametrize("committed", COMMITTED, ids=lambda path: path.parent.name)
def test_a_committed_table_is_what_the_committed_set_gives(committed, monkeypatch):
    *_, command = committed.read_text().split("`")[:-1]
    words = shlex.split(command)
    assert words[:2] == ["python", "benchmark/report.py"]
    for name in ("draw_curves", "draw_final", "draw_profiles"):  # their sameness is shown above, at less expense
        monkeypatch.setattr(report, name, lambda *_: None)
    folder = committed.parent.relative_to(ROOT)
    shutil.copytree(committed.parent, folder)
    (folder / "table.md").unlink()
    report.main(tyro.cli(report.Args, args=words[2:]))
    assert (folder / "table.md").read_text() == committed.read_text()


def test_the_committed_times_to_the_targets_are_what_the_committed_sets_give():
    committed = ROOT / "benchmark/results/time_to_target.md"
    *_, command = committed.read_text().split("`")[:-1]
    Path("benchmark/results").mkdir(parents=True)
    args = tyro.cli(report.Args, args=shlex.split(command)[2:])
    for folder in args.sets:
        shutil.copytree(ROOT / folder, folder)
    report.main(args)
    assert args.targets.read_text() == committed.read_text()


def test_sets_are_compared_and_written_where_asked(capsys):
    before = write("sets/z_before", *(example(seed=s, level=s) for s in (1, 2)))
    after = write("sets/after", *(example(seed=s, level=s + 1) for s in (1, 2)))
    report.main(report.Args((before, after), out=Path("out")))
    header, _, first, second, *_ = capsys.readouterr().out.splitlines()
    assert "difference from z_before" in header
    assert "| z_before | 2 |" in first and "| after | 2 |" in second and "| 1.00 [-2.04, 4.04] |" in second
    assert Path("out/final.png").exists() and not (before / "table.md").exists()
    namesake = write("others/after", example())
    with pytest.raises(SystemExit) as exit:
        report.main(report.Args((after, namesake), out=Path("out")))
    assert exit.value.code == 2 and "sets/after and others/after" in capsys.readouterr().err


def test_runs_that_were_not_launched_here_are_read_from_their_tensorboard_files(capsys):
    log("runs/something_else", 0, [100], speed=100, returns=1)
    for seed in (1, 2):
        log(f"runs/CartPole-v1__pqn__{seed}__17000000{seed}", 0, range(100, 1000, 100), speed=100, returns=seed)
    report.main(report.Args((Path("runs"),), out=Path("out")))
    assert "| CartPole-v1 | 2 |" in capsys.readouterr().out
    assert colours("out/curves_steps.png", top=0.25)[1] > 3e-4
    for variant in ("a", "b"):  # as launch.py arranges them
        log(f"sets/x/CartPole-v1__{variant}__1__00/runs/CartPole-v1__pqn__1__17", 0, [100, 200], speed=100, returns=1)
    report.main(report.Args((Path("sets"),), out=Path("out")))
    out = capsys.readouterr().out
    assert "| CartPole-v1 | a | 1 |" in out and "| CartPole-v1 | b | 1 |" in out
    with pytest.raises(SystemExit) as exit:
        report.main(report.Args((Path("out"),)))
    assert exit.value.code == 2 and "no results in out" in capsys.readouterr().err


def test_two_runs_of_the_same_environment_variant_and_seed_are_not_taken_for_two_seeds(capsys):
    for folder in "runs/CartPole-v1__pqn__1__17", "runs/CartPole-v1__pqn__1__18", "runs/CartPole-v1__pqn__2__17":
        log(folder, 0, [100, 200], speed=100, returns=1)
    with pytest.raises(SystemExit) as exit:
        report.main(report.Args((Path("runs"),), out=Path("out")))
    message = capsys.readouterr().err
    assert exit.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    assert "runs/CartPole-v1__pqn__1__17 and runs/CartPole-v1__pqn__1__18" in message


def test_a_set_without_runs_and_a_file_in_the_place_of_a_folder_are_refused_in_one_line(capsys):
    write("empty")
    Path("file").touch()
    for sets, options, hint in (
        (["empty"], {}, "there are no runs in empty"),
        ([write("set", example()), "empty"], {}, "there are no runs in empty"),
        (["set"], {"out": Path("file")}, "file"),
        (["set"], {"out": Path("file/out")}, "file"),
        (["set"], {"targets": Path("empty")}, "is a folder"),
    ):
        with pytest.raises(SystemExit) as exit:
            report.main(report.Args(tuple(map(Path, sets)), **options))
        message = capsys.readouterr().err
        assert exit.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1 and hint in message


def test_a_single_greedy_episode_has_no_spread():
    one, two = (example("Pong-v5", seed=s, greedy_std=np.nan, train_std=2.0) for s in (1, 2))
    (row,) = table("out", write("set", one, two))
    assert row["greedy return"] == "1.00 ± 0.00" and row["training return"] == "1.00 ± 0.00 (games ± 2.00)"
