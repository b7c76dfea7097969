"""Storage of one rollout: [T, N, ...] tensors that are allocated once and filled in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

OBSERVATIONS = "observations"


class FieldSpec(NamedTuple):
    """What a buffer keeps per step and environment."""

    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32


class RolloutBuffer:
    """T steps of N environments, with only the fields that its user declares.

    Each field is a tensor [T, N, *shape], read as an attribute (buffer.rewards) or by name (buffer["rewards"]).

    Args:
        n_steps: T, at least 1.
        num_envs: N, at least 1.
        fields: name -> `FieldSpec`. Truncated episodes' last observations have the shape and dtype of "observations".
        device: where the tensors live.
        pin_memory: page-locked memory, from which copies to a GPU do not block.

    Raises:
        ValueError: a size is below 1, there are no fields, or a field has the name of a buffer's own attribute.
    """

    def __init__(
        self,
        n_steps: int,
        num_envs: int,
        fields: Mapping[str, FieldSpec],
        device: torch.device | str = "cpu",
        *,
        pin_memory: bool = False,
    ) -> None:
        for name, size in (("n_steps", n_steps), ("num_envs", num_envs)):
            if size < 1:
                raise ValueError(f"{name} is {size}; a buffer holds at least 1.")
        if not fields:
            raise ValueError("fields is empty; declare what the buffer shall keep.")
        self.n_steps = n_steps
        self.num_envs = num_envs
        self.device = _resolve(device)
        self.specs = dict(fields)
        self._fields: dict[str, Tensor] = {}
        self._rows: dict[str, tuple[Tensor, ...]] = {}
        self._final: list[tuple[Tensor, Tensor, Tensor]] = []
        self._twin: RolloutBuffer | None = None
        for name, (shape, dtype) in self.specs.items():
            if hasattr(self, name):
                raise ValueError(f"a field is called {name!r}, as a buffer's own attribute is; choose another name.")
            self._fields[name] = torch.zeros(
                (n_steps, num_envs, *shape), dtype=dtype, device=self.device, pin_memory=pin_memory
            )
            self._rows[name] = self._fields[name].unbind()

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._fields[name]
        except KeyError:
            raise KeyError(f"there is no field {name!r}; this buffer keeps {', '.join(self._fields)}.") from None

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(error.args[0]) from None

    def add(self, t: int, **values: Tensor) -> None:
        """Copy values of one step, [N, *shape] each, into row t of their fields; dtypes are cast.

        Raises:
            ValueError: a field is unknown, or a value has another shape.
        """
        if unknown := values.keys() - self._rows.keys():
            raise ValueError(
                f"add got {', '.join(sorted(unknown))}; this buffer keeps {', '.join(sorted(self._rows))}."
            )
        for name, value in values.items():
            row = self._rows[name][t]
            if value.shape != row.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; the buffer keeps {tuple(row.shape)} a step.")
            row.copy_(value)

    def put(self, name: str, t: int, ids: Tensor, values: Tensor) -> None:
        """Copy values [k, *shape] of the environments ids [k] into row t of a field, cast to its dtype; the others'
        entries stay.
        """
        row = self._rows[name][t]
        row.index_copy_(0, ids, values if values.dtype == row.dtype else values.to(row.dtype))

    def add_final(self, t: int, ids: Tensor, observations: Tensor) -> None:
        """Keep the observations that truncated episodes ended in at step t.

        Args:
            ids: the environments, int64 [k].
            observations: [k, *O]; copied.

        Raises:
            ValueError: the buffer has no field "observations", or the shape differs from it.
        """
        shape, dtype = self._observation_spec()
        if observations.shape != (len(ids), *shape):
            raise ValueError(f"observations have shape {tuple(observations.shape)}; give {(len(ids), *shape)}.")
        ids = ids.to(self.device, torch.int64, copy=True)
        kept = observations.to(self.device, dtype, copy=True)
        self._final.append((torch.full_like(ids, t), ids, kept))

    def final_observations(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `add_final` kept since `clear`: steps [k], environments [k] and observations [k, *O]."""
        shape, dtype = self._observation_spec()
        none = torch.empty(0, dtype=torch.int64, device=self.device)
        empty = (none, none, torch.empty((0, *shape), dtype=dtype, device=self.device))
        steps, ids, observations = zip(empty, *self._final, strict=True)
        return torch.cat(steps), torch.cat(ids), torch.cat(observations)

    def clear(self) -> None:
        """Begin a new rollout. The fields keep their memory and are overwritten step by step."""
        self._final.clear()

    def flat(self, name: str) -> Tensor:
        """A field as a view [T * N, *shape], steps outermost."""
        return self[name].flatten(0, 1)

    def to(self, device: torch.device | str) -> RolloutBuffer:
        """This rollout on another device: itself if it is there already, else a twin that is allocated once and filled
        by one copy per field.

        From pinned memory the copies do not block: read a result from the device before the next `add`.
        """
        device = _resolve(device)
        if device == self.device:
            return self
        if self._twin is None or self._twin.device != device:
            self._twin = RolloutBuffer(self.n_steps, self.num_envs, self.specs, device)
        for name, tensor in self._fields.items():
            self._twin[name].copy_(tensor, non_blocking=device.type != "cpu")
        self._twin.clear()
        if self._final:
            steps, ids, observations = self.final_observations()
            self._twin._final.append((steps.to(device), ids.to(device), observations.to(device)))
        return self._twin

    def _observation_spec(self) -> FieldSpec:
        if OBSERVATIONS not in self.specs:
            raise ValueError(f"final observations need the field {OBSERVATIONS!r}, which this buffer does not keep.")
        return self.specs[OBSERVATIONS]


def _resolve(device: torch.device | str) -> torch.device:
    """The device with its index: "cuda" and "cuda:0" are one."""
    return torch.empty(0, device=device).device
