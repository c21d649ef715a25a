"""Why LayerNorm and ℓ² stabilise TD: every statement of the theory, measured against its bound.

    python td_stability.py                                 # figure, CSV and table; Baird's MDP and random MDPs
    python td_stability.py --activation gelu --gamma 0.9   # another activation, another discount
    python td_stability.py --row-norm 0.1 --etas 1.5 8     # smaller weights need wider networks

The theory is Section 3.2 and Appendix B.3 of "Simplifying Deep Temporal Difference Learning" (Gallici et al., ICLR
2025), whose equation numbers are used here. Networks are those of Eq. 5, Q(x) = wᵀ σ(LayerNorm^k[Mx]), of growing width
k with random weights: the rows of M are unit vectors, and so is w, as the theory asks for bounded rows of M and a
bounded ‖w‖. The columns "large w" leave that assumption: there every w_j is 1 or -1, so that ‖w‖ = √k, which is what
usual initialisations amount to after Eq. 6's 1/√k. tanh is the default because its slope at 0, where a wide
LayerNorm^k puts it, is its steepest: it leaves the bounds least slack.

Where a statement says "for any v", the largest eigenvalue stands for all v at once. Theorem 2 and Lemma 2 also say "for
any weights": random weights can refute that, not prove it. The TD error is held at --td-error in every state, as though
by the choice of rewards: with random weights of this size Q, and with it the TD error, would vanish as k grows, and the
nonlinear part with it, whatever LayerNorm does.
"""

import csv
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Literal, NamedTuple

import matplotlib.pyplot as plt
import torch
import tyro
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap


@dataclass
class Args:
    seed: int = 1
    """seed of all random networks and problems"""
    num_networks: int = 10
    """random networks per problem and width, all in one batch; of the random MDPs, each has its own"""
    widths: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
    """the widths k"""
    etas: tuple[float, ...] = (1.05, 1.1, 1.2, 1.5, 2.0, 4.0)
    """the values of eta in Eq. 9"""
    gamma: float = 0.99
    """the discount factor"""
    activation: Literal["tanh", "gelu", "elu", "identity"] = "tanh"
    """sigma_Post of Eq. 5; sigma_Pre is the identity"""
    td_error: float = 1.0
    """the TD error in every state"""
    row_norm: float = 1.0
    """the norm of each row of M"""
    states: int = 10
    """states of a random MDP"""
    features: int = 8
    """features of a state in a random MDP"""
    lanczos_steps: int = 60
    """steps of the iteration for the largest eigenvalue"""
    out: str = ""
    """where figure and tables go: "results/theory" makes results/theory.png and so on; default: a folder in runs"""


class Problem(NamedTuple):
    """A batch of policy evaluation problems, one for each network."""

    x: torch.Tensor  # (B, n, d): the features of the n states, or state-action pairs
    transition: torch.Tensor  # (B, n, n): under the target policy
    weight: torch.Tensor  # (B, n): d^μ
    reward: torch.Tensor  # (B, n)


# -- Problems and networks


def baird(batch):
    """Seven states with eight features; the target policy leads to state 7 from everywhere; no rewards."""
    x = 2 * torch.eye(7, 8, dtype=torch.float64)
    x[:, 7] = 1
    x[6, 6], x[6, 7] = 1, 2
    transition = torch.zeros(7, 7, dtype=torch.float64)
    transition[:, 6] = 1
    weight, reward = torch.full((7,), 1 / 7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    return Problem(*(tensor.expand(batch, *tensor.shape) for tensor in (x, transition, weight, reward)))


def random_mdps(batch, states, features, generator):
    """d^μ is drawn apart from the transitions, so it is off-policy."""

    def simplex(*shape):
        exponential = -torch.rand(*shape, generator=generator, dtype=torch.float64).log()
        return exponential / exponential.sum(-1, keepdim=True)

    x = torch.randn(batch, states, features, generator=generator, dtype=torch.float64)
    reward = 2 * torch.rand(batch, states, generator=generator, dtype=torch.float64) - 1
    return Problem(x / x.norm(dim=-1, keepdim=True), simplex(batch, states, states), simplex(batch, states), reward)


def random_networks(batch, width, features, large_w, row_norm, generator):
    """φ = [w, Vec(M)], (B, P), with ‖w‖ = 1, or |w_j| = 1 if w is to be large."""
    w = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    m = torch.randn(batch, width, features, generator=generator, dtype=torch.float64)
    w = w.sign() if large_w else w / w.norm(dim=-1, keepdim=True)
    return torch.cat([w, (row_norm * m / m.norm(dim=-1, keepdim=True)).flatten(1)], 1)


def layer_norm(f):
    """Eq. 6, with its 1/√k."""
    f = f - f.mean(-1, keepdim=True)
    return f / (f.square().mean(-1, keepdim=True) + 1e-6).sqrt() / f.shape[-1] ** 0.5


def q_values(activation, phi, x):
    """Eq. 5 for all states of x: φ (..., P), x (..., n, d) -> (..., n)."""
    width = phi.shape[-1] // (1 + x.shape[-1])
    w, m = phi[..., :width], phi[..., width:].unflatten(-1, (width, -1))
    hidden = layer_norm(x @ m.mT)
    if activation != "identity":
        hidden = getattr(torch.nn.functional, activation)(hidden)
    return (hidden @ w.unsqueeze(-1)).squeeze(-1)


def lipschitz(activation):
    """L_Post, the steepest slope: 1, but for GELU the one at √2, Φ(√2) + √2 φ(√2) = 1.129."""
    return (1 + math.erf(1)) / 2 + math.exp(-1) / math.pi**0.5 if activation == "gelu" else 1.0


# -- What the statements are about


def td_errors(activation, phi, problem, gamma):
    """r + γ E[Q(x′)] − Q(x) in every state."""
    q = q_values(activation, phi, problem.x)
    return problem.reward + gamma * (problem.transition @ q.unsqueeze(-1)).squeeze(-1) - q


def expected_update(activation, phi, problem, gamma):
    """Eq. 2 in the mean over d^μ: Σ_x d^μ(x) TD(x) ∇Q(x), without a gradient through the target."""
    _, pull_back = vjp(lambda phi: q_values(activation, phi, problem.x), phi)
    return pull_back(problem.weight * td_errors(activation, phi, problem, gamma))[0]


def gradients(activation, phi, problem):
    """∇Q in every state: (B, n, P)."""
    return vmap(jacrev(lambda phi, x: q_values(activation, phi, x)))(phi, problem.x)


def coupling(problem, gamma):
    """The symmetric C (B, n, n) with C_OffPolicy(v) = (Gv)ᵀ C (Gv), G the gradients of all states (Eq. 3)."""
    c = problem.weight.unsqueeze(-1) * (gamma * problem.transition - torch.eye(problem.x.shape[1], dtype=torch.float64))
    return (c + c.mT) / 2


def root(g):
    """R (..., n, n) with R Rᵀ = G Gᵀ: what is left of G (..., n, P) after turning its P columns into n."""
    values, vectors = torch.linalg.eigh(g @ g.mT)
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2)


def weighted_hessian(activation, phi, problem, td_error):
    """v -> Σ_x d^μ(x) TD(x) ∇²Q(x) v with the TD error held fixed: Eq. 4 is vᵀ of it."""

    def scalar(phi):
        return (problem.weight * td_error * q_values(activation, phi, problem.x)).sum()

    return lambda v: jvp(grad(scalar), (phi,), (v,))[1]


def regulariser(width, size, gamma, slope, eta):
    """The diagonal (P,) of the derivative of Eq. 9's term.

    The paper prints γ^(L/2) there; its proofs derive (γL/2)², which is meant.
    """
    diagonal = torch.full((size,), eta - 1, dtype=torch.float64)
    diagonal[:width] = eta * (gamma * slope / 2) ** 2
    return diagonal


def largest_eigenvalue(matrix_vector, start, steps):
    """Of symmetric matrices that are known by their products, by the Lanczos iteration: (B, P) -> (B,)."""
    q, before, beta = start / start.norm(dim=-1, keepdim=True), torch.zeros_like(start), torch.zeros(len(start), 1)
    alphas, betas = [], []
    for _ in range(min(steps, start.shape[1])):
        image = matrix_vector(q) - beta * before
        alpha = (image * q).sum(-1, keepdim=True)
        image = image - alpha * q
        beta = image.norm(dim=-1, keepdim=True)
        q, before = image / beta, q
        alphas.append(alpha)
        betas.append(beta)
    alphas, betas = torch.cat(alphas, 1), torch.cat(betas, 1)[:, :-1]
    tridiagonal = torch.diag_embed(alphas) + torch.diag_embed(betas, 1) + torch.diag_embed(betas, -1)
    return torch.linalg.eigvalsh(tridiagonal)[:, -1]


# -- One measurement per statement, in every network of a batch


def proposition_1(width, batch, generator):
    """The norm of LayerNorm^k, and its largest derivatives by which indices coincide; inputs f_i ~ U(-1, 1)."""
    f = 2 * torch.rand(batch, width, generator=generator, dtype=torch.float64) - 1
    same = torch.arange(width) == 0  # output 0 stands for any output j
    pair = same[:, None] | same[None, :] | torch.eye(width, dtype=torch.bool)
    first = vmap(jacrev(lambda f: layer_norm(f)[0]))(f).abs()
    second = torch.stack([jacfwd(jacrev(lambda f: layer_norm(f)[0]))(row) for row in f]).abs()
    return {
        "norm": layer_norm(f).norm(dim=-1),
        "first derivative, i = j": first[:, same].amax(-1),
        "first derivative, i != j": first[:, ~same].amax(-1),
        "second derivative, two indices equal": second[:, pair].amax(-1),
        "second derivative, all different": second[:, ~pair].amax(-1),
    }


def jacobian_split(activation, phi, problem, gamma):
    """The Jacobian by differentiating the update, against its parts from Eq. 3 and Eq. 4: three (B, P, P)."""
    jacobian = vmap(jacfwd(lambda phi, *problem: expected_update(activation, phi, Problem(*problem), gamma)))
    g = gradients(activation, phi, problem)
    next_g = problem.transition @ g
    off_policy = torch.einsum("bn,bnp,bnq->bpq", problem.weight, g, gamma * next_g - g)
    hessian = vmap(jacfwd(jacrev(lambda phi, x: q_values(activation, phi, x))))(phi, problem.x)
    error = problem.weight * td_errors(activation, phi, problem, gamma)
    return jacobian(phi, *problem), off_policy, torch.einsum("bn,bnpq->bpq", error, hessian)


def lemma_2_off_policy(activation, phi, problem, gamma):
    """Eq. 7: the parts of C_OffPolicy as a quadratic form in v = [v_w, v_M], and the term in v_M that makes it hold."""
    g = gradients(activation, phi, problem)
    width = phi.shape[1] // (1 + problem.x.shape[-1])
    c = coupling(problem, gamma)
    rw, rm = root(g[..., :width]), root(g[..., width:])
    ww, wm, mm = rw.mT @ c @ rw, rw.mT @ c @ rm, rm.mT @ c @ rm
    # C_OffPolicy <= b |v_w|^2 + m |v_M|^2 for all v, with b = (γL/2)², just if m is at least this (Schur complement).
    slack = (gamma * lipschitz(activation) / 2) ** 2 * torch.eye(ww.shape[-1], dtype=torch.float64) - ww
    needed = mm + wm.mT @ torch.linalg.pinv(slack, hermitian=True) @ wm
    rows = g[..., width:].unflatten(-1, (width, -1)).transpose(1, 2)  # (B, k, n, d)
    return {
        "v_w alone": torch.linalg.eigvalsh(ww)[:, -1],
        "m": torch.linalg.eigvalsh((needed + needed.mT) / 2)[:, -1],
        "v_M alone": torch.linalg.eigvalsh(mm)[:, -1],
        "v_M as in Eq. 20": torch.linalg.eigvalsh(rows.mT @ c.unsqueeze(1) @ rows)[..., -1].amax(-1),
        "v_w with v_M": torch.linalg.matrix_norm(wm, ord=2),
    }


def lemma_2_nonlinear(activation, phi, problem, td_error, start, steps):
    """Eq. 8: the worst v, and a random one of norm 1."""
    product = weighted_hessian(activation, phi, problem, td_error)
    v = start / start.norm(dim=-1, keepdim=True)
    return {
        "worst v": largest_eigenvalue(product, start, steps),
        "random v": (v * product(v)).sum(-1).abs(),
    }


def theorem_2(activation, phi, problem, gamma, td_error, eta, start, steps):
    """The largest eigenvalue of the symmetric part of the Jacobian of Eq. 9's update: below 0, the criterion holds."""
    g, c = gradients(activation, phi, problem), coupling(problem, gamma)
    nonlinear = weighted_hessian(activation, phi, problem, td_error)
    width = phi.shape[1] // (1 + problem.x.shape[-1])
    diagonal = regulariser(width, phi.shape[1], gamma, lipschitz(activation), eta)

    def product(v):
        off_policy = (g.mT @ (c @ (g @ v.unsqueeze(-1)))).squeeze(-1)
        return off_policy + nonlinear(v) - diagonal * v

    return largest_eigenvalue(product, start, steps)


def measure(args):
    """Every statement at every width: rows of (statement, where, quantity, width, eta, value per network)."""
    generator = torch.Generator().manual_seed(args.seed)
    batch, rows = args.num_networks, []
    for width in args.widths:
        if width <= 1024:  # the second derivatives are width x width
            found = proposition_1(width, batch, generator)
            rows += [("Prop. 1", "", quantity, width, "", value) for quantity, value in found.items()]
    problems = {
        "Baird": baird(batch),
        "random MDPs": random_mdps(batch, args.states, args.features, generator),
    }
    for large_w in (False, True):
        for name, problem in problems.items():
            where = name + ", large w" * large_w
            print(where, flush=True)
            for width in args.widths:
                features = problem.x.shape[-1]
                phi = random_networks(batch, width, features, large_w, args.row_norm, generator)
                start = torch.randn(phi.shape, generator=generator, dtype=torch.float64)
                found = lemma_2_off_policy(args.activation, phi, problem, args.gamma)
                rows += [("Lemma 2", where, f"off-policy: {key}", width, "", value) for key, value in found.items()]
                found = lemma_2_nonlinear(args.activation, phi, problem, args.td_error, start, args.lanczos_steps)
                rows += [("Lemma 2", where, f"nonlinear: {key}", width, "", value) for key, value in found.items()]
                for eta in args.etas:
                    value = theorem_2(
                        args.activation, phi, problem, args.gamma, args.td_error, eta, start, args.lanczos_steps
                    )
                    rows.append(("Theorem 2", where, "largest eigenvalue", width, eta, value))
    return rows, problems


def split_in_directions(args, problem, generator):
    """(vᵀJv, C_OffPolicy(v), C_Nonlinear(v)) for random v of norm 1, and the largest deviation of J from its parts."""
    features = problem.x.shape[-1]
    phi = random_networks(args.num_networks, 16, features, False, args.row_norm, generator)
    parts = jacobian_split(args.activation, phi, problem, args.gamma)
    v = torch.randn(20, *phi.shape, generator=generator, dtype=torch.float64)
    v = v / v.norm(dim=-1, keepdim=True)
    deviation = (parts[0] - parts[1] - parts[2]).abs().max() / parts[0].abs().max()
    return [torch.einsum("sbp,bpq,sbq->sb", v, part, v).flatten() for part in parts], deviation.item()


# -- Reporting


def series(rows, where, quantity, eta=""):
    """Widths, and the value per network at each: (widths,), (widths, B)."""
    found = [(row[3], row[5]) for row in rows if (row[1], row[2], row[4]) == (where, quantity, eta)]
    return [width for width, _ in found], torch.stack([value for _, value in found])


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


def summarise(args, rows, deviations):
    """The table: statement, bound, and what was measured in each place; "NO" marks what is not as stated."""
    places = list(dict.fromkeys(row[1] for row in rows if row[1]))

    def at_most(where, quantity, bound):
        measured = series(rows, where, quantity)[1].max().item()
        return f"{measured:.6g}" + " NO" * (measured > bound)

    def rate(where, quantity, power):
        measured = slope(*series(rows, where, quantity))
        return "-" if math.isnan(measured) else f"k^{measured:.2f}" + " NO" * (measured > power + 0.25)

    def start(where, eta):
        width = smallest_width(*series(rows, where, "largest eigenvalue", eta))
        return f"k >= {width}" if width else f"k > {max(args.widths)} NO"

    table = []
    if args.widths[0] <= 1024:
        table.append(["Prop. 1: norm", "<= 1", at_most("", "norm", 1)])
        for quantity, power in (
            ("first derivative, i = j", -0.5),
            ("first derivative, i != j", -1.5),
            ("second derivative, two indices equal", -1.5),
            ("second derivative, all different", -2.5),
        ):
            table.append([f"Prop. 1: {quantity}", f"k^{power}", rate("", quantity, power)])
    table.append(["Eq. 3 + Eq. 4: relative difference from J", "0"])
    table[-1] += [f"{deviation:.0e}" + " NO" * (deviation > 1e-10) for deviation in deviations.values()]
    bound = (args.gamma * lipschitz(args.activation) / 2) ** 2
    table.append(["Lemma 2: off-policy, v_w alone", f"<= {bound:.4f}"])
    table[-1] += [at_most(where, "off-policy: v_w alone", bound) for where in places]
    for quantity, power, label in (
        ("off-policy: m", -1, "off-policy, factor of |v_M|^2"),
        ("off-policy: v_M alone", -1, "off-policy, v_M alone"),
        ("off-policy: v_M as in Eq. 20", -1, "off-policy, v_M as in Eq. 20"),
        ("off-policy: v_w with v_M", math.inf, "off-policy, v_w with v_M"),
        ("nonlinear: worst v", -0.5, "nonlinear, worst v"),
        ("nonlinear: random v", -0.5, "nonlinear, random v"),
    ):
        table.append([f"Lemma 2: {label}", f"k^{power}" if math.isfinite(power) else "not in Eq. 20"])
        table[-1] += [rate(where, quantity, power) for where in places]
    for eta in args.etas:
        table.append([f"Theorem 2: eta = {eta:g}", "k >= some k'", *(start(where, eta) for where in places)])
    return [["statement", "bound", *places]] + [row + [""] * (2 + len(places) - len(row)) for row in table]


def draw(args, path, rows, directions, deviations):
    blue, orange, green, red, purple, black = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#000000"
    plt.switch_backend("Agg")  # into a file, screen or not
    figure, grid = plt.subplots(2, 3, figsize=(14, 8), layout="constrained")

    def line(axes, where, quantity, label, colour, style="o-"):
        widths, values = series(rows, where, quantity)
        power = slope(widths, values)
        label += f": $k^{{{power:.2f}}}$" if math.isfinite(power) else ""
        axes.plot(widths, values.amax(-1), style, color=colour, markersize=4, label=label)

    axes = grid[0, 0]
    names = ["norm", "first derivative, i = j", "first derivative, i != j"]
    names += ["second derivative, two indices equal", "second derivative, all different"]
    labels = ["norm", r"$\partial_i$, own output", r"$\partial_i$, another's", r"$\partial_s\partial_t$, two equal"]
    labels += [r"$\partial_s\partial_t$, all different"]
    if args.widths[0] <= 1024:
        for name, label, colour in zip(names, labels, (black, blue, green, orange, red), strict=True):
            line(axes, "", name, label, colour)
    axes.set(xscale="log", yscale="log", xlabel="width k", title="Proposition 1: LayerNorm$^k$ and its derivatives")
    axes.set(ylabel=f"largest of {args.num_networks}")

    axes = grid[0, 1]
    for (where, (total, off_policy, nonlinear)), colour in zip(directions.items(), (blue, orange), strict=True):
        label = f"{where}, largest difference {deviations[where]:.0e}"
        axes.plot(off_policy + nonlinear, total, "o", color=colour, markersize=4, alpha=0.6, label=label)
    axes.axline((0, 0), slope=1, color=black, linewidth=0.8)
    axes.set(xlabel="$C_{OffPolicy} + C_{Nonlinear}$", ylabel="$v^T J v$", title="Eq. 3, 4: the Jacobian splits")
    axes.locator_params(nbins=5)

    axes = grid[0, 2]
    bound = (args.gamma * lipschitz(args.activation) / 2) ** 2
    axes.axhline(bound, color=black, linestyle=":", label=rf"bound on $v_w$: $(\gamma L/2)^2$ = {bound:.3f}")
    line(axes, "Baird", "off-policy: v_w alone", "$v_w$ alone", black)
    line(axes, "Baird", "off-policy: v_w with v_M", "$v_w$ with $v_M$, not in Eq. 20", purple)
    line(axes, "Baird", "off-policy: m", r"factor of $\|v_M\|^2$ needed", blue)
    line(axes, "Baird", "off-policy: v_M as in Eq. 20", "$v_M$ as in Eq. 20", green)
    line(axes, "Baird, large w", "off-policy: m", "factor needed, large w: $|w_j|$ = 1", red, "s--")
    axes.set(xscale="log", yscale="log", xlabel="width k", title="Lemma 2, off-policy, Baird: the factor is O(1/k)")
    axes.set(ylim=(axes.get_ylim()[0] / 3e3, None), ylabel=f"largest of {args.num_networks} networks")

    axes = grid[1, 0]
    for where, colour in (("Baird", blue), ("random MDPs", orange)):
        line(axes, where, "nonlinear: worst v", f"{where}, worst v", colour)
        line(axes, where, "nonlinear: random v", f"{where}, random v", colour, "s--")
    axes.set(xscale="log", yscale="log", xlabel="width k")
    axes.set(ylim=(axes.get_ylim()[0] / 30, None), ylabel=f"largest of {args.num_networks} networks")
    axes.set(title=rf"Lemma 2, nonlinear at TD error {args.td_error:g}: $O(1/\sqrt{{k}})$")

    axes = grid[1, 1]
    for i, eta in enumerate(args.etas):
        widths, values = series(rows, "Baird", "largest eigenvalue", eta)
        colour = plt.get_cmap("viridis")(0.92 * i / max(1, len(args.etas) - 1))
        axes.plot(widths, values.amax(-1), "o-", color=colour, markersize=4, label=rf"$\eta$ = {eta:g}")
    axes.axhline(0, color=black, linewidth=1)
    axes.set(xscale="log", xlabel="width k", title="Theorem 2, Baird: the criterion holds below 0")
    axes.set(ylabel="largest eigenvalue")

    axes = grid[1, 2]
    never = 4 * max(args.widths)
    places = {"Baird": (blue, "o-"), "random MDPs": (orange, "s-")}
    places |= {"Baird, large w": (blue, "o:"), "random MDPs, large w": (orange, "s:")}
    for where, (colour, style) in places.items():
        found = [smallest_width(*series(rows, where, "largest eigenvalue", eta)) or never for eta in sorted(args.etas)]
        axes.plot([eta - 1 for eta in sorted(args.etas)], found, style, color=colour, label=where)
    axes.axhspan(2 * max(args.widths), 2 * never, color="grey", alpha=0.15)
    axes.text(0.02, 0.955, f"not at k = {max(args.widths)}", transform=axes.transAxes)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel=r"$\eta - 1$",
        ylabel="smallest width k",
        ylim=(min(args.widths) / 2, 2 * never),
    )
    axes.set(title="Theorem 2: from which width on it holds")

    for axes in grid.flat:
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8.5)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def can_write(folder):
    while folder and not os.path.exists(folder):  # it will be made inside the nearest one that exists
        folder = os.path.dirname(folder)
    try:
        with tempfile.TemporaryFile(dir=folder or "."):
            return True
    except OSError:
        return False


def check(args):
    """For input that cannot work: one line and exit code 2, before anything is written."""
    numbers = [*args.etas, args.td_error, args.row_norm]
    for bad, message in [
        (not 0 <= args.seed < 2**62, "--seed must be between 0 and 2^62"),
        (args.num_networks < 1, "--num-networks must be at least 1"),
        (not args.widths or min(args.widths) < 4 or max(args.widths) > 16384, "--widths must be 4 to 16384 each"),
        (list(args.widths) != sorted(set(args.widths)), "--widths must be given in increasing order"),
        (not args.etas, "--etas needs at least one value"),
        (not all(map(math.isfinite, numbers)), "etas, td error and row norm must be finite"),
        (min(args.etas, default=2) <= 1, "--etas must be above 1 each, as Theorem 2 asks"),
        (not 0 <= args.gamma <= 1, "--gamma must be between 0 and 1"),
        (args.td_error <= 0, "--td-error must be above 0"),
        (args.row_norm <= 0, "--row-norm must be above 0"),
        (not 2 <= args.states <= 50, "--states must be 2 to 50"),
        (not 1 <= args.features <= 32, "--features must be 1 to 32"),
        (args.lanczos_steps < 2, "--lanczos-steps must be at least 2"),
        (args.out.endswith(("/", os.sep)), "--out must end in a name, as in results/name"),
        (not can_write(os.path.dirname(args.out or "runs/x")), "cannot write there: choose another --out"),
    ]:
        if bad:
            print(f"td_stability.py: error: {message}", file=sys.stderr)
            sys.exit(2)


def main(args):
    check(args)
    torch.set_num_threads(1)  # the tensors are small: threads would wait for each other more than they help
    prefix = args.out or f"runs/Baird__td_stability__{args.seed}__{int(time.time())}/td_stability"
    os.makedirs(os.path.dirname(prefix) or ".", exist_ok=True)
    rows, problems = measure(args)
    generator = torch.Generator().manual_seed(args.seed)
    directions, deviations = {}, {}
    for name, problem in problems.items():
        directions[name], deviations[name] = split_in_directions(args, problem, generator)

    table = summarise(args, rows, deviations)
    header = ("statement", "where", "quantity", "k", "eta", "mean", "low", "high")
    values = [(*row[:5], row[5].mean().item(), row[5].min().item(), row[5].max().item()) for row in rows]
    write_csv(f"{prefix}.csv", [header, *values])
    write_csv(f"{prefix}_table.csv", table)
    draw(args, f"{prefix}.png", rows, directions, deviations)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"k^p: fit to the largest of {args.num_networks} networks over the upper half of the widths")
    print("NO: above the bound, or a power more than 0.25 above the bound's")
    print(f"written: {prefix}.png, {prefix}.csv, {prefix}_table.csv")


if __name__ == "__main__":
    main(tyro.cli(Args))
