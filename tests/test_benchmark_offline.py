"""benchmark/offline.py and offline.sh."""

import os
import subprocess
from pathlib import Path

import pytest
from bench_examples import ROOT, in_an_empty_folder  # noqa: F401

import offline  # isort: skip


def test_rows_are_added_in_the_place_of_their_namesakes(monkeypatch):
    path = Path("table.csv")
    offline.add(path, [{"task": "a", "variant": "x", "loss": 1.0}, {"task": "a", "variant": "y", "loss": 2.0}])
    offline.add(path, [{"task": "a", "variant": "x", "loss": 1 / 3}])
    assert path.read_text() == "task,variant,loss\na,y,2\na,x,0.333333\n"
    before = path.read_text()
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)  # as if it were killed there
    with pytest.raises(ZeroDivisionError):
        offline.add(path, [{"task": "b", "variant": "x", "loss": 3.0}])
    assert path.read_text() == before


@pytest.mark.parametrize("columns", ["task,variant,reward", "task,variant,loss,reward", "variant,task,loss", ""])
def test_rows_are_not_added_to_a_table_of_other_columns(columns, capsys):
    path = Path("table.csv")
    path.write_text(f"{columns}\na,x,1\n")
    with pytest.raises(SystemExit) as exit:
        offline.add(path, [{"task": "b", "variant": "x", "loss": 3.0}])
    message = capsys.readouterr().err
    assert exit.value.code == 2 and message.startswith("error: table.csv") and message.count("\n") == 1
    assert path.read_text() == f"{columns}\na,x,1\n"


STUB = """#!/bin/sh
echo "$*" >> calls
echo "runs/run: made"
"""


def call(*words, **settings):
    """offline.sh with a `python` that only notes what it is called with."""
    Path("bin").mkdir(exist_ok=True)
    Path("bin/python").write_text(STUB)
    Path("bin/python").chmod(0o755)
    Path("calls").write_text("")
    environment = os.environ | {"PATH": f"{Path('bin').resolve()}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": "."}
    done = subprocess.run(
        [ROOT / "benchmark/offline.sh", *words], env=environment | settings, capture_output=True, text=True
    )
    return done, [line.split() for line in Path("calls").read_text().splitlines()]


def tasks(calls):
    return list(dict.fromkeys(words[words.index("--env-id") + 1] for words in calls if "--env-id" in words))


def test_table1_without_tasks_runs_all_of_them_and_with_tasks_those():
    done, calls = call("table1", SEEDS="4")
    assert done.returncode == 0 and len(calls) == 2 * 4 * 4
    assert tasks(calls) == ["CartPole-v1", "MountainCar-v0", "Acrobot-v1", "Pendulum-v1"]
    assert all(words[words.index("--num-seeds") + 1] == "4" for words in calls[::2])
    done, calls = call("table1", "Acrobot-v1")
    assert done.returncode == 0 and tasks(calls) == ["Acrobot-v1"]


def test_offline_sh_alone_runs_everything_and_reports():
    done, calls = call()
    assert done.returncode == 0 and tasks(calls) == "toy CartPole-v1 MountainCar-v0 Acrobot-v1 Pendulum-v1".split()
    assert calls[-1] == ["benchmark/offline.py", "report", "benchmark/results/offline"]


@pytest.mark.parametrize("words", ["--list", "table2", "toy --list", "table1 --list", "report mine", "all toy"])
def test_offline_sh_refuses_what_it_does_not_know_in_one_line(words):
    done, calls = call(*words.split())
    assert done.returncode == 2 and not calls
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and words.split()[-1] in done.stderr


TASKS = ["Acrobot-v1", "CartPole-v1"]


def table1(seeds, norms=tuple(offline.NORMS), rates=(0.1, 0.01, 0.001)):
    """Rows of Table 1: seed s of every learning rate has the return s."""
    names = ["largest_norm", "first_return", *offline.MEASURES, "first_seem"]
    return [
        {"task": task, "variant": norm, "optimizer": "adam", "steps": 9.0, "learning_rate": rate, "seed": seed}
        | {"diverged_at": -1.0, "first_step": 1.0}
        | dict.fromkeys(names, float(seed))
        for task in TASKS
        for norm in norms
        for rate in rates
        for seed in range(1, seeds + 1)
    ]


# Student's t of the tables: 4.303, 2.571, 2.093
@pytest.mark.parametrize("seeds, cell", [(1, "1.0"), (3, "2.0 ± 2.5"), (6, "3.5 ± 2.0"), (20, "10.5 ± 2.8")])
def test_intervals_are_students_for_any_number_of_seeds(seeds, cell):
    assert f"| Acrobot-v1 | 9 | {' | '.join([f'{cell} []'] * 5)} |\n" in offline.returns(table1(seeds), "returns.png")


@pytest.mark.parametrize("missing", ["none", "layer_norm", "weight_norm"])
def test_a_normalisation_that_was_not_run_leaves_its_cells_empty(missing):
    rows = [row for row in table1(3) if (row["task"], row["variant"]) != ("Acrobot-v1", missing)]
    first, second = (line for line in offline.returns(rows, "x.png").splitlines() if line.count("[]"))
    assert second.count("2.0 ± 2.5 []") == 5
    assert first.count("2.0 ± 2.5 []") == first.count("[]") == (3 if missing == "none" else 4)  # none has "random" too
    compared = offline.interference(rows, "x.png").split("at how many")[1]
    assert "| CartPole-v1 | 3 | 0 |" in compared and ("| Acrobot-v1 |  |" in compared) == (missing != "weight_norm")
    assert offline.seem_of_tasks(rows).count("| Acrobot-v1 |") == 3
