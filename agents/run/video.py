"""Episodes as a film, side by side, with their returns written in."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import gymnasium
import mujoco
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from agents.run import process
from agents.run.errors import RunError
from agents.run.evaluation import Acts
from agents.run.outputs import complete
from agents.run.process import NO_RENDERER, RENDERERS
from envs.mujoco import of_one

FRAMES_PER_SECOND = 30
"""Of an environment that says none."""
FASTEST = {".mp4": 70, ".gif": 20}
"""Frames per second, at most; of quicker environments every second or later one is drawn."""
GIF_WIDTH = 320
"""Pixels of one episode: such files are large."""
FILMS = tuple(FASTEST)


class Film:
    """Episodes rendered by Gymnasium into an MP4 or GIF file, which is there when it is complete.

    The first frames are drawn at once: what cannot be filmed is said before anything else is done.

    Args:
        env_id: the environment's id.
        env_kwargs: its keyword arguments.
        seed: of the first episode; the others follow. First states differ from evaluation's for the same seeds.
        file: where the film goes.
        episodes: how many are shown side by side.

    Raises:
        RunError: moviepy or a renderer is not installed, or the environment cannot be drawn.
    """

    def __init__(self, env_id: str, env_kwargs: dict[str, Any], seed: int, file: Path, episodes: int = 1) -> None:
        if file.suffix.lower() == ".mp4":
            try:
                import moviepy  # noqa: F401
            except ImportError as error:
                raise RunError(
                    'an .mp4 needs moviepy; pip install "geodesic-rl[video]" brings it, and a .gif does without.'
                ) from error
        choose_renderer()
        self._file, self._envs = file, list[gymnasium.Env]()
        try:
            self._envs = [following(env_id, env_kwargs) for _ in range(episodes)]
            self._observations = [env.reset(seed=seed + k)[0] for k, env in enumerate(self._envs)]
            self._frames: list[Any] = [env.render() for env in self._envs]
            fps = float(self._envs[0].metadata.get("render_fps") or FRAMES_PER_SECOND)
            self._every = math.ceil(fps / FASTEST[file.suffix.lower()])
            self._fps = fps / self._every
            _joined(self._frames, [0.0] * episodes, [False] * episodes)
        except Exception as error:  # an environment without pictures raises whatever it likes
            raise RunError(
                f"{env_id} cannot be filmed ({type(error).__name__}: {error}); leave --video out."
            ) from error

    def shoot(self, agent: Acts, deterministic: bool) -> list[float]:
        """Play the episodes at once, frames going to the file one by one; returns their returns.

        Raises:
            RunError: the encoder wrote nothing.
        """
        totals, ended, steps = [0.0] * len(self._envs), [False] * len(self._envs), 0
        with complete(self._file) as unfinished:
            with _writer(unfinished, self._fps) as write:
                write(_joined(self._frames, totals, ended))
                while not all(ended):
                    steps += 1
                    is_drawn = steps % self._every == 0
                    for k, env in enumerate(self._envs):
                        if not ended[k]:
                            totals[k], ended[k] = self._step(agent, deterministic, k, env, totals[k])
                            if is_drawn or ended[k]:
                                self._frames[k] = env.render()
                    if is_drawn or all(ended):
                        write(_joined(self._frames, totals, ended))
            if not unfinished.is_file() or not unfinished.stat().st_size:
                raise RunError(f"the encoder wrote no film to {self._file}; look at what moviepy's ffmpeg says.")
        return totals

    def _step(self, agent: Acts, deterministic: bool, k: int, env: gymnasium.Env, total: float) -> tuple[float, bool]:
        action = agent.act(torch.as_tensor(self._observations[k])[None], deterministic=deterministic)[0]
        self._observations[k], reward, terminated, truncated, _ = env.step(action.cpu().numpy())
        return total + float(reward), terminated or truncated

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for env in self._envs:
            env.close()


def choose_renderer() -> None:
    """Have MuJoCo draw without a screen where there is none, by EGL or OSMesa; MUJOCO_GL, if it is set, is kept.

    Raises:
        RunError: neither is installed, or MUJOCO_GL is one that cannot draw here.
    """
    asked, screen = os.environ.get("MUJOCO_GL", "").strip().lower(), bool(os.environ.get("DISPLAY"))
    if sys.platform != "linux" or asked in RENDERERS or (screen and asked not in NO_RENDERER):
        return
    if asked:
        why = "draws nothing" if asked in NO_RENDERER else "needs a screen, and there is none"
        raise RunError(f"MUJOCO_GL is {asked}, which {why}; leave it unset, and egl or osmesa draw where they can.")
    for name, (library, _) in RENDERERS.items():
        if process.has_library(library):
            os.environ["MUJOCO_GL"] = name
            return
    packages = ", or ".join(packages for _, packages in RENDERERS.values())
    raise RunError(f"Nothing can draw without a screen here; apt-get install {packages}, brings it.")


def _joined(frames: Sequence[Any], totals: Sequence[float], ended: Sequence[bool]) -> np.ndarray:
    """Put frames [H, W, 3] into rows as square as can be, each with its return so far; sides are even for encoders."""
    pictures = []
    for frame, total, over in zip(frames, totals, ended, strict=True):
        picture = Image.fromarray(np.asarray(frame, dtype=np.uint8))
        size = max(12, picture.height // 22)
        text, draw = f"return {total:,.1f}" + (", ended" if over else ""), ImageDraw.Draw(picture, "RGBA")
        font = ImageFont.load_default(size)
        box = draw.textbbox((size // 2, size // 2), text, font=font)
        draw.rectangle((box[0] - size // 3, box[1] - size // 4, box[2] + size // 3, box[3] + size // 4), (0, 0, 0, 150))
        draw.text((size // 2, size // 2), text, fill="white", font=font)
        pictures.append(np.asarray(picture))
    columns = math.ceil(math.sqrt(len(pictures))) if len(pictures) > 3 else len(pictures)
    blank = np.zeros_like(pictures[0])
    rows = [pictures[k : k + columns] for k in range(0, len(pictures), columns)]
    rows[-1] += [blank] * (columns - len(rows[-1]))
    whole = np.concatenate([np.concatenate(row, axis=1) for row in rows])
    return whole[: whole.shape[0] // 2 * 2, : whole.shape[1] // 2 * 2]


@contextlib.contextmanager
def _writer(file: Path, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Give what takes the film's frames [H, W, 3]."""
    if file.suffix.lower() == ".gif":
        pictures: list[Image.Image] = []

        def keep(frame: np.ndarray) -> None:
            picture = Image.fromarray(frame)
            picture.thumbnail((max(GIF_WIDTH, frame.shape[1] // 2), frame.shape[0]))
            pictures.append(picture.quantize(128))

        yield keep
        first, *others = pictures
        first.save(file, save_all=True, append_images=others, duration=1000 / fps, loop=0, optimize=True)
        return
    from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter

    with contextlib.ExitStack() as stack:
        opened: list[Any] = []

        def write(frame: np.ndarray) -> None:
            if not opened:
                size = frame.shape[1], frame.shape[0]
                opened.append(stack.enter_context(FFMPEG_VideoWriter(str(file), size, fps=fps)))
            opened[0].write_frame(np.ascontiguousarray(frame))

        yield write


def following(env_id: str, env_kwargs: dict[str, Any]) -> gymnasium.Env:
    """Make the environment for drawing, with the camera that follows the body, where its model has one."""
    asked = of_one(env_id, env_kwargs) | {"render_mode": "rgb_array"}
    env = gymnasium.make(env_id, **asked)
    model = getattr(env.unwrapped, "model", None)
    chosen = asked.keys() & {"camera_id", "camera_name", "default_camera_config"}
    if not isinstance(model, mujoco.MjModel) or chosen:
        return env
    if mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "track") < 0:
        return env
    env.close()
    return gymnasium.make(env_id, **asked, camera_name="track")
