"""Configurations and command lines that are malformed: each must be refused in words, or be possible after all."""

from __future__ import annotations

import dataclasses
import importlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from agents import REGISTRY
from agents.run.commands import COMMANDS
from agents.run.jobs import Several
from agents.run.options import RunOptions
from tests.campaign.watch import CANARY, Case

ODD = (
    "", " ", "-1", "0", "-0.0", "nan", "inf", "-inf", "1e400", "1e-400", "9" * 25, "x", "None", "null", "true", "[]",
    "[1",
    "{}", "0x10", "1.5", "1_", "é", "\ud800", "a\nb", "../..", "/", "/dev/null", "/proc/self/mem", "a" * 300, "--",
    "-", "=",
    "!!python/object/apply:os.system ['touch " + str(CANARY) + "']", "$(touch " + str(CANARY) + ")", "%s%n", "\x1b[31m",
)  # fmt: skip
ENVIRONMENTS = (
    "Nothing-v0", "hopper-v5", "Hopper", "Hopper-v99", "Hopper-v4", ".:x", ":", "a:b-v0", "os:system",
    "planted.payload:Evil-v0",
    "ALE/Pong-v5", "GymV21Environment-v0", "GymV26Environment-v0", "families/Nothing-v0", "probes/", "FrozenLake-v1",
    "Blackjack-v1",
    "CarRacing-v3", "tests.campaign:x-v0",
)  # fmt: skip
ARGUMENTS = (
    "seed=1", "num_envs=5", "backend=gymnasium", "autoreset=disabled", "frame_skip=0", "frame_skip=-3",
    "reset_noise_scale=x",
    "reset_noise_scale=nan", "xml_file=/etc/passwd", "xml_file=nothing.xml", "xml_file=/", "=", "=1", "a", "a b=1",
    "a=[", "a=" + "[" * 3000,
    "render_mode=human", "render_mode=x", "healthy_z_range=3", "a=!!python/object/apply:os.system ['x']", "id=3",
    "max_episode_steps=0",
    "max_episode_steps=-1", "contact_cost_weight=1", "nothing=1", "self=1", "kwargs={}",
    "render_mode=planted.payload:x",
)  # fmt: skip
LONG = {
    "steps",
    "minutes",
    "eval_episodes",
    "episodes",
    "trials",
    "video_episodes",
    "tasks",
    "rollouts",
    "updates",
    "jobs",
    "seeds",
}
"""What a large number of is a long run that somebody may want."""
SMALL = ["--num-envs", "4", "--steps", "8", "--eval-episodes", "1", "--quiet", "--device", "cpu", "--threads", "1"]


def cases(count: int, chance: random.Random, runs: dict[str, Path], scratch: Path) -> list[Case]:
    """Plan so many: two of five are configurations."""
    planned = []
    for _ in range(count):
        kind = "a configuration" if chance.random() < 0.4 else "a command line"
        source = chance.choice(list(runs))
        planned.append(Case(f"{kind}, {source}", chance.getrandbits(64), lambda case: prepare(case, runs, scratch)))
    return planned


def prepare(case: Case, runs: dict[str, Path], scratch: Path) -> tuple[list[str], Callable[[], bool]]:
    """Write the files of a case; gives what is typed."""
    kind, source = case.name.split(", ")[:2]
    chance = random.Random(case.seed)
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(runs[source], scratch / "run")
    if kind == "a configuration":
        way = chance.choice(CONFIGURATIONS)
        file = scratch / "run" / "config.yaml"
        file.write_bytes(way(file.read_text(), chance))
        words = ["resume", str(scratch / "run"), "--quiet"]
        case.name = f"{kind}, {source}, {way.__name__}"
    else:
        words = typed(chance, source, scratch)
        case.name = f"{kind}, {' '.join(words)[:300]!r}"
    return words, lambda: False


# Configurations ------------------------------------------------------------------------------------------------------


def another_value(text: str, chance: random.Random) -> bytes:
    """Put something odd in a field's place."""
    config: Any = yaml.safe_load(text)
    holder = config if chance.random() < 0.2 else config[chance.choice(("run", "run", "config", "config", "origins"))]
    name = chance.choice([name for name in holder if name not in ("steps", "minutes", "eval_episodes")])
    values = (
        None, -1, 0, 1.5, 10**25, float("nan"), float("inf"), "", "x", "\0", [], {}, [[]], {"a": None}, True,
        "a" * 10_000,
        "../..", [10**6] * 3, ["a=1"], [None], [{"a": 1}], "planted.payload:Evil-v0",
    )  # fmt: skip
    holder[name] = chance.choice(values)
    if chance.random() < 0.15:
        del holder[name]
    elif chance.random() < 0.1:
        holder["nothing" + name] = 3
    return yaml.safe_dump(config, sort_keys=False).encode()


def another_text(text: str, chance: random.Random) -> bytes:
    """Write something that is not YAML, or YAML that does something."""
    call = f"!!python/object/apply:os.system ['touch {CANARY}']"
    aliases = "a0: &a0 [x, x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    texts = (
        "", "\0", "[]", "3", "run:", "run: 3", "run: []", "- run", "\t", "%YAML 9.9\n---\n{}", "--- a\n--- b",
        "[" * 5000,
        "{" * 5000, "? " * 5000, "- " * 5000, "&a [*a]", aliases, text + aliases, f"{call}\n", text.replace("npg",
        call, 1),
        f"run: {call}", "!!binary x", "a: !!timestamp x", "run: {<<: *x}", text + text, text.replace(": ", ":"), "a: '",
        text + "#" * 2**20, "!!set {a}", "9" * 5000, "run: {steps: " + "9" * 5000 + "}", text.replace("\n", "\r"),
        text.upper(),
    )  # fmt: skip
    return chance.choice(texts).encode()


def other_bytes(text: str, chance: random.Random) -> bytes:
    """Flip, cut, or encode otherwise."""
    data = bytearray(text.encode())
    for _ in range(chance.choice((1, 3, 20))):
        data[chance.randrange(len(data))] = chance.randrange(256)
    whole = text.encode("utf-16") if chance.random() < 0.1 else bytes(data)
    return whole[: chance.randrange(len(whole))] if chance.random() < 0.3 else whole


CONFIGURATIONS = (another_value, another_value, another_value, another_text, other_bytes)


# Command lines -------------------------------------------------------------------------------------------------------


def typed(chance: random.Random, source: str, scratch: Path) -> list[str]:
    """Type a command whose words are good but for one or two."""
    command = chance.choice(["train"] * 5 + ["evaluate", "evaluate", "resume", *COMMANDS, "nothing"])
    run, new = str(scratch / "run"), str(scratch / "new")
    if command == "train":
        name = chance.choice(list(REGISTRY))
        words = [
            "train",
            name,
            "--env",
            chance.choice(("Hopper-v5", "CartPole-v1")),
            "--run-dir",
            new,
            *SMALL,
            "--n-steps",
            "8",
        ]
        options = [
            option.name for kind in (RunOptions, Several, REGISTRY[name].Config) for option in dataclasses.fields(kind)
        ]
    elif command == "nothing":
        return [chance.choice((*ODD, "trian", "Train", "npg", "-h-", "--nothing")), *chance.sample(ODD, 2)]
    else:
        good = {
            "evaluate": [run, "--episodes", "1"], "resume": [run], "export": [run, str(scratch / "out.safetensors")],
            "compare": [run], "adapt": [run], "runs": [str(scratch)], "tune": ["npg", "--env", "Nothing-v0"],
        }  # fmt: skip
        if command == "selftest":
            return ["selftest", chance.choice(ODD), "--env", "Nothing-v0"]
        words = [command, *good.get(command, [])]
        kind = getattr(importlib.import_module(COMMANDS[command].module), COMMANDS[command].options)
        options = [option.name for option in dataclasses.fields(kind)]
    options = [name for name in options if name not in ("debug", "yes", "remove", "run_dir")]
    for _ in range(chance.choice((1, 1, 1, 2))):
        name = chance.choice(options)
        if chance.random() < 0.15:
            name = chance.choice(("env", "env_kwargs")) if "env" in options else name
        odd = {"env": ENVIRONMENTS, "env_kwargs": ARGUMENTS}.get(name, ODD)
        value = chance.choice(odd)
        if name in LONG and value in ("9" * 25, "1e400", "inf", "true", "0x10", "1_"):
            value = "-3"
        option = "--" + name.replace("_", "-")
        ways = ([option, value], [f"{option}={value}"], [option], [option[:-1] + "x", value], [option, value, value])
        words += chance.choices(ways, (8, 2, 1, 1, 1))[0]
    return words
