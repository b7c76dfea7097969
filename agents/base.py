"""What every agent shares: the Stable-Baselines3 interface around our own loop."""

from __future__ import annotations

import dataclasses
import inspect
import math
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, ClassVar, Self

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

from agents import checkpoint, noise
from agents.checkpoint import with_prefix
from agents.config import CommonConfig, Schedule, as_attribute, preset_values
from agents.devices import Instant, sent
from agents.failures import Failures
from agents.policy.actor_critic import ActorCriticPolicy
from agents.policy.base import named_as_in, refuse_frozen, warn_of_units
from agents.policy.choice import OFF_IN_SB3, checked_kwargs, known_policy, options_of
from agents.policy.distributions import Head
from agents.rollout.buffer import FieldSpec, buffer_fields
from agents.rollout.collector import Collector, single_thread
from agents.rollout.spread import Spread, SpreadCollector
from agents.saving import Begun, Saved
from envs import make_vec
from envs.sb3 import SB3View, as_vector, view_of
from envs.vector import VectorEnv


class Agent(Saved, BaseAlgorithm):  # type: ignore[misc]  # saves without pickle
    """A Stable-Baselines3 algorithm with its own training loop.

    learn, callbacks, the logger, predict, evaluate_policy and EvalCallback work as in Stable-Baselines3.
    Hyperparameters are the fields of `Config`, given as keyword arguments. An iteration collects a rollout and then
    calls `train` with it, which an algorithm defines.

    Args:
        policy: a name in policy_aliases, such as "MlpPolicy", or a policy class of the same kind.
        env: a Gymnasium id (config.num_envs of it are made), any environment that `envs.sb3.as_vector` takes, or None
            for an agent that only predicts.
        policy_kwargs: the policy's own options, such as net_arch, activation_fn, log_std_init and
            normalize_observations: in place of the hyperparameters of these names.
        tensorboard_log: folder for TensorBoard, or None.
        verbose: 0 prints nothing, 1 prints each iteration's metrics.
        seed: fixes everything that the agent draws; None takes fresh entropy.
        device: where the policy trains; it acts where the environments live.
        stats_window_size: episodes over which training returns are averaged.
        **hyperparameters: fields of Config.

    Raises:
        ValueError: a hyperparameter, space or environment is not possible; the message says what is.
    """

    Config: ClassVar[type[CommonConfig]] = CommonConfig
    dashboard: ClassVar[dict[str, dict[str, list[str]]]] = {}
    """Group -> chart -> the curves that it shows together, for TensorBoard's page of custom scalars."""
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": ActorCriticPolicy}
    """The first is what train.py takes unless told otherwise."""
    policy_base: ClassVar[type[BasePolicy]] = ActorCriticPolicy
    """What a policy class of one's own is a subclass of."""
    autoreset: ClassVar[AutoresetMode] = AutoresetMode.SAME_STEP
    """What its environments do with those that end."""

    env: SB3View | None
    collector: Collector
    current: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = [p for p in inspect.signature(Agent.__init__).parameters.values() if p.kind is not p.VAR_KEYWORD]
        cls.__signature__ = inspect.Signature(own[1:] + cls.Config.parameters())  # type: ignore[attr-defined]
        declared = {name for kind in cls.__mro__ for name in (*vars(kind), *inspect.get_annotations(kind))}
        for name in set(cls.Config.names()) - declared:
            setattr(cls, name, as_attribute(name))

    def __init__(
        self,
        policy: str | type[BasePolicy],
        env: Any,
        *,
        policy_kwargs: Mapping[str, Any] | None = None,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        stats_window_size: int = 100,
        **hyperparameters: Any,
    ) -> None:
        policy_class = known_policy(type(self).__name__, self.policy_aliases, self.policy_base, policy)
        hyperparameters = {name: x for name, x in hyperparameters.items() if (name, x) not in OFF_IN_SB3}
        self.schedules, hyperparameters = self.Config.without_schedules(hyperparameters)
        """Hyperparameters that change while training goes on, by name."""
        policy_kwargs, own = checked_kwargs(self.Config, policy_class, dict(policy_kwargs or {}))
        if seed is not None and not (isinstance(seed, (int, np.integer)) and 0 <= seed < 2**32):
            raise ValueError(f"seed is {seed!r}; give an integer of at least 0, and below 2**32, or None.")
        seed = None if seed is None else int(seed)
        config = self.Config.of(hyperparameters | own)
        if env is not None:
            env = self._as_view(env, config, wanted=hyperparameters.get("num_envs"))
            config = dataclasses.replace(config, num_envs=env.num_envs)
        super().__init__(
            policy,
            None,  # below: SB3 refuses actions without bounds
            learning_rate=0.0,  # not kept: it is a hyperparameter of those that have one
            policy_kwargs=policy_kwargs,
            stats_window_size=int(stats_window_size),
            tensorboard_log=None if tensorboard_log is None else str(tensorboard_log),
            verbose=verbose,
            device=device,
            support_multi_env=True,
            monitor_wrapper=False,
            seed=seed,
        )
        if device != "auto" and torch.device(device).type != self.device.type:  # SB3 takes the CPU then
            raise ValueError(f"device is {device!r}, but PyTorch sees no such device here; give 'cpu' or 'auto'.")
        self.__dict__.pop("learning_rate", None)
        self.config, self.current = config, config.at(self.schedules, 1.0)
        """What was given, and as it is now, where some of it has a schedule."""
        self.iteration = 0
        """Of this training; learn() begins at 0 again."""
        self.counter = 0
        """Iterations of the agent's whole life, which key everything that it draws: no call of learn() resets it."""
        self.begun: Begun | None = None
        """Where the iteration began that is collecting now, or was when an error came; see keeps_beginnings."""
        self.failures = Failures()
        self.keeps_beginnings = self.amid_iteration = False
        """Whether iterations without callbacks note it too; whether one has begun and, as by an error, not ended."""
        self.stop_reason: str | None = None
        self.share_used: Callable[[], float] | None = None
        """Says which share of training is over where not steps decide that but a clock; asked before each update."""
        self.last_metrics: dict[str, float] = {}
        self.stream_seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        if env is not None:
            self.observation_space, self.action_space = env.observation_space, env.action_space
            self.env, self.n_envs = env, env.num_envs
            self._setup_model()

    @classmethod
    def preset(cls, env_id: str) -> CommonConfig:
        """Give the defaults with this algorithm's tuned values for an environment, as keyword arguments too: **preset.

        Raises:
            gymnasium.error.UnregisteredEnv: there is no such environment.
        """
        values = preset_values(cls.name, env_id)
        if not values and not {":", "/"} & set(env_id):  # others are known once their package is imported
            gymnasium.spec(env_id)
        return cls.Config.of(values)

    @property
    def steps_per_iteration(self) -> int:
        """Count the environment steps that an iteration makes at most."""
        return self.config.n_steps * self.n_envs

    @property
    def lr_schedule(self) -> Schedule:  # type: ignore[override]
        """Give learning_rate as a function of the share of training that remains, as SB3 does."""
        rate: Any = self.learning_rate
        return self.schedules.get("learning_rate", lambda _: rate)

    @property
    def episode_returns(self) -> list[float]:
        """Give the undiscounted returns of the last training episodes."""
        return [episode["r"] for episode in self.ep_info_buffer or ()]

    @property
    def episode_lengths(self) -> list[int]:
        """Give the lengths of the last training episodes, in environment steps."""
        return [episode["l"] for episode in self.ep_info_buffer or ()]

    # Set-up ----------------------------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        self.set_random_seed(self.seed)
        self.policy = self.new_policy().to(self.device)
        if self.env is not None:
            if not hasattr(self.policy.actor, "log_unit"):
                warn_of_units(self.action_space)
            self._connect(self.env)

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seed Python's, NumPy's and PyTorch's streams as SB3 does, and the environments with a seed of their own."""
        super().set_random_seed(seed)
        if seed is not None and self.env is not None:
            self.env.seed(noise.seed_of(seed, "environments"))

    def _connect(self, env: SB3View) -> None:
        """Make what depends on the environments."""
        vector, fields, T = env.vector, self._buffer_fields(), self.config.n_steps
        if isinstance(vector, Spread):
            self.collector = SpreadCollector(self, vector, fields, T, self.shard_width(vector))
        else:
            self.collector = Collector(self, vector, fields, T)

    def shard_width(self, vector: VectorEnv) -> int:
        """Count the environments that are worked on together where an executor spreads them over workers."""
        return noise.SHARD

    def new_policy(self) -> Any:
        """Make a policy as before training, drawn from PyTorch's global stream; the agent keeps its own."""
        policy_class: Any = self.policy_class
        settings = {name: getattr(self.config, name) for name in options_of(self.config, policy_class)}
        with single_thread():  # the bits of orthogonal weights depend on how many there are
            return policy_class(self.observation_space, self.action_space, **(settings | self.policy_kwargs))

    def _buffer_fields(self) -> dict[str, FieldSpec]:
        """Declare what the algorithm keeps of each step."""
        return buffer_fields(self.policy)

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> SB3View:
        return env if isinstance(env, SB3View) else SB3View(as_vector(env))

    def get_vec_normalize_env(self) -> VecNormalize | None:
        """Give the VecNormalize that rewards go through, if the environments are SB3's and have one."""
        return None if self.env is None else self.env.normalize

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """Train on other environments of the same spaces from now on; they may be another number of them."""
        view = self._as_view(env, self.config, wanted=None)
        check_for_correct_spaces(view, self.observation_space, self.action_space)
        before = getattr(self, "collector", None)
        self._connect(view)  # first: an algorithm may refuse that number of environments
        if before is not None and before.vector is view.vector and not force_reset:
            self.collector.observations, self.collector.episodes = before.observations, before.episodes
        self.env, self.n_envs = view, view.num_envs
        self.config = dataclasses.replace(self.config, num_envs=view.num_envs)
        self.current = self.config.at(self.schedules, 1.0)
        if force_reset:
            self._last_obs = None

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        if self.env is None:
            raise ValueError(f"This {type(self).__name__} has no environment to learn in; call set_env first.")
        self.stop_reason, self.begun, self.amid_iteration = None, None, False
        self.iteration = 0 if reset_num_timesteps else self.iteration
        if self.collector.observations is None:
            self._last_obs = None  # has SB3 reset the environments
        begins = reset_num_timesteps or self._last_obs is None
        result = super()._setup_learn(int(total_timesteps), callback, reset_num_timesteps, tb_log_name, progress_bar)
        if begins:
            self._begin_episodes()
        self._plan()
        return result

    def _plan(self) -> None:
        """Settle what depends on training's length, _total_timesteps: before it, and whenever a clock changes it."""

    def _begin_episodes(self) -> None:
        """Forget the episodes that ran; all environments have just been reset."""
        self.collector.begin(self._last_obs)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        with warnings.catch_warnings():
            # EvalCallback compares the classes of environments; ours is a view, which steps as any other does.
            warnings.filterwarnings("ignore", message="Training and eval env are not of the same type")
            return super()._init_callback(callback, progress_bar)

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without the logger, whose files stay the original's; `learn` makes a new one."""
        return {name: value for name, value in self.__dict__.items() if name != "_logger"} | {
            "_custom_logger": False,
            "begun": None,
        }

    # Learning --------------------------------------------------------------------------------------------------------

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Train for at least total_timesteps environment steps, in whole iterations; see SB3's BaseAlgorithm.learn."""
        for _ in self.iterations(
            total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar
        ):
            pass
        return self

    def iterations(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Iterator[int]:
        """Learn one iteration at a time: yields the number of finished ones. It is safe to stop at any."""
        total, listener = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name or type(self).__name__, progress_bar
        )
        self.collector.listener = listener if callback is not None or progress_bar else None
        listener.on_training_start(locals(), globals())
        now: Callable[[], Any] = time.perf_counter if self.device.type == "cpu" else lambda: Instant(self.device)
        marks: tuple[Any, ...] = ()
        try:
            while self.num_timesteps < total:
                started = now()
                listener.on_rollout_start()
                blowups, steps, self.amid_iteration = self.collector.vector.blowups, self.num_timesteps, True
                if self.keeps_beginnings or self.collector.listener is not None:
                    self.begun = Begun.of(self)
                try:
                    batch = self.collect()
                except BaseException as error:
                    self.collector.leave(error)
                    raise
                if batch is None:
                    self.begun, self.amid_iteration = None, False
                    break
                listener.on_rollout_end()
                self.begun = None
                collected = now()
                if self.share_used is not None:
                    self._total_timesteps = math.ceil(self.num_timesteps / max(self.share_used(), 1e-6))
                    self._plan()
                self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)
                if self.schedules:
                    self.current = self.config.at(self.schedules, self._current_progress_remaining)
                if not all(parameter.requires_grad for parameter in self.policy.parameters()):
                    refuse_frozen(self.policy)
                with self.failures.undone(self):
                    self.train(batch)
                    self.collector.settle()
                if self.collector.policy is not self.policy:
                    self.collector.follow(self.policy)
                self.iteration, self.counter = self.iteration + 1, self.counter + 1
                self.amid_iteration = False
                earlier, marks = marks, (started, collected, now())
                self._record(marks if self.device.type == "cpu" else earlier)  # a device is still at work on this one
                if log_interval is not None and self.iteration % log_interval == 0:
                    self.logger.dump(self.num_timesteps)
                diverged = self.collector.vector.blowups - blowups
                self.stop_reason = self.failures.diverge(diverged, self.num_timesteps - steps) or self.stop_reason
                yield self.iteration
                if self.stop_reason is not None:
                    raise FloatingPointError(self.stop_reason)
        finally:
            self.collector.listener = None
            listener.on_training_end()

    def collect(self) -> Any:
        """Give what `train` takes, a rollout where the policy trains; None if a callback asked to stop."""
        return self.collector.fill(self.counter)

    @abstractmethod
    def train(self, batch: Any) -> None:
        """Update once from what `collect` gave; a stop_reason, a sentence, ends training after it."""

    def record(self, metrics: dict[str, Any], asked: Any = None, *, final: bool = False) -> dict[str, Any]:
        """Log an update's numbers by name, under train/ unless a name has a group of its own; give all, with those only
        asked for. Tensors come to the host here, together, those of shape () as numbers, and a policy that is final for
        its update, to where it acts."""
        given, numbers = metrics | (asked or {}), {}
        tensors = {name: value.detach() for name, value in given.items() if isinstance(value, Tensor)}
        if self.device.type != "cpu" and (tensors or final):
            tensors = {name: sent(x, self.device) for name, x in tensors.items()} | self.failures.asks(self.policy)
            numbers = {name: x if x.ndim else x.item() for name, x in self.collector.bring(tensors, final).items()}
            self.failures.norm = float(numbers.pop("norm_of_parameters"))
        elif tensors:
            numbers = dict(zip(tensors, torch.stack([x.double() for x in tensors.values()]).tolist(), strict=True))
        for name in metrics:
            self.logger.record(name if "/" in name else f"train/{name}", (given | numbers)[name])
        return given | numbers

    def _record(self, marks: tuple[Any, ...] = ()) -> None:
        """Log how far training is, and the seconds between the marks of an iteration."""
        assert self.env is not None
        if episodes := self.ep_info_buffer:
            self.logger.record("rollout/ep_rew_mean", float(np.mean([episode["r"] for episode in episodes])))
            self.logger.record("rollout/ep_len_mean", float(np.mean([episode["l"] for episode in episodes])))
        if self.ep_success_buffer:
            self.logger.record("rollout/success_rate", float(np.mean(self.ep_success_buffer)))
        self.logger.record("rollout/simulations_diverged", self.env.vector.blowups)
        elapsed = max((time.time_ns() - self.start_time) * 1e-9, 1e-9)
        self.logger.record("time/fps", int((self.num_timesteps - self._num_timesteps_at_start) / elapsed))
        self.logger.record("time/iterations", self.iteration)
        self.logger.record("time/time_elapsed", elapsed)
        self.logger.record("time/total_timesteps", self.num_timesteps)
        for part, (first, last) in zip(("collect", "train"), pairwise(marks), strict=False):
            self.logger.record(f"time/{part}_seconds", last - first)
        self.last_metrics = {key: value for key, value in self.logger.name_to_value.items() if value is not None}

    def dump_logs(self) -> None:
        """Write what has been logged, and how far training is, within an iteration too; for SB3's callbacks."""
        self._record()
        self.logger.dump(self.num_timesteps)

    # Acting ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, observations: Tensor, deterministic: bool = False, noise: Tensor | None = None) -> Tensor:
        """Choose actions [n, *A] as the environment takes them, for observations [n, *O]; `predict` on tensors.

        Args:
            observations: on any device; actions come back on the same.
            deterministic: the most probable action in place of a sampled one.
            noise: [n, *noise_shape] to sample with; None draws from torch's global generator.
        """
        noise = None if noise is None else noise.to(self.device)
        actions = self.policy.choose(observations.to(self.device), deterministic, noise)
        return self.policy.to_environment(actions).to(observations.device)

    def set_parameters(
        self, load_path_or_dict: Any, exact_match: bool = True, device: torch.device | str = "auto"
    ) -> None:
        """Load the policy's parameters from a checkpoint of ours, or from {"policy": state_dict}."""
        if not isinstance(load_path_or_dict, dict):
            _, tensors = checkpoint.read_agent(load_path_or_dict)
            load_path_or_dict = {"policy": named_as_in(self.policy, with_prefix(tensors, "policy."))}
        super().set_parameters(load_path_or_dict, exact_match, device)
        if self.env is not None:
            self.collector.follow(self.policy)

    @classmethod
    def _as_view(cls, env: Any, config: CommonConfig, wanted: int | None) -> SB3View:
        """View env as agents train on it; its autoreset, spaces and (if given) number of them are checked."""
        if isinstance(env, str):
            env = make_vec(env, config.num_envs, autoreset=cls.autoreset)
        copies = 1 if cls.autoreset is AutoresetMode.SAME_STEP else config.num_envs
        view = view_of(env, cls.autoreset, copies, wanted, cls.__name__)
        Head.of(view.action_space)
        return view
