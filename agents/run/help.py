"""Options as people read them: in groups, in sentences that fill their lines, with examples at the end."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shutil
import textwrap
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, arg

from agents.config import CommonConfig

GROUPS = ("run", "environment", "policy", "direction", "update", "critic", "logging")
"""Headings of an algorithm's options, in their order."""
GROUP_OF_CLASS = {
    "Several": "run",
    "RunOptions": "run",
    "AgentConfig": "policy",
    "CommonConfig": "policy",
    "CurvatureConfig": "direction",
    "StepConfig": "direction",
    "CriticFitConfig": "critic",
    "AdvantageConfig": "critic",
}
"""Where options belong that are declared first in these; what an algorithm alone has is of its update."""
GROUP_OF_OPTION = {
    **dict.fromkeys(("env", "env_kwargs", "backend", "num_envs", "n_steps", "step_timeout"), "environment"),
    **dict.fromkeys(("executor", "workers", "ray_address"), "environment"),
    **dict.fromkeys(("policy", "log_std_min", "log_std_end"), "policy"),
    **dict.fromkeys(("gamma", "gamma_end", "gae_lambda", "value_network", "rbf_features"), "critic"),
    **dict.fromkeys(
        ("eval_every", "eval_episodes", "checkpoint_every", "disk_full", "runs", "name", "run_dir", "quiet", "debug"),
        "logging",
    ),
}
"""Options that belong elsewhere than what else is declared with them."""


def declared(kind: type) -> dict[str, str]:
    """Give the fields that a dataclass itself declares, with what is said of them."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    said = {}
    for declaration, text in zip(definition.body, [*definition.body[1:], None], strict=True):
        if isinstance(declaration, ast.AnnAssign) and isinstance(declaration.target, ast.Name):
            value = text.value.value if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) else ""
            said[declaration.target.id] = inspect.cleandoc(str(value)).replace("\n", " ")
    return said


def grouped(kinds: Iterable[type], defaults: Mapping[str, Any]) -> Any:
    """Make one type of the options of dataclasses, which tyro shows in groups; `flat` undoes it.

    Args:
        defaults: in place of the fields' own.
    """
    groups: dict[str, list[Any]] = {name: [] for name in GROUPS}
    for kind in kinds:
        first = _declaring(kind)
        for name, option in _options(kind, defaults).items():
            groups[GROUP_OF_OPTION.get(name, GROUP_OF_CLASS.get(first[name], "update"))].append((name, *option))
    parts = {name: dataclasses.make_dataclass(name, fields, kw_only=True) for name, fields in groups.items() if fields}
    unnamed: Any = OmitArgPrefixes
    return dataclasses.make_dataclass("Options", [(name, unnamed[part]) for name, part in parts.items()])


def flat(asked: Any) -> dict[str, Any]:
    """Give the values of all groups by their names."""
    parts = (getattr(asked, part.name) for part in dataclasses.fields(asked))
    return {field.name: getattr(part, field.name) for part in parts for field in dataclasses.fields(part)}


def parse(kind: Any, prog: str, description: str, words: Sequence[str], examples: Sequence[str]) -> Any:
    """Read words as a dataclass's options; help and errors exit, help with examples at its end."""
    try:
        return tyro.cli(kind, prog=prog, description=filled(description), args=words)
    except SystemExit as done:
        if not done.code and examples:
            print("\n".join(["examples:", *(f"  {example}" for example in examples)]))
        raise


def parse_one(kind: Any, prog: str, words: Sequence[str], examples: Sequence[str]) -> Any:
    """Read words as the options of a dataclass that has no groups."""
    fields = [(name, *option) for name, option in _options(kind, {}).items()]
    asked = parse(dataclasses.make_dataclass(kind.__name__, fields), prog, kind.__doc__ or "", words, examples)
    return kind(**{field.name: getattr(asked, field.name) for field in dataclasses.fields(kind)})


def _options(kind: type, defaults: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Give each field's type, with what is said of it on one line, and its default."""
    hints = typing.get_type_hints(kind, include_extras=True)
    said: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        said |= declared(base) if dataclasses.is_dataclass(base) else {}
    options = {}
    for field in dataclasses.fields(kind):
        default = defaults.get(field.name, field.default)
        kept = dataclasses.field(default=tyro.MISSING if default is dataclasses.MISSING else default)
        options[field.name] = Annotated[hints[field.name], arg(help=said[field.name])], kept
    return options


def _declaring(kind: type) -> dict[str, str]:
    """Name the class that declares each field first."""
    bases = [base for base in kind.__mro__ if dataclasses.is_dataclass(base) and base is not CommonConfig]
    order = [*bases, *([CommonConfig] if issubclass(kind, CommonConfig) else [])]
    found: dict[str, str] = {}
    for base in order:
        found |= dict.fromkeys(inspect.get_annotations(base), base.__name__)
    return found


def filled(text: str) -> str:
    """Break paragraphs where the terminal ends."""
    width, paragraphs = min(shutil.get_terminal_size().columns, 120), inspect.cleandoc(text).split("\n\n")
    # tyro joins lines that begin with a letter: those that follow begin with a space of no width.
    lines = (textwrap.wrap(" ".join(paragraph.split()), width) for paragraph in paragraphs)
    return "\n\n".join("\n\u200b".join(paragraph) for paragraph in lines)
