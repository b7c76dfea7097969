"""Gymnasium's environments as a VectorEnv, stepped one after the other in this process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from types import NoneType
from typing import Any, NoReturn

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import EzPickle
from gymnasium.vector import AutoresetMode
from torch import Tensor

from envs.vector import Ids, SeededVectorEnv, SnapshotError, TaskVectorEnv, blame, check_num_envs, each_value

MAX_RECORDED_STEPS = 100_000
"""An episode longer than this many environment steps is not recorded on, and can no longer be snapshot."""

FEW_STEPS = 5
"""Of an episode, that are played twice to see whether it repeats."""

_SNAPSHOT = {"seed", "episode", "elapsed", "actions", "observation"}


class GymVectorEnv(SeededVectorEnv):
    """Environments of Gymnasium's kind, stepped one after the other in this process.

    Episode k of the environment with seed s is reset with a seed that (s, k) alone decides. So s, k and the actions
    since the reset give the environment's state, and are its snapshot; restoring replays them.

    Infos are the environments' own in Gymnasium's vector form: entry [n] and mask "_entry" [n], rows as in the call.
    Those of a step that ended an episode under SAME_STEP stand in info["final_info"].

    Args:
        envs: one gymnasium.Env per environment, with equal spaces; this object owns and closes them.
        autoreset: see `VectorEnv`.
        seed: fixes the episodes of a first reset that is given no seed.

    Raises:
        ValueError: envs is empty, holds an environment twice or differing spaces, or a space is not supported.
    """

    def __init__(
        self,
        envs: Sequence[gymnasium.Env],
        *,
        autoreset: AutoresetMode | str = AutoresetMode.SAME_STEP,
        seed: int | None = None,
    ) -> None:
        num_envs = check_num_envs(len(envs))
        super().__init__(num_envs, envs[0].observation_space, envs[0].action_space, autoreset=autoreset, seed=seed)
        if len({id(env.unwrapped) for env in envs}) != num_envs:
            raise ValueError("envs holds one environment twice; give a callable that makes a new one at each call.")
        for i, env in enumerate(envs):
            if (env.observation_space, env.action_space) != (self.single_observation_space, self.single_action_space):
                raise ValueError(f"environment {i} has other spaces than environment 0; give environments of one kind.")
        self.envs = list(envs)
        self.spec = envs[0].spec
        self.render_mode = envs[0].render_mode
        self.metadata = {**envs[0].metadata, **self.metadata}
        self._action_shape = self.single_action_space.shape or ()
        self._discrete = isinstance(self.single_action_space, spaces.Discrete)
        self._actions: list[list[np.ndarray] | None] = [None] * num_envs
        self._at: int | None = None
        """The environment whose own code runs now."""
        self.unrepeatable = ""
        """Why its episodes cannot be played again, where that is known; see `find_unrepeatable`."""

    def step(self, actions: Any, ids: Ids = None) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        rows = self._rows(ids)
        n = len(rows)
        taken = self._check_actions(actions, n).copy()
        if self._ended[rows].any():
            stopped = rows[self._ended[rows]].tolist()
            raise ValueError(f"environments {stopped} have ended or never begun; reset them first.")

        observation = np.empty((n, *self._observation.shape[1:]), self._observation.dtype)
        reward = np.empty(n)
        terminated, truncated = np.empty(n, dtype=bool), np.empty(n, dtype=bool)
        infos: list[dict[str, Any]] = []
        shape = self._observation.shape[1:]
        for k, (i, action) in enumerate(zip(rows.tolist(), self._environment_actions(taken), strict=True)):
            self._at = i
            try:
                outcome = self.envs[i].step(action)
            except (Exception, SystemExit) as error:
                self._blame(error)
            self._at = None
            if not isinstance(outcome, (tuple, list)) or len(outcome) != 5:
                raise self._wrong_outcome(i, outcome)
            try:
                if np.shape(outcome[0]) != shape:
                    raise ValueError
                observation[k] = outcome[0]
                reward[k], terminated[k], truncated[k] = outcome[1:4]
            except (TypeError, ValueError):
                self._check_shape(i, outcome[0])
                names = ("reward", "terminated", "truncated")
                observation[k] = self._numbers(i, "observation", outcome[0])
                reward[k], terminated[k], truncated[k] = map(partial(self._number, i), names, outcome[1:4])
            if not isinstance(outcome[4], (dict, NoneType)):
                raise self._wrong_outcome(i, outcome)
            infos.append(outcome[4] or {})
            record = self._actions[i]
            if record is not None:
                record.append(taken[k])
                if len(record) > MAX_RECORDED_STEPS:
                    self._actions[i] = None
        self._elapsed[rows] += 1
        self._check_finite("observation", observation, rows)
        self._check_finite("reward", reward, rows)

        self._observation[rows] = observation
        batched: dict[str, Any] = {}
        ended = terminated | truncated
        if ended.any():
            self._ended[rows] = ended
            if self.autoreset is AutoresetMode.SAME_STEP:
                batched = {"final_obs": torch.from_numpy(observation), "_final_obs": torch.from_numpy(ended)}
                for k in np.flatnonzero(ended).tolist():
                    infos[k] = {"final_info": infos[k], **self._begin_episode(int(rows[k]), None)}
                observation = self._observation[rows]
        tensors = (torch.from_numpy(x) for x in (observation, reward, terminated, truncated))
        return (*tensors, {**self._batch_infos(infos), **batched})  # type: ignore[return-value]

    def snapshot(self, ids: Ids = None) -> dict[str, Tensor]:
        return self._mark(self._rows(ids))()

    def mark(self) -> Callable[[], dict[str, Tensor]]:
        return self._mark(np.arange(self.num_envs))

    def find_unrepeatable(self) -> str:
        """Play the begin of one episode twice in environment 0, under DISABLED autoreset: say why it differs, or ""."""
        space, began = copy.deepcopy(self.single_action_space), []
        for _ in range(2):
            space.seed(0)
            self.reset(seed=[0], ids=[0])
            began.append([self._observation[0].copy()])
            while len(began[-1]) < FEW_STEPS and not self._ended[0]:
                self.step(np.asarray(space.sample())[None], ids=[0])
                began[-1].append(self._observation[0].copy())
        if len(began[0]) == len(began[1]) and all(map(np.array_equal, *began)):
            return ""
        return (
            f"{self} gives other observations after the same reset(seed) and actions; have it draw all randomness from "
            "self.np_random, which super().reset(seed=seed) sets."
        )

    def _mark(self, rows: np.ndarray) -> Callable[[], dict[str, Tensor]]:
        """Note where the environments rows are: records of actions only grow, and a new episode begins a new one."""
        elapsed, records = self._elapsed[rows], [self._actions[i] for i in rows]
        arrays = {"seed": self._seed[rows], "episode": self._episode[rows], "observation": self._observation[rows]}
        why = {i: self._why_not_recorded(i) for i, record in zip(rows.tolist(), records, strict=True) if record is None}

        def taken() -> dict[str, Tensor]:
            if self.unrepeatable:
                raise SnapshotError(self.unrepeatable)
            for i, reason in why.items():
                raise SnapshotError(f"environment {i} of {self} cannot be snapshot: {reason}.")
            shape = len(rows), int(elapsed.max(initial=0)), *self._action_shape
            actions = np.zeros(shape, self.single_action_space.dtype)
            for k, record in enumerate(records):
                if record and elapsed[k]:
                    actions[k, : elapsed[k]] = record[: elapsed[k]]
            found = {**arrays, "elapsed": elapsed, "actions": actions}
            return {name: torch.from_numpy(array) for name, array in found.items()}

        return taken

    def restore(self, snapshot: dict[str, Tensor], ids: Ids = None) -> Tensor:
        rows = self._rows(ids)
        if set(snapshot) != _SNAPSHOT or snapshot["observation"].shape != (len(rows), *self._observation.shape[1:]):
            raise SnapshotError(
                f"This snapshot does not fit {len(rows)} environments of {self}; "
                "restore it to as many environments of the kind that it was taken from."
            )
        saved = {name: snapshot[name].numpy() for name in _SNAPSHOT}
        self._seed[rows] = saved["seed"]
        self._episode[rows] = saved["episode"] - 1
        for k, i in enumerate(rows.tolist()):
            self._replay(i, saved["actions"][k, : saved["elapsed"][k]].copy())
            if not np.array_equal(self._observation[i], saved["observation"][k]):
                raise SnapshotError(
                    f"environment {i} of {self} cannot be put back exactly: replaying its episode gave another "
                    "observation, so it holds state that reset(seed) does not set."
                )
        return torch.from_numpy(self._observation[rows])

    def part(self, first: int, count: int, num_threads: int = 0) -> GymVectorEnv:
        rows = slice(first, first + count)
        part = type(self)(self.envs[rows], autoreset=self.autoreset)
        for name in ("_seed", "_episode", "_elapsed", "_ended", "_observation"):
            setattr(part, name, getattr(self, name)[rows].copy())
        part._actions = [None if record is None else list(record) for record in self._actions[rows]]
        return part

    def __getstate__(self) -> dict[str, Any]:
        # Such environments are copied by being made anew: their episodes have to be played again.
        anew = np.array([isinstance(env.unwrapped, EzPickle) for env in self.envs]) & (self._episode >= 0)
        rows = np.flatnonzero(anew)
        return {**self.__dict__, "_replays": (rows, self.snapshot(rows))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        rows, kept = state.pop("_replays")
        self.__dict__.update(state)
        if len(rows):
            self.restore(kept, rows)

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """Give the environments' generators."""
        return self.get_attr("np_random")

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """Give the seeds that their generators were made with."""
        return self.get_attr("np_random_seed")

    def get_attr(self, name: str, ids: Ids = None) -> tuple[Any, ...]:
        return tuple(self.envs[i].get_wrapper_attr(name) for i in self._rows(ids))

    def call(self, name: str, *args: Any, ids: Ids = None, **kwargs: Any) -> tuple[Any, ...]:
        return call_each([self.envs[i] for i in self._rows(ids)], name, *args, **kwargs)

    def set_attr(self, name: str, values: Any, ids: Ids = None) -> None:
        rows = self._rows(ids)
        for i, value in zip(rows, each_value(values, len(rows)), strict=True):
            self.envs[i].set_wrapper_attr(name, value)

    def render(self) -> tuple[Any, ...] | None:
        """Draw one frame per environment."""
        return tuple(env.render() for env in self.envs)

    def close_extras(self, **kwargs: Any) -> None:
        for env in self.envs:
            env.close()

    def _begin_episodes(self, rows: np.ndarray, options: dict[str, Any] | None = None) -> dict[str, Any]:
        return self._batch_infos([self._begin_episode(i, options or None) for i in rows.tolist()])

    def _begin_episode(self, i: int, options: dict[str, Any] | None) -> dict[str, Any]:
        """Reset environment i into the next episode of its stream and return its info."""
        self._episode[i] += 1
        seed = np.random.SeedSequence((int(self._seed[i]), int(self._episode[i]))).generate_state(1)[0]
        # Environments without options need not name them.
        self._at, self._elapsed[i] = i, -1
        try:
            began = self.envs[i].reset(seed=int(seed), **({"options": options} if options else {}))
        except (Exception, SystemExit) as error:
            self._blame(error)
        self._at = None
        if not isinstance(began, tuple) or len(began) != 2:
            raise ValueError(
                f"environment {i} of {self} gave {type(began).__name__} from reset; Gymnasium's reset gives a tuple of "
                "observation and info: end its reset with them."
            )
        observation, info = began
        self._check_shape(i, observation)
        self._observation[i] = observation
        self._elapsed[i] = 0
        self._ended[i] = False
        self._actions[i] = None if options else []  # a snapshot has no place for options
        self._check_finite("observation", self._observation[i : i + 1], np.array([i]))
        return info

    def _replay(self, i: int, actions: np.ndarray) -> None:
        """Begin the next episode of environment i and take actions [t, *A]."""
        self._begin_episode(i, None)
        for action in self._environment_actions(actions):
            if self._ended[i]:
                return  # somewhere else than where these actions led
            self._observation[i], _, terminated, truncated, _ = self.envs[i].step(action)
            self._ended[i] = terminated or truncated
        self._elapsed[i] = len(actions)
        self._actions[i] = list(actions)

    def _environment_actions(self, actions: np.ndarray) -> Sequence[Any] | np.ndarray:
        """Give the rows of actions as an environment takes them; what it does to them stays its own."""
        return actions.tolist() if self._discrete else actions.copy()

    def _batch_infos(self, infos: list[dict[str, Any]]) -> dict[str, Any]:
        batched: dict[str, Any] = {}
        for k, info in enumerate(infos):
            if info:
                self._add_info(batched, info, k)
        return batched if len(infos) == self.num_envs else _first_rows(batched, len(infos))

    def doing(self) -> str | None:
        if self._at is None:
            return None
        named = self.spec.id if self.spec is not None else type(self.envs[self._at].unwrapped).__name__
        step = int(self._elapsed[self._at]) + 1
        where = f"step {step} of episode" if step else "the reset of episode"
        return f"environment {self._at} of {named}, in {where} {self._episode[self._at]}"

    def _blame(self, error: Exception | SystemExit) -> NoReturn:
        where, self._at = self.doing(), None
        blame(error, str(where))

    def _when(self, i: int) -> str:
        step = int(self._elapsed[i]) + 1
        return f"at step {step} of its episode" if step else "in its reset"

    def _check_shape(self, i: int, observation: Any) -> None:
        try:
            shape: Any = np.shape(observation)
        except ValueError:
            shape = "none, with rows of different lengths"
        if shape != (wanted := self._observation.shape[1:]):
            raise ValueError(
                f"environment {i} of {self} gave {_short(observation)} as observation {self._when(i)}, whose shape is "
                f"{shape}, but its observation space says {wanted}; correct one of them."
            )

    def _wrong_outcome(self, i: int, outcome: Any) -> ValueError:
        is_series = isinstance(outcome, (tuple, list))
        given = f"{_short(outcome)} ({type(outcome).__name__})"
        if is_series and len(outcome) != 5:
            given = f"{len(outcome)} values"
        return ValueError(
            f"environment {i} of {self} gave {given} {self._when(i)}; Gymnasium's five are observation, reward, "
            "terminated, truncated and info, a dict: end its step with them."
        )

    def _number(self, i: int, name: str, value: Any) -> Any:
        """Read a reward, terminated or truncated that is no number but an array of one."""
        if np.size(value) != 1:
            raise ValueError(
                f"environment {i} of {self} gave {_short(value)} as {name} {self._when(i)}, where there is one number; "
                "correct it."
            )
        return self._numbers(i, name, value).item()

    def _numbers(self, i: int, name: str, value: Any) -> np.ndarray:
        try:
            return np.asarray(value).astype(float)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"environment {i} of {self} gave {_short(value)!r} as {name} {self._when(i)}, which is no number; "
                "correct the environment."
            ) from error

    def _check_finite(self, name: str, values: np.ndarray, rows: np.ndarray) -> None:
        finite = np.isfinite(values)
        if not finite.all():
            i = int(rows[np.argwhere(~finite)[0, 0]])
            raise ValueError(
                f"environment {i} of {self} gave a {name} that is NaN or infinite at step {self._elapsed[i]} of its "
                "episode; correct the environment, or let it terminate before that."
            )

    def _why_not_recorded(self, i: int) -> str:
        if self._episode[i] < 0:
            return "it has not been reset yet"
        if self._elapsed[i] > MAX_RECORDED_STEPS:
            return f"its episode is {self._elapsed[i]} steps long; only {MAX_RECORDED_STEPS} are recorded"
        return "its episode began with reset options, which a snapshot does not hold"


class GymTaskVectorEnv(GymVectorEnv, TaskVectorEnv):
    """Environments that have tasks of their own: `sample_tasks(n)` gives n of them, and `set_task(task)` sets one.

    Task k of a split is drawn after a reset with a seed that k and the split alone decide, so that it is the same in
    every run where `sample_tasks` draws from the environment's np_random. A snapshot does not hold it.
    """

    @property
    def max_episode_steps(self) -> int:  # type: ignore[override]
        """Give the environments' own time limit."""
        first = self.envs[0]
        limit = first.get_wrapper_attr("_max_episode_steps") if first.has_wrapper_attr("_max_episode_steps") else None
        if limit is None:
            raise AttributeError(
                f"{first} has no time limit, and a task's rollout is a whole horizon; wrap it in "
                "gymnasium.wrappers.TimeLimit."
            )
        return limit

    def draw_tasks(self, numbers: Any, split: Any = None) -> np.ndarray:
        tasks = np.empty(len(numbers), dtype=object)
        purpose = int.from_bytes((split or "train").encode(), "little")
        for k, number in enumerate(np.asarray(numbers).tolist()):
            seed = np.random.SeedSequence((number, purpose)).generate_state(1)[0]
            self.envs[0].reset(seed=int(seed))
            tasks[k] = self.envs[0].get_wrapper_attr("sample_tasks")(1)[0]
        self._ended[0] = True
        return tasks

    def set_tasks(self, tasks: Any, ids: Ids = None) -> None:
        rows = self._rows(ids)
        for i, task in zip(rows.tolist(), tasks, strict=True):
            self.envs[i].get_wrapper_attr("set_task")(task)
        self._ended[rows] = True


def gym_vector(envs: Sequence[gymnasium.Env], **options: Any) -> GymVectorEnv:
    """Make a GymVectorEnv, one of tasks where the environments have set_task and sample_tasks; arguments are its."""
    have_tasks = bool(envs) and all(envs[0].has_wrapper_attr(name) for name in ("set_task", "sample_tasks"))
    return (GymTaskVectorEnv if have_tasks else GymVectorEnv)(envs, **options)


def call_each(envs: Sequence[gymnasium.Env], name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Call a method of each environment, or give its attribute, of the outermost wrapper that has it."""
    found = [env.get_wrapper_attr(name) for env in envs]
    return tuple(one(*args, **kwargs) if callable(one) else one for one in found)


def _short(value: Any) -> str:
    """Show what an environment gave, on one line."""
    return " ".join(str(value).split())[:60]


def _first_rows(infos: dict[str, Any], n: int) -> dict[str, Any]:
    """Keep the rows of this call: Gymnasium's batched infos always have one per environment."""
    return {key: _first_rows(value, n) if isinstance(value, dict) else value[:n] for key, value in infos.items()}
