"""Write docs/options.md from the Config classes: python docs/generate_options.py"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("options.md")
sys.path.insert(0, str(FILE.parents[1]))  # this checkout's agents, whichever is installed

from agents import REGISTRY  # noqa: E402
from agents.config import CommonConfig, allowed, preset_values  # noqa: E402
from agents.run.help import declared  # noqa: E402

HEAD = """# Options

Every hyperparameter of every algorithm. On the command line `target_kl` is `--target-kl`, a bool is `--name` or
`--no-name`, and a list is written with spaces. In Python they are keyword arguments:
`NPG("MlpPolicy", "Hopper-v5", target_kl=0.05)`. What wins: the command line, then the preset of the environment, then
the default. `python train.py npg --env Hopper-v5 --help` shows the values after the preset.

This page is written by `python docs/generate_options.py`.
"""


def written(value: Any) -> str:
    """Write a default as it is typed on the command line."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return str(value)


def rows(config: type[CommonConfig]) -> list[str]:
    """Give the table of the fields of a Config class and of those that nobody else inherits from, if there are any."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    meanings: dict[str, str] = {}
    for part in (config, *(base for base in ancestors(config) if is_own(base))):
        meanings = declared(part) | meanings
    lines = ["| option | default | allowed | meaning |", "|---|---|---|---|"] if meanings else []
    for name in (name for name in defaults if name in meanings):
        cells = (f"`{name}`", written(defaults[name]), _words(config.annotations()[name]), meanings[name])
        lines.append(" | ".join(["", *(cell.replace("|", "\\|") for cell in cells), ""]).strip())
    return lines


def _words(annotation: Any) -> str:
    return allowed(annotation).replace("'", "")


def ancestors(config: type[CommonConfig]) -> list[type[CommonConfig]]:
    """List the Config classes that a class inherits options from, the nearest first."""
    return [base for base in config.__mro__[1:] if issubclass(base, CommonConfig) and declared(base)]


def users(config: type[CommonConfig]) -> list[str]:
    """Name the algorithms that have a Config class's options."""
    return [name for name, agent in REGISTRY.items() if issubclass(agent.Config, config)]


def is_own(config: type[CommonConfig]) -> bool:
    """Say whether a Config class is a part of a single algorithm's."""
    return len(users(config)) == 1


def title(config: type[CommonConfig]) -> str:
    """Name a Config class's part of the page: after its algorithm, if it is one's own."""
    return next((name for name, agent in REGISTRY.items() if agent.Config is config), config.__name__)


def section(config: type[CommonConfig]) -> list[str]:
    """Write a Config class's part of the page."""
    name = title(config)
    lines = [f"## {name}", ""]
    if name not in REGISTRY:
        lines += [f"Of {', '.join(users(config))}.", ""]
    inherited = ", ".join(f"[{title(base)}](#{title(base).lower()})" for base in ancestors(config) if not is_own(base))
    table = [*rows(config), ""] if rows(config) else []
    if inherited:
        these = "Beside these, the options" if table else "The options"
        lines += [f"{these} of {inherited}; of equal names the nearest counts.", ""]
    return [*lines, *table, *presets(name)]


def presets(algorithm: str) -> list[str]:
    """Write an algorithm's presets."""
    files = sorted((FILE.parents[1] / "agents" / "presets").glob("*.yaml"))
    known = dict.fromkeys(env_id for file in files for env_id in yaml.safe_load(file.read_text(encoding="utf-8")))
    found = {env_id: values for env_id in known if (values := preset_values(algorithm, env_id))}
    lines = [f"| {env_id} | {_values(values)} |" for env_id, values in found.items()]
    return ["| preset | values |", "|---|---|", *lines, ""] if lines else []


def _values(preset: dict[str, Any]) -> str:
    return ", ".join(
        f"`{name}` {written(tuple(value) if isinstance(value, list) else value)}" for name, value in preset.items()
    )


def page() -> str:
    """Return the whole page."""
    configs = [agent.Config for agent in REGISTRY.values()]
    shared: list[type[CommonConfig]] = []
    for config in configs:
        found = (base for base in reversed(ancestors(config)) if not is_own(base))
        shared += [base for base in found if base not in shared and base not in configs]
    return "\n".join([HEAD, *(line for config in [*configs, *shared] for line in section(config))]).rstrip() + "\n"


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
