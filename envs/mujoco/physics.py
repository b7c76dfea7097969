"""Many simulations of one model behind one small interface, and the one that computes contact forces.

Contact forces (cfrc_ext) need mj_rnePostConstraint after the step, which mujoco.batch does not run, so tasks that read
them step through `ThreadedPhysics`: one MjData per simulation on a pool of threads. All others step through
`envs.mujoco.batch.BatchPhysics`. Both give the bits of a loop over Gymnasium's own simulation, at any number of
threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import mujoco
import numpy as np

from envs.cores import usable_cores

_STATE = int(mujoco.mjtState.mjSTATE_INTEGRATION)
DIVERGED = slice(int(mujoco.mjtWarning.mjWARN_BADQPOS), int(mujoco.mjtWarning.mjWARN_BADQACC) + 1)
"""MuJoCo's warnings that a simulation diverged."""
SILENT = 1 << 30
"""What their counts begin with: MuJoCo writes the first warning of a kind to stderr, and to a file in the working
folder. A simulation that diverges is reset, and its count begins anew."""


class Physics:
    """n simulations of one model.

    Args:
        model: the model; it is not changed.
        num: n, the number of simulations.
        fields: the MjData fields that are read.
        num_threads: threads to step with; 0 means every core.
    """

    fields: dict[str, np.ndarray]
    """MjData's names -> the fields of all simulations [n, ...], brought up to date in place by every step and reset."""

    def __init__(self, model: mujoco.MjModel, num: int, fields: Sequence[str], num_threads: int = 0) -> None:
        self.model = model
        self.num = num
        self.num_threads = min(num, num_threads or usable_cores())

    def step(self, controls: np.ndarray, substeps: int, ids: np.ndarray | None = None) -> np.ndarray | None:
        """Apply controls [k, nu] for a number of substeps; give a mask [k] of those that diverged, or None."""
        raise NotImplementedError

    def set_state(self, ids: np.ndarray, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Reset the simulations ids and put them at qpos [k, nq] and qvel [k, nv], all derived fields computed."""
        raise NotImplementedError

    def integration_state(self, ids: np.ndarray) -> np.ndarray:
        """Give everything that the simulations' futures depend on, the solver's warm start included: [k, S]."""
        raise NotImplementedError

    def set_integration_state(self, ids: np.ndarray, state: np.ndarray) -> None:
        """Put back what `integration_state` gave; derived fields are refreshed by the next step."""
        raise NotImplementedError

    def close(self) -> None:
        """Free what outlives the object otherwise."""


class ThreadedPhysics(Physics):
    """Physics on one MjData per simulation, with mj_rnePostConstraint after each step."""

    def __init__(self, model: mujoco.MjModel, num: int, fields: Sequence[str], num_threads: int = 0) -> None:
        super().__init__(model, num, fields, num_threads)
        self._data = [mujoco.MjData(model) for _ in range(num)]
        self._read = [_Scattered([getattr(data, name) for data in self._data]) for name in fields]
        self.fields = {name: field.values for name, field in zip(fields, self._read, strict=True)}
        self._ctrl = _Scattered([data.ctrl for data in self._data])
        self._diverged = _Scattered([data.warning.number[DIVERGED] for data in self._data])
        self._diverged.scatter(SILENT)
        self._pool = ThreadPoolExecutor(max(1, self.num_threads - 1), "physics")

    def set_state(self, ids: np.ndarray, qpos: np.ndarray, qvel: np.ndarray) -> None:
        for i, positions, velocities in zip(ids.tolist(), qpos, qvel, strict=True):
            data = self._data[i]
            mujoco.mj_resetData(self.model, data)
            data.warning.number[DIVERGED] = SILENT
            data.qpos[:] = positions
            data.qvel[:] = velocities
            mujoco.mj_forward(self.model, data)
        for field in self._read:
            field.gather(ids)

    def step(self, controls: np.ndarray, substeps: int, ids: np.ndarray | None = None) -> np.ndarray | None:
        self._ctrl.scatter(controls, ids)
        # Threads draw from one iterator, so that none waits while another has work left.
        work = iter(self._data if ids is None else [self._data[i] for i in ids.tolist()])
        helpers = [self._pool.submit(self._step_some, work, substeps) for _ in range(self.num_threads - 1)]
        self._step_some(work, substeps)
        for helper in helpers:
            helper.result()
        for field in self._read:
            field.gather(ids)
        found = self._diverged.gather(ids) != SILENT
        if not found.any():
            return None
        diverged: np.ndarray = np.logical_or.reduce(found, axis=1)
        self._diverged.scatter(SILENT)
        return diverged if ids is None else diverged[ids]

    def _step_some(self, work: Iterable[mujoco.MjData], substeps: int) -> None:
        model, step, post_constraint = self.model, mujoco.mj_step, mujoco.mj_rnePostConstraint
        for data in work:
            step(model, data, substeps)
            post_constraint(model, data)

    def integration_state(self, ids: np.ndarray) -> np.ndarray:
        states = np.empty((len(ids), mujoco.mj_stateSize(self.model, _STATE)))
        for row, i in zip(states, ids.tolist(), strict=True):
            mujoco.mj_getState(self.model, self._data[i], row, _STATE)
        return states

    def set_integration_state(self, ids: np.ndarray, state: np.ndarray) -> None:
        for row, i in zip(state, ids.tolist(), strict=True):
            mujoco.mj_setState(self.model, self._data[i], row, _STATE)

    def close(self) -> None:
        self._pool.shutdown()


class _Scattered:
    """Arrays of one shape and type, one in each simulation's memory, copied together from and to `values` [n, ...].

    One indexed copy over the span of memory in which the arrays lie is some ten times faster than n assignments in
    Python, which would hold the interpreter's lock between the simulations' steps.
    """

    def __init__(self, arrays: list[np.ndarray]) -> None:
        first = arrays[0]
        self._arrays = arrays  # keeps their memory alive
        self.values = np.stack(arrays)
        offsets = np.tensordot(first.strides, np.indices(first.shape), 1)
        starts = np.array([array.ctypes.data for array in arrays])
        addresses = np.add.outer(starts, offsets)
        lowest = int(addresses.min())
        self._index = (addresses - lowest) // first.itemsize
        element = np.ctypeslib.as_ctypes_type(first.dtype)
        self._memory = np.ctypeslib.as_array((element * int(self._index.max() + 1)).from_address(lowest))

    def gather(self, ids: np.ndarray | None = None) -> np.ndarray:
        """Bring the rows ids of values (None: all) up to date, and give values."""
        if ids is None:
            self._memory.take(self._index, out=self.values, mode="wrap")
        else:
            self.values[ids] = self._memory[self._index[ids]]
        return self.values

    def scatter(self, values: np.ndarray | int, ids: np.ndarray | None = None) -> None:
        """Write values [k, ...] into the simulations ids (None: all)."""
        self._memory[self._index if ids is None else self._index[ids]] = values
