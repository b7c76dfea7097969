"""One episode as a film."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import torch

from agents.run.errors import RunError
from agents.run.evaluation import Acts


def film(agent: Acts, env_id: str, env_kwargs: dict[str, Any], seed: int, deterministic: bool, file: Path) -> float:
    """Write one episode, rendered by Gymnasium, to an MP4 file; frames go to the encoder one by one.

    Returns:
        The episode's return. Its first state differs from evaluation's for the same seed.

    Raises:
        RunError: moviepy is not installed.
    """
    try:
        from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter
    except ImportError as error:
        raise RunError('--video needs moviepy; pip install "geodesic-rl[video]" brings it.') from error
    env = gymnasium.make(env_id, render_mode="rgb_array", **env_kwargs)
    observation, _ = env.reset(seed=seed)
    frame: Any = env.render()
    total, ended = 0.0, False
    height, width = frame.shape[:2]
    with FFMPEG_VideoWriter(str(file), (width, height), fps=env.metadata["render_fps"]) as writer:
        writer.write_frame(frame)
        while not ended:
            action = agent.act(torch.as_tensor(observation)[None], deterministic=deterministic)[0]
            observation, reward, terminated, truncated, _ = env.step(action.cpu().numpy())
            total, ended = total + float(reward), terminated or truncated
            writer.write_frame(env.render())
    env.close()
    return total
