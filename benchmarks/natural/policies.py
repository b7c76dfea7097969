"""Policies for all eleven MuJoCo tasks, made by one command: trained, evaluated over 100 episodes, and filmed.

Each is `python train.py npg --env TASK --seed S` as a user runs it, in --runs/TASK/S, then `python evaluate.py` of that
folder, whose --json and --video go beside its checkpoints. What is there already is not made again, and a run that was
cut off is resumed, so that the eleven may take several calls. The picture shows them all at once, in real time.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents import NPG
from agents.run.video import choose_renderer, following
from benchmarks.common import ROOT, context, is_same, keep, read
from envs.mujoco import TASKS

NAME = "natural/policies"
EPISODES = 100
FRAMES, FRAMES_PER_SECOND, SKIPPED_SECONDS = 40, 16, 2.0
SIDE = 176
"""Pixels of a task in the picture."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", nargs="*", default=list(TASKS), help="tasks")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "policies", help="folder of the runs")
    parser.add_argument("--picture", type=Path, help="draw the policies that there are to this new .gif")
    parser.add_argument("--budget-minutes", type=float, default=60.0)
    arguments = parser.parse_args()
    kept = read(NAME) or {"runs": []}
    deadline = time.monotonic() + 60 * arguments.budget_minutes
    for task in arguments.env:
        run = (arguments.runs / task / str(arguments.seed)).absolute()
        if time.monotonic() > deadline:
            print("the budget of minutes is spent; call again to go on")
            break
        train(task, arguments.steps, arguments.seed, run)
        file = run / "evaluation.json"
        if fresh := not file.is_file():
            call("evaluate.py", str(run), "--episodes", str(EPISODES), "--video", str(run / "film.mp4"),
                 "--json", str(file))  # fmt: skip
        key = {"env": task, "seed": arguments.seed, "steps": arguments.steps}
        if fresh or not any(is_same(other, key) for other in kept["runs"]):
            keep(NAME, kept, {**key, **context(), **summary(file)}, key)
    for found in kept["runs"]:
        print(f"{found['env']:26} {found['mean']:10,.1f}  seed {found['seed']}")
    if arguments.picture:
        runs = {task: arguments.runs / task / str(arguments.seed) for task in arguments.env}
        draw({task: run for task, run in runs.items() if (run / "evaluation.json").is_file()}, arguments.picture)


def train(task: str, steps: int, seed: int, run: Path) -> None:
    """Have the run finished: begun, gone on with, or found as it is."""
    if run.exists():
        call("train.py", "resume", str(run))
    else:
        call("train.py", "npg", "--env", task, "--steps", str(steps), "--seed", str(seed), "--run-dir", str(run))


def call(*words: str) -> None:
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


def draw(runs: dict[str, Path], file: Path) -> None:
    """Write the policies' episodes, side by side with their tasks' names, as one film in real time."""
    from PIL import Image, ImageDraw, ImageFont

    choose_renderer()
    films = {task: filmed(task, run) for task, run in runs.items()}
    columns = math.ceil(math.sqrt(len(films)))
    rows = -(-len(films) // columns)
    pictures, font = [], ImageFont.load_default(12)
    for k in range(FRAMES):
        whole = Image.new("RGB", (columns * SIDE, rows * SIDE), "white")
        for place, (task, frames) in enumerate(films.items()):
            corner = SIDE * (place % columns), SIDE * (place // columns)
            whole.paste(Image.fromarray(frames[k]), corner)
            name = ImageDraw.Draw(whole)
            name.text((corner[0] + 5, corner[1] + 3), task, "white", font, stroke_width=2, stroke_fill="black")
        pictures.append(whole.quantize(64, dither=Image.Dither.NONE))
    pictures[0].save(
        file, save_all=True, append_images=pictures[1:], duration=1000 / FRAMES_PER_SECOND, loop=0, optimize=True
    )
    print(file)


def filmed(task: str, run: Path) -> list[np.ndarray]:
    """Give frames of one deterministic episode, from its third second on where it is long enough."""
    agent = NPG.load(run / "checkpoints" / "last.zip", device="cpu")
    env = following(task, {"width": SIDE, "height": SIDE})
    per_frame = env.metadata["render_fps"] / FRAMES_PER_SECOND
    limit = env.spec.max_episode_steps if env.spec and env.spec.max_episode_steps else 1000
    first = min(SKIPPED_SECONDS * env.metadata["render_fps"], limit - per_frame * FRAMES)
    moments = {round(max(first, 0) + k * per_frame) for k in range(FRAMES)}
    observation, _ = env.reset(seed=0)
    frames: list[np.ndarray] = []
    for step in range(max(moments) + 1):
        if step in moments:
            frames.append(np.asarray(env.render()))
        action = agent.act(torch.as_tensor(observation)[None], deterministic=True)[0]
        observation, _, terminated, truncated, _ = env.step(action.numpy())
        if terminated or truncated:
            break
    env.close()
    return frames + frames[-1:] * (FRAMES - len(frames))


def summary(file: Path) -> dict[str, Any]:
    """Give what an evaluation says of a policy."""
    found = json.loads(file.read_text())
    return {name: found[name] for name in ("episodes", "mean", "interval", "iqm")}


if __name__ == "__main__":
    main()
