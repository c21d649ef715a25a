"""What bf16 changes in a saved agent of pqn_atari_envpool.py: its Q-values, its greedy actions, its gradient.

    python benchmark/precision_error.py runs/Breakout-v5__pqn_atari_envpool__1__1700000000 [RUN_FOLDER ...]

The agent plays on for some rollouts. On the last one its network computes once in fp32 and once in bf16, with the same
weights, actions and targets; a line of a table for each run says how far apart they are:

    Q            mean of max_a Q(s, a) and its standard deviation over states, in fp32
    gap          median over states of Q(best action) − Q(second best)
    error        root mean square of Q in bf16 − Q in fp32
    other action share of states in which the greedy action differs, and the mean Q that is lost there
    weights      of the gradient: Σ|g_bf16 − g_fp32|² over the minibatches of one epoch, as a share of
                 Σ|g_fp32 − mean g_fp32|², which is what differs between minibatches anyway
    biases       the same of the biases, and of LayerNorm's scales and shifts
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pqn_atari_envpool as script  # noqa: E402

ROLLOUTS = 10


def measure(folder, precisions=("fp32", "bf16")):
    """The figures of a run's line, as numbers."""
    checkpoint = script.load_checkpoint(folder)
    args = replace(script.Args(**checkpoint["args"]), num_eval_envs=0, update_epochs=1)
    device = script.pick_device(args.device)
    envs = script.make_envs(args, args.num_envs, (args.seed, checkpoint["step"], 1 << 40))  # no stream of training
    torch.manual_seed(args.seed)
    networks = []
    for precision in precisions:
        network = script.QNetwork(*script.spaces(envs), replace(args, precision=precision)).to(device)
        network.load_state_dict(checkpoint["network"])
        networks.append(network.eval())
    collector = script.Collector(envs, networks[0], args, device)
    for _ in range(ROLLOUTS):
        (obs, actions, values, rewards, terminated, truncated, real), *_ = collector.collect(args.end_e)
    targets = script.q_lambda_targets(rewards, values, terminated, truncated, args.gamma, args.q_lambda)
    with torch.no_grad():
        exact, rounded = (torch.cat([network(x) for x in obs]) for network in networks)
    best, second = exact.topk(2).values.T
    chosen = rounded.argmax(1, keepdim=True)
    other = chosen.squeeze(1) != exact.argmax(1)
    figures = {
        "Q": best.mean(),
        "Q, σ": best.std(),
        "gap": (best - second).median(),
        "error": (rounded - exact).square().mean().sqrt(),
        "other action": other.float().mean(),
        "Q lost there": (best - exact.gather(1, chosen).squeeze(1)).sum() / other.sum().clamp(min=1),
    }
    gradients = ([], [])
    for _, minibatch in script.minibatches((obs, actions, targets, real), args):
        for network, mine in zip(networks, gradients, strict=True):
            network.train().zero_grad()
            script.td_loss(network, *minibatch, args.l2_coef)[0].backward()
            mine.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    exact, rounded = map(torch.stack, gradients)
    is_weight = torch.cat([torch.full((p.numel(),), p.dim() > 1) for p in networks[0].parameters()]).to(device)
    for name, part in (("weights", is_weight), ("biases", ~is_weight)):
        error, noise = rounded - exact, exact - exact.mean(0)
        figures[name] = error[:, part].double().square().sum() / noise[:, part].double().square().sum()
    return {name: float(figure) for name, figure in figures.items()}


def main(folders):
    if not folders or folders[0].startswith("-"):
        script.fail("usage: precision_error.py RUN_FOLDER ...")
    script.keep_freed_memory()
    for i, folder in enumerate(folders):
        figures = measure(folder)
        if i == 0:
            print("|", " | ".join(["run", *figures]), "|\n" + "| --- " * (len(figures) + 1) + "|")
        print("|", " | ".join([Path(folder).resolve().name, *(f"{x:.3g}" for x in figures.values())]), "|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
