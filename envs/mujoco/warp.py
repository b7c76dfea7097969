"""The MuJoCo tasks on MuJoCo Warp: physics on a GPU, tasks in PyTorch on the memory of the physics.

Warp compiles its kernels, which takes minutes at the first start of a task, and keeps them in its cache (the folder
WARP_CACHE_PATH, or one in the home). Without a GPU it runs on the CPU, one core, slowly: to try things, and for tests.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import array_api_compat.torch as xp
import gymnasium
import mujoco
import mujoco_warp
import numpy as np
import torch
import warp
from gymnasium.vector import AutoresetMode
from torch import Tensor

from envs.device import ROOM, DeviceVectorEnv, Transition
from envs.mujoco.batch import MujocoVectorEnv, default_limit, make_task, spaces_of
from envs.mujoco.model import constants, load_model
from envs.mujoco.tasks import Task
from envs.mujoco.warp_contacts import mend
from envs.mujoco.warp_streams import WarpStreams, in_order
from envs.vector import Ids, SnapshotError

# Else it greets, and names each kernel that it loads.
warp.config.log_level = warp.LOG_WARNING
warp.init()
mend()

LARGEST = 1e10
"""Size of a coordinate, velocity or acceleration from which MuJoCo calls a simulation diverged."""
HUMANOID = 20
"""Degrees of freedom from which a body lies on the ground with many contacts."""
PHYSICS = ("qpos", "qvel", "qacc_warmstart", "time")
OWN = ("_seed", "_episode", "_elapsed", "ended", "_observation", "_position")
"""What a snapshot keeps: of the physics, and of the environments."""
_LACKS = {
    "njmax": mujoco_warp.OverflowType.NEFC | mujoco_warp.OverflowType.NJMAX_NNZ,
    "nconmax": mujoco_warp.OverflowType.BROADPHASE | mujoco_warp.OverflowType.NARROWPHASE,
}


class WarpVectorEnv(DeviceVectorEnv):
    """One of Gymnasium's MuJoCo -v5 tasks on MuJoCo Warp, num_envs worlds at a time, on a GPU or on the CPU.

    Rewards, observations and ends are those of `envs.mujoco.MujocoVectorEnv`, computed in float32, as the physics is;
    episodes begin where they do there. The spaces are the same too, so that a policy goes from one to the other.

    Differs from it: a step agrees with MuJoCo's to float32's rounding, which contacts amplify in a hundred of them
    (docs/gpu.md). Models with the PGS solver are refused.

    Args:
        env_id: one of `envs.mujoco.TASKS`, or of `envs.mujoco.newton`.
        num_envs: number of worlds.
        autoreset: see `VectorEnv`.
        seed: fixes the episodes of a first reset that is given no seed.
        device: "cpu", or a GPU.
        max_episode_steps: time limit in environment steps; None takes Gymnasium's for this id.
        nconmax: contacts that there is room for, per world; worlds share the room. None: twice what bodies came to
            under the strongest actions.
        njmax: rows of constraints that there is room for in each world; None as of contacts.
        **kwargs: the Gymnasium environment's own keyword arguments.

    Raises:
        ValueError: an argument is not possible.
    """

    task_types: ClassVar[Mapping[str, Callable[..., Task]]] = MujocoVectorEnv.task_types
    _action_scale: float = 1.0
    """Factor between actions, which are paid for, and controls."""

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        *,
        autoreset: AutoresetMode | str = AutoresetMode.SAME_STEP,
        seed: int | None = None,
        device: torch.device | str = "cpu",
        max_episode_steps: int | None = None,
        nconmax: int | None = None,
        njmax: int | None = None,
        **kwargs: Any,
    ) -> None:
        own = {"max_episode_steps": max_episode_steps, "nconmax": nconmax, "njmax": njmax}
        self.task, rendering = make_task(self.task_types[env_id], env_id, kwargs, own)
        if rendering:
            raise ValueError(f"{env_id} was given {sorted(rendering)[0]}, but MuJoCo Warp does not draw; leave it out.")
        self.spec = gymnasium.spec(env_id)
        self.max_episode_steps = max_episode_steps or default_limit(self.task, self.spec)
        self.model = load_model(self.task.xml_file, self.task.solver)
        if self.model.opt.solver == mujoco.mjtSolver.mjSOL_PGS:
            raise ValueError(
                f"{env_id} asks for the solver PGS, which MuJoCo Warp does not have; take newton/{env_id}, the same "
                "task with the Newton solver, whose steps differ less than float32 rounds."
            )
        contacts, constraints = (24, 64) if self.model.nv < HUMANOID else (64, 256)
        self._room = {"nconmax": nconmax or contacts, "njmax": njmax or constraints}
        device = torch.empty(0, device=device).device
        self._warp = warp.device_from_torch(device)
        with warp.ScopedDevice(self._warp):
            self._model = mujoco_warp.put_model(self.model, batch_sizes=dict.fromkeys(self._own_parameters(), num_envs))
            self._model.opt.warn_overflow = 0  # not on stdout: see heed
            self._data = mujoco_warp.make_data(self.model, num_envs, **self._room)
        self._period = self.model.opt.timestep * self.task.frame_skip

        def there(x: Any, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.as_tensor(np.array(x), dtype=dtype, device=device)

        self._rest = there(self.model.qpos0, torch.float64), torch.zeros(self.model.nv, device=device)
        self._constants = constants(self.model, there)
        self._state = SimpleNamespace(**{name: self._view(name) for name in self.task.fields()} | self._told(there))
        self._qpos, self._qvel, self._qacc = (self._view(name) for name in ("qpos", "qvel", "qacc"))
        self._ctrl, self._overflow = self._view("ctrl"), self._view("overflow")
        self._substeps = Recorded(self._warp, self._step)
        self._begins = torch.ones(1, dtype=torch.int32, device=device)
        self._forward = Recorded(self._warp, self._forward_if_some_begin)
        # All kernels are compiled here, not within the first rollout.
        self._forward()
        self._substeps()
        observation = self.task.observe(xp, self._state, self._constants)
        super().__init__(num_envs, *spaces_of(self.model, observation), autoreset=autoreset, device=device)
        self.metadata |= {"render_modes": [], "render_fps": round(1.0 / self._period)}
        self._observation = torch.zeros_like(observation)
        self._position = self.task.position(xp, self._state, self._constants)
        self._seed = torch.arange(num_envs, device=device) + (secrets.randbits(62) if seed is None else seed)
        self._episode = torch.full_like(self._seed, -1)
        self._elapsed = torch.zeros_like(self._seed)
        self._lacking = torch.zeros_like(self._overflow)
        self._blown_up = torch.zeros((), dtype=torch.int64, device=device)
        self._known_blowups = 0
        self._asks = device.type == "cpu"  # whether any episode begins, which on a GPU costs more than it saves

    def _view(self, name: str) -> Tensor:
        """Give a field of all worlds, [N, ...], as a tensor on its memory."""
        return warp.to_torch(getattr(self._data, name))

    def _own_parameters(self) -> tuple[str, ...]:
        """Name the model's parameters of which each world has its own."""
        return ()

    def _told(self, there: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        """Give what tasks see beside the physics, [N, ...]; there: makes tensors on the device."""
        return {}

    @property
    def dt(self) -> float:
        """Give the seconds of simulated time per step."""
        return float(self._period)

    # The physics ------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        for _ in range(self.task.frame_skip):
            mujoco_warp.step(self._model, self._data)
        if hasattr(self._state, "cfrc_ext"):
            mujoco_warp.rne_postconstraint(self._model, self._data)

    def _forward_if_some_begin(self) -> None:
        forward = lambda: mujoco_warp.forward(self._model, self._data)  # noqa: E731
        if can_record(self._warp) and (self._warp.is_cpu or warp.is_conditional_graph_supported()):
            warp.capture_if(warp.from_torch(self._begins), on_true=forward)  # a branch of the graph
        else:
            forward()

    # The environments -------------------------------------------------------------------------------------------------

    def begin(self, mask: Tensor, seeds: Tensor | None = None) -> Tensor:
        if seeds is not None:
            new = mask & (seeds >= 0)
            self._seed.copy_(torch.where(new, seeds, self._seed))
            self._episode.masked_fill_(new, -1)
        if self._asks and not mask.any():
            return self._observation.clone()
        self._episode += mask
        streams = WarpStreams(self._warp, self._seed, self._episode.clamp(min=0))
        return self._begin_at(mask, *self.task.initial_state(xp, streams, *self._rest))

    def _begin_at(self, mask: Tensor, qpos: Tensor, qvel: Tensor) -> Tensor:
        """Begin episodes of the worlds in a mask [N] at qpos [N, nq] and qvel [N, nv]."""
        rows = mask[:, None]
        for field, start in ((self._qpos, qpos), (self._qvel, qvel)):
            field.copy_(torch.where(rows, start.to(field.dtype), field))
        # What else is state, or is left by worlds that diverged.
        for name in ("qacc_warmstart", "ctrl", "time", "overflow"):
            field = self._view(name)
            field.masked_fill_(rows if field.ndim == 2 else mask, 0)
        # Of all worlds, whose futures this leaves as they are: what tasks read of the others is kept here.
        self._begins.copy_(mask.any())
        self._forward()
        if hasattr(self._state, "cfrc_ext"):
            self._state.cfrc_ext.masked_fill_(mask[:, None, None], 0.0)
        observation = torch.where(rows, self.task.observe(xp, self._state, self._constants), self._observation)
        self._observation.copy_(observation)
        position = self.task.position(xp, self._state, self._constants)
        if position is not None and self._position is not None:
            rows = rows.view(-1, *(1,) * (position.ndim - 1))
            self._position.copy_(torch.where(rows, position, self._position))
        self._elapsed.masked_fill_(mask, 0)
        return observation

    def advance(self, actions: Tensor) -> Transition:
        self._ctrl.copy_(actions * self._action_scale)
        self._substeps()
        state, model, velocity = self._state, self._constants, None
        observation = self.task.observe(xp, state, model)
        position = self.task.position(xp, state, model)
        if position is not None and self._position is not None:
            velocity = (position - self._position) / self._period
            self._position.copy_(position)
        reward, terminated, _ = self.task.reward(xp, state, model, actions, velocity)
        # NaN compares as false. A simulation that diverged ends its episode where it last stood, without reward.
        moves = torch.cat((self._qpos, self._qvel, self._qacc), dim=1)
        diverged = ~(moves.abs() < LARGEST).all(dim=1)
        terminated = diverged if terminated is None else terminated | diverged
        observation = torch.where(diverged[:, None], self._observation, observation)
        self._observation.copy_(observation)
        self._blown_up += (diverged & ~self.ended).sum()
        self._lacking |= self._overflow
        self._elapsed += 1
        truncated = self._elapsed >= self.max_episode_steps
        return Transition(observation, reward.float().masked_fill(diverged, 0.0), terminated, truncated)

    def set_state(self, qpos: Any, qvel: Any) -> Tensor:
        """Begin an episode of each world at a given state, qpos [N, nq] and qvel [N, nv]; gives observations [N, O]."""
        everyone = torch.ones_like(self.ended)
        self.ended.zero_()
        return self._begin_at(everyone, *(torch.as_tensor(x, device=self.device) for x in (qpos, qvel)))

    def counts(self) -> dict[str, Tensor]:
        lacks = {name: (self._lacking & int(bits)).bool().any() for name, bits in _LACKS.items()}
        return lacks | {"blowups": self._blown_up}

    def heed(self, counts: Mapping[str, Tensor]) -> None:
        self._known_blowups = int(counts["blowups"])
        for name, words in ROOM.items():
            if counts[name]:
                have = self._room[name]
                raise RuntimeError(
                    f"MuJoCo Warp had no room for all {words} of a world ({name} is {have}) and left forces out; give "
                    f"--env-kwargs {name}={2 * have}, or make_vec(..., {name}={2 * have})."
                )

    @property
    def blowups(self) -> int:
        """Count the simulations that had diverged when `heed` last heard of it."""
        return self._known_blowups

    @blowups.setter
    def blowups(self, value: int) -> None:
        self._known_blowups = value
        self._blown_up.fill_(value)

    # Snapshots --------------------------------------------------------------------------------------------------------

    def _kept(self) -> dict[str, Tensor]:
        """Name everything that a world's future depends on, [N, ...] each."""
        physics = {name: self._view(name) for name in PHYSICS}
        return physics | {name: value for name in OWN if (value := getattr(self, name)) is not None}

    def snapshot(self, ids: Ids = None) -> dict[str, Tensor]:
        rows = self._rows_of(ids)
        return {name: value.index_select(0, rows) for name, value in self._kept().items()}

    def restore(self, snapshot: dict[str, Tensor], ids: Ids = None) -> Tensor:
        rows, kept = self._rows_of(ids), self._kept()
        expected = {name: (len(rows), *value.shape[1:]) for name, value in kept.items()}
        if {name: tuple(value.shape) for name, value in snapshot.items()} != expected:
            raise SnapshotError(
                f"This snapshot does not fit {len(rows)} worlds of {self.task.env_id} on MuJoCo Warp; restore it to as "
                "many of the task and backend that it was taken from."
            )
        for name, value in kept.items():
            value.index_copy_(0, rows, snapshot[name].to(value))
        return self._observation.index_select(0, rows)

    def render(self) -> Any:
        raise NotImplementedError(
            f"MuJoCo Warp does not draw; make {self.task.env_id} without backend='warp' for that."
        )


class Recorded:
    """Work of Warp's kernels that runs in the order of PyTorch's. Its second call records it as a graph, which is
    launched from then on, without Python between its kernels; on the CPU too.

    Args:
        device: Warp's.
        work: launches kernels, on arrays of fixed addresses.
    """

    def __init__(self, device: warp.Device, work: Callable[[], None]) -> None:
        self.device, self.work = device, work
        self.calls, self.graph = 0, None

    def __call__(self) -> None:
        with in_order(self.device) as (stream, recording):
            self.calls += not recording
            if self.calls == 2 and not recording and can_record(self.device):  # by then all is compiled
                with warp.ScopedCapture(self.device, stream=stream) as capture:
                    self.work()
                self.graph = capture.graph
            if self.graph is None or recording:
                self.work()
            else:
                warp.capture_launch(self.graph, stream=stream)


def can_record(device: warp.Device) -> bool:
    """Say whether work on Warp's device can be recorded: a GPU must keep what is allocated meanwhile."""
    return device.is_cpu or warp.is_mempool_enabled(device)
