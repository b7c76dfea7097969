"""PES and NRES beside evosax's: on its example, the toy 2-D regression, and on two of its functions.

evosax (https://github.com/RobertTLange/evosax) asks for a population and is told its losses; whoever calls carries the
inner states and begins episodes anew, which is done here as in its example: all particles in lockstep, updates in a
scan that JAX compiles. Ours run in lockstep too (staggered=False), with the same settings: T = 100, K = 10, 100
particles and Adam 1e-2 with β₁ = 0.99. σ is 0.3 on the regression; it is 0.1 on evosax's BBOB sphere and Rosenbrock
function in ten dimensions, which have no inner state: a window scores the function's value at its θ.

Needs evosax and jax (pip install evosax "jax[cpu]"), which the package does not. Seconds are processor time of one
thread, evosax's without compiling; the sides are alternated, and medians are over seeds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from agents.evolution.engine import Scheme
from agents.evolution.unroll import ParticleState
from benchmarks.common import context, installed, panels, save, write
from benchmarks.search import ascend, finite
from benchmarks.toys import ToyRegression

NAME = "evolution/evosax_peer"
T, K, PARTICLES, LR, BETAS = 100, 10, 100, 1e-2, (0.99, 0.999)
DIMENSIONS = 10
METHODS = {"PES": "pes", "NRES": "nres"}


class Function:
    """A function of θ alone as an unrolled computation: each step of an episode loses it anew."""

    def __init__(self, name: str) -> None:
        self.name = name

    def loss(self, x: Tensor) -> Tensor:
        if self.name == "sphere":
            return x.square().sum(-1)
        z = max(1.0, DIMENSIONS**0.5 / 8) * x + 1
        first, rest = z[..., :-1], z[..., 1:]
        return (100 * (first.square() - rest).square() + (first - 1).square()).sum(-1)

    def init(self, keys: Tensor, slots: Tensor) -> ParticleState:
        return {"steps": torch.zeros_like(keys)}

    def unroll(self, theta: Tensor, state: ParticleState, window: int) -> tuple[ParticleState, Tensor, Tensor]:
        steps = state["steps"] + window
        return {"steps": steps}, -self.loss(theta), steps >= T


TASKS: dict[str, tuple[Any, list[float], float]] = {
    "toy regression": (ToyRegression(T, torch.float32), [-4.0, -4.0], 0.3),
    "sphere": (Function("sphere"), [2.0] * DIMENSIONS, 0.1),
    "rosenbrock": (Function("rosenbrock"), [2.0] * DIMENSIONS, 0.1),
}
"""Name -> what is unrolled, the first θ, and σ."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    every = arguments.updates // 20
    for task in TASKS:
        for method in METHODS:
            theirs = evosax(task, method, arguments.updates, every)
            for seed in range(arguments.seeds):
                for side, work in (("ours", partial(ours, task, method, arguments.updates, every)), ("evosax", theirs)):
                    begin = time.process_time()
                    path = work(seed)
                    seconds = time.process_time() - begin
                    curve = [finite(round(loss_at(task, theta), 4)) for theta in path]
                    rows.append({"task": task, "method": method, "side": side, "seed": seed, "curve": curve})
                    rows[-1]["seconds"] = round(seconds, 3)
            show(rows[-2 * arguments.seeds :])
    results = {"settings": vars(arguments), "every": every, "packages": installed("evosax", "jax"), "rows": rows}
    print(write(NAME, {**context(), **results}))
    plot(rows, every)


def loss_at(task: str, theta: Tensor) -> float:
    """Return the loss of an episode at θ; of a function, its value."""
    unroll, _, _ = TASKS[task]
    zero = torch.zeros(1, dtype=torch.int64)
    window = T if task == "toy regression" else 1
    return -unroll.unroll(theta[None], unroll.init(zero, zero), window)[1].item()


def ours(task: str, method: str, updates: int, every: int, seed: int) -> list[Tensor]:
    """Return θ before the search and after every so many updates."""
    unroll, first, sigma = TASKS[task]
    theta = torch.tensor(first)
    scheme = Scheme.of(METHODS[method], particles=PARTICLES, window=K, horizon=T, staggered=False)
    adam = partial(torch.optim.Adam, lr=LR, betas=BETAS)
    path = [theta]
    for update, reached, _ in ascend(unroll, scheme, theta, sigma, adam, updates, seed):
        if update % every == 0:
            path.append(reached.clone())
    return path


def evosax(task: str, method: str, updates: int, every: int) -> Any:
    """Return a compiled function of a seed that gives what `ours` does."""
    import jax
    import jax.numpy as jnp
    import optax
    from evosax.algorithms import NoiseReuseES, PersistentES
    from evosax.problems import BBOBProblem

    _, first, sigma = TASKS[task]
    kind = PersistentES if method == "PES" else NoiseReuseES
    theta = jnp.array(first)
    schedule = optax.constant_schedule(sigma)
    es = kind(PARTICLES, theta, optimizer=optax.adam(LR, *BETAS), std_schedule=schedule)
    params = es.default_params.replace(T=T, K=K)

    def begin() -> tuple[Any, Any]:
        return jnp.ones((PARTICLES, 2)), jnp.zeros(PARTICLES)

    def regression(rows: Any, inner: tuple[Any, Any]) -> tuple[Any, Any]:
        """Advance ToyRegression by a window: losses and states."""
        rates = jnp.exp(rows)

        def step(carried: tuple[Any, Any, Any], _: None) -> tuple[Any, None]:
            x, t, loss = carried
            ripple = jnp.exp(-5 * x[:, 0] ** 2)
            along = (
                x[:, 0] / jnp.sqrt(x[:, 0] ** 2 + 5) - 10 * x[:, 0] * jnp.sin(x[:, 1]) ** 2 * ripple,
                jnp.sin(2 * x[:, 1]) * ripple + 0.25 * jnp.sign(x[:, 1] - 100),
            )
            rate = (1 - t / T) * rates[:, 0] + t / T * rates[:, 1]
            x = x - rate[:, None] * jnp.stack(along, 1)
            bowl = jnp.sqrt(x[:, 0] ** 2 + 5) - 5**0.5
            ripple = jnp.exp(-5 * x[:, 0] ** 2)
            loss = loss + bowl + jnp.sin(x[:, 1]) ** 2 * ripple + 0.25 * jnp.abs(x[:, 1] - 100)
            return (x, t + 1, loss), None

        (x, t, loss), _ = jax.lax.scan(step, (*inner, jnp.zeros(PARTICLES)), None, length=K)
        ended = t >= T
        return loss, (jnp.where(ended[:, None], 1.0, x), jnp.where(ended, 0.0, t))

    def function(rows: Any, inner: tuple[Any, Any]) -> tuple[Any, Any]:
        losses, _, _ = problem.eval(jax.random.key(0), rows, problem_state)
        return losses, inner

    advance = regression
    if task != "toy regression":
        problem = BBOBProblem(task, DIMENSIONS, x_opt=jnp.zeros(DIMENSIONS), f_opt=0.0, sample_rotations=False)
        problem_state, advance = problem.init(jax.random.key(0)), function

    def update(carried: tuple[Any, Any, Any], _: None) -> tuple[Any, Any]:
        key, state, inner = carried
        key, ask, tell = jax.random.split(key, 3)
        rows, state = es.ask(ask, state, params)
        losses, inner = advance(rows, inner)
        state, _ = es.tell(tell, rows, losses, state, params)
        return (key, state, inner), state.mean

    @jax.jit
    def run(key: Any) -> Any:
        key, start = jax.random.split(key)
        state = es.init(start, theta, params)
        return jax.lax.scan(update, (key, state, begin()), None, length=updates)[1]

    run(jax.random.key(0)).block_until_ready()  # compiled

    def of(seed: int) -> list[Tensor]:
        means = torch.tensor(jax.device_get(run(jax.random.key(seed))))
        return [torch.tensor(first), *means[every - 1 :: every]]

    return of


def show(rows: list[dict[str, Any]]) -> None:
    for side in ("ours", "evosax"):
        mine = [row for row in rows if row["side"] == side]
        seconds = statistics.median(row["seconds"] for row in mine)
        ends = " ".join(f"{row['curve'][-1]:.4g}" for row in mine)
        halves = " ".join(f"{row['curve'][10]:.4g}" for row in mine)
        print(
            f"{mine[0]['task']:15} {mine[0]['method']:5} {side:7} halfway {halves}  end {ends}  {seconds:.2f} s",
            flush=True,
        )


def plot(rows: list[dict[str, Any]], every: int) -> None:
    figure, axes = panels(len(TASKS), 3, 4.6, 3.6)
    for axis, task in zip(axes, TASKS, strict=True):
        for index, method in enumerate(METHODS):
            for side, style in (("ours", "-"), ("evosax", "--")):
                mine = [row for row in rows if (row["task"], row["method"], row["side"]) == (task, method, side)]
                for row in mine:
                    x = [every * place for place in range(len(row["curve"]))]
                    label = f"{method}, {side}" if row["seed"] == 0 else None
                    axis.plot(x, row["curve"], style, color=f"C{index}", linewidth=1, label=label)
        axis.set(xlabel="updates", ylabel="loss", yscale="log")
        axis.set_title(task, loc="left", fontsize=11)
    axes[0].legend(fontsize=8, frameon=False)
    save(figure, NAME)


if __name__ == "__main__":
    main()
