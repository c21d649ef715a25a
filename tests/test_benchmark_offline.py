"""benchmark/offline.py and offline.sh."""

import os
from pathlib import Path

import pytest
from bench_examples import in_an_empty_folder  # noqa: F401

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
