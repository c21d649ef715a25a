"""Each script's main() as a whole against a slow, literal run of Algorithm 1 on what happened in its environments."""

import literal
import pytest
import tiny_envs
import torch

import pqn
import pqn_atari_envpool as atari
import pqn_atari_lstm as recurrent
import pqn_lstm

SIZES = dict(num_envs=6, num_steps=7, num_eval_envs=2, num_minibatches=3, update_epochs=2, seed=7)
# Schedules over more than the run's 5 rollouts of 42 steps; curves with a point for every two of them
OPTIONS = dict(schedule_timesteps=300, exploration_fraction=0.6, start_e=0.8, end_e=0.1, gamma=0.9, log_interval=84)
OPTIONS |= SIZES | dict(anneal_lr=True, learning_rate=3e-3, l2_coef=0.01)
ATARI = OPTIONS | dict(env_id="Pong-v5", precision="fp32", q_lambda=0.7, max_grad_norm=2.0)
PQN = OPTIONS | dict(env_id="tiny_envs:Eventful-v0", hidden_sizes=(16, 8), reward_scale=0.3, max_grad_norm=0.5)


@pytest.mark.parametrize(
    "args, transcription",
    [
        (pqn.Args(**PQN), literal.Algorithm1),
        (pqn.Args(**PQN | dict(normalize_input=True)), literal.Algorithm1),
        (pqn.Args(**PQN | dict(anneal_lr=False, num_minibatches=42, update_epochs=1)), literal.Algorithm1),
        (atari.Args(**ATARI), literal.Algorithm1),
        (recurrent.Args(**ATARI, lstm_size=8), literal.RecurrentAlgorithm1),
        (recurrent.Args(**ATARI | dict(num_minibatches=6), lstm_size=8, memory_window=3), literal.RecurrentAlgorithm1),
        (pqn_lstm.Args(**PQN, lstm_size=8), literal.RecurrentAlgorithm1),
        (pqn_lstm.Args(**PQN | dict(num_minibatches=6), lstm_size=8, memory_window=3), literal.RecurrentAlgorithm1),
    ],
    ids="pqn pqn-normalised-input pqn-single-transitions atari atari-lstm atari-lstm-window lstm lstm-window".split(),
)
def test_a_resumed_run_ends_where_a_literal_one_does(args, transcription, monkeypatch, train, curves, eventful_games):
    monkeypatch.setattr(tiny_envs.Eventful, "made", [])
    literal.compare_a_resumed_run(transcription, args, tiny_envs.Eventful.made, train, curves)


SCRIPTS = [pqn, atari, recurrent, pqn_lstm]


def options_for(script, **options):
    """Few steps in environments of every kind of end."""
    return script.Args(**(PQN if script in (pqn, pqn_lstm) else ATARI) | dict(total_timesteps=84) | options)


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_acts_by_running_statistics_and_learns_with_those_of_the_minibatch(
    script, train, eventful_games, monkeypatch
):
    modes, loss, act = {"act": [], "learn": []}, script.td_loss, script.act
    watch = lambda function, kept: lambda network, *rest: kept.append(network.training) or function(network, *rest)
    monkeypatch.setattr(script, "act", watch(act, modes["act"]))
    monkeypatch.setattr(script, "td_loss", watch(loss, modes["learn"]))
    train(options_for(script))
    assert set(modes["act"]) == {False} and set(modes["learn"]) == {True}


@pytest.mark.parametrize("script", SCRIPTS)
def test_compile_compiles_the_gradient_step_and_only_when_asked_for(script, train, eventful_games, monkeypatch):
    compiled = []
    monkeypatch.setenv("CXX", "sh")  # any program that there is
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    train(options_for(script))
    assert compiled == []
    train(options_for(script, compile=True))
    assert compiled == [script.train_step]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_small_network_takes_one_thread_and_a_user_s_choice_stands(script, train, eventful_games, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    train(options_for(script))
    monkeypatch.delenv("OMP_NUM_THREADS")
    large = {pqn: {"hidden_sizes": (30_000,)}, recurrent: {"lstm_size": 400}, pqn_lstm: {"lstm_size": 1000}}
    if script in large:
        train(options_for(script, **large[script], total_timesteps=42, num_minibatches=1, update_epochs=1))
    if script is pqn:  # 66,000 weights, and 240 transitions or 320
        many = {"num_envs": 6, "num_steps": 40, "total_timesteps": 240, "num_minibatches": 1, "hidden_sizes": (7_333,)}
        train(options_for(script, **many | {"num_envs": 8, "total_timesteps": 320}))
    assert chosen == []
    if script is pqn:
        train(options_for(script, **many))
        assert chosen.pop() == 1
    train(options_for(script, **{"lstm_size": 8} if script in (recurrent, pqn_lstm) else {}))
    assert chosen == [1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_defaults_are_the_published_settings(script):
    args = script.Args()
    names = (
        "num_envs num_steps num_minibatches update_epochs learning_rate anneal_lr start_e end_e exploration_fraction"
    )
    names += " gamma q_lambda max_grad_norm num_eval_envs norm_type l2_coef schedule_timesteps"
    values = [128, 32, 32, 2, 2.5e-4, False, 1, 0.001, 0.1, 0.99, 0.65, 10, 8, "layer_norm", 0, None]
    if script in (pqn, pqn_lstm):
        values = [32, 64, 16, 4, 1e-4, True, 1, 0.2, 0.2, 0.99, 0.95, 10, 8, "layer_norm", 0, None]
        assert (args.total_timesteps, args.reward_scale, args.hidden_sizes) == (500_000, 0.1, (256, 256))
        assert not args.normalize_input
    else:
        names += " episodic_life reward_clip repeat_action_probability frame_skip noop_max use_fire_reset"
        names += " full_action_space max_episode_steps stack_num"
        values += [True, True, 0, 4, 30, True, False, 27_000, 1 if script is recurrent else 4]
    assert {name: getattr(args, name) for name in names.split()} == dict(zip(names.split(), values, strict=True))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_schedule_is_linear_up_to_its_end_and_over_no_time_at_its_end_at_once(script):
    schedule = script.linear_schedule
    assert [schedule(1.0, 0.2, step, 100) for step in (0, 50, 100, 1000)] == pytest.approx([1, 0.6, 0.2, 0.2])
    assert schedule(1.0, 0.2, 0, 0) == 0.2


@pytest.mark.parametrize("native, precision", [({"avx512_bf16": True}, "bf16"), ({"avx512_bf16": False}, "fp32")])
@pytest.mark.parametrize("script", [atari, recurrent])
def test_bf16_is_taken_where_it_is_native_and_an_option_stands(
    script, native, precision, monkeypatch, train, eventful_games
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: native, raising=False)
    learned_in, loss = [], script.td_loss
    monkeypatch.setattr(script, "td_loss", lambda network, *x: learned_in.append(network.dtype) or loss(network, *x))
    for choice, expected in ("auto", precision), ("fp32", "fp32"), ("bf16", "bf16"):
        learned_in.clear()
        _, checkpoint = train(options_for(script, precision=choice, total_timesteps=42, device="cpu"))
        assert set(learned_in) == {torch.bfloat16 if expected == "bf16" else torch.float32}
        assert checkpoint["args"]["precision"] == expected  # a resumed run keeps it, on another machine too
