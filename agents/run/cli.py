"""The two commands that people type, from their arguments to an exit code."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar, Union

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg, subcommand

from agents import REGISTRY
from agents.config import preset_values
from agents.run.errors import UsageError, guarded
from agents.run.options import Flag, RunOptions

C = TypeVar("C")


@dataclass(frozen=True)
class Start(Generic[C]):
    """An algorithm's subcommand."""

    run: OmitArgPrefixes[RunOptions]
    hyperparameter: OmitArgPrefixes[C]


@dataclass(frozen=True)
class Resume:
    """Go on with a run from its last checkpoint."""

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """The run's folder."""
    steps: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: as the run had)")] = None
    """Environment steps in total, counted from the run's beginning."""
    device: Annotated[str | None, arg(metavar="STR", help_behavior_hint="(default: as the run had)")] = None
    """Where networks live from now on: auto, cpu, cuda or cuda:1."""
    threads: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: as the run had)")] = None
    """Threads of PyTorch on the CPU from now on; another number than the run's may round otherwise."""
    quiet: Flag = False
    """Print the final summary only."""
    debug: Flag = False
    """Show the traceback of an error."""


def train(arguments: Sequence[str]) -> int:
    """Run train.py with its arguments; returns the exit code. Unknown options exit with 2."""
    asked = tyro.cli(
        _subcommands(arguments),
        prog="train.py",
        description="Train an agent, or go on with a run. See train.py ALGORITHM --help for its options.",
        args=arguments,
    )
    command = shlex.join(["python", "train.py", *arguments])
    if isinstance(asked, Resume):
        return guarded("train.py", asked.debug, lambda: _resume(asked, command))
    return guarded("train.py", asked.run.debug, lambda: _start(arguments[0], asked, arguments, command))


def _start(algorithm: str, asked: Start[Any], arguments: Sequence[str], command: str) -> int:
    from agents.run import training

    values = dataclasses.asdict(asked.hyperparameter)
    try:
        config = REGISTRY[algorithm].Config(**values)
    except ValueError as error:
        raise UsageError(str(error)) from error
    origins = origins_of(values, preset_values(algorithm, asked.run.env), arguments)
    return training.start(algorithm, asked.run, config, origins, command)


def _resume(asked: Resume, command: str) -> int:
    from agents.run import training

    changes = {name: getattr(asked, name) for name in ("steps", "device", "threads")}
    typed = {name: value for name, value in changes.items() if value is not None}
    return training.resume(asked.run, typed, asked.quiet, command)


def origins_of(names: Iterable[str], preset: Container[str], arguments: Sequence[str]) -> dict[str, str]:
    """Tell where the value of each name came from: "flag", "preset" or "default"."""
    typed = {_option_name(argument) for argument in arguments if argument.startswith("--")}
    typed |= {name.removeprefix("no_") for name in typed}
    return {name: "flag" if name in typed else "preset" if name in preset else "default" for name in names}


def _subcommands(arguments: Sequence[str]) -> Any:
    """Give one subcommand per algorithm, its defaults those for the environment that the arguments name, and resume."""
    env_id = _value_of("env", arguments)
    starts = []
    for name, algorithm in REGISTRY.items():
        config = algorithm.Config.of({} if env_id is None else preset_values(name, env_id))
        unchecked = _without_checks(algorithm.Config)
        default = Start(RunOptions(env=tyro.MISSING), unchecked(**dataclasses.asdict(config)))
        summary = (algorithm.__doc__ or name).splitlines()[0]
        command = subcommand(name, default=default, description=summary)
        starts.append(Annotated[Start[unchecked], command])  # type: ignore[valid-type]
    return Union[(*starts, Annotated[Resume, subcommand("resume")])]


def _without_checks(config: type) -> type:
    """Take from config its checks, which run after parsing so that their sentence stands alone."""
    return type(config.__name__, (config,), {"__post_init__": lambda self: None})


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """Return the value that follows --option, or stands after its =; None if it is not among the arguments."""
    for position, argument in enumerate(arguments):
        if argument.startswith("--") and _option_name(argument) == option:
            return argument.partition("=")[2] or next(iter(arguments[position + 1 :]), None)
    return None


def _option_name(argument: str) -> str:
    return argument.removeprefix("--").partition("=")[0].replace("-", "_")


def evaluate(arguments: Sequence[str]) -> int:
    """Run evaluate.py with its arguments; returns the exit code."""
    from agents.run.assessment import Assessment, assess

    asked = tyro.cli(Assessment, prog="evaluate.py", description=Assessment.__doc__, args=arguments)
    return guarded("evaluate.py", asked.debug, lambda: assess(asked))
