"""What a run is asked to do, beside the algorithm's hyperparameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from tyro.conf import FlagCreatePairsOff, UseAppendAction, arg

from agents.run.errors import UsageError
from envs.cores import usable_cores

if TYPE_CHECKING:
    from agents.cluster.executor import Executor

Flag = FlagCreatePairsOff[bool]
DEFAULT_STEPS = 1_000_000
ALLOW_IMPORT = "allow-import"
"""Option of the commands that open files."""
DECIDED = {
    **{name: f"which the option --{name.replace('_', '-')} decides" for name in ("seed", "num_envs", "backend")},
    **dict.fromkeys(("autoreset", "device", "env_id"), "which the run itself decides"),
}
"""Arguments of `make_vec` that are no arguments of the environment."""
MOST = {"seed": 2**32 - 1, "threads": 4096, "steps": 10**15, "eval_episodes": 10**6, "episodes": 10**6}
"""Of options of all commands."""
EVALUATIONS = 20
"""Of a run, unless it is told how often."""


@dataclass(frozen=True)
class RunOptions:
    """What to train in, for how long, and where the results go."""

    # Plain YAML values only: config.yaml keeps them, and resume reads them back.
    env: Annotated[str, arg(metavar="ID")]
    """Environment to train in, e.g. Hopper-v5."""
    steps: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 1,000,000)")] = None
    """Environment steps to train for."""
    minutes: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")] = None
    """Train for so long instead, evaluations on the way included; schedules follow the share of the time."""
    seed: int = 0
    """Decides everything random in the run."""
    policy: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: the algorithm's first)")] = None
    """Kind of policy: MlpPolicy, LinearPolicy or RBFPolicy; pes has LinearPolicy first, and no RBFPolicy."""
    preset: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="(default: the package's own)")] = None
    """File of presets, as tune writes it: environment -> hyperparameters that differ from the defaults. none: the
    defaults alone."""
    init_from: Annotated[str | None, arg(metavar="RUN_OR_FILE", help_behavior_hint="")] = None
    """Begin from the policy of this saved agent, of the same spaces; what shapes it is taken from there too."""
    device: str = "auto"
    """Where networks live: auto, cpu, cuda or cuda:1; auto takes the GPU if there is one."""
    backend: Literal["auto", "mujoco", "gymnasium", "warp"] = "auto"
    """Physics: mujoco is the batched one, gymnasium runs any registered environment; warp, on a GPU, trains in MuJoCo
    Warp and evaluates in MuJoCo."""
    executor: Literal["serial", "ray"] | None = None
    """Spread environments, in fixed shards of 32 or of 32 pairs: ray, over the workers of a Ray cluster; serial, here,
    to the same bits. None keeps them together."""
    workers: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: one per core here)")] = None
    """Of ray: processes with a CPU each. Results do not depend on their number."""
    ray_address: Annotated[str | None, arg(metavar="HOST:PORT", help_behavior_hint="")] = None
    """Of ray: the cluster's head, or auto; unless given one is started here for the run."""
    env_kwargs: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY=VALUE")] = ()
    """Argument of the environment, e.g. reset_noise_scale=0.01. May be given again."""
    eval_every: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: a 20th of the run)")] = None
    """Environment steps between evaluations."""
    eval_episodes: int = 8
    """Episodes of one evaluation, with deterministic actions."""
    checkpoint_every: float = 30.0
    """Seconds between checkpoints."""
    step_timeout: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="(default: none)")] = None
    """Seconds that a step of an environment of somebody else's may take before the run saves itself and stops."""
    disk_full: Literal["wait", "stop"] = "wait"
    """What the run does on a full disk: wait until there is room again, or stop."""
    runs: Annotated[str, arg(metavar="FOLDER")] = "runs"
    """Folder of all runs; this one goes to <env>/<algorithm>/<time>-s<seed> in it."""
    name: Annotated[str | None, arg(metavar="WORD", help_behavior_hint="")] = None
    """Word added to the name of the run's folder."""
    run_dir: Annotated[str | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """The run's own folder, in place of one in --runs; new or empty."""
    threads: int = min(4, usable_cores())
    """Threads of PyTorch on the CPU for the updates; a run repeats bit for bit with the same number only."""
    quiet: Flag = False
    """Print the final summary only."""
    debug: Flag = False
    """Show the traceback of an error."""

    @property
    def consent(self) -> str:
        """Give what is typed, besides, to go on with this run or to evaluate it: the word that allows an import."""
        return f" --{ALLOW_IMPORT}" if module_of(self.env, self.parsed_env_kwargs()) else ""

    def check(self) -> None:
        """Raise UsageError for a value that no run can have."""
        least = {"steps": 1, "seed": 0, "eval_every": 1, "eval_episodes": 1, "threads": 1, "checkpoint_every": 0}
        check_least(self, least)
        check_executor(self)
        if self.executor is not None and self.step_timeout is not None:
            raise UsageError(
                f"--step-timeout is {self.step_timeout:g}, which watches steps of environments that are together; with "
                "--executor leave it out: of ray, workers that hang are replaced."
            )
        if self.executor is not None and self.backend == "warp":
            raise UsageError("--backend warp keeps its worlds together on one device; leave --executor out.")
        for name in ("policy", "run_dir", "runs"):
            if getattr(self, name) == "":
                raise UsageError(f"--{name.replace('_', '-')} is empty; give one, or leave the option out.")
        for name in ("minutes", "step_timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; give a number above 0.")
        if self.minutes is not None and self.steps is not None:
            raise UsageError(
                f"--steps is {self.steps} and --minutes {self.minutes}; give one: schedules follow its share."
            )
        self.parsed_env_kwargs()

    def resolved(self) -> RunOptions:
        """Give these with the length that a run has unless it is asked for another, and with how often it evaluates."""
        steps = DEFAULT_STEPS if self.steps is None and self.minutes is None else self.steps
        every = self.eval_every if self.eval_every or steps is None else math.ceil(steps / EVALUATIONS)
        return replace(self, steps=steps, eval_every=every)

    def share(self, steps: int, seconds: float) -> float:
        """Say which share of the run is over after so many environment steps and seconds."""
        if self.minutes is not None:
            return seconds / (60 * self.minutes)
        assert self.steps is not None
        return steps / self.steps

    def parsed_env_kwargs(self) -> dict[str, Any]:
        """Return the environment's arguments, their values read as YAML."""
        return parsed_pairs(self.env_kwargs)


def check_least(options: Any, bounds: Mapping[str, float]) -> None:
    """Raise UsageError for an option below its bound, or above what any command can have; None is none."""
    for name, bound in bounds.items():
        value = getattr(options, name)
        if value is not None and not value >= bound:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; give at least {bound}.")
    for name, bound in MOST.items():
        if (value := getattr(options, name, None)) is not None and value > bound:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; give at most {bound:,}.")


def check_executor(options: Any) -> None:
    """Raise UsageError for options of an executor that do not belong together."""
    check_least(options, {"workers": 1})
    if options.executor != "ray" and (options.workers, options.ray_address) != (None, None):
        raise UsageError("--workers and --ray-address are for a Ray cluster; give --executor ray too.")


def executor_of(options: Any) -> Executor | None:
    """Make the executor that is asked for; None where environments stay together.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ValueError: there is no cluster at the address.
    """
    from agents.cluster.executor import Serial
    from agents.cluster.ray_executor import Ray

    if options.executor is None:
        return None
    return Serial() if options.executor == "serial" else Ray(options.workers or usable_cores(), options.ray_address)


def parsed_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """Read KEY=VALUE pairs, the values as YAML; UsageError for one that is none, or no argument of environments."""
    values = dict(map(_parse_pair, pairs))
    for name in values.keys() & DECIDED.keys():
        raise UsageError(f"--env-kwargs has {name}, {DECIDED[name]}; leave it out.")
    return values


def check_import(source: object, env_id: str, env_kwargs: Mapping[str, Any], allowed: bool) -> None:
    """Raise UsageError if an environment that a file names, not a person, imports a module: that would run its code."""
    module = module_of(env_id, env_kwargs)
    if module and not allowed:
        raise UsageError(
            f"{source} names the environment {env_id!r}, for which the module {module!r} would be imported, and its "
            f"code run; give --{ALLOW_IMPORT} if you trust it."
        )


def module_of(env_id: str, env_kwargs: Mapping[str, Any]) -> str | None:
    """Name the module that an environment's id, such as module:Id-v0, or a text in its arguments has imported."""

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, (Mapping, list, tuple, set)):
            for item in [*value, *value.values()] if isinstance(value, Mapping) else value:
                yield from texts(item)

    return next((text.rpartition(":")[0] or text for text in texts([env_id, env_kwargs]) if ":" in text), None)


def check_device(name: str) -> None:
    """Raise UsageError unless PyTorch can compute on the device; SB3 would quietly take the CPU for a missing GPU."""
    import torch

    if name == "auto":
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that PyTorch gives up; what does not work is an error
            float(torch.zeros(1, device=name))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device is {name!r}, which is not possible here ({reason}); use cpu or auto.") from error


def _parse_pair(pair: str) -> tuple[str, Any]:
    key, equals, text = pair.partition("=")
    if not (key.isidentifier() and equals):
        raise UsageError(f"--env-kwargs is {pair!r}; write KEY=VALUE, e.g. reset_noise_scale=0.01.")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: digits by the thousand, odd dates
        raise UsageError(f"--env-kwargs is {pair!r}; its value is not YAML.") from error
    return key, _number_or(value)


def _number_or(value: Any) -> Any:
    """Read the strings that are numbers: 1e-3 is a string in YAML 1.1; people mean the number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
