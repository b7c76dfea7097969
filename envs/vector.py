"""The environment contract: many environments stepped together, on tensors.

Everything that an agent knows of a world is `VectorEnv`. It is Gymnasium's vector interface with tensors in place of
arrays, plus what policy search needs: stepping and resetting a subset, and exact snapshots.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor

from envs.infos import LazyInfo, spread

MOST_ENVS = 1_000_000
LARGEST_CHOICE = 100_000
"""Values that an observation may choose among, each of which a policy has weights for."""
Ids = Sequence[int] | np.ndarray | Tensor | None
Seeds = int | Sequence[int | None] | np.ndarray | Tensor | None


class VectorEnv(gymnasium.vector.VectorEnv):
    """Many environments of one kind, stepped together.

    Shapes: n is the number of environments in a call, num_envs or len(ids); O and A are the shapes of one observation
    and one action. Observations [n, *O] and rewards [n] keep the physics' dtype; terminated [n] and truncated [n] are
    boolean and never merged: only terminated stops bootstrapping. Tensors that a call returns are valid until the next
    call.

    Args:
        num_envs: number of environments, at least 1.
        observation_space: the space of one observation: Box, Discrete, MultiDiscrete or MultiBinary.
        action_space: the space of one action: Box, Discrete, MultiDiscrete or MultiBinary.
        autoreset: SAME_STEP (an environment that ends is reset within the step: the returned observation is the first
            of the next episode, the last one stands in info["final_obs"]) or DISABLED (the caller resets by ids).
        device: where returned tensors live.
    """

    blowups: int = 0
    """Simulations that diverged so far; each ended its episode as terminated."""

    made_from: dict[str, Any] = {}  # noqa: RUF012
    """The "env_id" and "kwargs" that `make_vec` was given, or nothing if it was given no id."""

    tells_of_episodes: bool = True
    """Whether the info of an episode's end may hold "is_success" or a Monitor's "episode"."""

    masked: bool = False
    """Whether all environments are stepped always, and those that have ended are masked; see
    `envs.device.DeviceVectorEnv`."""

    def __init__(
        self,
        num_envs: int,
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        *,
        autoreset: AutoresetMode | str = AutoresetMode.SAME_STEP,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_envs = check_num_envs(num_envs)
        check_spaces(observation_space, action_space)
        self.single_observation_space = observation_space
        self.single_action_space = action_space
        self.observation_space = batch_space(observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self.autoreset = parse_autoreset(autoreset)
        self.metadata = {"autoreset_mode": self.autoreset}
        self.device = torch.device(device)

    def reset(
        self, *, seed: Seeds = None, ids: Ids = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Start new episodes in the environments ids (all: None).

        Args:
            seed: an int (environment i gets seed + i), one int or None per environment of the call, or None: each goes
                on to the next episode of its own stream. The same seed gives the same episodes here; it does not
                promise Gymnasium's random stream.
            ids: [n] distinct indices, or None.
            options: passed to environments that take them; `{"reset_mask": bool [num_envs]}` is Gymnasium's way to say
                ids, which gives the rows of all environments.

        Returns:
            Observations [n, *O] and an info dict.
        """
        raise NotImplementedError

    def step(self, actions: Any, ids: Ids = None) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Advance the environments ids (all: None) by one step.

        Args:
            actions: [n, *A], a tensor or an array.
            ids: [n] distinct indices, or None.

        Returns:
            observation [n, *O], reward [n], terminated [n], truncated [n], info. Under SAME_STEP, and only in a step in
            which an episode ended, info["final_obs"] [n, *O] holds the observation that the step led to (equal to
            the returned one in environments that go on) and info["_final_obs"] [n] says which environments ended.

        Raises:
            ValueError: the actions' shape is wrong or they are not finite, or, under DISABLED, an environment that
                has ended is stepped.
        """
        raise NotImplementedError

    def snapshot(self, ids: Ids = None) -> dict[str, Tensor]:
        """Give the exact state of the environments ids: physics, elapsed steps, random streams. Rows follow ids.

        Raises:
            SnapshotError: this environment cannot be put back exactly; the message says why.
        """
        raise NotImplementedError

    def mark(self) -> Callable[[], dict[str, Tensor]]:
        """Give a function that later gives the `snapshot` of now, of all environments, and raises as it does."""
        try:
            snapshot = self.snapshot()
        except SnapshotError as error:
            return partial(_raise, error)
        return lambda: snapshot

    def restore(self, snapshot: dict[str, Tensor], ids: Ids = None) -> Tensor:
        """Put the environments ids into the snapshot's rows; what follows repeats bit for bit.

        Returns:
            The observations [n, *O] that were current when the snapshot was taken.
        """
        raise NotImplementedError

    def counts(self) -> dict[str, Tensor]:
        """Give numbers of shape () that the host shall hear of; they come to it with a rollout's."""
        return {}

    def heed(self, counts: Mapping[str, Tensor]) -> None:
        """Take note of what `counts` gave, on the host now; RuntimeError where the simulation was not what it says."""

    def doing(self) -> str | None:
        """Say which environment and step somebody else's code is busy with; None where it is with none."""
        return None

    def part(self, first: int, count: int, num_threads: int = 0) -> VectorEnv:
        """Give environments of their own that go on as those from first to first + count do, which are left to them.

        Args:
            num_threads: physics threads, where there are any; 0 means every core.

        Raises:
            SnapshotError: these environments cannot be taken apart.
        """
        raise SnapshotError(f"{self} steps all of its environments together; make them with envs.make_vec.")

    def get_attr(self, name: str, ids: Ids = None) -> tuple[Any, ...]:
        """Give an attribute of each of the environments ids; where all are one object, they share it."""
        return (getattr(self, name),) * len(self._rows(ids))

    def call(self, name: str, *args: Any, ids: Ids = None, **kwargs: Any) -> tuple[Any, ...]:
        """Call a method of each of the environments ids, once where all are one object; an attribute is given."""
        found = getattr(self, name)
        result = found(*args, **kwargs) if callable(found) else found
        return (result,) * len(self._rows(ids))

    def set_attr(self, name: str, values: Any, ids: Ids = None) -> None:
        """Set an attribute of each of the environments ids.

        Args:
            name: of the attribute.
            values: one for all; a list or tuple holds one for each.
            ids: [n] distinct indices, or None.

        Raises:
            AttributeError: these environments are one object, which has no such attribute.
            ValueError: there are not n values, or environments that are one object were given several.
        """
        rows = self._rows(ids)
        first, *others = each_value(values, len(rows)) or [None]
        if not hasattr(self, name):
            raise AttributeError(
                f"{self} has no attribute {name!r}. Its environments are one object: give what differs to make_vec, or "
                "make them with backend='gymnasium', where each has its own attributes."
            )
        if len(rows) < self.num_envs or any(value is not first and value != first for value in others):
            raise ValueError(f"{name} is one for all {self.num_envs} environments here; give one value, and no ids.")
        setattr(self, name, first)

    def _rows(self, ids: Ids) -> np.ndarray:
        index = self._select(ids)
        return np.arange(self.num_envs) if index is None else index

    def _select(self, ids: Ids) -> np.ndarray | None:
        """Check ids and give them as an int64 array; None stays None (all environments, in order)."""
        if ids is None:
            return None
        index = np.asarray(ids)
        if index.dtype == np.bool_ or index.ndim != 1 or (index.size and not np.issubdtype(index.dtype, np.integer)):
            raise ValueError(f"ids is {ids!r}; give a list of environment indices, or None for all of them.")
        index = index.astype(np.int64)
        # In ascending order the ends say it all, in a third of the time.
        ascending = bool((index[1:] > index[:-1]).all())
        if index.size:
            low, high = (index[0], index[-1]) if ascending else (index.min(), index.max())
            if low < 0 or high >= self.num_envs:
                raise ValueError(f"ids holds {low} to {high}; indices go from 0 to {self.num_envs - 1}.")
        if not ascending and len(np.unique(index)) != len(index):
            raise ValueError(f"ids {index.tolist()} names an environment twice; name each once.")
        return index

    def _check_actions(self, actions: Any, n: int) -> np.ndarray:
        """Give actions as an array [n, *A] in the action space's dtype, or say what is wrong with them."""
        array = actions.detach().cpu().numpy() if isinstance(actions, Tensor) else np.asarray(actions)
        expected = (n, *(self.single_action_space.shape or ()))
        if array.shape != expected:
            raise ValueError(
                f"actions have shape {array.shape}; this environment takes {expected}: one row per stepped environment."
            )
        dtype = np.dtype(self.single_action_space.dtype)
        if not np.can_cast(array.dtype, dtype, "same_kind"):
            raise ValueError(f"actions are {array.dtype}; this environment takes {dtype}.")
        array = array.astype(dtype, copy=False)
        if not np.isfinite(array).all():
            raise ValueError(
                "actions hold NaN or infinity: the policy has diverged, or observations hold them too. Look at these, "
                "or restart from the last checkpoint."
            )
        return array


class SeededVectorEnv(VectorEnv):
    """Environments whose episode k under the seed s is fixed by (s, k): the counters of both, and resets.

    Args:
        seed: fixes the episodes of a first reset that is given no seed; environment i has seed + i.
        **options: those of `VectorEnv`.
    """

    def __init__(
        self,
        num_envs: int,
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        *,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_envs, observation_space, action_space, **options)
        self._seed = (secrets.randbits(62) if seed is None else seed) + np.arange(num_envs, dtype=np.int64)
        # Episodes number from -1, so that the first reset begins episode 0.
        self._episode = np.full(num_envs, -1, dtype=np.int64)
        self._elapsed = np.zeros(num_envs, dtype=np.int64)
        self._ended = np.ones(num_envs, dtype=bool)
        self._observation = np.zeros(self.observation_space.shape or (), self.observation_space.dtype)

    def reset(
        self, *, seed: Seeds = None, ids: Ids = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        masked = options is not None and "reset_mask" in options
        if options is not None and masked:
            ids = self._masked(options["reset_mask"])
            options = {key: value for key, value in options.items() if key != "reset_mask"}
            if isinstance(seed, (list, tuple, np.ndarray)) and len(seed) == self.num_envs:
                seed = [seed[i] for i in ids]
        rows = self._rows(ids)
        if seed is not None:
            self._take_seeds(seed, rows)
        info = self._begin_episodes(rows, options)
        if masked:
            everyone = LazyInfo()
            everyone.make = lambda: spread(info, rows, self.num_envs)
            return torch.from_numpy(self._observation.copy()), everyone
        return torch.from_numpy(self._observation[rows]), info

    def _take_seeds(self, seed: Seeds, rows: np.ndarray) -> None:
        """Let the environments rows begin the streams of seeds; one that is None lets its environment go on."""
        one = isinstance(seed, (int, np.integer))
        seeds = int(seed) + rows if one else np.asarray([-1 if s is None else s for s in seed])  # type: ignore
        new = np.ones(len(rows), dtype=bool) if one else np.array([s is not None for s in seed], dtype=bool)  # type: ignore
        if seeds.shape != rows.shape or (seeds[new] < 0).any():
            raise ValueError(f"seed is {seed!r}; give one int of at least 0, or one for each of {len(rows)}.")
        self._seed[rows[new]], self._episode[rows[new]] = seeds[new], -1

    def _begin_episodes(self, rows: np.ndarray, options: dict[str, Any] | None = None) -> dict[str, Any]:
        """Put the environments rows at the start of their next episodes, counters included; give the resets' info."""
        raise NotImplementedError

    def _masked(self, reset_mask: Any) -> np.ndarray:
        """Give the ids that Gymnasium's reset_mask, bool [num_envs], says."""
        mask = np.asarray(reset_mask)
        if mask.dtype != np.bool_ or mask.shape != (self.num_envs,):
            raise ValueError(f"reset_mask is {mask.dtype} {mask.shape}; give booleans of shape ({self.num_envs},).")
        return np.flatnonzero(mask)


class TaskVectorEnv(VectorEnv):
    """Environments that each have their own task, a row of G numbers, of one family: what learning to adapt needs."""

    max_episode_steps: int
    """The horizon: environment steps per episode."""

    def draw_tasks(self, numbers: Any, split: Any = None) -> np.ndarray:
        """Give the tasks of these numbers, [n, G], in a split of the family: "train", "held_out" or its own (None)."""
        raise NotImplementedError

    def set_tasks(self, tasks: Any, ids: Ids = None) -> None:
        """Give the environments ids the tasks [n, G]; their episodes end here, so reset them next."""
        raise NotImplementedError


class SnapshotError(RuntimeError):
    """An environment cannot be snapshot or put back exactly."""


def blame(error: Exception | SystemExit, where: str) -> NoReturn:
    """Raise an error of somebody's environment again, with where it was in a note, and as its `raised_in`.

    sys.exit, which would end the process without a word, becomes a RuntimeError.
    """
    if isinstance(error, SystemExit):
        error, cause = RuntimeError(f"it called sys.exit({error.code!r}), which would have ended the process"), error
        error.__cause__ = cause
    if not hasattr(error, "raised_in"):
        error.add_note(f"Raised in {where}.")
        with contextlib.suppress(AttributeError):  # some have no room for it
            error.raised_in = where  # type: ignore[attr-defined]
    raise error


def _raise(error: Exception) -> NoReturn:
    raise error


class EpisodeStatistics:
    """Returns and lengths of the episodes that run in N environments; float64 sums.

    Args:
        num_envs: N.
    """

    def __init__(self, num_envs: int, device: torch.device | str = "cpu") -> None:
        self.returns = torch.zeros(num_envs, dtype=torch.float64, device=device)
        self.lengths = torch.zeros(num_envs, dtype=torch.int64, device=device)

    def update(self, reward: Tensor, ended: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """Count one step of the environments ids (all: None): reward [N], 0 elsewhere, and ended [N] (terminated or
        truncated).

        Returns:
            The returns and lengths of the episodes that ended in this step, in the environments' order, or None.
        """
        self.returns += reward
        if ids is None:
            self.lengths += 1
        else:
            self.lengths.index_add_(0, ids, torch.ones_like(ids))
        if not bool(ended.any()):
            return None
        finished = self.returns[ended].clone(), self.lengths[ended].clone()
        self.returns[ended] = 0.0
        self.lengths[ended] = 0
        return finished

    def restart(self, ids: Tensor) -> None:
        """Count from 0 in the environments ids, whose episodes were left."""
        self.returns[ids] = 0.0
        self.lengths[ids] = 0


def each_value(values: Any, n: int) -> list[Any]:
    """Give n values: those of a list or tuple, or one n times."""
    if not isinstance(values, (list, tuple)):
        return [values] * n
    if len(values) != n:
        raise ValueError(f"values holds {len(values)}; give one, or one for each of {n} environments.")
    return list(values)


def parse_autoreset(mode: AutoresetMode | str) -> AutoresetMode:
    """Read SAME_STEP or DISABLED from Gymnasium's enum, its value or its name; others raise ValueError."""
    allowed = {"samestep": AutoresetMode.SAME_STEP, "disabled": AutoresetMode.DISABLED}
    found = mode if isinstance(mode, AutoresetMode) else allowed.get(str(mode).lower().replace("_", ""))
    if found is None or found not in allowed.values():
        raise ValueError(
            f"autoreset is {mode!r}; use 'same_step' or 'disabled' "
            "(next-step autoreset puts fake transitions into the data)."
        )
    return found


def check_spaces(observation_space: gymnasium.Space, action_space: gymnasium.Space) -> None:
    """Raise ValueError unless observations and actions are Box, Discrete, MultiDiscrete or MultiBinary, observations no
    images and not of more values than LARGEST_CHOICE.
    """
    allowed = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
    several_axes = isinstance(observation_space, spaces.MultiDiscrete) and observation_space.nvec.ndim > 1
    if several_axes or not isinstance(observation_space, allowed):
        raise ValueError(
            f"the observation space is {observation_space}; policies take a Box, Discrete, MultiDiscrete of one axis "
            "or MultiBinary: wrap the environment in gymnasium.wrappers.FlattenObservation."
        )
    values = {spaces.Discrete: "n", spaces.MultiDiscrete: "nvec"}.get(type(observation_space))
    if values is not None and np.sum(getattr(observation_space, values), dtype=float) > LARGEST_CHOICE:
        raise ValueError(
            f"the observation space is {observation_space}, which policies see as one number for each value, at most "
            f"{LARGEST_CHOICE:,}: wrap the environment in a gymnasium.ObservationWrapper to a vector of features."
        )
    image = isinstance(observation_space, spaces.Box) and len(observation_space.shape) == 3
    if image and observation_space.dtype == np.uint8:
        raise ValueError(
            f"the observation space is {observation_space}, images; no policy here is convolutional: wrap the "
            "environment in a gymnasium.ObservationWrapper to a vector of features, or in "
            "gymnasium.wrappers.FlattenObservation."
        )
    if not isinstance(action_space, allowed):
        raise ValueError(
            f"the action space is {action_space}; policies act in a Box, Discrete, MultiDiscrete or MultiBinary space: "
            "wrap the environment in a gymnasium.ActionWrapper to one of these."
        )


def check_num_envs(num_envs: int) -> int:
    """Give num_envs back if it is a positive int, else raise ValueError."""
    whole = isinstance(num_envs, (int, np.integer)) and not isinstance(num_envs, bool)
    if not whole or not 1 <= num_envs <= MOST_ENVS:
        raise ValueError(f"num_envs is {num_envs!r}; give an integer of at least 1, and at most {MOST_ENVS:,}.")
    return int(num_envs)
