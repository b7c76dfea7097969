"""Evolution strategies on unrolled computations: one engine for ES, truncated ES, PES, NRES and GPES.

`estimate` unrolls antithetic pairs of particles by one window of K steps and returns an estimate of the gradient of
their score (ascent), with diagnostics. The methods differ in when a pair draws a new perturbation ε and in whose state
is carried to the next window:

    method        new ε                   state                        estimate per window and pair
    es            once an episode, K = T  own                          ε (L⁺ - L⁻) / 2σ²
    truncated_es  every window            of the mean θ, shared        ε (L⁺ - L⁻) / 2σ²; biased by truncation
    pes           every window            own                          ξ (L⁺ - L⁻) / 2, ξ = Σ ε/σ² since the reset
    nres          once an episode         own                          as pes
    gpes          every M windows         own                          as pes
    pes_analytic  every window            own, and of the mean θ       p + ξ' (L⁺ - L⁻ - 2 εᵀp) / 2

p is the gradient through this window alone, at the state that the mean θ leads to, and ξ' is ξ without this window's ε;
p is not smoothed, so on a rugged score pes_analytic is biased and may do worse than pes.
The windows' estimates of an episode add up to the gradient of its score, smoothed by σ. Pairs reset at times of their
own, so at fixed θ the mean of an estimate is that gradient divided by the mean number of windows in a pair's life.

Particles lie in rows [N, P]: rows 2i and 2i + 1 are θ + ε and θ - ε of pair i, so that a shard of pairs is a block of
rows. A twin that has ended scores 0 until its pair resets, which is when both have ended or after T steps: resetting
both when either ends would drop what survival is worth.

Sources: Vicol, Metz & Sohl-Dickstein 2021 (PES), https://arxiv.org/abs/2112.13835; Vicol 2023 (ES-Single = NRES),
https://proceedings.mlr.press/v202/vicol23a.html; Li et al. 2023 (NRES, GPES), https://arxiv.org/abs/2304.12180.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from agents import noise
from agents.checkpoint import with_prefix
from agents.devices import fetched, sent
from agents.evolution.unroll import ParticleState, Unroll

METHODS: dict[str, dict[str, Any]] = {
    "es": {"resample_every": None},
    "truncated_es": {"shared": True},
    "pes": {},
    "nres": {"resample_every": None},
    "gpes": {},
    "pes_analytic": {"analytic": True},
}
"""What each method sets of a `Scheme`; "es" has one window per episode besides."""

Shape = Callable[[Tensor], Tensor]
"""A linear map of the rows of [n, P]."""

GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Scheme:
    """How particles are perturbed and unrolled.

    Raises:
        ValueError: a value is out of range, or two do not go together.
    """

    particles: int
    """N, even: two to a pair, over all workers."""
    window: int
    """K, steps per estimate."""
    horizon: int | None = None
    """T, steps of an episode and a multiple of K; None: episodes last until both twins end."""
    resample_every: int | None = 1
    """Windows between new perturbations; None: one perturbation per episode."""
    shared: bool = False
    """Whether each window starts from the state that the mean parameters lead to."""
    analytic: bool = False
    """Whether the window's own effect is differentiated; the task must be differentiable."""
    staggered: bool = True
    """Whether the pairs' first episodes are cut short, so that their phases spread evenly over the horizon."""

    def __post_init__(self) -> None:
        if self.particles < 2 or self.particles % 2:
            raise ValueError(f"particles is {self.particles}; give an even number, 2 or more: they come in pairs.")
        if self.window < 1:
            raise ValueError(f"window is {self.window}; give 1 step or more.")
        if self.horizon is not None and (self.horizon < 1 or self.horizon % self.window):
            raise ValueError(f"horizon is {self.horizon}; give a multiple of the window, {self.window}, or None.")
        if self.resample_every is not None and self.resample_every < 1:
            raise ValueError(f"resample_every is {self.resample_every}; give 1 window or more, or None.")
        if self.analytic and (self.shared or self.resample_every != 1):
            raise ValueError("analytic needs a new perturbation every window and own states: it is a form of PES.")

    @classmethod
    def of(
        cls,
        method: str,
        *,
        particles: int,
        window: int | None = None,
        horizon: int | None = None,
        resample_every: int | None = None,
        staggered: bool = True,
    ) -> Scheme:
        """Make the scheme of a method in `METHODS`.

        Args:
            window: K; for "es" it is the horizon, and need not be given.
            resample_every: M, for "gpes" only.

        Raises:
            ValueError: the method is unknown, what it needs is missing, or a value does not suit it.
        """
        if method not in METHODS:
            raise ValueError(f"method is {method!r}; give one of {', '.join(METHODS)}.")
        if (method == "gpes") != (resample_every is not None):
            raise ValueError(f"resample_every is {resample_every} for {method}; gpes needs it, and gpes alone.")
        if method == "es" and (horizon is None or window not in (None, horizon)):
            raise ValueError(f"es unrolls whole episodes, but window is {window} and horizon is {horizon}.")
        window = window if window is not None else horizon
        if window is None:
            raise ValueError(f"{method} needs a window: give the number of steps per estimate.")
        chosen = {"resample_every": resample_every or 1, **METHODS[method]}
        return cls(particles, window, horizon, staggered=staggered, **chosen)

    @property
    def signs(self) -> list[float]:
        """Of ε in the rows that are unrolled for a pair: the twins, and the mean parameters where they are needed."""
        return [1.0, -1.0, 0.0] if self.shared or self.analytic else [1.0, -1.0]

    @property
    def states(self) -> int:
        """States that are carried for a pair."""
        return 1 if self.shared else len(self.signs)

    @property
    def windows(self) -> float:
        """Windows of an episode, T/K; 1 where episodes have no limit."""
        return 1.0 if self.horizon is None else self.horizon / self.window


@dataclass(frozen=True)
class Particles:
    """Everything that passes from one window to the next, for n pairs from `first_pair` on; s states to a pair."""

    seed: int
    counter: int
    """Windows before the next one, which keys the noise."""
    first_pair: int
    epsilon: Tensor
    """The perturbation ε in force, [n, P]."""
    xi: Tensor
    """Σ ε/σ² over the perturbations since the reset, each with the σ that it was drawn with, [n, P]."""
    phase: Tensor
    """Windows since the reset, int64 [n]; on the host, as all that says what is to be done next."""
    limit: Tensor
    """Windows after which the pair resets at the latest, int64 [n]; on the host."""
    due: Tensor
    """Whether the pair resets before the next window, boolean [n]; on the host."""
    ended: Tensor
    """Whether the episodes ended, boolean [n, s]; on the host."""
    state: ParticleState
    """The task's state of n s rows; empty before the first window."""
    TOLD: ClassVar = ("limit", "due", "ended")
    """What the host is told of a window before the next one."""

    def weighted(self, utilities: Tensor) -> Tensor:
        """Return the last window's estimates with utilities [2n] for scores: sums like `Estimate.sums`, [shards, P].

        With the scores themselves they are those of the estimate, unless that was analytic. The caller finds the
        utilities, what each twin's score counts, from all pairs' scores; each worker sums its own.
        """
        plus, minus = utilities.view(-1, 2).T
        estimates = self.xi * ((plus - minus).to(self.xi.dtype) / 2)[:, None]
        return torch.stack([shard.sum(0) for shard in estimates.split(noise.SHARD)])

    def to(self, device: torch.device | str) -> Particles:
        """Return them with what is computed with on a device."""
        state = {name: value.to(device) for name, value in self.state.items()}
        return replace(self, epsilon=self.epsilon.to(device), xi=self.xi.to(device), state=state)

    def tensors(self) -> dict[str, Tensor]:
        """Return all but the seed, the counter and the first pair, for a file."""
        own = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return own | {f"state.{name}": value for name, value in self.state.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], seed: int, counter: int, first_pair: int = 0) -> Particles:
        """Take back what `tensors` gave."""
        own = {name: value for name, value in tensors.items() if not name.startswith("state.")}
        return cls(seed, counter, first_pair, state=with_prefix(tensors, "state."), **own)


@dataclass(frozen=True)
class Estimate:
    """A gradient estimate from one window of n pairs, kept in parts that `join` puts together.

    The gradient is linear in the scores: to scale scores, divide it. A score that is not finite makes it so too. All
    but sums and squares are on the host, or brought there by whoever asked `estimate` for that.
    """

    sums: Tensor
    """Sums of the pairs' estimates, one row for each shard of `noise.SHARD` pairs, [shards, P]."""
    squares: Tensor
    """Squared norms of the pairs' estimates, [n]."""
    scores: Tensor
    """The window's scores [2n], in the order of the rows; 0 for a twin that had ended before."""
    phase: Tensor
    """The window's index in its pair's episode, int64 [n]."""
    xi_norm: Tensor
    """|ξ| [n], in units of 1/parameter."""
    deaths: Tensor
    """Twins of the pair that ended in this window, int64 [n]."""
    steps: Tensor
    """Steps made for the pair, those with the mean parameters included, int64 [n]."""
    TOLD: ClassVar = ("scores", "xi_norm", "deaths", "steps")

    @property
    def gradient(self) -> Tensor:
        """The mean of the pairs' estimates, [P]; the direction in which the score rises."""
        return self.sums.sum(0) / len(self.phase)

    @property
    def signal_to_noise(self) -> Tensor:
        """|gradient| over its standard error across pairs; about 1 if it is all noise, NaN for a single pair."""
        n = len(self.phase)
        signal = self.gradient.square().sum()
        variance = (self.squares.sum() / n - signal) / (n - 1)
        return (signal / variance.clamp(min=0)).sqrt()

    @property
    def phases(self) -> Tensor:
        """How many pairs are in the w-th window of their episode, int64 [oldest + 1]."""
        return self.phase.bincount()

    @property
    def xi_by_phase(self) -> Tensor:
        """The mean of |ξ| over the pairs in the w-th window of their episode, [oldest + 1]; NaN where there is none."""
        return self.phase.bincount(self.xi_norm) / self.phases

    def metrics(self) -> dict[str, float | Tensor]:
        """Say how the search went, of what is on the host; tensors are for histograms."""
        ages = {f"search/xi_norm_at_age_{age:02}": norm for age, norm in enumerate(self.xi_by_phase.tolist())}
        return {
            "train/score_mean": self.scores.mean().item(),
            "train/score_std": self.scores.std(correction=0).item(),
            "search/live_twins": int((self.steps > 0).sum()),
            "search/xi_norm": self.xi_norm.mean().item(),
            "search/phases": self.phase,
            **{name: norm for name, norm in ages.items() if not math.isnan(norm)},
        }


def start(
    scheme: Scheme, theta: Tensor, seed: int, *, counter: int = 0, first_pair: int = 0, pairs: int | None = None
) -> Particles:
    """Make particles before their first window.

    Args:
        theta: parameters [P]; their dtype (float32 or float64) and device are the particles'.
        seed: the run's seed.
        counter: windows that the run has made before, with other particles.
        first_pair, pairs: the range that this worker computes (all: None). It begins at a multiple of `noise.SHARD`,
            and so does the next worker's.

    Raises:
        ValueError: the range begins elsewhere or holds no pair of the scheme, or theta is not a vector.
    """
    if theta.ndim != 1:
        raise ValueError(f"theta has the shape {tuple(theta.shape)}; give one vector of parameters.")
    total = scheme.particles // 2
    n = total - first_pair if pairs is None else pairs
    if first_pair < 0 or first_pair % noise.SHARD or n < 1 or first_pair + n > total:
        raise ValueError(
            f"pairs {first_pair} to {first_pair + n - 1} are no range of the {total} pairs that begins at a multiple "
            f"of {noise.SHARD}."
        )
    index = torch.arange(first_pair, first_pair + n)
    limit = torch.full_like(index, torch.iinfo(torch.int64).max)
    if scheme.horizon is not None:
        windows = scheme.horizon // scheme.window
        # Multiples of the golden ratio spread evenly over the horizon, however many pairs follow.
        share = index.double() * GOLDEN % 1 if scheme.staggered else torch.zeros_like(index).double()
        limit = windows - (share * windows).long()
    return Particles(
        seed=seed,
        counter=counter,
        first_pair=first_pair,
        epsilon=theta.new_zeros(n, len(theta)),
        xi=theta.new_zeros(n, len(theta)),
        phase=torch.zeros_like(index),
        limit=limit,
        due=torch.ones_like(index, dtype=torch.bool),
        ended=torch.zeros(n, scheme.states, dtype=torch.bool),
        state={},
    )


@torch.no_grad()
def estimate(
    task: Unroll,
    scheme: Scheme,
    theta: Tensor,
    sigma: float,
    particles: Particles,
    shape: Shape | None = None,
    bring: Callable[[dict[str, Tensor]], dict[str, Tensor]] = fetched,
) -> tuple[Estimate, Particles]:
    """Unroll every pair by one window and estimate the gradient of the score at theta.

    The noise is keyed by (seed, counter, shard), and sums over pairs are taken shard by shard: if the task's rows do
    not influence each other, neither does how the shards are spread over workers, to the last bit.

    Args:
        theta: parameters [P]; they may have changed since the last window.
        sigma: standard deviation of a perturbation, in units of a parameter; it may change from window to window.
        particles: from `start` or the last window.
        shape: a linear map S of new perturbations, standard normal rows [n, P]: ε = σ S z, and ξ sums S z / σ up. An
            estimate is then one of S Sᵀ times the gradient; None is the identity.
        bring: brings what the host goes by from a device. Where it does not, the caller brings what `TOLD` names.

    Returns:
        The estimate, and the particles to go on with.

    Raises:
        ValueError: sigma is not positive, theta has another shape than the particles', or the task's answer has; or
            perturbations are shaped but the scheme is analytic, whose own part is not.
    """
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma is {sigma}; give a positive, finite number.")
    if theta.shape != particles.xi.shape[1:]:
        raise ValueError(
            f"theta has the shape {tuple(theta.shape)}; the particles have {particles.xi.shape[1]} parameters."
        )
    if shape is not None and scheme.analytic:
        raise ValueError("pes_analytic adds a gradient that is not shaped; give shape=None, or use pes.")
    width, carried = len(scheme.signs), scheme.states
    particles = _renew(task, scheme, sigma, particles, shape)
    epsilon, xi = particles.epsilon, particles.xi

    # A shared state is unrolled in every row of its pair.
    before = {name: value.repeat_interleave(width // carried, 0) for name, value in particles.state.items()}
    ended_before = particles.ended.repeat_interleave(width // carried, 1)
    signs = sent(torch.tensor(scheme.signs, dtype=theta.dtype), theta.device)
    with torch.set_grad_enabled(scheme.analytic):
        rows = (theta.detach() + signs[:, None] * epsilon[:, None]).flatten(0, 1).requires_grad_(scheme.analytic)
        state, scores, ended = _advance(task, rows, before, ended_before.flatten(), scheme.window)
        scores = scores.view(-1, width)
        own = _own_effect(scores, rows) if scheme.analytic else None

    scores = scores.detach()
    difference = (scores[:, 0] - scores[:, 1]).to(xi.dtype) / 2
    if own is None:
        estimates = xi * difference[:, None]
    else:
        estimates = own + (xi - epsilon / sigma**2) * (difference - (epsilon * own).sum(1))[:, None]
    steps = (state["steps"] - before["steps"]).view(-1, width).sum(1)
    told = {"scores": scores[:, :2].flatten(), "xi_norm": xi.norm(dim=1), "steps": steps}
    told = bring(told | {"ended": ended.view(-1, width)})  # in one copy
    ended = told.pop("ended")
    phase, limit = particles.phase + 1, sent(particles.limit, ended.device)
    result = Estimate(
        sums=torch.stack([shard.sum(0) for shard in estimates.split(noise.SHARD)]),
        squares=estimates.square().sum(1),
        phase=particles.phase,
        deaths=(ended & ~sent(ended_before, ended.device))[:, :2].sum(1),
        **told,
    )

    # A shared state is the last row's; own states are all rows.
    kept = slice(width - carried, None)
    state = {name: value.detach().unflatten(0, (-1, width))[:, kept].flatten(0, 1) for name, value in state.items()}
    ended = ended[:, kept]
    due = ended[:, :2].all(1) | (sent(phase, ended.device) >= limit)
    if scheme.horizon is not None:
        limit = limit.masked_fill(due, scheme.horizon // scheme.window)
    counter = particles.counter + 1
    return result, replace(particles, counter=counter, phase=phase, limit=limit, due=due, ended=ended, state=state)


def join(estimates: Sequence[Estimate]) -> Estimate:
    """Put the estimates of consecutive ranges together, in order: to the bits of one that was computed at once."""
    return Estimate(*(torch.cat([getattr(part, field.name) for part in estimates]) for field in fields(Estimate)))


def _renew(task: Unroll, scheme: Scheme, sigma: float, particles: Particles, shape: Shape | None) -> Particles:
    """Begin new episodes in the pairs that are due, draw ε anew where it is time, and add ε/σ² to ξ.

    All rows of a pair begin with the same key. With a shared state only this window's ε has an effect.
    """
    old, every, device = particles, scheme.resample_every, particles.xi.device
    phase = old.phase.masked_fill(old.due, 0)
    epsilon, xi = old.epsilon, old.xi.masked_fill(sent(old.due[:, None], device), 0)
    renewed = phase == 0 if every is None else phase % every == 0
    if renewed.any():
        size = (1, *xi.shape)
        given = old.seed, "perturbation", old.counter, size, xi.dtype
        z = sent(noise.normal(*given, start=old.first_pair, device=device)[0], device)
        if shape is not None:
            # By shard, since a product's rounding may depend on how many rows it has.
            z = torch.cat([shape(shard) for shard in z.split(noise.SHARD)])
        past = torch.zeros_like(xi) if scheme.shared else xi
        new = sent(renewed[:, None], device)
        epsilon = torch.where(new, sigma * z, epsilon)
        xi = torch.where(new, past + z / sigma, xi)

    state, pairs = old.state, old.due.nonzero().squeeze(1)
    if len(pairs):
        size = (1, len(old.due))
        uniform = noise.uniform(old.seed, "episode", old.counter, size, torch.float64, start=old.first_pair)[0]
        keys = sent((uniform * 2**31).long()[pairs].repeat_interleave(scheme.states), device)
        slots = sent((pairs[:, None] * scheme.states + torch.arange(scheme.states)).flatten(), device)
        fresh = task.init(keys, slots)
        if "steps" not in fresh:
            raise ValueError(f'the task\'s state holds {", ".join(fresh)}; it needs "steps", those made since init.')
        state = _put(state, slots, fresh) if state else fresh
    ended = old.ended.masked_fill(old.due[:, None], False)
    return replace(old, epsilon=epsilon, xi=xi, phase=phase, ended=ended, state=state)


def _advance(
    task: Unroll, theta: Tensor, state: ParticleState, ended: Tensor, window: int
) -> tuple[ParticleState, Tensor, Tensor]:
    """Unroll the rows that have not ended, which the host knows; the others stay as they are and score 0."""
    rows = None if not ended.any() else sent((~ended).nonzero().squeeze(1), theta.device)
    going = state if rows is None else {name: value[rows] for name, value in state.items()}
    theta = theta if rows is None else theta[rows]
    after, score, over = task.unroll(theta, going, window)
    if score.shape != (len(theta),) or over.shape != (len(theta),) or over.dtype != torch.bool:
        raise ValueError(
            f"the task gave scores {tuple(score.shape)} and ended {over.dtype} {tuple(over.shape)}; "
            f"both have the shape ({len(theta)},), and ended is boolean."
        )
    if rows is None:
        return after, score, over
    scores = score.new_zeros(len(ended)).index_copy(0, rows, score)
    return _put(state, rows, after), scores, sent(ended, theta.device).index_copy(0, rows, over)


def _put(state: ParticleState, rows: Tensor, values: ParticleState) -> ParticleState:
    return {name: value.index_copy(0, rows, values[name]) for name, value in state.items()}


def _own_effect(scores: Tensor, rows: Tensor) -> Tensor:
    """Return the gradients [n, P] of the windows' scores [n, 3] in the mean parameters, the last of each three rows."""
    if not scores.requires_grad:
        raise ValueError("the task's scores cannot be differentiated; use pes instead of pes_analytic.")
    (gradient,) = torch.autograd.grad(scores[:, 2].sum(), rows)
    return gradient.unflatten(0, scores.shape)[:, 2]
