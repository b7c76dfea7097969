"""The two commands that people type, from their arguments to an exit code."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar, Union

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg, subcommand

from agents import REGISTRY
from agents.config import near, preset_values
from agents.run import process
from agents.run.errors import UsageError, guarded, unless_nobody_reads
from agents.run.options import Flag, RunOptions
from agents.run.process import program

C = TypeVar("C")
TEXTS = {field.name for field in dataclasses.fields(RunOptions) if "str" in str(field.type)}
"""Options that may look like a number and are none."""
WHOLE = re.compile(r"\d+(\.\d*)?[eE]\+?\d{1,2}")


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
    return unless_nobody_reads(lambda: _train(arguments))


def _train(arguments: Sequence[str]) -> int:
    first = next(iter(arguments), "--help")
    if first in REGISTRY:
        kind, default = _start_of(first, arguments)
        typed = _whole_numbers(arguments[1:])
        asked = tyro.cli(
            kind, prog=f"{program('train')} {first}", default=default, description=_summary(first), args=typed
        )
        command = f"{process.typed('train')} {shlex.join(arguments)}"
        return guarded(program("train"), asked.run.debug, lambda: _start(first, asked, arguments, command))
    if first == "resume":
        typed = _whole_numbers(arguments[1:])
        resumed = tyro.cli(Resume, prog=f"{program('train')} resume", description=Resume.__doc__, args=typed)
        command = f"{process.typed('train')} {shlex.join(arguments)}"
        return guarded(program("train"), resumed.debug, lambda: _resume(resumed, command))
    if first.startswith("-"):
        algorithms = [Annotated[_Nothing, subcommand(name, description=_summary(name))] for name in REGISTRY]
        resume = Annotated[_Nothing, subcommand("resume", description=Resume.__doc__)]
        description = f"Train an agent, or go on with a run. See {program('train')} ALGORITHM --help for its options."
        listed: Any = Union[(*algorithms, resume)]
        tyro.cli(listed, prog=program("train"), description=description, args=arguments)
    print(f"{program('train')}: error: There is no {first!r}{near(first, [*REGISTRY, 'resume'])}", file=sys.stderr)
    return 2


@dataclass(frozen=True)
class _Nothing:
    """A subcommand that is only listed."""


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


def _start_of(name: str, arguments: Sequence[str]) -> tuple[Any, Any]:
    """Give an algorithm's options as tyro takes them: their type, and their defaults for the environment that the
    arguments name.
    """
    algorithm, env_id = REGISTRY[name], _value_of("env", arguments)
    config = algorithm.Config() if env_id is None else algorithm.Config.of(preset_values(name, env_id))
    unchecked = _without_checks(algorithm.Config)
    default = Start(RunOptions(env=tyro.MISSING), unchecked(**dataclasses.asdict(config)))
    return Start[unchecked], default  # type: ignore[valid-type]


def _summary(name: str) -> str:
    return (REGISTRY[name].__doc__ or name).splitlines()[0]


def _whole_numbers(arguments: Sequence[str]) -> list[str]:
    """Write numbers such as 1e6 out, where an option is no text: integers are read in digits only."""
    written, option = [], ""
    for argument in arguments:
        head, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
        if argument.startswith("--"):
            option = _option_name(argument)
        if option not in TEXTS and WHOLE.fullmatch(value) and float(value).is_integer():
            value = str(int(float(value)))
        written.append(head + equals + value)
    return written


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

    def run() -> int:
        asked = tyro.cli(Assessment, prog=program("evaluate"), description=Assessment.__doc__, args=arguments)
        return guarded(program("evaluate"), asked.debug, lambda: assess(asked))

    return unless_nobody_reads(run)
