"""baird.py: updates, Jacobians and predictions against slow literal versions, endings against matrices, the files."""

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

import baird

ROOT = Path(__file__).parents[1]
SMALL = baird.Args(num_seeds=3, updates=60, width=8, sweep=(0.01, 1.0, 2), probes=(0, 20))
NETWORKS = ("linear", "MLP", "LayerNorm")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_figure(monkeypatch):
    """The figure is drawn where the script is run as a user runs it: that is often enough."""
    monkeypatch.setattr(baird, "draw", lambda *_: None)


def start(network, width=8, seed=0):
    return baird.initial_weights(network, width, 1.0, torch.Generator().manual_seed(seed))


def linear_matrix(gamma=0.99):
    """A with E[update] = A φ, from the MDP's definition: Xᵀ D (γP − I) X."""
    x = torch.zeros(7, 8, dtype=torch.float64)
    for state in range(6):
        x[state, state], x[state, 7] = 2, 1
    x[6, 6], x[6, 7] = 1, 2
    to_state_7 = torch.zeros(7, 7, dtype=torch.float64)
    to_state_7[:, 6] = 1
    return x.T @ (gamma * to_state_7 - torch.eye(7, dtype=torch.float64)) @ x / 7


def differences(function, phi, h=1e-6):
    """Central differences of a function of φ (P,) in every entry: (..., P)."""
    steps = h * torch.eye(len(phi), dtype=torch.float64)
    return torch.stack([(function(phi + step) - function(phi - step)) / (2 * h) for step in steps], -1)


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# -- The problem, the approximators and the update


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


def test_initial_weights_are_as_described_and_only_m_is_scaled():
    width = 4096
    for network, of_w in (("LayerNorm", 1), ("MLP", width**-0.5)):
        plain, scaled = (
            baird.initial_weights(network, width, s, torch.Generator().manual_seed(0)) for s in (1.0, 10.0)
        )
        assert plain[:width].std().item() == pytest.approx(of_w, rel=0.05)
        assert plain[width:].std().item() == pytest.approx(8**-0.5, rel=0.05)
        assert torch.equal(scaled[:width], plain[:width]) and torch.equal(scaled[width:], 10 * plain[width:])


@pytest.mark.parametrize("network", NETWORKS)
def test_update_is_the_semi_gradient_by_finite_differences(network):
    phi = start(network)
    v = baird.values(network, "gelu", phi)
    td = 0.99 * v[6] - v  # no gradient through the target
    expected = (td.unsqueeze(-1) * differences(lambda phi: baird.values(network, "gelu", phi), phi)).mean(0)
    torch.testing.assert_close(baird.td_update(network, "gelu", phi, 0.99)[1], expected, rtol=1e-6, atol=1e-8)


def test_importance_weights_average_to_the_expected_update():
    states = torch.arange(7).repeat_interleave(7)
    next_states = torch.arange(7).repeat(7)  # under the behaviour policy all 49 pairs are equally likely
    weight = baird.sampled_weight(states, next_states)
    torch.testing.assert_close(weight.mean(0), torch.full((7,), 1 / 7))
    assert weight[next_states != 6].abs().max() == 0  # "dashed" is never taken by the target policy


# -- The predictions


@pytest.mark.parametrize("network", NETWORKS)
def test_jacobian_is_that_of_the_regularised_update_by_finite_differences(network):
    phi = start(network)
    l2 = torch.linspace(0, 1, len(phi), dtype=torch.float64)
    expected = differences(lambda phi: baird.td_update(network, "gelu", phi, 0.99)[1] - l2 * phi, phi)
    jacobian = baird.jacobian(network, "gelu", phi, 0.99, l2)
    torch.testing.assert_close(jacobian, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("network", NETWORKS)
def test_seem_is_the_largest_eigenvalue_of_the_kernels_difference(network):
    phis = torch.stack([start(network, seed=0), start(network, seed=1)])
    found = baird.seem(network, "gelu", phis, 0.9)
    for phi, seem in zip(phis, found, strict=True):
        gradients = differences(lambda phi: baird.values(network, "gelu", phi), phi)
        a = torch.zeros(7, 7, dtype=torch.float64)
        for i in range(7):
            for j in range(7):
                a[i, j] = 0.9 * gradients[6] @ gradients[j] - gradients[i] @ gradients[j]
        assert seem.item() == pytest.approx(torch.linalg.eigvals(a).real.max().item(), rel=1e-6)


def test_largest_takes_the_real_part_and_gives_nan_for_a_matrix_that_is_not_finite():
    rotation = torch.tensor([[0.5, 3.0], [-3.0, 0.5]], dtype=torch.float64)  # eigenvalues 0.5 ± 3i
    found = baird.largest(torch.linalg.eigvals, torch.stack([rotation, rotation * math.inf, -rotation]))
    assert found[0] == pytest.approx(0.5) and found[1].isnan() and found[2] == pytest.approx(-0.5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.88, 0.8825, 0.95, 0.99, 1.0])
def test_linear_threshold_is_the_largest_eigenvalue_in_closed_form(gamma):
    growth = torch.linalg.eigvals(linear_matrix(gamma)).real
    growth = growth[growth.abs() > 1e-9].max().item()  # the eighth weight vector that changes no value has 0
    assert baird.linear_threshold(gamma) == pytest.approx(growth, rel=1e-6)
    assert (baird.linear_threshold(gamma) > 0) == (gamma > 15 / 17)
    assert baird.linear_threshold(0.99) == pytest.approx(0.23925, abs=5e-6)


def test_predictions_are_of_the_running_seeds_and_wrong_where_they_end_otherwise():
    phi = torch.stack([start("LayerNorm", seed=seed) for seed in range(4)])
    phi[1] = math.nan  # has diverged already
    l2 = torch.full_like(phi[0], 0.05)
    diverged_at = torch.tensor([-1, 7, 9, -1])
    line = baird.predict(SMALL, baird.Row("x", "LayerNorm", 0.05, 0.05), l2, phi, diverged_at, 8)
    assert (line["name"], line["update"], line["running"]) == ("x", 8, 3)
    js = [baird.jacobian("LayerNorm", "gelu", phi[i], 0.99, l2) for i in (0, 2, 3)]
    for name, values in (
        ("SEEM", [baird.seem("LayerNorm", "gelu", phi[i : i + 1], 0.99).item() for i in (0, 2, 3)]),
        ("Jacobian", [torch.linalg.eigvals(j).real.max().item() for j in js]),
        ("criterion", [torch.linalg.eigvalsh(j + j.T).max().item() / 2 for j in js]),
    ):
        assert line[f"{name} > 0"] == sum(value > 0 for value in values)
        assert line[f"{name} wrong"] == sum(
            (value > 0) != diverges for value, diverges in zip(values, (0, 1, 0), strict=True)
        )
        assert line[f"{name}_median"] == pytest.approx(sorted(values)[1], abs=1e-12)
        assert line[f"{name}_high"] == pytest.approx(max(values)) and line[f"{name}_low"] == pytest.approx(min(values))


def test_directions_that_change_no_value_are_not_counted_as_growth():
    phi = torch.zeros(1, 8, dtype=torch.float64)
    line = baird.predict(replace(SMALL, gamma=0.5), baird.Row("", "linear", 0, 0), phi[0], phi, torch.tensor([-1]), 0)
    assert (line["SEEM > 0"], line["Jacobian > 0"], line["Jacobian wrong"]) == (0, 0, 0)


def test_median_of_an_even_number_is_the_lower_middle_one():
    found = baird.spread("x", torch.tensor([9.0, 1.0, 2.0, math.nan, 9.0]))
    assert found == {"x_median": 2, "x_low": 1, "x_high": 9}
    assert set(baird.spread("x", torch.tensor([math.nan])).values()) == {""}


# -- The rows and their ℓ²


@pytest.mark.parametrize("activation", ["gelu", "relu", "tanh", "elu"])
def test_lipschitz_constant_is_the_steepest_slope(activation):
    x = torch.linspace(-10, 10, 20001, dtype=torch.float64, requires_grad=True)
    getattr(torch.nn.functional, activation)(x).sum().backward()
    assert baird.lipschitz(activation) == pytest.approx(x.grad.abs().max().item(), rel=1e-6)


def test_rows_are_those_asked_for_and_eq_9_has_the_proofs_coefficients():
    args = replace(SMALL, activation="tanh", eta=1.5, gamma=0.9, l2=(0.3,), sweep=(0.01, 1.0, 3))
    w = 1.5 * 0.45**2
    expected = [(0, 0, False), (0.3, 0, False), (w, 0, False), (w, 0.5, False)]
    expected += [(l2, 0, True) for l2 in (0.01, 0.1, 1)]
    rows = [row[2:] for row in baird.table_rows(args, "LayerNorm")]
    assert rows == [pytest.approx(row) for row in expected]
    assert [row.l2_w for row in baird.table_rows(args, "MLP")] == pytest.approx([0, 0.3, 0.01, 0.1, 1])


def test_l2_acts_on_the_layer_it_is_meant_for():
    args = replace(SMALL, updates=1, num_seeds=1, seed=0)
    rows = [baird.Row("w", "LayerNorm", 0.7, 0.0), baird.Row("M", "LayerNorm", 0.0, 0.7)]
    path, _, l2 = baird.run_network(args, "LayerNorm", rows, [0, 1])
    for i, part in enumerate((slice(0, 8), slice(8, None))):
        phi = start("LayerNorm")
        expected = torch.zeros_like(phi)
        expected[part] = 0.7
        assert torch.equal(l2[i], expected)
        phi = phi + 0.01 * (baird.td_update("LayerNorm", "gelu", phi, 0.99)[1] - expected * phi)
        torch.testing.assert_close(path[1, i, 0], phi, rtol=1e-12, atol=0)


# -- How runs end


def test_linear_diverges_when_the_powers_of_its_matrix_do():
    args = replace(SMALL, updates=1000, step_size=0.1)
    path, at = baird.train(args, "linear", start("linear")[None], torch.zeros(1, 8), None, [0, 500, 900, 1000])
    step = torch.eye(8, dtype=torch.float64) + 0.1 * linear_matrix()
    phi, update = start("linear"), 0
    while (baird.features() @ phi).abs().max() < 1e12:
        phi, update = step @ phi, update + 1
        if update == 500:
            torch.testing.assert_close(path[1, 0], phi, rtol=1e-9, atol=0)
    assert at.item() == update and 900 < update < 1000
    assert path[2].isfinite().all() and path[3].isnan().all()


def test_sampled_run_follows_its_own_transitions():
    args = replace(SMALL, sampled=True, updates=3)
    visited = torch.tensor([[2, 6, 4, 6, 0]])  # to state 7, away from it, to state 7 again
    phi = start("linear")
    path, _ = baird.train(args, "linear", phi[None], torch.zeros(1, 8), visited, [0, 1, 2, 3])
    x = baird.features()
    for point, (state, solid) in enumerate(((2, True), (6, False), (4, True), (0, False))):
        torch.testing.assert_close(path[point, 0], phi)
        if solid:
            phi = phi + 0.01 * 7 * (0.99 * x[6] @ phi - x[state] @ phi) * x[state]


@pytest.mark.parametrize("sampled", [False, True])
def test_running_seeds_together_changes_none_of_them(sampled):
    args = replace(SMALL, sampled=sampled, updates=30)
    rows = baird.table_rows(args, "LayerNorm")
    together, _, _ = baird.run_network(args, "LayerNorm", rows, [0, 30])
    for i in range(3):
        alone, _, _ = baird.run_network(replace(args, seed=1 + i, num_seeds=1), "LayerNorm", rows, [0, 30])
        torch.testing.assert_close(together[:, :, i], alone[:, :, 0], rtol=1e-9, atol=1e-12)
    assert not torch.equal(together[-1, 0, 0], together[-1, 0, 1])


def test_the_linear_approximator_is_one_run_unless_its_transitions_differ():
    for sampled, seeds in ((False, 1), (True, 3)):
        args = replace(SMALL, sampled=sampled, updates=5)
        path, diverged_at, _ = baird.run_network(args, "linear", [baird.Row("", "linear", 0, 0)], [0, 5])
        assert path.shape == (2, 1, seeds, 8) and diverged_at.shape == (1, seeds)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_run_that_is_over_does_not_disturb_the_others(sampled, monkeypatch):
    monkeypatch.setattr(baird, "LIMIT", 14)
    args = replace(SMALL, step_size=0.1, sampled=sampled, updates=200)
    # One that diverges, one that goes on, one that starts at its end, one more that goes on
    phi = torch.stack([start("linear") * scale for scale in (1, 1e-3, 1e-12, 1e-3)])
    l2 = torch.tensor([0.0, 0.3, 0.3, 0.5])[:, None].expand(4, 8)
    visited = torch.randint(7, (4, 202), generator=torch.Generator().manual_seed(0))
    points = list(range(201))
    together, at = baird.train(args, "linear", phi, l2, visited, points)
    for i in (1, 3):
        alone, _ = baird.train(args, "linear", phi[i : i + 1], l2[i : i + 1], visited[i : i + 1], points)
        torch.testing.assert_close(together[:, i], alone[:, 0])
    assert 0 < at[0] < 150 and at[1:].tolist() == [-1, -1, -1]
    assert together[: at[0], 0].isfinite().all() and together[at[0] :, 0].isnan().all()
    assert torch.equal(together[-1, 2], phi[2])  # as it was when it ended


def test_a_batch_whose_runs_are_all_over_fills_the_remaining_points():
    path, at = baird.train(
        replace(SMALL, step_size=1e9, updates=50), "linear", start("linear")[None], torch.zeros(1, 8), None, [0, 10, 50]
    )
    assert path.shape == (3, 1, 8) and path[1:].isnan().all() and 0 < at.item() < 10


def test_value_error_is_the_root_mean_square_within_floor_and_limit():
    x = torch.stack([start("linear"), start("linear") * 1e-12, start("linear") * math.nan])
    expected = math.sqrt(sum(float(baird.features()[s] @ x[0]) ** 2 for s in range(7)) / 7)
    assert baird.value_errors(SMALL, "linear", x).tolist() == pytest.approx([expected, 1e-9, 1e12])


def test_a_run_that_dips_below_the_tolerance_only_at_the_end_has_not_converged():
    points = list(range(101))
    for late, converged in ((95, 0), (91, 0), (90, 1), (80, 1)):
        errors = torch.full((101, 1), 2.0, dtype=torch.float64)
        errors[late:] = 0.005
        row = baird.Row("", "LayerNorm", 0.0, 0.0)
        seems = torch.full_like(errors, math.nan)
        result = baird.outcome(replace(SMALL, updates=100), row, errors, seems, torch.tensor([-1]), points)
        assert (result["converged"], result["bounded"]) == (converged, 1 - converged)
        assert result["largest_error"] == 2 and result["error_median"] == pytest.approx(0.005)


def test_ending_in_words_and_numbers():
    errors = torch.tensor([[1.0, 1e12, 1e12, 1e-3]], dtype=torch.float64).expand(2, 4)
    at = torch.tensor([-1, 1234, 50, -1])
    result = baird.outcome(SMALL, baird.Row("", "MLP", 0.0, 0.0), errors, errors, at, [0, 60])
    assert result["ended"] == "2 diverged at update 50 to 1,234, 1 bounded, 1 converged"
    assert [result[name] for name in ("seeds", "diverged", "bounded", "converged")] == [4, 2, 1, 1]


def test_late_seem_is_of_the_second_half_and_counts_a_seed_once():
    seems = torch.tensor([[1, 1, -1], [1, 1, -1], [1, -1, -1], [1, -1, 1e-7]], dtype=torch.float64)
    for points, seeds in (([0, 20, 30, 60], 1), ([0, 31, 32, 60], 2)):
        row = baird.Row("", "MLP", 0.0, 0.0)
        assert baird.outcome(SMALL, row, seems, seems, torch.tensor([-1] * 3), points)["SEEM > 0 late"] == seeds


def test_threshold_of_a_sweep_is_where_it_holds_from_there_on():
    rows = [
        {"l2_w": l2, "seeds": 2, "diverged": diverged, "converged": converged}
        for l2, diverged, converged in ((0.1, 0, 2), (0.2, 1, 1), (0.3, 0, 1), (0.4, 0, 2))
    ]
    assert baird.from_which_on(rows, "diverged") == "from l2 0.3 on"
    assert baird.from_which_on(rows, "converged") == "from l2 0.4 on"
    assert baird.from_which_on(rows[:2], "diverged") == "nowhere in the sweep"


# -- The script


def test_overflow_is_an_outcome_and_leaves_no_nan_in_a_file(capsys, no_figure):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("error", UserWarning)
        baird.main(replace(SMALL, step_size=1e200, updates=20, out="over/flow"))
    output = capsys.readouterr()
    assert "diverged at update 1" in output.out and output.err == ""
    for name in ("over/flow.csv", "over/flow_predictions.csv"):
        assert "nan" not in Path(name).read_text() and "inf" not in Path(name).read_text()


def test_files_hold_what_was_measured_and_the_same_command_gives_the_same_bytes(no_figure, capsys):
    for name in ("a", "b"):
        baird.main(replace(SMALL, out=f"{name}/x", probes=(0, 20, 10**6)))
    for file in ("x.csv", "x_predictions.csv"):
        assert Path("a", file).read_bytes() == Path("b", file).read_bytes()
    table, predictions = read("a/x.csv"), read("a/x_predictions.csv")
    assert len(table) == 2 + 2 + 4 + 3 * 2
    for row in table:
        total = int(row["diverged"]) + int(row["bounded"]) + int(row["converged"])
        assert total == int(row["seeds"]) == (1 if row["network"] == "linear" else 3)
    assert [line["update"] for line in predictions] == ["0", "20", "60"] * 8
    # One line of each file again, by hand
    row = baird.Row("LayerNorm + Eq. 9", "LayerNorm", 1.1 * (0.99 * 1.1289 / 2) ** 2, 0.1)
    path, _, l2 = baird.run_network(SMALL, "LayerNorm", [row], list(range(61)))
    line = next(line for line in predictions if line["name"] == row.name and line["update"] == "20")
    criterion = [baird.jacobian("LayerNorm", "gelu", phi, 0.99, l2[0]) for phi in path[20, 0]]
    criterion = sorted(torch.linalg.eigvalsh(j + j.T).max().item() / 2 for j in criterion)
    assert float(line["criterion_median"]) == pytest.approx(criterion[1], rel=1e-3)
    late = [(baird.seem("LayerNorm", "gelu", phi, 0.99) > 1e-6).tolist() for phi in path[30:, 0]]
    (row,) = [row for row in table if row["name"] == "LayerNorm + Eq. 9"]
    assert int(row["SEEM > 0 late"]) == sum(map(any, zip(*late, strict=True)))
    end = baird.values("LayerNorm", "gelu", path[60, 0]).square().mean(-1).sqrt()
    assert float(row["error_low"]) == pytest.approx(end.min().item(), rel=1e-3)


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
        {"m_scale": 0.0},
        {"m_scale": 1e160},
        {"l2": (0.1, -0.1)},
        {"l2": (math.nan,)},
        {"eta": math.inf},
        {"eta": 0.5},
        {"sweep": (0.0, 1.0, 3)},
        {"sweep": (1.0, 0.5, 3)},
        {"sweep": (0.1, 1.0, -1)},
        {"sweep": (0.1, math.nan, 2)},
        {"probes": (0, -1)},
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
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert next(iter(change)).replace("_", "-") in error or "cannot write" in error
    assert [path.name for path in Path().iterdir()] == ["a_file"]


def test_unknown_activation_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        tyro.cli(baird.Args, args=["--activation", "nonsense"])
    assert end.value.code == 2 and "nonsense" in capsys.readouterr().err


def test_as_a_user_runs_it():
    command = [sys.executable, ROOT / "baird.py", "--updates", "3", "--num-seeds", "1", "--width", "4"]
    run = subprocess.run([*command, "--l2", "0.25", "--probes", "0"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == "" and "LayerNorm + l2 0.25" in run.stdout
    (folder,) = Path("runs").glob("Baird__baird__1__*")
    assert {path.name for path in folder.iterdir()} == {"baird.png", "baird.csv", "baird_predictions.csv"}
    assert (folder / "baird.png").read_bytes()[:4] == b"\x89PNG"
