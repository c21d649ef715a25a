"""Baird's counterexample: where TD learning diverges, what LayerNorm changes, and how much ℓ² is left to add.

    python baird.py                            # every approximator, 10 seeds: figure and tables
    python baird.py --sampled                  # sampled transitions with importance weights, not expected updates
    python baird.py --activation tanh --width 32 --l2 0.01 0.25

The setting is Section 5.1, Fig. 5a, of "Simplifying Deep Temporal Difference Learning" (Gallici et al., ICLR 2025),
whose equation numbers are used here. Every reward is 0, so the true value is 0 in all seven states, and the value error
is the root mean square of V over them. (ℓ² pulls towards 0 too: here it costs no accuracy, elsewhere it does.)

A run ends in one of three ways. *Diverged at update N*: |V| reached 1e12 in some state, or overflowed, at update N.
*Converged*: the value error is below 0.01 throughout the last tenth of the updates. *Bounded*: neither, so it may still
be on its way when the updates end.

Three predictions are measured along each run, from its weights at that moment; above 0 they say "will diverge":
    SEEM       (Yue et al., NeurIPS 2023) the largest real part among the eigenvalues of γG(X*, X) − G(X, X), where G
               holds the inner products of ∇V. It knows nothing of ℓ², and is claimed for late, not for initial weights.
    Jacobian   the same of J = d(expected update)/dφ, ℓ² included: above 0, this φ repels in some direction.
    criterion  max vᵀJv over all v of norm 1: the paper's own. Below 0 everywhere it is sufficient for stability;
               it is not necessary, so a value above 0 predicts nothing by itself.
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

# What an option may be, which check() enforces: the words for the error, the test
Count = Annotated[int, "at least 1", lambda x: x >= 1]
Share = Annotated[float, "in [0, 1]", lambda x: 0 <= x <= 1]
Positive = Annotated[float, "positive and finite", lambda x: 0 < x < math.inf]
Sweep = Annotated[
    tuple[float, float, int],
    "LOWEST HIGHEST COUNT with 0 < LOWEST <= HIGHEST <= 1e6 and 0 <= COUNT <= 100",
    lambda sweep: 0 < sweep[0] <= sweep[1] <= 1e6 and 0 <= sweep[2] <= 100,
]

NETWORKS = ("linear", "MLP", "LayerNorm")
LIMIT = 1e12  # a run has diverged once |V| reaches this
TOLERANCE = 0.01  # a run has converged if its value error stays below this
FLOOR = 1e-9  # a run is over once |V| is below this in every state


@dataclass
class Args:
    seed: Annotated[int, "in [0, 2^62)", lambda x: 0 <= x < 2**62] = 1
    """the first seed: the runs use seed, seed + 1, ..."""
    num_seeds: Count = 10
    """how many seeds, all of them in one batch"""
    updates: Count = 20000
    """updates per run"""
    step_size: Positive = 0.01
    """the constant step size"""
    gamma: Share = 0.99
    """the discount factor"""
    sampled: bool = False
    """follow the behaviour policy and weight each transition by importance, instead of taking expected updates"""
    width: Annotated[int, "2 to 256 (the Jacobian has 9 columns for each)", lambda x: 2 <= x <= 256] = 64
    """hidden units k of the two networks"""
    activation: Literal["gelu", "relu", "tanh", "elu", "identity"] = "gelu"
    """sigma_Post of Eq. 5, and the MLP's activation; sigma_Pre is the identity"""
    m_scale: Annotated[float, "positive, at most 1e6", lambda x: 0 < x <= 1e6] = 1.0
    """the initial M of both networks is multiplied by this"""
    l2: Annotated[tuple[float, ...], "0 to 1e6 each", lambda l2: all(0 <= x <= 1e6 for x in l2)] = (0.01,)
    """coefficients of l2 on the last layer, a row of the table for each approximator and coefficient"""
    eta: Annotated[float, "in [1, 1e6]", lambda x: 1 <= x <= 1e6] = 1.1
    """eta of Eq. 9: l2 of eta (gamma L / 2)^2 on w and of eta - 1 on M"""
    sweep: Sweep = (0.001, 10.0, 17)
    """lowest and highest l2 of the sweep on the last layer, and how many (0: no sweep)"""
    probes: Annotated[tuple[int, ...], "not negative each", lambda x: min(x, default=0) >= 0] = (0, 40, 1000, 20000)
    """updates after which the predictions are tabulated; for those beyond the last update, the last one"""
    out: Annotated[str, "a name, as in results/name", lambda x: not x.endswith("/")] = ""
    """where figure and tables go: "results/baird" makes results/baird.png and so on; default: a folder in runs"""


# -------------------------------------------------------------------------------- the problem and its approximators


def features():
    """(7, 8): states 1 to 6 are 2e_i + e_8, state 7 is e_7 + 2e_8."""
    x = 2 * torch.eye(7, 8, dtype=torch.float64)
    x[:, 7] = 1
    x[6, 6], x[6, 7] = 1, 2
    return x


def initial_weights(network, width, m_scale, generator):
    """φ, (P,): the networks' start is [w, Vec(M)]."""
    if network == "linear":  # the literature's start, the same for every seed
        return torch.tensor([1, 1, 1, 1, 1, 1, 10, 1], dtype=torch.float64)
    m = torch.randn(8 * width, generator=generator, dtype=torch.float64) / 8**0.5
    w = torch.randn(width, generator=generator, dtype=torch.float64)
    return torch.cat([w if network == "LayerNorm" else w / width**0.5, m_scale * m])


def values(network, activation, phi):
    """V of the seven states for any number of weight vectors φ = [w, Vec(M)] at once: (..., P) -> (..., 7)."""
    x = features()
    if network == "linear":
        return phi @ x.T
    width = phi.shape[-1] // 9
    w, m = phi[..., :width], phi[..., width:].unflatten(-1, (width, 8))
    hidden = x @ m.mT
    if network == "LayerNorm":  # Eq. 6: with its 1/√k, the hidden layer's norm is at most 1
        hidden = hidden - hidden.mean(-1, keepdim=True)
        hidden = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt() / width**0.5
    if activation != "identity":
        hidden = getattr(torch.nn.functional, activation)(hidden)
    return (hidden @ w.unsqueeze(-1)).squeeze(-1)  # Eq. 5


def td_update(network, activation, phi, gamma, weight=1 / 7):
    """V, and the semi-gradient of Eq. 2: Σ_s weight(s) [γV(s′) − V(s)] ∇V(s).

    The target policy always takes "solid", to state 7. The vector-Jacobian product leaves the gradient of the target
    out, and keeps the runs of a batch apart.
    """
    v, pull_back = torch.func.vjp(lambda phi: values(network, activation, phi), phi)
    return v, pull_back(weight * (gamma * v[..., 6:] - v))[0]


def sampled_weight(state, next_state):
    """One transition as a weight on its state, (...) -> (..., 7), in the mean the expected update's 1/7.

    The behaviour policy takes "solid" with probability 1/7, else "dashed", to one of states 1 to 6. So the next state
    is uniform over all seven, and "solid" was taken just where it is state 7: importance weight 1/(1/7), else 0.
    """
    return 7.0 * torch.nn.functional.one_hot(state.long(), 7) * (next_state == 6).unsqueeze(-1)


# -------------------------------------------------------------------------------------------- the three predictions


def seem(network, activation, phi, gamma):
    """λ_max of γG(X*, X) − G(X, X), (runs, P) -> (runs,); X* is state 7 for every state of X."""
    gradients = torch.func.vmap(torch.func.jacrev(lambda phi: values(network, activation, phi)))(phi)
    gram = gradients @ gradients.mT
    return largest(torch.linalg.eigvals, gamma * gram[:, 6:] - gram)


def jacobian(network, activation, phi, gamma, l2):
    """J = d(expected update)/dφ with its ℓ² term, for one φ: (P,) -> (P, P)."""
    mean_update = torch.func.jacfwd(lambda phi: td_update(network, activation, phi, gamma)[1])
    return mean_update(phi) - torch.diag(l2)


def largest(eigenvalues, matrices):
    """The largest real part of the eigenvalues of each matrix, (runs, n, n) -> (runs,); NaN if it is not finite."""
    finite = matrices.isfinite().all(-1).all(-1)
    found = torch.full(finite.shape, math.nan, dtype=torch.float64)
    found[finite] = eigenvalues(matrices[finite]).real.amax(-1)
    return found


def linear_threshold(gamma):
    """The ℓ² above which the linear approximator is stable: the largest real part among its Jacobian's eigenvalues,
    in closed form. At γ = 0.99 it is 0.239; it is positive, so that without ℓ² TD diverges, just if γ > 15/17."""
    b = 17 * gamma - 15
    return (b + math.sqrt(max(0.0, b * b - 104 * (1 - gamma)))) / 14


# ------------------------------------------------------------------------------------------------- running them


class Row(NamedTuple):
    """One approximator with its ℓ², run with every seed."""

    name: str
    network: str
    l2_w: float  # on the last layer
    l2_M: float
    swept: bool = False  # a point of the sweep rather than a curve


def table_rows(args, network):
    low, high, count = args.sweep
    grid = torch.logspace(math.log10(low), math.log10(high), count, dtype=torch.float64).tolist()
    rows = [Row(network, network, 0.0, 0.0)]
    rows += [Row(f"{network} + l2 {l2:.3g}", network, l2, 0.0) for l2 in args.l2]
    if network == "LayerNorm":
        rows.append(Row("LayerNorm + Eq. 9, w only", network, args.eta * eq9_bound(args), 0.0))
        rows.append(Row("LayerNorm + Eq. 9", network, args.eta * eq9_bound(args), args.eta - 1))
    return rows + [Row(f"{network} + l2 {l2:.3g}, swept", network, l2, 0.0, True) for l2 in grid]


def lipschitz(activation):
    """L_Post, the steepest slope: 1, but for GELU the one at √2, Φ(√2) + √2 φ(√2) = 1.129."""
    return (1 + math.erf(1)) / 2 + math.exp(-1) / math.pi**0.5 if activation == "gelu" else 1.0


def eq9_bound(args):
    """(γL/2)²: Eq. 9's coefficient of w at η = 1, as its proof (Appendix B.3) derives it."""
    return (args.gamma * lipschitz(args.activation) / 2) ** 2


def train(args, network, phi, l2, visited, points):
    """All runs at once: φ and ℓ² are (runs, P), visited (runs, updates + 2) holds the states if they are sampled.

    Returns φ at `points`, (points, runs, P), NaN once a run has diverged, and the update at which it did, -1 if it did
    not. A run that is over leaves the batch.
    """
    runs, path, diverged_at = torch.arange(len(phi)), [], torch.full((len(phi),), -1)
    latest, weight = phi.clone(), 1 / 7
    for update in range(args.updates + 1):
        if args.sampled:
            weight = sampled_weight(visited[runs, update], visited[runs, update + 1])
        v, direction = td_update(network, args.activation, phi, args.gamma, weight)
        largest = v.abs().amax(-1)
        diverged = ~(largest < LIMIT)  # true for the NaN that follows an overflow
        going_on = ~diverged & (largest >= FLOOR)
        if update in points or not going_on.all():
            latest[runs] = torch.where(diverged.unsqueeze(-1), math.nan, phi)
            diverged_at[runs[diverged]] = update
            runs, phi, l2, direction = runs[going_on], phi[going_on], l2[going_on], direction[going_on]
        if update in points:
            path.append(latest.clone())
        if not len(runs):
            break
        phi = phi + args.step_size * (direction - l2 * phi)  # Eq. 1 with Eq. 9's regulariser
    return torch.stack(path + [latest] * (len(points) - len(path))), diverged_at


def run_network(args, network, rows, points):
    """All rows of a network with all seeds in one batch: φ at `points` (points, rows, seeds, P), diverged_at (rows,
    seeds), ℓ² (rows, P). The linear approximator starts alike with every seed: unless sampled, one run is all."""
    seeds = 1 if network == "linear" and not args.sampled else args.num_seeds
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(seeds)]
    start = torch.stack([initial_weights(network, args.width, args.m_scale, generator) for generator in generators])
    last = 8 if network == "linear" else args.width  # the size of the last layer
    l2 = [[row.l2_w] * last + [row.l2_M] * (start.shape[1] - last) for row in rows]
    l2 = torch.tensor(l2, dtype=torch.float64)
    visited = None
    if args.sampled:
        size = (args.updates + 2,)
        visited = torch.stack([torch.randint(7, size, generator=g, dtype=torch.uint8) for g in generators])
        visited = visited.repeat(len(rows), 1)
    phi = start.repeat(len(rows), 1)
    path, diverged_at = train(args, network, phi, l2.repeat_interleave(seeds, 0), visited, points)
    return path.unflatten(1, (len(rows), seeds)), diverged_at.unflatten(0, (len(rows), seeds)), l2


def value_errors(args, network, path):
    error = values(network, args.activation, path).square().mean(-1).sqrt()
    return error.nan_to_num(nan=LIMIT).clamp(FLOOR, LIMIT)


def outcome(args, row, errors, seems, diverged_at, points):
    """How a row's seeds ended, in numbers and in words; errors and seems are (points, seeds)."""
    at = diverged_at[diverged_at >= 0].tolist()
    converged = int((errors[[point >= 0.9 * args.updates for point in points]].amax(0) < TOLERANCE).sum())
    counts = {"diverged": len(at), "bounded": len(diverged_at) - len(at) - converged, "converged": converged}
    words = [f"{count} {kind}" for kind, count in counts.items() if count]
    if at:
        words[0] += f" at update {min(at):,}" + f" to {max(at):,}" * (min(at) < max(at))
    result = row._asdict() | {"seeds": len(diverged_at)} | counts | {"ended": ", ".join(words)}
    result |= spread("error", errors[-1]) | {"largest_error": errors.max().item()}
    if row.swept:
        return result | {"SEEM > 0 late": ""}
    late = seems[[point >= args.updates / 2 for point in points]]
    return result | {"SEEM > 0 late": int((late > 1e-6).any(0).sum())}  # seeds, at some point of the second half


def predict(args, row, l2, phi, diverged_at, update):
    """What each prediction says of the seeds that are still running at an update, and of how many it is wrong."""
    running = ~phi.isnan().any(-1)
    js = torch.stack([jacobian(row.network, args.activation, one, args.gamma, l2) for one in phi[running]])
    line = {"name": row.name, "update": update, "running": len(js)}
    for name, value in (
        ("SEEM", seem(row.network, args.activation, phi[running], args.gamma)),
        ("Jacobian", largest(torch.linalg.eigvals, js)),
        ("criterion", largest(torch.linalg.eigvalsh, (js + js.mT) / 2)),
    ):
        positive = value > 1e-6  # not 0, as weights that no V depends on have eigenvalue 0, up to rounding
        line[f"{name} > 0"] = int(positive.sum())
        line[f"{name} wrong"] = int((positive != (diverged_at[running] >= 0)).sum())
        line |= spread(name, value)
    return line


def spread(name, value):
    """The median, of an even number the lower middle one so that no diverged run is averaged in, and the range."""
    value = value[~value.isnan()]
    found = [value.median().item(), value.min().item(), value.max().item()] if len(value) else [""] * 3
    return dict(zip((f"{name}_median", f"{name}_low", f"{name}_high"), found, strict=True))


# -------------------------------------------------------------------------------------------------------- main


def main(args):
    check(args)
    prefix = open_results(args.out or f"runs/Baird__baird__{args.seed}__{time.time_ns() // 1_000_000}/baird")
    torch.set_num_threads(1)  # the tensors are small: threads would wait for each other more than they help
    probes = {min(probe, args.updates) for probe in args.probes}
    points = probes | {round(i / 50 * args.updates) for i in range(51)}
    points = sorted(points | {round(args.updates ** (i / 50)) for i in range(51)})  # dense at the beginning

    table, predictions, drawn = [], [], []
    for network in NETWORKS:
        rows = table_rows(args, network)
        path, diverged_at, l2 = run_network(args, network, rows, points)
        for i, row in enumerate(rows):
            errors = value_errors(args, network, path[:, i])
            seems = torch.empty(0)
            if not row.swept:
                seems = seem(network, args.activation, path[:, i].flatten(0, 1), args.gamma).view_as(errors)
            table.append(outcome(args, row, errors, seems, diverged_at[i], points))
            if not row.swept:
                drawn.append((table[-1], errors, seems))
                for point in sorted(probes):
                    phi = path[points.index(point), i]
                    if not phi.isnan().all():
                        predictions.append(predict(args, row, l2[i], phi, diverged_at[i], point))

    settings = "seed num_seeds updates step_size gamma sampled width activation m_scale eta".split()
    settings = {name: getattr(args, name) for name in settings}
    write_csv(f"{prefix}.csv", [row | settings for row in table])
    write_csv(f"{prefix}_predictions.csv", [row | settings for row in predictions])
    draw(args, f"{prefix}.png", points, table, drawn)
    show([row for row in table if not row["swept"]], "name l2_w l2_M ended error_median largest_error".split())
    show(predictions, ["name", "update", "running", "SEEM > 0", "Jacobian > 0", "criterion > 0"])
    for network in NETWORKS:
        rows = [row for row in table if row["swept"] and row["network"] == network]
        if rows:
            stable, converged = (from_which_on(rows, name) for name in ("diverged", "converged"))
            print(f"{network}, {args.updates:,} updates: no seed diverges {stable}, all converge {converged}")
    print(f"linear, however many small steps: stable with l2 above {linear_threshold(args.gamma):.5f}")
    print(f"written: {prefix}.png, {prefix}.csv, {prefix}_predictions.csv")


# ------------------------------------------------------------------------------------------------- bookkeeping


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


def text(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerows([rows[0].keys(), *(map(text, row.values()) for row in rows)] if rows else [])


def show(rows, columns):
    """Rows as columns of equal width."""
    cells = [columns] + [[text(row[column]) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()


def from_which_on(rows, end):
    """The smallest l2 of a sweep from which on no seed diverged, or all converged."""
    found = "nowhere in the sweep"
    for row in reversed(rows):
        if row[end] != (row["seeds"] if end == "converged" else 0):
            break
        found = f"from l2 {row['l2_w']:.3g} on"
    return found


def draw(args, path, points, table, drawn):
    """Left: Fig. 5a. Middle: SEEM along the runs. Right: the sweep of ℓ²."""
    colours = {"linear": "#D55E00", "MLP": "#0072B2", "LayerNorm": "#009E73"}  # distinct for colour-blind eyes too
    plt.switch_backend("Agg")  # into a file, screen or not
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 6), layout="constrained")
    for row, errors, seems in drawn:
        name, colour = row["name"], colours[row["network"]]
        style = "-" if name == row["network"] else ":" if "only" in name else "-." if "Eq. 9" in name else "--"
        label = f"{name}: {row['diverged']}/{row['seeds']} diverged".replace("l2", "$\\ell^2$")
        left.plot(points, errors, color=colour, linewidth=0.5, alpha=0.35)
        left.plot(points, errors.median(-1).values, style, color=colour, linewidth=2.2, label=label)
        if name in (*NETWORKS, "LayerNorm + Eq. 9"):
            middle.plot(points, seems, style, color=colour, linewidth=0.6, alpha=0.5)
            middle.plot(points, seems.nanmedian(-1).values, style, color=colour, linewidth=2.2, label=name)
    for network, colour in colours.items():
        rows = [row for row in table if row["swept"] and row["network"] == network]
        for end, style in (("diverged", "o-"), ("converged", "s--")):
            share, label = [row[end] / row["seeds"] for row in rows], f"{network}: {end}"
            right.plot([row["l2_w"] for row in rows], share, style, color=colour, fillstyle="none", label=label)
    exact, bound = linear_threshold(args.gamma), eq9_bound(args)
    right.axvline(exact, color=colours["linear"], linestyle=":", label=f"linear, exactly: stable above {exact:.3f}")
    right.axvline(bound, color="black", linestyle=":", label=f"Eq. 9 at $\\eta$ = 1: {bound:.3f}")
    left.axhline(TOLERANCE, color="grey", linewidth=1, linestyle=":")
    middle.axhline(0, color="black", linewidth=1)
    kind = "sampled transitions" if args.sampled else "expected updates"
    left.set(title=f"Baird's counterexample, {kind}: each run, and the median", xlabel="updates", yscale="log")
    left.set(ylim=(FLOOR / 3, LIMIT * 3), ylabel="value error (RMS over the 7 states)")
    middle.set_xscale("symlog", linthresh=1)
    middle.set_yscale("symlog", linthresh=0.1)
    middle.set(title="SEEM of the runs that have not diverged, and its median", xlabel="updates")
    middle.set(xlim=(0, args.updates), ylim=(-10, 100), ylabel="SEEM (above 0 predicts divergence)")
    right.set(title=f"How the seeds end after {args.updates:,} updates", xscale="log")
    right.set(xlabel="$\\ell^2$ coefficient on the last layer", ylabel="share of the seeds")
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=2)
    figure.savefig(path, dpi=85)
    plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Args))
