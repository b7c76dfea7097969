"""Meta-optimization: a classifier is trained, and what trains it is searched for. Differentiable.

The tasks of Vicol, Metz & Sohl-Dickstein 2021 (section 5), https://arxiv.org/abs/2112.13835.
Differs from the paper: any data set that fits in memory, read in a cyclic order; the paper trains on MNIST.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.func import grad
from torch.nn.functional import cross_entropy

from agents import noise
from agents.evolution.unroll import ParticleState


class Classification:
    """An MLP with ReLU units and its data: the inner problem. W counts its weights.

    Args:
        inputs: [D, F] floats, in a random order.
        labels: [D] int64.
        hidden: units of each hidden layer.
        batch_size: examples per inner step, at most D.

    Raises:
        ValueError: the batch is larger than the data set.
    """

    def __init__(self, inputs: Tensor, labels: Tensor, hidden: tuple[int, ...], batch_size: int) -> None:
        if not 1 <= batch_size <= len(inputs):
            raise ValueError(f"batch_size is {batch_size}; give 1 to {len(inputs)}, the number of examples.")
        self.inputs, self.labels, self.batch_size = inputs, labels, batch_size
        widths = (inputs.shape[1], *hidden, int(labels.max()) + 1)
        self.layers = list(itertools.pairwise(widths))
        self.size = sum((fan_in + 1) * fan_out for fan_in, fan_out in self.layers)

    def init(self, keys: Tensor) -> Tensor:
        """Draw weights [n, W]: He-normal matrices and zero biases, drawn from the keys [n]."""
        draws = {key: self._draw(key) for key in set(keys.tolist())}
        return torch.stack([draws[key] for key in keys.tolist()]).to(keys.device)

    def batch(self, keys: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the examples [n, B, F] and labels [n, B] of an inner step, in the data's order from the key on."""
        rows = (keys + steps * self.batch_size)[:, None] + torch.arange(self.batch_size, device=keys.device)
        rows = rows % len(self.inputs)
        return self.inputs[rows], self.labels[rows]

    def logits(self, weights: Tensor, inputs: Tensor) -> Tensor:
        """Return the outputs [n, B, C] of the weights [n, W] for inputs [n, B, F]."""
        x, start = inputs, 0
        for number, (fan_in, fan_out) in enumerate(self.layers):
            matrix = weights[:, start : start + fan_in * fan_out].unflatten(1, (fan_in, fan_out))
            start += fan_in * fan_out
            x = torch.baddbmm(weights[:, None, start : start + fan_out], x.relu() if number else x, matrix)
            start += fan_out
        return x

    def loss(self, weights: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy [n] (nats) of the weights [n, W] on inputs [n, B, F] and labels [n, B]."""
        x = self.logits(weights, inputs)
        return cross_entropy(x.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels).mean(1)

    def gradient(self, weights: Tensor, keys: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient [n, W] and loss [n] on the batch of one inner step."""

        def total(weights: Tensor) -> tuple[Tensor, Tensor]:
            losses = self.loss(weights, *self.batch(keys, steps))
            return losses.sum(), losses

        return grad(total, has_aux=True)(weights)

    def _draw(self, key: int) -> Tensor:
        normal = noise.normal(key, "weights", 0, (1, 1, self.size), self.inputs.dtype).flatten()
        parts = []
        for fan_in, fan_out in self.layers:
            parts += [normal[: fan_in * fan_out] * (2 / fan_in) ** 0.5, torch.zeros(fan_out, dtype=normal.dtype)]
            normal = normal[fan_in * fan_out :]
        return torch.cat(parts)


class LearningRateDecay:
    """Tune the learning rate exp(θ₀) / (1 + t/Q)^exp(θ₁) of gradient descent with momentum; P = 2.

    A window scores minus the sum of the batch losses that its steps meet.

    Args:
        problem: the classifier to train.
        horizon: inner steps of an episode.
        time_scale: Q, inner steps.
        momentum: of the inner optimizer, in [0, 1).

    Source of the schedule: Wu, Ren, Liao & Grosse 2018, https://arxiv.org/abs/1803.02021.
    """

    def __init__(
        self, problem: Classification, horizon: int = 5000, time_scale: float = 5000.0, momentum: float = 0.9
    ) -> None:
        self.problem, self.horizon, self.time_scale, self.momentum = problem, horizon, time_scale, momentum

    def init(self, keys: Tensor, slots: Tensor) -> ParticleState:
        weights = self.problem.init(keys)
        return {
            "weights": weights,
            "velocity": torch.zeros_like(weights),
            "keys": keys,
            "steps": torch.zeros_like(keys),
        }

    def unroll(self, theta: Tensor, state: ParticleState, window: int) -> tuple[ParticleState, Tensor, Tensor]:
        weights, velocity, keys, steps = state["weights"], state["velocity"], state["keys"], state["steps"]
        initial, power = theta.exp().to(weights.dtype).unbind(1)
        score = torch.zeros_like(weights[:, 0])
        for _ in range(window):
            gradient, loss = self.problem.gradient(weights, keys, steps)
            rate = initial * (1 + steps / self.time_scale) ** -power
            velocity = self.momentum * velocity + gradient
            weights = weights - rate[:, None] * velocity
            score = score - loss
            steps = steps + 1
        state = {"weights": weights, "velocity": velocity, "keys": keys, "steps": steps}
        return state, score, steps >= self.horizon


class LearnedOptimizer:
    """Search for an optimizer: a small MLP that reads four features of each weight and moves it; P = `size`.

    Features: the gradient and two running means of it (decays 0.9 and 0.99), each over the root of the gradient's
    running mean square, and the weight. With the outputs d and a, the weight moves by -`scale` d exp(a).
    A window scores minus the sum of the batch losses that its steps meet.

    Args:
        problem: the classifier to train.
        horizon: inner steps of an episode.
        hidden: units of the optimizer's one hidden layer.
        scale: of the moves, in units of a weight.

    Source: Metz et al. 2019, "Understanding and correcting pathologies in the training of learned optimizers",
    https://arxiv.org/abs/1810.10180. Differs from the paper: fewer features.
    """

    FEATURES = 4
    DECAYS = (0.9, 0.99)
    SQUARE_DECAY = 0.99

    def __init__(self, problem: Classification, horizon: int = 1000, hidden: int = 8, scale: float = 1e-3) -> None:
        self.problem, self.horizon, self.hidden, self.scale = problem, horizon, hidden, scale
        self.size = (self.FEATURES + 1) * hidden + (hidden + 1) * 2

    def init(self, keys: Tensor, slots: Tensor) -> ParticleState:
        weights = self.problem.init(keys)
        means = torch.zeros(*weights.shape, len(self.DECAYS), dtype=weights.dtype, device=weights.device)
        steps = torch.zeros_like(keys)
        return {"weights": weights, "means": means, "square": torch.zeros_like(weights), "keys": keys, "steps": steps}

    def unroll(self, theta: Tensor, state: ParticleState, window: int) -> tuple[ParticleState, Tensor, Tensor]:
        weights, means, square = state["weights"], state["means"], state["square"]
        keys, steps = state["keys"], state["steps"]
        theta = theta.to(weights.dtype)
        decays = torch.tensor(self.DECAYS, dtype=weights.dtype, device=weights.device)
        score = torch.zeros_like(weights[:, 0])
        for _ in range(window):
            gradient, loss = self.problem.gradient(weights, keys, steps)
            means = decays * means + (1 - decays) * gradient[..., None]
            square = self.SQUARE_DECAY * square + (1 - self.SQUARE_DECAY) * gradient.square()
            # As in Adam, the running means start at zero and are corrected for it.
            age = (steps + 1)[:, None]
            root = (square / (1 - self.SQUARE_DECAY**age)).sqrt() + 1e-8
            unbiased = means / (1 - decays**age)[:, None]
            features = torch.cat((torch.stack((gradient, weights * root), 2), unbiased), 2) / root[..., None]
            weights = weights - self._move(theta, features)
            score = score - loss
            steps = steps + 1
        state = {"weights": weights, "means": means, "square": square, "keys": keys, "steps": steps}
        return state, score, steps >= self.horizon

    def _move(self, theta: Tensor, features: Tensor) -> Tensor:
        sizes = [self.FEATURES * self.hidden, self.hidden, self.hidden * 2, 2]
        first, first_bias, second, second_bias = theta.split(sizes, 1)
        x = torch.baddbmm(first_bias[:, None], features, first.unflatten(1, (self.FEATURES, self.hidden))).tanh()
        direction, magnitude = torch.baddbmm(second_bias[:, None], x, second.unflatten(1, (self.hidden, 2))).unbind(2)
        return self.scale * direction * magnitude.exp()
