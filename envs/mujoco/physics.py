"""Many simulations of one model on all CPU cores, behind one small interface.

`BatchPhysics` steps through mujoco.batch. Contact forces (cfrc_ext) need mj_rnePostConstraint after the step, which
mujoco.batch does not run, so tasks that read them step through `ThreadedPhysics`: one MjData per simulation on a pool
of threads. Both give the bits of a loop over Gymnasium's own simulation, at any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import mujoco
import numpy as np
from mujoco.batch import Batch

from envs.cores import usable_cores

_STATE = int(mujoco.mjtState.mjSTATE_INTEGRATION)
_FIRST_DIVERGED = int(mujoco.mjtWarning.mjWARN_BADQPOS)
_LAST_DIVERGED = int(mujoco.mjtWarning.mjWARN_BADQACC)


def skip_idle_work(model: mujoco.MjModel) -> None:
    """Switch off the parts of MuJoCo's pipeline that have nothing to do in this model: results keep their bits.

    These are collisions where no two geoms may touch, a fifth of the time of a step of InvertedDoublePendulum-v5; and
    constraint islands where all joints are of one tree, and so of one island, 7 % on Hopper-v5. The collisions'
    midphase stays: without it contacts come in another order, which Humanoid-v5's bits show.
    """
    bits = mujoco.mjtDisableBit
    takes, gives, body = model.geom_contype[:, None], model.geom_conaffinity, model.geom_bodyid
    may_touch = (takes & gives).astype(bool) & (body[:, None] != body)
    if not may_touch.any() and model.npair == 0 and model.nflex == 0:
        model.opt.disableflags |= bits.mjDSBL_CONTACT
    if model.ntree <= 1 and model.nflex == 0:
        model.opt.disableflags |= bits.mjDSBL_ISLAND


class Physics:
    """n simulations of one model.

    Args:
        model: the model; it is not changed.
        num: n, the number of simulations.
        fields: the MjData fields that `read` gives.
        num_threads: threads to step with; 0 means every core.
    """

    def __init__(self, model: mujoco.MjModel, num: int, fields: Sequence[str], num_threads: int = 0) -> None:
        self.model = model
        self.num = num
        self.fields = tuple(fields)
        self.num_threads = min(num, num_threads or usable_cores())
        self._arrays: dict[str, np.ndarray] = {}

    def read(self, ids: np.ndarray | None = None) -> SimpleNamespace:
        """The fields as attributes: live views of all simulations [n, ...], or copies of the rows ids [k, ...]."""
        if ids is None:
            return SimpleNamespace(**self._arrays)
        return SimpleNamespace(**{name: array[ids] for name, array in self._arrays.items()})

    def set_state(self, ids: np.ndarray, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Reset the simulations ids and put them at qpos [k, nq] and qvel [k, nv], all derived fields computed."""
        raise NotImplementedError

    def step(self, actions: np.ndarray, substeps: int, ids: np.ndarray | None = None) -> np.ndarray | None:
        """Apply actions [k, nu] for a number of substeps; a mask [k] of the simulations that diverged, or None."""
        raise NotImplementedError

    def integration_state(self, ids: np.ndarray) -> np.ndarray:
        """Everything that the simulations' futures depend on, the solver's warm start included: [k, S]."""
        raise NotImplementedError

    def set_integration_state(self, ids: np.ndarray, state: np.ndarray) -> None:
        """Put back what `integration_state` gave; derived fields are refreshed by the next step."""
        raise NotImplementedError

    def close(self) -> None:
        """Free what outlives the object otherwise."""


class BatchPhysics(Physics):
    """Physics on mujoco.batch.Batch, which reaches the rate of a loop in C."""

    def __init__(self, model: mujoco.MjModel, num: int, fields: Sequence[str], num_threads: int = 0) -> None:
        super().__init__(model, num, fields, num_threads)
        self.batch = Batch(model, num, self.num_threads)
        self._default = self.batch.state[0].copy()
        self._arrays = {name: self.batch.bind(name) for name in fields}
        self._qpos, self._qvel, self._ctrl = (self.batch.bind(name) for name in ("qpos", "qvel", "ctrl"))
        self._diverged = self.batch.warning[:, _FIRST_DIVERGED : _LAST_DIVERGED + 1, 1]

    def set_state(self, ids: np.ndarray, qpos: np.ndarray, qvel: np.ndarray) -> None:
        # A row is all of a simulation's state: writing the default one is a reset, at a third of batch.reset's cost.
        self.batch.state[ids] = self._default
        self._qpos[ids] = qpos
        self._qvel[ids] = qvel
        self.batch.forward(np.sort(ids))  # mujoco.batch takes sorted ids only

    def step(self, actions: np.ndarray, substeps: int, ids: np.ndarray | None = None) -> np.ndarray | None:
        if ids is None:
            self._ctrl[:] = actions
            self.batch.step(nstep=substeps)
        else:
            self._ctrl[ids] = actions
            self.batch.step(np.sort(ids), nstep=substeps)
        if not self._diverged.any():
            return None
        diverged: np.ndarray = np.logical_or.reduce(self._diverged, axis=1)
        self._diverged[:] = 0
        return diverged if ids is None else diverged[ids]

    def set_parameters(self, ids: np.ndarray, parameters: Mapping[str, np.ndarray]) -> None:
        """Give the simulations ids their own model parameters, and the constants that mj_setConst derives from them.

        Args:
            ids: [k].
            parameters: MjModel field -> values [k, ...].
        """
        for name, values in parameters.items():
            self.batch.expand(name)[ids] = values
        self.batch.set_const(np.sort(ids))

    def integration_state(self, ids: np.ndarray) -> np.ndarray:
        return self.batch.state[ids]

    def set_integration_state(self, ids: np.ndarray, state: np.ndarray) -> None:
        self.batch.state[ids] = state


class ThreadedPhysics(Physics):
    """Physics on one MjData per simulation, with mj_rnePostConstraint after each step."""

    def __init__(self, model: mujoco.MjModel, num: int, fields: Sequence[str], num_threads: int = 0) -> None:
        super().__init__(model, num, fields, num_threads)
        self._data = [mujoco.MjData(model) for _ in range(num)]
        self._fields = [_Scattered([getattr(data, name) for data in self._data]) for name in fields]
        self._arrays = {name: field.values for name, field in zip(fields, self._fields, strict=True)}
        self._ctrl = _Scattered([data.ctrl for data in self._data])
        self._diverged = _Scattered([data.warning.number[_FIRST_DIVERGED : _LAST_DIVERGED + 1] for data in self._data])
        self._pool = ThreadPoolExecutor(max(1, self.num_threads - 1), "physics")

    def set_state(self, ids: np.ndarray, qpos: np.ndarray, qvel: np.ndarray) -> None:
        for i, positions, velocities in zip(ids.tolist(), qpos, qvel, strict=True):
            data = self._data[i]
            mujoco.mj_resetData(self.model, data)
            data.qpos[:] = positions
            data.qvel[:] = velocities
            mujoco.mj_forward(self.model, data)
        for field in self._fields:
            field.gather(ids)

    def step(self, actions: np.ndarray, substeps: int, ids: np.ndarray | None = None) -> np.ndarray | None:
        self._ctrl.scatter(actions, ids)
        # Threads draw from one iterator, so that none waits while another has work left.
        work = iter(self._data if ids is None else [self._data[i] for i in ids.tolist()])
        helpers = [self._pool.submit(self._step_some, work, substeps) for _ in range(self.num_threads - 1)]
        self._step_some(work, substeps)
        for helper in helpers:
            helper.result()
        for field in self._fields:
            field.gather(ids)
        if not self._diverged.gather(ids).any():
            return None
        diverged: np.ndarray = np.logical_or.reduce(self._diverged.values, axis=1)
        self._diverged.scatter(0)
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
        """values, with the rows ids (None: all) brought up to date."""
        if ids is None:
            self._memory.take(self._index, out=self.values, mode="wrap")
        else:
            self.values[ids] = self._memory[self._index[ids]]
        return self.values

    def scatter(self, values: np.ndarray | int, ids: np.ndarray | None = None) -> None:
        """Write values [k, ...] into the simulations ids (None: all)."""
        self._memory[self._index if ids is None else self._index[ids]] = values
