"""The wheel holds the packages agents and envs with their presets, nothing else, and works where it is installed."""

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import agents

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The source distribution, of a copy of the sources, as building leaves files beside them, and its wheel."""
    source = tmp_path_factory.mktemp("source")
    for folder in ("agents", "envs", "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "train.py", "evaluate.py"):
        shutil.copy(ROOT / name, source)
    build(source, "sdist")
    (sdist,) = (source / "dist").glob("*.tar.gz")
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (root,) = unpacked.iterdir()
    build(root, "wheel")
    (wheel,) = (root / "dist").glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


def build(source: Path, kind: str) -> None:
    script = f"import setuptools.build_meta as backend; backend.build_{kind}('dist')"
    subprocess.run([sys.executable, "-c", script], cwd=source, check=True, capture_output=True, timeout=120)


@pytest.fixture(scope="module")
def wheel_members(built: dict[str, Path]) -> set[str]:
    return set(zipfile.ZipFile(built["wheel"]).namelist())


@pytest.fixture(scope="module")
def fresh(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder bin of an environment that has the wheel, and of this environment only what it depends on."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(built["wheel"])], check=True, timeout=120)
    (site,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file comes after the folder itself, and .pth files there, those of a checkout, are not read.
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return python.parent


def in_fresh(fresh: Path, folder: Path, *words: str) -> str:
    """What a command prints in the fresh environment, outside the checkout."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(fresh / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_installed_trains_evaluates_and_advises(fresh: Path, tmp_path: Path) -> None:
    where = in_fresh(
        fresh, tmp_path, "python", "-c", "import agents; print(agents.__file__, agents.__version__)"
    ).split()
    assert Path(where[0]).is_relative_to(fresh.parent)
    assert in_fresh(fresh, tmp_path, "geodesic-rl", "--version").strip() == where[1] == agents.__version__
    sizes = ["--num-envs=2", "--n-steps=32", "--net-arch=8", "--eval-episodes=1", "--steps=64", "--device=cpu"]
    trained = in_fresh(
        fresh, tmp_path, "geodesic-rl", "train", "npg", "--env", "Hopper-v5", *sizes, "--run-dir", "a", "--seed", "3"
    )
    assert "evaluate    geodesic-rl evaluate a --episodes 100" in trained
    assert re.search(r"gae_lambda +0\.97 +preset", trained)  # the presets are in the wheel
    assert "is finished with 64 steps" in in_fresh(fresh, tmp_path, "geodesic-rl", "resume", "a")
    assert "mean return" in in_fresh(fresh, tmp_path, "geodesic-rl", "evaluate", "a", "--episodes", "2")
    several = in_fresh(
        fresh, tmp_path, "geodesic-rl", "train", "npg", "--env", "Hopper-v5", *sizes, "--seeds", "2", "--jobs", "1"
    )
    assert "2 finished" in several
    assert len(in_fresh(fresh, tmp_path, "geodesic-rl", "runs", "runs", "a", "--paths").splitlines()) == 3


def test_the_source_distribution_holds_the_sources(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "agents/presets/npg.yaml", "agents/py.typed"} <= names


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


WHERE_IT_IS = {"tqdm"}
"""What a dependency imports where it is installed, and does without where it is not."""
LOADED = """
import sys
from agents import NPG
from agents.run import cli
assert cli.train(["npg", "--env", "Hopper-v5", "--steps", "8", "--num-envs", "2", "--n-steps", "4", "--quiet"]) == 0
print(*{name.partition(".")[0] for name in sys.modules})
"""


def test_training_imports_nothing_but_dependencies(tmp_path: Path) -> None:
    """An environment that has no extra, as `make train` makes one, trains on a task of MuJoCo's."""
    found = {canonical(one) for one in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]}
    waiting = list(found)
    while waiting:
        for one in importlib.metadata.requires(waiting.pop()) or ():
            name = canonical(one)
            if "extra ==" not in one and name not in found and installed(name):
                found.add(name)
                waiting.append(name)
    command = [sys.executable, "-c", LOADED]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    owners = importlib.metadata.packages_distributions()
    loaded = {name for name in shown.stdout.splitlines()[-1].split() if name in owners}
    odd = {name for name in loaded if not {canonical(owner) for owner in owners[name]} & {*found, "geodesic-rl"}}
    assert odd <= WHERE_IT_IS


def canonical(requirement: str) -> str:
    """The name of a distribution as its index has it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s<>=!~;\[(]", requirement, maxsplit=1)[0]).lower()


def installed(name: str) -> bool:
    return bool(list(importlib.metadata.distributions(name=name)))


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    named = {dependency.split(">=")[0].lower() for group in groups for dependency in group}
    assert named <= pinned
