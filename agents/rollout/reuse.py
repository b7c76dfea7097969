"""Learning once more from rollouts of the last few policies: what is kept of them, and how much each sample counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from agents.config import CommonConfig, at_least, between
from agents.rollout.buffer import FieldSpec, Rollout

FINAL = "final_observations"
"""The field of rollouts that keep what each step came to, where no device is asked which episodes ended."""


@dataclass(frozen=True, kw_only=True)
class ReuseConfig(CommonConfig):
    """How long samples are learned from."""

    reused_rollouts: Annotated[int, at_least(0)] = 3
    """Rollouts before the last one that an update learns from once more, each sample weighed by how likely the policy
    still takes its action (V-trace); 0: none."""
    reuse_until: Annotated[float, between(0, 1)] | None = 0.3
    """Share of training over which reuse fades: in equal times twice as many rollouts are made for an update, until all
    that it learns from are new. Before that updates are smaller, see `ReuseConfig.stage`. None: reuse stays."""

    def stage(self, progress: float) -> Stage:
        """Say how samples are used when a share of training is over.

        The fewer samples of an update are new, the more of its errors are those of the update before, along which steps
        add up: with a share f of new samples the KL asked for is f^1.5 target_kl, and damping as much larger. If
        errors were independent, f would make as much of them per sample; if they were the same, f².
        """
        rollouts = 1 + self.reused_rollouts
        if self.reuse_until is None:
            return Stage(rollouts, 1, 1.0)
        halvings = rollouts.bit_length() - 1
        done = halvings if progress >= self.reuse_until else int(progress / self.reuse_until * halvings)
        kept = rollouts >> done
        return Stage(kept, rollouts // kept, (rollouts // kept / rollouts) ** 1.5)


class Stage(NamedTuple):
    """How samples are used for a while."""

    kept: int
    """Iterations whose rollouts an update learns from."""
    new: int
    """Rollouts of an iteration."""
    caution: float
    """What target_kl is multiplied by, and damping divided."""


def side_by_side(long: Rollout, n_steps: int) -> Rollout:
    """Give a rollout's parts of n_steps each as those of so many more environments; itself if it is one. What a part's
    steps are worth beyond it, the critic says.

    Args:
        n_steps: divides T.
    """
    T, N, parts = n_steps, long.num_envs, long.n_steps // n_steps
    if parts == 1:
        return long
    assert long.last_observations is not None
    made = Rollout(T, parts * N, long.specs, long.device)
    for name in long.specs:
        made[name].unflatten(1, (parts, N)).copy_(long[name].unflatten(0, (parts, T)).transpose(0, 1))
    if FINAL not in long.specs:
        steps, ids, observations = long.final_observations()
        made.take_final(steps % T, steps // T * N + ids, observations)
    made.last_observations = torch.cat([long["observations"][T::T].flatten(0, 1), long.last_observations])
    return made


class RecentRollouts:
    """The last rollouts side by side: one of so many more environments, with the field "log_probs", log μ(a|s) of each
    action under the policy μ that took it.

    Its tensors are allocated as rollouts come in until there are as many as it keeps; from then on they are filled in
    place.

    Args:
        most: rollouts that it keeps, at least 1.

    Attributes:
        trusted: whether an update from the last one came to its end. If not it may hold anything, and all begins anew.

    Source: Queeney et al. 2022, "Generalized policy improvement algorithms with theoretically supported sample reuse",
    section 4, https://arxiv.org/abs/2206.13714.
    """

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0
        self.rollout: Rollout | None = None
        self.trusted = True
        self._finals: list[tuple[Tensor, Tensor, Tensor]] = []

    def take_in(self, new: Rollout, log_probs: Tensor) -> Rollout:
        """Keep a copy of a rollout, in the place of the oldest if there are enough, and give all that are kept. Of
        other sizes than those before, it is the first again.

        Args:
            new: a complete rollout, where the policy trains.
            log_probs: of its actions under the policy that took them, [T * N], steps outermost.
        """
        T, N = new.n_steps, new.num_envs
        if not (self.trusted and self._fits(new)):
            self.forget()
        self.trusted, place = False, self.taken % self.most
        if self.rollout is None or self.rollout.num_envs == place * N:
            self.rollout = self._wider(new, N)
        elif FINAL in new.specs and FINAL not in self.rollout.specs:  # it was saved elsewhere
            self.rollout = self._wider(new, 0)
        kept, columns = self.rollout, slice(place * N, (place + 1) * N)
        for name in new.specs:
            kept[name][:, columns] = new[name]
        kept["log_probs"][:, columns] = log_probs.view(T, N)
        assert kept.last_observations is not None
        assert new.last_observations is not None
        kept.last_observations[columns] = new.last_observations
        if FINAL not in new.specs:
            steps, ids, observations = new.final_observations()
            self._finals[place : place + 1] = [(steps, ids + place * N, observations)]
            kept.take_final(*(torch.cat(parts) for parts in zip(*self._finals, strict=True)))
        self.taken += 1
        return kept

    @property
    def is_full(self) -> bool:
        """Whether there are as many as it keeps, so that they stay where they are."""
        return self.taken >= self.most

    def forget(self) -> None:
        """Begin anew, without any."""
        self.rollout, self.taken, self.trusted, self._finals = None, 0, True, []

    def _fits(self, new: Rollout) -> bool:
        """Say whether a rollout is like those that are kept, of which there are as many as there should be."""
        kept, width = self.rollout, new.num_envs * min(self.taken, self.most)
        if kept is None or kept.specs.keys() - {"log_probs", FINAL} != new.specs.keys() - {FINAL}:
            return False
        return (kept.n_steps, kept.num_envs, kept.device) == (new.n_steps, width, new.device)

    def _wider(self, new: Rollout, more: int) -> Rollout:
        """Give what is kept with room for more environments, and with a rollout's fields."""
        before, width = self.rollout, 0 if self.rollout is None else self.rollout.num_envs
        wider = Rollout(new.n_steps, width + more, new.specs | {"log_probs": FieldSpec()}, new.device)
        assert new.last_observations is not None
        wider.last_observations = new.last_observations.new_zeros((wider.num_envs, *new.last_observations.shape[1:]))
        if before is not None and before.last_observations is not None:
            wider.last_observations[:width] = before.last_observations
            for name in before.specs:
                wider[name][:, :width] = before[name]
            if FINAL in new.specs and FINAL not in before.specs:
                came_to = wider[FINAL][:, :width]
                came_to[:-1], came_to[-1] = before["observations"][1:], before.last_observations
                steps, ids, observations = before.final_observations()
                came_to[steps, ids] = observations
        return wider

    def tensors(self) -> dict[str, Tensor]:
        """Give what it keeps."""
        kept = self.rollout
        if kept is None or kept.last_observations is None or not self.trusted:
            return {}
        final = dict(zip(("final.steps", "final.ids", "final.observations"), kept.final_observations(), strict=True))
        order = (final["final.steps"] * kept.num_envs + final["final.ids"]).argsort()
        if FINAL in kept.specs:  # of every step, where elsewhere there are those of truncated episodes
            order = order[kept["truncated"].flatten()]
        final = {name: x[order] for name, x in final.items()}
        fields = {f"field.{name}": kept[name] for name in kept.specs if name != FINAL}
        counts = {"taken": torch.tensor(self.taken), "most": torch.tensor(self.most)}
        return {**counts, "last": kept.last_observations, **fields, **final}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        self.forget()
        if not tensors:
            return
        fields = {name[6:]: x for name, x in tensors.items() if name.startswith("field.")}
        specs = {name: FieldSpec(tuple(x.shape[2:]), x.dtype) for name, x in fields.items()}
        T, width = fields["rewards"].shape
        kept = self.rollout = Rollout(T, width, specs, fields["rewards"].device)
        for name, x in fields.items():
            kept[name].copy_(x)
        kept.last_observations, self.taken = tensors["last"].clone(), int(tensors["taken"])
        self.most = int(tensors.get("most", self.most))
        rollouts = min(self.taken, self.most)
        finals = tensors["final.steps"], tensors["final.ids"], tensors["final.observations"]
        of = finals[1] // (width // rollouts)
        self._finals = [(finals[0][of == k], finals[1][of == k], finals[2][of == k]) for k in range(rollouts)]
        kept.take_final(*finals)
