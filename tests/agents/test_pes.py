"""Policy search with evolution strategies: windows against plain loops, updates against their formulas."""

from __future__ import annotations

import copy
import warnings
from collections import deque
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor
from torch.nn.utils import vector_to_parameters

from agents import PES, checkpoint, noise
from agents.evolution.engine import Estimate, Particles, Scheme, estimate, join, start
from agents.evolution.policies import DeterministicLinear, DeterministicMlp, DeterministicPolicy
from agents.evolution.policy_search import PolicySearch, SearchConfig
from agents.evolution.update import MOST_SURPRISE
from agents.evolution.whitening import whitening_matrix
from agents.optim.clipup import ClipUp
from agents.pes import PESConfig, centered_ranks, top_pairs
from agents.policy.actor_critic import ActorCriticPolicy
from agents.policy.base import Moments, ObservationNormalizer
from agents.policy.networks import parameter_vector
from agents.rollout.buffer import Rollout
from agents.rollout.collector import Collector, Step, collect_some
from envs import GymVectorEnv, SnapshotError, VectorEnv, make_vec

BOX = spaces.Box(-np.inf, np.inf, (5,))
ACTIONS = {
    "box": spaces.Box(np.float32([-1, -2]), np.float32([1, 0.5])),
    "discrete": spaces.Discrete(4),
    "multi-discrete": spaces.MultiDiscrete([3, 2]),
    "multi-binary": spaces.MultiBinary(3),
}


class Seen(PES):
    """Keeps the last window's estimate."""

    found: Estimate

    def train(self, found: Estimate) -> None:
        self.found = found
        super().train(found)


def make(env: Any = "Hopper-v5", policy: Any = "LinearPolicy", seed: int = 0, **changed: Any) -> Seen:
    """An agent of four pairs."""
    settings = {"n_steps": 8} | changed
    if isinstance(env, str):
        threads = {} if env.startswith("probes") else {"num_threads": 1}
        env = make_vec(env, settings.pop("num_envs", 8), autoreset="disabled", **threads)
    return Seen(policy, env, seed=seed, device="cpu", **settings)


def windows(agent: Seen, count: int) -> list[tuple[Tensor, Particles, Estimate]]:
    """Consecutive windows: the parameters before, the particles after, and the estimate."""
    found = []
    generator = agent.iterations(10**9)
    for _ in range(count):
        theta = parameter_vector(agent.policy.actor)
        next(generator)
        assert agent.particles is not None
        found.append((theta, agent.particles, agent.found))
    return found


# Policies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ACTIONS)
@pytest.mark.parametrize("policy_class", [DeterministicLinear, DeterministicMlp])
def test_particles_act_as_the_policies_that_they_are(policy_class: type[DeterministicPolicy], kind: str) -> None:
    torch.manual_seed(0)
    policy = policy_class(BOX, ACTIONS[kind], net_arch=(7, 6))
    policy.normalizer.merge(Moments.of(3 * torch.randn(50, 5) + 1))
    n, size = 6, len(parameter_vector(policy.actor))
    theta, observations = torch.randn(n, size), 3 * torch.randn(n, 5, dtype=torch.float64)
    observations[0, 0] = 1000.0  # beyond the normalizer's bound
    shift, scale = (x.expand(n, -1).contiguous() for x in (policy.normalizer.shift, policy.normalizer.scale))
    actions = policy.particles(theta, shift, scale)(observations).clone()
    for row in range(n):
        vector_to_parameters(theta[row], policy.actor.parameters())
        single = policy.to_environment(policy.distribution(observations[row : row + 1]).mode())
        torch.testing.assert_close(actions[row : row + 1], single)
    for rows in (slice(0, 2), slice(2, 6), slice(1, 2)):
        part = policy.particles(theta[rows], shift[rows], scale[rows])(observations[rows])
        assert torch.equal(part, actions[rows])


def test_box_actions_are_clipped_to_their_bounds() -> None:
    observations = torch.tensor([[9.0, 0, 0, 0, 0], [-9.0, 0, 0, 0, 0], [0.0, 0, 0, 0, 0], [0.1, 0, 0, 0, 0]])
    policy = DeterministicLinear(BOX, ACTIONS["box"], normalize_observations=False)
    with torch.no_grad():
        policy.actor.net[0].weight[:, 0] = 1.0
    found = policy.to_environment(policy.distribution(observations).mode()).detach()
    np.testing.assert_array_equal(found.numpy(), policy.predict(observations.numpy())[0])
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.5], [-1.0, -2.0], [0.0, 0.0], [0.1, 0.1]]))


def test_the_linear_policy_has_one_matrix_that_begins_at_zero() -> None:
    agent = make()
    (weight,) = agent.policy.actor.parameters()
    assert weight.shape == (3, 11)
    assert not weight.any()


@pytest.mark.parametrize("counts", [(1, 4), (40, 3), (0, 5), (5, 0), (0, 0)])
def test_merged_moments_are_those_of_everything(counts: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    parts = [torch.from_numpy(rng.normal(1e4, 1.0, (count, 3))) for count in counts]
    merged = Moments.of(parts[0]).merge(Moments.of(parts[1]))
    everything = torch.cat(parts)
    assert merged.n == len(everything)
    if len(everything):
        torch.testing.assert_close(merged.mean, everything.mean(0), rtol=1e-14, atol=0)
        m2 = (everything - everything.mean(0)).square().sum(0)
        torch.testing.assert_close(merged.m2, m2, rtol=1e-9, atol=1e-9)
        normalizer = ObservationNormalizer(3)
        normalizer.merge(merged)
        whole = ObservationNormalizer(3)
        whole.merge(Moments.of(everything))
        torch.testing.assert_close(normalizer.shift, whole.shift)


@pytest.mark.parametrize("policy_class", [DeterministicLinear, DeterministicMlp])
def test_whitened_noise_is_that_of_the_first_layer(policy_class: type[DeterministicPolicy]) -> None:
    policy = policy_class(BOX, ACTIONS["box"], net_arch=(7, 6))
    size, outputs = len(parameter_vector(policy.actor)), policy.actor.net[0].out_features
    noise, M = torch.randn(3, size), torch.randn(5, 5)
    found = policy.whitened(noise, M)
    for row in range(3):
        weight = noise[row, : 5 * outputs].view(outputs, 5) @ M
        torch.testing.assert_close(found[row, : 5 * outputs].view(outputs, 5), weight)
    assert torch.equal(found[:, 5 * outputs :], noise[:, 5 * outputs :])


# The engine's parts --------------------------------------------------------------------------------------------------


def test_clipup_by_hand() -> None:
    parts = [torch.tensor([0.0, 0.0], requires_grad=True), torch.tensor([0.0], requires_grad=True)]
    optimizer = ClipUp(parts, lr=0.5, momentum=0.5, max_speed=1.5)
    parts[0].grad, parts[1].grad = torch.tensor([6.0, 0.0]), torch.tensor([8.0])
    optimizer.step()  # v = 0.5 (0.6, 0, 0.8)
    torch.testing.assert_close(parts[0].detach(), torch.tensor([-0.3, 0.0]))
    torch.testing.assert_close(parts[1].detach(), torch.tensor([-0.4]))
    optimizer.step()  # v = 0.5 v + 0.5 (0.6, 0, 0.8) = (0.45, 0, 0.6), as long as the limit, 0.75
    torch.testing.assert_close(parts[0].detach(), torch.tensor([-0.75, 0.0]))
    optimizer.step()  # 0.5 v + ... = (0.525, 0, 0.7) is too long
    torch.testing.assert_close(parts[0].detach(), torch.tensor([-1.2, 0.0]))
    parts[0].grad, parts[1].grad = torch.zeros(2), torch.zeros(1)
    optimizer.step()
    torch.testing.assert_close(parts[0].detach(), torch.tensor([-1.425, 0.0]))
    for bad in ({"lr": 0.0}, {"momentum": 1.0}, {"max_speed": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} is"):
            ClipUp(parts, **bad)


def test_ranks_and_top_pairs_by_hand() -> None:
    ranks = centered_ranks(torch.tensor([3.0, -1.0, 3.0, 10.0]))
    torch.testing.assert_close(ranks, torch.tensor([0.0, -0.5, 0.0, 0.5]).double())
    assert centered_ranks(torch.tensor([2.0])).tolist() == [0.0]
    assert centered_ranks(torch.tensor([2.0, 2.0])).tolist() == [0.0, 0.0]
    scores = torch.tensor([0.0, 5.0, 7.0, -9.0, 5.0, 1.0, 4.0, 4.0])
    assert top_pairs(scores, 1).tolist() == [2, 3]
    assert top_pairs(scores, 2).tolist() == [0, 1, 2, 3]  # of equal ones the first
    assert top_pairs(scores, 4).tolist() == list(range(8))


@pytest.mark.parametrize("levels", [1, 3, 40, 10**6])
def test_ranks_are_those_of_comparing_every_two_scores(levels: int) -> None:
    for n in (1, 2, 7, 300):
        scores = torch.randint(-levels, levels, (n,), generator=torch.Generator().manual_seed(n)).double() / 3
        scores[::5] = float("inf")
        below = (scores[:, None] > scores).sum(1) - (scores[:, None] < scores).sum(1)
        assert torch.equal(centered_ranks(scores), below.double() / max(2 * (n - 1), 1))


@pytest.mark.parametrize("estimator", ["pes", "nres", "truncated_es"])
def test_with_scores_for_utilities_the_estimate_is_the_engines(estimator: str) -> None:
    agent = make(estimator=estimator, num_envs=12)
    for _, particles, found in windows(agent, 3):
        assert torch.equal(particles.weighted(found.scores), found.sums)


# Windows -------------------------------------------------------------------------------------------------------------


class Recording(PolicySearch):
    """Keeps what it was asked for and what it answered."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.begun: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self.answers: list[tuple[Tensor, dict[str, Tensor], Tensor, Tensor]] = []

    def init(self, keys: Tensor, slots: Tensor) -> dict[str, Tensor]:
        state = super().init(keys, slots)
        self.begun.append((len(self.answers), keys, slots, state["shift"]))
        return state

    def unroll(self, theta: Tensor, state: dict[str, Tensor], window: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        after, scores, ended = super().unroll(theta, state, window)
        self.answers.append((theta.clone(), state, scores, ended))
        return after, scores, ended


def search(policy: DeterministicPolicy, num_envs: int, window: int, **options: float) -> Recording:
    env = make_vec("Hopper-v5", num_envs, autoreset="disabled", num_threads=1)
    buffers = {"ep_info_buffer": deque(), "ep_success_buffer": deque()}
    counts = {"num_timesteps": 0, "start_time": 0, "_episode_num": 0, **buffers}
    agent: Any = SimpleNamespace(policy=policy, device=torch.device("cpu"), stream_seed=0, **counts)
    collector = Collector(agent, env, PolicySearch.fields((11,), normalize=True), window)
    collector.begin(env.reset(seed=0)[0])
    return Recording(collector, SearchConfig(n_steps=window, **{"gamma": 1.0, **options}))


def hopper_policy() -> DeterministicLinear:
    policy = DeterministicLinear(BOX_11, spaces.Box(-1, 1, (3,)))
    policy.normalizer.merge(Moments.of(torch.randn(50, 11, generator=torch.Generator().manual_seed(0))))
    return policy


BOX_11 = spaces.Box(-np.inf, np.inf, (11,))


@pytest.mark.parametrize(("gamma", "offset"), [(1.0, 0.0), (0.9, 0.0), (0.9, -1.0)])
def test_windows_are_those_of_one_environment_after_the_other(gamma: float, offset: float) -> None:
    """Episodes that go on from window to window, twins with one seed, dead ones that score 0, statistics that stay."""
    policy, scheme = hopper_policy(), Scheme.of("pes", particles=8, window=16, horizon=64)
    task, theta = search(policy, 8, 16, gamma=gamma, alive_bonus_offset=offset), torch.zeros(33)
    particles = start(scheme, theta, seed=3)
    for window in range(8):
        _, particles = estimate(task, scheme, theta + 0.01 * window, 0.3, particles)
        # Statistics move on every window; an episode keeps those of its beginning.
        for moments in task.moments():
            policy.normalizer.merge(moments)

    env = make_vec("Hopper-v5", 1, autoreset="disabled", num_threads=1)
    begun = {
        (window, int(slot)): (int(key), shift)
        for window, keys, slots, shifts in task.begun
        for key, slot, shift in zip(keys, slots, shifts, strict=True)
    }
    deaths = survivals = 0
    for slot in range(8):
        twin = slot ^ 1
        for window, (thetas, state, scores, ended) in enumerate(task.answers):
            if (window, slot) in begun:
                key, shift = begun[window, slot]
                assert begun[window, twin][0] == key
                observation, _ = env.reset(seed=[key])
                steps, over = 0, False
            rows = (state["slots"] == slot).nonzero().flatten().tolist()
            assert bool(rows) is not over  # the dead are not unrolled
            if over:
                continue
            (row,) = rows
            assert torch.equal(state["shift"][row], shift)
            assert state["steps"][row] == steps
            choose = policy.particles(*(x[row : row + 1] for x in (thetas, state["shift"], state["scale"])))
            score = 0.0
            for _ in range(16):
                if over:
                    break
                observation, reward, terminated, _, _ = env.step(choose(observation))
                score += gamma**steps * (reward.item() + offset)
                steps, over = steps + 1, bool(terminated)
            assert scores[row].item() == pytest.approx(score, rel=1e-12)
            assert bool(ended[row]) is over
            deaths, survivals = deaths + over, survivals + (not over)
    assert deaths > 3
    assert survivals > 3


def test_shards_computed_apart_give_the_bits_of_those_computed_together() -> None:
    scheme, theta = Scheme.of("pes", particles=128, window=16, horizon=64), torch.zeros(33)

    def run(ranges: list[tuple[int, int]]) -> tuple[list[Tensor], ObservationNormalizer]:
        policy = hopper_policy()
        tasks = [search(policy, 2 * pairs, 16) for _, pairs in ranges]
        parts = [start(scheme, theta, 5, first_pair=first, pairs=pairs) for first, pairs in ranges]
        gradients = []
        for _ in range(3):
            both = [estimate(task, scheme, theta, 0.3, part) for task, part in zip(tasks, parts, strict=True)]
            parts = [part for _, part in both]
            whole = join([found for found, _ in both])
            gradients += [whole.gradient, whole.scores]
            for task in tasks:
                for moments in task.moments():
                    policy.normalizer.merge(moments)
        return gradients, policy.normalizer

    together, apart = run([(0, 64)]), run([(0, 32), (32, 32)])
    assert all(torch.equal(a, b) for a, b in zip(together[0], apart[0], strict=True))
    assert torch.equal(together[1].mean, apart[1].mean)
    assert torch.equal(together[1].m2, apart[1].m2)


def test_moments_are_those_of_the_observations_that_were_acted_on() -> None:
    task = search(hopper_policy(), 4, 32)
    seen: list[Tensor] = []

    class Listener(BaseCallback):
        model: Any = SimpleNamespace(num_timesteps=0)

        def _on_step(self) -> bool:
            seen.append(torch.as_tensor(self.locals["new_obs"].copy()))
            return True

    task.collector.listener = Listener()
    task.collector.agent._total_timesteps = 0
    first = task.collector.observations.clone()
    scheme, theta = Scheme.of("nres", particles=4, window=32, horizon=64), torch.zeros(33)
    found, _ = estimate(task, scheme, theta, 0.5, start(scheme, theta, 1))
    (moments,) = task.moments()
    assert moments.n == found.steps.sum() < 4 * 32
    # An environment's k-th action is chosen from the observation before its k-th step.
    rollout = task.collector.rollout
    lengths = rollout["stepped"].sum(0)
    kept = torch.cat([rollout["observations"][: lengths[i], i] for i in range(4)]).double()
    torch.testing.assert_close(moments.mean, kept.mean(0))
    for i in range(4):
        following = torch.stack(seen)[: lengths[i] - 1, i].float()
        assert torch.equal(rollout["observations"][1 : lengths[i], i], following)
    assert not torch.equal(rollout["observations"][0], first.float())  # the pairs have begun anew


def test_truncated_es_puts_twins_into_the_state_of_the_mean() -> None:
    agent = make(estimator="truncated_es", num_envs=12, sigma=0.5, n_steps=16)
    agent.learn(1)
    assert agent.scheme.particles == 8
    env = agent.env.vector
    for _ in range(5):
        before = {name: value.clone() for name, value in env.snapshot([2, 5, 8, 11]).items()}
        begins = agent.particles.due.clone()
        returns = agent.collector.episodes.returns[2::3].clone().masked_fill(begins, 0)
        states: list[Tensor] = []
        step = env.step

        def recorded(actions: Any, ids: Any = None, states=states, step=step) -> Any:
            if not states:
                states.extend(env.snapshot([i, i + 1, i + 2])["physics"] for i in (0, 3, 6, 9))
            return step(actions, ids)

        env.step = recorded
        agent.learn(1, reset_num_timesteps=False)
        del env.step
        for pair, state in enumerate(states):
            assert torch.equal(state[0], state[2])
            assert torch.equal(state[1], state[2])
            assert begins[pair] or torch.equal(state[2], before["physics"][pair])
        # The returns go on from those of the state that an environment was put into.
        rollout = agent.collector.rollout
        goes_on = ~(rollout["terminated"] | rollout["truncated"]).any(0) & rollout["stepped"][0]
        expected = returns.repeat_interleave(3) + rollout["rewards"].sum(0)
        torch.testing.assert_close(agent.collector.episodes.returns[goes_on], expected[goes_on])
    assert agent.last_metrics["steps/mean_parameters"] > 0
    total = agent.last_metrics["steps/mean_parameters"] + agent.last_metrics["steps/perturbed"]
    assert total == agent.num_timesteps


def test_the_dead_stand_still_and_are_shown_as_such() -> None:
    class Watcher(BaseCallback):
        seen = 0

        def reward_of(self, info: dict[str, Any]) -> float:
            return info["reward_forward"] + info["reward_survive"] + info["reward_ctrl"]

        def _on_step(self) -> bool:
            for info, reward in zip(self.locals["infos"], self.locals["rewards"], strict=True):
                if "x_velocity" in info:
                    assert reward == pytest.approx(self.reward_of(info), rel=1e-6)
                else:
                    assert reward == 0
                    self.seen += 1
            return True

    watcher = Watcher()
    make(n_steps=64, sigma=0.5).learn(800, callback=watcher)
    assert watcher.seen > 20


def test_collecting_ends_when_all_have_ended() -> None:
    env = make_vec("probes/OneStepReward-v0", 4, autoreset="disabled")
    observations, _ = env.reset(seed=0)
    buffer = Rollout(5, 4, PolicySearch.fields((1,), normalize=True))
    for name in ("rewards", "stepped"):
        buffer[name].fill_(1)
    ids, steps = torch.tensor([0, 3]), []
    zeros = torch.zeros(2, dtype=torch.int64)
    collect_some(
        env, lambda t, s, rows: (zeros, zeros), buffer, observations, ids, lambda step: not steps.append(step.t)
    )
    assert steps == [0]
    expected = torch.zeros(5, 4)
    expected[0, ids] = 1
    assert torch.equal(buffer["rewards"], expected.double())
    assert torch.equal(buffer["stepped"], expected.bool())


def test_counting_a_window_at_once_gives_the_bits_of_counting_each_step() -> None:
    """Steps that no callback listens to are counted when the window is over."""

    class Listener(BaseCallback):
        def _on_step(self) -> bool:
            return True

    settings = {"n_steps": 10, "sigma": 0.3, "num_envs": 12}
    quick, shown = make(**settings), make(**settings)
    quick.learn(3000)
    shown.learn(3000, callback=Listener())
    assert quick.num_timesteps == shown.num_timesteps
    assert torch.equal(quick.collector.episodes.returns, shown.collector.episodes.returns)
    assert torch.equal(quick.collector.episodes.lengths, shown.collector.episodes.lengths)
    assert quick.collector.episodes.lengths.max() > 10
    assert [(e["r"], e["l"]) for e in quick.ep_info_buffer] == [(e["r"], e["l"]) for e in shown.ep_info_buffer]
    assert torch.equal(parameter_vector(quick.policy.actor), parameter_vector(shown.policy.actor))


def test_some_environments_are_stepped_as_each_is_alone() -> None:
    env, alone = (make_vec("Hopper-v5", n, autoreset="disabled", num_threads=1) for n in (6, 1))
    observations, _ = env.reset(seed=3)
    ids, fields = torch.tensor([1, 2, 5]), PolicySearch.fields((11,), normalize=True)
    buffer, calls = Rollout(200, 6, fields), []
    for name in fields:
        buffer[name].fill_(1)
    actions = torch.tensor([[0.0, 0.0, -1.0], [0.5, 0.5, 0.5], [-0.5, 0.1, 0.4]])

    def act(t: int, s: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        chosen = actions[torch.searchsorted(ids, rows)]
        return chosen, chosen

    def on_step(step: Step) -> bool:
        calls.append((step.t, step.terminated.nonzero().flatten().tolist()))
        assert not step.rewards[[0, 3, 4]].any()
        return True

    after, _ = collect_some(env, act, buffer, observations, ids, on_step)
    lengths = buffer["stepped"].sum(0)
    assert not buffer["rewards"][:, [0, 3, 4]].any()
    assert torch.equal(after[[0, 3, 4]], observations[[0, 3, 4]])
    for row, i in enumerate(ids.tolist()):
        observation, _ = alone.reset(seed=3 + i)
        for t in range(int(lengths[i])):
            assert torch.equal(buffer["observations"][t, i], observation[0].float())
            observation, reward, terminated, _, _ = alone.step(actions[row : row + 1])
            assert buffer["rewards"][t, i] == reward[0]
            assert buffer["terminated"][t, i] == terminated[0]
        assert terminated[0]
        assert torch.equal(after[i], observation[0])
        assert not buffer["stepped"][lengths[i] :, i].any()
        assert not buffer["terminated"][lengths[i] :, i].any()
        assert (int(lengths[i]) - 1, [i]) in calls
    assert len(calls) == lengths.max()
    assert len(set(lengths[ids].tolist())) == 3


# Updates -------------------------------------------------------------------------------------------------------------


def episodes(agent: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """The noise δ [n, P] and returns [n, 2] of a first iteration of whole episodes, and how far θ went."""
    ((theta, particles, found),) = windows(agent, 1)
    delta = particles.epsilon / agent.config.sigma
    return delta.double(), found.scores.view(-1, 2), (parameter_vector(agent.policy.actor) - theta).double()


def test_ars_by_its_formula() -> None:
    """Mania et al. 2018, algorithm 2: θ ← θ + α / (b σ_R) Σ (r⁺ - r⁻) δ over the b best directions."""
    env = {"estimator": "es", "n_steps": 50, "horizon": 50, "reward_memory": 0.0, "learning_rate": 0.3, "sigma": 0.2}
    for b in (None, 3):
        delta, r, step = episodes(make(num_envs=16, top_directions=b, **env))
        order = sorted(range(8), key=lambda i: -r[i].max())[: b or 8]
        best, deviation = r[order], r[order].flatten().std(correction=0)
        expected = 0.3 / (len(order) * deviation) * ((best[:, 0] - best[:, 1])[:, None] * delta[order]).sum(0)
        torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-6)


def test_openai_es_by_its_formula() -> None:
    """Salimans et al. 2017: Adam along the mean of centered ranks times noise; its first step has the rate's length."""
    env = {"estimator": "es", "n_steps": 50, "horizon": 50, "reward_scaling": "ranks", "optimizer": "adam"}
    agent = make(num_envs=16, learning_rate=0.3, sigma=0.2, **env)
    delta, r, step = episodes(agent)
    ranks = centered_ranks(r.flatten()).view(-1, 2)
    direction = ((ranks[:, 0] - ranks[:, 1])[:, None] * delta).mean(0)
    torch.testing.assert_close(step, 0.3 * direction.sign(), rtol=1e-3, atol=0)
    torch.testing.assert_close(agent.last_metrics["train/gradient_norm"], direction.norm().item(), rtol=1e-4, atol=0)


def test_pes_by_its_formula() -> None:
    """θ ← θ + α/(2N σ_R) Σ (R⁺ - R⁻) σ ξ over windows, where ξ adds up and σ_R lags."""
    agent = make("Swimmer-v5", sigma=0.4, learning_rate=0.05, n_steps=10, horizon=40, staggered=False)
    found = windows(agent, 5)
    after = [theta for theta, _, _ in found[1:]]
    noise, variance, highest = torch.zeros(4, 16).double(), None, 0.0
    for window, ((theta, particles, estimated), end) in enumerate(zip(found, after, strict=False)):
        noise = particles.epsilon.double() / 0.4 + (noise if window % 4 else 0)
        r = estimated.scores.view(-1, 2)
        own = r.flatten().var(correction=0).item()
        scale = max(highest or own, own / MOST_SURPRISE**2) ** 0.5
        expected = 0.05 / (4 * scale) * ((r[:, 0] - r[:, 1])[:, None] * noise).sum(0)
        torch.testing.assert_close((end - theta).double(), expected, rtol=1e-4, atol=1e-7)
        kept = np.exp(-1 / 4)  # one episode of four windows
        variance = own if variance is None else kept * variance + (1 - kept) * own
        highest = max(highest, variance)


def test_schedules_reach_their_ends_and_momentum_counts_in_episodes() -> None:
    env = {"sigma": 0.4, "sigma_end": 0.1, "learning_rate": 0.02, "learning_rate_end": 0.0, "optimizer": "adam"}
    agent = make("Swimmer-v5", n_steps=10, horizon=40, momentum=0.5, beta2=0.9, **env)
    sigmas = []
    for _ in agent.iterations(80 * 4):
        sigmas.append(agent.last_metrics["train/sigma"])
    assert sigmas == pytest.approx([0.4, 0.325, 0.25, 0.175])
    (group,) = agent.optimizer.param_groups
    assert group["betas"] == pytest.approx((0.5**0.25, 0.9**0.25))
    assert group["lr"] == 0.0


def test_schedules_begin_after_the_trials() -> None:
    rounds = {"trials": (2,), "trial_steps": (80,)}
    agent = make("Swimmer-v5", n_steps=10, horizon=40, sigma=0.4, sigma_end=0.1, **rounds)
    sigmas = [agent.last_metrics["train/sigma"] for _ in agent.iterations(80 * 6)]
    assert sigmas == pytest.approx([0.4, 0.4, 0.4, 0.325, 0.25, 0.175])


def test_equal_scores_move_nothing_and_a_first_difference_is_bounded() -> None:
    agent = make("probes/OneStepReward-v0", policy="MlpPolicy", num_envs=4)
    before = parameter_vector(agent.policy.actor)
    agent.learn(2000)
    assert torch.equal(before, parameter_vector(agent.policy.actor))
    surprise = torch.tensor([0.0, 0.0, 3.0, -3.0]).double()
    assert agent.reward_scale.update(surprise, memory=1.0).item() == pytest.approx(4.5**0.5 / MOST_SURPRISE)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "clipup", "adabound"])
def test_every_optimizer_climbs_and_resumes_exactly(optimizer: str, tmp_path) -> None:
    env = {"num_envs": 16, "n_steps": 25, "horizon": 100, "sigma": 0.3, "optimizer": optimizer, "momentum": 0.5}
    agent = make("Swimmer-v5", learning_rate=0.1 if optimizer == "sgd" else 0.03, **env)
    agent.learn(16 * 25 * 8)
    agent.save(tmp_path / "half.zip")
    more = PES.load(tmp_path / "half.zip", make_vec("Swimmer-v5", 16, autoreset="disabled"), device="cpu")
    scores = []
    for _ in agent.iterations(16 * 25 * 24, reset_num_timesteps=False):
        scores.append(agent.last_metrics["train/score_mean"])
    more.learn(16 * 25 * 24, reset_num_timesteps=False)
    assert torch.equal(parameter_vector(agent.policy.actor), parameter_vector(more.policy.actor))
    # The first policy scores 0 but for its noise.
    assert np.mean(scores[-16:]) > 1.0


@pytest.mark.parametrize("policy", ["LinearPolicy", "MlpPolicy"])
def test_a_checkpoint_names_the_policy_as_users_do(policy: str, tmp_path) -> None:
    agent = make("probes/ContinuousAction-v0", policy=policy, net_arch=(4,)).learn(64)
    agent.save(tmp_path / "agent.zip")
    manifest, tensors = checkpoint.read(tmp_path / "agent.zip")
    assert manifest["policy_class"] == policy
    # The first checkpoints name classes, which had these names; now others have their own.
    for name in (policy, type(agent.policy).__name__):
        checkpoint.write(tmp_path / "named.zip", {**manifest, "policy_class": name}, tensors)
        more = PES.load(tmp_path / "named.zip", device="cpu")
        assert type(more.policy) is type(agent.policy)
        assert torch.equal(parameter_vector(agent.policy.actor), parameter_vector(more.policy.actor))


class Mlp(DeterministicMlp):
    """Another one, under a name that is an alias of ours."""


def test_a_policy_of_ones_own_is_asked_for_again(tmp_path) -> None:
    Mlp.__name__ = "MlpPolicy"
    make("probes/ContinuousAction-v0", policy=Mlp, net_arch=(4,)).save(tmp_path / "own.zip")
    with pytest.raises(checkpoint.CheckpointError, match=r"policy class test_pes.Mlp; give it again"):
        PES.load(tmp_path / "own.zip", device="cpu")
    own = PES.load(tmp_path / "own.zip", device="cpu", custom_objects={"policy_class": Mlp})
    assert type(own.policy) is Mlp


def test_perturbations_are_whitened_once_enough_has_been_observed() -> None:
    agent = make("Hopper-v5", num_envs=64, n_steps=10, sigma=0.2, whitening_memory=64 * 10 + 1)
    (_, first, _), (_, second, _), (_, third, _) = windows(agent, 3)
    spread = [particles.epsilon.view(-1, 3, 11).flatten(0, 1).T.cov() for particles in (first, second, third)]
    for isotropic in spread[:2]:
        torch.testing.assert_close(isotropic.diagonal(), torch.full((11,), 0.04), rtol=0.6, atol=0)
    # What was observed before the third window; later windows would have added to it.
    again = make("Hopper-v5", num_envs=64, n_steps=10, sigma=0.2, whitening_memory=64 * 10 + 1)
    windows(again, 2)
    seen = sum(moments.n.item() for moments in again.task.moments())
    before = again.policy.normalizer.count.item() - seen
    assert again.whitening.observed.n == pytest.approx(before * np.exp(-seen / 641) + seen)
    normalizer = again.policy.normalizer
    M = whitening_matrix(
        again.whitening.observed.of_normalized(normalizer.shift.double(), normalizer.scale.double())
    ).float()
    white = 0.2 * noise.normal(0, "perturbation", 2, (1, 32, 33))[0].view(32, 3, 11) @ M
    torch.testing.assert_close(third.epsilon, white.flatten(1), rtol=1e-4, atol=1e-6)


def test_log_ranks_count_in_their_standard_deviations() -> None:
    agent = make("Hopper-v5", n_steps=1000, estimator="es", reward_scaling="log_ranks")
    u, counted = agent._utilities(torch.tensor([3.0, -5.0, 8.0, 1.0]).double())
    weights = np.maximum(0, np.log(3) - np.log([2, 4, 1, 3]))
    expected = weights / weights.sum() - 1 / 4
    torch.testing.assert_close(u, torch.from_numpy(expected / expected.std()))
    assert counted == 2


TRIALS = {"trials": (3, 2), "trial_steps": (320, 640), "n_steps": 20, "horizon": 40, "num_envs": 16, "sigma": 0.3}


def test_trials_begin_alike_and_the_best_goes_on() -> None:
    agent = make("Swimmer-v5", policy="MlpPolicy", net_arch=(4,), learning_rate=0.05, whitening_memory=100, **TRIALS)
    first = {name: value.clone() for name, value in agent._search().items()}
    begun, scores, kept = [], [], []
    for iteration in agent.iterations(3 * 320 + 2 * 640 + 640):
        if iteration in (1, 2, 3, 5, 7):
            scores.append(agent.found.scores.topk(8).values.mean().item())
            kept.append(agent.trials.results[0][0] if agent.trials.results else None)
            begun.append({name: value.clone() for name, value in agent._search().items()})
            assert agent.particles is not None
            assert agent.particles.due.all()
    assert len(set(scores)) == 5
    for state in begun[:2]:
        assert all(torch.equal(state[name], first[name]) for name in first)
        assert state.keys() == first.keys()
    assert kept == [scores[0], max(scores[:2]), None, scores[3], None]
    assert agent.trials.round == 2
    assert agent.last_metrics["search/trial_round"] == 2
    winner, loser = agent.trials.contenders[0], begun[4]
    assert all(torch.equal(winner[name], loser[name]) for name in winner)


def test_training_that_ends_within_the_trials_says_so() -> None:
    agent = make("Swimmer-v5", **TRIALS)
    with pytest.warns(UserWarning, match=r"The trials take 2,240 environment steps and training ends after 640"):
        agent.learn(640)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent.learn(1920, reset_num_timesteps=False)
        make("Swimmer-v5", n_steps=20, horizon=40).learn(160)


@pytest.mark.filterwarnings("ignore:The trials take")
@pytest.mark.parametrize("windows_before", [1, 4, 6, 9])
def test_trials_resume_exactly(windows_before: int, tmp_path) -> None:
    settings = {"optimizer": "adam", "whitening_memory": 100, "learning_rate": 0.03, **TRIALS}
    agent = make("Swimmer-v5", **settings)
    agent.learn(320 * windows_before)
    agent.save(tmp_path / "half.zip")
    more = PES.load(tmp_path / "half.zip", make_vec("Swimmer-v5", 16, autoreset="disabled"), device="cpu")
    for each in (agent, more):
        each.learn(320 * (11 - windows_before), reset_num_timesteps=False)
    assert torch.equal(parameter_vector(agent.policy.actor), parameter_vector(more.policy.actor))
    assert torch.equal(agent.whitening.observed.m2, more.whitening.observed.m2)


def test_every_search_of_the_trials_measures_its_own_final_step_size() -> None:
    trials = {**TRIALS, "trials": (2,), "trial_steps": (4 * 320,)}
    agent = make("Swimmer-v5", optimizer="adabound", handover=0.3, learning_rate=0.03, **trials)
    measured = [agent.optimizer.param_groups[0]["final_lr"] for _ in agent.iterations(9 * 320)]
    assert measured[0] == measured[3] == measured[4] == "auto"  # the second search begins after the fourth window
    assert isinstance(measured[2], float)
    assert isinstance(measured[6], float)
    assert measured[6] != measured[2]


def test_calls_of_learn_draw_anew_and_never_repeat_a_window() -> None:
    agent = make(n_steps=8)
    seeds: list[tuple[int, ...]] = []
    perturbations: list[Tensor] = []
    reset = agent.env.vector.reset

    def recorded(*args: Any, seed: Any = None, ids: Any = None, **kwargs: Any) -> Any:
        if ids is not None:
            seeds.append(tuple(seed.tolist()))
        return reset(*args, seed=seed, ids=ids, **kwargs)

    agent.env.vector.reset = recorded
    for _ in range(3):
        agent.learn(8 * 8 * 2)
        perturbations.append(agent.particles.epsilon.clone())
    assert len(set(seeds)) == len(seeds) >= 3
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(perturbations[i], perturbations[j])


def test_a_copy_leaves_the_episodes_of_its_original_alone() -> None:
    agent = make("probes/Endless-v0", policy="MlpPolicy", num_envs=4, n_steps=3, horizon=9, staggered=False)
    agent.learn(3 * 4)
    other = copy.deepcopy(agent)
    episodes = agent.collector.episodes
    before = episodes.returns.clone(), episodes.lengths.clone()
    assert before[1].tolist() == [3] * 4
    other.learn(3 * 4)
    assert other.collector.episodes is not episodes
    assert torch.equal(episodes.returns, before[0])
    assert torch.equal(episodes.lengths, before[1])


def test_a_score_that_is_not_finite_changes_nothing() -> None:
    agent = make(n_steps=8).learn(1)
    before = parameter_vector(agent.policy.actor), agent.reward_scale.variance
    for value in (float("nan"), float("inf")):
        broken = replace(agent.found, scores=agent.found.scores.index_fill(0, torch.tensor([1]), value))
        with pytest.raises(FloatingPointError, match="this window changed nothing"):
            agent.train(broken)
    assert torch.equal(before[0], parameter_vector(agent.policy.actor))
    assert before[1] == agent.reward_scale.variance


def test_the_state_of_an_episode_cut_by_the_horizon_is_left() -> None:
    agent = make("Swimmer-v5", n_steps=10, horizon=40, staggered=True, num_envs=32)
    ages = [agent.found.phase.clone() for _ in agent.iterations(32 * 10 * 12)]
    assert all(age.max() < 4 for age in ages)
    late = torch.stack(ages[4:]).flatten().bincount(minlength=4).double()
    assert (late / late.sum() - 0.25).abs().max() < 0.07
    assert agent.collector.episodes.lengths.max() <= 40


def test_metrics_say_what_the_search_does(tmp_path) -> None:
    agent = make(n_steps=32, sigma=0.5, tensorboard_log=str(tmp_path)).learn(2000)
    metrics = agent.last_metrics
    assert metrics["steps/perturbed"] == agent.num_timesteps
    assert metrics["steps/mean_parameters"] == 0
    assert 0 <= metrics["search/twin_deaths"] <= 8
    assert metrics["train/gradient_signal_to_noise"] == pytest.approx(agent.found.signal_to_noise.item())
    assert metrics["search/xi_norm_at_age_00"] == pytest.approx(agent.found.xi_by_phase[0].item())
    assert torch.equal(metrics["search/phases"], agent.found.phase)


# Refusals ------------------------------------------------------------------------------------------------------------


class Unrestorable(GymVectorEnv):
    def snapshot(self, ids: Any = None) -> dict[str, Tensor]:
        raise SnapshotError("its state is out of reach.")


def cart_poles(number: int, kind: type[GymVectorEnv] = GymVectorEnv) -> VectorEnv:
    return kind([gymnasium.make("CartPole-v1") for _ in range(number)], autoreset="disabled")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_envs": 7}, "num_envs is 7; give a multiple of 2"),
        ({"num_envs": 8, "estimator": "truncated_es"}, "num_envs is 8; give a multiple of 3"),
        ({"horizon": 60}, "n_steps is 8, which does not divide the horizon, 60"),
        ({"horizon": 1600}, "horizon is 1600, but the environment's episodes end after 1000 steps"),
        ({"sigma": 0.0}, "sigma is 0.0; give a number above 0"),
        ({"sigma": -1.0}, "sigma is -1.0"),
        ({"sigma_end": 0.0}, "sigma_end is 0.0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate_end": -1.0}, "learning_rate_end is -1.0"),
        ({"estimator": "ps"}, "no estimator 'ps'; did you mean"),
        ({"estimator": "pes_analytic"}, "no estimator 'pes_analytic'"),
        ({"estimator": "es"}, "es unrolls whole episodes, but n_steps is 8; give n_steps=1000"),
        ({"estimator": "gpes"}, "resample_every is None for gpes"),
        ({"resample_every": 2}, "gpes needs it, and gpes alone"),
        ({"estimator": "gpes", "resample_every": 0}, "resample_every is 0"),
        ({"optimizer": "adamw"}, "no optimizer 'adamw'; did you mean 'adam'"),
        ({"reward_scaling": "rank"}, "no reward_scaling 'rank'; did you mean 'ranks'"),
        ({"reward_scaling": "ranks"}, "compare whole ones"),
        ({"reward_scaling": "log_ranks"}, "compare whole ones"),
        ({"top_directions": 2}, "compare whole ones"),
        ({"whitening_memory": 0}, "whitening_memory is 0; give an integer of at least 1"),
        ({"whitening_memory": 9, "normalize_observations": False}, "only normalized observations are whitened"),
        ({"trials": (3, 3), "trial_steps": (10, 10)}, r"trials is \(3, 3\); give ever fewer"),
        ({"trials": (3, 0), "trial_steps": (10, 10)}, r"trials is \(3, 0\)"),
        ({"trials": (3,), "trial_steps": (0,)}, r"trial_steps is \(0,\)"),
        ({"trials": (3,)}, "trials has 1 rounds and trial_steps 0"),
        ({"estimator": "es", "n_steps": 1000, "top_directions": 5}, "top_directions is 5; there are 4 pairs"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"beta2": -0.1}, "beta2 is -0.1"),
        ({"handover": 0.0}, "handover is 0.0"),
        ({"reward_memory": -1.0}, "reward_memory is -1.0"),
        ({"policy": "LinearPolcy"}, "no policy 'LinearPolcy'; did you mean 'LinearPolicy'"),
        ({"policy": ActorCriticPolicy}, "a subclass of agents.evolution.policies.DeterministicPolicy"),
        ({"policy_kwargs": {"log_std_init": 0.0}}, "policy_kwargs has no 'log_std_init'"),
    ],
)
def test_what_is_not_possible_is_refused_at_construction(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**changed)


def test_choices_are_not_whitened() -> None:
    with pytest.raises(ValueError, match=r"observations are Discrete\(16\); only normalized ones, those of a Box"):
        make(make_vec("FrozenLake-v1", 8, autoreset="disabled"), whitening_memory=9)


def test_environments_that_cannot_do_what_the_estimator_needs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'truncated_es'.*state is out of reach"):
        make(cart_poles(6, Unrestorable), estimator="truncated_es")
    make(cart_poles(6, Unrestorable))
    make(cart_poles(6), estimator="truncated_es").learn(100)
    with pytest.raises(ValueError, match=r"autoreset='disabled'"):
        make(make_vec("CartPole-v1", 6))
    endless = GymVectorEnv([Endless() for _ in range(2)], autoreset="disabled")
    with pytest.raises(ValueError, match="no limit: give horizon too"):
        make(endless, estimator="es")
    make(endless, horizon=24).learn(64)


class Endless(gymnasium.Env):
    observation_space = spaces.Box(-1, 1, (1,))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        return np.zeros(1, dtype=np.float32), float(action), False, False, {}


def test_the_defaults_are_possible() -> None:
    config = PESConfig()
    assert replace(config) == config
    copy.deepcopy(make(policy="MlpPolicy", net_arch=(4,)).policy)


def test_copies_of_one_environment_are_as_good_as_new_ones() -> None:
    def agent(env: Any) -> PES:
        return PES("LinearPolicy", env, seed=0, n_steps=10, device="cpu")

    def environment() -> gymnasium.Env:
        return gymnasium.make("Pendulum-v1", max_episode_steps=20)

    made = agent(make_vec(environment, 20, autoreset="disabled")).learn(600)
    dummy = agent(DummyVecEnv([environment] * 20)).learn(600)
    copied = agent(environment()).learn(600)
    assert copied.n_envs == copied.config.num_envs == 20
    for other in (dummy, copied):
        assert other.episode_returns == made.episode_returns
        assert torch.equal(parameter_vector(other.policy.actor), parameter_vector(made.policy.actor))
    four = PES("LinearPolicy", environment(), num_envs=4, n_steps=10)
    assert four.n_envs == 4


def test_an_environment_that_cannot_be_copied_is_refused_in_words() -> None:
    env = gymnasium.make("Pendulum-v1")
    env.unwrapped.held = (number for number in ())
    with pytest.raises(TypeError, match=r"cannot be copied.*callable"):
        PES("LinearPolicy", env)
