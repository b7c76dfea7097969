"""A rollout: [T, N, ...] tensors that are allocated once and filled in place, and what its steps were worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from agents.config import CommonConfig, at_least, between
from agents.devices import resolved, sent
from envs.vector import EpisodeStatistics


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig(CommonConfig):
    """How advantages are estimated."""

    gae_lambda: Annotated[float, between(0, 1)] = 0.95
    """Lambda of generalized advantage estimation (Schulman et al. 2016)."""
    normalize_advantage: bool = True
    """Whether advantages are shifted to mean 0 and scaled to standard deviation 1: in each rollout, in each minibatch
    where there are any, and of several tasks in each."""


@dataclass(frozen=True, kw_only=True)
class MinibatchConfig(AdvantageConfig):
    """How a rollout is gone through in minibatches."""

    batch_size: Annotated[int, at_least(1)] = 64
    """Samples per minibatch; divides n_steps * num_envs. At least 2 where advantages are normalized."""
    n_epochs: Annotated[int, at_least(1)] = 10
    """Passes over the rollout per iteration."""

    def __post_init__(self) -> None:
        super().__post_init__()
        alone = self.batch_size == 1 and self.normalize_advantage
        self.require("batch_size", not alone, "an integer of at least 2, or normalize_advantage=False")

    def minibatches(self, num_envs: int) -> int:
        """Count the minibatches of a rollout of num_envs environments; ValueError if it cannot be divided."""
        n = self.n_steps * num_envs
        if n % self.batch_size:
            divisors = (size for size in range(2, n + 1) if n % size == 0)
            nearest = min(divisors, key=lambda size: abs(size - self.batch_size), default=n)
            raise ValueError(
                f"batch_size is {self.batch_size}, which does not divide n_steps * num_envs = {self.n_steps} * "
                f"{num_envs} = {n}; give a divisor, such as {nearest}."
            )
        return n // self.batch_size


LARGEST_REWARD = 1e15
"""Largest size of a reward: float32 holds the squares of what a rollout of such adds up to."""


class FieldSpec(NamedTuple):
    """What a rollout keeps per step and environment."""

    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32


def buffer_fields(policy: Any) -> dict[str, FieldSpec]:
    """Declare what is kept of the steps of a policy that samples its actions."""
    head = policy.head
    return {
        "observations": FieldSpec(policy.observation_space.shape or ()),
        "actions": FieldSpec(head.action_shape, head.action_dtype),
        "rewards": FieldSpec(dtype=torch.float64),
        "terminated": FieldSpec(dtype=torch.bool),
        "truncated": FieldSpec(dtype=torch.bool),
    }


class Rollout:
    """T steps of N environments, with only the fields that its user declares.

    Each field is a tensor [T, N, *shape], read by name: rollout["rewards"].

    Args:
        n_steps: T, at least 1.
        num_envs: N, at least 1.
        fields: name -> `FieldSpec`. Other observations than those of steps have the shape and dtype of "observations".
        device: where the tensors live.
        pin_memory: page-locked memory, from which copies to a GPU do not block.

    Attributes:
        last_observations: those after the last step, [N, *O]; None before a rollout is complete.

    Raises:
        ValueError: a size is below 1, or there are no fields.
    """

    def __init__(
        self,
        n_steps: int,
        num_envs: int,
        fields: Mapping[str, FieldSpec],
        device: torch.device | str = "cpu",
        *,
        pin_memory: bool = False,
    ) -> None:
        for name, size in (("n_steps", n_steps), ("num_envs", num_envs)):
            if size < 1:
                raise ValueError(f"{name} is {size}; a rollout holds at least 1.")
        if not fields:
            raise ValueError("fields is empty; declare what the rollout shall keep.")
        self.n_steps = n_steps
        self.num_envs = num_envs
        self.device = resolved(device)
        self.specs = dict(fields)
        self.last_observations: Tensor | None = None
        self._fields = {
            name: torch.zeros((n_steps, num_envs, *shape), dtype=dtype, device=self.device, pin_memory=pin_memory)
            for name, (shape, dtype) in self.specs.items()
        }
        self._final: list[tuple[Tensor, Tensor, Tensor]] = []
        self._twin: Rollout | None = None
        self._copies: torch.Event | None = None  # those to the twin: over once this is

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._fields[name]
        except KeyError:
            raise KeyError(f"there is no field {name!r}; this rollout keeps {', '.join(self._fields)}.") from None

    def clear(self) -> None:
        """Begin a new rollout. The fields keep their memory and are overwritten step by step."""
        if self._copies is not None:
            self._copies.synchronize()
        self._final, self.last_observations, self._copies = [], None, None

    def add(self, t: int, **values: Tensor) -> None:
        """Copy values of one step, [N, *shape] each, into row t of their fields; dtypes are cast. Step 0 begins a new
        rollout.

        Raises:
            ValueError: a field is unknown, or a value has another shape.
        """
        if unknown := values.keys() - self._fields.keys():
            raise ValueError(
                f"add got {', '.join(sorted(unknown))}; this rollout keeps {', '.join(sorted(self._fields))}."
            )
        if t == 0:
            self._final, self.last_observations = [], None
            if self._copies is not None:
                self.clear()
        for name, value in values.items():
            row = self[name][t]
            if value.shape != row.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; the rollout keeps {tuple(row.shape)} a step.")
            row.copy_(value)

    def put(self, name: str, t: int, ids: Tensor, values: Tensor) -> None:
        """Copy values [k, *shape] of the environments ids [k] into row t of a field, cast to its dtype; the others'
        entries stay.
        """
        row = self._fields[name][t]
        row.index_copy_(0, ids, values if values.dtype == row.dtype else values.to(row.dtype))

    def add_final(self, t: int, ids: Tensor, observations: Tensor) -> None:
        """Keep the observations that truncated episodes ended in at step t.

        Args:
            ids: the environments, int64 [k].
            observations: [k, *O]; copied.

        Raises:
            ValueError: the rollout has no field "observations", or the shape differs from it.
        """
        shape, dtype = self._observation_spec()
        if observations.shape != (len(ids), *shape):
            raise ValueError(f"observations have shape {tuple(observations.shape)}; give {(len(ids), *shape)}.")
        ids = ids.to(self.device, torch.int64, copy=True)
        kept = observations.to(self.device, dtype, copy=True)
        self._final.append((torch.full_like(ids, t), ids, kept))

    def take_final(self, steps: Tensor, ids: Tensor, observations: Tensor) -> None:
        """Keep what `final_observations` of others gave, in place of what was kept."""
        self._final = [(steps, ids, observations)] if len(ids) else []

    def final_observations(self) -> tuple[Tensor, Tensor, Tensor]:
        """Give what `add_final` kept since `clear`: steps [k], environments [k] and observations [k, *O]; of every step
        where there is a field "final_observations".
        """
        if "final_observations" in self.specs:  # of every step
            place = torch.arange(self.n_steps * self.num_envs, device=self.device)
            return place // self.num_envs, place % self.num_envs, self["final_observations"].flatten(0, 1)
        if not self._final:
            none = torch.empty(0, dtype=torch.int64, device=self.device)
            return none, none, self["observations"].new_empty((0, *self["observations"].shape[2:]))
        steps, ids, observations = (torch.cat(parts) for parts in zip(*self._final, strict=True))
        return steps, ids, observations

    def to(self, device: torch.device | str) -> Rollout:
        """Give this rollout on another device: itself if it is there already, else a twin that is allocated once and
        filled by one copy per field.

        From pinned memory the copies do not block; the next rollout begins when they are over.
        """
        if device == self.device or resolved(device) == self.device:
            return self
        device = resolved(device)
        if self._twin is None or self._twin.device != device:
            self._twin = Rollout(self.n_steps, self.num_envs, self.specs, device)
        self._twin.clear()
        for name, tensor in self._fields.items():
            self._twin._fields[name].copy_(tensor, non_blocking=device.type != "cpu")
        if self._final:
            steps, ids, observations = (sent(part, device) for part in self.final_observations())
            self._twin._final.append((steps, ids, observations))
        if self.last_observations is not None:
            self._twin.last_observations = sent(self.last_observations, device)
        if device.type not in ("cpu", "meta"):
            self._copies = torch.Event(device)
            self._copies.record()
        return self._twin

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_twin": None, "_copies": None}

    def _observation_spec(self) -> FieldSpec:
        if "observations" not in self.specs:
            raise ValueError("final observations need the field 'observations', which this rollout does not keep.")
        return self.specs["observations"]


@torch.no_grad()
def advantages(
    batch: Rollout, values: Tensor, policy: Any, gamma: float, gae_lambda: float, ratios: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Estimate each step's advantage and value target: [T * N] each, steps outermost.

    Args:
        batch: a complete rollout, where the policy trains.
        values: V of its observations, in reward units, [T * N].
        policy: has `critic` (normalized observations to values) and `normalize`, for what the episodes came to.
        gamma: discount γ per environment step.
        gae_lambda: λ of `gae`.
        ratios: of `gae`, [T * N].
    """
    assert batch.last_observations is not None
    values = values.view(batch.n_steps, batch.num_envs)
    last = policy.critic(policy.normalize(batch.last_observations))
    steps, ids, final = batch.final_observations()
    following = next_values(values, last, (steps, ids, policy.critic(policy.normalize(final))))
    ended = batch["terminated"], batch["truncated"]
    of_steps = None if ratios is None else ratios.view_as(values)
    A, returns = gae(batch["rewards"], values, following, *ended, gamma, gae_lambda, of_steps)
    return A.flatten(), returns.flatten()


def next_values(values: Tensor, last_values: Tensor, final: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Give the value of each step's true successor observation, [T, N].

    Where an episode terminated the entry means nothing; `gae` does not use it.

    Args:
        values: V(obs[t]), [T, N].
        last_values: V of the observations after the last step, [N].
        final: (t [k], n [k], V [k]): the values of the observations that truncated episodes really ended in; after such
            a step values[t + 1] belongs to the next episode.

    Source: Pardo et al. 2018, "Time limits in reinforcement learning", section 3, https://arxiv.org/abs/1712.00378.
    """
    following = torch.cat((values[1:], last_values[None]))
    steps, columns, final_values = final
    following[steps, columns] = final_values
    return following


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    gae_lambda: float,
    ratios: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Estimate advantages and the value targets that belong to them.

    δ_t = r_t + γ V(s'_t) (1 - terminated_t) - V(s_t) and A_t = δ_t + γ λ ρ_{t+1} A_{t+1}, where the recursion stops at
    the end of an episode, terminated or truncated, and ρ = 1 unless actions were another policy's. The sums are
    float64.

    Args:
        rewards: [T, N].
        values: V(s_t), [T, N].
        next_values: V(s'_t) of the true successor, [T, N]; see `next_values`.
        terminated: bool [T, N]; no bootstrapping.
        truncated: bool [T, N]; bootstraps.
        gamma: discount γ per environment step.
        gae_lambda: λ.
        ratios: truncated importance weights ρ_t of the actions, [T, N], with which the returns are V-trace's; None: 1.

    Returns:
        advantages [T, N] and returns = ρ * advantages + values [T, N], in the values' dtype.

    Source: Schulman et al. 2016, equation 16, https://arxiv.org/abs/1506.02438; Espeholt et al. 2018, equation 1 and
    remark 2 (V-trace with λ), https://arxiv.org/abs/1802.01561.
    """
    values64 = values.double()
    bootstrap = (gamma * next_values.double()).masked_fill_(terminated, 0.0)
    advantages = rewards.double() + bootstrap - values64
    decay = (~(terminated | truncated)).double() * (gamma * gae_lambda)
    if ratios is not None:
        decay[:-1] *= ratios[1:]
    # A linear recurrence by doubling: after each pass an entry sums over twice as many steps. log2(T) passes over the
    # whole array take a tenth of the time of T passes over its rows.
    span = 1
    while span < len(advantages):
        # Not 0 times what comes after an episode's end, which would be no number where that is infinite.
        later = (decay[:-span] * advantages[span:]).masked_fill_(decay[:-span] == 0, 0.0)
        advantages[:-span].add_(later)
        decay[:-span] = decay[:-span] * decay[span:]
        span *= 2
    gained = advantages if ratios is None else ratios * advantages
    return advantages.to(values.dtype), (gained + values64).to(values.dtype)


def importance_weights(log_probs: Tensor, batch: Rollout) -> Tensor:
    """Give min(1, π(a|s) / μ(a|s)) of a rollout's actions, [T * N].

    Args:
        log_probs: log π(a|s), [T * N].
        batch: has log μ(a|s) in its field "log_probs".

    Source: Espeholt et al. 2018, section 4.1 (V-trace, with both bounds 1), https://arxiv.org/abs/1802.01561.
    """
    return (log_probs - batch["log_probs"].flatten()).exp().clamp(max=1.0)


def standardize(A: Tensor, weights: Tensor | None = None) -> Tensor:
    """Scale advantages [..., n] to mean 0 and standard deviation 1 along the last axis; zeros where they are equal.

    Args:
        weights: of the samples, [..., n], in mean and standard deviation; None weighs them equally.
    """
    if weights is None:
        mean, spread = A.mean(-1, keepdim=True), A.std(-1, keepdim=True, correction=0)
    else:
        shares = weights / weights.sum(-1, keepdim=True)
        mean = (shares * A).sum(-1, keepdim=True)
        spread = (shares * (A - mean).square()).sum(-1, keepdim=True).sqrt()
    # Advantages that differ by rounding only say nothing: they are equal.
    equal = spread <= 4 * torch.finfo(torch.float32).eps * A.abs().amax(-1, keepdim=True)
    return torch.where(equal, 0.0, (A - mean) / spread)


def explained_variance(targets: Tensor, values: Tensor) -> Tensor:
    """Give 1 - Var(targets - values) / Var(targets), a float64 scalar; not a number where the targets do not vary.

    Args:
        targets, values: [n].
    """
    targets = targets.double()
    variance = targets.var(correction=0)
    share = (targets - values).var(correction=0) / variance
    return torch.where(variance > 0, 1 - share, torch.nan)


class Given(NamedTuple):
    """Numbers that environments gave."""

    name: str
    values: Tensor
    steps: Tensor
    """Of the rollout, [...]."""
    ids: Tensor
    """The environments, [...]."""
    most: float
    """Their largest size."""


class RunningEpisodes(EpisodeStatistics):
    """Returns and lengths of the episodes that run, counted step by step or a rollout at a time."""

    def update_rollout(self, rewards: Tensor, ended: Tensor, stepped: Tensor | None = None) -> dict[str, Tensor]:
        """Count T steps, rewards and ended [T, N]: the bits of T updates.

        Args:
            stepped: which environments were stepped, [T, N]; None: all. The others' rewards are 0.

        Returns:
            "ended"; "returns" and "lengths" [T, N], which where an episode ended are its own; and "steps", how many
            were made.
        """
        # Which of an environment's episodes a step belongs to, the one that runs being 0.
        episode = ended.cumsum(0)
        last = episode[-1:].clone()
        episode -= ended.long()
        shape = len(ended) + 1, len(self.returns)  # as many as there may be, to ask for no number
        returns, lengths = self.returns.new_zeros(shape), self.lengths.new_zeros(shape)
        returns[0], lengths[0] = self.returns, self.lengths
        counts = torch.ones_like(episode) if stepped is None else stepped.long()
        returns.scatter_add_(0, episode, rewards)
        lengths.scatter_add_(0, episode, counts)
        self.returns, self.lengths = returns.gather(0, last)[0], lengths.gather(0, last)[0]
        found = {"returns": returns.gather(0, episode), "lengths": lengths.gather(0, episode)}
        return found | {"ended": ended, "steps": counts.sum()}


def numbers(rollout: Rollout) -> list[Given]:
    """List what environments gave in a rollout: rewards, and observations, which are finite in the policy's dtype."""
    T, N = rollout.n_steps, rollout.num_envs
    steps, ids = torch.arange(T, device=rollout.device)[:, None].expand(T, N), torch.arange(N, device=rollout.device)
    given, most = [], torch.finfo(torch.float32).max
    if "rewards" in rollout.specs:
        given.append(Given("reward", rollout["rewards"], steps + 1, ids.expand(T, N), LARGEST_REWARD))
    if "observations" in rollout.specs:
        final_steps, final_ids, final = rollout.final_observations()
        given.append(Given("observation", rollout["observations"], steps, ids.expand(T, N), most))
        given.append(Given("observation", final, final_steps + 1, final_ids, most))
    if rollout.last_observations is not None:
        given.append(Given("observation", rollout.last_observations, torch.full_like(ids, T), ids, most))
    return [part for part in given if part.values.numel()]


@torch.no_grad()
def check_numbers(rollout: Rollout, first: int = 0) -> None:
    """Raise ValueError, which names environment, step and value, where one of a rollout's `numbers` is none or too
    large, so that nothing can be learned from it. The first environment has the number first.
    """
    for name, values, steps, ids, most in numbers(rollout):
        if bool((torch.stack(torch.aminmax(values)).abs() <= most).all()):
            continue
        place = tuple((~(values.abs() <= most)).nonzero()[0].tolist())
        value, row = values[place].item(), place[: steps.ndim]
        values.zero_()  # where an environment stands still this would be found again
        raise ValueError(
            f"environment {first + int(ids[row])} gave the {name} {value} at step {int(steps[row])} of this rollout, "
            f"from which nothing was learned; give numbers of at most {most:.3g} in size."
        )
