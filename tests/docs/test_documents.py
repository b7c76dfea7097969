"""What the documents say holds: snippets run as pasted, commands parse, links lead somewhere, names exist."""

import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import numpy as np
import pages
import pytest
import torch

from agents.policy.networks import parameter_vector
from agents.run import adaptation, assessment, cli, comparison, export, runs, selftest, training, tuning
from agents.run.initial import Initial
from envs import make_vec

ROOT = Path(__file__).parents[2]
PAGES = {str(page.relative_to(ROOT)): page for page in pages.PAGES}
LEARNS = "docs/own-algorithm.md-0"
"""Run by a test of its own."""
SNIPPETS = {
    f"{name}-{k}": code for name, page in PAGES.items() for k, code in enumerate(pages.snippets(page, "python"))
}
COMMANDS = sorted({command for page in PAGES.values() for command in pages.commands(page)})
ZOO = "docs/rl-zoo3.md-0"
"""Run by another."""
FILES_OF_RUNS = ("runs/", "tuning/", "build/", "models/")
"""What pages name that only running something makes."""


def run_as_pasted(code: str, name: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> types.ModuleType:
    """Run a snippet in a module and a folder of its own; returns the module."""
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(folder)
    exec(compile(code, name, "exec"), module.__dict__)
    return module


def test_a_visitor_finds_the_pages() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160
    assert any(name.startswith("README.md") for name in SNIPPETS)
    linked = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES.values() for link in pages.links(page)}
    assert {name for name, page in PAGES.items() if page not in linked} <= {"README.md"}


@pytest.mark.parametrize("name", [name for name in SNIPPETS if name not in (LEARNS, ZOO)])
def test_snippets_run_as_pasted(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in re.findall(r"^(?:import|from) (wandb|mlflow|tqdm)\b", SNIPPETS[name], flags=re.M):
        pytest.importorskip(module)  # others' services and tools, which nothing here needs
    run_as_pasted(SNIPPETS[name], "snippet", monkeypatch, tmp_path)


def test_rl_zoo3_trains_and_enjoys_as_the_page_says(tmp_path: Path) -> None:
    pytest.importorskip("rl_zoo3.enjoy", exc_type=ImportError)
    page = ROOT / "docs" / "rl-zoo3.md"
    (tmp_path / "zoo.py").write_text(SNIPPETS[ZOO])
    (tmp_path / "zoo.yml").write_text(pages.snippets(page, "yaml")[0])
    for command in (command for command in pages.commands(page) if command.startswith("python zoo.py")):
        words = [sys.executable, *shlex.split(command)[1:], "-n", "600"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "Mean reward" in done.stdout
    assert (tmp_path / "logs" / "npg" / "CartPole-v1_1" / "CartPole-v1.zip").is_file()


def test_the_algorithm_of_the_page_learns_and_resumes_exactly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    learns, resumes = pages.snippets(ROOT / "docs" / "own-algorithm.md", "python")
    page = run_as_pasted(learns, "algorithm", monkeypatch, tmp_path)
    first_returns = page.Reinforce("MlpPolicy", "CartPole-v1", seed=0, n_steps=32).learn(1000).episode_returns
    assert np.mean(page.agent.episode_returns) > 5 * np.mean(first_returns)

    state = run_as_pasted(resumes, "state", monkeypatch, tmp_path)
    algorithm = type("Resumable", (state.Resumable, page.Reinforce), {})
    whole, half = (algorithm("MlpPolicy", "CartPole-v1", seed=0, n_steps=32).learn(steps) for steps in (2048, 1024))
    half.save("half")
    resumed = algorithm.load("half", make_vec("CartPole-v1", 16)).learn(1024, reset_num_timesteps=False)
    assert torch.equal(parameter_vector(resumed.policy), parameter_vector(whole.policy))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked: list[Any] = []
    actions = ((training, "start"), (training, "resume"), (assessment, "assess"), (adaptation, "adapt"))
    others = (
        (comparison, "compare"),
        (tuning, "tune"),
        (export, "export"),
        (runs, "list_runs"),
        (selftest, "selftest"),
    )
    monkeypatch.setattr(cli, "preset_of", lambda *arguments: {})
    for module, name in (*actions, *others, (cli, "train_seeds")):
        monkeypatch.setattr(module, name, lambda *arguments: asked.append(arguments) or 0)
    saved = types.SimpleNamespace(policy=lambda kind: None, shape=lambda kind, policy: {})
    monkeypatch.setattr(Initial, "of", lambda name: saved)
    match shlex.split(command):
        case ["python", "train.py", *_, "--help"] as words:
            with pytest.raises(SystemExit) as done:
                cli.train(words[2:])
            assert done.value.code == 0
            assert "--env" in capsys.readouterr().out
        case ["python", "train.py", *arguments]:
            assert cli.train(arguments) == 0
            assert asked
        case ["python", "evaluate.py", *arguments]:
            assert cli.evaluate(arguments) == 0
            assert asked
        case ["python", "zoo.py", *_]:
            assert command in pages.commands(ROOT / "docs" / "rl-zoo3.md")  # which a test of its own runs
        case ["geodesic-rl", *arguments]:
            assert cli.main(arguments) == 0
            assert asked
        case ["python", script, *_]:
            assert (ROOT / script).is_file()
        case ["make", *words]:
            targets = re.findall(r"^([\w.]+):", (ROOT / "Makefile").read_text(), flags=re.M)
            assert {word for word in words if "=" not in word} <= set(targets)
        case ["pip", "install", "-c", "constraints.txt", *_, package]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(re.findall(r"\w+", package)) <= extras.keys()
        case ["tensorboard", "--logdir", "runs"]:
            importlib.import_module("tensorboard")
        case words:
            pytest.fail(f"nothing here checks {words}")


@pytest.mark.timeout(600)
def test_the_first_commands_work(tmp_path: Path) -> None:
    run, short = str(tmp_path / "run"), {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    train, resume, evaluate = (
        next(command for command in pages.commands(ROOT / "README.md") if command.startswith(f"python {beginning}"))
        for beginning in ("train.py npg --env Hopper-v5", "train.py resume", "evaluate.py")
    )
    for command in (
        f"{train} --steps 1 --eval-episodes 1 --run-dir {run}",
        evaluate.replace("--episodes 100", "--episodes 2"),  # filmed while it falls soon
        f"{resume} --steps 12289",
    ):
        words = [run if "<run>" in word else word for word in shlex.split(command)[1:]]
        files = [f"{tmp_path}/{word}" if word.endswith((".mp4", ".png")) else word for word in words]
        done = subprocess.run(
            [sys.executable, *files], cwd=ROOT, env={**os.environ, **short}, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"run", "hopper.mp4", "returns.png"}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page, dead = PAGES[name], []
    for link in pages.links(page):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        known = {a for _, a in pages.headings(target)} if target.suffix == ".md" and target.exists() else set()
        if not target.exists() or (anchor and anchor not in known) or not target.is_relative_to(ROOT):
            dead.append(link)
    assert dead == []


@pytest.mark.parametrize("name", PAGES)
def test_named_files_and_modules_exist(name: str) -> None:
    missing = [text for text in pages.named(PAGES[name]) if not exists(text)] if name != "CHANGELOG.md" else []
    assert missing == []


def exists(text: str) -> bool:
    """Whether code in a text names something that is there, as far as it looks like a file, module or script."""
    if match := re.match(r"python (?:-m ([\w.]+)|(\S+\.py))", text):
        module = (match[1] or "").replace(".", "/")
        return any(
            (ROOT / name).is_file() for name in ([match[2]] if match[2] else [f"{module}.py", f"{module}/__main__.py"])
        )
    if match := re.fullmatch(r"(?:train|rollout|time|eval|search)/(\w+)", text):
        return any(re.search(rf"\b{match[1]}\b", file.read_text()) for file in (ROOT / "agents").rglob("*.py"))
    if re.fullmatch(r"[\w.-]+/[\w./*-]*", text):
        there = any(ROOT.glob(text.rstrip("/"))) or (ROOT / text).exists()
        return there or text.startswith(FILES_OF_RUNS) or "-v" in text
    if re.fullmatch(r"(agents|envs)(\.\w+)+", text) and not text.endswith(".py"):
        return resolves(text)
    return True


def resolves(name: str) -> bool:
    """Whether a dotted name is a module or stands in one."""
    parts = name.split(".")
    for k in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:k]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[k:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def test_the_checks_see_what_is_wrong() -> None:
    assert not exists("agents/natural/nothing.py")
    assert not exists("agents.natural.scores.nothing")
    assert not exists("python benchmarks/nothing.py --seeds 3")
    assert not exists("python -m benchmarks.nothing --seeds 3")
    assert not exists("train/nothing_like_it")
    assert exists("train/compatible_r2")
    assert exists("agents.natural.scores.capture")
    assert exists("families/HalfCheetahVel-v0")
    assert pages.anchor("sb3-contrib's ARS, in short", {}) == "sb3-contribs-ars-in-short"
    assert pages.anchor("Bits", {"bits": 0}) == "bits-1"
