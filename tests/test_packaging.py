"""The wheel holds the packages agents and envs with their presets, and nothing else."""

import importlib
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import agents

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel_members(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a wheel that is built from a copy of the sources, as building leaves files beside them."""
    source = tmp_path_factory.mktemp("source")
    for folder in ("agents", "envs", "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "train.py", "evaluate.py"):
        shutil.copy(ROOT / name, source)
    build = "import setuptools.build_meta as backend; backend.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = (source / "dist").glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_exactly_the_packages(wheel_members: set[str]) -> None:
    sources = {
        str(file.relative_to(ROOT))
        for folder in ("agents", "envs")
        for pattern in ("*.py", "*.yaml", "py.typed")
        for file in (ROOT / folder).rglob(pattern)
    }
    assert {name for name in wheel_members if ".dist-info/" not in name} == sources


def test_the_wheel_has_a_command(wheel_members: set[str]) -> None:
    assert any(name.endswith("entry_points.txt") for name in wheel_members)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts["geodesic-rl"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("words", [["train", "npg", "--help"], ["evaluate", "--help"], ["adapt", "--help"]])
def test_the_command_names_itself(words: list[str]) -> None:
    command = [sys.executable, "-m", "agents.run", *words]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0
    assert shown.stdout.startswith(f"usage: python -m agents.run {' '.join(words[:-1])} ")


def test_the_package_says_its_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert agents.__version__ == project["version"]


def test_the_license_travels_along(wheel_members: set[str]) -> None:
    assert any(name.endswith("licenses/LICENSE") for name in wheel_members)


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    named = {dependency.split(">=")[0].lower() for group in groups for dependency in group}
    assert named <= pinned
