"""One episode as a film."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import gymnasium
import mujoco
import torch

from agents.run.errors import RunError
from agents.run.evaluation import Acts

FRAMES_PER_SECOND = 30
"""Of an environment that says none."""


class Film:
    """An episode rendered by Gymnasium into an MP4 file, which is there when it is complete.

    The first frame is drawn at once: what cannot be filmed is said before anything else is done.

    Args:
        env_id: the environment's id.
        env_kwargs: its keyword arguments.
        seed: of the episode. Its first state differs from evaluation's for the same seed.
        file: where the film goes.

    Raises:
        RunError: moviepy is not installed, or the environment cannot be drawn.
    """

    def __init__(self, env_id: str, env_kwargs: dict[str, Any], seed: int, file: Path) -> None:
        try:
            from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter
        except ImportError as error:
            raise RunError('--video needs moviepy; pip install "geodesic-rl[video]" brings it.') from error
        self._writer, self._file = FFMPEG_VideoWriter, file
        try:
            self._env = _following(env_id, env_kwargs)
            self._observation, _ = self._env.reset(seed=seed)
            frame: Any = self._env.render()
            self._frame = frame
            self._size = frame.shape[1], frame.shape[0]
        except Exception as error:  # an environment without pictures raises whatever it likes
            raise RunError(
                f"{env_id} cannot be filmed ({type(error).__name__}: {error}); leave --video out."
            ) from error

    def shoot(self, agent: Acts, deterministic: bool) -> float:
        """Play the episode, frames going to the encoder one by one; returns its return.

        Raises:
            RunError: the encoder wrote nothing.
        """
        total, ended = 0.0, False
        fps = self._env.metadata.get("render_fps") or FRAMES_PER_SECOND
        unfinished = self._file.with_name(f".{self._file.stem}.{os.getpid()}.tmp{self._file.suffix}")
        try:
            with self._writer(str(unfinished), self._size, fps=fps) as writer:
                writer.write_frame(self._frame)
                while not ended:
                    action = agent.act(torch.as_tensor(self._observation)[None], deterministic=deterministic)[0]
                    self._observation, reward, terminated, truncated, _ = self._env.step(action.cpu().numpy())
                    total, ended = total + float(reward), terminated or truncated
                    writer.write_frame(self._env.render())
            if not unfinished.is_file() or not unfinished.stat().st_size:
                raise RunError(f"the encoder wrote no film to {self._file}; look at what moviepy's ffmpeg says.")
            unfinished.replace(self._file)
        finally:
            unfinished.unlink(missing_ok=True)
        return total

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._env.close()


def _following(env_id: str, env_kwargs: dict[str, Any]) -> gymnasium.Env:
    """Make the environment for drawing, with the camera that follows the body, where its model has one."""
    asked = {**env_kwargs, "render_mode": "rgb_array"}
    env = gymnasium.make(env_id, **asked)
    model = getattr(env.unwrapped, "model", None)
    chosen = asked.keys() & {"camera_id", "camera_name", "default_camera_config"}
    if not isinstance(model, mujoco.MjModel) or chosen:
        return env
    if mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "track") < 0:
        return env
    env.close()
    return gymnasium.make(env_id, **asked, camera_name="track")
