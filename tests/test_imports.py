"""Imports go one way: envs <- rollout, direction, policy <- base <- algorithms <- run <- the two scripts."""

import ast
import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from agents import REGISTRY

ROOT = Path(__file__).parents[1]
FILES = sorted(
    file.relative_to(ROOT)
    for file in (*(ROOT / "agents").rglob("*.py"), *(ROOT / "envs").rglob("*.py"), *ROOT.glob("*.py"))
)
ALGORITHMS = {algorithm.__module__ for algorithm in REGISTRY.values()}


def module_of(file: Path) -> str:
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


def imports_of(source: str, package: str) -> set[str]:
    """Every module that source imports, wherever the statement stands; `from a import b` counts as a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: -node.level or None]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def is_in(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def forbidden(importer: str, imported: str) -> str | None:
    """The rule that importer breaks by importing imported, or None."""
    if is_in(importer, "envs") and is_in(imported, "agents"):
        return "envs knows nothing of agents"
    if is_in(importer, "agents.direction") and is_in(imported, "stable_baselines3", "gymnasium", "envs"):
        return "direction knows nothing of Stable-Baselines3 or environments"
    if is_in(importer, "agents.rollout") and is_in(imported, "envs") and not is_in(imported, "envs.vector"):
        return "rollout imports only the contract of environments"
    if importer in ALGORITHMS and is_in(imported, *(ALGORITHMS - {importer})):
        return "algorithms never import each other"
    if is_in(imported, *ALGORITHMS) and importer != "agents" and importer not in ALGORITHMS:
        return "algorithms are reached through the registry"
    if is_in(imported, "agents.run") and not is_in(importer, "agents.run", "train", "evaluate"):
        return "nothing but the two scripts imports run"
    return None


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_go_one_way(file: Path) -> None:
    importer = module_of(file)
    broken = {imported: forbidden(importer, imported) for imported in imports_of((ROOT / file).read_text(), importer)}
    assert {imported: rule for imported, rule in broken.items() if rule} == {}


def test_the_walk_sees_every_file_and_every_kind_of_import() -> None:
    assert {"agents.run.cli", "agents.npg", "envs.vector", "train"} <= {module_of(file) for file in FILES}
    source = "import a.b\nfrom c import d\ndef f():\n    from e.f import g as h\n"
    assert imports_of(source, "x") == {"a.b", "c", "c.d", "e.f", "e.f.g"}


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("envs.sb3", "agents.base"),
        ("agents.direction.fisher", "gymnasium.spaces"),
        ("agents.direction.fisher", "envs.vector"),
        ("agents.rollout.collect", "envs.sb3"),
        ("agents.base", "agents.run.folder"),
        ("agents.run.training", "agents.npg"),
        ("agents.npg", "agents.run.log"),
    ],
)
def test_each_rule_is_held(importer: str, imported: str) -> None:
    assert forbidden(importer, imported)


def test_importing_agents_leaves_out_what_only_some_runs_use() -> None:
    names = ("mujoco", "matplotlib", "pandas", "scipy", "tyro", "imageio")
    script = f"import sys, agents; print(sorted(sys.modules.keys() & {set(names)!r}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_the_memory_of_freed_tensors_is_not_given_back_to_the_system() -> None:
    # glibc's own functions: where tensors lie depends on what else a process allocates.
    script = """
import ctypes, resource, sys
if sys.argv[1:]:
    import agents
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(8 << 20) for _ in range(12)]
    for block in blocks:
        ctypes.memset(block, 1, 8 << 20)
    for block in blocks:
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""
    without, with_agents = (
        int(
            subprocess.run(
                [sys.executable, "-c", script, *importing], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout
        )
        for importing in ([], ["agents"])
    )
    assert with_agents < 100 < 10_000 < without
