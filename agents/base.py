"""What every agent shares: the Stable-Baselines3 interface around our own loop, collection, buffer and checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Self

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import check_for_correct_spaces, get_system_info
from torch import Tensor

from agents import checkpoint, saving
from agents.config import CommonConfig, near, preset_values
from agents.policy.actor_critic import ActorCriticPolicy
from agents.policy.distributions import Head
from agents.rollout.advantages import gae, next_values
from agents.rollout.buffer import FieldSpec, RolloutBuffer
from agents.rollout.collect import Step, action_noise, buffer_fields, collect
from agents.rollout.threads import single_thread
from envs import make_vec
from envs.sb3 import LazyInfos, SB3View, as_vector
from envs.vector import EpisodeStatistics, VectorEnv


class Agent(BaseAlgorithm):
    """A Stable-Baselines3 algorithm with its own training loop.

    learn, callbacks, the logger, predict, evaluate_policy and EvalCallback work as in Stable-Baselines3.
    Hyperparameters are the fields of `Config`, given as keyword arguments. An iteration collects n_steps from every
    environment and then calls `train`, which an algorithm defines.

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

    name: ClassVar[str]
    has_critic: ClassVar[bool] = True
    """Whether policy.critic is learned."""
    Config: ClassVar[type[CommonConfig]] = CommonConfig
    dashboard: ClassVar[dict[str, dict[str, list[str]]]] = {}
    """Group -> chart -> the curves that it shows together, for TensorBoard's page of custom scalars."""
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": ActorCriticPolicy}
    """The first is what train.py takes unless told otherwise."""
    autoreset: ClassVar[AutoresetMode] = AutoresetMode.SAME_STEP
    """What its environments do with those that end."""

    config: CommonConfig
    policy: Any
    env: SB3View | None
    buffer: RolloutBuffer

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = [p for p in inspect.signature(Agent.__init__).parameters.values() if p.kind is not p.VAR_KEYWORD]
        cls.__signature__ = inspect.Signature(own[1:] + cls.Config.parameters())  # type: ignore[attr-defined]

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
        policy_kwargs = dict(policy_kwargs or {})
        if isinstance(policy, str) and policy not in self.policy_aliases:
            raise ValueError(f"There is no policy {policy!r}{near(policy, list(self.policy_aliases))}")
        policy_class: Any = self.policy_aliases[policy] if isinstance(policy, str) else policy
        options = self._policy_options(policy_class)
        for unknown in policy_kwargs.keys() - set(options):
            raise ValueError(f"policy_kwargs has no {unknown!r}{near(unknown, options)}")
        if seed is not None and seed < 0:
            raise ValueError(f"seed is {seed}; give 0 or more.")
        config = self.Config.of(hyperparameters)
        if env is not None:
            env = self._as_view(env, config, wanted=hyperparameters.get("num_envs"))
            config = dataclasses.replace(config, num_envs=env.num_envs)
        super().__init__(
            policy,
            env,
            learning_rate=0.0,  # SB3's one schedule; our algorithms name their own step sizes
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            support_multi_env=True,
            monitor_wrapper=False,
            seed=seed,
        )
        self.config = config
        self.iteration = 0
        self.stop_reason: str | None = None
        self.last_metrics: dict[str, float] = {}
        self.stream_seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        self.observations: Tensor | None = None
        if env is not None:
            self._setup_model()

    @classmethod
    def preset(cls, env_id: str) -> CommonConfig:
        """The defaults with this algorithm's tuned values for an environment."""
        return cls.Config.of(preset_values(cls.name, env_id))

    @classmethod
    def _policy_options(cls, policy_class: Any) -> list[str]:
        """The policy's keyword arguments that this algorithm has; without a critic there is none for one."""
        return [name for name in policy_class.options if name in cls.Config.names()]

    @property
    def episode_returns(self) -> list[float]:
        """Undiscounted returns of the last training episodes."""
        return [episode["r"] for episode in self.ep_info_buffer or ()]

    @property
    def episode_lengths(self) -> list[int]:
        """Lengths of the last training episodes, in environment steps."""
        return [episode["l"] for episode in self.ep_info_buffer or ()]

    # Set-up ----------------------------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        self.set_random_seed(self.seed)
        self.policy = self.new_policy().to(self.device)
        if self.env is not None:
            self._connect(self.env)

    def _connect(self, env: SB3View) -> None:
        """Make what depends on the environments: the acting policy, the buffer, the episode statistics."""
        vector = env.vector
        same_device = vector.device.type == self.device.type
        self._acting = self.policy if same_device else copy.deepcopy(self.policy).to(vector.device)
        fields = self._buffer_fields()
        pin = self.device.type == "cuda" and not same_device
        self.buffer = RolloutBuffer(self.config.n_steps, vector.num_envs, fields, vector.device, pin_memory=pin)
        self.running_episodes = EpisodeStatistics(vector.num_envs, vector.device)

    def new_policy(self) -> Any:
        """A policy as before training, drawn from PyTorch's global stream; the agent keeps its own."""
        policy_class: Any = self.policy_class
        settings = {name: getattr(self.config, name) for name in self._policy_options(policy_class)}
        return policy_class(self.observation_space, self.action_space, **(settings | self.policy_kwargs))

    def _buffer_fields(self) -> dict[str, FieldSpec]:
        """What the algorithm keeps of each step."""
        return buffer_fields(self.policy)

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> SB3View:
        return env if isinstance(env, SB3View) else SB3View(as_vector(env))

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """Train on other environments of the same spaces from now on; they may be another number of them."""
        view = self._as_view(env, self.config, wanted=None)
        check_for_correct_spaces(view, self.observation_space, self.action_space)
        self._connect(view)  # first: an algorithm may refuse that number of environments
        self.env, self.n_envs = view, view.num_envs
        self.config = dataclasses.replace(self.config, num_envs=view.num_envs)
        if force_reset:
            self._last_obs = self.observations = None

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
        if reset_num_timesteps:
            self.iteration = 0
        begins = reset_num_timesteps or self.observations is None
        result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        if begins:
            self._begin_episodes(self.env.vector)
        return result

    def _begin_episodes(self, vector: VectorEnv) -> None:
        """Forget the episodes that ran; all environments have just been reset."""
        self.observations = torch.as_tensor(self._last_obs, device=vector.device)
        self.running_episodes = EpisodeStatistics(self.n_envs, vector.device)

    # Learning --------------------------------------------------------------------------------------------------------

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
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
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Iterator[int]:
        """`learn`, one iteration at a time: yields the number of finished iterations. It is safe to stop at any."""
        total, listener = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name or type(self).__name__, progress_bar
        )
        listens = callback is not None or progress_bar
        listener.on_training_start(locals(), globals())
        try:
            while self.num_timesteps < total:
                started = time.perf_counter()
                with single_thread():
                    filled = self._collect(listener, listens, total)
                if not filled:
                    break
                collected = time.perf_counter()
                self._update_current_progress_remaining(self.num_timesteps, total)
                self.train()
                if self._acting is not self.policy:
                    self._acting.load_state_dict(self.policy.state_dict())
                self.iteration += 1
                self._record(collected - started, time.perf_counter() - collected)
                if self.iteration % log_interval == 0:
                    self.logger.dump(self.num_timesteps)
                yield self.iteration
                if self.stop_reason is not None:
                    raise FloatingPointError(self.stop_reason)
        finally:
            listener.on_training_end()

    @abstractmethod
    def train(self) -> None:
        """One update from the full buffer. If it sets stop_reason, a sentence, training ends after this iteration."""

    @torch.no_grad()
    def _advantages(self, batch: RolloutBuffer, s: Tensor, gae_lambda: float) -> tuple[Tensor, Tensor]:
        """Advantages and value targets of the rollout, [n] each.

        Args:
            batch: the rollout, where the policy trains.
            s: its observations as the critic takes them, [n, O].
            gae_lambda: λ of generalized advantage estimation.
        """
        policy = self.policy
        values = policy.critic(s).view(batch.n_steps, batch.num_envs)
        assert self.observations is not None
        last = policy.critic(policy.normalize(self.observations.to(self.device)))
        steps, ids, observations = batch.final_observations()
        final = policy.critic(policy.normalize(observations))
        A, returns = gae(
            batch["rewards"],
            values,
            next_values(values, last, (steps, ids, final)),
            batch["terminated"],
            batch["truncated"],
            self.config.gamma,
            gae_lambda,
        )
        return A.flatten(), returns.flatten()

    def _collect(self, listener: BaseCallback, listens: bool, total_timesteps: int) -> bool:
        """Fill the buffer; False if a callback asked to stop."""
        return self._fill(self._acting.sampler(), self.iteration, listener, listens, total_timesteps)

    def _fill(
        self,
        sample: Callable[[Tensor, Tensor], Tensor],
        counter: int,
        listener: BaseCallback,
        listens: bool,
        total_timesteps: int,
    ) -> bool:
        """Fill the buffer with actions of a policy; False if a callback asked to stop.

        Args:
            sample: the policy, from observations [N, *O] and noise [N, *noise_shape] to actions [N, *A].
            counter: which of the run's rollouts this is, which decides its noise.
        """
        assert self.env is not None
        assert self.observations is not None
        block = action_noise(self.policy, self.stream_seed, counter, self.config.n_steps, self.n_envs)
        block = block.to(self.env.vector.device)

        def act(t: int, observations: Tensor) -> tuple[Tensor, Tensor]:
            actions = sample(observations, block[t])
            return actions, self._acting.to_environment(actions)

        listener.on_rollout_start()
        on_step = self._on_step(listener, total_timesteps) if listens else None
        # Callbacks, where there are any, see ordinary tensors.
        with torch.no_grad() if listens else torch.inference_mode():
            observations = collect(self.env.vector, act, self.buffer, self.observations, on_step)
        # An ordinary tensor too, and one that the next step does not overwrite.
        self.observations = None if observations is None else observations.clone()
        if self.observations is None:
            return False
        if not listens:
            self._count_rollout()
        listener.on_rollout_end()
        return True

    def _count_rollout(self) -> None:
        """Count the steps and episodes of the whole buffer at once, where nobody listens to single steps."""
        ended = self.buffer["terminated"] | self.buffer["truncated"]
        stepped = self.buffer["stepped"] if "stepped" in self.buffer.specs else None
        self.num_timesteps += ended.numel() if stepped is None else int(stepped.sum())
        self._finish_episodes(*self.running_episodes.update_rollout(self.buffer["rewards"], ended, stepped))

    def _on_step(self, listener: BaseCallback, total_timesteps: int) -> Callable[[Step], bool]:
        """What counts a step and shows it to the callbacks, for `collect`."""

        def on_step(step: Step) -> bool:
            self.num_timesteps += self.n_envs if step.ids is None else len(step.ids)
            ended = step.terminated | step.truncated
            finished = self.running_episodes.update(step.rewards, ended, step.ids)
            episodes: dict[int, dict[str, Any]] = {}
            if finished is not None:
                episodes = dict(zip(ended.nonzero()[:, 0].tolist(), self._finish_episodes(*finished), strict=True))
            return self._tell(listener, step, ended, episodes, total_timesteps)

        return on_step

    def _finish_episodes(self, returns: Tensor, lengths: Tensor) -> list[dict[str, Any]]:
        """Keep the statistics of the episodes that ended, [k] each; returns them as SB3's infos do."""
        assert self.ep_info_buffer is not None
        seconds = (time.time_ns() - self.start_time) * 1e-9
        rows = zip(returns.tolist(), lengths.tolist(), strict=True)
        episodes = [{"r": episode_return, "l": length, "t": seconds} for episode_return, length in rows]
        self._episode_num += len(episodes)
        self.ep_info_buffer.extend(episodes)
        return episodes

    def _tell(
        self, listener: BaseCallback, step: Step, ended: Tensor, episodes: dict[int, dict[str, Any]], total: int
    ) -> bool:
        """Show a step to the callbacks, under the names that SB3 uses; False if one asks to stop."""
        # Without autoreset, the observations of a step are the last ones of episodes that ended in it.
        final = step.info.get("final_obs") if step.ids is None else step.observations
        rows: list[int] | None = None
        if step.ids is not None:
            row_of = {i: row for row, i in enumerate(step.ids.tolist())}
            rows = [row_of.get(i, -1) for i in range(self.n_envs)]
        dones = ended.cpu().numpy()
        timed_out = (step.truncated & ~step.terminated).cpu().numpy()
        listener.update_locals(
            {
                "self": self,
                "total_timesteps": total,
                "n_steps": step.t + 1,
                "actions": step.actions.cpu().numpy(),
                "new_obs": step.observations.cpu().numpy(),
                "rewards": step.rewards.cpu().numpy(),
                "dones": dones,
                "infos": LazyInfos(
                    step.info, dones, timed_out, None if final is None else final.cpu().numpy(), episodes, rows
                ),
            }
        )
        return listener.on_step()

    def _record(self, collect_seconds: float, train_seconds: float) -> None:
        assert self.env is not None
        if self.ep_info_buffer:
            self.logger.record("rollout/ep_rew_mean", float(np.mean(self.episode_returns)))
            self.logger.record("rollout/ep_len_mean", float(np.mean(self.episode_lengths)))
        self.logger.record("rollout/diverged_simulations", self.env.vector.blowups)
        elapsed = max((time.time_ns() - self.start_time) * 1e-9, 1e-9)
        self.logger.record("time/fps", int((self.num_timesteps - self._num_timesteps_at_start) / elapsed))
        self.logger.record("time/iterations", self.iteration)
        self.logger.record("time/time_elapsed", elapsed)
        self.logger.record("time/total_timesteps", self.num_timesteps)
        self.logger.record("time/collect_seconds", collect_seconds)
        self.logger.record("time/train_seconds", train_seconds)
        self.last_metrics = {key: value for key, value in self.logger.name_to_value.items() if value is not None}

    # Acting ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, observations: Tensor, deterministic: bool = False, noise: Tensor | None = None) -> Tensor:
        """Actions [n, *A] as the environment takes them, for observations [n, *O]; `predict` on tensors.

        Args:
            observations: on any device; actions come back on the same.
            deterministic: the most probable action in place of a sampled one.
            noise: [n, *noise_shape] to sample with; None draws from torch's global generator.
        """
        noise = None if noise is None else noise.to(self.device)
        actions = self.policy.choose(observations.to(self.device), deterministic, noise)
        return self.policy.to_environment(actions).to(observations.device)

    # Saving ----------------------------------------------------------------------------------------------------------

    def own_tensors(self) -> dict[str, Tensor]:
        """What an exact resume needs beside policy and environments; an algorithm that has more says so here."""
        return {}

    def load_own_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `own_tensors` gave."""

    def save(self, path: str | os.PathLike[str], exclude: Any = None, include: Any = None) -> None:  # type: ignore[override]
        """Write a checkpoint from which training goes on exactly; see `agents.checkpoint`.

        Differs from SB3: nothing is pickled, and there is nothing to exclude or include. Environments that cannot be
        put back exactly are left out: a resumed run begins new episodes in them.

        Raises:
            OSError: the file cannot be written; an earlier one is untouched.
        """
        checkpoint.write(saving.with_suffix(path), *saving.pack(self))

    @classmethod
    def load(  # type: ignore[override]
        cls,
        path: str | os.PathLike[str],
        env: Any = None,
        device: torch.device | str = "auto",
        custom_objects: Mapping[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = False,
        **hyperparameters: Any,
    ) -> Self:
        """The agent that `save` wrote.

        Args:
            path: the file.
            env: environments to go on training in, with the stored spaces; None for an agent that only predicts. If
                they are as many as were saved and can be put back, they are put into the stored state.
            device: where the policy trains.
            custom_objects: {"policy_class": class} for an agent that was made with a policy class of one's own.
            print_system_info: as in SB3.
            force_reset: begin new episodes. Differs from SB3, where that is the default.
            **hyperparameters: in place of the stored ones.

        Raises:
            CheckpointError: the file is missing, damaged, or another algorithm's.
            ValueError: env has other spaces.
        """
        if print_system_info:
            get_system_info()
        path = saving.with_suffix(path)
        manifest, tensors = checkpoint.read(path)
        if manifest["algorithm"] != cls.name:
            raise checkpoint.CheckpointError(
                f"{path} holds an agent of the algorithm {manifest['algorithm']!r}; load it with agents.load."
            )
        config = cls.Config.of(hyperparameters, base=cls.Config.of(manifest["config"]))
        agent = cls(
            (custom_objects or {}).get("policy_class") or saving.policy_class(cls, manifest),
            None,
            policy_kwargs=manifest["policy_kwargs"],
            seed=manifest["seed"],
            device=device,
            stats_window_size=manifest["stats_window_size"],
            **dataclasses.asdict(config),
        )
        saving.unpack(agent, manifest, tensors)
        if env is not None:
            agent.set_env(env)
            if not force_reset:
                saving.restore_environments(agent, manifest, tensors)
        return agent

    def set_parameters(
        self, load_path_or_dict: Any, exact_match: bool = True, device: torch.device | str = "auto"
    ) -> None:
        """Load the policy's parameters from a checkpoint of ours, or from {"policy": state_dict}."""
        if not isinstance(load_path_or_dict, dict):
            _, tensors = checkpoint.read(load_path_or_dict)
            load_path_or_dict = {"policy": saving.with_prefix(tensors, "policy.")}
        super().set_parameters(load_path_or_dict, exact_match, device)
        if self.env is not None and self._acting is not self.policy:
            self._acting.load_state_dict(self.policy.state_dict())

    @classmethod
    def _as_view(cls, env: Any, config: CommonConfig, wanted: int | None) -> SB3View:
        """env as the view that agents train on; its autoreset, spaces and (if given) number of them are checked."""
        if isinstance(env, str):
            env = make_vec(env, config.num_envs, autoreset=cls.autoreset)
        elif wanted is not None and (n := as_vector(env).num_envs) != wanted:
            raise ValueError(
                f"num_envs is {wanted} but env holds {n}; leave num_envs out where you give an environment."
            )
        view = env if isinstance(env, SB3View) else SB3View(as_vector(env))
        vector: VectorEnv = view.vector
        if vector.autoreset is not cls.autoreset:
            mine, theirs = (mode.name.lower() for mode in (cls.autoreset, vector.autoreset))
            raise ValueError(
                f"env has autoreset {theirs!r}; {cls.__name__} trains with make_vec(..., autoreset={mine!r})."
            )
        if not isinstance(vector.single_observation_space, spaces.Box):
            raise ValueError(
                f"The observation space is {vector.single_observation_space}; agents take a Box: wrap the environment "
                "in gymnasium.wrappers.FlattenObservation."
            )
        Head.of(vector.single_action_space)
        return view
