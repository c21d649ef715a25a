"""The CUDA paths on a machine without a GPU: on fake tensors of another device, and with graphs played by a CPU."""

import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.distributed.distributed_c10d as c10d
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pqn
import pqn_atari_envpool as atari
import pqn_atari_lstm as recurrent
import pqn_lstm
import pqn_vdn
import pqn_vdn_lstm

aten, OTHER = torch.ops.aten, torch.device("meta")
ONE_VALUE = aten._local_scalar_dense.default
READS = ONE_VALUE, aten.nonzero.default, aten.equal.default, aten.masked_select.default
STEPS, EPOCHS, MINIBATCHES = 3, 2, 2
TINY = dict(num_envs=4, num_steps=STEPS, num_eval_envs=1, num_minibatches=MINIBATCHES, update_epochs=EPOCHS)
tensors = lambda tree: [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ----------------------------------------------------------------------------- main() on tensors that hold nothing


class Device(TorchDispatchMode):
    """Watches fake tensors of another device. Answers what the host reads from it (everything is 1 there), counts how
    often the host waits for it and sends it something, and lets nothing else bring the two together."""

    def __init__(self):
        super().__init__()
        self.captured, self.waits, self.sent, self.kernels, self.on_its_way = False, 0, 0, 0, []

    def wait(self, what):
        assert not self.captured, f"{what} within what is captured"
        self.waits, self.on_its_way = self.waits + 1, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        seen = tensors((args, kwargs))
        if func in READS and seen[0].device == OTHER:
            self.wait(func)
        if func is ONE_VALUE:
            return True if seen[0].dtype == torch.bool else 1
        out = func(*args, **kwargs or {})
        if {x.device for x in seen + tensors(out)} == {OTHER}:
            self.kernels += launches(func, seen, out)
        elif any(x.device == OTHER for x in seen + tensors(out)):
            source, non_blocking = seen[-1], (*args[2:], (kwargs or {}).get("non_blocking"))
            assert func in (aten._to_copy.default, aten.copy_.default) and not self.captured, f"{func} mixes devices"
            if source.device == OTHER:
                assert not any(non_blocking), "the host does not wait for what it reads"
                self.wait(func)
            else:
                self.sent += 1
                self.on_its_way += [source] * any(non_blocking)
        return out

    def as_numpy(self, x):
        """What Tensor.numpy() gives to a script: zeros, for there are no values."""
        assert all(x is not other for other in self.on_its_way), "the host overwrites what is on its way to the device"
        return np.zeros(x.shape, str(x.dtype).removeprefix("torch."))


def launches(func, seen, out):
    """Whether this is a kernel: not a view, a question about a tensor, or the allocation of one."""
    given, made = ({x.untyped_storage()._cdata for x in tree} for tree in (seen, tensors(out)))
    view = not func._schema.is_mutable and given & made
    return func.namespace == "aten" and "empty" not in str(func) and not view


def watch(script, options, monkeypatch, rollouts=3):
    """Runs the script's main(). For every rollout but the first, how often the host waited and sent; and for each
    captured function how many kernels its calls launch."""
    device, kernels, counts, log = Device(), {}, [], script.Run.log

    def logged(*args):
        log(*args)
        counts.append((device.waits, device.sent))

    def capture(function, *_):
        def call(*args):
            assert all(x.device == OTHER for x in args), f"{function} is given tensors of the host"
            before, device.captured = device.kernels, True
            try:
                return function(*args)
            finally:
                device.captured = False
                kernels.setdefault(function.func.__name__, set()).add(device.kernels - before)

        return call

    class Network(script.QNetwork):
        def __init__(self, *args):
            with OTHER:
                super().__init__(*args)

    monkeypatch.setattr(script, "QNetwork", Network)
    monkeypatch.setattr(script, "pick_device", lambda name: OTHER)
    if not hasattr(script, "capture"):  # no graphs, but acting and a gradient step must not wait there either
        monkeypatch.setattr(script, "partial", lambda *args: capture(partial(*args)))
    else:
        monkeypatch.setattr(script, "capture", capture)
    monkeypatch.setattr(script.Run, "log", logged)
    monkeypatch.setattr(script.Run, "save", lambda *_: None)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, _: self)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.Tensor, "numpy", lambda x: device.as_numpy(x))
    monkeypatch.setattr(FakeTensor, "tolist", lambda x: np.ones(x.cpu().shape).tolist())
    for name in ("trunc_normal_", "orthogonal_"):
        monkeypatch.setattr(torch.nn.init, name, lambda x, **_: x)
    with FakeTensorMode(allow_non_fake_inputs=True), device:
        script.main(script.Args(**TINY | options, total_timesteps=4 * STEPS * rollouts))
    return np.diff(counts, axis=0), kernels


LAYER_NORM = {"norm_type": "layer_norm", "normalize_input": False}


@pytest.mark.parametrize(
    "script, options, sent_each_step, to_act, to_learn",
    [
        (pqn, {}, 1, 10, 68),
        (atari, {}, 1, 20, 91),
        (recurrent, {}, 2, 39, 234),
        (recurrent, {"memory_window": 2}, 2, 39, 281),
        (pqn_lstm, {}, 2, 30, 213),
        (pqn_lstm, {"memory_window": 2}, 2, 30, 251),
        (pqn_vdn, {}, 1, 22, 79),
        (pqn_vdn_lstm, LAYER_NORM, 2, 42, 221),
        (pqn_vdn_lstm, LAYER_NORM | {"memory_window": 2}, 2, 42, 264),
    ],
    ids="pqn atari atari-lstm atari-lstm-window lstm lstm-window teams teams-lstm teams-lstm-window".split(),
)
def test_the_host_waits_once_a_step_and_for_nothing_that_is_captured(
    script, options, sent_each_step, to_act, to_learn, monkeypatch
):
    counts, kernels = watch(script, options, monkeypatch)
    # It waits for the actions of each environment step, for each epoch's numbers of real transitions, to know whether
    # all is finite, and for the metrics. It sends the observations of each step (and where episodes start), the random
    # numbers of acting (2), what the environments returned (4), and the order of each epoch.
    assert counts.tolist() == 2 * [[STEPS + EPOCHS + 2, sent_each_step * STEPS + 6 + EPOCHS]]
    assert max(kernels["act"]) <= to_act and max(kernels["train_step"]) <= to_learn, kernels
    assert all(len(launched) == 1 for launched in kernels.values()), kernels  # every replay is the same


# ------------------------------------------------------------------------------------------- graphs played by a CPU


class Graph(TorchDispatchMode):
    """A CUDA graph on a CPU. Recording executes nothing that writes. replay() first puts garbage into all that the
    graph owns, which includes what it returned before, then runs the record on the very tensors of the recording."""

    def __init__(self):
        super().__init__()
        self.record, self.owned = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func not in READS, f"{func} within what is captured"
        if func._schema.is_mutable:
            self.record.append((func, args, kwargs, []))
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
            return next(given[a.name] for a in func._schema.arguments if a.alias_info and a.alias_info.is_write)
        before = [(x, x.clone()) for x in tensors((args, kwargs))] * ("batch_norm" in str(func))
        out = func(*args, **kwargs)
        for x, old in before:  # batch norm's running statistics, of which the schema knows nothing
            x.copy_(old)
        given, made = ({x.untyped_storage().data_ptr() for x in tensors(tree)} for tree in ((args, kwargs), out))
        if func.namespace == "aten" and not given & made:  # not a view
            self.record.append((func, args, kwargs, tensors(out)))
            self.owned += tensors(out)
        return out

    @torch.no_grad()
    def replay(self):
        for x in self.owned:
            x.fill_(torch.nan if x.is_floating_point() else 1)
        for func, args, kwargs, results in self.record:
            for result, x in zip(results, tensors(func(*args, **kwargs)), strict=bool(results)):
                result.copy_(x)


def graphs_on_a_cpu(script, monkeypatch):
    stream, cuda = SimpleNamespace(wait_stream=lambda _: None), SimpleNamespace(type="cuda")
    capture = script.capture
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)
    monkeypatch.setattr(F, "one_hot", lambda x, n: (x.unsqueeze(-1) == torch.arange(n)).long())  # a CPU's reads values
    monkeypatch.setattr(script, "capture", lambda function, args, _: capture(function, args, cuda))


@pytest.mark.parametrize(
    "script, options",
    [
        (atari, {"norm_type": "batch_norm"}),
        (atari, {"num_steps": 1, "anneal_lr": True}),
        (recurrent, {"memory_window": 2}),
    ],
)
def test_replayed_graphs_end_in_the_weights_and_metrics_of_plain_calls(script, options, monkeypatch):
    options = TINY | options
    options |= dict(env_id="Pong-v5", device="cpu", precision="fp32", end_e=0.1)
    options |= dict(total_timesteps=6 * 4 * options["num_steps"])  # from the fourth rollout on, targets are replayed
    weights, metrics, log = [], ([], []), script.Run.log
    for captured in (False, True):
        before = set(Path("runs").glob("*"))
        if captured:
            graphs_on_a_cpu(script, monkeypatch)
        watch = lambda *args, kept=metrics[captured]: (kept.append(args[-2].tolist()), log(*args))
        monkeypatch.setattr(script.Run, "log", watch)
        script.main(script.Args(**options))
        (folder,) = set(Path("runs").glob("*")) - before
        checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
        weights.append(torch.cat([w.double().flatten() for w in checkpoint["network"].values()]))
    assert torch.equal(*weights) and metrics[0] == metrics[1]


@pytest.mark.parametrize("script", [atari, recurrent])
def test_a_graph_writes_to_no_tensor_of_its_callers(script, monkeypatch):
    graphs_on_a_cpu(script, monkeypatch)
    double = script.capture(lambda x, y: (x * 2 + y).clone(), script.Args(), None)
    given = [(torch.full((3,), float(i)), torch.full((3,), 10.0 * i)) for i in range(8)]
    for i, (x, y) in enumerate(given):
        assert double(x, y).tolist() == [12.0 * i] * 3
    assert [(x.tolist(), y.tolist()) for x, y in given] == [([i] * 3, [10 * i] * 3) for i in range(8)]


@pytest.mark.parametrize("script", [atari, recurrent])
def test_what_is_recorded_has_been_called_with_the_same_layout_before(script, monkeypatch):
    """A compiled function compiles again for tensors of another layout, which a recording does not survive."""
    graphs_on_a_cpu(script, monkeypatch)
    strides = []
    seen = lambda x: strides.append(x.stride()) or x * 1
    double = script.capture(seen, script.Args(), None)
    for _ in range(5):
        double(torch.zeros(6, 8).chunk(2, dim=1)[0])
    assert len(strides) == 4 and len(set(strides)) == 1, strides


# ------------------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("gpus, backends", [(True, {"cpu": "gloo", "cuda": "nccl"}), (False, {"cpu": "gloo"})])
@pytest.mark.parametrize("script", [pqn, atari, recurrent, pqn_lstm, pqn_vdn, pqn_vdn_lstm])
def test_processes_can_be_on_cpus_where_there_are_gpus(script, gpus, backends, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(script.dist, "init_process_group", chosen := MagicMock())
    script.processes()
    assert c10d.BackendConfig(c10d.Backend(chosen.call_args.args[0])).device_backend_map == backends


@pytest.mark.parametrize(
    "name, gpus, expected",
    [
        ("auto", 4, "cuda:2"),
        ("auto", 0, "cpu"),
        ("cuda", 4, "cuda:2"),
        ("cuda:1", 4, "cuda:1"),
        ("cpu", 4, "cpu"),
        ("cuda", 0, None),
    ],
)
@pytest.mark.parametrize("script", [pqn, atari, recurrent, pqn_lstm, pqn_vdn, pqn_vdn_lstm])
def test_each_process_takes_a_gpu_of_its_own(script, name, gpus, expected, monkeypatch, capsys):
    def zeros(_, device):
        assert gpus or device == "cpu", "there is no GPU"
        return SimpleNamespace(device=torch.device(device), cpu=lambda: None)

    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "set_device", chosen := MagicMock())
    monkeypatch.setattr(torch, "zeros", zeros)
    if expected is None:
        with pytest.raises(SystemExit):
            script.pick_device(name)
        assert "error: --device cuda cannot be used: there is no GPU" in capsys.readouterr().err
    else:
        assert script.pick_device(name) == torch.device(expected)
        assert chosen.call_count == ("cuda" in expected)


@pytest.mark.parametrize("script", [atari, recurrent])
def test_no_graph_with_a_sum_over_processes_is_left_when_the_process_group_ends(script, monkeypatch):
    graphs = []

    def capture(function, *_):
        graph = partial(function)
        if function.func is script.train_step:
            graphs.append(weakref.ref(graph))
        return graph

    monkeypatch.setattr(script, "capture", capture)
    monkeypatch.setattr(script, "SummaryWriter", MagicMock())
    monkeypatch.setattr(script.Run, "finish", lambda *_: graphs.append(graphs[0]()))
    script.main(script.Args(**TINY, env_id="Pong-v5", device="cpu", total_timesteps=24))
    assert graphs[1:] == [None]


# ------------------------------------------------------------------------------------------------- out of memory


@pytest.mark.parametrize("script", [pqn, atari, recurrent, pqn_lstm])
@pytest.mark.parametrize("where", ["td_loss", "Collector"])
def test_out_of_memory_is_one_line_and_exit_code_1(script, where, monkeypatch, capsys):
    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation.")

    monkeypatch.setattr(script, where, too_much)
    monkeypatch.setattr(script, "SummaryWriter", MagicMock())
    env_id = "CartPole-v1" if script in (pqn, pqn_lstm) else "Pong-v5"
    with pytest.raises(SystemExit) as exit:
        script.main(script.Args(**TINY, env_id=env_id, device="cpu", total_timesteps=48))
    message = capsys.readouterr().err
    assert exit.value.code == 1 and message.startswith("error: CUDA out of memory.") and message.count("\n") == 1
