"""baird.py: updates and Jacobians against matrices and finite differences, endings against eigenvalues, the files."""

import csv
import math
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import baird

ROOT = Path(__file__).parents[1]
SMALL = baird.Args(num_seeds=3, updates=200, width=8, sweep=(0.01, 1.0, 2))
NETWORKS = ("linear", "MLP", "LayerNorm")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def start(network, width=8, seed=0):
    return baird.initial_weights(network, width, torch.Generator().manual_seed(seed))


def linear_matrix(gamma=0.99):
    """A with E[update] = A φ, from the MDP's definition: Xᵀ D (γP − I) X."""
    x = torch.zeros(7, 8, dtype=torch.float64)
    for state in range(6):
        x[state, state], x[state, 7] = 2, 1
    x[6, 6], x[6, 7] = 1, 2
    to_state_7 = torch.zeros(7, 7, dtype=torch.float64)
    to_state_7[:, 6] = 1
    return x.T @ (gamma * to_state_7 - torch.eye(7, dtype=torch.float64)) @ x / 7


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# -- The equations


def test_linear_update_is_the_matrix_of_the_mdp():
    phi = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, update = baird.td_update("linear", "gelu", phi, 0.99)
    torch.testing.assert_close(update, phi @ linear_matrix().T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalised", [False, True])
def test_network_is_eq_5_and_6_with_one_over_root_k(normalised):
    width, phi = 8, start("LayerNorm")
    w, m = phi[:width], phi[width:].reshape(width, 8)
    for state in range(7):
        f = [sum(float(m[i, j] * baird.features()[state, j]) for j in range(8)) for i in range(width)]
        if normalised:
            mean = sum(f) / width
            deviation = math.sqrt(sum((value - mean) ** 2 for value in f) / width + 1e-6)
            f = [(value - mean) / deviation / math.sqrt(width) for value in f]
            assert sum(value**2 for value in f) <= 1
        expected = sum(float(w[i]) * math.tanh(f[i]) for i in range(width))
        v = baird.values("LayerNorm" if normalised else "MLP", "tanh", phi)[state].item()
        assert v == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("network", NETWORKS)
def test_update_is_the_semi_gradient_by_finite_differences(network):
    phi, h = start(network), 1e-6
    v = baird.values(network, "gelu", phi)
    td = 0.99 * v[6] - v  # no gradient through the target
    expected = torch.zeros_like(phi)
    for i in range(len(phi)):
        step = torch.zeros_like(phi)
        step[i] = h
        difference = baird.values(network, "gelu", phi + step) - baird.values(network, "gelu", phi - step)
        expected[i] = (td * difference / (2 * h)).mean()
    torch.testing.assert_close(baird.td_update(network, "gelu", phi, 0.99)[1], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("network", NETWORKS)
def test_jacobian_is_that_of_the_update_by_finite_differences(network):
    phi, h = start(network), 1e-6
    columns = []
    for i in range(len(phi)):
        step = torch.zeros_like(phi)
        step[i] = h
        plus, minus = (baird.td_update(network, "gelu", phi + s, 0.99)[1] for s in (step, -step))
        columns.append((plus - minus) / (2 * h))
    jacobian = baird.mean_path_jacobian(network, "gelu", phi, 0.99)
    torch.testing.assert_close(jacobian, torch.stack(columns, 1), rtol=1e-5, atol=1e-7)


def test_seem_of_the_linear_one_is_seven_times_the_largest_eigenvalue():
    growth = torch.linalg.eigvals(linear_matrix()).real.max().item()
    assert baird.seem("linear", "gelu", start("linear"), 0.99) == pytest.approx(7 * growth, rel=1e-9)


@pytest.mark.parametrize("activation", ["gelu", "relu", "tanh", "elu"])
def test_lipschitz_constant_is_the_steepest_slope(activation):
    x = torch.linspace(-10, 10, 20001, dtype=torch.float64, requires_grad=True)
    getattr(torch.nn.functional, activation)(x).sum().backward()
    assert baird.lipschitz(activation) == pytest.approx(x.grad.abs().max().item(), rel=1e-6)


def test_eq_9_row_has_the_proofs_coefficients_and_can_leave_m_out():
    args = baird.Args(activation="tanh", eta=1.5, gamma=0.9)
    row = next(row for row in baird.table_rows(args) if "Eq. 9" in row.name)
    assert (row.l2_last_layer, row.l2_M) == pytest.approx((1.5 * 0.45**2, 0.5))
    row = next(row for row in baird.table_rows(replace(args, last_layer_only=True)) if "Eq. 9" in row.name)
    assert (row.l2_last_layer, row.l2_M) == pytest.approx((1.5 * 0.45**2, 0))


def test_l2_acts_on_the_layer_it_is_meant_for():
    args = replace(SMALL, updates=1, num_seeds=1, seed=0)
    rows = [baird.Row("w", "LayerNorm", 0.7, 0.0, True), baird.Row("M", "LayerNorm", 0.0, 0.7, True)]
    errors, _ = baird.run_network(args, "LayerNorm", rows, [0, 1])
    for i, part in enumerate((slice(0, 8), slice(8, None))):
        phi = start("LayerNorm")
        l2 = torch.zeros_like(phi)
        l2[part] = 0.7
        phi = phi + 0.01 * (baird.td_update("LayerNorm", "gelu", phi, 0.99)[1] - l2 * phi)
        expected = baird.values("LayerNorm", "gelu", phi).square().mean().sqrt()
        torch.testing.assert_close(errors[1, i, 0], expected, rtol=1e-12, atol=0)


def test_importance_weights_average_to_the_expected_update():
    states = torch.arange(7).repeat_interleave(7)
    next_states = torch.arange(7).repeat(7)  # under the behaviour policy all 49 pairs are equally likely
    weight = baird.sampled_weight(states, next_states)
    torch.testing.assert_close(weight.mean(0), torch.full((7,), 1 / 7))
    assert weight[next_states != 6].abs().max() == 0  # "dashed" is never taken by the target policy


def test_sampled_run_follows_its_own_transitions():
    args = replace(SMALL, sampled=True, updates=3)
    visited = torch.tensor([[2, 6, 4, 6, 0]])  # to state 7, away from it, to state 7 again
    phi = start("linear")
    errors, _ = baird.train(args, "linear", phi[None], torch.zeros(1, 8), visited, [0, 1, 2, 3])
    x, expected = baird.features(), []
    for state, solid in ((2, True), (6, False), (4, True), (0, False)):
        expected.append((x @ phi).square().mean().sqrt())
        if solid:
            phi = phi + 0.01 * 7 * (0.99 * x[6] @ phi - x[state] @ phi) * x[state]
    torch.testing.assert_close(errors[:, 0], torch.stack(expected))


# -- How runs end


def test_linear_diverges_when_the_powers_of_its_matrix_do():
    args = replace(SMALL, updates=10000)
    errors, at = baird.train(args, "linear", start("linear")[None], torch.zeros(1, 8), None, range(0, 10001, 100))
    step = torch.eye(8, dtype=torch.float64) + 0.01 * linear_matrix()
    phi, update = start("linear"), 0
    while (baird.features() @ phi).abs().max() < 1e12:
        phi, update = step @ phi, update + 1
    assert at.item() == update
    radius = torch.linalg.eigvals(step).abs().max().item()
    assert (errors[90] / errors[89]).item() ** 0.01 == pytest.approx(radius, rel=1e-6)


def test_smallest_stabilising_l2_of_the_linear_one_is_the_largest_eigenvalue():
    needed = torch.linalg.eigvals(linear_matrix()).real.max().item()
    args = replace(SMALL, updates=6000, step_size=0.1, num_seeds=1)
    rows = [baird.Row("", "linear", needed + margin, 0.0, False) for margin in (-0.02, 0.02)]
    errors, (less, more) = baird.run_network(args, "linear", rows, list(range(0, 6001, 100)))
    assert less["jacobian"] == pytest.approx(0.02) and more["jacobian"] == pytest.approx(-0.02)
    assert errors[-1, 0, 0] > 10 * errors[30, 0, 0] > 1
    assert more["converged"] == 1 and less["converged"] == 0


def test_running_seeds_together_changes_none_of_them():
    for sampled in (False, True):
        args = replace(SMALL, sampled=sampled)
        rows = [row for row in baird.table_rows(args) if row.network == "LayerNorm"]
        points = list(range(0, 201, 10))
        together, _ = baird.run_network(args, "LayerNorm", rows, points)
        for i in range(3):
            alone, _ = baird.run_network(replace(args, seed=1 + i, num_seeds=1), "LayerNorm", rows, points)
            torch.testing.assert_close(together[..., i], alone[..., 0], rtol=1e-9, atol=1e-12)
        assert not torch.equal(together[-1, 0, 0], together[-1, 0, 1])


def test_a_run_that_dips_below_the_tolerance_only_at_the_end_has_not_converged():
    args = replace(SMALL, tolerance=1.0, num_seeds=1)
    row = [baird.Row("", "LayerNorm", 0.0, 0.0, True)]
    points = list(range(101))
    for late, converged in ((95, 0), (80, 1)):
        errors = torch.full((101, 1), 2.0, dtype=torch.float64)
        errors[late:] = 0.5
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(baird, "train", lambda *_, e=errors: (e, torch.tensor([-1])))
            _, (result,) = baird.run_network(args, "LayerNorm", row, points)
        assert (result["converged"], result["bounded"]) == (converged, 1 - converged)


def test_wrong_predictions_are_counted_per_seed():
    rows = [baird.Row("", "linear", 0.0, 0.0, False), baird.Row("", "linear", 0.3, 0.0, False)]
    _, (short, regularised) = baird.run_network(replace(SMALL, updates=50), "linear", rows, [0, 50])
    assert (short["jacobian_wrong"], short["seem_wrong"]) == (3, 3)  # 50 updates are too few to diverge
    assert (regularised["jacobian_wrong"], regularised["seem_wrong"]) == (0, 3)  # SEEM knows nothing of l2


@pytest.mark.parametrize("sampled", [False, True])
def test_a_diverged_run_does_not_disturb_the_others(sampled):
    args = replace(SMALL, step_size=0.1, limit=14, sampled=sampled)
    phi = torch.stack([start("linear"), start("linear") * 1e-3, start("linear") * 1e-3])
    l2 = torch.tensor([0.0, 0.3, 0.5])[:, None].expand(3, 8)
    visited = torch.randint(7, (3, 202), generator=torch.Generator().manual_seed(0))
    together, at = baird.train(args, "linear", phi, l2, visited, range(0, 201))
    alone, _ = baird.train(args, "linear", phi[1:2], l2[1:2], visited[1:2], range(0, 201))
    assert 0 < at[0] < 150 and at[1] == -1
    torch.testing.assert_close(together[:, 1], alone[:, 0])
    assert (together[at[0] :, 0] == 14).all()


# -- The script


def test_overflow_is_an_outcome_and_leaves_no_nan_in_a_file(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("error", UserWarning)
        baird.main(replace(SMALL, step_size=1e200, out="over/flow"))
    output = capsys.readouterr()
    assert "diverged at update 1" in output.out and output.err == ""
    for name in ("over/flow_table.csv", "over/flow_curves.csv"):
        assert "nan" not in Path(name).read_text() and "inf" not in Path(name).read_text()


def test_files_parse_and_the_same_command_gives_the_same_bytes():
    for name in ("a", "b"):
        baird.main(replace(SMALL, out=f"{name}/x", updates=60))
    for file in ("x_table.csv", "x_curves.csv"):
        assert Path("a", file).read_bytes() == Path("b", file).read_bytes()
    table, curves = read("a/x_table.csv"), read("a/x_curves.csv")
    assert len(table) == 3 + 3 + 1 + 3 * 2 and {row["name"] for row in curves} == {
        row["name"] for row in table if row["swept"] == "False"
    }
    for row in table:
        assert int(row["diverged"]) + int(row["bounded"]) + int(row["converged"]) == 3
        assert (row["jacobian"] == "") == (row["swept"] == "True")
    for row in curves:
        assert 0 < float(row["low"]) <= float(row["mean"]) * (1 + 1e-12) <= float(row["high"]) * (1 + 1e-9)
    assert Path("a/x.png").read_bytes()[:4] == b"\x89PNG"
    (folder, *_) = Path("runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = events.Scalars("value_error/LayerNorm + Eq. 9")
    assert [scalar.step for scalar in scalars][:: len(scalars) - 1][0] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"num_seeds": 0},
        {"updates": 0},
        {"seed": -1},
        {"width": 1},
        {"width": 1000},
        {"gamma": 1.01},
        {"gamma": math.nan},
        {"step_size": math.inf},
        {"step_size": 0.0},
        {"l2": (0.1, -0.1)},
        {"l2": (math.nan,)},
        {"eta": math.inf},
        {"eta": -1.0},
        {"sweep": (0.0, 1.0, 3)},
        {"sweep": (1.0, 0.5, 3)},
        {"sweep": (0.1, 1.0, -1)},
        {"tolerance": 1e-12},
        {"limit": 1e200},
        {"out": "/proc/nowhere/x"},
        {"out": "folder/"},
        {"out": "a_file/x"},
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_nothing_is_written(change, capsys):
    Path("a_file").write_text("")
    with pytest.raises(SystemExit) as end:
        baird.main(replace(SMALL, **change))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("baird.py: error: ") and error.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["a_file"]


def test_unknown_activation_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        tyro.cli(baird.Args, args=["--activation", "nonsense"])
    assert end.value.code == 2 and "nonsense" in capsys.readouterr().err


def test_as_a_user_runs_it():
    command = [sys.executable, ROOT / "baird.py", "--updates", "5", "--num-seeds", "1", "--width", "4"]
    run = subprocess.run([*command, "--l2", "0.01", "0.25"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == "" and "LayerNorm + l2 0.25" in run.stdout
    (folder,) = Path("runs").glob("Baird__baird__1__*")
    assert {"baird.png", "baird_table.csv", "baird_curves.csv"} <= {path.name for path in folder.iterdir()}
