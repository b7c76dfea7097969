"""What people type, from its words to an exit code."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml
from tyro.conf import subcommand

import agents
from agents import REGISTRY
from agents.config import near, preset_values
from agents.run.commands import COMMANDS
from agents.run.errors import UsageError, guarded, one_line, refuse, unless_nobody_reads
from agents.run.help import filled, flat, grouped, parse, parse_one
from agents.run.jobs import Several, train_seeds
from agents.run.options import RunOptions
from agents.run.process import program, renderer_fault, show_plainly, typed, warn_in_sentences

WHOLE = re.compile(r"\d+(\.\d*)?[eE]\+?\d{1,2}")


def main(arguments: Sequence[str]) -> int:
    """Run geodesic-rl with its arguments; returns the exit code. Unknown options exit with 2."""
    show_plainly()
    warn_in_sentences()
    return unless_nobody_reads(lambda: _main(arguments))


def train(arguments: Sequence[str]) -> int:
    """Run train.py with its arguments: an algorithm and its options, or any command and its options."""
    return main(arguments if next(iter(arguments), None) in COMMANDS else ["train", *arguments])


def evaluate(arguments: Sequence[str]) -> int:
    """Run evaluate.py with its arguments."""
    return main(["evaluate", *arguments])


def _main(arguments: Sequence[str]) -> int:
    name, *rest = arguments or ["--help"]
    if name in COMMANDS and (fault := renderer_fault()) is not None:
        return refuse(program(name), f"error: {fault}", code=2)
    if name == "train":
        return _train(rest)
    if name in COMMANDS:
        return _command(name, rest)
    if name == "--version":
        print(agents.__version__)
        return 0
    if name.startswith("-"):
        summaries = {name: command.summary for name, command in COMMANDS.items()}
        _list(program(), f"{agents.__doc__.splitlines()[0]}\n\nSee {program()} COMMAND --help.", summaries, arguments)
    hint = f"; type {typed('train')} {name}." if name in REGISTRY else near(name, COMMANDS)
    return refuse(program(), f"error: There is no command {name!r}{hint}", code=2)


def _command(name: str, arguments: Sequence[str]) -> int:
    """Run a command that has one set of options."""
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    kind = getattr(module, command.options)
    examples = [f"{typed(name)} {example}" for example in command.examples]
    asked = parse_one(kind, program(name), _whole_numbers(arguments, kind), examples)
    words = f"{typed(name)} {shlex.join(arguments)}"
    return guarded(program(name), asked.debug, lambda: getattr(module, command.action)(asked, words))


def _train(arguments: Sequence[str]) -> int:
    first = next(iter(arguments), "--help")
    if first in REGISTRY:
        kinds, env_id = (RunOptions, Several, REGISTRY[first].Config), _value_of("env", arguments)
        try:
            config = kinds[2].of({} if env_id is None else preset_of(first, env_id, _value_of("preset", arguments)))
        except UsageError as error:
            return refuse(program("train"), f"error: {error}", code=error.exit_code)
        kind = grouped(kinds, dataclasses.asdict(config))
        words, prog = _whole_numbers(arguments[1:], *kinds), f"{program('train')} {first}"
        examples = [f"{typed('train')} {example.format(first)}" for example in COMMANDS["train"].examples]
        asked = flat(parse(kind, prog, _summary(first), words, examples))
        run, several, values = ({field.name: asked[field.name] for field in dataclasses.fields(kind)} for kind in kinds)
        options, many = RunOptions(**run), Several(**several)
        return guarded(program("train"), options.debug, lambda: _start(options, many, values, arguments))
    if first.startswith("-"):
        description = f"{COMMANDS['train'].summary}\n\nSee {program('train')} ALGORITHM --help for its options."
        if program("train") == "train.py":
            description += f" It takes the other commands too: {', '.join(sorted(COMMANDS.keys() - {'train'}))}."
        _list(program("train"), description, {name: _summary(name) for name in REGISTRY}, arguments)
    names = [*REGISTRY, *(name for name in COMMANDS if program("train") == "train.py")]
    return refuse(program("train"), f"error: There is no {first!r}{near(first, names)}", code=2)


def _list(prog: str, description: str, summaries: Mapping[str, str], arguments: Sequence[str]) -> None:
    """Exit with the help that lists subcommands."""
    subcommands = [Annotated[_Nothing, subcommand(name, description=said)] for name, said in summaries.items()]
    listed: Any = reduce(or_, subcommands)
    tyro.cli(listed, prog=prog, description=filled(description), args=arguments)


@dataclass(frozen=True)
class _Nothing:
    """A subcommand that is only listed."""


def _start(run: RunOptions, several: Several, values: dict[str, Any], arguments: Sequence[str]) -> int:
    """Train as typed: the algorithm's name and its options."""
    from agents.run import training
    from agents.run.initial import Initial

    algorithm, kind = arguments[0], REGISTRY[arguments[0]]
    origins = origins_of(values, preset_of(algorithm, run.env, run.preset), arguments)
    if run.init_from is not None:
        initial = Initial.of(run.init_from)
        policy = run.policy or initial.policy(kind)
        run = dataclasses.replace(run, policy=policy)
        shape = {name: x for name, x in initial.shape(kind, policy).items() if origins[name] != "flag"}
        values, origins = values | shape, origins | dict.fromkeys(shape, "file")
    try:
        config = kind.Config(**values)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if several.seeds is None:
        if several.jobs is not None:
            raise UsageError("--jobs is for several runs; give --seeds too.")
        return training.start(algorithm, run, config, origins, f"{typed('train')} {shlex.join(arguments)}")
    own = _without(arguments[1:], {"seeds", "jobs", "seed"})

    def again(first: int, count: int) -> str:
        at_once = "" if several.jobs is None else f" --jobs {several.jobs}"
        return f"{typed('train')} {shlex.join([algorithm, *own])} --seed {first} --seeds {count}{at_once}"

    return train_seeds(algorithm, run, several, own, again)


def preset_of(algorithm: str, env_id: str, file: str | None) -> dict[str, Any]:
    """Give the values that the package's presets have for an environment, or those that a file of presets has; "none"
    has none.

    Raises:
        UsageError: the file has none for it, or they are no hyperparameters of the algorithm.
    """
    if file is None:
        return preset_values(algorithm, env_id)
    if file == "none":
        return {}
    try:
        values = dict(yaml.safe_load(Path(file).read_text())[env_id])
        REGISTRY[algorithm].Config.of(values)
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"--preset is {file}, which holds no preset of {algorithm} for {env_id} ({one_line(error)}); tune writes "
            "such files."
        ) from error
    return values


def origins_of(names: Iterable[str], preset: Container[str], arguments: Sequence[str]) -> dict[str, str]:
    """Tell where the value of each name came from: "flag", "preset" or "default"."""
    typed = {_option_name(argument) for argument in arguments if argument.startswith("--")}
    typed |= {name.removeprefix("no_") for name in typed}
    return {name: "flag" if name in typed else "preset" if name in preset else "default" for name in names}


def _summary(name: str) -> str:
    return (REGISTRY[name].__doc__ or name).splitlines()[0]


def _whole_numbers(arguments: Sequence[str], *kinds: type) -> list[str]:
    """Write numbers such as 1e6 out, where an option is no text: integers are read in digits only."""
    texts = {"", *(field.name for kind in kinds for field in dataclasses.fields(kind) if "str" in str(field.type))}
    written, option = [], ""
    for argument in arguments:
        head, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
        if argument.startswith("--"):
            option = _option_name(argument)
        if option not in texts and WHOLE.fullmatch(value) and float(value).is_integer():
            value = str(int(float(value)))
        written.append(head + equals + value)
    return written


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
