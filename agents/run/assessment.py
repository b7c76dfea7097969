"""Evaluating a saved agent: the table, the JSON, the plot and the video."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.console import Console
from tyro.conf import Positional, UseAppendAction, arg

from agents import Agent, checkpoint, load
from agents.run import report
from agents.run.errors import RunError, UsageError
from agents.run.evaluation import BLOCK, Evaluation, evaluate
from agents.run.folder import RunFolder
from agents.run.options import Flag, check_device, check_import, check_least, parsed_pairs
from agents.run.video import Film
from envs import VectorEnv, make_vec

PLOTS = (".png", ".pdf", ".svg")
"""What figures may be."""


@dataclass(frozen=True)
class Assessment:
    """Run whole episodes with a trained agent, one for each seed, and say what it is worth."""

    target: Positional[Annotated[str, arg(metavar="RUN_OR_FILE")]]
    """A run's folder (its last checkpoint is taken) or a checkpoint file."""
    episodes: int = 100
    """Number of episodes."""
    seed: int = 1000
    """Seed of the first episode; the others follow."""
    best: Flag = False
    """Of a run's folder, take the checkpoint of the best evaluation."""
    stochastic: Flag = False
    """Sample actions, as in training; otherwise the most likely action is taken."""
    json: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write settings, versions and every episode's return to this new file."""
    plot: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Draw the distribution of returns to this new file, whose name ends in .png, .pdf or .svg."""
    video: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Film one more episode, in Gymnasium's own environment, to this new file, whose name ends in .mp4."""
    env: Annotated[str | None, arg(metavar="ID", help_behavior_hint="(default: the agent's own)")] = None
    """Environment to evaluate in."""
    env_kwargs: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY=VALUE")] = ()
    """Argument of the environment, in place of the agent's own. May be given again."""
    backend: Literal["auto", "mujoco", "gymnasium"] = "auto"
    """Physics: mujoco is the batched one, gymnasium runs any registered environment."""
    device: str = "auto"
    """Where networks live: auto, cpu, cuda or cuda:1; auto takes the GPU if there is one."""
    threads: int = 1
    """Threads of PyTorch on the CPU; more compete with the threads of the physics."""
    allow_import: Flag = False
    """Import the module that the agent's own environment names (module:Id-v0); it runs code, so trust it first."""
    debug: Flag = False
    """Show the traceback of an error."""

    def check(self) -> None:
        """Raise UsageError for a value that is not possible, and for an output that exists."""
        check_least(self, {"episodes": 1, "seed": 0, "threads": 1})
        check_device(self.device)
        for option, endings in {"json": (), "plot": PLOTS, "video": (".mp4",)}.items():
            check_output(option, getattr(self, option), endings)


def assess(asked: Assessment, command: str) -> int:
    """Evaluate as asked and print the table; returns the exit code.

    Raises:
        UsageError: an option is not possible.
        RunError, CheckpointError: there is no such run or checkpoint.
    """
    asked.check()
    if asked.video and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    torch.set_num_threads(asked.threads)
    torch.manual_seed(asked.seed)  # sampled actions draw from it
    file = checkpoint_file(asked.target, asked.best)
    manifest, _ = checkpoint.read_agent(file)
    _assess_episodes(asked, file, manifest)
    return 0


def _assess_episodes(asked: Assessment, file: Path, manifest: dict[str, Any]) -> None:
    """Run whole episodes and show their returns."""
    agent = load(file, device=asked.device)
    own = manifest["env_kwargs"] if asked.env in (None, manifest["env_id"]) else {}
    env_id, env_kwargs = asked.env or manifest["env_id"], own | parsed_pairs(asked.env_kwargs)
    if env_id is None:
        raise RunError(f"{file} does not name its environment, which had no id; give one with --env.")
    check_import(file, "" if asked.env else env_id, own, asked.allow_import)  # what was typed is trusted
    with contextlib.ExitStack() as stack:
        film = asked.video and stack.enter_context(Film(env_id, env_kwargs, asked.seed, Path(asked.video)))
        env = _environments(asked, env_id, env_kwargs, agent)
        stack.enter_context(contextlib.closing(env))
        evaluation = evaluate(agent, env, asked.episodes, asked.seed, deterministic=not asked.stochastic)
        console = Console(highlight=False, markup=False)
        actions = "sampled actions" if asked.stochastic else "deterministic actions"
        title = f"{manifest['algorithm']} on {env_id} after {manifest['num_timesteps']:,} environment steps, {actions}"
        console.print(title, style="bold", soft_wrap=True)
        console.print(report.evaluation_table(evaluation))
        if asked.json:
            record = _record(asked, file, manifest | {"env_id": env_id, "env_kwargs": env_kwargs}, evaluation)
            Path(asked.json).write_text(json.dumps(record, indent=1) + "\n")
            console.print(f"returns     {asked.json}", soft_wrap=True)
        if asked.plot:
            report.plot_returns(evaluation, Path(asked.plot), title)
            console.print(f"plot        {asked.plot}", soft_wrap=True)
        if film:
            filmed = film.shoot(agent, not asked.stochastic)
            console.print(f"video       {asked.video} (return {filmed:,.1f})", soft_wrap=True)


def _environments(asked: Assessment, env_id: str, env_kwargs: dict[str, Any], agent: Agent) -> VectorEnv:
    """Make the environments of an evaluation, of the spaces that the agent knows."""
    num_envs = min(BLOCK, asked.episodes)
    env = make_vec(env_id, num_envs, backend=asked.backend, autoreset="disabled", **env_kwargs)
    for name in ("observation_space", "action_space"):
        own, theirs = getattr(agent, name), getattr(env, f"single_{name}")
        if own != theirs:
            raise UsageError(f"--env is {env_id!r}, whose {name} is {theirs}; the agent's is {own}.")
    return env


def check_output(option: str, name: str | None, endings: tuple[str, ...]) -> None:
    """Raise UsageError for a file that --option cannot write: of another ending, there already, or without a folder."""
    if name is None:
        return
    if endings and Path(name).suffix.lower() not in endings:
        raise UsageError(f"--{option} is {name}; give a name that ends in {' or '.join(endings)}.")
    if Path(name).exists():
        raise UsageError(f"--{option} is {name}, which exists and is not overwritten; remove it or name another file.")
    if not Path(name).absolute().parent.is_dir():
        raise UsageError(f"--{option} is {name}; there is no folder {Path(name).parent}, make it first.")


def checkpoint_file(name: str, best: bool) -> Path:
    """Find the checkpoint that a run's folder or a file's name means."""
    target = Path(name)
    if not target.is_dir():
        if best:
            raise UsageError(f"--best needs a run's folder; {target} is none.")
        return checkpoint.find(target)
    folder = RunFolder.open(target)
    return folder.best if best else folder.last


def _record(asked: Assessment, file: Path, manifest: dict[str, Any], evaluation: Evaluation) -> dict[str, Any]:
    kept = ("algorithm", "env_id", "env_kwargs", "num_timesteps", "config")
    return {
        "checkpoint": str(file),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        **{key: manifest[key] for key in kept},
        "deterministic": not asked.stochastic,
        "backend": asked.backend,
        "seed": evaluation.seed,
        "episodes": evaluation.episodes,
        "mean": evaluation.mean,
        "iqm": evaluation.iqm,
        "interval": evaluation.interval,
        "returns": evaluation.returns.tolist(),
        "lengths": evaluation.lengths.tolist(),
        "versions": versions(manifest),
    }


def versions(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the versions of packages that the agent was trained and is evaluated with."""
    return {"training": manifest["versions"], "evaluation": checkpoint.versions()}
