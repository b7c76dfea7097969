"""What people type, from its words to an exit code."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Annotated, Any, Generic, TypeVar

import tyro
from tyro.conf import OmitArgPrefixes, subcommand

import agents
from agents import REGISTRY
from agents.config import near, preset_values
from agents.run.commands import COMMANDS
from agents.run.errors import UsageError, guarded, unless_nobody_reads
from agents.run.jobs import Several, train_seeds
from agents.run.options import RunOptions
from agents.run.process import program, typed

C = TypeVar("C")
TEXTS = {field.name for field in dataclasses.fields(RunOptions) if "str" in str(field.type)}
"""Options that may look like a number and are none."""
WHOLE = re.compile(r"\d+(\.\d*)?[eE]\+?\d{1,2}")


@dataclass(frozen=True)
class Start(Generic[C]):
    """An algorithm's subcommand."""

    run: OmitArgPrefixes[RunOptions]
    several: OmitArgPrefixes[Several]
    hyperparameter: OmitArgPrefixes[C]


def main(arguments: Sequence[str]) -> int:
    """Run geodesic-rl with its arguments; returns the exit code. Unknown options exit with 2."""
    return unless_nobody_reads(lambda: _main(arguments))


def train(arguments: Sequence[str]) -> int:
    """Run train.py with its arguments: an algorithm and its options, or any command and its options."""
    return main(arguments if next(iter(arguments), None) in COMMANDS else ["train", *arguments])


def evaluate(arguments: Sequence[str]) -> int:
    """Run evaluate.py with its arguments."""
    return main(["evaluate", *arguments])


def _main(arguments: Sequence[str]) -> int:
    name, *rest = arguments or ["--help"]
    if name == "train":
        return _train(rest)
    if name in COMMANDS:
        return _command(name, rest)
    if name == "--version":
        print(agents.__version__)
        return 0
    if name.startswith("-"):
        summaries = {name: command.summary for name, command in COMMANDS.items()}
        _list(program(), f"{agents.__doc__.splitlines()[0]} See {program()} COMMAND --help.", summaries, arguments)
    hint = f"; type {typed('train')} {name}." if name in REGISTRY else near(name, COMMANDS)
    print(f"{program()}: error: There is no command {name!r}{hint}", file=sys.stderr)
    return 2


def _command(name: str, arguments: Sequence[str]) -> int:
    """Run a command that has one set of options."""
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    kind, words = getattr(module, command.options), _whole_numbers(arguments)
    asked = tyro.cli(kind, prog=program(name), description=kind.__doc__, args=words)
    typed_ = f"{typed(name)} {shlex.join(arguments)}"
    return guarded(program(name), asked.debug, lambda: getattr(module, command.action)(asked, typed_))


def _train(arguments: Sequence[str]) -> int:
    first = next(iter(arguments), "--help")
    if first in REGISTRY:
        kind, default = _start_of(first, arguments)
        words, prog = _whole_numbers(arguments[1:]), f"{program('train')} {first}"
        asked = tyro.cli(kind, prog=prog, default=default, description=_summary(first), args=words)
        command = f"{typed('train')} {shlex.join(arguments)}"
        return guarded(program("train"), asked.run.debug, lambda: _start(first, asked, arguments, command))
    if first.startswith("-"):
        description = f"{COMMANDS['train'].summary} See {program('train')} ALGORITHM --help for its options."
        _list(program("train"), description, {name: _summary(name) for name in REGISTRY}, arguments)
    names = [*REGISTRY, *(name for name in COMMANDS if program("train") == "train.py")]
    print(f"{program('train')}: error: There is no {first!r}{near(first, names)}", file=sys.stderr)
    return 2


def _list(prog: str, description: str, summaries: Mapping[str, str], arguments: Sequence[str]) -> None:
    """Exit with the help that lists subcommands."""
    subcommands = [Annotated[_Nothing, subcommand(name, description=said)] for name, said in summaries.items()]
    listed: Any = reduce(or_, subcommands)
    tyro.cli(listed, prog=prog, description=description, args=arguments)


@dataclass(frozen=True)
class _Nothing:
    """A subcommand that is only listed."""


def _start(algorithm: str, asked: Start[Any], arguments: Sequence[str], command: str) -> int:
    from agents.run import training
    from agents.run.initial import Initial

    values, kind = dataclasses.asdict(asked.hyperparameter), REGISTRY[algorithm]
    origins = origins_of(values, preset_values(algorithm, asked.run.env), arguments)
    if asked.run.init_from is not None:
        initial = Initial.of(asked.run.init_from)
        policy = asked.run.policy or initial.policy(kind)
        asked = dataclasses.replace(asked, run=dataclasses.replace(asked.run, policy=policy))
        shape = {name: x for name, x in initial.shape(kind, policy).items() if origins[name] != "flag"}
        values, origins = values | shape, origins | dict.fromkeys(shape, "file")
    try:
        config = kind.Config(**values)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if asked.several.seeds is None:
        if asked.several.jobs is not None:
            raise UsageError("--jobs is for several runs; give --seeds too.")
        return training.start(algorithm, asked.run, config, origins, command)
    own = _without(arguments[1:], {"seeds", "jobs", "seed"})

    def again(first: int, count: int) -> str:
        at_once = "" if asked.several.jobs is None else f" --jobs {asked.several.jobs}"
        return f"{typed('train')} {shlex.join([algorithm, *own])} --seed {first} --seeds {count}{at_once}"

    return train_seeds(algorithm, asked.run, asked.several, own, again)


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
    default = Start(RunOptions(env=tyro.MISSING), Several(), unchecked(**dataclasses.asdict(config)))
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


def _without(arguments: Sequence[str], options: Container[str]) -> list[str]:
    """Leave options out that have one value, and their values."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument.startswith("--") and _option_name(argument) in options:
            skip = "=" not in argument
        else:
            kept.append(argument)
    return kept


def _option_name(argument: str) -> str:
    return argument.removeprefix("--").partition("=")[0].replace("-", "_")
