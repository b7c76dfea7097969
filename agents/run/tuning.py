"""Looking for hyperparameters: trials that Optuna proposes, cut short where they lag, and a preset of the best."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import yaml
from gymnasium.vector import AutoresetMode
from rich.console import Console
from tyro.conf import Positional, UseAppendAction, arg

from agents import REGISTRY, noise
from agents.config import near, preset_values
from agents.rollout.spread import Spread
from agents.run import report
from agents.run.errors import RunError, UsageError
from agents.run.evaluation import BLOCK, evaluate
from agents.run.folder import file_name, plain
from agents.run.options import Flag, check_executor, check_least, executor_of, parsed_pairs
from agents.run.outputs import complete
from agents.run.process import typed
from agents.run.signals import StopRequest
from envs import make_vec

if TYPE_CHECKING:
    import optuna

    from agents.cluster.executor import Executor

SPACE: dict[str, Any] = {
    "learning_rate": (1e-4, 1e-1),
    "target_kl": (0.003, 0.1),
    "cg_damping": (0.01, 3.0),
    "clip_range": (0.1, 0.3),
    "sigma": (0.01, 1.0),
    "inner_lr": (0.01, 1.0),
    "gamma": [0.98, 0.99, 0.995, 0.999],
    "gae_lambda": [0.9, 0.95, 0.98],
    "n_steps": [32, 64, 128],
}
"""What is looked for among an algorithm's hyperparameters: (low, high), or a list of values."""
NOT_OF = {"pes": ("n_steps", "gamma")}
"""Those that belong to an episode's length there."""
LOGARITHMIC = 9.0
"""Ratio of high to low from which a range is searched by its logarithm."""
EVALUATIONS = 10
"""On the way of a trial, at each of which it may be cut short."""
EPISODES, FINAL_EPISODES = 8, 32


@dataclass(frozen=True)
class Tune:
    """Look for hyperparameters with Optuna, and write the best as a preset. The first trial has the values of now; the
    same command goes on with the study, and may run several times at once.
    """

    algorithm: Positional[Annotated[str, arg(metavar="ALGORITHM")]]
    """Such as npg or ppo."""
    env: Annotated[str, arg(metavar="ID")]
    """Environment to train in, e.g. Hopper-v5."""
    trials: int = 50
    """Trials of the study in all, those of earlier calls included."""
    steps: int = 100_000
    """Environment steps of one trial."""
    seeds: int = 1
    """Seeds of one trial, whose mean counts; only the first one is cut short."""
    search: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="NAME=RANGE")] = ()
    """Hyperparameter to look for, in place of the usual ones: target_kl=0.001..0.1, or fisher=compatible,ekfac. May be
    given again."""
    env_kwargs: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY=VALUE")] = ()
    """Argument of the environment. May be given again."""
    policy: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: the algorithm's first)")] = None
    """Kind of policy."""
    executor: Literal["serial", "ray"] | None = None
    """Spread a trial's environments, in fixed shards: ray, over the workers of a Ray cluster; serial, here. None keeps
    them together."""
    workers: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: one per core here)")] = None
    """Of ray: processes with a CPU each, which all trials use one after the other."""
    ray_address: Annotated[str | None, arg(metavar="HOST:PORT", help_behavior_hint="")] = None
    """Of ray: the cluster's head, or auto; unless given one is started here."""
    seed: int = 0
    """Of the trials' training, and of what Optuna proposes in a new study."""
    study: Annotated[str | None, arg(metavar="FOLDER", help_behavior_hint="(default: tuning/ENV/ALGORITHM)")] = None
    """Where the study, the preset and the figure are."""
    threads: int = 1
    """Threads of PyTorch on the CPU."""
    debug: Flag = False
    """Show the traceback of an error."""


class StopAsked(Exception):  # noqa: N818, no error
    """Someone asked to stop amid a trial, which counts as failed and is tried again."""


def tune(asked: Tune, command: str) -> int:
    """Run the trials that are missing, and write what was found; returns the exit code.

    Raises:
        UsageError: an option is not possible, or the study is another one.
        RunError: Optuna is not installed, or no trial ended.
    """
    check_least(asked, {"trials": 1, "steps": 1, "seeds": 1, "seed": 0, "threads": 1})
    check_executor(asked)
    if asked.algorithm not in REGISTRY:
        raise UsageError(f"There is no algorithm {asked.algorithm!r}{near(asked.algorithm, REGISTRY)}")
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise RunError('tune needs Optuna; pip install "geodesic-rl[tune]" brings it.') from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(asked.threads)
    sweep = Sweep(asked)
    with contextlib.closing(sweep.environment(1, AutoresetMode.DISABLED)):
        pass  # what was typed is possible, before anything is written
    folder = Path(asked.study or Path("tuning", file_name(asked.env), asked.algorithm))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may begin the same study
        study = _opened(sweep, folder)
    console = Console(highlight=False, markup=False)
    console.print(f"{asked.algorithm} on {asked.env}: {asked.trials} trials of {asked.steps:,} steps, in {folder}")
    kept = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED, optuna.trial.TrialState.RUNNING)
    with sweep.working(), StopRequest() as stop:
        sweep.stop = stop

        def watched(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            cut = stop.signal is not None and trial.state is optuna.trial.TrialState.FAIL
            console.print(_line(trial, "stopped" if cut else ""), soft_wrap=True)
            if stop.signal is not None:
                study.stop()

        if len(study.get_trials(deepcopy=False, states=kept)) < asked.trials:
            limit = optuna.study.MaxTrialsCallback(asked.trials, states=kept)
            try:
                study.optimize(
                    sweep.objective, callbacks=[watched, limit], catch=(StopAsked, ValueError, FloatingPointError)
                )
            except KeyboardInterrupt as error:
                error.add_note(f"The study is saved{_tried_again(study, sweep)}. Go on:\n  {command}")
                raise
    again = _tried_again(study, sweep)
    if stop.signal is None or study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)):
        _write(sweep, study, folder, command, console)
    if running := study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        numbers = ", ".join(str(trial.number) for trial in running)
        console.print(
            f"still running in another process: trial {numbers}; if that was killed, this command tries it again a "
            "minute later",
            soft_wrap=True,
        )
    if stop.signal is not None:
        said = f"Stopped by {stop.signal.name}; the study is saved{again}. Go on:"
        console.print(f"{said}\n  {command}", soft_wrap=True)
    return stop.exit_code


class Sweep:
    """What a study's trials are."""

    def __init__(self, asked: Tune) -> None:
        self.asked, self.kind = asked, REGISTRY[asked.algorithm]
        self.stop: StopRequest | None = None
        self.trial: optuna.Trial | None = None
        """The one that runs, or was stopped."""
        self.executor: Executor | None = None
        self.start = self.kind.Config.of(preset_values(asked.algorithm, asked.env))
        given = dict(map(self._range, asked.search))
        names = set(self.start.names()) - set(NOT_OF.get(asked.algorithm, ()))
        self.space = given or {name: found for name, found in SPACE.items() if name in names}

    def _range(self, text: str) -> tuple[str, Any]:
        name, equals, values = text.partition("=")
        if name not in self.start.names():
            raise UsageError(
                f"--search names {name!r}, which {self.asked.algorithm} has not{near(name, self.start.names())}"
            )
        low, dots, high = values.partition("..")
        try:
            found = (float(low), float(high)) if dots else [yaml.safe_load(one) for one in values.split(",")]
        except ValueError:
            found = []
        if not equals or not found or (isinstance(found, tuple) and not found[0] < found[1]):
            raise UsageError(f"--search is {text!r}; write {name}=LOW..HIGH, or {name}=ONE,OTHER.")
        if isinstance(found, list) and all(isinstance(value, str) for value in found):
            with contextlib.suppress(ValueError):  # 1e-3 is a text in YAML
                found = [float(value) for value in found]
        return name, found

    @property
    def settings(self) -> dict[str, Any]:
        """Say what makes trials comparable."""
        a = self.asked
        chosen = {name: getattr(a, name) for name in ("algorithm", "env", "steps", "seeds", "seed", "policy")}
        space = {name: list(values) for name, values in self.space.items()}
        return {**chosen, "env_kwargs": list(a.env_kwargs), "space": space}

    def proposed(self, trial: optuna.Trial) -> dict[str, Any]:
        """Ask for a trial's values."""
        return {name: self._suggest(trial, name, values) for name, values in self.space.items()}

    def _suggest(self, trial: optuna.Trial, name: str, values: Any) -> Any:
        if isinstance(values, list):
            return trial.suggest_categorical(name, values)
        low, high = values
        logarithmic = low > 0 and high / low >= LOGARITHMIC
        if isinstance(getattr(self.start, name), int):
            return trial.suggest_int(name, int(low), int(high), log=logarithmic)
        return trial.suggest_float(name, low, high, log=logarithmic)

    def first(self) -> dict[str, Any]:
        """Give the values of now, as far as the space has them."""
        now = {name: getattr(self.start, name) for name in self.space}
        return {
            name: value
            for name, value in now.items()
            if value is not None
            and (value in (held := self.space[name]) or (isinstance(held, tuple) and held[0] <= value <= held[1]))
        }

    def environment(self, num_envs: int, autoreset: AutoresetMode) -> Any:
        """Make environments as a trial has them."""
        a = self.asked
        return make_vec(a.env, num_envs, seed=a.seed, autoreset=autoreset, **parsed_pairs(a.env_kwargs))

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Have workers, if any are asked for, for all trials that are tried in it."""
        try:
            self.executor = executor_of(self.asked)
        except (ValueError, ModuleNotFoundError) as error:
            raise UsageError(str(error)) from error
        with contextlib.nullcontext() if self.executor is None else contextlib.closing(self.executor):
            yield

    def objective(self, trial: optuna.Trial) -> float:
        """Train with the proposed values; gives the mean return of the final policies."""
        self.trial = trial
        config = self.kind.Config.of(self.proposed(trial), self.start)
        seeds = range(self.asked.seed, self.asked.seed + self.asked.seeds)
        found = [self._trained(config, seed, trial if seed == self.asked.seed else None) for seed in seeds]
        return sum(found) / len(found)

    def _trained(self, config: Any, seed: int, trial: optuna.Trial | None) -> float:
        import optuna

        a = self.asked
        with (
            contextlib.closing(self.environment(config.num_envs, self.kind.autoreset)) as env,
            contextlib.closing(self.environment(BLOCK, AutoresetMode.DISABLED)) as held,
        ):
            env = env if self.executor is None else Spread(env, self.executor)
            policy = a.policy or next(iter(self.kind.policy_aliases))
            agent = self.kind(policy, env, seed=seed, device="cpu", **dataclasses.asdict(config))
            done = 0
            for _ in agent.iterations(a.steps, log_interval=None):
                if self.stop is not None and self.stop.signal is not None:
                    raise StopAsked
                passed = agent.num_timesteps * EVALUATIONS // a.steps
                if trial is not None and done < passed < EVALUATIONS:
                    done = passed
                    value = evaluate(agent, held, EPISODES, noise.seed_of(seed, "evaluation")).mean
                    trial.report(value, passed)
                    if trial.should_prune():
                        raise optuna.TrialPruned
            return evaluate(agent, held, FINAL_EPISODES, noise.seed_of(seed, "final evaluation")).mean


def _opened(sweep: Sweep, folder: Path) -> optuna.Study:
    """Open the study in a folder, or begin it."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{folder / 'study.db'}",
            heartbeat_interval=30,  # a trial whose process is gone is tried again
            heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
            engine_kwargs={"connect_args": {"timeout": 60}},
        )
    begun = any(one.study_name == "tune" for one in optuna.study.get_all_study_summaries(storage))
    # A second process that proposed from the same seed would try the same values.
    sampler = optuna.samplers.TPESampler(seed=None if begun else sweep.asked.seed, constant_liar=True)
    study = optuna.create_study(
        storage=storage,
        study_name="tune",
        direction="maximize",
        load_if_exists=True,
        sampler=sampler,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2),
    )
    kept = study.user_attrs.get("settings")
    if kept is None:
        study.set_user_attr("settings", sweep.settings)
        study.enqueue_trial(sweep.first())
    elif differ := [name for name, value in sweep.settings.items() if kept.get(name) != value]:
        name = differ[0]
        raise UsageError(
            f"The study in {folder} has {name} {kept.get(name)}, and {sweep.settings[name]} is asked for; give "
            "that, or another --study."
        )
    return study


def _tried_again(study: optuna.Study, sweep: Sweep) -> str:
    """Have the trial that was stopped tried again, as the study's next one, and say so."""
    import optuna

    last = sweep.trial
    if last is None or not (sweep.stop and sweep.stop.signal):
        return ""
    if study.trials[last.number].state is not optuna.trial.TrialState.FAIL:
        return ""
    study.enqueue_trial(last.params)
    return f", and trial {last.number}, which was running, comes again first"


def _line(trial: optuna.trial.FrozenTrial, stopped: str = "") -> str:
    """Say how a trial ended."""
    state = stopped or trial.state.name.lower()
    value = f"{trial.value:,.1f}" if state == "complete" and trial.value is not None else state
    values = "  ".join(f"{name} {_shown(x)}" for name, x in trial.params.items())
    return f"trial {trial.number:>3}  {value:>10}  {values}"


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _write(sweep: Sweep, study: optuna.Study, folder: Path, command: str, console: Console) -> None:
    """Write the preset of the best trial, and the figure of what mattered."""
    import optuna

    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if not done:
        raise RunError(f"No trial ended, so there is nothing to write; the study is in {folder}.")
    best = study.best_trial
    values = dataclasses.asdict(sweep.kind.Config.of(best.params, sweep.start))
    defaults = dataclasses.asdict(sweep.kind.Config())
    changed = {name: value for name, value in values.items() if value != defaults[name]}
    preset = folder / "preset.yaml"
    said = (
        f"# {command}\n# Trial {best.number} of {len(study.trials)}: {best.value:,.1f}, on the seeds that chose it.\n"
    )
    with complete(preset) as file:
        file.write_text(said + yaml.safe_dump({sweep.asked.env: plain(changed)}, sort_keys=False))
    first = study.trials[0].value
    beside = "" if first is None or best.number == 0 else f"; the values it began from: {first:,.1f}"
    console.print(f"best        trial {best.number}, {best.value:,.1f}{beside}", style="bold")
    console.print(f"preset      {preset}", soft_wrap=True)
    importances = _importances(study) if len(done) >= 4 else {}
    with complete(folder / "study.png") as file:
        ended = [
            (trial.number, trial.value) for trial in done if trial.value is not None and math.isfinite(trial.value)
        ]
        report.plot_study(ended, importances, f"{sweep.asked.algorithm} on {sweep.asked.env}", file)
    console.print(f"figure      {folder / 'study.png'}", soft_wrap=True)
    arguments = f"{sweep.asked.algorithm} --env {sweep.asked.env} --preset {preset}"
    console.print("It was chosen on these seeds: look at others, beside the values it began from.")
    console.print(f"  {typed('train')} {arguments} --seed {sweep.asked.seed + 100}", soft_wrap=True)


def _importances(study: optuna.Study) -> Mapping[str, float]:
    """Say how much each hyperparameter decides whether a trial is among the best (PED-ANOVA, Watanabe et al. 2023)."""
    import optuna

    try:
        return optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
        )
    except (RuntimeError, ValueError):  # all trials are alike
        return {}
