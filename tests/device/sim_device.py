"""A second torch device, "sim", whose memory is the host's: a stand-in for CUDA on machines without a GPU.

Tensors on it hold a CPU tensor and compute with it, so that whole trainings run and results can be compared. What CUDA
would refuse is refused (tensors of two devices in one operation, numpy of a device tensor, CPU generators), and what
would make the host wait is counted, with the line of agents/ or envs/ that asked for it:

    item      one number to the host: .item(), float(t), bool(t), if t
    shape     a result whose shape depends on data: nonzero, a[mask], a[mask] = v, bincount, unique, ...
    d2h       a copy to the host
    h2d       a copy to the device; from pageable memory it is staged, and the host waits for that
    index     host indices into device memory: copied to the device by every call
    linalg    LAPACK-like calls that check their status on the host (eigh, solve, inv)

Waits for an event are counted as "event", and not among the waits: what they wait for is past where they are used well.
Copies with non_blocking=True are counted as "sent" and are no waits, but they are watched: a source on the host that is
overwritten before the host has next waited for the device raises `Race`, and what is copied to the host is NaN until
then.

    with sim.record() as log:
        agent.learn(...)
    print(log.waits, log.table())
"""

from __future__ import annotations

import collections
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _foreach_supported_types
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "sim"
WAITS = ("item", "shape", "d2h", "h2d", "index", "linalg")
aten = torch.ops.aten
_ROOTS = tuple(os.sep + folder + os.sep for folder in ("agents", "envs"))
_TOOLS = os.path.dirname(os.path.abspath(__file__))
_quiet = False


class Race(RuntimeError):  # noqa: N818, what it is called
    """The host wrote into memory that an asynchronous copy had not been waited for."""


class Log:
    """What was asked of the device: counts and bytes by kind and line, and the number of operations."""

    def __init__(self) -> None:
        self.events: collections.Counter[tuple[str, str]] = collections.Counter()
        self.bytes: collections.Counter[tuple[str, str]] = collections.Counter()
        self.operations = 0

    def add(self, kind: str, nbytes: int = 0) -> None:
        key = kind, _where()
        self.events[key] += 1
        self.bytes[key] += nbytes

    @property
    def waits(self) -> int:
        """Count how often the host waited."""
        return sum(n for (kind, _), n in self.events.items() if kind in WAITS)

    def table(self) -> str:
        rows = sorted(self.events.items(), key=lambda row: (-row[1], row[0]))
        return "\n".join(f"{n:5d} {kind:7s} {self.bytes[kind, line]:9d} B  {line}" for (kind, line), n in rows)


_log = Log()
_pending: list[tuple[str, Tensor, Tensor]] = []


@contextlib.contextmanager
def record() -> Iterator[Log]:
    """Keep a log of what happens inside."""
    global _log
    before, _log = _log, Log()
    try:
        yield _log
    finally:
        _log = before


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Count what happens inside as the device's own work: that of a simulator which lives there."""
    global _quiet
    before, _quiet = _quiet, True
    try:
        yield
    finally:
        _quiet = before


def _where() -> str:
    """Give the innermost line of ours that runs."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if os.path.dirname(name) != _TOOLS and "site-packages" not in name:
            for root in _ROOTS:
                if root in name:
                    return f"{root[1:]}{name.rsplit(root, 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def note(kind: str, nbytes: int = 0) -> None:
    if not _quiet:
        _log.add(kind, nbytes)


def synchronize() -> None:
    """Let the host wait: asynchronous copies are over, and their sources may be reused."""
    for kind, host, snapshot in _pending:
        if kind == "h2d" and not torch.equal(torch.nan_to_num(host.double()), torch.nan_to_num(snapshot.double())):
            _pending.clear()
            raise Race(f"a host tensor of shape {tuple(host.shape)} was overwritten while its copy was in flight")
        if kind == "d2h":
            host.copy_(snapshot)
    _pending.clear()


class Event:
    """A point in the device's work."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        note("event")
        synchronize()

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.time - self.time)


class AnyEvent(torch.Event):
    """In place of torch.Event: an `Event` for this device, and torch's own for others."""

    def __new__(cls, device: Any = None, **options: Any) -> Any:
        return Event() if _is_sim(device) else super().__new__(cls, device, **options)


class Sim(Tensor):
    """A tensor on the device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Sim:
        t = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(NAME, 0),
        )
        t.inner = inner
        return t

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self) -> str:
        return f"Sim({self.inner!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a device tensor is not pickled here; copy it to the host")

    def __deepcopy__(self, memo: dict[int, Any]) -> Sim:
        with torch.inference_mode(False), torch.no_grad():
            copied = Sim(self.inner.clone())
        copied.requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied._is_param = True
        memo[id(self)] = copied
        return copied

    def tolist(self) -> Any:  # C++ reads the memory itself; one copy for all
        note("d2h", self.nbytes)
        synchronize()
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(
            "can't convert sim:0 device type tensor to numpy. Use Tensor.cpu() to copy it to the host first."
        )

    def __array__(self, *args: Any) -> Any:
        return self.numpy()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Sim) -> None:
        torch.Tensor.data.__set__(self, value)
        self.inner = value.inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
        ):  # else views of ordinary tensors are none
            return _dispatch(func, args, kwargs or {})


_SHAPES = {"nonzero", "masked_select", "bincount", "unique_dim", "_unique2", "unique_consecutive", "repeat_interleave"}
_LINALG = {"_linalg_eigh", "linalg_eig", "_linalg_svd", "linalg_qr", "linalg_lstsq", "_linalg_check_errors"}
_TRANSFERS = {"copy_", "_to_copy", "_copy_from", "_copy_from_and_resize"}
_INDEXED = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}


def _is_sim(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    # In inference mode composite operations (item, is_nonzero, to, linear) arrive whole.
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return func.decompose(*args, **kwargs)
    name = func.overloadpacket.__name__
    flat, spec = tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    sims = [x for x in tensors if isinstance(x, Sim)]
    _log.operations += 1

    if name == "_local_scalar_dense":
        note("item")
        synchronize()
        return func(args[0].inner)
    if name == "equal":
        note("item")
        synchronize()
    if name == "copy_":
        return _copy(*args, **kwargs)
    if name == "_to_copy" and (target := kwargs.get("device")) is not None and not _is_sim(target):
        host = torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return _copy(host, args[0], kwargs.get("non_blocking", False))

    if name not in _TRANSFERS:
        hosts = [x for x in tensors if not isinstance(x, Sim) and x.dim() > 0]
        if hosts and name in _INDEXED and isinstance(args[0], Sim) and all(any(h is i for i in args[1]) for h in hosts):
            note("index", sum(h.nbytes for h in hosts))
        elif hosts:
            raise RuntimeError(f"{func} got tensors on two devices, sim:0 and cpu")
    if isinstance(generator := kwargs.get("generator"), torch.Generator) and generator.device.type == "cpu":
        raise RuntimeError("a generator of the CPU draws nothing on sim")
    if name in _SHAPES and not (name == "repeat_interleave" and kwargs.get("output_size") is not None):
        note("shape")
        synchronize()
    if name in _INDEXED:
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        scalar = name != "index" and args[2].numel() == 1  # CUDA takes masked_fill then
        if masks and not (scalar and len([i for i in args[1] if i is not None]) == 1):
            note("shape")
            synchronize()
    if name in _LINALG:
        note("linalg")
        synchronize()

    wrappers = {id(x.inner): x for x in sims}
    device = kwargs.get("device")
    plain = [x.inner if isinstance(x, Sim) else x for x in flat]
    inner_args, inner_kwargs = tree_unflatten(plain, spec)
    if "device" in inner_kwargs:
        inner_kwargs["device"] = torch.device("cpu")
    inner_kwargs.pop("pin_memory", None)
    out = func(*inner_args, **inner_kwargs)
    if device is not None and not _is_sim(device):
        return out
    shapes = [(x, tuple(x.shape)) for x in sims] if func._schema.is_mutable else ()
    for x, shape in shapes:
        if tuple(x.inner.shape) != shape:
            raise NotImplementedError(f"{func} changes the shape of a device tensor in place")
    return tree_map_only(torch.Tensor, lambda x: wrappers.get(id(x)) if id(x) in wrappers else Sim(x), out)


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(target, Sim) and not isinstance(source, Sim):
        note("sent" if non_blocking else "h2d", source.nbytes)
        target.inner.copy_(source)
        if non_blocking and not _quiet:
            _pending.append(("h2d", source, source.clone()))
        elif not _quiet:
            synchronize()
    elif isinstance(source, Sim) and not isinstance(target, Sim):
        note("sent" if non_blocking else "d2h", source.nbytes)
        if non_blocking and not _quiet and target.is_floating_point():
            _pending.append(("d2h", target, source.inner.clone().to(target.dtype)))
            target.fill_(float("nan"))
        else:
            if not non_blocking and not _quiet:
                synchronize()
            target.copy_(source.inner)
    else:
        target.inner.copy_(source.inner)  # type: ignore[attr-defined]
    return target


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Sim:
    with torch.inference_mode(False), torch.no_grad():
        return Sim(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Sim:
    with torch.inference_mode(False), torch.no_grad():
        return Sim(torch.empty_strided(size, stride, dtype=dtype))


def _factory(op: Any) -> Callable[..., Sim]:
    """Give a kernel for an operation that makes a tensor out of numbers alone."""

    def kernel(
        *args: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None, **kwargs: Any
    ) -> Sim:
        if (generator := kwargs.get("generator")) is not None and generator.device.type == "cpu":
            raise RuntimeError("a generator of the CPU draws nothing on sim")
        with torch.inference_mode(False), torch.no_grad():
            return Sim(op(*args, dtype=dtype, device="cpu", **kwargs))

    return kernel


_FACTORIES = (
    *("arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace", "tril_indices", "triu_indices"),
    *("randperm", "randperm.generator", "randn", "randn.generator", "rand", "rand.generator", "randint", "randint.low"),
    *("zeros", "ones", "full", "scalar_tensor", "_efficientzerotensor"),
)


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        _copy(target, source, non_blocking)
    return target


_library: Any = None


def install() -> None:
    """Register the device; once per process."""
    global _library
    if _library is not None:
        return
    _setup_privateuseone_for_python_backend(NAME)
    _library = torch.library.Library("aten", "IMPL")
    for name, kernel in (
        ("empty.memory_format", _empty),
        ("empty_strided", _empty_strided),
        ("_copy_from", _copy_from),
    ):
        _library.impl(name, kernel, "PrivateUse1")
    for name in _FACTORIES:
        packet, _, overload = name.partition(".")
        _library.impl(name, _factory(getattr(getattr(aten, packet), overload or "default")), "PrivateUse1")
    _foreach_supported_types.append(Sim)
    torch.Event = AnyEvent  # type: ignore[misc]


def to_host(x: Tensor) -> Tensor:
    """Look at a tensor, wherever it lives; uncounted."""
    return x.inner if isinstance(x, Sim) else x
