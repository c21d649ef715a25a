"""Each script's main() as a whole against a slow, literal run of Algorithm 1 on what happened in its environments."""

from dataclasses import replace

import literal
import pytest
import tiny_envs
import torch

import pqn
import pqn_atari_envpool as atari
import pqn_atari_lstm as recurrent

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
    ],
    ids=["pqn", "pqn-normalised-input", "pqn-single-transitions", "atari", "lstm", "lstm-window"],
)
def test_a_resumed_run_ends_where_a_literal_one_does(args, transcription, monkeypatch, train, curves, eventful_games):
    script = __import__(type(args).__module__)
    monkeypatch.setattr(tiny_envs.Eventful, "made", [])
    folder, first = train(replace(args, total_timesteps=3 * 42 + 5))
    _, checkpoint = train(replace(script.Args(**first["args"]), resume=str(folder), total_timesteps=5 * 42))
    assert (first["step"], checkpoint["step"]) == (3 * 42, 5 * 42)
    made = tiny_envs.Eventful.made
    assert [len(envs.steps) for envs in made] == [3 * 7, 2 * 7]

    expected = transcription(script, args, made[0])
    for envs, rollouts in zip(made, (3, 2), strict=True):
        expected.enter(envs)
        for k in range(rollouts):
            expected.rollout(last=k == rollouts - 1)
    for name, weights in expected.network.state_dict().items():
        assert torch.allclose(checkpoint["network"][name], weights, rtol=1e-3, atol=2e-5), name
    assert checkpoint["last_returns"] == pytest.approx(expected.returns[-100:])
    assert checkpoint["eval_returns"] == pytest.approx(expected.eval_returns[-100:])
    logged = curves(folder)
    del logged["charts/SPS"]
    assert set(logged) == set(expected.curves)
    for name, points in expected.curves.items():
        assert [step for step, _ in logged[name]] == [step for step, _ in points], name
        assert [x for _, x in logged[name]] == pytest.approx([x for _, x in points], rel=1e-3, abs=1e-5), name
