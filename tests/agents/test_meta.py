"""Reptile, FOMAML and MAML as agents on task families."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor

import agents
from agents import FOMAML, MAML, NPG, REGISTRY, Reptile
from agents.adaptation import shards
from agents.adaptation.inner_loop import Adaptation
from agents.adaptation.task_data import TaskData, first_returns, linear_baseline, task_data
from agents.meta import MetaAgent
from agents.policy.actor_critic import ActorPolicy
from agents.policy.batched import BatchedActor
from agents.policy.networks import parameter_vector
from agents.rollout.buffer import Rollout, buffer_fields
from agents.run import cli
from agents.run.adaptation import adapted_returns
from envs import make_vec

SMALL = {"meta_batch_size": 3, "n_steps": 10, "net_arch": (8,)}


def make(algorithm: type[MetaAgent], env_id: str = "families/Point-v0", seed: int = 0, **changed: Any) -> MetaAgent:
    settings = SMALL | changed
    env = make_vec(env_id, 12, horizon=settings["n_steps"], num_threads=1)
    return algorithm("MlpPolicy", env, seed=seed, device="cpu", **settings)


def parameters(agent: MetaAgent) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in agent.policy.state_dict().values()])


def learn_once(agent: MetaAgent) -> Adaptation:
    """Let the agent learn for one iteration; returns what it trained on."""
    seen: list[Adaptation] = []
    train = agent.train
    agent.train = lambda batch: (seen.append(batch), train(batch))  # type: ignore[method-assign]
    agent.learn(1)
    return seen[0]


def filled_buffer(policy: ActorPolicy, T: int, N: int, seed: int = 0) -> Rollout:
    """Random steps with some ends of episodes."""
    generator = torch.Generator().manual_seed(seed)
    buffer = Rollout(T, N, buffer_fields(policy))
    for name, values in (("observations", 2), ("actions", 2)):
        buffer[name].copy_(torch.randn(T, N, values, generator=generator))
    buffer["rewards"].copy_(torch.randn(T, N, generator=generator))
    buffer["terminated"].copy_(torch.rand(T, N, generator=generator) < 0.2)
    buffer["truncated"].copy_((torch.rand(T, N, generator=generator) < 0.1) & ~buffer["terminated"])
    return buffer


@pytest.fixture(name="policy")
def _policy() -> ActorPolicy:
    env = make_vec("families/Point-v0", 1)
    torch.manual_seed(0)
    return ActorPolicy(env.single_observation_space, env.single_action_space, net_arch=(3,))


def test_task_data_is_what_a_loop_over_episodes_gives(policy: ActorPolicy) -> None:
    T, M, R, gamma, lam = 9, 2, 3, 0.9, 0.8
    buffer, actor = filled_buffer(policy, T, M * R), BatchedActor(policy.actor)
    theta = parameter_vector(policy.actor).expand(M, -1) + torch.randn(M, actor.size)
    data = task_data(policy, actor, theta, buffer, gamma, lam)
    for task in range(M):
        rows, features, returns, episodes = [], [], [], []
        for i in range(task * R, task * R + R):
            first = 0
            for t in range(T):
                if buffer["terminated"][t, i] or buffer["truncated"][t, i] or t == T - 1:
                    episodes.append((i, first, t))
                    first = t + 1
        for i, first, last in episodes:
            for t in range(first, last + 1):
                s = buffer["observations"][t, i].double().tolist()
                u = (t - first) / 100
                features.append([*s, *(x * x for x in s), u, u * u, u**3, 1.0])
                future = [gamma ** (k - t) * buffer["rewards"][k, i].item() for k in range(t, last + 1)]
                returns.append(sum(future))
                rows.append((i, t))
                assert data.begin[task, i - task * R, t] == first
        X, y = np.array(features), np.array(returns)
        ridge = 1e-5 * np.diag(X.T @ X / len(X)).mean() * np.eye(X.shape[1])
        values = X @ np.linalg.solve(X.T @ X / len(X) + ridge, X.T @ y / len(X))
        value_of = dict(zip(rows, values, strict=True))
        expected = {}
        for i, first, last in episodes:
            running = 0.0
            for t in range(last, first - 1, -1):
                following = 0.0 if t == last else value_of[i, t + 1]
                delta = buffer["rewards"][t, i].item() + gamma * following - value_of[i, t]
                running = expected[i, t] = delta + gamma * lam * running
        A = np.array([expected[i, t] for i in range(task * R, task * R + R) for t in range(T)])
        np.testing.assert_allclose(data.advantages[task], (A - A.mean()) / A.std(), atol=1e-5)
    alone = policy.actor.head.distribution(actor.network(theta, data.s)[1], theta[1, actor.log_std]).log_prob(data.a[1])
    torch.testing.assert_close(data.log_old[1], alone)


def test_returns_are_those_of_first_episodes(policy: ActorPolicy) -> None:
    buffer = filled_buffer(policy, 9, 6)
    for i in range(6):
        total = 0.0
        for t in range(9):
            total += buffer["rewards"][t, i].item()
            if buffer["terminated"][t, i] or buffer["truncated"][t, i]:
                break
        assert first_returns(buffer)[i].item() == pytest.approx(total)


def test_the_linear_baseline_finds_what_is_linear_in_its_features_for_each_task() -> None:
    s, t = torch.randn(2, 400, 3), torch.arange(200).repeat(2, 2)
    y = 2 * s[..., 0].double() - s[..., 1].double() ** 2 + 3 + t.double() / 100
    y[1] = -5 * y[1]
    torch.testing.assert_close(linear_baseline(s, t, y), y, atol=0.02, rtol=0.01)


@pytest.mark.parametrize("losses", ["last", "each"])
@pytest.mark.parametrize("surrogate", ["lvc", "dice"])
def test_mamls_meta_gradient_is_that_of_the_whole_computation(
    surrogate: str, losses: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD", 2 * 4 * SMALL["n_steps"])  # type: ignore[operator]
    settings = {"inner_surrogate": surrogate, "outer_losses": losses, "inner_lr_later": 0.3}
    agent = make(MAML, inner_lr=0.5, inner_steps=2, net_arch=(3,), **settings)
    batch = learn_once(agent)
    # The inner steps that are differentiated are those that were taken.
    torch.testing.assert_close(agent._adapted(batch.thetas[0][0], batch, 2), batch.thetas[2], atol=1e-5, rtol=1e-4)
    widen = lambda data: TaskData(*(x.double() if x.is_floating_point() else x for x in data))  # noqa: E731
    batch = batch._replace(batches=[widen(data) for data in batch.batches])
    agent.phi = agent.phi.double()
    phi = agent.phi + 0.01 * torch.randn(len(agent.phi), dtype=torch.float64)

    def objective(x: Tensor) -> Tensor:
        after = [agent._loss(agent._adapted(x, batch, j), batch.batches[j]).mean() for j in (1, 2)]
        return sum(after) / 2 if losses == "each" else after[-1]

    h, eye = 1e-6, torch.eye(len(phi), dtype=torch.float64)
    differences = torch.stack([(objective(phi + h * e) - objective(phi - h * e)) / (2 * h) for e in eye])
    agent.phi = phi
    assert len(batch.batches[-1].shards) == 2
    torch.testing.assert_close(agent._meta_gradient(batch)[0], differences, atol=1e-7, rtol=1e-5)
    # What FOMAML leaves out is there: the Jacobian of the inner steps is not I.
    jacobian = torch.func.jacrev(lambda x: agent._adapted(x, batch, 2))(phi)
    assert (jacobian - torch.eye(len(phi))).abs().max() > 1e-3


def test_fomaml_takes_the_jacobian_for_the_identity() -> None:
    agent = make(FOMAML)
    batch, shift = learn_once(agent), torch.randn(len(agent.phi))
    assert torch.equal(agent._adapted(batch.thetas[0][0], batch, 1), batch.thetas[1])
    before = agent._adapted(torch.zeros_like(shift), batch, 1)
    torch.testing.assert_close(agent._adapted(shift, batch, 1) - before, shift.expand(3, -1), atol=1e-5, rtol=1e-5)
    through, gradients = agent._meta_gradient(batch)
    torch.testing.assert_close(through, gradients.mean(0))


def test_with_losses_after_each_step_fomaml_averages_their_gradients() -> None:
    agent = make(FOMAML, inner_steps=3, outer_losses="each")
    batch = learn_once(agent)
    assert agent._gradient_after(batch, 3)[0].norm() > 0
    expected = sum(agent._gradient_after(batch, j)[0] for j in (1, 2, 3)) / 3
    torch.testing.assert_close(agent._meta_gradient(batch)[0], expected)


def test_later_inner_steps_have_their_own_size() -> None:
    batch = learn_once(make(FOMAML, inner_steps=3, inner_lr=0.5, inner_lr_later=0.1))
    for before, theta, g, lr in zip(batch.thetas, batch.thetas[1:], batch.gradients, (0.5, 0.05, 0.05), strict=False):
        torch.testing.assert_close(theta - before, -lr * g, atol=1e-6, rtol=1e-4)


def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD", 4 * SMALL["n_steps"])  # type: ignore[operator]
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            agent = make(FOMAML)
            assert len(learn_once(agent).batches[-1].shards) == agent.num_tasks
            assert torch.get_num_threads() == number
            found.append(parameters(agent))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_reptile_moves_towards_the_adapted_policies() -> None:
    agent = make(Reptile, learning_rate=0.25, inner_lr=0.5)
    phi = parameter_vector(agent.policy.actor)
    batch = learn_once(agent)
    expected = phi + 0.25 * (batch.thetas[-1] - phi).mean(0)
    torch.testing.assert_close(parameter_vector(agent.policy.actor), expected)
    assert len(batch.batches) == agent.config.inner_steps


def test_annealing_ends_at_zero() -> None:
    agent = make(Reptile, anneal=True).learn(12 * 20 * 4)
    assert agent.iteration == 4
    assert agent.optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


@pytest.mark.parametrize("name", ["reptile", "fomaml", "maml"])
def test_each_task_of_an_iteration_is_new_and_runs_whole_episodes(name: str) -> None:
    agent = make(REGISTRY[name])
    vector = agent.env.vector
    for iteration in agent.iterations(480):
        tasks = vector.tasks.reshape(3, 4, -1)
        assert (tasks == tasks[:, :1]).all()
        numbers = (iteration - 1) * 3 + np.arange(3)
        np.testing.assert_array_equal(tasks[:, 0], vector.draw_tasks(numbers, "train"))
        assert set(agent.episode_lengths) == {10}
    rollouts = agent.config.inner_steps + agent.rollouts_after
    assert agent.num_timesteps == agent.iteration * rollouts * 120
    keys = {f"adapt/return_{j}" for j in range(rollouts)}
    keys |= {"adapt/inner_kl", "adapt/gradient_inner_product", "train/meta_gradient_norm"}
    assert keys <= agent.last_metrics.keys()


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("reptile", {}),
        ("fomaml", {"outer_optimizer": "adabound"}),
        ("fomaml", {"outer_losses": "each"}),
        ("maml", {}),
    ],
)
def test_resuming_on_a_family_is_exact(name: str, changed: dict[str, Any], tmp_path: Path) -> None:
    whole = make(REGISTRY[name], **changed).learn(240 * 4)
    half = make(REGISTRY[name], **changed).learn(240 * 2)
    half.save(tmp_path / "half")
    env = make_vec("families/Point-v0", 12, horizon=10, num_threads=1)
    resumed = REGISTRY[name].load(tmp_path / "half.zip", env, device="cpu")
    resumed.learn(240 * 2, reset_num_timesteps=False)
    assert torch.equal(parameters(resumed), parameters(whole))


@pytest.mark.parametrize("name", ["reptile", "fomaml", "maml"])
def test_an_iteration_begins_and_ends_one_rollout_for_callbacks(name: str) -> None:
    class Told(BaseCallback):
        seen = ""

        def _on_rollout_start(self) -> None:
            self.seen += "("

        def _on_rollout_end(self) -> None:
            self.seen += ")"

        def _on_step(self) -> bool:
            return True

    told = Told()
    agent = make(REGISTRY[name]).learn(240 * 3, callback=told)
    assert agent.iteration == 3
    assert told.seen == "()()()"


@pytest.mark.parametrize("stop_after", [120, 130])
def test_a_callback_can_stop_amid_the_inner_loop(stop_after: int) -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.num_timesteps < stop_after

    agent = make(FOMAML)
    before = parameters(agent)
    agent.learn(1000, callback=Stop())
    assert stop_after <= agent.num_timesteps < stop_after + 12
    assert agent.iteration == 0
    assert torch.equal(parameters(agent), before)


def test_a_second_training_meets_other_tasks_and_other_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make(FOMAML)
    counters: list[int] = []
    tasks, fill = [], agent.collector.fill

    def counted(counter: int, sample: Any) -> Any:
        counters.append(counter)
        return fill(counter, sample)

    monkeypatch.setattr(agent.collector, "fill", counted)
    for _ in range(2):
        agent.learn(1)
        assert agent.iteration == 1
        tasks.append(agent.env.vector.tasks.copy())
    assert counters == [0, 1, 2, 3]
    np.testing.assert_array_equal(tasks[1][::4], agent.env.vector.draw_tasks(3 + np.arange(3), "train"))
    assert not np.array_equal(*tasks)


@pytest.mark.parametrize(
    ("algorithm", "changed", "words"),
    [
        (FOMAML, {"inner_steps": 0}, "inner_steps is 0; give an integer of at least 1"),
        (MAML, {"inner_surrogate": "dise"}, "did you mean 'dice'"),
        (Reptile, {"outer_optimizer": "adan"}, "did you mean 'adam'"),
        (Reptile, {"meta_batch_size": 5}, "meta_batch_size = 5 does not divide"),
        (Reptile, {"inner_lr": -1.0}, "inner_lr is -1"),
        (Reptile, {"inner_lr_later": 0.0}, "inner_lr_later is 0"),
        (FOMAML, {"outer_losses": "all"}, "no outer_losses 'all'"),
        (FOMAML, {"clip_range": 0.0}, "clip_range is 0"),
        (Reptile, {"value_network": "rbf"}, "has no hyperparameter 'value_network'"),
        (FOMAML, {"policy_kwargs": {"rbf_features": 9}}, "policy_kwargs has no 'rbf_features'"),
    ],
)
def test_what_cannot_be_is_refused(algorithm: type[MetaAgent], changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(algorithm, **changed)


def test_a_rollout_is_a_whole_horizon() -> None:
    with pytest.raises(ValueError, match="n_steps is 7, but the horizon of families/Point-v0 is 100"):
        FOMAML("MlpPolicy", make_vec("families/Point-v0", 20), n_steps=7)


def test_adaptation_is_reproducible_and_changes_nothing() -> None:
    agent = make(FOMAML).learn(1)
    before = parameters(agent)
    env = make_vec("families/Point-v0", 12, split="held_out", horizon=10)
    tasks = env.draw_tasks(range(4))
    config = {"inner_lr": 0.5, "gamma": 0.9}
    first, second = (adapted_returns(agent.policy, config, env, tasks, 2, seed=1) for _ in range(2))
    assert first.shape == (3, 4)
    np.testing.assert_array_equal(first, second)
    assert torch.equal(parameters(agent), before)
    # Nothing is adapted in the first row: it does not depend on the inner step.
    other = adapted_returns(agent.policy, {"inner_lr": 5.0, "gamma": 0.9}, env, tasks, 2, seed=1)
    np.testing.assert_array_equal(other[0], first[0])
    assert not np.array_equal(other[1], first[1])


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run, joint pretraining and an oracle from the command line, and their table, JSON and plot."""

    def train(algorithm: str, name: str, *more: str) -> str:
        folder = str(tmp_path / name)
        options = ["--env", "families/Point-v0", "--env-kwargs", "horizon=10", "--run-dir", folder, "--quiet"]
        assert cli.train([algorithm, *options, "--steps", "480", "--eval-episodes", "2", *more]) == 0
        return folder

    few = ["--num-envs", "12", "--n-steps", "10", "--meta-batch-size", "3", "--inner-steps", "1"]
    run = train("fomaml", "run", *few)
    joint = train("npg", "joint", "--env-kwargs", "redraw=true", "--num-envs", "4")
    oracle = train("npg", "oracle", "--env-kwargs", "observe_task=true", "--num-envs", "4")
    capsys.readouterr()
    small = ["--tasks", "3", "--rollouts", "4", "--updates", "2"]
    beside = ["--beside", joint, "--beside", oracle, "--beside", run, "--beside", joint]
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    assert cli.main(["adapt", run, *small, *beside, *files]) == 0
    shown = capsys.readouterr().out
    for words in (
        "3 held-out tasks",
        "fomaml, 480 steps",
        "beside: fomaml",
        "oracle: npg",
        "joint training: npg",
        "steps (2)",
        "random",
    ):
        assert words in shown
    record = json.loads((tmp_path / "a.json").read_text())
    lengths = [len(entry["mean"]) for entry in record["policies"].values()]
    assert lengths == [3, 3, 1, 3, 3, 3]
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert cli.main(["adapt", joint, *small]) == 0  # any policy can be adapted
    capsys.readouterr()
    assert cli.main(["adapt", run, "--updates", "-1"]) == 2
    assert "--updates is -1" in capsys.readouterr().err


def test_reports_without_held_out_tasks_or_a_family_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(FOMAML, "families/HalfCheetahDir-v0").learn(1).save(tmp_path / "two.zip")
    assert cli.main(["adapt", str(tmp_path / "two.zip")]) == 2
    assert "trains on all of them" in capsys.readouterr().err
    small = ["--split", "train", "--tasks", "2", "--rollouts", "2"]
    assert cli.main(["adapt", str(tmp_path / "two.zip"), *small]) == 0
    NPG("MlpPolicy", "CartPole-v1", n_steps=4, num_envs=2).learn(8).save(tmp_path / "cart.zip")
    assert cli.main(["adapt", str(tmp_path / "cart.zip")]) == 2
    assert "family of tasks" in capsys.readouterr().err
    assert agents.load(tmp_path / "two.zip").name == "fomaml"


def test_an_environment_without_tasks_is_warned_of_and_one_without_sample_tasks_refused() -> None:
    class Tasks(gymnasium.Wrapper):
        def set_task(self, task: float) -> None: ...

    def agent(env: object) -> agents.Agent:
        return agents.FOMAML("MlpPolicy", env, n_steps=8)

    with pytest.warns(UserWarning, match=r"no family of tasks: FOMAML .* n_steps=8.* give families/"):
        agent(gymnasium.make("CartPole-v1"))
    for env in (
        Tasks(gymnasium.make("CartPole-v1")),
        DummyVecEnv([lambda: Tasks(gymnasium.make("CartPole-v1"))]),
        make_vec(lambda: Monitor(Tasks(gymnasium.make("CartPole-v1"))), 2),
    ):
        with pytest.raises(ValueError, match=r"set_task, .* where it has sample_tasks\(n\).*make_vec.*TaskVectorEnv"):
            agent(env)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agents.FOMAML("MlpPolicy", "families/Point-v0", num_envs=4, meta_batch_size=2, n_steps=100)


class Reach(gymnasium.Env):
    """Go to the end of a line that the task says: the interface of environments for meta-learning."""

    observation_space, action_space = gymnasium.spaces.Box(-9, 9, (1,)), gymnasium.spaces.Box(-1, 1, (1,))
    goal = 0.0

    def sample_tasks(self, n: int) -> list[dict[str, float]]:
        return [{"goal": goal} for goal in self.np_random.choice([-1.0, 1.0], n) * self.np_random.uniform(1, 2, n)]

    def set_task(self, task: dict[str, float]) -> None:
        self.goal = task["goal"]

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.place = np.zeros(1, dtype=np.float32)
        return self.place, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.place = self.place + np.clip(action, -1, 1).astype(np.float32)
        return self.place, float(np.sign(self.goal) * action[0]), False, False, {}


def reach(num_envs: int = 12, steps: int = 10) -> Any:
    return make_vec(lambda: Monitor(gymnasium.wrappers.TimeLimit(Reach(), steps)), num_envs)


def test_environments_with_set_task_and_sample_tasks_are_a_family() -> None:
    held = []
    for _ in range(2):
        agent = FOMAML("MlpPolicy", reach(), seed=0, device="cpu", **SMALL)
        goals = []
        for _ in agent.iterations(12 * 20 * 3):
            goals.append(agent.env.get_attr("goal"))
        assert all(np.array_equal(np.repeat(row[::4], 4), row) for row in goals)  # 3 tasks of 4 environments
        assert all(len(set(row)) == 3 for row in goals)
        assert len({tuple(row) for row in goals}) == 3
        held.append((goals, parameters(agent)))
    assert held[0][0] == held[1][0]
    assert torch.equal(held[0][1], held[1][1])
    vector = agent.env.vector
    assert vector.draw_tasks([5, 0], "train")[1] == vector.draw_tasks([0])[0]
    assert vector.draw_tasks([0], "held_out")[0] != vector.draw_tasks([0])[0]


def test_a_policy_learns_to_adapt_to_tasks_of_the_environments_own() -> None:
    agent = FOMAML("MlpPolicy", reach(80), seed=0, device="cpu", n_steps=10, meta_batch_size=8, learning_rate=1e-2)
    agent.learn(80 * 20 * 20)
    tasks = agent.env.vector.draw_tasks(range(8), "held_out")
    before, after = adapted_returns(agent.policy, {"inner_lr": 0.1}, agent.env.vector, tasks, 1, seed=0).mean(1)
    assert before < 5
    assert after > 8  # of 10


def test_a_family_without_a_horizon_or_with_another_is_refused() -> None:
    with pytest.raises(ValueError, match=r"n_steps is 10, but the horizon of .* is 7"):
        FOMAML("MlpPolicy", reach(steps=7), **SMALL)
    with pytest.raises(AttributeError, match=r"no time limit.*TimeLimit"):
        FOMAML("MlpPolicy", make_vec(Reach, 12), **SMALL)
    agents.PPO("MlpPolicy", make_vec(Reach, 4), n_steps=16, batch_size=32).learn(64)  # which asks for no tasks
