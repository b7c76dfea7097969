"""A VectorEnv as Stable-Baselines3's VecEnv, and the way back from every kind of environment that people have."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper, VecNormalize, unwrap_vec_normalize
from torch import Tensor

from envs.gymnasium_backend import call_each, gym_vector
from envs.infos import row_of
from envs.vector import EpisodeStatistics, Ids, Seeds, SnapshotError, VectorEnv, blame, check_spaces, each_value


class SB3View(VecEnv):
    """A VectorEnv under Stable-Baselines3's interface: NumPy observations, float32 rewards, merged dones.

    Infos are built when they are read. The info of a step that ends an episode has "terminal_observation" and
    "episode" (return "r", length "l" in steps, seconds "t" since this view was made); no Monitor is needed.

    Args:
        vector: the environments. Under DISABLED autoreset the view resets those that end.
    """

    def __init__(self, vector: VectorEnv) -> None:
        self.vector = vector
        self._statistics = EpisodeStatistics(vector.num_envs, vector.device)
        self._started = time.time()
        super().__init__(vector.num_envs, vector.single_observation_space, vector.single_action_space)
        self.metadata = self.metadata | vector.metadata

    @property
    def normalize(self) -> VecNormalize | None:
        """Find the VecNormalize among the wrappers of the Stable-Baselines3 VecEnv that is viewed, if it is one."""
        return unwrap_vec_normalize(self.vector.env) if isinstance(self.vector, _FromSB3) else None

    @property
    def spec(self) -> Any:
        """Give Gymnasium's EnvSpec of one environment, or None."""
        return self.vector.spec

    def reset(self) -> np.ndarray:
        if any(options != self._options[0] for options in self._options):
            raise ValueError("set_options was given differing options; give one dict for all environments.")
        # Both sides count environments up from one seed.
        observation, info = self.vector.reset(seed=self._seeds[0], options=self._options[0] or None)
        self._reset_seeds()
        self._reset_options()
        self._statistics = EpisodeStatistics(self.num_envs, self.vector.device)
        self.reset_infos = [row_of(info, i) for i in range(self.num_envs)]
        return _array(observation)

    def step_async(self, actions: np.ndarray) -> None:
        self._pending = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, Sequence[dict[str, Any]]]:  # type: ignore[override]
        observation, reward, terminated, truncated, info = self.vector.step(self._pending)
        done = terminated | truncated
        finished = self._statistics.update(reward, done)
        ended, final = _array(done), None
        if finished is not None:
            final = _array(info.get("final_obs", observation))
            if self.vector.autoreset is AutoresetMode.DISABLED:
                ids = np.flatnonzero(ended)
                observation = observation.clone()
                observation[done] = self.vector.reset(ids=ids)[0]
        infos = LazyInfos(info, ended, _array(truncated & ~terminated), final, self._episodes(ended, finished))
        return _array(observation), _array(reward.to(torch.float32)), ended, infos

    def _episodes(self, ended: np.ndarray, finished: tuple[Tensor, Tensor] | None) -> dict[int, dict[str, Any]]:
        if finished is None:
            return {}
        seconds = round(time.time() - self._started, 6)
        returns, lengths = (values.tolist() for values in finished)
        rows = zip(np.flatnonzero(ended).tolist(), returns, lengths, strict=True)
        return {i: {"r": episode_return, "l": length, "t": seconds} for i, episode_return, length in rows}

    def close(self) -> None:
        self.vector.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        return list(self.vector.render() or [None] * self.num_envs)  # type: ignore[arg-type]

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Give the attribute of each environment; see `VectorEnv.get_attr`."""
        return list(self.vector.get_attr(attr_name, list(self._get_indices(indices))))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set it in each environment; see `VectorEnv.set_attr`."""
        rows = list(self._get_indices(indices))
        self.vector.set_attr(attr_name, [value] * len(rows), rows)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Call it on each environment; see `VectorEnv.call`."""
        rows = list(self._get_indices(indices))
        return list(self.vector.call(method_name, *method_args, ids=rows, **method_kwargs))

    def env_is_wrapped(self, wrapper_class: type[gymnasium.Wrapper], indices: Any = None) -> list[bool]:
        """Say whether it is wrapped; True for Monitor, whose work this view does."""
        rows = list(self._get_indices(indices))
        if issubclass(wrapper_class, Monitor):
            return [True] * len(rows)
        if isinstance(self.vector, _FromSB3):
            return self.vector.env.env_is_wrapped(wrapper_class, rows)
        envs = getattr(self.vector, "envs", None)
        return [envs is not None and is_wrapped(envs[i], wrapper_class) for i in rows]


class LazyInfos(Sequence[dict[str, Any]]):
    """One info dict per environment, each built when it is first read and then kept; read them before the next step.

    Args:
        info: the vector environment's info.
        ended: [n], which environments ended.
        timed_out: [n], truncated and not terminated.
        final: [n, *O] last observations, or None where no episode ended.
        episodes: the statistics of the episodes that ended, by environment.
        rows: the info's row of each environment, -1 for those that were not stepped; None: they are the same.
    """

    def __init__(
        self,
        info: dict[str, Any],
        ended: np.ndarray,
        timed_out: np.ndarray,
        final: np.ndarray | None,
        episodes: dict[int, dict[str, Any]],
        rows: Sequence[int] | None = None,
    ) -> None:
        self._info, self._ended, self._timed_out, self._final, self._episodes = info, ended, timed_out, final, episodes
        self._rows = range(len(ended)) if rows is None else rows
        self._built: list[dict[str, Any] | None] = [None] * len(ended)

    def __len__(self) -> int:
        return len(self._built)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        built = self._built[i]
        if built is None:
            built = self._built[i] = self._build(range(len(self))[i])
        return built

    def __setitem__(self, i: int, info: dict[str, Any]) -> None:
        self._built[i] = info

    def _build(self, i: int) -> dict[str, Any]:
        ended = bool(self._ended[i])
        source = self._info.get("final_info", self._info) if ended else self._info
        row = self._rows[i]
        built = row_of(source, row) if source and row >= 0 else {}
        built["TimeLimit.truncated"] = bool(self._timed_out[i])
        if ended and self._final is not None:
            built["terminal_observation"] = self._final[i]
            built.setdefault("episode", self._episodes[i])
        return built


def _array(tensor: Tensor) -> np.ndarray:
    """Copy to the host: the vector environment may reuse its tensors in the next step."""
    return tensor.cpu().numpy().copy()


def as_vector(env: Any, autoreset: AutoresetMode = AutoresetMode.SAME_STEP, copies: int = 1) -> VectorEnv:
    """Make a VectorEnv of any kind of environment.

    Args:
        env: a VectorEnv, an SB3View, a gymnasium.Env, a gymnasium.vector.VectorEnv with SAME_STEP autoreset, or a
            Stable-Baselines3 VecEnv that does not normalize observations. Under DISABLED, a SyncVectorEnv of any mode
            or a DummyVecEnv, neither in a wrapper: their environments are stepped and reset one by one.
        autoreset: what those that end do; VectorEnvs stay as they are.
        copies: environments to make of one gymnasium.Env.

    Raises:
        TypeError: env is none of these, or cannot be copied.
        ValueError: the environment's autoreset, normalization or spaces are not supported; the message says the remedy.
    """
    if isinstance(env, VectorEnv):
        return env
    if isinstance(env, SB3View):
        return env.vector
    if isinstance(env, gymnasium.Env):
        return gym_vector([env, *(_copy(env) for _ in range(copies - 1))], autoreset=autoreset)
    if isinstance(env, VecEnv):
        foreign = _FromSB3(env)
        return foreign if autoreset is AutoresetMode.SAME_STEP else gym_vector(_singles(env), autoreset=autoreset)
    if isinstance(env, gymnasium.vector.VectorEnv):
        together = autoreset is AutoresetMode.SAME_STEP
        return _FromGymnasium(env) if together else gym_vector(_singles(env), autoreset=autoreset)
    raise TypeError(
        f"env is a {type(env).__name__}; give a gymnasium.Env, a gymnasium.vector.VectorEnv, "
        "a Stable-Baselines3 VecEnv or what envs.make_vec returns."
    )


def view_of(env: Any, autoreset: AutoresetMode, copies: int, wanted: int | None, trainer: str) -> SB3View:
    """View any kind of environment as a trainer, named in refusals, works on it.

    Args:
        wanted: how many there have to be, or None.
        Others: as of `as_vector`.

    Raises:
        TypeError, ValueError: as of `as_vector`; or their number or autoreset is another.
    """
    view = env if isinstance(env, SB3View) else SB3View(as_vector(env, autoreset, copies))
    vector: VectorEnv = view.vector
    if wanted is not None and vector.num_envs != wanted:
        raise ValueError(
            f"num_envs is {wanted} but env holds {vector.num_envs}; leave num_envs out where you give an environment."
        )
    if vector.autoreset is not autoreset:
        mine, theirs = (mode.name.lower() for mode in (autoreset, vector.autoreset))
        raise ValueError(f"env has autoreset {theirs!r}; {trainer} trains with make_vec(..., autoreset={mine!r}).")
    check_spaces(vector.single_observation_space, vector.single_action_space)
    return view


def _singles(env: Any) -> list[gymnasium.Env]:
    """Give the environments that a vector environment steps one after the other; others raise ValueError."""
    if isinstance(env, (DummyVecEnv, gymnasium.vector.SyncVectorEnv)):
        return env.envs
    raise ValueError(
        f"{type(env).__name__} steps and resets all of its environments together, which does not do for particles that "
        "end at different times; give a DummyVecEnv or SyncVectorEnv without a wrapper, or make_vec(..., "
        "autoreset='disabled')."
    )


def _copy(env: gymnasium.Env) -> gymnasium.Env:
    try:
        return copy.deepcopy(env)
    except Exception as error:  # whatever an environment holds may refuse
        raise TypeError(
            f"{env} cannot be copied ({error}), and one is not enough; give make_vec a callable that returns a new one."
        ) from error


class _Foreign(VectorEnv):
    """Somebody else's vector environment: it steps all of its environments together and takes no snapshots."""

    env: Any
    _steps = 0
    _busy = False

    def _run(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call what is somebody else's."""
        self._busy = True
        try:
            return call(*args, **kwargs)
        except (Exception, SystemExit) as error:
            blame(error, str(self.doing()))
        finally:
            self._busy = False

    def doing(self) -> str | None:
        return f"{type(self.env).__name__}, in its step {self._steps}" if self._busy else None

    def _checked(self, observations: Any) -> Tensor:
        """Give observations [N, *O] as a tensor, if they are what the space says."""
        observation = _tensor(observations)
        if observation.shape != self.observation_space.shape:
            raise ValueError(
                f"{type(self.env).__name__} gave observations of shape {tuple(observation.shape)} in its step "
                f"{self._steps}, but its observation space says {self.observation_space.shape}; correct one of them."
            )
        return observation

    def _require_all(self, ids: Ids, options: dict[str, Any] | None = None) -> None:
        if ids is not None or "reset_mask" in (options or {}):
            raise ValueError(
                f"{type(self.env).__name__} steps and resets all of its environments together; "
                "leave ids out, or make the environments with envs.make_vec."
            )

    def snapshot(self, ids: Ids = None) -> dict[str, Tensor]:
        raise SnapshotError(
            f"{type(self.env).__name__} cannot be snapshot, because its state is out of reach; "
            "make the environments with envs.make_vec for exact resumes."
        )

    def restore(self, snapshot: dict[str, Tensor], ids: Ids = None) -> Tensor:
        raise SnapshotError(f"{type(self.env).__name__} cannot be restored; make the environments with envs.make_vec.")

    def close_extras(self, **kwargs: Any) -> None:
        self.env.close()


class _FromGymnasium(_Foreign):
    """A gymnasium.vector.VectorEnv with SAME_STEP autoreset."""

    def __init__(self, env: gymnasium.vector.VectorEnv) -> None:
        if env.metadata.get("autoreset_mode") is not AutoresetMode.SAME_STEP:
            env_id = env.spec.id if env.spec is not None else "..."
            raise ValueError(
                f"{env} has autoreset mode {env.metadata.get('autoreset_mode')}; make it in same-step mode: "
                f'gym.make_vec("{env_id}", num_envs={env.num_envs}, vectorization_mode="sync", '
                'vector_kwargs={"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}).'
            )
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self.env = env
        self.spec = env.spec
        self.render_mode = env.render_mode

    def reset(
        self, *, seed: Seeds = None, ids: Ids = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        self._require_all(ids, options)
        if seed is not None and not isinstance(seed, int):
            seed = np.asarray(seed).tolist()
            if isinstance(seed, list) and len(seed) != self.num_envs:
                raise ValueError(f"seed is {seed}; give one int, or one for each of {self.num_envs}.")
        observation, info = self._run(self.env.reset, seed=seed, options=options)
        return self._checked(observation), info

    @property
    def envs(self) -> list[gymnasium.Env] | None:
        """Give the single environments, where they are in this process."""
        return getattr(self.env.unwrapped, "envs", None)

    def get_attr(self, name: str, ids: Ids = None) -> tuple[Any, ...]:
        base, rows = self.env.unwrapped, self._rows(ids)
        if self.envs is not None:
            return tuple(self.envs[i].get_wrapper_attr(name) for i in rows)
        found = base.get_attr(name) if hasattr(base, "get_attr") else [getattr(base, name)] * self.num_envs
        return tuple(found[i] for i in rows)

    def call(self, name: str, *args: Any, ids: Ids = None, **kwargs: Any) -> tuple[Any, ...]:
        rows = self._rows(ids)
        if self.envs is not None:
            return call_each([self.envs[i] for i in rows], name, *args, **kwargs)
        if len(rows) < self.num_envs:
            self._require_all(ids)
        return tuple(self.env.unwrapped.call(name, *args, **kwargs))

    def set_attr(self, name: str, values: Any, ids: Ids = None) -> None:
        rows = self._rows(ids)
        whole = list(self.get_attr(name)) if len(rows) < self.num_envs else [None] * self.num_envs
        for i, value in zip(rows, each_value(values, len(rows)), strict=True):
            whole[i] = value
        self.env.unwrapped.set_attr(name, whole)

    def step(self, actions: Any, ids: Ids = None) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        self._require_all(ids)
        self._steps += 1
        observations, *arrays, info = self._run(self.env.step, self._check_actions(actions, self.num_envs))
        observation = self._checked(observations)
        reward, terminated, truncated = map(_tensor, arrays)
        ended = terminated | truncated
        if ended.any():
            if "final_obs" not in info:
                raise ValueError(f"{self.env} ended an episode without info['final_obs']; same-step mode gives it.")
            final = observation.clone()
            for i in ended.nonzero().flatten().tolist():
                final[i] = _tensor(info["final_obs"][i])
            info = {**info, "final_obs": final, "_final_obs": ended}
        return observation, reward, terminated, truncated, info

    def render(self) -> tuple[Any, ...] | None:
        return self.env.render()


class _FromSB3(_Foreign):
    """A Stable-Baselines3 VecEnv."""

    def __init__(self, env: VecEnv) -> None:
        wrapper: VecEnv = env
        while isinstance(wrapper, VecEnvWrapper):
            if isinstance(wrapper, VecNormalize) and wrapper.norm_obs:
                raise ValueError(
                    "this VecNormalize normalizes observations, which here is part of the policy; "
                    "make it with norm_obs=False (norm_reward may stay)."
                )
            wrapper = wrapper.venv
        super().__init__(env.num_envs, env.observation_space, env.action_space)
        self.env = env
        self.spec = env.get_attr("spec")[0] if env.has_attr("spec") else None
        self.render_mode = env.render_mode

    def reset(
        self, *, seed: Seeds = None, ids: Ids = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        self._require_all(ids, options)
        if seed is not None:
            if not isinstance(seed, (int, np.integer)):
                raise ValueError(f"seed is {seed!r}; a Stable-Baselines3 VecEnv takes one int for all of them.")
            self.env.seed(int(seed))
        if options:
            self.env.set_options(options)
        return self._checked(self._run(self.env.reset)), {}

    def step(self, actions: Any, ids: Ids = None) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        self._require_all(ids)
        self._steps += 1
        observations, rewards, dones, infos = self._run(self.env.step, self._check_actions(actions, self.num_envs))
        observation, reward, ended = self._checked(observations), _tensor(rewards), _tensor(dones)
        infos = infos or [{}] * self.num_envs  # as in SB3, an environment without infos may give none
        # Without the last observation there is no value to go on from, so SB3 takes such an end as terminated.
        timed_out = torch.tensor(
            [bool(info.get("TimeLimit.truncated", False)) and "terminal_observation" in info for info in infos]
        )
        batched: dict[str, Any] = {}
        for i, info in enumerate(infos):
            own = {key: value for key, value in info.items() if key not in _SB3_KEYS}
            if own:
                self._add_info(batched, {"final_info": own} if dones[i] else own, i)
        if ended.any():
            final = observation.clone()
            for i in ended.nonzero().flatten().tolist():
                final[i] = _tensor(infos[i].get("terminal_observation", observations[i]))
            batched |= {"final_obs": final, "_final_obs": ended}
        return observation, reward, ended & ~timed_out, ended & timed_out, batched

    def get_attr(self, name: str, ids: Ids = None) -> tuple[Any, ...]:
        return tuple(self.env.get_attr(name, self._rows(ids).tolist()))

    def call(self, name: str, *args: Any, ids: Ids = None, **kwargs: Any) -> tuple[Any, ...]:
        return tuple(self.env.env_method(name, *args, indices=self._rows(ids).tolist(), **kwargs))

    def set_attr(self, name: str, values: Any, ids: Ids = None) -> None:
        rows = self._rows(ids)
        for i, value in zip(rows.tolist(), each_value(values, len(rows)), strict=True):
            self.env.set_attr(name, value, i)

    def render(self) -> tuple[Any, ...] | None:
        return tuple(self.env.get_images())


_SB3_KEYS = frozenset({"terminal_observation", "TimeLimit.truncated"})


def _tensor(values: Any) -> Tensor:
    return values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
