"""Algorithm 1 of the paper written out slowly, one environment and one transition at a time: what the scripts' main()
is compared with. Of a script it takes the network alone; the rest is written here once more."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch


def target(t, rewards, values, terminated, truncated, gamma, q_lambda):
    """The λ-return of step t by its definition, as a recursion."""
    if terminated[t]:
        return rewards[t]
    if truncated[t] or t == len(rewards) - 1:
        return rewards[t] + gamma * values[t + 1]
    future = target(t + 1, rewards, values, terminated, truncated, gamma, q_lambda)
    return rewards[t] + gamma * (q_lambda * future + (1 - q_lambda) * values[t + 1])


def compare_a_resumed_run(transcription, args, made, train, curves):
    """Trains for three rollouts and, resumed, for two more: weights, returns and curves are those of a literal run.
    `made` are the recorded environments of both parts."""
    script = sys.modules[type(args).__module__]
    args, size = replace(args, device="cpu"), args.num_envs * args.num_steps
    folder, first = train(replace(args, total_timesteps=3 * size + 5))
    _, checkpoint = train(replace(script.Args(**first["args"]), resume=str(folder), total_timesteps=5 * size))
    assert (first["step"], checkpoint["step"]) == (3 * size, 5 * size)
    assert [len(envs.steps) for envs in made] == [3 * args.num_steps, 2 * args.num_steps]
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


def remember(network, features, last_action, start, hidden, cell):
    """One step of an LSTM for one agent: Q-values and next state. Where an episode starts, it knows nothing."""
    one_hot = torch.zeros(network.num_actions)
    if start:
        hidden, cell = torch.zeros_like(hidden), torch.zeros_like(cell)
    else:
        one_hot[last_action] = 1
    gates = network.lstm.input(torch.cat([features, one_hot])) + hidden @ network.lstm.recurrent
    write, forget, read, new = gates.split(len(hidden))
    cell = forget.sigmoid() * cell + write.sigmoid() * new.tanh()
    hidden = read.sigmoid() * cell.tanh()
    return network.head(hidden), hidden, cell


class Algorithm1:
    """The feed-forward agent. `envs` are `tiny_envs.Eventful` ones in which the script has played: what happened in
    them is taken from their record, and that the actions were the right ones is checked."""

    def __init__(self, script, args, envs):
        torch.manual_seed(args.seed)
        self.args, self.network = args, script.QNetwork(*script.spaces(envs), args)
        self.optimizer = torch.optim.RAdam(self.network.parameters(), eps=1e-8)
        self.rollouts, self.reward_scale = 0, getattr(args, "reward_scale", 1.0)
        self.returns, self.eval_returns, self.curves = [], [], {}
        self.clear()

    def clear(self):
        """A new point of the curves begins."""
        self.logged, self.episodes, self.eval_episodes = [], [], []

    def enter(self, envs):
        """The run is started, or resumed: in new environments, with the agent, schedules and random state kept."""
        self.record, self.obs = iter(envs.steps), envs.first
        self.phantom = [False] * envs.num_envs
        self.sums, self.lengths = [0.0] * envs.num_envs, [0] * envs.num_envs
        self.clear()

    def rollout(self, last=False):
        args, T, N = self.args, self.args.num_steps, self.args.num_envs
        step = self.rollouts * T * N
        decay_ends = args.exploration_fraction * args.schedule_timesteps
        self.epsilon = args.end_e
        if step < decay_ends:
            self.epsilon = args.start_e * (1 - step / decay_ends) + args.end_e * step / decay_ends
        explore = torch.rand(T, N)
        random_actions = torch.randint(self.network.head.out_features, (T, N))
        self.network.eval()
        names = "seen actions rewards values terminated truncated real".split()
        for name in names:
            setattr(self, name, [])
        for t in range(T):
            q_values = self.look()
            actions = q_values.argmax(1).tolist()
            for n in range(N):
                if explore[t, n] < self.epsilon:
                    actions[n] = int(random_actions[t, n])
            happened = next(self.record)
            assert happened["actions"].tolist() == actions
            row = self.obs, actions, happened["rewards"] * self.reward_scale, q_values.max(1).values.tolist()
            row += happened["terminated"], happened["truncated"], [not phantom for phantom in self.phantom]
            for name, x in zip(names, row, strict=True):
                getattr(self, name).append(x)
            for i in range(len(actions)):
                self.sums[i] += happened["score"][i]
                self.lengths[i] += not self.phantom[i]
                if happened["over"][i]:
                    (self.episodes if i < N else self.eval_episodes).append((self.sums[i], self.lengths[i]))
                    (self.returns if i < N else self.eval_returns).append(self.sums[i])
                    self.sums[i], self.lengths[i] = 0.0, 0
            self.arrive(happened["obs"], actions)
            self.phantom = (happened["terminated"] | happened["truncated"]).tolist()
        self.values.append(self.look().max(1).values.tolist())
        self.learn()
        self.rollouts += 1
        step += T * N
        if step % args.log_interval == 0 or last:
            self.point(step)

    def look(self):
        """Q-values of what every environment shows."""
        with torch.no_grad():
            return self.network(torch.from_numpy(self.obs))

    def arrive(self, obs, actions):
        self.obs = obs

    def learn(self):
        args, network = self.args, self.network
        network.train()
        for epoch in range(args.update_epochs):
            items = self.items()
            order = torch.randperm(len(items)).tolist()
            size = len(items) // args.num_minibatches
            for i in range(args.num_minibatches):
                terms = self.terms([items[k] for k in order[i * size : (i + 1) * size]])
                if not terms:
                    continue
                share = (epoch + i / args.num_minibatches) / args.update_epochs
                steps = (self.rollouts + share) * args.num_steps * args.num_envs
                learning_rate = args.learning_rate
                if args.anneal_lr:
                    learning_rate *= max(0.0, 1 - steps / args.schedule_timesteps)
                self.optimizer.param_groups[0]["lr"] = learning_rate
                loss = sum(0.5 * (goal - q_value) ** 2 for goal, q_value in terms) / len(terms)
                loss = loss + 0.5 * args.l2_coef * (network.head.weight**2).sum()
                self.optimizer.zero_grad()
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm)
                self.optimizer.step()
                q_value = sum(q_value.item() for _, q_value in terms) / len(terms)
                self.logged.append((learning_rate, loss.item(), q_value, norm.item()))

    def items(self):
        """What is shuffled: the transitions."""
        return [(t, n) for t in range(self.args.num_steps) for n in range(self.args.num_envs)]

    def terms(self, items):
        """Target and Q-value of each real transition of a minibatch."""
        if not any(self.real[t][n] for t, n in items):
            return []
        q_values = self.network(torch.from_numpy(np.stack([self.seen[t][n] for t, n in items])))
        taken = {(t, n): q_values[k, self.actions[t][n]] for k, (t, n) in enumerate(items)}
        return [(self.target(t, n, self.values), taken[t, n]) for t, n in items if self.real[t][n]]

    def target(self, t, n, values):
        columns = [[row[n] for row in rows] for rows in (self.rewards, values, self.terminated, self.truncated)]
        return float(target(t, *columns, self.args.gamma, self.args.q_lambda))

    def point(self, step):
        learning_rates, *metrics = zip(*self.logged, strict=True)
        point = {"charts/epsilon": self.epsilon, "charts/learning_rate": learning_rates[-1]}
        names = "losses/td_loss", "losses/q_values", "losses/grad_norm"
        point |= {name: sum(x) / len(x) for name, x in zip(names, metrics, strict=True)}
        for group, episodes in ("charts", self.episodes), ("eval", self.eval_episodes):
            if episodes:
                point[f"{group}/episodic_return"] = sum(x for x, _ in episodes) / len(episodes)
                point[f"{group}/episodic_length"] = sum(x for _, x in episodes) / len(episodes)
        for name, value in point.items():
            self.curves.setdefault(name, []).append((step, value))
        self.clear()


class RecurrentAlgorithm1(Algorithm1):
    """The recurrent agent: whole sequences are shuffled, and targets are those of the network as it is at the time."""

    def enter(self, envs):
        super().enter(envs)
        self.last_actions, self.first = [0] * envs.num_envs, [True] * envs.num_envs
        self.state = self.network.lstm.initial_state(envs.num_envs, "cpu")
        self.rows, self.states = [], []  # all that the network was shown, and its state before it

    def unroll(self, row, state):
        """One step of the given environments; their Q-values and next state."""
        obs, last_actions, first = (torch.from_numpy(np.stack(x))[None] for x in row)
        q_values, state = self.network(obs, last_actions, first, state)
        return q_values[0], state

    def look(self):
        row = self.row()
        with torch.no_grad():
            q_values, state = self.unroll(row, self.state)
        self.ahead = (row, self.state, state)
        return q_values

    def arrive(self, obs, actions):
        row, before, self.state = self.ahead
        self.rows.append(row)
        self.states.append(before)
        # The step of a phantom brings the first observation of a new episode
        self.obs, self.last_actions, self.first = obs, actions, list(self.phantom)

    def items(self):
        return list(range(self.args.num_envs))

    def terms(self, items):
        T = self.args.num_steps
        if not any(self.real[t][n] for t in range(T) for n in items):
            return []
        q_values = self.unrolled(items)
        values = [[0.0] * self.args.num_envs for _ in range(T + 1)]
        for t in range(T + 1):
            for b, n in enumerate(items):
                values[t][n] = q_values[t][b].max().item()
        return [
            (self.target(t, n, values), q_values[t][b, self.actions[t][n]])
            for t in range(T)
            for b, n in enumerate(items)
            if self.real[t][n]
        ]

    def unrolled(self, items):
        """Q-values of these environments at every step of the rollout and after it, by the network as it is now."""
        T, start = self.args.num_steps, len(self.rows) - self.args.num_steps
        rows = [*self.rows, self.row()]
        row = lambda k: [[x[n] for n in items] for x in rows[k]]
        warm_up = max(0, start - self.args.memory_window)
        state = self.state_of(items, warm_up)
        for k in range(warm_up, start):
            with torch.no_grad():
                _, state = self.unroll(row(k), state)
        q_values = []
        for k in range(start, start + T + 1):
            q_value, state = self.unroll(row(k), state)
            q_values.append(q_value)
        return q_values

    def row(self):
        return self.obs, self.last_actions, self.first

    def state_of(self, items, k):
        return tuple(x[items] for x in self.states[k])


class TeamAlgorithm1(Algorithm1):
    """Algorithm 1 for a team, written out slowly. The masks are applied here: the network is told that all is legal."""

    def q_values(self, views):
        views = torch.from_numpy(np.stack(views))
        return self.network(torch.cat([views, torch.ones(len(views), 2, 4)], 2))

    def best(self, q_values, mask):
        return max((a for a in range(4) if mask[a]), key=lambda a: q_values[a])

    def look(self):
        with torch.no_grad():
            q_values = self.q_values(self.obs["agents_view"]).tolist()
        best = [[self.best(q, mask) for q, mask in zip(*x, strict=True)] for x in self.both(q_values)]
        values = [[q[a] for q, a in zip(*x, strict=True)] for x in zip(q_values, best, strict=True)]
        return best, values

    def both(self, q_values):
        return zip(q_values, self.obs["action_mask"].tolist(), strict=True)

    def rollout(self, last=False):
        args, T, N = self.args, self.args.num_steps, self.args.num_envs
        step = self.rollouts * T * N
        decay_ends = args.exploration_fraction * args.schedule_timesteps
        self.epsilon = args.end_e
        if step < decay_ends:
            self.epsilon = args.start_e * (1 - step / decay_ends) + args.end_e * step / decay_ends
        shaping = max(0.0, 1 - step / args.shaping_timesteps) if hasattr(args, "shaping_timesteps") else 0.0
        explore, numbers = torch.rand(T, N, 2), torch.randint(2**27, (T, N, 2))
        self.network.eval()
        names = "seen actions rewards values terminated truncated real".split()
        for name in names:
            setattr(self, name, [])
        for t in range(T):
            actions, values = self.look()
            for n in range(N):
                for i in range(2):
                    if explore[t, n, i] < self.epsilon:
                        legal = [a for a in range(4) if self.obs["action_mask"][n, i, a]]
                        actions[n][i] = legal[int(numbers[t, n, i]) % len(legal)]
            happened = next(self.record)
            assert happened["actions"].tolist() == actions
            rewards = (happened["score"] + shaping * happened["shaped"]) * self.reward_scale
            row = self.obs["agents_view"], actions, rewards, values
            row += happened["terminated"], happened["truncated"], [not phantom for phantom in self.phantom]
            for name, x in zip(names, row, strict=True):
                getattr(self, name).append(x)
            for i in range(len(actions)):
                self.sums[i] += happened["score"][i]
                self.lengths[i] += not self.phantom[i]
                if happened["over"][i]:
                    (self.episodes if i < N else self.eval_episodes).append((self.sums[i], self.lengths[i]))
                    (self.returns if i < N else self.eval_returns).append(self.sums[i])
                    self.sums[i], self.lengths[i] = 0.0, 0
            self.arrive(happened["obs"], actions)
            self.phantom = (happened["terminated"] | happened["truncated"]).tolist()
        self.values.append(self.look()[1])
        self.learn()
        self.rollouts += 1
        step += T * N
        if step % args.log_interval == 0 or last:
            self.point(step)

    def terms(self, items):
        real = [(t, n) for t, n in items if self.real[t][n]]
        if not real:
            return []
        q_values = self.q_values([self.seen[t][n] for t, n in real])
        terms = []
        for k, (t, n) in enumerate(real):
            taken = [q_values[k, i, self.actions[t][n][i]] for i in range(2)]
            if self.args.independent:
                terms += [(self.goal(t, n, lambda values, i=i: values[i]), taken[i]) for i in range(2)]
            else:
                terms.append((self.goal(t, n, sum), sum(taken)))
        return terms

    def goal(self, t, n, value):
        columns = [[row[n] for row in rows] for rows in (self.rewards, self.values, self.terminated, self.truncated)]
        columns[1] = [value(values) for values in columns[1]]
        return float(target(t, *columns, self.args.gamma, self.args.q_lambda))


class RecurrentTeamAlgorithm1(TeamAlgorithm1, RecurrentAlgorithm1):
    """Both: the state has a row for each agent of each environment."""

    def enter(self, envs):
        super().enter(envs)
        self.last_actions = [[0, 0]] * envs.num_envs
        self.state = self.network.lstm.initial_state(2 * envs.num_envs, "cpu")

    def row(self):
        return self.obs["agents_view"], self.last_actions, self.first, self.obs["action_mask"]

    def unroll(self, row, state):
        views, last_actions, first, masks = (torch.from_numpy(np.stack(x))[None] for x in row)
        everything_legal = torch.cat([views, torch.ones(masks.shape)], 3)
        q_values, state = self.network(everything_legal, last_actions, first, state)
        return q_values[0].masked_fill(masks[0] == 0, -torch.inf), state

    def state_of(self, items, k):
        return tuple(x.view(-1, 2, x.shape[1])[items].flatten(0, 1) for x in self.states[k])

    def look(self):
        values, actions = RecurrentAlgorithm1.look(self).max(2)
        return actions.tolist(), values.tolist()

    def terms(self, items):
        T = self.args.num_steps
        if not any(self.real[t][n] for t in range(T) for n in items):
            return []
        q_values, terms = self.unrolled(items), []
        values = [[0.0] * self.args.num_envs for _ in range(T + 1)]
        for t in range(T + 1):
            for b, n in enumerate(items):
                values[t][n] = sum(q_values[t][b, i].max().item() for i in range(2))
        for t in range(T):
            for b, n in enumerate(items):
                if self.real[t][n]:
                    taken = [q_values[t][b, i, self.actions[t][n][i]] for i in range(2)]
                    terms.append((self.target(t, n, values), sum(taken)))
        return terms
