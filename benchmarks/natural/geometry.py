"""The geometry of the natural gradient, statement by statement, in numbers and one figure.

Each function is one statement, on small problems in float64, with the package's own scores, metrics and steps;
tests/natural/test_geometry.py holds them to be true, docs/geometry.md says what they mean.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian

from agents.copos import LogLinear
from agents.natural.adaptive import AdaptiveInverse
from agents.natural.curvature import Empirical, Sampled, conjugate_gradient
from agents.natural.scores import capture, scores
from agents.policy.distributions import DiagonalGaussian, Head
from agents.policy.networks import Actor, parameter_vector
from benchmarks.common import context, panels, save, write

NAME = "natural/geometry"
UNDAMPED = SimpleNamespace(cg_damping=0.0, solver="cholesky", cg_max_steps=1, cg_tolerance=1.0, cg_warm_start=False)
"""Options of a `Curvature`."""
Chart = Callable[[Tensor], Tensor]
"""Coordinates [2] of a Gaussian to its mean and log σ."""
CHARTS: dict[str, tuple[Chart, Chart]] = {
    "(μ, log σ)": (lambda x: x, lambda x: x),
    "(μ, σ)": (lambda x: torch.stack((x[0], x[1].log())), lambda x: torch.stack((x[0], x[1].exp()))),
    "(μ / σ², 1 / σ²)": (
        lambda x: torch.stack((x[0] / x[1], -0.5 * x[1].log())),
        lambda x: torch.stack((x[0] * torch.exp(-2 * x[1]), torch.exp(-2 * x[1]))),
    ),
}
"""Name -> coordinates to (μ, log σ), and back."""
START, TARGET = (-1.5, 0.7), (1.0, -2.0)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Mirror descent ------------------------------------------------------------------------------------------------------


def table(eta: float, gamma: float = 0.9, states: int = 5, actions: int = 3) -> dict[str, Tensor]:
    """Take a natural-gradient step of a softmax policy with one logit per state and action, in a random decision
    process; give its probabilities [S, A], those of multiplicative weights, and those of mirror descent with the KL."""
    transitions = normal(0, states, actions, states).softmax(-1)
    rewards, start = normal(1, states, actions), normal(2, states).softmax(-1)
    identity = torch.eye(states, dtype=torch.float64)

    def values(logits: Tensor) -> tuple[Tensor, Tensor]:
        pi = logits.softmax(-1)
        kernel = torch.einsum("sa,sat->st", pi, transitions)
        return torch.linalg.solve(identity - gamma * kernel, (pi * rewards).sum(-1)), kernel

    actor = Actor(Head("categorical", (), (actions,)), nn.Sequential(nn.Linear(states, actions, bias=False))).double()
    logits = normal(3, states, actions)
    with torch.no_grad():
        actor.net[0].weight.copy_(logits.T)
    V, kernel = values(logits)
    A = rewards + gamma * transitions @ V - V[:, None]
    visits = (1 - gamma) * torch.linalg.solve((identity - gamma * kernel).T, start)  # of the states, sum 1
    gradient = jacobian(lambda x: values(x)[0] @ start, logits).T.flatten()  # in the order of the weights

    pi = logits.softmax(-1)
    Psi, _ = scores(actor, identity.repeat_interleave(actions, 0), torch.arange(actions).repeat(states))
    weights = (visits[:, None] * pi).flatten()
    product = Psi.weighted((Psi.n * weights).sqrt()).fisher_matvec  # F is singular: a state's logits may all rise
    w = conjugate_gradient(product, gradient, max_iterations=500, tolerance=1e-13).direction
    multiplied = pi * torch.exp(eta * A / (1 - gamma))
    mirror = [nearest(p, eta * a / (1 - gamma)) for p, a in zip(pi, A, strict=True)]
    return {
        "natural gradient": (logits + eta * w.view(actions, states).T).softmax(-1),
        "multiplicative weights": multiplied / multiplied.sum(-1, keepdim=True),
        "mirror descent": torch.stack(mirror),
    }


def nearest(p: Tensor, gain: Tensor) -> Tensor:
    """Maximize gainᵀ q - KL(q || p) over probabilities q, numerically."""

    def loss(x: Tensor) -> Tensor:
        q = x.softmax(-1)
        return (q * (q.log() - p.log())).sum() - q @ gain

    return torch.softmax(minimum(loss, p.log()), -1)


def minimum(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Minimize a function of a vector, numerically."""

    def both(x: np.ndarray) -> tuple[float, np.ndarray]:
        at = torch.tensor(x, requires_grad=True)
        value = loss(at)
        return value.item(), torch.autograd.grad(value, at)[0].numpy()

    found = minimize(both, start.numpy(), jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 2000})
    return torch.tensor(found.x)


def gaussian_policy(eta: float = 20.0, outputs: int = 2, inputs: int = 3, n: int = 12) -> dict[str, Tensor]:
    """Take a natural-gradient step 1 / η of a linear Gaussian policy in its natural parameters (1 / σ², Kᵀ / σ²); give
    them, as by a mirror step with the log-partition's Bregman divergence, and as COPOS updates them for ω = 0; and the
    Fisher matrix as the scores have it and as the log-partition's Hessian, both in the natural parameters."""
    s, A = normal(0, n, inputs), normal(1, n)
    actor = Actor(Head("gaussian", (outputs,)), nn.Sequential(nn.Linear(inputs, outputs))).double()
    theta = 0.3 * normal(2, sum(x.numel() for x in actor.parameters()))
    with torch.no_grad():
        nn.utils.vector_to_parameters(theta, actor.parameters())
    a = actor(s).mean.detach() + normal(3, n, outputs) * actor(s).log_std.detach().exp()
    features, size = torch.cat((s, torch.ones(n, 1, dtype=torch.float64)), 1), outputs * inputs

    def split(theta: Tensor) -> tuple[Tensor, Tensor]:
        """Weights with the bias, [K, O + 1], and log σ [K]."""
        weights, bias, log_std = theta.split([size, outputs, outputs])
        return torch.cat((weights.view(outputs, inputs), bias[:, None]), 1), log_std

    def natural(theta: Tensor) -> Tensor:
        K, log_std = split(theta)
        precision = torch.exp(-2 * log_std)
        return torch.cat((-0.5 * precision, (K * precision[:, None]).flatten()))

    def policy(x: Tensor) -> DiagonalGaussian:
        precision = -2 * x[:outputs]
        return DiagonalGaussian(
            features @ (x[outputs:].view(outputs, -1) / precision[:, None]).T, -0.5 * precision.log()
        )

    def log_partition(x: Tensor) -> Tensor:
        precision = -2 * x[:outputs]
        linear = features @ x[outputs:].view(outputs, -1).T
        return (0.5 * linear.square() / precision - 0.5 * precision.log()).sum(1).mean()

    Psi, _ = scores(actor, s, a)
    fisher, gradient, lam = Psi.roots().fisher(), Psi.gradient(A), natural(theta)
    w = torch.linalg.solve(fisher, gradient)
    into = jacobian(natural, theta)  # dλ / dθ
    back = torch.linalg.inv(into)
    of_mean = torch.linalg.solve(hessian(log_partition, lam), back.T @ gradient)  # ∇ in the mean parameters ∇Φ(λ)

    def loss(x: Tensor) -> Tensor:
        mean = torch.autograd.grad(log_partition(x), x, create_graph=True)[0]
        return policy(x).kl(policy(lam)).mean() - of_mean @ mean / eta

    old, along = split(theta), split(w)
    copos, log_std = LogLinear(old[0].T, along[0].T, old[1], along[1]).at(eta, 0.0)
    precision = torch.exp(-2 * log_std)
    return {
        "natural gradient": lam + into @ w / eta,
        "mirror step": minimum(loss, lam),
        "COPOS": torch.cat((-0.5 * precision, (copos.T * precision[:, None]).flatten())),
        "Fisher matrix": back.T @ fisher @ back,
        "log-partition's Hessian": hessian(log_partition, lam),
    }


# Charts --------------------------------------------------------------------------------------------------------------


def gaussian(x: Tensor) -> DiagonalGaussian:
    """Give N(μ, σ²) for (μ, log σ)."""
    return DiagonalGaussian(x[None, :1], x[1:])


def metric(chart: Chart, x: Tensor) -> Tensor:
    """Give the Fisher matrix of a Gaussian in a chart's coordinates x, [2, 2]."""
    rows = jacobian(lambda x: gaussian(chart(x)).fisher_roots()[:, 0], x)
    return rows.T @ rows


def slope(chart: Chart, x: Tensor) -> Tensor:
    """Give the gradient of KL(target || Gaussian at x) in a chart's coordinates, [2]."""
    target = gaussian(torch.tensor(TARGET, dtype=torch.float64))
    return jacobian(lambda x: target.kl(gaussian(chart(x)))[0], x)


def path(name: str, natural: bool, step: float, steps: int) -> Tensor:
    """Descend from START in a chart's coordinates; give (μ, log σ) on the way, [steps + 1, 2]."""
    chart, inverse = CHARTS[name]
    x = inverse(torch.tensor(START, dtype=torch.float64))
    found = [chart(x)]
    for _ in range(steps):
        d = slope(chart, x)
        x = x - step * (torch.linalg.solve(metric(chart, x), d) if natural else d)
        found.append(chart(x))
    return torch.stack(found)


# Newton's method -----------------------------------------------------------------------------------------------------


def logistic(scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Give Newton's and the natural gradient's step of a logistic regression's loss on arbitrary labels."""
    s, labels = normal(0, 40, 3), (normal(1, 40) > 0).double()[:, None]
    actor = Actor(Head("bernoulli", (1,)), nn.Sequential(nn.Linear(3, 1))).double()
    theta = scale * normal(2, 4)
    with torch.no_grad():
        nn.utils.vector_to_parameters(theta, actor.parameters())
    Psi, _ = scores(actor, s, labels)
    gradient = Psi.gradient(torch.ones(40, dtype=torch.float64))

    def loss(theta: Tensor) -> Tensor:
        logits = s @ theta[:3] + theta[3]
        return nn.functional.binary_cross_entropy_with_logits(logits[:, None], labels)

    return torch.linalg.solve(hessian(loss, theta), gradient), torch.linalg.solve(Psi.roots().fisher(), gradient)


def of_a_sample(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Give the Hessian of -mean log N(y; μ, σ²) in (μ, log σ), and the Fisher matrix, [2, 2] each."""
    return hessian(lambda x: -gaussian(x).log_prob(y[:, None]).mean(), x), metric(lambda x: x, x)


# Lengths -------------------------------------------------------------------------------------------------------------


def saturated(scale: float, n: int = 4000) -> dict[str, float]:
    """Scale the weights of y = tanh(W s + b), the mean of a Gaussian with σ = 1; give the mean squared length of the
    scores ψ, that of their natural gradients F⁻¹ ψ in the metric, ψᵀ F⁻¹ ψ, and the number of parameters."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double()
    s, noise, theta = normal(0, n, 4), normal(1, n, 3), scale * normal(2, 15) / 2
    with torch.no_grad():
        nn.utils.vector_to_parameters(theta, net.parameters())
    fisher = capture(net, lambda: net(s).T).fisher()
    psi = capture(net, lambda: (net(s) * noise).sum(1)).dense()  # (a - y) ∇y
    factor = torch.linalg.cholesky(fisher)
    natural = torch.linalg.solve_triangular(factor, psi.T, upper=False).square().sum(0).mean()
    return {"plain": psi.square().sum(1).mean().item(), "natural": natural.item(), "parameters": psi.shape[1]}


# The empirical Fisher matrix -----------------------------------------------------------------------------------------


def regression(distance: float) -> dict[str, Tensor]:
    """Fit a line to points on a line, from a distance to it; give where one step of the Fisher matrix's direction and
    of the empirical one's ends, less the solution, [2] each."""
    s = torch.linspace(0.1, 2, 20, dtype=torch.float64)[:, None]
    solution, away = torch.tensor([1.0, -0.5], dtype=torch.float64), torch.tensor([0.6, 0.8], dtype=torch.float64)
    net = nn.Sequential(nn.Linear(1, 1)).double()
    with torch.no_grad():
        nn.utils.vector_to_parameters(solution + distance * away, net.parameters())
        rest = s[:, 0] * solution[0] + solution[1] - net(s)[:, 0]
    Psi, ends = capture(net, lambda: net(s)[:, 0]), {}
    for name, kind in (("Fisher", Sampled), ("empirical", Empirical)):
        ends[name] = parameter_vector(net) + kind(UNDAMPED).direction(Psi, rest).direction - solution
    return ends


def second_moment(beta2: float = 0.99, passes: int = 20) -> dict[str, Tensor]:
    """Give Adam one sample's gradient at a time, without moving; give its second moment, and the diagonal of the
    empirical Fisher matrix with Adam's weights of the samples, and with equal ones."""
    n = 50
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    theta, s, rest = normal(0, 21), normal(1, n, 3), normal(2, n)
    with torch.no_grad():
        nn.utils.vector_to_parameters(theta, net.parameters())
    Psi = capture(net, lambda: net(s)[:, 0])
    rows = Psi.dense() * rest[:, None]
    x = nn.Parameter(theta.clone())
    adam = torch.optim.Adam([x], lr=0.0, betas=(0.9, beta2))
    for row in rows.repeat(passes, 1):
        x.grad = row
        adam.step()
    t = n * passes
    weights = (1 - beta2) * beta2 ** torch.arange(t - 1, -1, -1, dtype=torch.float64) / (1 - beta2**t)
    of_samples = weights.view(passes, n).sum(0)
    return {
        "Adam": adam.state[x]["exp_avg_sq"] / (1 - beta2**t),
        "weighted": Psi.weighted(rest * (n * of_samples).sqrt()).diagonal(),
        "equal": Psi.weighted(rest).diagonal(),
    }


def running_inverse(updates: int, rate: float | None = None) -> tuple[list[float], Tensor, Tensor]:
    """Take a policy's scores into an `AdaptiveInverse`, one at a time with a rate, or 1 / (t + 1); give the distance of
    its inverse from the Fisher matrix's on the way, relative; and at the end what it is and what it estimates."""
    s = normal(0, updates, 3)
    actor = Actor(Head("gaussian", (1,)), nn.Sequential(nn.Linear(3, 1))).double()
    with torch.no_grad():
        nn.utils.vector_to_parameters(torch.tensor([0.5, -0.3, 0.2, 0.1, 0.3], dtype=torch.float64), actor.parameters())
        a = actor(s).sample(normal(1, updates, 1))
    Psi, _ = scores(actor, s, a)
    # The inputs are standard normal: F is diagonal, 1 / σ² for weights and bias and 2 for log σ.
    wanted = torch.tensor([math.exp(0.6)] * 4 + [0.5], dtype=torch.float64).diag()
    inverse = AdaptiveInverse(torch.eye(5, dtype=torch.float64))
    errors, rows = [], Psi.dense()
    for t, row in enumerate(rows, start=1):
        inverse.update(row[None], 1 / (t + 1) if rate is None else rate)
        errors.append(((inverse.inverse - wanted).norm() / wanted.norm()).item())
    of_all = torch.linalg.inv((torch.eye(5, dtype=torch.float64) + rows.T @ rows) / (updates + 1))
    return errors, inverse.inverse, of_all


# Numbers and figure --------------------------------------------------------------------------------------------------


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    steps, policy, (newton, natural) = table(0.3), gaussian_policy(), logistic()
    scales = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
    lengths = [saturated(scale) for scale in scales]
    distances = [10.0**-k for k in range(5)]
    ends = [regression(distance) for distance in distances]
    moments = second_moment()
    rates: dict[str, float | None] = {"1 / (t + 1)": None, "0.01": 0.01, "0.1": 0.1}
    errors = {name: running_inverse(3000, rate)[0] for name, rate in rates.items()}
    results: dict[str, Any] = {
        "table: largest difference of probabilities": {
            name: (steps["natural gradient"] - p).abs().max().item() for name, p in steps.items()
        },
        "gaussian policy: largest difference of natural parameters": {
            name: (policy["natural gradient"] - policy[name]).abs().max().item() for name in ("mirror step", "COPOS")
        },
        "logistic regression: largest difference of Newton's step": (newton - natural).abs().max().item(),
        "saturation": [{"scale": scale} | length for scale, length in zip(scales, lengths, strict=True)],
        "regression: distance after one step": [
            {"distance": distance} | {name: end.norm().item() for name, end in both.items()}
            for distance, both in zip(distances, ends, strict=True)
        ],
        "Adam's second moment: largest relative difference from the weighted diagonal": (
            (moments["Adam"] / moments["weighted"] - 1).abs().max().item()
        ),
        "running inverse: relative error at the end": {name: x[-1] for name, x in errors.items()},
    }
    for statement, found in results.items():
        print(statement, found)
    print(write(NAME, {**context(), **results}))
    figure, axes = panels(8, 2, 5.6, 4.2)
    draw_steps(axes[0], axes[1])
    draw_table(axes[2])
    draw_newton(axes[3])
    draw_saturation(axes[4], scales, lengths)
    draw_regression(axes[5], distances, ends)
    draw_moments(axes[6], moments)
    draw_inverse(axes[7], errors)
    print(save(figure, NAME))


def draw_contours(axis: Any) -> None:
    """Draw KL(target || Gaussian), and unit circles of the metric, over (μ, log σ)."""
    means, stds = np.meshgrid(np.linspace(-2.4, 2.4, 160), np.linspace(-2.6, 1.4, 160))
    distance = math.exp(2 * TARGET[1]) + (TARGET[0] - means) ** 2
    kl = stds - TARGET[1] + 0.5 * (distance * np.exp(-2 * stds) - 1)
    axis.contour(means, stds, np.log(kl + 1e-3), levels=14, cmap="Greys", linewidths=0.7, alpha=0.7)
    turn = torch.linspace(0, 2 * math.pi, 60, dtype=torch.float64)
    circle = torch.stack((turn.cos(), turn.sin()))
    for mean in (-2.0, -1.0, 0.0, 1.0, 2.0):
        for log_std in (-2.0, -1.2, -0.4, 0.4, 1.0):
            x = torch.tensor((mean, log_std), dtype=torch.float64)
            ellipse = torch.linalg.inv(torch.linalg.cholesky(metric(lambda x: x, x))).T @ circle
            axis.plot(*(x[:, None] + 0.15 * ellipse), color="#3f9a5f", linewidth=0.8, alpha=0.8)
    axis.plot(*TARGET, "*", color="black", markersize=10)
    axis.set(xlabel="μ", ylabel="log σ", xlim=(-2.4, 2.4), ylim=(-2.6, 1.4))


def draw_steps(steepest: Any, charts: Any) -> None:
    draw_contours(steepest)
    steepest.set_title("steps of steepest descent and of the natural gradient")
    for natural, step, steps, color in ((False, 0.036, 60, "#d1741f"), (True, 0.4, 25, "#1f5fa8")):
        name = f"{'natural gradient' if natural else 'steepest descent'}, {steps} steps of {step}"
        steepest.plot(*path("(μ, log σ)", natural, step, steps).T, "o-", color=color, markersize=3, label=name)
    steepest.legend(frameon=True, fontsize=8, loc="lower left")
    draw_contours(charts)
    charts.set_title("flows in three charts: natural ones coincide")
    plain = {"(μ, log σ)": (0.02, 800), "(μ, σ)": (0.012, 900), "(μ / σ², 1 / σ²)": (0.05, 900)}
    for name, color, style, width in zip(CHARTS, ("#1f5fa8", "#d1741f", "#8e5bb5"), "-:-", (4, 2.5, 1), strict=True):
        charts.plot(*path(name, True, 0.02, 500).T, style, color=color, linewidth=width, alpha=0.6, label=name)
        charts.plot(*path(name, False, *plain[name]).T, "--", color=color, linewidth=1.2)
    charts.legend(frameon=True, fontsize=8, loc="lower left", title="natural; dashed: plain", title_fontsize=8)


def draw_table(axis: Any) -> None:
    etas = np.linspace(0, 1.5, 16)
    found = [table(float(eta)) for eta in etas]
    for a, color in enumerate(("#1f5fa8", "#d1741f", "#3f9a5f")):
        axis.plot(etas, [x["natural gradient"][0, a] for x in found], color=color, linewidth=1.5, label=f"action {a}")
        axis.plot(etas, [x["multiplicative weights"][0, a] for x in found], "o", color=color, markersize=3)
        axis.plot(etas, [x["mirror descent"][0, a] for x in found], "x", color=color, markersize=7)
    axis.set(title="a table: natural step (line), multiplicative\nweights (dots), KL mirror step (crosses)")
    axis.set(xlabel="step η", ylabel="π(a|s) after it")
    axis.legend(frameon=False, fontsize=8)


def draw_newton(axis: Any) -> None:
    y = torch.linspace(-1, 1, 200, dtype=torch.float64) * 2
    offsets = np.linspace(-2.5, 2.5, 101)
    log_std = 0.5 * math.log(y.var(correction=0).item())
    least = {"Hessian": [], "Fisher matrix": []}
    for offset in offsets:
        both = of_a_sample(torch.tensor((offset, log_std), dtype=torch.float64), y)
        for values, matrix in zip(least.values(), both, strict=True):
            values.append(torch.linalg.eigvalsh(matrix)[0].item())
    for (name, values), color in zip(least.items(), ("#d1741f", "#1f5fa8"), strict=True):
        axis.plot(offsets, values, color=color, label=name)
    axis.axhline(0, color="black", linewidth=0.7)
    axis.plot(0, least["Hessian"][50], "*", color="black", markersize=10, label="likelihood's maximum")
    axis.set(title="Newton's method: equal at the maximum only", xlabel="μ - mean of the sample")
    axis.set_ylabel("least eigenvalue in (μ, log σ)")
    axis.legend(frameon=False, fontsize=8)


def draw_saturation(axis: Any, scales: list[float], lengths: list[dict[str, float]]) -> None:
    axis.plot(scales, [x["plain"] for x in lengths], "o-", color="#d1741f", label="plain: mean |ψ|²")
    axis.plot(scales, [x["natural"] for x in lengths], "o-", color="#1f5fa8", label="natural: mean ψᵀ F⁻¹ ψ")
    axis.axhline(15, color="black", linewidth=0.8, linestyle=":", label="parameters")
    axis.set(
        title="a layer that saturates",
        xlabel="scale of its weights",
        ylabel="squared length",
        xscale="log",
        yscale="log",
    )
    axis.legend(frameon=False, fontsize=8)


def draw_regression(axis: Any, distances: list[float], ends: list[dict[str, Tensor]]) -> None:
    colors = {"Fisher": "#1f5fa8", "empirical": "#d1741f"}
    for name, color in colors.items():
        after = [max(end[name].norm().item(), 1e-17) for end in ends]
        axis.loglog(distances, after, "o-", color=color, label=name)
    axis.loglog(distances, distances, ":", color="black", linewidth=0.8, label="where it began")
    axis.set(title="one step of a regression", xlabel="distance before", ylabel="distance after")
    axis.legend(frameon=False, fontsize=8)


def draw_moments(axis: Any, moments: dict[str, Tensor]) -> None:
    adam = moments["Adam"]
    axis.loglog(moments["equal"], adam, "o", color="#d1741f", label="equal weights")
    axis.loglog(moments["weighted"], adam, "x", color="#1f5fa8", label="Adam's weights of the samples")
    ends = [adam.min().item(), adam.max().item()]
    axis.loglog(ends, ends, ":", color="black", linewidth=0.8)
    axis.set(title="Adam's second moment, one sample a step", ylabel="Adam's v")
    axis.set_xlabel("diagonal of the empirical Fisher matrix")
    axis.legend(frameon=False, fontsize=8)


def draw_inverse(axis: Any, errors: dict[str, list[float]]) -> None:
    for (name, values), color in zip(errors.items(), ("#1f5fa8", "#3f9a5f", "#d1741f"), strict=True):
        axis.loglog(range(1, len(values) + 1), values, color=color, linewidth=1, label=f"rate {name}")
    axis.set(title="the adaptive inverse", xlabel="samples", ylabel="relative error of F⁻¹")
    axis.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
