"""Why LayerNorm and ℓ² stabilise TD: the statements of the theory, measured against their bounds.

    python td_stability.py                                 # figure, CSV and table; Baird's MDP and random MDPs
    python td_stability.py --activation gelu --gamma 0.9   # another activation, another discount
    python td_stability.py --row-norm 0.1 --etas 1.5 8     # smaller weights need wider networks

The theory is Section 3.2 and Appendix B.3 of "Simplifying Deep Temporal Difference Learning" (Gallici et al., ICLR
2025), whose equation numbers are used here. Networks are those of Eq. 5, Q(x) = wᵀ σ(LayerNorm^k[Mx]), of growing width
k with random weights: the rows of M are unit vectors, and so is w, as the theory asks for bounded rows of M and a
bounded ‖w‖. In the cases marked "outside" every w_j is 1 or -1. Then ‖w‖ = √k is not bounded and the theory promises
nothing, but it is the size that usual initialisations have after Eq. 6's 1/√k. tanh is the default because its slope at
0, where a wide LayerNorm^k puts it, is its steepest: it leaves the bounds least slack.

Let a = (γL/2) ‖v_w‖ and b = (γg/2) ‖v_M‖ with g = max ‖∇_M Q(x)‖. Two bounds are compared with C_OffPolicy:
    Eq. 7       C <= a² + O(‖v_M‖²/k). Its constant depends on the sampling distribution d^μ, as ∇_w Q and ∇_M Q meet
                in cross terms, which Eq. 20 leaves out: in the case "rare x'" it grows by orders of magnitude.
    (a + b)²    holds for every d^μ, as γ u′u − u² <= (γu′/2)² for u = vᵀ∇Q(x), u′ = vᵀ∇Q(x′), and |u′| is at most
                L ‖v_w‖ + g ‖v_M‖. By Eq. 18, g <= L ‖w‖ ‖x‖ / (√k σ̂), so b falls as Eq. 7 says.
Since (a + b)² <= η a² + η/(η−1) b² (equal for some v), Eq. 9 makes C_OffPolicy negative for every d^μ once
(γg/2)² < (η−1)²/η, for which k > k′ = (γ L ‖w‖ ‖x‖ / 2σ̂)² η/(η−1)² is enough.

Where a statement says "for any v", the largest eigenvalue stands for all v at once. Theorem 2 and Lemma 2 also hold for
any weights: random ones can refute that, not prove it. The case "parallel rows" is a bad M by the formula for k′:
its rows differ so little that σ̂ is small. The TD error is held at --td-error in every state, as though by the choice of
rewards: with random weights of this size Q, and with it the TD error, would vanish as k grows, and the nonlinear part
with it, whatever LayerNorm does.
"""

import csv
import math
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import matplotlib.pyplot as plt
import torch
import tyro
from torch.func import jacrev, vmap

# What an option may be, which check() enforces: the words for the error, the test
Count = Annotated[int, "at least 1", lambda x: x >= 1]
Size = Annotated[float, "in [1e-6, 1e6]", lambda x: 1e-6 <= x <= 1e6]
Widths = Annotated[
    tuple[int, ...],
    "given, 4 to 16384 each and increasing",
    lambda widths: widths and min(widths) >= 4 and max(widths) <= 16384 and list(widths) == sorted(set(widths)),
]
Etas = Annotated[
    tuple[float, ...],
    "given, above 1 as Theorem 2 asks, and at most 1e6 each",
    lambda etas: etas and all(1 < eta <= 1e6 for eta in etas),
]


@dataclass
class Args:
    seed: Annotated[int, "in [0, 2^62)", lambda x: 0 <= x < 2**62] = 1
    """seed of all random networks and problems"""
    num_networks: Count = 10
    """random networks per case and width, all in one batch; of the random MDPs, each has its own"""
    widths: Widths = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
    """the widths k"""
    etas: Etas = (1.05, 1.1, 1.2, 1.5, 2.0, 4.0)
    """the values of eta in Eq. 9"""
    gamma: Annotated[float, "in [0.01, 1]: without bootstrapping no bound is left", lambda x: 0.01 <= x <= 1] = 0.99
    """the discount factor"""
    activation: Literal["tanh", "gelu", "elu", "identity"] = "tanh"
    """sigma_Post of Eq. 5; sigma_Pre is the identity"""
    td_error: Size = 1.0
    """the TD error in every state"""
    row_norm: Size = 1.0
    """the norm of each row of M"""
    out: Annotated[str, "a name, as in results/name", lambda x: not x.endswith("/")] = ""
    """where figure and tables go: "results/theory" makes results/theory.png and so on; default: a folder in runs"""


class Problem(NamedTuple):
    """A batch of policy evaluation problems, one for each network."""

    x: torch.Tensor  # (B, n, d): the features of the n states, or state-action pairs
    transition: torch.Tensor  # (B, n, n): under the target policy
    weight: torch.Tensor  # (B, n): d^μ


# ------------------------------------------------------------------------------------------ problems and networks


def baird(batch):
    """Seven states with eight features; the target policy leads to state 7 from everywhere."""
    x = 2 * torch.eye(7, 8, dtype=torch.float64)
    x[:, 7] = 1
    x[6, 6], x[6, 7] = 1, 2
    transition = torch.zeros(7, 7, dtype=torch.float64)
    transition[:, 6] = 1
    return Problem(*(t.expand(batch, *t.shape) for t in (x, transition, torch.full((7,), 1 / 7, dtype=torch.float64))))


def random_mdps(batch, generator, on_policy):
    """Ten states with eight features of norm 1. On-policy, d^μ is the transitions' stationary distribution; otherwise
    it is drawn apart from them."""

    def simplex(*shape):
        exponential = -torch.rand(*shape, generator=generator, dtype=torch.float64).log()
        return exponential / exponential.sum(-1, keepdim=True)

    x = torch.randn(batch, 10, 8, generator=generator, dtype=torch.float64)
    transition, weight = simplex(batch, 10, 10), simplex(batch, 10)
    if on_policy:
        weight = torch.linalg.matrix_power(transition, 2**12)[:, 0]
    return Problem(x / x.norm(dim=-1, keepdim=True), transition, weight)


def rare_next_state(batch, gamma, rarity):
    """Two states, both leading to the second, x', which d^μ visits with probability `rarity`. Their cosine, γ/2, is
    the one at which C_OffPolicy comes closest to its bound for v_w."""
    x = torch.tensor([[gamma / 2, math.sqrt(1 - gamma**2 / 4)], [1, 0]], dtype=torch.float64)
    transition = torch.tensor([[0, 1], [0, 1]], dtype=torch.float64)
    weight = torch.tensor([1 - rarity, rarity], dtype=torch.float64)
    return Problem(*(t.expand(batch, *t.shape) for t in (x, transition, weight)))


def random_networks(batch, width, features, row_norm, generator, large_w=False, parallel=False):
    """φ = [w, Vec(M)], (B, P), with ‖w‖ = 1, or |w_j| = 1 if w is to be large."""
    w = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    m = torch.randn(batch, width, features, generator=generator, dtype=torch.float64)
    if parallel:
        m = 0.1 * m + torch.randn(batch, 1, features, generator=generator, dtype=torch.float64)
    w = w.sign() if large_w else w / w.norm(dim=-1, keepdim=True)
    return torch.cat([w, (row_norm * m / m.norm(dim=-1, keepdim=True)).flatten(1)], 1)


def split(phi, x):
    """w and M out of φ."""
    width = phi.shape[-1] // (1 + x.shape[-1])
    return phi[..., :width], phi[..., width:].unflatten(-1, (width, -1))


def deviation(f):
    """σ̂ of Eq. 6, with its ε."""
    return ((f - f.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + 1e-6).sqrt()


def layer_norm(f):
    """Eq. 6, with its 1/√k: the norm is at most 1."""
    return (f - f.mean(-1, keepdim=True)) / deviation(f) / f.shape[-1] ** 0.5


def q_values(activation, phi, x):
    """Eq. 5 for all states of x: φ (..., P), x (..., n, d) -> (..., n)."""
    w, m = split(phi, x)
    hidden = layer_norm(x @ m.mT)
    if activation != "identity":
        hidden = getattr(torch.nn.functional, activation)(hidden)
    return (hidden @ w.unsqueeze(-1)).squeeze(-1)


def lipschitz(activation):
    """L_Post, the steepest slope: 1, but for GELU the one at √2, Φ(√2) + √2 φ(√2) = 1.129."""
    return (1 + math.erf(1)) / 2 + math.exp(-1) / math.pi**0.5 if activation == "gelu" else 1.0


def bound_w(args):
    """(γL/2)²: the coefficient of Eq. 7 and Eq. 9, as the proofs of Appendix B.3 derive it."""
    return (args.gamma * lipschitz(args.activation) / 2) ** 2


# ---------------------------------------------------------------------------------- the two parts of the Jacobian


def gradients(activation, phi, problem):
    """∇Q in every state: (B, n, P)."""
    return vmap(jacrev(lambda phi, x: q_values(activation, phi, x)))(phi, problem.x)


def coupling(problem, gamma):
    """The symmetric C (B, n, n) with C_OffPolicy(v) = (Gv)ᵀ C (Gv), G the gradients of all states (Eq. 3)."""
    c = problem.weight.unsqueeze(-1) * (gamma * problem.transition - torch.eye(problem.x.shape[1], dtype=torch.float64))
    return (c + c.mT) / 2


def nonlinear_part(activation, phi, problem, td_error):
    """v -> Σ_x d^μ(x) TD(x) ∇²Q(x) v with the TD error held fixed: Eq. 4 is vᵀ of it."""
    phi = phi.clone().requires_grad_()
    weighted = (problem.weight * td_error * q_values(activation, phi, problem.x)).sum()
    (gradient,) = torch.autograd.grad(weighted, phi, create_graph=True)
    return lambda v: torch.autograd.grad(gradient, phi, v, retain_graph=True)[0]


def top(matrices):
    """The largest eigenvalue of matrices that are similar to symmetric ones: (B, n, n) -> (B,)."""
    return torch.linalg.eigvals(matrices).real.amax(-1)


def top_by_products(matrix_vector, start, steps=60):
    """The largest eigenvalue of large symmetric matrices, known by their products, by Lanczos: (..., P) -> (...)."""
    q, before, beta = start / start.norm(dim=-1, keepdim=True), torch.zeros_like(start), torch.zeros(1)
    alphas, betas = [], []
    for _ in range(min(steps, start.shape[-1])):
        image = matrix_vector(q) - beta * before
        alpha = (image * q).sum(-1, keepdim=True)
        image = image - alpha * q
        beta = image.norm(dim=-1, keepdim=True)
        q, before = image / beta, q
        alphas.append(alpha)
        betas.append(beta)
    alphas, betas = torch.cat(alphas, -1), torch.cat(betas, -1)[..., :-1]
    tridiagonal = torch.diag_embed(alphas) + torch.diag_embed(betas, 1) + torch.diag_embed(betas, -1)
    return torch.linalg.eigvalsh(tridiagonal)[..., -1]


# -------------------------------------------------------------------- the statements, in every network of a batch


def lemma_2_off_policy(args, phi, problem):
    """What is to be compared with Eq. 7 and with (a + b)². Eigenvalues of Gᵀ C G are those of C G Gᵀ, but for zeros."""
    g, c, bound = gradients(args.activation, phi, problem), coupling(problem, args.gamma), bound_w(args)
    width = split(phi, problem.x)[0].shape[-1]
    kw, km = (part @ part.mT for part in (g[..., :width], g[..., width:]))
    # For a given Gv_M, the worst v_w leaves the form (I − C K_w / bound)⁻¹ C in it.
    rest = torch.linalg.solve(torch.eye(c.shape[-1], dtype=torch.float64) - c @ kw / bound, c)
    g_squared = km.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None]
    ratios = []
    for eta in args.etas:
        b_squared = eta / (eta - 1) * args.gamma**2 / 4 * g_squared
        ratios.append(top(c @ (kw / (eta * bound) + km / b_squared)))
    return {
        "C itself": top(c),
        "v_w alone": top(c @ kw),
        "v_w with v_M": top(c @ km @ c @ kw).clamp(min=0).sqrt(),  # the norm of the block between them
        "factor of Eq. 7": top(rest @ km),
        "C / (a + b)^2": torch.stack(ratios).amax(0),
    }


def g_bound_squared(args, phi, problem):
    """(L ‖w‖ ‖x‖ / (√k σ̂))² in the state where it is largest: (B,)."""
    w, m = split(phi, problem.x)
    stretch = (problem.x.norm(dim=-1) / deviation(problem.x @ m.mT).squeeze(-1)).square().amax(-1)
    return lipschitz(args.activation) ** 2 * w.square().mean(-1) * stretch


def formula(args, phi, problem, eta):
    """k′: a width that is enough for the off-policy part, with the σ̂ of these networks."""
    k = split(phi, problem.x)[0].shape[-1]
    return k * args.gamma**2 / 4 * g_bound_squared(args, phi, problem) * eta / (eta - 1) ** 2


def theorem_2(args, phi, problem, start):
    """The largest eigenvalue of the symmetric part of the Jacobian of Eq. 9's update, for every η: (etas, B). Below 0,
    the criterion holds."""
    g, c = gradients(args.activation, phi, problem), coupling(problem, args.gamma)
    eta = torch.tensor(args.etas, dtype=torch.float64)[:, None, None]
    on_w = torch.arange(phi.shape[-1]) < split(phi, problem.x)[0].shape[-1]
    diagonal = torch.where(on_w, eta * bound_w(args), eta - 1)  # of the derivative of Eq. 9's term
    nonlinear = nonlinear_part(args.activation, phi.repeat(len(eta), 1, 1), problem, args.td_error)

    def product(v):
        off_policy = (g.mT @ (c @ (g @ v.unsqueeze(-1)))).squeeze(-1)
        return off_policy + nonlinear(v) - diagonal * v

    return top_by_products(product, start.repeat(len(eta), 1, 1))


CASES = {
    "Baird": {},
    "random MDPs": {},
    "on-policy MDPs": {},
    "Baird, parallel rows": {"parallel": True},
    "Baird, outside": {"large_w": True},
    "random MDPs, outside": {"large_w": True},
}
RARITIES = (0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6)  # of x' in the case "rare x'"


def measure(args):
    """Every quantity in every case: {(case, quantity, eta): (widths, networks)}."""
    generator = torch.Generator().manual_seed(args.seed)
    off_policy, on_policy = (random_mdps(args.num_networks, generator, on_policy) for on_policy in (False, True))
    found = {}

    def keep(case, quantity, value, eta=""):
        found.setdefault((case, quantity, eta), []).append(value)

    for case, kind in CASES.items():
        print(case, flush=True)
        problem = baird(args.num_networks) if "Baird" in case else on_policy if "on-policy" in case else off_policy
        for width in args.widths:
            phi = random_networks(args.num_networks, width, problem.x.shape[-1], args.row_norm, generator, **kind)
            start = torch.randn(phi.shape, generator=generator, dtype=torch.float64)
            for quantity, value in lemma_2_off_policy(args, phi, problem).items():
                keep(case, quantity, value)
            nonlinear = nonlinear_part(args.activation, phi, problem, args.td_error)
            keep(case, "nonlinear", top_by_products(nonlinear, start))
            for eta, value in zip(args.etas, theorem_2(args, phi, problem, start), strict=True):
                keep(case, "criterion", value, eta)
                keep(case, "k' of the formula", formula(args, phi, problem, eta), eta)
    for rarity in RARITIES:
        problem = rare_next_state(args.num_networks, args.gamma, rarity)
        for width in args.widths:
            phi = random_networks(args.num_networks, width, 2, args.row_norm, generator)
            for quantity in ("factor of Eq. 7", "C / (a + b)^2"):
                keep(f"x' at {rarity:g}", quantity, lemma_2_off_policy(args, phi, problem)[quantity])
    return {key: torch.stack(values) for key, values in found.items()}


# -------------------------------------------------------------------------------------------------------- main


def main(args):
    check(args)
    now = time.time_ns() // 1_000_000
    prefix = open_results(args.out or f"runs/Baird__td_stability__{args.seed}__{now}/td_stability")
    torch.set_num_threads(1)  # the tensors are small: threads would wait for each other more than they help
    found = measure(args)
    table = summarise(args, found)
    rows = [("case", "quantity", "eta", "k", "median", "largest")]
    for (case, quantity, eta), values in found.items():
        for k, value in zip(args.widths, values, strict=True):
            rows.append((case, quantity, eta, k, f"{value.median():.4g}", f"{value.max():.4g}"))
    write_csv(f"{prefix}.csv", rows)
    write_csv(f"{prefix}_table.csv", table)
    draw(args, f"{prefix}.png", found)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"k^p: fit to the largest of {args.num_networks} networks over the upper half of the widths")
    print("NO: above the bound, or a power more than 0.25 above the bound's; outside: not what the theory is about")
    print(f"written: {prefix}.png, {prefix}.csv, {prefix}_table.csv")


# ------------------------------------------------------------------------------------------------- bookkeeping


def slope(widths, values):
    """p of the fit k^p to the largest value over networks, over the upper half of the widths; NaN if there is none."""
    half = len(widths) // 2
    x, y = torch.tensor(widths[half:], dtype=torch.float64).log(), values[half:].amax(-1)
    if len(x) < 2 or y.min() <= 0:
        return math.nan
    x, y = x - x.mean(), y.log()
    return ((x * y).sum() / (x * x).sum()).item()


def smallest_width(widths, values):
    """The width from which on the criterion holds in every network, None if it does not at the last one."""
    fails = [i for i, value in enumerate(values) if value.max() >= 0]
    first = fails[-1] + 1 if fails else 0
    return widths[first] if first < len(widths) else None


def summarise(args, found):
    """The table: statement, bound, and what was measured in each case."""

    def at_most(case, quantity, bound):
        measured = found[case, quantity, ""].max().item()
        return f"{measured:.4g}" + " NO" * (measured > bound + 1e-9)

    def rate(case, quantity, power):
        measured = slope(args.widths, found[case, quantity, ""])
        high = measured > power + 0.25 and "outside" not in case
        return "-" if math.isnan(measured) else f"k^{measured:.2f}" + " NO" * high

    def start(case, eta):
        width = smallest_width(args.widths, found[case, "criterion", eta])
        formula = found[case, "k' of the formula", eta][-1].max().item()
        return f"{width or f'none to {args.widths[-1]}'}; {formula:,.0f}"

    table = [["statement", "bound", *CASES]]
    signs = [found[case, "C itself", ""].max().item() for case in CASES]
    wrong = [sign >= 0 and "on-policy" in case for sign, case in zip(signs, CASES, strict=True)]
    cells = [f"{sign:.4g}" + " NO" * bad for sign, bad in zip(signs, wrong, strict=True)]
    table.append(["Eq. 3: largest eigenvalue of C", "< 0 on-policy", *cells])
    for label, quantity, bound in (
        ("Lemma 2: C_OffPolicy, v_w alone", "v_w alone", bound_w(args)),
        ("C_OffPolicy / (a + b)^2", "C / (a + b)^2", 1),
    ):
        table.append([label, f"<= {bound:.4g}", *(at_most(case, quantity, bound) for case in CASES)])
    for label, quantity, power in (
        ("Eq. 7: factor of |v_M|^2", "factor of Eq. 7", -1),
        ("C_OffPolicy, v_w with v_M", "v_w with v_M", math.inf),
        ("Lemma 2: C_Nonlinear, worst v", "nonlinear", -0.5),
    ):
        bound = "not in Eq. 20" if power == math.inf else f"k^{power}"
        table.append([label, bound, *(rate(case, quantity, power) for case in CASES)])
    for eta in args.etas:
        table.append([f"Theorem 2 at eta = {eta:g}: from k; formula", "some k'", *(start(case, eta) for case in CASES)])
    for rarity in RARITIES:
        factor, ratio = (found[f"x' at {rarity:g}", name, ""][-1] for name in ("factor of Eq. 7", "C / (a + b)^2"))
        cells = [f"k * factor {args.widths[-1] * factor.median():.3g}", f"C / (a + b)^2 {ratio.max():.3g}"]
        table.append([f"Eq. 7, d^mu(x') = {rarity:g}, k = {args.widths[-1]}", "", *cells] + [""] * (len(CASES) - 2))
    return table


def draw(args, path, found):
    blue, orange, green, red, purple, black = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#000000"
    plt.switch_backend("Agg")  # into a file, screen or not
    figure, ((off_policy, rare), (nonlinear, theorem)) = plt.subplots(2, 2, figsize=(13, 10), layout="constrained")

    def line(axes, case, quantity, label, colour, style="o-"):
        values = found[case, quantity, ""]
        power = slope(args.widths, values)
        label += f": $k^{{{power:.2f}}}$" if math.isfinite(power) else ""
        axes.plot(args.widths, values.amax(-1), style, color=colour, markersize=4, label=label)

    bound = bound_w(args)
    off_policy.axhline(bound, color=black, linestyle=":", label=rf"bound on $v_w$: $(\gamma L/2)^2$ = {bound:.3f}")
    line(off_policy, "Baird", "v_w alone", "$v_w$ alone", black)
    line(off_policy, "Baird", "v_w with v_M", "$v_w$ with $v_M$, not in Eq. 20", purple)
    line(off_policy, "Baird", "factor of Eq. 7", r"factor of $\|v_M\|^2$ in Eq. 7", blue)
    line(off_policy, "Baird, parallel rows", "factor of Eq. 7", "the same, parallel rows", green)
    line(off_policy, "Baird, outside", "factor of Eq. 7", r"the same, outside: $\|w\| = \sqrt{k}$", red, "s--")
    off_policy.set(title="Lemma 2, off-policy part, Baird", ylabel=f"largest of {args.num_networks} networks")

    for i, rarity in enumerate(RARITIES):
        values = torch.tensor(args.widths)[:, None] * found[f"x' at {rarity:g}", "factor of Eq. 7", ""]
        colour = plt.get_cmap("viridis")(0.92 * i / (len(RARITIES) - 1))
        rare.plot(args.widths, values.median(-1).values, "o-", color=colour, markersize=4, label=f"{rarity:g}")
    rare.set(title=r"The factor of $\|v_M\|^2$ in Eq. 7, two states", ylabel=r"k $\times$ factor, median")

    cases = dict(
        zip(
            CASES,
            ((blue, "o-"), (orange, "s-"), (purple, "^-"), (green, "D-"), (blue, "o:"), (orange, "s:")),
            strict=True,
        )
    )
    never, etas = 4 * args.widths[-1], sorted(args.etas)
    for case, (colour, style) in cases.items():
        line(nonlinear, case, "nonlinear", case, colour, style)
        starts = [smallest_width(args.widths, found[case, "criterion", eta]) or never for eta in etas]
        theorem.plot([eta - 1 for eta in etas], starts, style, color=colour, label=case)
    nonlinear.set(title=f"Lemma 2, nonlinear part at TD error {args.td_error:g}, worst v")
    nonlinear.set(ylabel=f"largest of {args.num_networks} networks")
    theorem.axhspan(2 * args.widths[-1], 2 * never, color="grey", alpha=0.15)
    theorem.text(0.02, 0.955, f"not up to k = {args.widths[-1]}", transform=theorem.transAxes)
    theorem.set(title="Theorem 2: the width from which on its criterion holds", ylabel="smallest width k")
    theorem.set(ylim=(args.widths[0] / 2, 2 * never))
    for axes in (off_policy, rare, nonlinear, theorem):
        axes.set(xscale="log", yscale="log", xlabel=r"$\eta - 1$" if axes is theorem else "width k")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8.5, title=r"$d^\mu(x')$" if axes is rare else None)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def fail(message):
    """Ends the program for a reason that the user can mend; nothing has been written."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check(args):
    """Refuses options that are out of range."""
    for option in fields(args):
        words, allowed = getattr(option.type, "__metadata__", ("", lambda _: True))
        if not allowed(value := getattr(args, option.name)):
            fail(f"--{option.name.replace('_', '-')} must be {words}, not {value}")


def open_results(prefix):
    """Tries to write before the work begins."""
    try:
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{prefix}.csv").touch()
    except OSError as error:
        fail(f"cannot write {prefix}.csv: {error.strerror}")
    return prefix


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Args))
