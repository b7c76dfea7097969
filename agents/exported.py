"""An exported policy at work: NumPy observations to the actions that the agent's predict gives.

This file needs nothing else of the package: copy it beside the policy. It asks for NumPy, and by the policy's ending
for onnxruntime (.onnx), PyTorch (.pt2) or safetensors (.safetensors); never for an environment.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["ExportedPolicy", "load_policy"]

Run = Callable[[np.ndarray], np.ndarray]
ABOUT = "policy.json"
"""Under which a file holds what it says of the policy."""


class ExportedPolicy:
    """A deterministic policy: normalization, network, and clipping or the most probable choice.

    Args:
        run: observations [n, *O], float32, to actions [n, *A].
        about: what the file says: "observation" and "action" with their shapes, and "agent".
    """

    def __init__(self, run: Run, about: dict[str, Any]) -> None:
        self._run, self.about = run, about
        self.observation_shape = tuple(about["observation"]["shape"])

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        """Give the actions [n, *A] of observations [n, *O], as the environment takes them."""
        return self._run(np.ascontiguousarray(observations, dtype=np.float32))

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[np.ndarray, Any]:
        """Do as Stable-Baselines3's predict: one observation [*O], or several [n, *O]; the state is given back.

        Raises:
            ValueError: the observation has another shape.
        """
        given, shape = np.asarray(observation), self.observation_shape
        one = given.shape == shape
        if not one and given.shape[1:] != shape:
            raise ValueError(f"the observation has the shape {given.shape}; give {shape}, or (n, *{shape}).")
        actions = self(given[None] if one else given)
        return (actions[0] if one else actions), state


def load_policy(path: str | Path) -> ExportedPolicy:
    """Read a policy that was exported to a file whose name ends in .onnx, .pt2 or .safetensors.

    Raises:
        ValueError: the name ends otherwise, or the file holds no policy of ours.
    """
    kinds = {".onnx": _onnx, ".pt2": _pt2, ".safetensors": _safetensors}
    suffix = Path(path).suffix
    if suffix not in kinds:
        raise ValueError(f"{path} is no policy; give a file whose name ends in {', '.join(kinds)}.")
    run, about = kinds[suffix](str(path))
    if not about:
        raise ValueError(f"{path} does not say of itself that it is a policy of geodesic-rl.")
    return ExportedPolicy(run, json.loads(about))


def _onnx(path: str) -> tuple[Run, str | None]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # so small a network is slower on more
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map.get(ABOUT)
    return lambda observations: session.run(None, {"observation": observations})[0], about


def _pt2(path: str) -> tuple[Run, str | None]:
    import torch

    extra = {ABOUT: ""}
    policy = torch.export.load(path, extra_files=extra).module()

    def run(observations: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return policy(torch.from_numpy(observations)).numpy()

    return run, extra[ABOUT]


def _safetensors(path: str) -> tuple[Run, str | None]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        text = (file.metadata() or {}).get(ABOUT)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    return network(json.loads(text or "{}"), tensors), text


def network(about: dict[str, Any], tensors: dict[str, np.ndarray]) -> Run:
    """Give a policy of layers as a function of observations [n, *O], computed by NumPy in float64."""
    t = {name: x.astype(np.float64) if x.dtype == np.float32 else x for name, x in tensors.items()}

    def run(observations: np.ndarray) -> np.ndarray:
        x = observations.reshape(len(observations), -1).astype(np.float64)
        if about["clip"] is not None:
            x = np.clip(x * t["observation.scale"] + t["observation.offset"], -about["clip"], about["clip"])
        for k, kind in enumerate(about["layers"]):
            if kind == "linear":
                x = x @ t[f"layers.{k}.weight"].T + t.get(f"layers.{k}.bias", 0.0)
            elif kind == "fourier":
                x = np.sin(x @ t[f"layers.{k}.projection"] + t[f"layers.{k}.phase"])
            else:
                x = ACTIVATIONS[kind](x)
        return _actions(x, about["action"], t)

    return run


def _actions(outputs: np.ndarray, action: dict[str, Any], t: dict[str, np.ndarray]) -> np.ndarray:
    """Make actions [n, *A] of outputs [n, K]."""
    shape = (len(outputs), *action["shape"])
    if action["kind"] == "gaussian":
        return np.clip(outputs.reshape(shape), t["action.low"], t["action.high"]).astype(action["dtype"])
    if action["kind"] == "bernoulli":
        chosen = outputs > 0
    else:
        parts = np.split(outputs, np.cumsum(action["choices"])[:-1], axis=1)
        chosen = np.stack([part.argmax(1) for part in parts], axis=1)
    return chosen.astype(np.int64).reshape(shape) + t.get("action.start", 0)


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0.0),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0.0))),
    "gelu": lambda x: 0.5 * x * (1.0 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2.0))),
    "silu": lambda x: 0.5 * x * (1.0 + np.tanh(0.5 * x)),  # x σ(x), without overflow
}
