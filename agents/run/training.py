"""Training as a run: evaluated and checkpointed on the way, stopped and gone on with at any iteration."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.utils import get_device

from agents import REGISTRY, noise
from agents.base import Agent
from agents.checkpoint import CheckpointError
from agents.config import CommonConfig
from agents.rollout.spread import Spread
from agents.run import report
from agents.run.errors import EXPECTED, NO_MEMORY, RunError, UsageError, lacks
from agents.run.evaluation import BLOCK, NEEDS_AN_END, Evaluation, evaluate, waiting
from agents.run.folder import EVALUATION_COLUMNS, RunConfig, RunFolder, RunState, append_row, read_rows, save_quietly
from agents.run.initial import Initial
from agents.run.log import log_evaluation, record_hyperparameters, run_logger
from agents.run.options import EVALUATIONS, RunOptions, check_device, check_import, executor_of
from agents.run.outputs import Room
from agents.run.process import typed
from agents.run.progress import Progress
from agents.run.signals import StopRequest, stdout_console
from agents.run.watchdog import Watchdog
from agents.saving import NewEpisodes
from envs import GymVectorEnv, VectorEnv, make_vec
from envs.device import ROOM

FINAL_EPISODES = 32
STATE_SECONDS = 1.0
"""Between two writings of state.json, at least."""
UNLIMITED = 10**15
"""Environment steps, where a clock ends training."""


def start(algorithm: str, run: RunOptions, config: CommonConfig, origins: dict[str, str], command: str) -> int:
    """Train a new agent; returns the exit code.

    Args:
        config: the algorithm's Config.
        origins: where each of its values came from.
        command: what was typed.

    Raises:
        UsageError: the environment, the device or a hyperparameter is not possible.
        RunError: the run's folder exists or cannot be written.
    """
    run.check()
    check_device(run.device)
    run = run.resolved()
    values = dataclasses.asdict(config)
    torch.set_num_threads(run.threads)
    with _usage_errors():
        kind = REGISTRY[algorithm]
        policy = run.policy or next(iter(kind.policy_aliases))
        env = _spread(run, _make_env(run, config.num_envs, kind.autoreset))
        agent = kind(policy, env, seed=run.seed, device=run.device, **values)
        begins = None if run.init_from is None else Initial.of(run.init_from).give(agent)
    run = dataclasses.replace(run, device=str(agent.device))
    settings = RunConfig(algorithm, run, values, origins)
    folder = RunFolder.create(settings, command)
    with folder.lock(), contextlib.closing(env):
        return _Training(agent, folder, settings, begins).run()


def resume(path: str, changes: dict[str, Any], quiet: bool, command: str, allow_import: bool = False) -> int:
    """Go on with the run in the folder path, as it ran before; returns the exit code.

    Args:
        changes: options of the run, by name, in place of its own: steps or minutes (in total, counted from the run's
            beginning; one takes the other's place), device or threads. They become the run's own.
        allow_import: import the module that its environment's id names.

    Raises:
        UsageError: a change is not possible, or the run's device is not here.
        RunError: there is no run to go on with, or another process is training in it.
    """
    folder = RunFolder.open(path)
    with folder.lock():
        settings = folder.read_config()
        length = {"steps": None, "minutes": None} if changes.keys() & {"steps", "minutes"} else {}
        run = dataclasses.replace(settings.run, **(length | changes), quiet=quiet)
        if (run.executor is None) != (settings.run.executor is None):
            raise UsageError("--executor is for a run that had one; this one's environments are together.")
        run.check()
        check_import(folder.config, run.env, run.parsed_env_kwargs(), allow_import)
        check_device(run.device)
        manifest, tensors, fallen_back = folder.read_last()
        if fallen_back:
            print(fallen_back)
        kind, num_envs = REGISTRY.get(settings.algorithm), settings.config.get("num_envs")
        if kind is None or (kind.name, num_envs) != (manifest["algorithm"], manifest["config"].get("num_envs")):
            raise RunError(
                f"{folder.config} and {folder.last} are of different runs: their algorithm or num_envs differ."
            )
        done = manifest["num_timesteps"]
        seconds = _seconds_used(folder)
        over = run.share(done, seconds) >= 1
        if over and folder.is_finished(done):
            made = f"{done:,} steps" if run.minutes is None else f"{done:,} steps in {seconds / 60:.1f} minutes"
            option = "steps" if run.minutes is None else "minutes"
            print(f"{folder.path} is finished with {made}; --{option} with a larger number goes on.")
            return 0
        for lost in folder.drop_rows(done, over):
            print(lost)
        torch.set_num_threads(run.threads)
        env = _spread(run, _make_env(run, manifest["config"]["num_envs"], kind.autoreset))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", NewEpisodes)
            agent = kind.unpacked(folder.last, manifest, tensors, env, run.device)
        run = dataclasses.replace(run, device=str(agent.device))
        for name in sorted(changes.keys() & {"device", "threads"}):
            before, now = getattr(settings.run, name), getattr(run, name)
            if now != before:
                print(f"--{name} {now} in place of the run's {before}: from here on its numbers may round otherwise.")
        for warning in said:
            print(warning.message)
        settings = dataclasses.replace(settings, run=run)
        folder.write_config(settings)
        with folder.command.open("a") as file:
            file.write(command + "\n")
        first = agent.counter
        try:
            with contextlib.closing(env):
                return _Training(agent, folder, settings).run()
        except Exception as error:
            known = isinstance(error, (*EXPECTED, MemoryError)) or hasattr(error, "raised_in")
            if agent.counter > first or known or NO_MEMORY.search(str(error)):
                raise
            raise CheckpointError(
                f"{folder.last} holds a state from which training does not go on ({type(error).__name__}: "
                f"{str(error)[:200]}); --debug shows where. Use another checkpoint, such as previous.zip beside it."
            ) from error


class _Left(Exception):  # noqa: N818 - it is no error
    """An evaluation was left, since a stop is asked for."""


class _Training:
    """One process's part of a run."""

    def __init__(self, agent: Agent, folder: RunFolder, settings: RunConfig, begins: str | None = None) -> None:
        self.begins = begins
        self.agent, self.folder, self.settings, self.options = agent, folder, settings, settings.run
        self.stop = StopRequest()
        self.console = stdout_console(self.stop)
        if not self.console.is_terminal or self.options.quiet:
            self.stop.say = "Stopping after this iteration; a second Ctrl-C stops at once."
        self.title = f"{settings.algorithm} on {self.options.env}"
        self._with_room = Room(folder.path, self.options.disk_full == "wait", self.stop, self._say)
        rows = read_rows(folder.evaluations)
        self._evaluated = _due(self.options, int(rows[-1]["steps"]), float(rows[-1]["seconds"])) if rows else None
        self._best = max((float(row["mean"]) for row in rows), default=-math.inf)
        self._mean = float(rows[-1]["mean"]) if rows else None
        self._seconds_before = _seconds_used(folder)
        self._begun = time.monotonic()
        self._state_at = -math.inf
        self._has_said = False

    def run(self) -> int:
        agent, run = self.agent, self.options
        self._print_start()
        logger = run_logger(self.folder, agent.num_timesteps, agent.dashboard, self._with_room, agent.last_metrics)
        agent.set_logger(logger)
        if agent.num_timesteps == 0:
            record_hyperparameters(agent.logger, self.settings, self.folder)
        final = None
        with (
            contextlib.closing(_make_env(_evaluated(run), BLOCK, AutoresetMode.DISABLED)) as env,
            self.stop as stop,
            Watchdog(run.step_timeout, lambda: agent.collector.vector.doing() or env.doing(), self._leave),
            Progress(
                self.console,
                self.title,
                run.steps,
                agent.num_timesteps,
                self._mean,
                stop,
                run.quiet,
                run.minutes,
                self._seconds_before,
            ) as progress,
            self._noting_the_last_state(),
        ):
            self._check_that_it_repeats(env)
            self._train(env, stop, progress)
            self._save()
            self._write_state("stopped")
            if stop.signal is None:
                used = self._seconds()  # of its time, too, the last evaluation takes nothing
                final = self._evaluate(env, progress, FINAL_EPISODES, noise.seed_of(run.seed, "final evaluation"))
            agent.logger.close()
            self._with_room(lambda: report.plot_curve(self.folder, f"{self.title}, seed {run.seed}"))
            if final is not None:
                self._write_state("finished", used=used)
        if final is not None:
            self._print_summary(final)
            return 0
        assert stop.signal is not None
        self._print_stop(stop.signal)
        return stop.exit_code

    def _check_that_it_repeats(self, env: VectorEnv) -> None:
        """Say at the start where a run that stops will not go on exactly."""
        vector = self.agent.collector.vector
        vector = vector.home if isinstance(vector, Spread) else vector
        if isinstance(vector, GymVectorEnv) and isinstance(env, GymVectorEnv):
            vector.unrepeatable = env.find_unrepeatable()
            if vector.unrepeatable:
                self._say(f"Whoever resumes this run begins new episodes, and not exactly: {vector.unrepeatable}")

    def _train(self, env: VectorEnv, stop: StopRequest, progress: Progress) -> None:
        """Iterate until the asked steps or minutes are over or a stop is asked for."""
        agent, run = self.agent, self.options
        self._write_state("running")
        self._evaluate_if_due(env, progress)
        saved = -math.inf
        if self._share() >= 1 or stop.signal is not None:
            return
        if run.steps is None:
            agent.share_used = self._share
        agent.keeps_beginnings = True
        remaining = UNLIMITED if run.steps is None else run.steps - agent.num_timesteps
        # One that broke off in its first iteration has begun its episodes.
        anew = agent.num_timesteps == 0 and agent.collector.observations is None
        for _ in agent.iterations(remaining, reset_num_timesteps=anew):
            progress.iteration(agent.num_timesteps, agent.last_metrics)
            if stop.signal is not None:
                return
            self._evaluate_if_due(env, progress)
            if time.monotonic() - saved >= run.checkpoint_every:
                self._save()
                saved = time.monotonic()
            if time.monotonic() - self._state_at >= STATE_SECONDS:
                self._write_state("running")
            if self._share() >= 1 or stop.signal is not None:
                return

    def _evaluate_if_due(self, env: VectorEnv, progress: Progress) -> None:
        """Evaluate at the start and wherever one is due; the end has its own evaluation."""
        run, due = self.options, _due(self.options, self.agent.num_timesteps, self._seconds())
        if (self._evaluated is None or due > self._evaluated) and self._share() < 1:
            # Evaluations repeat their own episodes; the final one has fresh ones.
            self._evaluate(env, progress, run.eval_episodes, noise.seed_of(run.seed, "evaluation"))

    def _evaluate(self, env: VectorEnv, progress: Progress, episodes: int, seed: int) -> Evaluation | None:
        """Evaluate, log it, and keep the agent as best.zip if it is the best one so far; None if a stop is asked for
        meanwhile: who goes on evaluates again.
        """
        agent, steps = self.agent, self.agent.num_timesteps
        try:
            evaluation = evaluate(agent, env, episodes, seed, tick=self._ticks())
        except _Left:
            return None
        if evaluation.cut:
            self._say_once(evaluation.said_of_cut)
        if evaluation.mean > self._best:
            self._best = evaluation.mean
            self._with_room(lambda: save_quietly(agent, self.folder.best))
        log_evaluation(agent.logger, steps, evaluation, self._best)
        seconds = self._seconds()
        row = (steps, evaluation.mean, evaluation.iqm, *evaluation.interval, episodes, round(seconds, 3))
        # Last: what a kill before it leaves undone is done again.
        named = dict(zip(EVALUATION_COLUMNS, row, strict=True))
        self._with_room(lambda: append_row(self.folder.evaluations, named))
        progress.evaluation(evaluation.mean)
        self._mean, self._evaluated = evaluation.mean, _due(self.options, steps, seconds)
        return evaluation

    def _ticks(self) -> Callable[[bool], None]:
        """Give what an evaluation calls in each step: it leaves it for a stop, and says so where no episode ends."""
        wait = waiting(self._say_once)

        def tick(ended: bool) -> None:
            if self.stop.signal is not None:
                raise _Left
            wait(ended)

        return tick

    def _say_once(self, what: str) -> None:
        """Say what evaluations do in an environment that hardly ends."""
        if not self._has_said:
            self._say(f"{self.options.env}: {what}. {NEEDS_AN_END}")
        self._has_said = True

    def _save(self) -> None:
        """Save the agent as the last checkpoint, once there is room.

        Raises:
            RunError: the run's folder is gone; the agent is saved where it was.
        """
        if moved := self._is_moved():
            self.folder.last.parent.mkdir(parents=True, exist_ok=True)
            self._with_room(lambda: self.folder.write_config(self.settings))
        self._with_room(lambda: self.folder.keep(self.agent))
        if moved:
            raise RunError(
                f"{self.folder.path} was moved or removed while the run was going on, and the run has stopped; it is "
                f"saved anew there, without its earlier logs. Go on: {self._resume()}"
            )

    def _leave(self, error: str) -> None:
        """Save the agent where a step does not end."""
        self._save()
        self._write_state("failed", error)

    def _is_moved(self) -> bool:
        return not self.folder.config.is_file()

    def _say(self, sentence: str) -> None:
        self.console.print(sentence, soft_wrap=True)

    def _resume(self) -> str:
        """Say how to go on."""
        return f"{typed('resume')} {shlex.quote(str(self.folder.path))}{self.options.consent}"

    def _seconds(self) -> float:
        """Count the seconds that the run has taken, in earlier processes too."""
        return self._seconds_before + time.monotonic() - self._begun

    def _share(self) -> float:
        """Say which share of the run is over."""
        return self.options.share(self.agent.num_timesteps, self._seconds())

    def _write_state(self, state: str, error: str = "", used: float | None = None) -> None:
        steps, training = self.agent.num_timesteps, self.agent.last_metrics.get("rollout/ep_rew_mean")
        seconds = self._seconds() if used is None else used
        share = min(self.options.share(steps, seconds), 1.0)
        with contextlib.suppress(OSError):  # for others to read: a full disk, or none, is noticed where it matters
            self.folder.write_state(RunState(state, steps, seconds, share, training, self._mean, error))
        self._state_at = time.monotonic()

    def _print_start(self) -> None:
        if self.options.quiet:
            return
        agent, show = self.agent, self.console.print
        show(f"{self.title}, seed {self.options.seed}, on {agent.device}", style="bold")
        if agent.num_timesteps:
            run = self.options
            whole = f"{run.minutes:g} minutes" if run.steps is None else f"{run.steps:,} environment steps"
            used = f"{self._seconds_before / 60:.1f}" if run.steps is None else f"{agent.num_timesteps:,}"
            show(f"goes on after {used} of {whole}")
        else:
            show("", report.hyperparameter_table(self.settings.config, self.settings.origins, self.console.width), "")
        if self.begins is not None:
            show(self.begins, soft_wrap=True)
        show(f"run folder: {self.folder.path}", soft_wrap=True)
        asked, one = (self.options.steps or math.inf) - agent.num_timesteps, agent.steps_per_iteration
        if 0 < asked < one:
            show(f"one iteration is {one:,} environment steps, more than the {asked:,} asked for", soft_wrap=True)

    def _print_stop(self, number: signal.Signals) -> None:
        """Say how to go on: on stdout, or on stderr if nobody reads that any more."""
        why = "since nobody reads what it prints" if number is signal.SIGPIPE else f"by {number.name}"
        words = [
            f"Stopped {why} after {self.agent.num_timesteps:,} environment steps; everything is saved. Go on:",
            f"  {self._resume()}",
        ]
        self.console.print("\n".join(words), soft_wrap=True)
        if getattr(self.console.file, "is_lost", False):
            with contextlib.suppress(OSError):
                print("\n".join(words), file=sys.stderr)

    def _print_summary(self, final: Evaluation) -> None:
        show, folder, best = self.console.print, shlex.quote(str(self.folder.path)), self._best > final.interval[1]
        show(f"\n{self.title}: final policy, deterministic, after {self.agent.num_timesteps:,} environment steps")
        show(report.evaluation_table(final), "")
        lines = {
            "policy": self.folder.last,
            "better one": best and f"{self.folder.best}, evaluated at {self._best:,.1f}",
            "curve": self.folder.curve,
            "live curves": f"tensorboard --logdir {folder}",
            "evaluate": f"{typed('evaluate')} {folder} --episodes 100{self.options.consent}",
        }
        for name, text in lines.items():
            if text:
                show(f"{name:<12}{text}", soft_wrap=True)

    @contextlib.contextmanager
    def _noting_the_last_state(self) -> Iterator[None]:
        """Say with an error where the last saved state is."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, FileNotFoundError) and self._is_moved():
                self._save()  # which says so
            # A full disk had its time; an update that was broken off is no state to go on from.
            if not isinstance(error, RunError) and (self.agent.begun is not None or not self.agent.amid_iteration):
                with contextlib.suppress(OSError, FloatingPointError, RunError):
                    self._save()
            self._write_state("stopped" if isinstance(error, KeyboardInterrupt) else "failed", str(error))
            if self.folder.last.is_file():
                error.add_note(f"The last saved state of this run is in {self.folder.last}.")
            raise


def _make_env(run: RunOptions, num_envs: int, autoreset: AutoresetMode) -> VectorEnv:
    env_kwargs = run.parsed_env_kwargs()
    if run.backend == "warp":
        env_kwargs["device"] = get_device(run.device)
    return make_vec(run.env, num_envs, backend=run.backend, seed=run.seed, autoreset=autoreset, **env_kwargs)


def _evaluated(run: RunOptions) -> RunOptions:
    """Give the options of environments for evaluations: of a run on MuJoCo Warp, MuJoCo's own."""
    if run.backend != "warp":
        return run
    rooms = tuple(f"{name}=" for name in ROOM)
    kept = tuple(pair for pair in run.env_kwargs if not pair.startswith(rooms))
    return dataclasses.replace(run, backend="auto", env_kwargs=kept)


def _spread(run: RunOptions, env: VectorEnv) -> VectorEnv:
    """Spread environments over workers, if the run has them."""
    executor = executor_of(run)
    return env if executor is None else Spread(env, executor)


def _due(run: RunOptions, steps: int, seconds: float) -> int:
    """Count the evaluations that are due after so many steps and seconds, beside the first and the last one."""
    return int(EVALUATIONS * run.share(steps, seconds)) if run.eval_every is None else steps // run.eval_every


def _seconds_used(folder: RunFolder) -> float:
    """Return the seconds that a run has taken so far."""
    state, rows = folder.read_state(), read_rows(folder.evaluations)
    return state.seconds if state is not None else float(rows[-1]["seconds"]) if rows else 0.0


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    """Make a UsageError of what goes wrong: nothing has run yet, so it is what was typed."""
    try:
        yield
    except (ValueError, ModuleNotFoundError) as error:
        raise UsageError(lacks(error) if isinstance(error, ModuleNotFoundError) else str(error)) from error
