"""How policies adapt: returns after 0, 1, ... updates on tasks of a family, of several policies side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from tyro.conf import Positional, UseAppendAction, arg

from agents import checkpoint, load
from agents.adaptation.task_policies import InnerConfig, TaskPolicies
from agents.base import Agent
from agents.noise import action_noise
from agents.policy.actor_critic import ActorPolicy
from agents.policy.networks import parameter_vector
from agents.rollout.buffer import Rollout, buffer_fields
from agents.rollout.collector import collect
from agents.run import report
from agents.run.assessment import versions
from agents.run.errors import UsageError
from agents.run.folder import checkpoint_file
from agents.run.options import Flag, check_least
from agents.run.outputs import PLOTS, check_output
from envs import make_vec
from envs.mujoco import FAMILIES
from envs.vector import TaskVectorEnv

LATER = 0.5
"""Factor on the inner step size after the first update, as in Finn et al. 2017, appendix A.2."""
INNER = ("inner_lr", "gamma", "gae_lambda", "normalize_advantage")
"""The hyperparameters that an update takes from a run's; others have InnerConfig's defaults."""
KINDS_OF_TASKS = ("split", "num_tasks", "redraw", "observe_task")
"""What a run says of its tasks, which are others here."""


@dataclass(frozen=True)
class Adaptation:
    """Returns on a family's tasks after 0 to --updates updates of each task's own policy, beside a policy that nobody
    trained. The update is the run's inner step, halved after the first.
    """

    target: Positional[Annotated[str, arg(metavar="RUN_OR_FILE")]]
    """A run's folder (its last checkpoint is taken) or a checkpoint file."""
    updates: int = 3
    """Updates of each task's policy."""
    tasks: int = 40
    """Number of tasks."""
    rollouts: int = 20
    """Episodes per task and update, from which the next update is computed; actions are sampled."""
    split: Literal["held_out", "train"] = "held_out"
    """Which of the family's tasks."""
    beside: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="RUN_OR_FILE")] = ()
    """Another run on the same family, such as joint pretraining, whose policy is adapted alike. One that observes the
    task (--env-kwargs observe_task=true) is an oracle and not adapted. May be given again."""
    best: Flag = False
    """Of a run's folder, take the checkpoint of the best evaluation."""
    seed: int = 1000
    """Seed of episodes and actions, and of the untrained policy."""
    json: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write settings, versions and every task's returns to this new file."""
    plot: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Draw returns over updates to this new file, whose name ends in .png, .pdf or .svg."""
    threads: int = 1
    """Threads of PyTorch on the CPU; more compete with the threads of the physics."""
    debug: Flag = False
    """Show the traceback of an error."""

    def check(self) -> None:
        """Raise UsageError for a value that is not possible, and for an output that exists."""
        check_least(self, {"updates": 0, "tasks": 1, "rollouts": 2, "seed": 0, "threads": 1})
        for option, endings in {"json": (), "plot": PLOTS}.items():
            check_output(f"--{option}", getattr(self, option), endings)


@dataclass
class AdaptingPolicy:
    """A row of the comparison."""

    name: str
    agent: Agent
    updates: int
    file: Path | None = None
    returns: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    """Mean returns of each task after 0 to updates inner steps, [updates + 1, M]."""

    def record(self) -> dict[str, Any]:
        """Return what a JSON file keeps of it."""
        return {
            "checkpoint": None if self.file is None else str(self.file),
            "sha256": None if self.file is None else hashlib.sha256(self.file.read_bytes()).hexdigest(),
            "num_timesteps": self.agent.num_timesteps,
            **report.adaptation_statistics(self.returns),
            "returns": self.returns.tolist(),
        }


def adapt(asked: Adaptation, command: str) -> int:
    """Adapt the policy and those beside it, and show returns after each update; returns the exit code.

    Raises:
        UsageError: an option is not possible, or the run is on no family of tasks.
        RunError, CheckpointError: there is no such run or checkpoint.
    """
    asked.check()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(asked.seed)  # sampled actions draw from it
    file = checkpoint_file(asked.target, asked.best)
    tasks, policies = compare(
        file,
        [checkpoint_file(name, asked.best) for name in asked.beside],
        updates=asked.updates,
        tasks=asked.tasks,
        rollouts=asked.rollouts,
        split=asked.split,
        seed=asked.seed,
    )
    manifest = checkpoint.read_manifest(file)
    rows = {one.name: one.returns for one in policies}
    console = Console(highlight=False, markup=False)
    where = "held-out tasks" if asked.split == "held_out" else "training tasks"
    title = f"{manifest['env_id']}: {asked.tasks} {where}, {asked.rollouts} episodes each, sampled actions"
    console.print(title, style="bold", soft_wrap=True)
    console.print(report.adaptation_table(rows))
    console.print("mean return after so many updates, and its 95 % bootstrap interval over tasks", soft_wrap=True)
    if asked.json:
        record = {
            "env_id": manifest["env_id"],
            "env_kwargs": manifest["env_kwargs"],
            "split": asked.split,
            "rollouts": asked.rollouts,
            "seed": asked.seed,
            "tasks": tasks.tolist(),
            "config": manifest["config"],
            "policies": {one.name: one.record() for one in policies},
            "versions": versions(manifest),
        }
        Path(asked.json).write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"returns     {asked.json}", soft_wrap=True)
    if asked.plot:
        report.plot_adaptation(rows, Path(asked.plot), title)
        console.print(f"plot        {asked.plot}", soft_wrap=True)
    return 0


def compare(
    file: Path, others: list[Path], *, updates: int, tasks: int, rollouts: int, split: str, seed: int
) -> tuple[np.ndarray, list[AdaptingPolicy]]:
    """Adapt a run's policy, those of other runs and one that nobody trained.

    Args:
        file: the run's checkpoint.
        others: checkpoints of runs on the same family. One that observes the task is an oracle and not adapted.
        updates: inner steps of the run, or of the other where it has its own.
        tasks: M.
        rollouts: episodes per task and update.
        split: which of the family's tasks: "held_out" or "train".
        seed: of episodes and actions, and of the untrained policy.

    Returns:
        The tasks [M, G], and the policies with their returns.

    Raises:
        UsageError: the run is on no family, the family has no held-out tasks, or another run is on another family.
    """
    agent, manifest = load(file, device="cpu"), checkpoint.read_manifest(file)
    env_id, config = manifest["env_id"], manifest["config"]
    kwargs = {name: value for name, value in manifest["env_kwargs"].items() if name not in KINDS_OF_TASKS}
    policies = [AdaptingPolicy(f"{manifest['algorithm']}, {manifest['num_timesteps']:,} steps", agent, updates, file)]
    for other in others:
        beside, (name, adapts) = load(other, device="cpu"), _kind(other, env_id)
        same = sum(one.name.startswith(name) for one in policies)
        name = f"{name} ({same + 1})" if same else name
        policies.append(AdaptingPolicy(name, beside, updates if adapts else 0, other))
    policies.append(AdaptingPolicy("random initialization", _untrained(agent, seed), updates))

    with contextlib.closing(_family(env_id, tasks * rollouts, split, kwargs)) as env:
        drawn = env.draw_tasks(range(tasks))
        for one in policies:
            # A run that says nothing of inner steps takes this run's.
            own = dataclasses.asdict(one.agent.config) if hasattr(one.agent.config, "inner_lr") else config
            if one.agent.observation_space.shape == env.single_observation_space.shape:
                one.returns = adapted_returns(one.agent.policy, own, env, drawn, one.updates, seed)
                continue
            seeing = _family(env_id, tasks * rollouts, split, {**kwargs, "observe_task": True})
            with contextlib.closing(seeing):
                one.returns = adapted_returns(one.agent.policy, own, seeing, drawn, one.updates, seed)
    return drawn, policies


def adapted_returns(
    policy: ActorPolicy,
    config: Mapping[str, Any],
    env: TaskVectorEnv,
    tasks: np.ndarray,
    updates: int,
    seed: int,
) -> np.ndarray:
    """Return each task's mean returns after 0 to updates inner steps, [updates + 1, M].

    Args:
        policy: what every task's policy begins as; it is not changed.
        config: the inner step's hyperparameters, under InnerConfig's names; what is missing has its default.
        env: M * R environments.
        tasks: [M, G].
        seed: fixes episodes and actions.
    """
    known = {name: value for name, value in config.items() if name in INNER}
    task_policies = TaskPolicies.of(policy, InnerConfig.of({**known, "inner_lr_later": LATER}))
    M, N, T = len(tasks), env.num_envs, env.max_episode_steps
    rollout = Rollout(T, N, buffer_fields(policy))
    env.set_tasks(np.repeat(tasks, N // M, axis=0))

    @torch.no_grad()
    def roll_out(update: int, theta: Tensor) -> Rollout:
        observations = env.reset(seed=seed + update * N)[0]
        sample, draws = task_policies.sampler(theta), action_noise(policy, seed, update, T, N)

        def act(t: int, s: Tensor) -> tuple[Tensor, Tensor]:
            actions = sample(s, draws[t])
            return actions, policy.to_environment(actions)

        collect(env, act, rollout, observations)
        return rollout

    theta = parameter_vector(policy.actor).expand(M, -1)
    rollouts = task_policies.adapt(roll_out, theta, updates, after=1).batches
    return np.stack([data.returns.mean(1).numpy() for data in rollouts])


def _kind(file: Path, env_id: str) -> tuple[str, bool]:
    """Name a run that is shown beside one on env_id, and say whether its policy is adapted."""
    manifest = checkpoint.read_manifest(file)
    if manifest["env_id"] != env_id:
        raise UsageError(f"--beside {file} was trained on {manifest['env_id']}, not on {env_id}.")
    oracle = manifest["env_kwargs"].get("observe_task", False)
    kind = "oracle" if oracle else "joint training" if manifest["env_kwargs"].get("redraw") else "beside"
    return f"{kind}: {manifest['algorithm']}, {manifest['num_timesteps']:,} steps", not oracle


def _family(env_id: str | None, num_envs: int, split: str, kwargs: dict[str, Any]) -> TaskVectorEnv:
    if env_id not in FAMILIES:
        raise UsageError(f"adapt needs a run on a family of tasks, such as families/Point-v0; this one is on {env_id}.")
    try:
        env = make_vec(env_id, num_envs, split=split, **kwargs)
    except ValueError as error:
        raise UsageError(str(error).replace("ask for split='train'", "give --split train")) from error
    assert isinstance(env, TaskVectorEnv)
    return env


def _untrained(agent: Agent, seed: int) -> Agent:
    """Make an agent as before its training; it keeps the observation statistics of the trained one."""
    fresh = type(agent).__new__(type(agent))
    fresh.__dict__.update(agent.__dict__)
    fresh.num_timesteps = 0
    torch.manual_seed(seed)
    fresh.policy = agent.new_policy()
    fresh.policy.normalizer.load_state_dict(agent.policy.normalizer.state_dict())
    return fresh
