"""Environments that are spread over an executor's workers, and the collector that fills rollouts there.

Environments are cut into fixed shards, each with a collector of its own and a copy of the policy. Noise is drawn by
counters and results are put together in the shards' order: they depend on a shard's width, never on the workers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agents.cluster.executor import Executor, Work
from agents.rollout.buffer import FieldSpec, Rollout
from agents.rollout.collector import Collector, Sample
from envs.vector import Ids, Seeds, SnapshotError, TaskVectorEnv, VectorEnv

Acting = dict[str, dict[str, Tensor]]
"""What a policy acts by: the states of its modules, by name."""


class Spread(VectorEnv):
    """Environments that live on an executor's workers while an agent learns in them, and here otherwise.

    An agent's collector sends them away. What else is asked of them has them come home first, but for `snapshot`.

    Args:
        vector: the environments, as `envs.make_vec` makes them.
        executor: who works on their shards; it is closed with them.

    Raises:
        SnapshotError: the environments step all together, or cannot be put back.
    """

    def __new__(cls, vector: VectorEnv, executor: Executor) -> Spread:
        return super().__new__(SpreadTasks if isinstance(vector, TaskVectorEnv) else Spread)

    def __init__(self, vector: VectorEnv, executor: Executor) -> None:
        if type(vector).part is VectorEnv.part:
            vector.part(0, vector.num_envs)  # says so
        super().__init__(
            vector.num_envs,
            vector.single_observation_space,
            vector.single_action_space,
            autoreset=vector.autoreset,
            device=vector.device,
        )
        self.home, self.executor = vector, executor
        self.spec, self.made_from, self.metadata = vector.spec, vector.made_from, vector.metadata
        self.tells_of_episodes = vector.tells_of_episodes
        self.blowups = self.blowups_before = vector.blowups
        self.shards: list[slice] = []
        """The environments of each shard while they are away."""
        self.on_return: Callable[[], None] | None = None
        """Called before they come home as they stand: whoever has left something with the shards takes it back."""

    def __getattr__(self, name: str) -> Any:
        if name == "home":
            raise AttributeError(name)
        return getattr(self.home, name)

    def leave(self, width: int, make: Callable[[VectorEnv, int], Any]) -> None:
        """Send the environments away, in shards of a width: make gives a shard of a part and its first environment."""
        n, self.blowups_before = self.num_envs, self.blowups
        self.shards = [slice(first, min(first + width, n)) for first in range(0, n, width)]

        def part(shard: slice) -> Any:
            return make(self.home.part(shard.start, shard.stop - shard.start, self.executor.threads), shard.start)

        self.executor.start([part(shard) for shard in self.shards])

    def come_home(self, keep: bool = True) -> VectorEnv:
        """Have the environments here, as they stand now, unless it does not matter how."""
        if self.shards:
            if keep:
                if self.on_return is not None:
                    self.on_return()
                self.home.restore(self.snapshot())
            self.shards, self.on_return = [], None
        return self.home

    def snapshot(self, ids: Ids = None) -> dict[str, Tensor]:
        if not self.shards:
            return self.home.snapshot(ids)
        if why := getattr(self.home, "unrepeatable", ""):
            raise SnapshotError(why)
        parts = self.executor.each(_snapshot, alters=False)
        rows = torch.from_numpy(self._rows(ids))
        return {name: _stacked([part[name] for part in parts])[rows] for name in parts[0]}

    def mark(self) -> Callable[[], dict[str, Tensor]]:
        if not self.shards:
            return self.home.mark()
        back = self.executor.mark()

        def taken() -> dict[str, Tensor]:
            back()
            return self.snapshot()

        return taken

    def restore(self, snapshot: dict[str, Tensor], ids: Ids = None) -> Tensor:
        return self.come_home(keep=ids is not None).restore(snapshot, ids)

    def reset(
        self, *, seed: Seeds = None, ids: Ids = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        keep = ids is not None or options is not None or not isinstance(seed, (int, np.integer))
        return self.come_home(keep).reset(seed=seed, ids=ids, options=options)

    def step(self, actions: Any, ids: Ids = None) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        return self.come_home().step(actions, ids)

    def get_attr(self, name: str, ids: Ids = None) -> tuple[Any, ...]:
        return self.come_home().get_attr(name, ids)

    def call(self, name: str, *args: Any, ids: Ids = None, **kwargs: Any) -> tuple[Any, ...]:
        return self.come_home().call(name, *args, ids=ids, **kwargs)

    def set_attr(self, name: str, values: Any, ids: Ids = None) -> None:
        self.come_home().set_attr(name, values, ids)

    def render(self) -> tuple[Any, ...] | None:
        return self.come_home().render()

    def close_extras(self, **kwargs: Any) -> None:
        self.shards = []
        self.executor.close()
        self.home.close()


class SpreadTasks(Spread, TaskVectorEnv):
    """The same of environments with tasks."""

    @property
    def max_episode_steps(self) -> int:  # type: ignore[override]
        """Give the horizon."""
        return self.home.max_episode_steps  # type: ignore[attr-defined]

    def draw_tasks(self, numbers: Any, split: Any = None) -> np.ndarray:
        return self.come_home().draw_tasks(numbers, split)  # type: ignore[attr-defined]

    def set_tasks(self, tasks: Any, ids: Ids = None) -> None:
        self.come_home().set_tasks(tasks, ids)  # type: ignore[attr-defined]


class Report(NamedTuple):
    """What a shard's collector counted."""

    steps: int
    ends: np.ndarray
    """Of each episode that ended: which rollout of the call, its step, and the environment's number; int64 [k, 3]."""
    returns: Tensor
    lengths: Tensor
    told: list[dict[str, Any]]
    """What infos said of them, if they said anything."""
    observations: Tensor
    """Current in the environments, [n, *O]."""
    running: tuple[Tensor, Tensor]
    """Returns and lengths of the episodes that run, [n] each."""
    blowups: int


class Shard:
    """Some of a run's environments with a collector and a policy, where they are worked on.

    Args:
        vector: the environments.
        first: the first one's number among all of the run's.
        policy: acts here; its own copy.
        seed: the run's, for noise.
        fields, n_steps: of rollouts.
        observations: current in the environments.
        running: returns and lengths of the episodes that run.
    """

    def __init__(
        self,
        vector: VectorEnv,
        first: int,
        policy: Any,
        seed: int,
        fields: dict[str, FieldSpec],
        n_steps: int,
        observations: Tensor,
        running: tuple[Tensor, Tensor],
    ) -> None:
        self.vector, self.policy, self.first = vector, policy, first
        self.collector = _ShardCollector(vector, policy, seed, fields, n_steps, first)
        self.collector.go_on(observations, running)
        self.inside: Any = None
        """What an algorithm keeps with the shard."""

    def act_as(self, acting: Acting) -> None:
        """Have the policy act by these states."""
        for name, module in self.policy.named_children():
            if name in acting:
                module.load_state_dict(acting[name])

    def state(self) -> tuple[Any, ...]:
        """Give all that follows depends on, beside the arguments of calls."""
        collector = self.collector
        running = collector.episodes.returns, collector.episodes.lengths
        return self.vector.snapshot(), self.vector.blowups, collector.observations, running, copy.copy(self.inside)

    def restore(self, state: tuple[Any, ...]) -> None:
        """Take back what `state` gave."""
        snapshot, self.vector.blowups, observations, running, self.inside = state
        self.vector.restore(snapshot)
        self.collector.go_on(observations, running)


class _ShardCollector(Collector):
    """Collects in a shard, and keeps what it counts for a report."""

    def __init__(
        self, vector: VectorEnv, policy: Any, seed: int, fields: dict[str, FieldSpec], n_steps: int, first: int
    ) -> None:
        counts: Any = SimpleNamespace(policy=policy, device=vector.device, stream_seed=seed, num_timesteps=0)
        super().__init__(counts, vector, fields, n_steps, first)
        self._finished: list[tuple[np.ndarray, Tensor, Tensor]] = []
        self._all_told: list[dict[str, Any]] = []

    def go_on(self, observations: Tensor, running: tuple[Tensor, Tensor]) -> None:
        """Go on in episodes that run."""
        self.begin(observations.clone())
        self.episodes.returns, self.episodes.lengths = (x.clone() for x in running)

    def report(self) -> Report:
        """Give what was counted since the last one."""
        ends, returns, lengths = zip(*self._finished, strict=True)
        numbered = [np.insert(end, 0, number, axis=1) for number, end in enumerate(ends)]
        assert self.observations is not None
        report = Report(
            self.agent.num_timesteps,
            np.concatenate(numbered),
            torch.cat(returns),
            torch.cat(lengths),
            self._all_told,
            self.observations,
            (self.episodes.returns, self.episodes.lengths),
            self.vector.blowups,
        )
        self.agent.num_timesteps, self._finished, self._all_told = 0, [], []
        return report

    def _finish(self, returns: Tensor, lengths: Tensor) -> list[dict[str, Any]]:
        ended = self.rollout["terminated"] | self.rollout["truncated"]
        ends = ended.nonzero().numpy() + np.array([0, self.first])
        self._finished.append((ends, returns, lengths))
        self._all_told += self._told
        self._told = []
        return []


class SpreadCollector(Collector):
    """A collector of environments that are spread over an executor's workers.

    Args:
        agent, vector, fields, n_steps: see `Collector`.
        width: environments of a shard, a multiple of `noise.SHARD`.
    """

    vector: Spread

    def __init__(self, agent: Any, vector: Spread, fields: dict[str, FieldSpec], n_steps: int, width: int) -> None:
        super().__init__(agent, vector, fields, n_steps)
        self.width = width
        vector.come_home()

    @property
    def shards(self) -> list[slice]:
        """Give the environments of each shard, which are sent away if they are here."""
        vector, agent = self.vector, self.agent
        if not vector.shards:
            assert self.observations is not None
            observations, episodes, policy = self.observations, self.episodes, copy.deepcopy(self.policy)

            def make(part: VectorEnv, first: int) -> Callable[[], Shard]:
                rows = slice(first, first + part.num_envs)
                running = episodes.returns[rows], episodes.lengths[rows]
                seed: int = agent.stream_seed  # type: ignore[attr-defined]
                kept = self.rollout.specs, self.rollout.n_steps, observations[rows], running
                return partial(Shard, part, first, policy, seed, *kept)

            vector.leave(self.width, make)
        return vector.shards

    def each(
        self, work: Work, *shared: Any, own: Sequence[tuple[Any, ...]] | None = None, alters: bool = True
    ) -> list[Any]:
        """Do work on every shard, see `Executor.each`; the environments are sent away if they are here."""
        assert self.shards
        return self.vector.executor.each(work, *shared, own=own, alters=alters)

    def acting(self) -> Acting:
        """Give what the policy acts by now: all of its modules but the critic."""
        critic = getattr(self.policy, "critic", None)
        modules = {name: module for name, module in self.policy.named_children() if module is not critic}
        return {name: module.state_dict() for name, module in modules.items()}

    def fill(self, counter: int, sample: Sample | None = None) -> Rollout | None:
        """Collect T steps of all environments where they are; the arguments are those of `Collector.fill`."""
        self.refuse_listener()
        if sample is not None:
            raise ValueError("workers sample by the policy; leave sample out.")
        rollout = self.rollout
        rollout.clear()
        reports, parts, finals = zip(*self.each(_fill, self.acting(), counter, rollout.n_steps), strict=True)
        for shard, part in zip(self.shards, parts, strict=True):
            for name, values in part.items():
                rollout[name][:, shard] = values
        steps, ids, observations = (torch.cat(x) for x in zip(*finals, strict=True))
        order = torch.from_numpy(np.lexsort((ids.numpy(), steps.numpy())))
        rollout.take_final(steps[order], ids[order], observations[order])
        self.take(reports)
        rollout.last_observations = self.observations
        return rollout.to(self.device)

    def take(self, reports: Sequence[Report]) -> None:
        """Count what the shards counted, in the order in which it would have happened here."""
        agent = self.agent
        agent.num_timesteps += sum(report.steps for report in reports)
        ends = np.concatenate([report.ends for report in reports])
        order = np.lexsort(ends.T[::-1])
        returns, lengths = (torch.cat(x)[order] for x in ([r.returns for r in reports], [r.lengths for r in reports]))
        told = [episode for report in reports for episode in report.told]
        self._told = [told[i] for i in order] if told else []
        self._finish(returns, lengths)
        with torch.inference_mode(False):
            self.observations = torch.cat([report.observations for report in reports])
            running = zip(*(report.running for report in reports), strict=True)
            self.episodes.returns, self.episodes.lengths = (torch.cat(parts) for parts in running)
        self.vector.blowups = self.vector.blowups_before + sum(report.blowups for report in reports)
        for name, value in self.vector.executor.metrics().items():
            agent.logger.record(name, value)

    def leave(self, error: BaseException) -> None:
        self.observations, self._told = None, []

    def refuse_listener(self) -> None:
        """Raise ValueError if callbacks want to see single steps."""
        if self.listener is not None:
            raise ValueError(
                "callbacks and the progress bar see single steps, which the workers make elsewhere; leave them out, or "
                "train without an executor."
            )


def _fill(
    shard: Shard, acting: Acting, counter: int, n_steps: int
) -> tuple[Report, dict[str, Tensor], tuple[Tensor, ...]]:
    """Fill a shard's rollout; gives what was counted, the fields, and the last observations of truncated episodes."""
    shard.act_as(acting)
    if shard.collector.rollout.n_steps != n_steps:
        shard.collector.lengthen(n_steps)
    rollout = shard.collector.fill(counter)
    assert rollout is not None
    steps, ids, final = rollout.final_observations()
    fields = {name: rollout[name] for name in rollout.specs}
    return shard.collector.report(), fields, (steps, ids + shard.first, final)


def _snapshot(shard: Shard) -> dict[str, Tensor]:
    return shard.vector.snapshot()


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Put rows below each other; second dimensions that differ are filled up with zeros."""
    if parts[0].ndim > 1 and len({part.shape[1] for part in parts}) > 1:
        longest = max(part.shape[1] for part in parts)
        parts = [torch.cat((x, x.new_zeros(len(x), longest - x.shape[1], *x.shape[2:])), 1) for x in parts]
    return torch.cat(list(parts))
