"""td_stability.py: every measurement against finite differences or against the full matrices of a small network."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro
from torch.func import jacfwd, jacrev, vmap

import td_stability as td

SMALL = td.Args(num_networks=2, widths=(4, 8), etas=(1.1, 4.0))
WIDTH, BATCH, GAMMA = 8, 3, 0.99
BASE = td.Args(widths=(WIDTH,), gamma=GAMMA)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=["Baird", "random MDPs", "on-policy MDPs"])
def problem(request):
    if request.param == "Baird":
        return td.baird(BATCH)
    return td.random_mdps(BATCH, torch.Generator().manual_seed(0), "on" in request.param)


@pytest.fixture
def phi():
    return td.random_networks(BATCH, WIDTH, 8, 1.0, torch.Generator().manual_seed(1))


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def differences(function, x, h=1e-6):
    """Central differences of a function of x (P,) in every entry: (..., P)."""
    steps = h * torch.eye(len(x), dtype=torch.float64)
    return torch.stack([(function(x + step) - function(x - step)) / (2 * h) for step in steps], -1)


def off_policy_form(phi, problem, activation="tanh"):
    """Σ_x d(x) ∇Q(x) (γ Σ_x′ P(x′|x) ∇Q(x′) − ∇Q(x))ᵀ, symmetrised: (B, P, P)."""
    g = td.gradients(activation, phi, problem)
    form = torch.einsum("bn,bnp,bnq->bpq", problem.weight, g, GAMMA * problem.transition @ g - g)
    return (form + form.mT) / 2


def hessian_form(phi, problem, td_error, activation="tanh"):
    hessians = vmap(jacfwd(jacrev(lambda phi, x: td.q_values(activation, phi, x))))(phi, problem.x)
    return td_error * torch.einsum("bn,bnpq->bpq", problem.weight, hessians)


def largest(matrices):
    return torch.linalg.eigvalsh(matrices)[..., -1]


# -- Problems and networks


def test_probabilities_sum_to_one(problem):
    torch.testing.assert_close(problem.transition.sum(-1), torch.ones(problem.x.shape[:2], dtype=torch.float64))
    torch.testing.assert_close(problem.weight.sum(-1), torch.ones(BATCH, dtype=torch.float64))
    assert (problem.transition >= 0).all() and (problem.weight > 0).all()


def test_on_policy_weights_are_those_the_target_policy_keeps_and_the_others_are_not():
    for on_policy in (False, True):
        problem = td.random_mdps(BATCH, torch.Generator().manual_seed(0), on_policy)
        after = torch.einsum("bn,bnm->bm", problem.weight, problem.transition)
        assert torch.allclose(after, problem.weight, rtol=1e-10) == on_policy


def test_two_states_lead_to_the_rare_one_at_the_worst_angle():
    problem = td.rare_next_state(BATCH, 0.8, 1e-3)
    assert problem.transition[0].tolist() == [[0, 1], [0, 1]] and problem.weight[0].tolist() == [1 - 1e-3, 1e-3]
    torch.testing.assert_close(problem.x.norm(dim=-1), torch.ones(BATCH, 2, dtype=torch.float64))
    assert (problem.x[0, 0] @ problem.x[0, 1]).item() == pytest.approx(0.4)
    # There C of v_w alone comes close to its bound, whatever the width: LayerNorm^k keeps angles
    phi = td.random_networks(BATCH, 512, 2, 1.0, torch.Generator().manual_seed(0))
    found = td.lemma_2_off_policy(replace(BASE, gamma=0.8), phi, problem)
    assert (found["v_w alone"] > 0.98 * 0.16).all() and (found["v_w alone"] <= 0.16).all()


def test_random_weights_have_the_norms_the_theory_asks_for():
    for kind, norm in (({}, 1.0), ({"parallel": True}, 1.0), ({"large_w": True}, 4.0)):
        phi = td.random_networks(BATCH, 16, 8, 0.5, torch.Generator(), **kind)
        w, m = td.split(phi, torch.zeros(2, 8))
        torch.testing.assert_close(w.norm(dim=-1), torch.full((BATCH,), norm, dtype=torch.float64))
        rows = m.norm(dim=-1)
        torch.testing.assert_close(rows, torch.full_like(rows, 0.5))
        cosines = (m @ m.mT / 0.25)[:, 0, 1:]
        assert (cosines > 0.9).all() == ("parallel" in kind)


def test_network_is_eq_5_and_6_with_one_over_root_k(phi):
    x = randn(4, 8)
    for b in range(BATCH):
        w, m = phi[b, :WIDTH], phi[b, WIDTH:].reshape(WIDTH, 8)
        for state in range(4):
            f = [float(m[i] @ x[state]) for i in range(WIDTH)]
            mean = sum(f) / WIDTH
            deviation = math.sqrt(sum((value - mean) ** 2 for value in f) / WIDTH + 1e-6)
            expected = sum(float(w[i]) * math.tanh((f[i] - mean) / deviation / WIDTH**0.5) for i in range(WIDTH))
            assert td.q_values("tanh", phi[b], x)[state].item() == pytest.approx(expected, rel=1e-12)


def test_proposition_1_norm_and_derivatives_are_in_closed_form():
    """Eq. 18 and, by differentiating it once more, the second derivatives: each is a product of as many factors
    1/√k, 1/k or LayerNorm_i as Proposition 1 counts."""
    spike = torch.zeros(1, WIDTH, dtype=torch.float64)
    spike[0, 0] = 1e6
    for f in (randn(50, WIDTH), spike, torch.ones(1, WIDTH, dtype=torch.float64)):
        assert (td.layer_norm(f).norm(dim=-1) <= 1).all()
    f = randn(WIDTH)
    h, scale = td.layer_norm(f), 1 / (WIDTH**0.5 * td.deviation(f).item())
    first = scale * (torch.eye(WIDTH, dtype=torch.float64) - 1 / WIDTH - torch.outer(h, h))
    torch.testing.assert_close(differences(td.layer_norm, f), first, rtol=1e-6, atol=1e-9)
    assert torch.linalg.matrix_norm(first, ord=2) <= scale * (1 + 1e-12)  # what the bound on g is made of
    second = differences(lambda f: differences(td.layer_norm, f, 1e-4), f, 1e-4)
    expected = -scale * (
        torch.einsum("s,tj->jts", h, first) + torch.einsum("t,sj->jts", h, first) + torch.einsum("j,st->jts", h, first)
    )
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("activation", ["tanh", "gelu", "elu"])
def test_lipschitz_constant_is_the_steepest_slope(activation):
    x = torch.linspace(-10, 10, 20001, dtype=torch.float64, requires_grad=True)
    getattr(torch.nn.functional, activation)(x).sum().backward()
    slope = x.grad.abs().max().item()
    assert td.lipschitz(activation) == pytest.approx(slope, rel=1e-6)
    assert td.bound_w(replace(BASE, activation=activation, gamma=0.9)) == pytest.approx((0.45 * slope) ** 2, rel=1e-5)


# -- The two parts of the Jacobian


def test_gradients_by_finite_differences(phi, problem):
    g = td.gradients("tanh", phi, problem)
    expected = differences(lambda phi: td.q_values("tanh", phi, problem.x[1]), phi[1])
    torch.testing.assert_close(g[1], expected, rtol=1e-6, atol=1e-9)


def test_jacobian_is_the_sum_of_eq_3_and_eq_4(phi, problem):
    """By differentiating the update of Eq. 2, with the TD errors as they are."""
    b = 1
    reward, p, x, d = randn(problem.x.shape[1]), problem.transition[b], problem.x[b], problem.weight[b]

    def update(phi):
        q = td.q_values("tanh", phi, x)
        gradient = td.gradients("tanh", phi[None], td.Problem(x[None], p[None], d[None]))[0]
        return (d * (reward + GAMMA * p @ q - q)) @ gradient

    jacobian = differences(update, phi[b])
    g, q = td.gradients("tanh", phi, problem)[b], td.q_values("tanh", phi[b], x)
    one = td.Problem(x[None], p[None], d[None])
    nonlinear = td.nonlinear_part("tanh", phi[b : b + 1], one, reward + GAMMA * p @ q - q)
    for v in randn(3, phi.shape[1]):
        expected = (g @ v) @ td.coupling(problem, GAMMA)[b] @ (g @ v) + v @ nonlinear(v[None])[0]
        torch.testing.assert_close(v @ jacobian @ v, expected, rtol=1e-5, atol=1e-7)


def test_coupling_is_the_form_of_eq_3(phi, problem):
    g, v = td.gradients("tanh", phi, problem), randn(BATCH, phi.shape[1])
    slopes = (g @ v.unsqueeze(-1)).squeeze(-1)
    expected = torch.zeros(BATCH, dtype=torch.float64)
    for x in range(problem.x.shape[1]):
        ahead = (problem.transition[:, x] * slopes).sum(-1)
        expected += problem.weight[:, x] * (GAMMA * ahead * slopes[:, x] - slopes[:, x] ** 2)
    c = td.coupling(problem, GAMMA)
    torch.testing.assert_close(c, c.mT)
    torch.testing.assert_close((slopes * (c @ slopes.unsqueeze(-1)).squeeze(-1)).sum(-1), expected)


def test_nonlinear_part_by_finite_differences(phi, problem):
    v = randn(BATCH, phi.shape[1])
    product = td.nonlinear_part("tanh", phi, problem, 0.7)(v)

    def gradient(phi):
        return 0.7 * torch.einsum("bn,bnp->bp", problem.weight, td.gradients("tanh", phi, problem))

    expected = (gradient(phi + 1e-6 * v) - gradient(phi - 1e-6 * v)) / 2e-6
    torch.testing.assert_close(product, expected, rtol=1e-6, atol=1e-9)


def test_few_lanczos_steps_find_the_largest_eigenvalue_of_a_large_matrix():
    matrix = randn(2, 300, 300)
    matrix = matrix + matrix.mT
    found = td.top_by_products(lambda v: (matrix @ v.unsqueeze(-1)).squeeze(-1), randn(2, 300), 100)
    torch.testing.assert_close(found, largest(matrix), rtol=1e-8, atol=1e-8)


# -- Lemma 2 and Theorem 2 against the full matrices


def test_off_policy_parts_are_those_of_the_full_matrix(phi, problem):
    found, form = td.lemma_2_off_policy(BASE, phi, problem), off_policy_form(phi, problem)
    w, m = slice(0, WIDTH), slice(WIDTH, None)
    # The small matrices leave out directions in which the form is 0, or add some.
    torch.testing.assert_close(found["v_w alone"].clamp(min=0), largest(form[:, w, w]).clamp(min=0))
    torch.testing.assert_close(found["v_w with v_M"], torch.linalg.matrix_norm(form[:, w, m], ord=2))
    torch.testing.assert_close(found["C itself"], largest(td.coupling(problem, GAMMA)))


@pytest.mark.parametrize("kind", [{}, {"parallel": True}, {"large_w": True}])
def test_factor_of_eq_7_is_the_smallest_that_makes_it_hold(problem, kind):
    phi = td.random_networks(BATCH, WIDTH, 8, 1.0, torch.Generator().manual_seed(3), **kind)
    factor, form = td.lemma_2_off_policy(BASE, phi, problem)["factor of Eq. 7"], off_policy_form(phi, problem)
    for scale, holds in ((0.99, False), (1.01, True)):
        bound = torch.full((BATCH, 9 * WIDTH), (GAMMA / 2) ** 2, dtype=torch.float64)
        bound[:, WIDTH:] = scale * factor.clamp(min=0).unsqueeze(-1)
        fails = largest(form - torch.diag_embed(bound)) >= 1e-12
        assert (~fails).all() if holds else fails[factor > 1e-9].all()


def test_ratio_to_the_bound_is_the_worst_over_all_directions(phi, problem):
    """C(v) / (a + b)² in many directions never exceeds the ratio found, nor that 1."""
    args = replace(BASE, etas=tuple(1 + 2.0**i for i in range(-8, 9)))
    ratio = td.lemma_2_off_policy(args, phi, problem)["C / (a + b)^2"]
    form, g = off_policy_form(phi, problem), td.gradients("tanh", phi, problem)
    g = g[..., WIDTH:].norm(dim=-1).amax(-1)
    best = torch.full((BATCH,), -math.inf, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(form)
    for stretch in (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0):
        v = torch.cat([vectors.mT, randn(*vectors.shape)], 1)
        v[..., WIDTH:] *= stretch
        c = torch.einsum("bsp,bpq,bsq->bs", v, form, v)
        a, b = GAMMA / 2 * v[..., :WIDTH].norm(dim=-1), GAMMA / 2 * g[:, None] * v[..., WIDTH:].norm(dim=-1)
        best = torch.maximum(best, (c / (a + b) ** 2).amax(-1))
    assert (best <= ratio.clamp(min=0) + 1e-9).all() and (ratio <= 1).all()


def test_ratio_is_that_of_one_eta_by_the_full_matrix(phi, problem):
    args = replace(BASE, etas=(1.5,))
    g2 = td.gradients("tanh", phi, problem)[..., WIDTH:].square().sum(-1).amax(-1)
    scale = torch.full((BATCH, 9 * WIDTH), 1.5 * (GAMMA / 2) ** 2, dtype=torch.float64)
    scale[:, WIDTH:] = (3 * (GAMMA / 2) ** 2 * g2).unsqueeze(-1)
    form = off_policy_form(phi, problem) / (scale.unsqueeze(-1) * scale.unsqueeze(-2)).sqrt()
    found = td.lemma_2_off_policy(args, phi, problem)["C / (a + b)^2"]
    torch.testing.assert_close(found.clamp(min=0), largest(form).clamp(min=1e-12), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
@pytest.mark.parametrize("kind", [{}, {"parallel": True}, {"large_w": True}])
def test_bound_on_g_holds_and_is_as_in_the_docstring(problem, kind, activation):
    args = replace(BASE, activation=activation)
    phi = td.random_networks(BATCH, WIDTH, 8, 0.5, torch.Generator().manual_seed(3), **kind)
    g = td.gradients(activation, phi, problem)[..., WIDTH:].norm(dim=-1).amax(-1)
    bound = td.g_bound_squared(args, phi, problem).sqrt()
    assert (g <= bound).all()
    for b in range(BATCH):
        w, m = phi[b, :WIDTH], phi[b, WIDTH:].reshape(WIDTH, 8)
        expected = (
            max((x.norm() / ((m @ x).var(correction=0) + 1e-6).sqrt()).item() for x in problem.x[b])
            * td.lipschitz(activation)
            * w.norm().item()
            / WIDTH**0.5
        )
        assert bound[b].item() == pytest.approx(expected, rel=1e-9)


def test_at_the_width_of_the_formula_the_off_policy_part_is_negative_for_every_sampling(phi):
    """With g at the value that k′ stands for, η a² + (η − 1) ‖v_M‖² − (a + b)² is just not indefinite."""
    for eta in (1.1, 2.0, 4.0):
        needed = td.formula(BASE, phi, td.baird(BATCH), eta)
        g2 = td.g_bound_squared(BASE, phi, td.baird(BATCH)) * WIDTH
        for scale, negative in ((1.01, True), (0.99, False)):
            p = GAMMA / 2 * (g2 / (scale * needed)).sqrt()
            one = torch.ones_like(p)
            form = torch.stack([(1 - eta) * one, p, p, p**2 - (eta - 1)], -1).unflatten(-1, (2, 2))
            assert ((largest(form) < 0) == negative).all()


@pytest.mark.parametrize("activation, td_error", [("tanh", 1.0), ("gelu", 0.5)])
def test_criterion_is_the_largest_eigenvalue_of_the_regularised_jacobian(phi, problem, activation, td_error):
    args = replace(BASE, activation=activation, td_error=td_error, etas=(1.1, 3.0))
    found = td.theorem_2(args, phi, problem, randn(*phi.shape))
    nonlinear = hessian_form(phi, problem, td_error, activation)
    for i, eta in enumerate(args.etas):
        diagonal = torch.full((9 * WIDTH,), eta - 1, dtype=torch.float64)
        diagonal[:WIDTH] = eta * (GAMMA * td.lipschitz(activation) / 2) ** 2
        full = off_policy_form(phi, problem, activation) + nonlinear - torch.diag(diagonal)
        torch.testing.assert_close(found[i], largest(full), rtol=1e-4, atol=1e-5)


def test_worst_direction_of_the_nonlinear_part_is_the_largest_eigenvalue(phi, problem):
    found = td.top_by_products(td.nonlinear_part("tanh", phi, problem, 2.0), randn(*phi.shape))
    torch.testing.assert_close(found, largest(hessian_form(phi, problem, 2.0)), rtol=1e-5, atol=1e-6)


def test_on_policy_no_direction_grows():
    on, off = (td.random_mdps(20, torch.Generator().manual_seed(0), on_policy) for on_policy in (True, False))
    assert (largest(td.coupling(on, GAMMA)) < 0).all() and (largest(td.coupling(off, GAMMA)) > 0).all()


def test_eq_7_needs_a_bounded_w():
    generator, powers = torch.Generator().manual_seed(0), []
    widths = [8, 16, 32, 64]
    for large_w in (False, True):
        values = []
        for width in widths:
            phi = td.random_networks(5, 4 * width, 8, 1.0, generator, large_w)
            values.append(td.lemma_2_off_policy(BASE, phi, td.baird(5))["factor of Eq. 7"])
        powers.append(td.slope(widths, torch.stack(values)))
    assert powers[0] == pytest.approx(-1, abs=0.25) and powers[1] == pytest.approx(0, abs=0.25)


def test_constant_of_eq_7_grows_where_the_next_state_is_rare_and_the_other_bound_holds():
    phi = td.random_networks(5, 512, 2, 1.0, torch.Generator().manual_seed(0))
    found = [td.lemma_2_off_policy(BASE, phi, td.rare_next_state(5, GAMMA, d)) for d in (0.1, 0.01, 0.001)]
    medians = [values["factor of Eq. 7"].median().item() for values in found]
    assert medians[1] > 5 * medians[0] and medians[2] > 2 * medians[1]
    assert all((values["C / (a + b)^2"] <= 1).all() for values in found)


# -- The script


def test_slope_and_threshold_read_the_curves_right():
    widths = [8, 16, 32, 64]
    values = torch.tensor(widths, dtype=torch.float64).pow(-1.5)[:, None] * torch.tensor([1.0, 3.0])
    assert td.slope(widths, values) == pytest.approx(-1.5)
    assert math.isnan(td.slope(widths, -values)) and math.isnan(td.slope([8], values[:1]))
    holds = torch.tensor([[-1.0, -1.0], [-1.0, 0.1], [-1.0, -1.0], [-1.0, -0.1]])
    assert td.smallest_width(widths, holds) == 32  # 8 does not count: the criterion fails again at 16
    assert td.smallest_width(widths, -holds) is None and td.smallest_width(widths, -holds.abs()) == 8


def measured(value):
    """What measure() would give, with one value for every quantity: (widths, 1), falling as k^-0.6."""
    args = replace(SMALL, widths=(4, 8, 16, 32))
    fall = torch.tensor(args.widths, dtype=torch.float64).pow(-0.6)[:, None]
    names = ("C itself", "v_w alone", "C / (a + b)^2", "factor of Eq. 7", "v_w with v_M", "nonlinear")
    found = {(case, name, ""): value * fall for case in td.CASES for name in names}
    found |= {(f"x' at {d:g}", name, ""): fall for d in td.RARITIES for name in ("factor of Eq. 7", "C / (a + b)^2")}
    for case in td.CASES:
        for eta in args.etas:
            found[case, "criterion", eta] = torch.full((4, 1), 2.0 - eta)
            found[case, "k' of the formula", eta] = torch.full((4, 1), 1234.5)
    return args, found


def test_table_says_no_where_a_bound_fails_within_the_theorem_and_only_there():
    args, found = measured(5.0)
    table = {row[0]: dict(zip(["bound", *td.CASES], row[1:], strict=True)) for row in td.summarise(args, found)[1:]}
    first = table["Eq. 3: largest eigenvalue of C"]
    assert first["on-policy MDPs"].endswith("NO") and not first["Baird"].endswith("NO")
    assert table["Lemma 2: C_OffPolicy, v_w alone"]["Baird"] == "2.176 NO"
    assert table["C_OffPolicy / (a + b)^2"]["Baird, outside"].endswith("NO")  # this bound asks for no bounded w
    assert table["Eq. 7: factor of |v_M|^2"]["random MDPs"] == "k^-0.60 NO"
    assert table["Eq. 7: factor of |v_M|^2"]["random MDPs, outside"] == "k^-0.60"
    assert table["Lemma 2: C_Nonlinear, worst v"]["Baird"] == "k^-0.60"
    assert table["Theorem 2 at eta = 4: from k; formula"]["Baird"] == "4; 1,234"
    assert table["Theorem 2 at eta = 1.1: from k; formula"]["Baird"] == "none to 32; 1,234"
    args, found = measured(-0.1)
    assert not any("NO" in cell for row in td.summarise(args, found) for cell in row)


def test_measured_is_each_statement_of_its_case_at_its_width(monkeypatch, capsys):
    """What goes into the table: the right network and problem with the right quantity."""
    args = replace(SMALL, widths=(4,), etas=(4.0,), num_networks=1)
    calls = []
    real = td.random_networks

    def record(*rest, **kind):
        calls.append((kind, real(*rest, **kind)))
        return calls[-1][1]

    monkeypatch.setattr(td, "random_networks", record)
    found = td.measure(args)
    assert [kind for kind, _ in calls[:6]] == list(td.CASES.values()) and len(calls) == 6 + len(td.RARITIES)
    for (case, _), (_, phi) in zip(td.CASES.items(), calls, strict=False):
        on_policy = td.random_mdps(1, torch.Generator(), True)
        if "Baird" in case:
            problem = td.baird(1)
            value = td.lemma_2_off_policy(args, phi, problem)["factor of Eq. 7"]
            torch.testing.assert_close(found[case, "factor of Eq. 7", ""][0], value)
            full = hessian_form(phi, problem, 1.0)
            torch.testing.assert_close(found[case, "nonlinear", ""][0], largest(full), rtol=1e-4, atol=1e-5)
            diagonal = torch.full((36,), 3.0, dtype=torch.float64)
            diagonal[:4] = 4 * (GAMMA / 2) ** 2
            criterion = largest(full + off_policy_form(phi, problem) - torch.diag(diagonal))
            torch.testing.assert_close(found[case, "criterion", 4.0][0], criterion, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found[case, "k' of the formula", 4.0][0], td.formula(args, phi, problem, 4.0))
        else:
            assert (found[case, "C itself", ""].max() < 0) == ("on-policy" in case)
    assert on_policy.weight.shape == (1, 10)
    for rarity, (_, phi) in zip(td.RARITIES, calls[6:], strict=True):
        value = td.lemma_2_off_policy(args, phi, td.rare_next_state(1, GAMMA, rarity))["factor of Eq. 7"]
        torch.testing.assert_close(found[f"x' at {rarity:g}", "factor of Eq. 7", ""][0], value)


def test_files_parse_and_the_same_command_gives_the_same_bytes(monkeypatch, capsys):
    monkeypatch.setattr(td, "draw", lambda *_: None)  # it is drawn where the script is run as a user runs it
    monkeypatch.setattr(td, "CASES", {"Baird": {}, "on-policy MDPs": {}})
    monkeypatch.setattr(td, "RARITIES", (1e-6,))
    for name in ("a", "b"):
        td.main(replace(SMALL, etas=(4.0,), num_networks=1, out=f"{name}/x"))
    for file in ("x.csv", "x_table.csv"):
        assert Path("a", file).read_bytes() == Path("b", file).read_bytes()
    with open("a/x.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {int(row["k"]) for row in rows} == {4, 8}
    assert all(math.isfinite(float(row[column])) for row in rows for column in ("median", "largest"))
    with open("a/x_table.csv", newline="") as file:
        assert len({len(row) for row in csv.reader(file)}) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"num_networks": 0},
        {"widths": ()},
        {"widths": (2, 8)},
        {"widths": (16, 8)},
        {"widths": (8, 8)},
        {"widths": (8, 10**6)},
        {"etas": ()},
        {"etas": (1.0,)},
        {"etas": (1e200,)},
        {"etas": (math.nan,)},
        {"gamma": -0.1},
        {"gamma": 0.0},
        {"gamma": 1.1},
        {"gamma": math.nan},
        {"td_error": 0.0},
        {"td_error": 1e160},
        {"td_error": 1e-300},
        {"row_norm": 0.0},
        {"row_norm": 1e160},
        {"row_norm": math.inf},
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
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert next(iter(change)).replace("_", "-") in error or "cannot write" in error
    assert [path.name for path in Path().iterdir()] == ["a_file"]


@pytest.mark.parametrize(
    "change",
    [{"td_error": 1e6, "row_norm": 1e6}, {"td_error": 1e-6, "row_norm": 1e-6}, {"gamma": 0.01}, {"gamma": 1.0}]
    + [{"etas": (1e6,)}, {"etas": (1 + 1e-15,)}],
    ids=str,
)
def test_limits_of_the_options_work(change, monkeypatch, capsys):
    monkeypatch.setattr(td, "CASES", {"Baird": {}, "on-policy MDPs": {}})
    monkeypatch.setattr(td, "RARITIES", (1e-6,))
    found = td.measure(replace(SMALL, **{"widths": (4, 8), "etas": (4.0,), "num_networks": 1} | change))
    assert all(value.isfinite().all() for value in found.values())


def test_activation_that_is_not_smooth_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        tyro.cli(td.Args, args=["--activation", "relu"])
    assert end.value.code == 2 and "relu" in capsys.readouterr().err


def test_as_a_user_runs_it(capsys):
    td.main(tyro.cli(td.Args, args=["--widths", "4", "8", "--etas", "2", "--num-networks", "1"]))
    output = capsys.readouterr()
    assert output.err == "" and "Theorem 2 at eta = 2" in output.out
    (folder,) = Path("runs").glob("Baird__td_stability__1__*")
    assert {path.name for path in folder.iterdir()} == {f"td_stability{end}" for end in (".png", ".csv", "_table.csv")}
    assert (folder / "td_stability.png").read_bytes()[:4] == b"\x89PNG"
