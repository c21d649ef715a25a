"""Baird's counterexample: where TD learning diverges, what LayerNorm changes, and how much ℓ² is left to add.

    python baird.py                            # every approximator, 10 seeds: figure, table, curves
    python baird.py --sampled                  # sampled transitions with importance weights, not expected updates
    python baird.py --activation relu --width 32 --l2 0.01 0.25
    tensorboard --logdir runs

The setting is Section 5.1, Fig. 5a, of "Simplifying Deep Temporal Difference Learning" (Gallici et al., ICLR 2025),
whose equation numbers are used here. Every reward is 0, so the true value is 0 in all seven states, and the value error
is the root mean square of V over them. (ℓ² pulls towards 0 too: here it costs no accuracy, elsewhere it does.)

A run ends in one of three ways. *Diverged at update N*: |V| reached --limit in some state, or overflowed, at update N.
*Converged*: the value error is below --tolerance throughout the last tenth of the updates. *Bounded*: neither, so it
may still be on its way when the updates end. Means over seeds count an error above --limit as --limit.

Two predictions are made from the initial weights; above 0 means "will diverge", and the table counts the seeds that end
otherwise. *Jacobian*: the largest real part among the eigenvalues of d(expected update)/d(weights), with its ℓ² term.
*SEEM* (Yue et al., NeurIPS 2023): that of γG(X*, X) − G(X, X), where G holds the inner products of ∇V; it has no ℓ².
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
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    seed: int = 1
    """the first seed: the runs use seed, seed + 1, ..."""
    num_seeds: int = 10
    """how many seeds, all of them in one batch"""
    updates: int = 20000
    """updates per run"""
    step_size: float = 0.01
    """the constant step size"""
    gamma: float = 0.99
    """the discount factor"""
    sampled: bool = False
    """follow the behaviour policy and weight each transition by importance, instead of taking expected updates"""
    width: int = 64
    """hidden units k of the two networks"""
    activation: Literal["gelu", "relu", "tanh", "elu", "identity"] = "gelu"
    """sigma_Post of Eq. 5, and the MLP's activation; sigma_Pre is the identity"""
    l2: tuple[float, ...] = (0.01,)
    """coefficients of l2 on the last layer, a row of the table for each approximator and coefficient"""
    eta: float = 1.1
    """eta of Eq. 9, the last row: l2 of eta (gamma L / 2)^2 on w and of eta - 1 on M"""
    last_layer_only: bool = False
    """leave Eq. 9's l2 on M out"""
    sweep: tuple[float, float, int] = (0.001, 10.0, 17)
    """lowest and highest l2 of the sweep on the last layer, and how many (0: no sweep)"""
    tolerance: float = 0.01
    """a run has converged if its value error is below this throughout the last tenth of the updates"""
    limit: float = 1e12
    """a run has diverged once |V| reaches this; larger errors are written as this"""
    floor: float = 1e-9
    """a run below this value error has ended; smaller errors are written as this"""
    out: str = ""
    """where figure and tables go: "results/baird" makes results/baird.png and so on; default: the run folder"""


class Row(NamedTuple):
    """A row of the table, for all seeds."""

    name: str
    network: str
    l2_last_layer: float
    l2_M: float
    swept: bool  # a point of the right panel rather than a curve of the left one


# -- The problem and its approximators


def features():
    """(7, 8): states 1 to 6 are 2e_i + e_8, state 7 is e_7 + 2e_8."""
    x = 2 * torch.eye(7, 8, dtype=torch.float64)
    x[:, 7] = 1
    x[6, 6], x[6, 7] = 1, 2
    return x


def initial_weights(network, width, generator):
    """φ, (P,): the networks' start is [w, Vec(M)]."""
    if network == "linear":  # the literature's start, the same for every seed
        return torch.tensor([1, 1, 1, 1, 1, 1, 10, 1], dtype=torch.float64)
    m = torch.randn(8 * width, generator=generator, dtype=torch.float64) / 8**0.5
    w = torch.randn(width, generator=generator, dtype=torch.float64)
    return torch.cat([w if network == "LayerNorm" else w / width**0.5, m])


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


def lipschitz(activation):
    """L_Post, the steepest slope: 1, but for GELU the one at √2, Φ(√2) + √2 φ(√2) = 1.129."""
    return (1 + math.erf(1)) / 2 + math.exp(-1) / math.pi**0.5 if activation == "gelu" else 1.0


def table_rows(args):
    low, high, count = args.sweep
    grid = torch.logspace(math.log10(low), math.log10(high), count, dtype=torch.float64).tolist() if count else []
    # Eq. 9 is printed with γ^(L/2); its proof derives (γL/2)², which is meant.
    eq9 = args.eta * (args.gamma * lipschitz(args.activation) / 2) ** 2
    rows = []
    for network in ("linear", "MLP", "LayerNorm"):
        rows.append(Row(network, network, 0.0, 0.0, False))
        rows += [Row(f"{network} + l2 {l2:.3g}", network, l2, 0.0, False) for l2 in args.l2]
        if network == "LayerNorm" and args.last_layer_only:
            rows.append(Row("LayerNorm + Eq. 9, w only", network, eq9, 0.0, False))
        elif network == "LayerNorm":
            rows.append(Row("LayerNorm + Eq. 9", network, eq9, args.eta - 1, False))
        rows += [Row(f"{network} + l2 {l2:.3g}", network, l2, 0.0, True) for l2 in grid]
    return rows


# -- Running them


def train(args, network, phi, l2, visited, points):
    """All runs at once: φ and ℓ² are (runs, P), visited (runs, updates + 2) holds the states if they are sampled.

    Returns the value errors (points, runs), and the update at which each run diverged, -1 if it did not. A run that has
    diverged or come below the floor leaves the batch.
    """
    runs, curve = torch.arange(len(phi)), []
    error, diverged_at = torch.zeros(len(phi), dtype=torch.float64), torch.full((len(phi),), -1)
    weight = 1 / 7
    for update in range(args.updates + 1):
        if args.sampled:
            weight = sampled_weight(visited[runs, update], visited[runs, update + 1])
        v, direction = td_update(network, args.activation, phi, args.gamma, weight)
        over = ~(v.abs().amax(-1) < args.limit)  # true for the NaN that follows an overflow
        if over.any():
            diverged_at[runs[over & (diverged_at[runs] < 0)]] = update
        if update in points:
            error[runs] = v.square().mean(-1).sqrt().clamp(args.floor, args.limit)
            error[diverged_at >= 0] = args.limit
            curve.append(error.clone())
            keep = (diverged_at[runs] < 0) & (error[runs] > args.floor)
            runs, phi, l2, direction = runs[keep], phi[keep], l2[keep], direction[keep]
            if not len(runs):
                break
        phi = phi + args.step_size * (direction - l2 * phi)  # Eq. 1 with Eq. 9's regulariser
    return torch.stack(curve + [error] * (len(points) - len(curve))), diverged_at


def mean_path_jacobian(network, activation, phi, gamma):
    """d(expected update)/dφ without ℓ², for one φ: (P,) -> (P, P)."""
    return torch.func.jacfwd(lambda phi: td_update(network, activation, phi, gamma)[1])(phi)


def seem(network, activation, phi, gamma):
    """The largest real part among the eigenvalues of γG(X*, X) − G(X, X); X* is state 7 for every state of X."""
    gradients = torch.func.jacrev(lambda phi: values(network, activation, phi))(phi)
    gram = gradients @ gradients.T
    return torch.linalg.eigvals(gamma * gram[6:] - gram).real.max().item()


def run_network(args, network, rows, points):
    """All rows of a network with all seeds in one batch: the value errors (points, rows, seeds), a result per row."""
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(args.num_seeds)]
    start = torch.stack([initial_weights(network, args.width, generator) for generator in generators])
    last = 8 if network == "linear" else args.width  # the size of the last layer
    l2 = [[row.l2_last_layer] * last + [row.l2_M] * (start.shape[1] - last) for row in rows]
    l2 = torch.tensor(l2, dtype=torch.float64)
    visited = None
    if args.sampled:
        shape = (args.updates + 2,)
        visited = torch.stack([torch.randint(7, shape, generator=g, dtype=torch.uint8) for g in generators])
        visited = visited.repeat(len(rows), 1)
    phi = start.repeat(len(rows), 1)
    errors, diverged_at = train(args, network, phi, l2.repeat_interleave(args.num_seeds, 0), visited, points)
    errors, diverged_at = errors.unflatten(1, (len(rows), -1)), diverged_at.unflatten(0, (len(rows), -1))

    jacobians = [mean_path_jacobian(network, args.activation, phi, args.gamma) for phi in start]
    seems = [seem(network, args.activation, phi, args.gamma) for phi in start]
    results = []
    for i, row in enumerate(rows):
        at = diverged_at[i][diverged_at[i] >= 0].tolist()
        converged = int((errors[-len(points) // 10 :, i].amax(0) < args.tolerance).sum())
        result = row._asdict()
        result |= {"diverged": len(at), "bounded": args.num_seeds - len(at) - converged, "converged": converged}
        result |= {"diverged_first": min(at, default=""), "diverged_last": max(at, default="")}
        end = errors[-1, i]
        result |= {"error_mean": end.mean().item(), "error_low": end.min().item(), "error_high": end.max().item()}
        if not row.swept:
            jacobian = [torch.linalg.eigvals(j - torch.diag(l2[i])).real.max().item() for j in jacobians]
            for prediction, value in (("jacobian", jacobian), ("seem", seems)):
                # Weights that no V depends on have eigenvalue 0, up to rounding.
                wrong = ((torch.tensor(value) > 1e-9) != (diverged_at[i] >= 0)).sum().item()
                result |= {prediction: sum(value) / args.num_seeds, f"{prediction}_wrong": wrong}
        results.append(result)
    return errors, results


# -- Reporting


def ending(row):
    """How a row's seeds ended, in words."""
    kinds = [kind for kind in ("diverged", "bounded", "converged") if row[kind]]
    words = [kind if len(kinds) == 1 else f"{row[kind]} {kind}" for kind in kinds]
    if row["diverged"]:
        first, last = row["diverged_first"], row["diverged_last"]
        words[0] += f" at update {first:,}" + f" to {last:,}" * (first < last)
    return ", ".join(words)


def print_tables(args, table):
    cells = [["approximator", "l2 on w, M", "how the seeds ended", "mean error", "Jacobian", "wrong", "SEEM", "wrong"]]
    for row in table:
        if not row["swept"]:
            cells.append([row["name"], f"{row['l2_last_layer']:.3g}, {row['l2_M']:.3g}", ending(row)])
            cells[-1] += [f"{row['error_mean']:.2g}", f"{row['jacobian']:+.3f}", f"{row['jacobian_wrong'] or '-'}"]
            cells[-1] += [f"{row['seem']:+.3f}", f"{row['seem_wrong'] or '-'}"]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print()
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"wrong: how many of the {args.num_seeds} seeds ended unlike the prediction\n")
    for network in dict.fromkeys(row["network"] for row in table if row["swept"]):
        answer, below = "none in the sweep", ""
        for row in table:
            if row["swept"] and row["network"] == network:
                if row["converged"] == args.num_seeds:
                    answer = f"{row['l2_last_layer']:.3g}{below}"
                    break
                below = f" ({row['l2_last_layer']:.3g} is too little)"
        print(f"smallest l2 with which all seeds converge in {args.updates:,} updates, {network}: {answer}")


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def draw(args, path, points, rows, errors):
    """Left: Fig. 5a, every seed thin and their mean thick. Right: the errors at the end over the sweep's ℓ²."""
    colours = {"linear": "#D55E00", "MLP": "#0072B2", "LayerNorm": "#009E73"}  # distinct for colour-blind eyes too
    plt.switch_backend("Agg")  # into a file, screen or not
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained", sharey=True)
    for row, error in zip(rows, errors, strict=True):
        if not row.swept:
            style = "-" if row.name == row.network else "-." if "Eq. 9" in row.name else "--"
            left.plot(points, error, color=colours[row.network], linewidth=0.5, alpha=0.4)
            left.plot(points, error.mean(-1), style, color=colours[row.network], linewidth=2.2, label=row.name)
    for network, marker in (("linear", "o-"), ("MLP", "s-"), ("LayerNorm", "^-")):
        swept = [i for i, row in enumerate(rows) if row.swept and row.network == network]
        if swept:
            l2, end = [rows[i].l2_last_layer for i in swept], torch.stack([errors[i][-1] for i in swept])
            right.plot(l2, end, color=colours[network], linewidth=0.5, alpha=0.4)
            right.plot(l2, end.mean(-1), marker, color=colours[network], linewidth=2.2, label=network)
    eq9 = (args.gamma * lipschitz(args.activation) / 2) ** 2
    right.axvline(eq9, color="black", linestyle=":", label=f"Eq. 9 at $\\eta$ = 1: $(\\gamma L/2)^2$ = {eq9:.3f}")
    for axes in (left, right):
        axes.axhline(args.tolerance, color="grey", linewidth=1, linestyle=":")
        axes.grid(alpha=0.25)
    kind = "sampled transitions" if args.sampled else "expected updates"
    left.set(title=f"Baird's counterexample, {kind}, {args.num_seeds} seeds", xlabel="updates")
    left.set(yscale="log", ylim=(args.floor / 3, args.limit * 3), ylabel="value error (RMS over the 7 states)")
    left.legend(fontsize=9, loc="center right", bbox_to_anchor=(1, 0.72))
    right.set(title=f"How much $\\ell^2$ each needs: the error after {args.updates:,} updates", xscale="log")
    right.set(xlabel="$\\ell^2$ coefficient on the last layer")
    right.legend(fontsize=9, loc="lower left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
    low, high, count = args.sweep
    numbers = [args.step_size, *args.l2, args.eta, low, high, args.tolerance, args.limit, args.floor]
    for bad, message in [
        (args.num_seeds < 1, "--num-seeds must be at least 1"),
        (args.updates < 1, "--updates must be at least 1"),
        (not 0 <= args.seed < 2**62, "--seed must be between 0 and 2^62"),
        (not 2 <= args.width <= 256, "--width must be 2 to 256: the Jacobian has 9 * width columns"),
        (not 0 <= args.gamma <= 1, "--gamma must be between 0 and 1"),
        (not all(map(math.isfinite, numbers)), "step size, l2, eta, sweep and the three thresholds must be finite"),
        (args.step_size <= 0, "--step-size must be above 0"),
        (not all(0 <= l2 <= 1e6 for l2 in args.l2), "--l2 must be between 0 and 1e6"),
        (not 0 <= args.eta <= 1e6, "--eta must be between 0 and 1e6, and Eq. 9 asks for more than 1"),
        (not 0 <= count <= 100, "--sweep takes 0 to 100 coefficients"),
        (not 0 < low <= high <= 1e6, "--sweep needs 0 < lowest <= highest <= 1e6"),
        (not 0 < args.floor < args.tolerance < args.limit <= 1e100, "needs 0 < floor < tolerance < limit <= 1e100"),
        (args.out.endswith(("/", os.sep)), "--out must end in a name, as in results/name"),
        (not can_write(os.path.dirname(args.out)), f"cannot write into the folder of --out {args.out}, choose another"),
        (not can_write("runs"), "cannot write into ./runs, where the TensorBoard file goes: start in another folder"),
    ]:
        if bad:
            print(f"baird.py: error: {message}", file=sys.stderr)
            sys.exit(2)


def main(args):
    check(args)
    torch.set_num_threads(1)  # the tensors are small: threads would wait for each other more than they help
    folder = f"runs/Baird__baird__{args.seed}__{int(time.time())}"
    prefix = args.out or f"{folder}/baird"
    os.makedirs(os.path.dirname(prefix) or ".", exist_ok=True)
    writer = SummaryWriter(folder)
    writer.add_text("hyperparameters", "|name|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in vars(args).items()))

    points = sorted({round(i * args.updates / 200) for i in range(201)})
    rows, errors, table = table_rows(args), [], []
    for network in ("linear", "MLP", "LayerNorm"):
        its_rows = [row for row in rows if row.network == network]
        print(f"{network}: {len(its_rows) * args.num_seeds} runs of {args.updates:,} updates", flush=True)
        its_errors, results = run_network(args, network, its_rows, points)
        errors += its_errors.unbind(1)  # each (points, seeds)
        table += results

    settings = "seed num_seeds updates step_size gamma sampled width activation tolerance limit floor".split()
    write_csv(f"{prefix}_table.csv", [{**row, **{name: getattr(args, name) for name in settings}} for row in table])
    curves = []
    for row, error in zip(rows, errors, strict=True):
        for update, seeds in zip(points, error, strict=True):
            if not row.swept:
                mean, low, high = seeds.mean().item(), seeds.min().item(), seeds.max().item()
                curves.append({"name": row.name, "update": update, "mean": mean, "low": low, "high": high})
                writer.add_scalar(f"value_error/{row.name}", mean, update)
    write_csv(f"{prefix}_curves.csv", curves)
    writer.close()
    draw(args, f"{prefix}.png", points, rows, errors)
    print_tables(args, table)
    print(f"\nwritten: {prefix}.png, {prefix}_table.csv, {prefix}_curves.csv; TensorBoard: {folder}")


if __name__ == "__main__":
    main(tyro.cli(Args))
