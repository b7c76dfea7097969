"""Evaluating a saved agent: the table, the JSON, the plot and the video."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.console import Console
from tyro.conf import Positional, UseAppendAction, arg

from agents import Agent, checkpoint, load
from agents.run import report
from agents.run.comparison import Compare, check_outputs, chosen, curve_of, expanded, show
from agents.run.errors import RunError, UsageError
from agents.run.evaluation import BLOCK, NEEDS_AN_END, Evaluation, evaluate, waiting
from agents.run.folder import RunFolder, checkpoint_file
from agents.run.options import Flag, check_device, check_import, check_least, parsed_pairs
from agents.run.outputs import check_output
from agents.run.runs import find
from agents.run.statistics import Scored
from agents.run.video import FILMS, Film
from envs import VectorEnv, make_vec


@dataclass(frozen=True)
class Assessment:
    """Run whole episodes with a trained agent, one for each seed, and say what it is worth."""

    targets: Positional[Annotated[tuple[str, ...], arg(metavar="RUN_OR_FILE")]]
    """A run's folder (its last checkpoint is taken) or a checkpoint file. Several of them, folders of runs and patterns
    such as 'runs/*/npg', are evaluated one by one and compared; NAME=RUN names a group."""
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
    csv: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write a row for each run to this new file."""
    compare: Compare = None
    """Names of two groups, or runs: end in one sentence that says which is the better one."""
    plot: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Draw the distribution of returns, or of several runs their comparison, to this new .png, .pdf or .svg."""
    video: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Film more episodes, in Gymnasium's own environment, to this new file, whose name ends in .mp4 or .gif."""
    video_episodes: int = 1
    """Episodes that --video shows side by side, with their returns."""
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
        check_least(self, {"episodes": 1, "seed": 0, "threads": 1, "video_episodes": 1})
        check_device(self.device)
        check_output("--video", self.video, FILMS)
        check_outputs(self)


def assess(asked: Assessment, command: str) -> int:
    """Evaluate as asked and print the table; returns the exit code.

    Raises:
        UsageError: an option is not possible.
        RunError, CheckpointError: there is no such run or checkpoint.
    """
    asked.check()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(asked.seed)  # sampled actions draw from it
    targets = asked.targets
    if len(targets) == 1 and not glob.glob(targets[0]) and not asked.compare and "=" not in targets[0]:
        saved = [Saved("", checkpoint_file(targets[0], asked.best))]
    else:
        saved = _saved(targets, asked.best)
    if len(saved) == 1 and not asked.compare and not asked.csv:
        _assess_one(asked, saved[0].file)
    elif asked.video:
        raise UsageError(f"--video films one run, and {len(saved)} are named; leave it out, or name one.")
    else:
        scored = chosen(
            _evaluated(asked, saved),
            asked.compare,
            lambda name: _evaluated(asked, _saved((f"{name}={name}",), asked.best)),
        )
        show(scored, asked, command)
    return 0


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is evaluated."""

    group: str
    """The name that it was given, or ""."""
    file: Path
    folder: RunFolder | None = None


def _saved(targets: Sequence[str], best: bool) -> list[Saved]:
    """Find the checkpoints of files, runs and folders of runs; runs without one are left out."""
    found: dict[Path, Saved] = {}
    for group, paths in expanded(targets):
        folders = [run.folder for run in find([path for path in paths if Path(path).is_dir()])]
        saved = [Saved(group, folder.best if best else folder.last, folder) for folder in reversed(folders)]
        saved += [Saved(group, checkpoint_file(path, best)) for path in paths if not Path(path).is_dir()]
        found |= {one.file.resolve(): one for one in saved if one.file.is_file()}
    if not found:
        raise RunError(f"There is no checkpoint in {' or '.join(targets)}.")
    return list(found.values())


def _evaluated(asked: Assessment, saved: Sequence[Saved]) -> list[Scored]:
    """Evaluate several checkpoints on the same episodes; learning curves are those of the runs."""
    scored = []
    with Console(highlight=False, markup=False).status("") as status:
        for number, one in enumerate(saved, 1):
            status.update(f"evaluating {number} of {len(saved)}: {one.file}")
            agent, manifest = load(one.file, device=asked.device), checkpoint.read_manifest(one.file)
            env_id, env_kwargs = _task(asked, one.file, manifest)
            with contextlib.closing(_environments(asked, env_id, env_kwargs, agent)) as env:
                evaluation = _episodes(asked, agent, env, f"{one.file}, on {env_id}", status.console)
            curve = {} if one.folder is None else curve_of(one.folder)
            scored.append(
                Scored(
                    path=str(one.folder.path if one.folder else one.file),
                    env=env_id,
                    algorithm=manifest["algorithm"],
                    group=one.group,
                    seed=-1 if manifest["seed"] is None else manifest["seed"],
                    steps=manifest["num_timesteps"],
                    seconds=float(curve["seconds"][-1]) if curve else math.nan,
                    episodes=evaluation.episodes,
                    score=evaluation.mean,
                    interval=evaluation.interval,
                    settings=manifest["config"] | {"policy": manifest["policy_class"], "env_kwargs": env_kwargs},
                    curve=curve,
                    returns=evaluation.returns.tolist(),
                )
            )
    return scored


def _task(asked: Assessment, file: Path, manifest: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Give the environment's id and arguments: what is asked for, or the agent's own."""
    own = manifest["env_kwargs"] if asked.env in (None, manifest["env_id"]) else {}
    env_id = asked.env or manifest["env_id"]
    if env_id is None:
        raise RunError(f"{file} does not name its environment, which had no id; give one with --env.")
    check_import(file, "" if asked.env else env_id, own, asked.allow_import)  # what was typed is trusted
    return env_id, own | parsed_pairs(asked.env_kwargs)


def _assess_one(asked: Assessment, file: Path) -> None:
    """Run whole episodes and show their returns."""
    agent, manifest = load(file, device=asked.device), checkpoint.read_manifest(file)
    env_id, env_kwargs = _task(asked, file, manifest)
    with contextlib.ExitStack() as stack:
        film = asked.video and stack.enter_context(
            Film(env_id, env_kwargs, asked.seed, Path(asked.video), asked.video_episodes)
        )
        env = _environments(asked, env_id, env_kwargs, agent)
        stack.enter_context(contextlib.closing(env))
        console = Console(highlight=False, markup=False)
        evaluation = _episodes(asked, agent, env, env_id, console)
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
            filmed = ", ".join(f"{value:,.1f}" for value in film.shoot(agent, not asked.stochastic))
            console.print(f"video       {asked.video} (return {filmed})", soft_wrap=True)


def _episodes(asked: Assessment, agent: Agent, env: VectorEnv, where: str, console: Console) -> Evaluation:
    """Run the episodes, and say where they do not end."""

    def say(what: str) -> None:
        console.print(f"{where}: {what}. {NEEDS_AN_END}", soft_wrap=True)

    evaluation = evaluate(agent, env, asked.episodes, asked.seed, not asked.stochastic, waiting(say))
    if evaluation.cut:
        say(evaluation.said_of_cut)
    return evaluation


def _environments(asked: Assessment, env_id: str, env_kwargs: dict[str, Any], agent: Agent) -> VectorEnv:
    """Make the environments of an evaluation, of the spaces that the agent knows."""
    num_envs = min(BLOCK, asked.episodes)
    env = make_vec(env_id, num_envs, backend=asked.backend, autoreset="disabled", **env_kwargs)
    for name in ("observation_space", "action_space"):
        own, theirs = getattr(agent, name), getattr(env, f"single_{name}")
        if own != theirs:
            raise UsageError(f"--env is {env_id!r}, whose {name} is {theirs}; the agent's is {own}.")
    return env


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
        "cut": evaluation.cut,
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
