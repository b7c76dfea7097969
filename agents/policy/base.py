"""What every policy shares: the normalizer of its observations, and how it takes and gives actions."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, NoReturn, Self

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor, nn

from agents.devices import sent
from agents.policy.distributions import Distribution, Head


class Moments(NamedTuple):
    """What can be merged without loss of n numbers per column. float64; source: Chan, Golub and LeVeque 1979."""

    n: Tensor
    """How many, of shape ()."""
    mean: Tensor
    """[O]."""
    m2: Tensor
    """Sums of squared differences from the mean, [O]."""

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None = None) -> Self:
        """Sum up the rows of x [n, O], or those in a mask [n]; there may be none."""
        x, n = x.to(torch.float64), x.new_full((), len(x), dtype=torch.float64)
        if mask is not None:
            x, n = x.masked_fill(~mask[:, None], 0), mask.sum().double()
        mean = x.sum(0) / n.clamp(min=1)
        difference = x - mean if mask is None else (x - mean).masked_fill(~mask[:, None], 0)
        return cls(n, mean, cls.spread(difference).sum(0))

    @staticmethod
    def spread(difference: Tensor) -> Tensor:
        """Return what a difference from the mean [..., O] adds to m2."""
        return difference.square()

    def merge(self, other: Self) -> Self:
        """Return those of both."""
        total = self.n + other.n
        parts, delta = total.clamp(min=1), other.mean - self.mean
        m2 = other.m2 + self.spread(delta) * (self.n * other.n / parts)
        return type(self)(total, self.mean + delta * (other.n / parts), self.m2 + m2)

    def to(self, device: torch.device | str) -> Self:
        """Return them on a device."""
        return type(self)(*(sent(part, device) for part in self))


class ObservationNormalizer(nn.Module):
    """Subtracts the mean of all observations so far, divides by their standard deviation, clips to +-clip.

    Moments are kept in float64 and merged batch by batch. Before the first update it is the identity: normalized values
    are (x - shift) scale = x scale + offset, clipped.

    Args:
        size: O, the length of an observation.
        clip: bound of normalized values.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor
    shift: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self, size: int, clip: float = 10.0) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("m2", torch.zeros(size, dtype=torch.float64))
        self._refresh()

    def _refresh(self) -> None:
        """Recompute the float32 constants that forward uses."""
        variance = torch.where(self.count > 0, self.m2 / self.count, 1.0)
        scale = torch.rsqrt(variance + 1e-8)
        given = self.mean.float(), scale.float(), (-self.mean * scale).float()
        if self.mean.device.type == "cpu" or self.shift.device != self.mean.device:
            self.shift, self.scale, self.offset = given
        else:  # in place, where recorded work reads them
            for held, value in zip((self.shift, self.scale, self.offset), given, strict=True):
                held.copy_(value)

    def forward(self, observations: Tensor) -> Tensor:
        """Normalize observations [n, O], float32."""
        return torch.addcmul(self.offset, observations, self.scale).clamp_(-self.clip, self.clip)

    @torch.no_grad()
    def merge(self, moments: Moments) -> None:
        """Take the moments of other observations into the statistics."""
        merged = Moments(self.count, self.mean, self.m2).merge(moments)
        for held, value in zip((self.count, self.mean, self.m2), merged, strict=True):
            held.copy_(value)
        self._refresh()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._refresh()

    def _apply(self, *args: Any, **kwargs: Any) -> ObservationNormalizer:
        super()._apply(*args, **kwargs)
        self._refresh()
        return self


def flatten(observations: Tensor) -> Tensor:
    """Give [n, *O] as float32 [n, prod O]."""
    flat = observations if observations.ndim == 2 else observations.unsqueeze(-1).flatten(1)
    return flat if flat.dtype == torch.float32 else flat.to(torch.float32)


class OneHot(nn.Module):
    """Writes choices [n, K] as Stable-Baselines3 does: a 1 among 0s for each, one after the other, [n, O].

    Args:
        sizes, start: [K], or one number, how many values each choice has, and the first.
    """

    offset: Tensor

    def __init__(self, sizes: Any, start: Any) -> None:
        super().__init__()
        ends = np.cumsum(sizes)
        self.size = int(ends[-1])
        first = torch.as_tensor(ends - np.ravel(sizes) - np.ravel(start))
        self.register_buffer("offset", first, persistent=False)

    def forward(self, choices: Tensor) -> Tensor:
        places = flatten(choices).long() + self.offset
        return torch.zeros(len(places), self.size, device=places.device).scatter_(1, places, 1.0)


def uncompiled(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take from names what torch.compile puts into them."""
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}


def named_as_in(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the state under the names that it has in a module, which may be compiled where the state's was not."""
    names = {plain: name for name, plain in zip(module.state_dict(), uncompiled(module.state_dict()), strict=True)}
    return {names.get(plain, plain): tensor for plain, tensor in uncompiled(state).items()}


def units(space: spaces.Space) -> tuple[Tensor, Tensor] | None:
    """Give the middle and the half width of a Box's bounds, [A] each; 0 and 1 where one is infinite. None of others."""
    if not isinstance(space, spaces.Box):
        return None
    low, high = (torch.as_tensor(bound.astype(float)).flatten() for bound in (space.low, space.high))
    bounded = (high - low).isfinite()
    return (
        torch.where(bounded, (low + high) / 2, 0.0).float(),
        torch.where(bounded, (high - low) / 2, 1.0).clamp(min=1e-12).float(),
    )


def warn_of_units(space: spaces.Space) -> None:
    """Warn of a Box of actions that a policy whose actions begin at 0 and are some 1 sees next to nothing of: 0 is
    outside of the bounds, or their half width is below 0.1 or above 30.
    """
    if not isinstance(space, spaces.Box):
        return
    low, high = space.low.astype(float).ravel(), space.high.astype(float).ravel()
    half = (high - low) / 2  # infinite where there is a bound on one side at most
    size = half[np.isfinite(half)]
    if (low > 0).any() or (high < 0).any() or (size < 0.1).any() or (size > 30).any():
        warnings.warn(
            f"The actions are {space}, but the policy's begin at 0, in units of 1, and may never see what lies within "
            "these bounds. Give its units to the environment: gymnasium.wrappers.RescaleAction(env, -1, 1).",
            UserWarning,
            stacklevel=2,
        )


class Policy(BasePolicy):
    """A policy on observations that it normalizes itself, under SB3's policy interface.

    Args:
        observation_space: a Box or MultiBinary, flattened, or Discrete or MultiDiscrete, one-hot.
        action_space: Box, Discrete, MultiDiscrete or MultiBinary.
        normalize_observations: whether the normalizer learns; otherwise it stays the identity, as it does for all
            observations but a Box's.
    """

    actor: Any
    _first: Tensor | None
    options: ClassVar[tuple[str, ...]]
    """Its keyword arguments, which agents take as hyperparameters and in policy_kwargs."""
    options_of_its_own: ClassVar[tuple[str, ...]] = ()
    """Those that agents take in policy_kwargs alone."""

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        *,
        normalize_observations: bool,
    ) -> None:
        super().__init__(observation_space, action_space)
        self.head = Head.of(action_space)
        self.flatten: Callable[[Tensor], Tensor] = flatten
        self.observation_size = int(np.prod(observation_space.shape or ()))
        if isinstance(observation_space, (spaces.Discrete, spaces.MultiDiscrete)):
            sizes = observation_space.n if isinstance(observation_space, spaces.Discrete) else observation_space.nvec
            self.flatten = OneHot(sizes, observation_space.start)
            self.observation_size = self.flatten.size
        self.normalize_observations = normalize_observations and isinstance(observation_space, spaces.Box)
        self.normalizer = ObservationNormalizer(self.observation_size)
        if isinstance(action_space, spaces.Box):
            self.register_buffer("_low", torch.as_tensor(action_space.low), persistent=False)
            self.register_buffer("_high", torch.as_tensor(action_space.high), persistent=False)
        first = np.asarray(getattr(action_space, "start", 0))
        self.register_buffer("_first", torch.as_tensor(first) if first.any() else None, persistent=False)

    @abstractmethod
    def distribution(self, observations: Tensor) -> Distribution:
        """Give the action distributions for observations [n, *O]."""

    def normalize(self, observations: Tensor) -> Tensor:
        """Give [n, *O] as the networks take them: flat, float32, normalized."""
        flat = self.flatten(observations)
        return self.normalizer.forward(flat) if self.normalize_observations else flat

    def update_normalizer(self, observations: Tensor) -> None:
        """Take observations [n, *O] into the statistics, where the policy normalizes."""
        if self.normalize_observations:
            self.normalizer.merge(Moments.of(self.flatten(observations)))

    def sampler(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Give actions [n, *A] as a function of observations [n, *O] and noise [n, *noise_shape], quick on few rows.

        It has the parameters of now; actions are those of `choose` up to rounding, before clipping.
        """
        act = self.actor.sampler()
        return lambda observations, noise: act(self.normalize(observations), noise)

    def choose(self, observations: Tensor, deterministic: bool = False, noise: Tensor | None = None) -> Tensor:
        """Choose actions [n, *A] for observations [n, *O], before clipping.

        Args:
            deterministic: the most probable action in place of a sampled one.
            noise: [n, *noise_shape] to sample with; None draws from torch's global generator.
        """
        distribution = self.distribution(observations)
        if deterministic:
            return distribution.mode()
        if noise is None:
            draw = torch.randn if self.head.kind == "gaussian" else torch.rand
            noise = draw(len(observations), *self.head.noise_shape, device=self.device)
        return distribution.sample(noise)

    def to_environment(self, actions: Tensor) -> Tensor:
        """Give actions [n, *A] as the environment takes them: Box actions clipped to their bounds, as in SB3; choices
        counted from the space's start.
        """
        if self.head.kind != "gaussian":
            return actions if self._first is None else actions + self._first
        return torch.clamp(actions.reshape(-1, *self.head.shape), self._low, self._high)  # type: ignore[arg-type]

    def forward(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        return self._predict(obs, deterministic)

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        return self.to_environment(self.choose(observation, deterministic))

    def save(self, path: str) -> NoReturn:
        raise NotImplementedError("Save the agent: a policy is not stored apart from its algorithm's settings.")

    @classmethod
    def load(cls, path: str, device: torch.device | str = "auto") -> NoReturn:
        raise NotImplementedError(
            "Load the agent, e.g. NPG.load(path), and use its .policy; nothing is unpickled here."
        )


def refuse_frozen(policy: nn.Module) -> NoReturn:
    """Raise ValueError: directions and steps are of all parameters together."""
    frozen = next(name for name, parameter in policy.named_parameters() if not parameter.requires_grad)
    raise ValueError(
        f"policy.{frozen} is frozen: its requires_grad is False, but agents move all parameters of a policy. Set it "
        "back with requires_grad_(True), or give a policy class of your own that holds in buffers what shall stay."
    )
