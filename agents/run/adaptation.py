"""Evaluating how a policy adapts: returns after 0, 1, ... updates on tasks of a family, beside other policies'."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console

from agents import REGISTRY, checkpoint, load
from agents.adaptation.task_data import (
    InnerStep,
    first_returns,
    task_data,
    task_sampler,
)
from agents.base import Agent
from agents.policy.actor_critic import ActorCriticPolicy
from agents.policy.batched import BatchedActor
from agents.policy.networks import parameter_vector
from agents.rollout.buffer import Rollout
from agents.rollout.collector import action_noise, buffer_fields, collect
from agents.run import report
from agents.run.errors import UsageError
from envs import make_vec
from envs.mujoco import FAMILIES, FamilyVectorEnv

if TYPE_CHECKING:
    from agents.run.assessment import Assessment

LATER = 0.5
"""Factor on the inner step size after the first update, as in Finn et al. 2017, appendix A.2."""
BASELINE_ENVS = 64
INNER = ("inner_step", "inner_lr", "inner_optimizer", "inner_target_kl", "gamma", "gae_lambda", "normalize_advantage")
"""The hyperparameters that an update takes from a run's; others have MetaConfig's defaults."""


def adapted_returns(
    policy: ActorCriticPolicy,
    config: dict[str, Any],
    env: FamilyVectorEnv,
    tasks: np.ndarray,
    updates: int,
    seed: int,
) -> np.ndarray:
    """Mean returns of each task after 0 to updates inner steps, [updates + 1, M].

    Args:
        policy: what every task's policy begins as; it is not changed.
        config: the inner step's hyperparameters, under MetaConfig's names; what is missing has its default.
        env: M * R environments.
        tasks: [M, G].
        seed: fixes episodes and actions.
    """
    asked: Any = REGISTRY["fomaml"].Config.of({name: value for name, value in config.items() if name in INNER})
    actor, M, N, T = BatchedActor(policy.actor), len(tasks), env.num_envs, env.task.horizon
    optimizer = dataclasses.replace(asked.inner, later=LATER)
    step = InnerStep(actor, optimizer, asked.inner_step, target_kl=asked.inner_target_kl)
    theta = parameter_vector(policy.actor).expand(M, -1)
    state = optimizer.begin(theta)
    buffer = Rollout(T, N, buffer_fields(policy))
    env.set_tasks(np.repeat(tasks, N // M, axis=0))
    found = []
    for update in range(updates + 1):
        observations = env.reset(seed=seed + update * N)[0]
        sample, draws = task_sampler(policy, actor, theta), action_noise(policy, seed, update, T, N)

        def act(t: int, s: torch.Tensor, sample: Any = sample, draws: torch.Tensor = draws) -> Any:
            actions = sample(s, draws[t])
            return actions, policy.to_environment(actions)

        with torch.no_grad():
            collect(env, act, buffer, observations)
        found.append(first_returns(buffer).view(M, -1).mean(1).numpy())
        if update < updates:
            normalize = asked.normalize_advantage
            data = task_data(policy, actor, theta, buffer, asked.gamma, asked.gae_lambda, normalize=normalize)
            theta, _, state = step(theta, data, state, first=update == 0)
    return np.stack(found)


@dataclass
class _Policy:
    """A row of the table."""

    name: str
    agent: Agent
    updates: int
    file: Path | None = None
    returns: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    def record(self) -> dict[str, Any]:
        return {
            "checkpoint": None if self.file is None else str(self.file),
            "sha256": None if self.file is None else hashlib.sha256(self.file.read_bytes()).hexdigest(),
            "num_timesteps": self.agent.num_timesteps,
            **report.adaptation_statistics(self.returns),
            "returns": self.returns.tolist(),
        }


def assess_adaptation(asked: Assessment, file: Path, others: list[Path]) -> int:
    """Adapt the run's policy and those beside it, and print the table; returns the exit code.

    Raises:
        UsageError: the run is on no family, the family has no held-out tasks, or a run beside is on another family.
    """
    manifest, _ = checkpoint.read(file)
    assert asked.adapt is not None
    env_id, config = manifest["env_id"], manifest["config"]
    kwargs = {
        name: value
        for name, value in manifest["env_kwargs"].items()
        if name not in ("split", "num_tasks", "redraw", "observe_task")
    }
    agent = load(file, device="cpu")
    with contextlib.closing(_family(env_id, asked, kwargs)) as env:
        tasks = env.draw_tasks(range(asked.tasks))
        policies = [_Policy(f"{manifest['algorithm']}, {manifest['num_timesteps']:,} steps", agent, asked.adapt, file)]

        def add(kind: str, agent: Agent, updates: int, file: Path | None = None) -> None:
            name = f"{kind}: {agent.name}, {agent.num_timesteps:,} steps"
            same = sum(one.name.startswith(name) for one in policies)
            policies.append(_Policy(f"{name} ({same + 1})" if same else name, agent, updates, file))

        for other in others:
            theirs, _ = checkpoint.read(other)
            if theirs["env_id"] != env_id:
                raise UsageError(f"--beside {other} was trained on {theirs['env_id']}, not on {env_id}.")
            oracle = theirs["env_kwargs"].get("observe_task", False)
            kind = "oracle" if oracle else "joint training" if theirs["env_kwargs"].get("redraw") else "beside"
            add(kind, load(other, device="cpu"), 0 if oracle else asked.adapt, other)
        if asked.joint_steps:
            joint = _baseline(env_id, asked.joint_steps, kwargs, asked)
            add("joint training", joint, asked.adapt)
        if asked.oracle_steps:
            seeing = {**kwargs, "observe_task": True}
            oracle = _baseline(env_id, asked.oracle_steps, seeing, asked)
            add("oracle", oracle, 0)
        policies.append(_Policy("random initialization", _untrained(agent, asked.seed), asked.adapt))
        for one in policies:
            # A run that says nothing of inner steps takes this run's.
            own = dataclasses.asdict(one.agent.config) if hasattr(one.agent.config, "inner_lr") else config
            sees = one.agent.observation_space.shape != env.single_observation_space.shape
            world = _family(env_id, asked, {**kwargs, "observe_task": True}) if sees else env
            one.returns = adapted_returns(one.agent.policy, own, world, tasks, one.updates, asked.seed)
            if world is not env:
                world.close()
    rows = {one.name: one.returns for one in policies}
    console = Console(highlight=False, markup=False)
    where = "held-out tasks" if asked.split == "held_out" else "training tasks"
    title = f"{env_id}: {asked.tasks} {where}, {asked.rollouts} episodes each, sampled actions"
    console.print(title, style="bold", soft_wrap=True)
    console.print(report.adaptation_table(rows))
    console.print("mean return after so many updates, and its 95 % bootstrap interval over tasks", soft_wrap=True)
    if asked.json:
        Path(asked.json).write_text(json.dumps(_record(asked, manifest, tasks, policies), indent=1) + "\n")
        console.print(f"returns     {asked.json}", soft_wrap=True)
    if asked.plot:
        report.plot_adaptation(rows, Path(asked.plot), title)
        console.print(f"plot        {asked.plot}", soft_wrap=True)
    return 0


def _family(env_id: str | None, asked: Assessment, kwargs: dict[str, Any]) -> FamilyVectorEnv:
    if env_id not in FAMILIES:
        raise UsageError(
            f"--adapt needs a run on a family of tasks, such as families/Point-v0; this one is on {env_id}."
        )
    try:
        env = make_vec(env_id, asked.tasks * asked.rollouts, split=asked.split, **kwargs)
    except ValueError as error:
        raise UsageError(str(error).replace("ask for split='train'", "give --split train")) from error
    assert isinstance(env, FamilyVectorEnv)
    return env


def _baseline(env_id: str, steps: int, kwargs: dict[str, Any], asked: Assessment) -> Agent:
    """NPG, trained on new training tasks in every episode."""
    env = make_vec(env_id, BASELINE_ENVS, seed=asked.seed, redraw=True, **kwargs)
    with contextlib.closing(env):
        return REGISTRY["npg"]("MlpPolicy", env, seed=asked.seed, device="cpu").learn(steps)


def _untrained(agent: Agent, seed: int) -> Agent:
    """An agent of the same settings before its training; it keeps the observation statistics of the trained one."""
    fresh = type(agent).__new__(type(agent))
    fresh.__dict__.update(agent.__dict__)
    fresh.num_timesteps = 0
    torch.manual_seed(seed)
    fresh.policy = agent.new_policy()
    fresh.policy.normalizer.load_state_dict(agent.policy.normalizer.state_dict())
    return fresh


def _record(
    asked: Assessment,
    manifest: dict[str, Any],
    tasks: np.ndarray,
    policies: list[_Policy],
) -> dict[str, Any]:
    return {
        "env_id": manifest["env_id"],
        "env_kwargs": manifest["env_kwargs"],
        "split": asked.split,
        "rollouts": asked.rollouts,
        "seed": asked.seed,
        "tasks": tasks.tolist(),
        "config": manifest["config"],
        "policies": {one.name: one.record() for one in policies},
        "versions": {"training": manifest["versions"], "evaluation": checkpoint.versions()},
    }
