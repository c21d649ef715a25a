"""td_stability.py: every measurement against finite differences or against the full matrices of a small network."""

import csv
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro
from torch.func import jacfwd, jacrev, vmap

import td_stability as td

ROOT = Path(__file__).parents[1]
SMALL = td.Args(num_networks=2, widths=(4, 8), etas=(1.1, 4.0), lanczos_steps=100)
WIDTH, BATCH, GAMMA = 8, 3, 0.99


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=["Baird", "random MDPs"])
def problem(request):
    if request.param == "Baird":
        return td.baird(BATCH)
    return td.random_mdps(BATCH, 10, 8, torch.Generator().manual_seed(0))


@pytest.fixture
def phi():
    return td.random_networks(BATCH, WIDTH, 8, False, 1.0, torch.Generator().manual_seed(1))


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def differences(function, x, h=1e-6):
    """Central differences of function in every entry of x (P,): (..., P)."""
    columns = []
    for i in range(len(x)):
        step = torch.zeros_like(x)
        step[i] = h
        columns.append((function(x + step) - function(x - step)) / (2 * h))
    return torch.stack(columns, -1)


def hessians(phi, problem):
    return vmap(jacfwd(jacrev(lambda phi, x: td.q_values("tanh", phi, x))))(phi, problem.x)


def one(problem, i):
    return td.Problem(*(tensor[i] for tensor in problem))


# -- Problems and networks


def test_probabilities_sum_to_one(problem):
    torch.testing.assert_close(problem.transition.sum(-1), torch.ones(problem.x.shape[:2], dtype=torch.float64))
    torch.testing.assert_close(problem.weight.sum(-1), torch.ones(BATCH, dtype=torch.float64))
    assert (problem.transition >= 0).all() and (problem.weight > 0).all()


def test_random_weights_have_the_norms_the_theory_asks_for():
    for large_w, norm in ((False, 1.0), (True, 4.0)):
        phi = td.random_networks(BATCH, 16, 8, large_w, 0.5, torch.Generator())
        torch.testing.assert_close(phi[:, :16].norm(dim=-1), torch.full((BATCH,), norm, dtype=torch.float64))
        rows = phi[:, 16:].unflatten(-1, (16, 8)).norm(dim=-1)
        torch.testing.assert_close(rows, torch.full_like(rows, 0.5))


def test_layer_norm_never_exceeds_norm_one_and_has_the_derivative_of_eq_18():
    spike = torch.zeros(1, WIDTH, dtype=torch.float64)
    spike[0, 0] = 1e6
    for f in (randn(50, WIDTH), spike, torch.ones(1, WIDTH, dtype=torch.float64)):
        assert (td.layer_norm(f).norm(dim=-1) <= 1).all()
    f = randn(WIDTH)
    deviation = ((f - f.mean()).square().mean() + 1e-6).sqrt()
    normed = (f - f.mean()) / deviation / WIDTH**0.5
    torch.testing.assert_close(td.layer_norm(f), normed)
    expected = torch.eye(WIDTH, dtype=torch.float64) - 1 / WIDTH - torch.outer(normed, normed)
    torch.testing.assert_close(differences(td.layer_norm, f), expected / (WIDTH**0.5 * deviation), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_derivatives_of_proposition_1_are_sorted_by_coinciding_indices(seed):
    found = td.proposition_1(WIDTH, 1, torch.Generator().manual_seed(seed))
    f = 2 * torch.rand(WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1
    first = differences(lambda f: td.layer_norm(f)[0], f).abs()
    second = differences(lambda f: differences(lambda f: td.layer_norm(f)[0], f, 1e-4), f, 1e-4).abs()
    two = [second[s, t] for s in range(WIDTH) for t in range(WIDTH) if s == t or s == 0 or t == 0]
    three = [second[s, t] for s in range(1, WIDTH) for t in range(1, WIDTH) if s != t]
    assert found["first derivative, i = j"].item() == pytest.approx(first[0].item(), rel=1e-5)
    assert found["first derivative, i != j"].item() == pytest.approx(first[1:].max().item(), rel=1e-5)
    assert found["second derivative, two indices equal"].item() == pytest.approx(max(two).item(), rel=1e-4)
    assert found["second derivative, all different"].item() == pytest.approx(max(three).item(), rel=1e-4)


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_lipschitz_constant_is_the_steepest_slope(activation):
    x = torch.linspace(-10, 10, 20001, dtype=torch.float64, requires_grad=True)
    getattr(torch.nn.functional, activation)(x).sum().backward()
    assert td.lipschitz(activation) == pytest.approx(x.grad.abs().max().item(), rel=1e-6)


# -- Eq. 2 to 4


def test_gradients_by_finite_differences(phi, problem):
    g = td.gradients("tanh", phi, problem)
    expected = differences(lambda phi: td.q_values("tanh", phi, problem.x[1]), phi[1])
    torch.testing.assert_close(g[1], expected, rtol=1e-6, atol=1e-9)


def test_update_is_the_mean_of_eq_2(phi, problem):
    g, q = td.gradients("tanh", phi, problem), td.q_values("tanh", phi, problem.x)
    expected = torch.zeros_like(phi)
    for b in range(BATCH):
        for x in range(problem.x.shape[1]):
            target = problem.reward[b, x] + GAMMA * sum(problem.transition[b, x] * q[b])
            expected[b] += problem.weight[b, x] * (target - q[b, x]) * g[b, x]
    torch.testing.assert_close(td.expected_update("tanh", phi, problem, GAMMA), expected)


def test_jacobian_by_finite_differences_and_it_is_the_sum_of_its_parts(phi, problem):
    jacobian, off_policy, nonlinear = td.jacobian_split("tanh", phi, problem, GAMMA)
    expected = differences(lambda phi: td.expected_update("tanh", phi, one(problem, 1), GAMMA), phi[1])
    torch.testing.assert_close(jacobian[1], expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(jacobian, off_policy + nonlinear, rtol=1e-10, atol=1e-12)
    assert off_policy.abs().max() > 1e-3 and nonlinear.abs().max() > 1e-4


def test_coupling_is_the_form_of_eq_3(phi, problem):
    g, v = td.gradients("tanh", phi, problem), randn(BATCH, phi.shape[1])
    slopes = (g @ v.unsqueeze(-1)).squeeze(-1)
    expected = torch.zeros(BATCH, dtype=torch.float64)
    for x in range(problem.x.shape[1]):
        ahead = (problem.transition[:, x] * slopes).sum(-1)
        expected += problem.weight[:, x] * (GAMMA * ahead * slopes[:, x] - slopes[:, x] ** 2)
    c = td.coupling(problem, GAMMA)
    torch.testing.assert_close((slopes * (c @ slopes.unsqueeze(-1)).squeeze(-1)).sum(-1), expected)
    off_policy = td.jacobian_split("tanh", phi, problem, GAMMA)[1]
    torch.testing.assert_close(torch.einsum("bp,bpq,bq->b", v, off_policy, v), expected)


def test_hessian_product_by_finite_differences(phi, problem):
    v = randn(BATCH, phi.shape[1])
    product = td.weighted_hessian("tanh", phi, problem, 0.7)(v)

    def gradient(phi):
        return 0.7 * torch.einsum("bn,bnp->bp", problem.weight, td.gradients("tanh", phi, problem))

    torch.testing.assert_close(
        product, (gradient(phi + 1e-6 * v) - gradient(phi - 1e-6 * v)) / 2e-6, rtol=1e-6, atol=1e-9
    )


# -- Lemma 2 and Theorem 2 against the full matrices


def test_off_policy_parts_are_those_of_the_full_matrix(phi, problem):
    found = td.lemma_2_off_policy("tanh", phi, problem, GAMMA)
    off_policy = td.jacobian_split("tanh", phi, problem, GAMMA)[1]
    form = (off_policy + off_policy.mT) / 2
    w, m = slice(0, WIDTH), slice(WIDTH, None)
    top = torch.linalg.eigvalsh
    # The reduced matrices leave out directions where the form is 0.
    torch.testing.assert_close(found["v_w alone"].clamp(min=0), top(form[:, w, w])[:, -1].clamp(min=1e-12))
    torch.testing.assert_close(found["v_M alone"], top(form[:, m, m])[:, -1])
    torch.testing.assert_close(found["v_w with v_M"], torch.linalg.matrix_norm(form[:, w, m], ord=2))
    rows = torch.stack([top(form[:, i : i + 8, i : i + 8])[:, -1] for i in range(WIDTH, 9 * WIDTH, 8)])
    torch.testing.assert_close(found["v_M as in Eq. 20"], rows.amax(0))


def test_factor_of_v_m_is_the_smallest_that_makes_lemma_2_hold(phi, problem):
    factor = td.lemma_2_off_policy("tanh", phi, problem, GAMMA)["m"]
    off_policy = td.jacobian_split("tanh", phi, problem, GAMMA)[1]
    for scale, holds in ((0.99, False), (1.01, True)):
        bound = torch.cat(
            [torch.full((BATCH, WIDTH), (GAMMA / 2) ** 2), (scale * factor)[:, None].expand(-1, 8 * WIDTH)], 1
        )
        excess = torch.linalg.eigvalsh((off_policy + off_policy.mT) / 2 - torch.diag_embed(bound))[:, -1]
        assert ((excess < 1e-12) == holds).all()


def test_worst_direction_of_the_nonlinear_part_is_the_largest_eigenvalue(phi, problem):
    found = td.lemma_2_nonlinear("tanh", phi, problem, 2.0, randn(*phi.shape), 200)
    full = 2.0 * torch.einsum("bn,bnpq->bpq", problem.weight, hessians(phi, problem))
    torch.testing.assert_close(found["worst v"], torch.linalg.eigvalsh(full)[:, -1])
    v = randn(*phi.shape)
    expected = torch.einsum("bp,bpq,bq->b", v, full, v).abs() / v.square().sum(-1)
    torch.testing.assert_close(found["random v"], expected)


@pytest.mark.parametrize("eta", [1.1, 3.0])
def test_criterion_is_the_largest_eigenvalue_of_the_regularised_jacobian(phi, problem, eta):
    off_policy = td.jacobian_split("gelu", phi, problem, GAMMA)[1]
    hessian = vmap(jacfwd(jacrev(lambda phi, x: td.q_values("gelu", phi, x))))(phi, problem.x)
    jacobian = off_policy + 0.5 * torch.einsum("bn,bnpq->bpq", problem.weight, hessian)
    jacobian[:, range(WIDTH), range(WIDTH)] -= eta * (GAMMA * 1.1289 / 2) ** 2
    jacobian[:, range(WIDTH, 9 * WIDTH), range(WIDTH, 9 * WIDTH)] -= eta - 1
    expected = torch.linalg.eigvalsh((jacobian + jacobian.mT) / 2)[:, -1]
    found = td.theorem_2("gelu", phi, problem, GAMMA, 0.5, eta, randn(*phi.shape), 200)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_few_lanczos_steps_find_the_largest_eigenvalue_of_a_large_matrix():
    matrix = randn(2, 300, 300)
    matrix = matrix + matrix.mT
    found = td.largest_eigenvalue(lambda v: (matrix @ v.unsqueeze(-1)).squeeze(-1), randn(2, 300), 100)
    torch.testing.assert_close(found, torch.linalg.eigvalsh(matrix)[:, -1], rtol=1e-8, atol=1e-8)


def test_lemma_2_needs_a_bounded_w():
    generator = torch.Generator().manual_seed(0)
    powers = []
    for large_w in (False, True):
        values = []
        for width in (32, 64, 128, 256):
            phi = td.random_networks(5, width, 8, large_w, 1.0, generator)
            values.append(td.lemma_2_off_policy("tanh", phi, td.baird(5), GAMMA)["m"])
        powers.append(td.slope([8, 16, 32, 64, 32, 64, 128, 256], torch.stack([*values, *values])))
    assert powers[0] == pytest.approx(-1, abs=0.25) and powers[1] == pytest.approx(0, abs=0.25)


# -- The script


def test_slope_and_threshold_read_the_curves_right():
    widths = [8, 16, 32, 64]
    values = torch.tensor(widths, dtype=torch.float64).pow(-1.5)[:, None] * torch.tensor([1.0, 3.0])
    assert td.slope(widths, values) == pytest.approx(-1.5)
    assert math.isnan(td.slope(widths, -values)) and math.isnan(td.slope([8], values[:1]))
    holds = torch.tensor([[-1.0, -1.0], [-1.0, 0.1], [-1.0, -1.0], [-1.0, -0.1]])
    assert td.smallest_width(widths, holds) == 32  # 8 does not count: the criterion fails again at 16
    assert td.smallest_width(widths, -holds) is None and td.smallest_width(widths, -holds.abs()) == 8


def test_table_says_no_where_a_bound_fails():
    deviations = {"Baird": 1e-16, "random MDPs": 1.0}
    rows = [("Prop. 1", "", name, k, "", torch.tensor([2.0])) for name in ("norm", *PROPOSITION_1) for k in (4, 8)]
    for where in deviations:
        for name in LEMMA_2:
            rows += [("Lemma 2", where, name, k, "", torch.tensor([k**-0.6])) for k in (4, 8)]
        for eta in SMALL.etas:
            rows += [("", where, "largest eigenvalue", k, eta, torch.tensor([2.0 - eta])) for k in (4, 8)]
    args = replace(SMALL, widths=(4, 8, 16, 32))
    rows = [(*row[:3], k, *row[4:5], row[5] * (k / row[3]) ** -0.6) for row in rows for k in (row[3], 4 * row[3])]
    table = {row[0]: row[1:] for row in td.summarise(args, rows, deviations)}
    assert table["Prop. 1: norm"][1].endswith("NO")
    assert table["Eq. 3 + Eq. 4: relative difference from J"][1:3] == ["1e-16", "1e+00 NO"]
    assert table["Lemma 2: off-policy, v_M alone"][1].endswith("NO")
    assert table["Lemma 2: nonlinear, worst v"][1] == "k^-0.60"
    assert table["Theorem 2: eta = 4"][1] == "k >= 4" and table["Theorem 2: eta = 1.1"][1].endswith("NO")


PROPOSITION_1 = ["first derivative, i = j", "first derivative, i != j"]
PROPOSITION_1 += ["second derivative, two indices equal", "second derivative, all different"]
LEMMA_2 = [f"off-policy: {name}" for name in ("v_w alone", "m", "v_M alone", "v_M as in Eq. 20", "v_w with v_M")]
LEMMA_2 += ["nonlinear: worst v", "nonlinear: random v"]


def test_files_parse_and_the_same_command_gives_the_same_bytes(monkeypatch):
    td.main(replace(SMALL, out="a/x"))
    monkeypatch.setattr(td, "draw", lambda *_: None)  # once is enough
    td.main(replace(SMALL, out="b/x"))
    for file in ("x.csv", "x_table.csv"):
        assert Path("a", file).read_bytes() == Path("b", file).read_bytes()
    with open("a/x.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {int(row["k"]) for row in rows} == {4, 8}
    assert all(math.isfinite(float(row[column])) for row in rows for column in ("mean", "low", "high"))
    with open("a/x_table.csv", newline="") as file:
        assert len({len(row) for row in csv.reader(file)}) == 1
    assert Path("a/x.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "change",
    [
        {"num_networks": 0},
        {"widths": ()},
        {"widths": (2, 8)},
        {"widths": (16, 8)},
        {"widths": (8, 10**6)},
        {"etas": ()},
        {"etas": (1.0,)},
        {"etas": (math.nan,)},
        {"gamma": -0.1},
        {"gamma": math.nan},
        {"td_error": 0.0},
        {"td_error": math.inf},
        {"row_norm": 0.0},
        {"states": 1},
        {"states": 1000},
        {"features": 0},
        {"features": 1000},
        {"lanczos_steps": 1},
        {"seed": -1},
        {"out": "a_file/x"},
        {"out": "/proc/nowhere/x"},
        {"out": "folder/"},
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_nothing_is_written(change, capsys):
    Path("a_file").write_text("")
    with pytest.raises(SystemExit) as end:
        td.main(replace(SMALL, **change))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("td_stability.py: error: ") and error.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["a_file"]


def test_activation_that_is_not_smooth_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        tyro.cli(td.Args, args=["--activation", "relu"])
    assert end.value.code == 2 and "relu" in capsys.readouterr().err


def test_as_a_user_runs_it():
    command = [sys.executable, ROOT / "td_stability.py", "--widths", "4", "8", "--etas", "2", "--num-networks", "1"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == "" and "Theorem 2: eta = 2" in run.stdout
    (folder,) = Path("runs").glob("Baird__td_stability__1__*")
    assert {path.name for path in folder.iterdir()} == {f"td_stability{end}" for end in (".png", ".csv", "_table.csv")}
