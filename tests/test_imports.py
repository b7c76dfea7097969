"""Imports go down only, without a circle: envs <- policy <- rollout <- the subjects <- base <- algorithms <- run."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from agents import REGISTRY

ROOT = Path(__file__).parents[1]
FILES = sorted(
    file.relative_to(ROOT)
    for file in (*(ROOT / "agents").rglob("*.py"), *(ROOT / "envs").rglob("*.py"), *ROOT.glob("*.py"))
)
ALGORITHMS = tuple(sorted({algorithm.__module__ for algorithm in REGISTRY.values()}))
SUBJECTS = ("agents.optim", "agents.natural", "agents.evolution", "agents.adaptation")

FLOORS: tuple[tuple[str, ...], ...] = (
    ("envs",),
    ("agents.noise", "agents.config", "agents.devices", "agents.failures", "agents.checkpoint", "agents.presets"),
    ("agents.policy",),
    ("agents.cluster",),
    ("agents.rollout",),
    SUBJECTS,
    ("agents.saving",),
    ("agents.base",),
    ALGORITHMS,
    ("agents", "agents.registry"),
    ("agents.run",),
    ("train", "evaluate"),
)
"""From the ground up; a module stands on the floor of the longest name here that it begins with."""

CONTRACT = ("envs.vector", "envs.infos", "envs.sb3")
"""What rooms may know of environments: the contract, and infos as callbacks see them."""

KNOWS_NOTHING_OF: dict[str, tuple[str, ...]] = {
    "envs": ("agents",),
    "agents.policy": ("envs",),
    "agents.optim": ("stable_baselines3", "gymnasium", "envs", "agents.policy", "agents.rollout", "agents.noise"),
    "agents.natural": ("stable_baselines3", "gymnasium", "envs", "agents.rollout"),
    "agents.evolution": ("stable_baselines3",),
    "agents.adaptation": ("stable_baselines3",),
    "agents.rollout": ("gymnasium",),
    "agents.saving": ALGORITHMS,
}


def module_of(file: Path) -> str:
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(file): file for file in FILES}


def imports_of(source: str, package: str) -> set[str]:
    """Every module that source imports, wherever the statement stands; `from a import b` counts as a and a.b, or as
    a.b alone where that is one of ours."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: -node.level or None]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= names if names <= MODULES.keys() else {module, *names}
    return found


def is_in(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def floor_of(module: str) -> int | None:
    names = [(len(name), floor) for floor, rooms in enumerate(FLOORS) for name in rooms if is_in(module, name)]
    return max(names)[1] if names else None


def room_of(module: str) -> str:
    return max((name for rooms in FLOORS for name in rooms if is_in(module, name)), key=len)


def forbidden(importer: str, imported: str) -> str | None:
    """The rule that importer breaks by importing imported, or None."""
    here, there = floor_of(importer), floor_of(imported)
    if here is not None and there is not None and there > here:
        return f"{imported} stands above {importer}"
    for room, strangers in KNOWS_NOTHING_OF.items():
        if is_in(importer, room) and is_in(imported, *strangers):
            return f"{room} knows nothing of {imported}"
    if is_in(importer, "agents.rollout", *SUBJECTS) and is_in(imported, "envs") and not is_in(imported, *CONTRACT):
        return "rooms import only the contract of environments"
    if importer in ALGORITHMS and is_in(imported, *ALGORITHMS) and importer != imported:
        return "algorithms never import each other"
    if is_in(imported, *ALGORITHMS) and importer not in ("agents.registry", *ALGORITHMS):
        return "algorithms are reached through the registry"
    other_subject = is_in(importer, *SUBJECTS) and is_in(imported, *SUBJECTS) and room_of(importer) != room_of(imported)
    if other_subject and not is_in(imported, "agents.natural.scores", "agents.optim"):
        return "subjects meet only in scores and optim"
    return None


def graph() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports."""
    return {
        module: {name for name in imports_of((ROOT / file).read_text(), module) if name in MODULES and name != module}
        for module, file in MODULES.items()
    }


def circles(edges: Mapping[str, set[str]]) -> Iterator[list[str]]:
    """The shortest circle through each module that is in one."""
    for start in edges:
        paths, seen = [[start]], {start}
        while paths:
            path = paths.pop(0)
            for name in sorted(edges[path[-1]]):
                if name == start:
                    yield [*path, start]
                    paths = []
                    break
                if name not in seen:
                    seen.add(name)
                    paths.append([*path, name])


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_go_down(file: Path) -> None:
    importer = module_of(file)
    broken = {imported: forbidden(importer, imported) for imported in imports_of((ROOT / file).read_text(), importer)}
    assert {imported: rule for imported, rule in broken.items() if rule} == {}


def test_there_is_no_circle() -> None:
    assert list(circles(graph())) == []


def test_the_walk_sees_every_file_every_kind_of_import_and_every_circle() -> None:
    assert {"agents.run.cli", "agents.npg", "envs.vector", "train"} <= set(MODULES)
    source = "import a.b\nfrom c import d\ndef f():\n    from e.f import g as h\n"
    assert imports_of(source, "x") == {"a.b", "c", "c.d", "e.f", "e.f.g"}
    assert "envs.vector" in graph()["envs.sb3"]
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == [["b", "c", "b"], ["c", "b", "c"]]


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("envs.sb3", "agents.base"),
        ("agents.natural.curvature", "gymnasium.spaces"),
        ("agents.natural.curvature", "envs.vector"),
        ("agents.natural.curvature", "agents.evolution.engine"),
        ("agents.policy.critic", "agents.natural.scores"),
        ("agents.rollout.collector", "envs.mujoco"),
        ("agents.saving", "agents.base"),
        ("agents.base", "agents.run.folder"),
        ("agents.run.training", "agents.npg"),
        ("agents.npg", "agents.pes"),
        ("agents.npg", "agents.run.log"),
        ("agents.npg", "agents"),
    ],
)
def test_each_rule_is_held(importer: str, imported: str) -> None:
    assert forbidden(importer, imported)


def test_importing_agents_and_training_leave_out_what_only_some_runs_use(tmp_path: Path) -> None:
    names = {"mujoco", "matplotlib", "pandas", "scipy", "tyro", "imageio"}
    sizes = {"steps": 8, "num-envs": 2, "n-steps": 4, "net-arch": 4, "eval-episodes": 2}
    words = [
        "npg",
        "--env",
        "Hopper-v5",
        "--quiet",
        "--run-dir",
        str(tmp_path / "run"),
        *(f"--{name}={size}" for name, size in sizes.items()),
    ]
    script = f"""
import sys
from agents import REGISTRY
imported = sorted(sys.modules.keys() & {names!r})
from agents.run import cli
cli.train({words!r})
print(imported, sorted(sys.modules.keys() & {{"scipy.stats", "sympy", "pandas", "moviepy"}}))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] []"
