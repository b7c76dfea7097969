"""Shards on the workers of a Ray cluster, moved from those that die or hang and worked on anew, to the same bits."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agents.cluster.desk import Call, Desk, arithmetic, register_tensors
from agents.cluster.executor import Maker, Work, known, state_of

START_SECONDS = 120.0
"""That workers have to come up in, before those that did begin without the others, and where none is left; and that a
new one has, besides, to import what its first shard needs."""
START_ATTEMPTS = 3
MOST_ATTEMPTS = 5
"""Workers that may be lost with a call before it is given up."""
POLL_SECONDS = 1.0
PACES = 5
"""Calls in a row in which a worker has to be slow before it has fewer shards."""
GAIN = 0.8
"""Share of a call's time that has to remain at most when a shard moves for it."""
ENVIRONMENT = ("MKL_CBWR", "GOMP_SPINCOUNT")
"""Variables that workers have as this process does: sums have to round alike."""


class ClusterError(ConnectionError):
    """No worker is left, or there is something that none of them lives through."""


@dataclass(eq=False)
class _Worker:
    """A process of the cluster that works on shards, one call after the other."""

    handle: Any
    pid: int = 0
    is_here: bool = False
    """Whether it is on this machine."""
    asked: dict[Any, float] = field(default_factory=dict)
    """What it was asked for and has not given yet, in this order, and the seconds that each may take."""
    news: float = 0.0
    """When it last gave something, or was asked while it had nothing to do."""
    owes: float = 0.0
    """Seconds that it may take besides for the next one, for what it does before it."""
    paces: deque[float] = field(default_factory=lambda: deque(maxlen=PACES))
    """Seconds that a shard took it in the last calls; none where shards have come to it since."""


@dataclass(eq=False)
class _Shard:
    """Where a shard is, and how it is made again elsewhere."""

    maker: Any
    """What makes it, pickled, and where that lies in the cluster."""
    worker: _Worker
    state: Any = None
    """Of some calls ago; None: as it was made."""
    calls: list[Call] = field(default_factory=list)
    """Those that have altered it since."""
    attempts: int = 0
    """How often the call that it is asked for was given up; each doubles the next one's time."""


class Ray:
    """An executor on Ray: workers are its actors, with a CPU each, and own fixed shards.

    A worker that dies, or gives nothing for too long, loses its shards to the others; a new one is asked for, and takes
    its share over once it is up. A shard that moves is made anew from its last state that came here, and the calls
    since are repeated: to the same bits, since all that is drawn is drawn by counters.

    Args:
        workers: how many.
        address: of a cluster's head, such as "10.0.0.1:6379" or "auto"; None starts a cluster on this machine, which
            nothing else reaches and which ends with `close`.
        timeout: seconds that a call may take before its worker counts as hung; each further attempt has twice as long.
        states_every: calls after which shards send their states here; rarer costs fewer bytes, and more time where a
            shard moves.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ValueError: there is no cluster at the address, or an argument is not possible.
        ClusterError: no worker came up.
    """

    threads = 1

    def __init__(
        self, workers: int = 2, address: str | None = None, *, timeout: float = 60.0, states_every: int = 16
    ) -> None:
        for name, value in (("workers", workers), ("timeout", timeout), ("states_every", states_every)):
            if not value > 0:
                raise ValueError(f"{name} is {value}; give at least 1.")
        self.ray = _imported(stays_here=address is None)
        self.timeout, self.states_every = timeout, states_every
        self.lost = self.moved = self.repeated = 0
        self._owns_cluster = not self.ray.is_initialized()
        if self._owns_cluster:
            self._connect(workers, address)
        register_tensors()
        self._arithmetic = arithmetic()
        self._node = self.ray.get_runtime_context().get_node_id()
        variables = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ} | {"OMP_NUM_THREADS": "1"}
        self._actor = self.ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0)(Desk).options(
            scheduling_strategy="SPREAD", runtime_env={"env_vars": variables}
        )
        self._shards: list[_Shard] = []
        self._workers: list[_Worker] = []
        self._coming: dict[Any, _Worker] = {}
        self._refused = ""
        """Why the last worker that did not come up did not."""
        for _ in range(workers):
            self._hire()
        self._welcome(workers)

    def start(self, makers: Sequence[Maker]) -> None:
        for i, shard in enumerate(self._shards):
            shard.worker.handle.drop.remote(i)
        workers, n = self._workers, len(makers)
        if n < len(workers):
            warnings.warn(
                f"There are {len(workers)} workers for {n} shards of 32 environments or pairs, so some have nothing to "
                "do; give a larger num_envs, or fewer workers.",
                RuntimeWarning,
                stacklevel=2,
            )
        # Pickled here: arrays that Ray carries itself are not to be written to where they arrive.
        kept = (self.ray.put(self.ray.cloudpickle.dumps(make)) for make in makers)
        self._shards = [_Shard(maker, workers[i * len(workers) // n]) for i, maker in enumerate(kept)]
        for i in range(n):
            self._send(i)

    def each(
        self, work: Work, *shared: Any, own: Sequence[tuple[Any, ...]] | None = None, alters: bool = True
    ) -> list[Any]:
        self._share_out()
        place, begun = self.ray.put(shared), time.monotonic()
        mine = own or [()] * len(self._shards)
        results = self._done({i: Call(work, place, few) for i, few in enumerate(mine)}, alters)
        if alters:
            self._relieve_the_slowest(begun)
        if max(len(shard.calls) for shard in self._shards) >= self.states_every:
            self._keep_states(range(len(self._shards)))
        return results

    def mark(self) -> Callable[[], None]:
        kept = [(shard.state, list(shard.calls)) for shard in self._shards]

        def back() -> None:
            for i, (shard, (state, calls)) in enumerate(zip(self._shards, kept, strict=True)):
                shard.state, shard.calls, shard.attempts = known(state), list(calls), 0
                self._send(i)

        return back

    def metrics(self) -> dict[str, float]:
        return {
            "cluster/workers": len(self._workers),
            "cluster/lost_workers": self.lost,
            "cluster/moved_shards": self.moved,
            "cluster/repeated_calls": self.repeated,
        }

    def close(self) -> None:
        if self.ray.is_initialized():
            for worker in [*self._workers, *self._coming.values()]:
                self.ray.kill(worker.handle)
            if self._owns_cluster:
                self.ray.shutdown()
        self._workers, self._coming, self._shards = [], {}, []

    # Calls -----------------------------------------------------------------------------------------------------------

    def _done(self, calls: Mapping[int, Call], alters: bool) -> list[Any]:
        """Have shards do their calls, whatever becomes of workers; gives the results in order."""
        results: dict[int, Any] = {}
        for worker in self._workers:  # what was broken off is still worked on
            worker.owes += sum(worker.asked.values())
            worker.asked.clear()
        waiting = {self._ask(i, call): i for i, call in calls.items()}
        while waiting:
            # An eighth at once: each wait looks at all.
            ready, _ = self.ray.wait(list(waiting), num_returns=1 + len(waiting) // 8, timeout=POLL_SECONDS)
            lost: dict[_Worker, str] = {}
            for reference in ready:
                i = waiting[reference]
                shard, worker = self._shards[i], self._shards[i].worker
                try:
                    results[i] = self.ray.get(reference)
                except self.ray.exceptions.RayTaskError as error:
                    results[i] = error.cause
                except self.ray.exceptions.RayError as error:
                    lost[worker] = _reason(error)
                    continue
                del waiting[reference]
                worker.asked.pop(reference)
                worker.news, shard.attempts = time.monotonic(), 0
                if alters and not isinstance(results[i], Exception):
                    shard.calls.append(calls[i])
            now = time.monotonic()
            for worker in {self._shards[i].worker for i in waiting.values()} - lost.keys():
                patience = next(iter(worker.asked.values()))
                if now - worker.news > patience:
                    lost[worker] = f"it gave nothing for {patience:.0f} s"
            for worker, why in lost.items():
                gone = self._leave(worker, why)
                waiting = {reference: i for reference, i in waiting.items() if i not in gone}
                waiting |= {self._ask(i, calls[i]): i for i in gone if i in calls and i not in results}
        for result in results.values():
            if isinstance(result, Exception):
                raise result
        return [results[i] for i in calls]

    def _ask(self, i: int, call: Call) -> Any:
        """Have shard i do a call; gives where its result will be."""
        shard, worker = self._shards[i], self._shards[i].worker
        reference = worker.handle.do.remote(i, call.work, call.shared, call.own)
        if not worker.asked:
            worker.news = time.monotonic()
        worker.asked[reference] = self.timeout * 2**shard.attempts + worker.owes
        worker.owes = 0.0
        return reference

    def _send(self, i: int) -> None:
        """Send shard i to its worker, which repeats what was done since its state was kept."""
        shard = self._shards[i]
        works = [(call.work, call.own) for call in shard.calls]
        shard.worker.handle.take.remote(i, shard.maker, shard.state, works, *(call.shared for call in shard.calls))
        shard.worker.owes += self.timeout * 2**shard.attempts * (1 + len(works))
        shard.worker.paces.clear()

    def _keep_states(self, numbers: Sequence[int]) -> None:
        """Fetch shards' states, so that there is nothing to repeat before them."""
        call = Call(state_of, self.ray.put(()), ())
        states = self._done(dict.fromkeys(numbers, call), alters=False)
        for i, state in zip(numbers, states, strict=True):
            self._shards[i].state, self._shards[i].calls = state, []

    # Workers ---------------------------------------------------------------------------------------------------------

    def _hire(self) -> None:
        """Ask for a worker, which comes when the cluster has a place for it."""
        maker = self._shards[0].maker if self._shards else None
        worker = _Worker(self._actor.remote(), owes=START_SECONDS if maker is None else 0.0)
        self._coming[worker.handle.about.remote(maker)] = worker

    def _welcome(self, wanted: int) -> None:
        """Take in workers that have come up; wait where there are fewer than wanted."""
        until = time.monotonic() + START_SECONDS
        while self._coming:
            missing = wanted - len(self._workers)
            ready, _ = self.ray.wait(list(self._coming), timeout=POLL_SECONDS if missing > 0 else 0)
            for reference in ready:
                worker = self._coming.pop(reference)
                try:
                    about = self.ray.get(reference)
                except self.ray.exceptions.RayError as error:
                    self._refused = f"; the last one ended with: {_reason(error)}"
                    self._hire()
                    continue
                worker.pid, worker.is_here = about.pid, about.node == self._node
                self._workers.append(worker)
                if about.arithmetic != self._arithmetic:
                    warnings.warn(
                        f"A worker has {about.arithmetic}; here it is {self._arithmetic}. Results depend on who works "
                        "on which shard; give all nodes the same versions and kind of processor.",
                        RuntimeWarning,
                        stacklevel=2,
                    )
            if wanted <= len(self._workers) and not ready:
                return
            if time.monotonic() > until:
                break
        if not self._workers:
            raise ClusterError(
                f"no worker came up within {START_SECONDS:.0f} s{self._refused}. Look at the cluster with `ray "
                "status`: each worker takes one CPU, and needs geodesic-rl installed where it is."
            )
        if len(self._workers) < wanted:
            warnings.warn(
                f"{len(self._workers)} of {wanted} workers have come up{self._refused}. The others join once the "
                "cluster has CPUs for them.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _share_out(self) -> None:
        """Give workers that have come up meanwhile their share of the shards."""
        if not self._coming:
            return
        before = len(self._workers)
        self._welcome(1)
        while len(self._workers) > before:
            loads = self._loads()
            least, most = min(loads, key=loads.__getitem__), max(loads, key=loads.__getitem__)
            if loads[most] - loads[least] < 2:
                return
            self._move(most, least)

    def _relieve_the_slowest(self, begun: float) -> None:
        """Have the worker that all wait for give a shard away, if a call is then over much earlier.

        Args:
            begun: when the last call did.
        """
        loads = self._loads()
        for worker, shards in loads.items():
            if shards:
                worker.paces.append((worker.news - begun) / shards)
        steady = [worker for worker in loads if len(worker.paces) == PACES]
        if len(steady) < 2:
            return
        slow = max(steady, key=lambda worker: loads[worker] * min(worker.paces))
        fast = min(steady, key=lambda worker: (loads[worker] + 1) * max(worker.paces))
        now, then = loads[slow] * min(slow.paces), (loads[fast] + 1) * max(fast.paces)
        if then < GAIN * now and loads[slow] > 1:
            self._move(slow, fast)

    def _move(self, giver: _Worker, taker: _Worker) -> None:
        """Have a worker's first shard go on with another one."""
        i = next(i for i, shard in enumerate(self._shards) if shard.worker is giver)
        self._keep_states([i])
        self._shards[i].worker.handle.drop.remote(i)
        self._shards[i].worker = taker
        self._send(i)
        self.moved += 1

    def _loads(self) -> dict[_Worker, int]:
        """Count each worker's shards."""
        shards = Counter(shard.worker for shard in self._shards)
        return {worker: shards[worker] for worker in self._workers}

    def _leave(self, worker: _Worker, why: str) -> list[int]:
        """Give up a worker, and its shards to others; gives their numbers."""
        self.ray.kill(worker.handle)
        if worker.is_here:  # one that hangs does not end itself, and keeps its CPU
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
        if worker in self._workers:
            self._workers.remove(worker)
        self._hire()
        if not self._workers:
            self._welcome(1)
        gone = [i for i, shard in enumerate(self._shards) if shard.worker is worker]
        loads = self._loads()
        for i in gone:
            shard = self._shards[i]
            known(shard.state)
            shard.attempts += 1
            if shard.attempts >= MOST_ATTEMPTS:
                raise ClusterError(
                    f"{MOST_ATTEMPTS} workers were lost with the same call, the last one since: {why}. It may be the "
                    f"environments of shard {i} that end the process or never come back; see what they do without "
                    "--executor."
                )
            shard.worker = min(loads, key=loads.__getitem__)
            loads[shard.worker] += 1
            self._send(i)
            self.repeated += len(shard.calls)
        self.lost, self.moved = self.lost + 1, self.moved + len(gone)
        warnings.warn(
            f"Worker {worker.pid} is lost ({why}): its {len(gone)} shards moved to {len(self._workers)} others, and a "
            "new worker is asked for.",
            RuntimeWarning,
            stacklevel=2,
        )
        return gone

    def _connect(self, workers: int, address: str | None) -> None:
        """Join the cluster at an address, or start one here."""
        self.ray._private.worker._worker_logs_enabled = False  # of workers that die it would tell in eight lines
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            for attempt in range(START_ATTEMPTS):
                try:
                    with _outliving_the_terminal():
                        self.ray.init(num_cpus=workers, include_dashboard=False, **quiet)
                    return
                except Exception as error:  # Ray's are of many kinds; on a busy machine it gives up after 30 s
                    self.ray.shutdown()
                    if attempt == START_ATTEMPTS - 1:
                        raise ClusterError(
                            f"Ray did not start on this machine ({_reason(error)}); try again when it is less busy."
                        ) from error
        try:
            self.ray.init(address=address, **quiet)
        except Exception as error:  # Ray's are of many kinds
            if "AuthenticationError" in f"{error} {error.__cause__}":
                raise ValueError(
                    f"the Ray cluster at {address!r} refuses whoever has not its token: set RAY_AUTH_MODE=token, and "
                    "have the file ~/.ray/auth_token of its head here."
                ) from error
            raise ValueError(
                f"there is no Ray cluster at {address!r} ({_reason(error)}); start its head with "
                "`ray start --head`, or leave the address out to start a cluster here."
            ) from error


@contextlib.contextmanager
def _outliving_the_terminal() -> Iterator[None]:
    """Have processes that start in it stay when the terminal goes away: the run, which started them, ends them once it
    has saved itself.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN) if is_main else None
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGHUP, before)


def _reason(error: Exception) -> str:
    """Say in a line what Ray says of an error."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _imported(stays_here: bool) -> Any:
    """Import Ray, which reads variables as it is imported: servers may have to be reached from here alone."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if stays_here:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # as on those systems: loopback only
        os.environ.setdefault("RAY_worker_niceness", "0")  # else others' processes come before the run's own
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('this needs Ray; pip install "geodesic-rl[ray]" brings it.') from error
    return ray
