"""The score operator Ψ [n, p]: one row per sample, the gradient of a scalar output with respect to all parameters.

Ψ is never materialized. In a layer y = W h + b the gradient of one sample is the outer product of δ = d output / d y
and (h, 1); H [n, in + 1] and Δ [n, out] of every layer, from one forward and one backward pass, give all products with
Ψ. With the output log π(a|s) these are a policy's scores and Ψᵀ Ψ / n its Fisher matrix; with the output V(s) Ψᵀ Ψ / n
is the critic's Gauss-Newton matrix.

Source: Martens & Grosse 2015, section 2, https://arxiv.org/abs/1503.05671 (the outer products); Goodfellow 2015,
https://arxiv.org/abs/1510.01799 (per-sample gradient norms).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from agents.policy.networks import Constant

BLOCK = 2**22
"""Numbers of Ψ that are written out at a time where F is."""


class UnfactoredModuleError(ValueError):
    """A module's scores are no outer products of its layers' inputs and output gradients."""


class Scores(ABC):
    """Products with Ψ [n, p]. Vectors of length p are in the order of torch.nn.utils.parameters_to_vector.

    A sample may have K outputs: Ψ then has K n rows, all of the first output before those of the second, and F is still
    Ψᵀ Ψ / n: the mean over samples of the sum over outputs.

    Attributes:
        values: the outputs that were differentiated, [n] or [K, n], detached.
        n, p: the numbers of samples and of parameters.
        roots: gives the scores of the same samples, or of some rows of them, whose Ψᵀ Ψ / n is the Fisher matrix with
            its expectation over actions taken exactly; None where the outputs are no policy's.
    """

    roots: Callable[..., FactoredScores] | None = None

    def __init__(self, values: Tensor, p: int) -> None:
        self.values, self.n, self.p = values, values.shape[-1], p
        self.dtype, self.device = values.dtype, values.device

    @abstractmethod
    def matvec(self, v: Tensor) -> Tensor:
        """Multiply: v [p] to Ψ v [K n]."""

    @abstractmethod
    def rmatvec(self, u: Tensor) -> Tensor:
        """Multiply: u [K n] to Ψᵀ u [p]."""

    def fisher_matvec(self, v: Tensor) -> Tensor:
        """Multiply: v [p] to F v = Ψᵀ Ψ v / n [p]."""
        return self.rmatvec(self.matvec(v)).div_(self.n)

    def gradient(self, weights: Tensor) -> Tensor:
        """Give Ψᵀ weights / n: [K n] to [p]; the gradient of the mean of weights times outputs."""
        return self.rmatvec(weights).div_(self.n)

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Give the diagonal of F = Ψᵀ Ψ / n, [p]."""

    @abstractmethod
    def trace(self) -> Tensor:
        """Give tr F, a scalar tensor."""

    @abstractmethod
    def gram(self) -> Tensor:
        """Give Ψ Ψᵀ, [K n, K n]."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Give Ψ itself, [K n, p]."""

    def fisher(self) -> Tensor:
        """Give F, [p, p], from a few rows of Ψ at a time."""
        total = self.values.new_zeros((self.p, self.p))
        for rows in torch.arange(self.n, device=self.device).split(max(1, BLOCK // self.p)):
            block = self.of(rows).dense()
            total.addmm_(block.T, block)
        return total.div_(self.n)

    @abstractmethod
    def weighted(self, weights: Tensor) -> Self:
        """Give the scores whose row i is weights[i] times row i of Ψ, for one output per sample; weights are [n]."""

    @abstractmethod
    def of(self, rows: Tensor) -> Self:
        """Give the scores of the samples rows alone, int64 [k]."""


@dataclass(frozen=True)
class Layout:
    """Where the entries of the layers' [W, b], [out, in + 1] each ([out, in] without a bias), lie in the parameters."""

    shapes: list[tuple[int, int]]
    order: Tensor
    """The flat position of every entry, layer by layer, int64 [p]."""
    inverse: Tensor
    """The entry of every flat position, int64 [p]."""

    @classmethod
    def of(cls, module: nn.Module, layers: Sequence[nn.Module]) -> Layout:
        """Find it for layers that hold all of a module's parameters; UnfactoredModuleError where two share one."""
        position: dict[nn.Parameter, Tensor] = {}
        p = 0
        for parameter in module.parameters():
            places = torch.arange(p, p + parameter.numel(), device=parameter.device)
            position[parameter] = places.view(len(parameter), -1)
            p += parameter.numel()
        index = [torch.cat([position[x] for x in layer.parameters(recurse=False)], dim=1) for layer in layers]
        order = torch.cat([positions.flatten() for positions in index])
        if len(order) != p:
            raise UnfactoredModuleError(
                "layers share a parameter; its score is then no outer product. Use dense_scores."
            )
        inverse = torch.empty_like(order).index_copy_(0, order, torch.arange(p, device=order.device))
        return cls([(len(positions), positions.shape[1]) for positions in index], order, inverse)


class LaidOut(NamedTuple):
    """Layers' inputs and output gradients in memory such that one multiplication and one sum serve all layers."""

    inputs: list[Tensor]
    """Each layer's H, with a column of ones for a bias, [n, m]."""
    delta: Tensor
    """All layers' Δᵀ, samples contiguous, [rows, K, n]."""
    layers: list[tuple[Tensor, Tensor]]
    """Each layer's H [n, m] and Δᵀ [out, K, n]; views."""
    work: Tensor
    """Memory for products, [rows, n]."""
    works: list[Tensor]
    """Its layers, [out, n]; views."""
    product: Tensor
    """Where work times Δ goes, [rows, K, n]: into work itself, if a sample has one output."""


class FactoredScores(Scores):
    """Ψ as the layers' inputs and output gradients; see `capture`.

    Args:
        values: [n] or [K, n].
        inputs: each layer's H, [n, in].
        deltas: each layer's Δ, [n, out] or [K, n, out].
        layout: of the layers' parameters.
    """

    def __init__(self, values: Tensor, inputs: Sequence[Tensor], deltas: Sequence[Tensor], layout: Layout) -> None:
        super().__init__(values, len(layout.order))
        self._raw_inputs, self._raw_deltas, self._layout = list(inputs), list(deltas), layout
        self._outputs = 1 if values.ndim == 1 else len(values)
        # A vector [p] in the layers' order, and its parts as one matrix [W, b], [out, m], per layer.
        self._packed = values.new_empty(self.p)
        parts = self._packed.split([rows * columns for rows, columns in layout.shapes])
        self._matrices = [part.view(shape) for part, shape in zip(parts, layout.shapes, strict=True)]

    @cached_property
    def _laid_out(self) -> LaidOut:
        """Lay the layers out anew for repeated products, once."""
        n, rows = self.n, [rows for rows, _ in self._layout.shapes]
        if self._outputs == 1:
            delta = torch.cat([delta.view(n, -1).T for delta in self._raw_deltas])[:, None]
        else:
            delta = torch.cat([delta.permute(2, 0, 1) for delta in self._raw_deltas])
        work = delta.new_empty((len(delta), n))
        inputs = [
            h if h.shape[1] == columns else torch.cat((h, h.new_ones((n, 1))), dim=1)
            for h, (_, columns) in zip(self._raw_inputs, self._layout.shapes, strict=True)
        ]
        product = work[:, None] if self._outputs == 1 else torch.empty_like(delta)
        layers = list(zip(inputs, delta.split(rows), strict=True))
        return LaidOut(inputs, delta, layers, work, list(work.split(rows)), product)

    def matvec(self, v: Tensor) -> Tensor:
        # Per layer the row sums of (V Hᵀ) * Δᵀ.
        x = self._laid_out
        torch.index_select(v, 0, self._layout.order, out=self._packed)
        for weight, h, rows in zip(self._matrices, x.inputs, x.works, strict=True):
            torch.mm(weight, h.T, out=rows)
        return torch.mul(x.delta, x.work[:, None], out=x.product).sum(0).flatten()

    def rmatvec(self, u: Tensor) -> Tensor:
        # Per layer (u * Δᵀ) H.
        x = self._laid_out
        torch.mul(x.delta, u.view(self._outputs, self.n), out=x.product)
        if self._outputs > 1:
            torch.sum(x.product, dim=1, out=x.work)
        for total, h, rows in zip(self._matrices, x.inputs, x.works, strict=True):
            torch.mm(rows, h, out=total)
        return self._packed[self._layout.inverse]

    def gradient(self, weights: Tensor) -> Tensor:
        if self._outputs > 1:
            return super().gradient(weights)
        # One product from the layers as they were captured costs less than laying them out.
        for total, h, delta in zip(self._matrices, self._raw_inputs, self._raw_deltas, strict=True):
            weighted = delta.view(self.n, -1) * weights[:, None]
            # Not (Hᵀ δ)ᵀ, which is quicker for narrow H, but rounds otherwise from one process to the next.
            total[:, : h.shape[1]] = weighted.T @ h
            total[:, h.shape[1] :] = weighted.sum(0)[:, None]
        return self._packed[self._layout.inverse].div_(self.n)

    def diagonal(self) -> Tensor:
        x = self._laid_out
        torch.sum(x.delta.square(), dim=1, out=x.work)
        for total, h, rows in zip(self._matrices, x.inputs, x.works, strict=True):
            torch.mm(rows, h.square(), out=total)
        return self._packed[self._layout.inverse].div_(self.n)

    def trace(self) -> Tensor:
        # |gradient|² of one sample and layer is |δ|² |(h, 1)|².
        norms = [delta.square().sum((0, 1)) @ h.square().sum(1) for h, delta in self._laid_out.layers]
        return torch.stack(norms).sum() / self.n

    def gram(self) -> Tensor:
        k, n = self._outputs, self.n
        total = self.values.new_zeros((k, n, k, n))
        for h, delta in self._laid_out.layers:
            flat = delta.flatten(1)
            total.addcmul_((h @ h.T)[:, None], (flat.T @ flat).view(k, n, k, n))
        return total.view(k * n, k * n)

    def dense(self) -> Tensor:
        rows = [
            (delta.permute(1, 2, 0)[..., None] * h[:, None]).reshape(self._outputs * self.n, -1)
            for h, delta in self._laid_out.layers
        ]
        return torch.cat(rows, dim=1)[:, self._layout.inverse]

    def kfac(self) -> list[tuple[Tensor, Tensor]]:
        """Give the layers' Kronecker factors A = Hᵀ H / n [m, m] and G = Δᵀ Δ / n [out, out].

        H ends with a column of ones where the layer has a bias. Source: Martens & Grosse 2015, section 3.
        """
        flat = [(h, delta.flatten(1)) for h, delta in self._laid_out.layers]
        return [(h.T @ h / self.n, delta @ delta.T / self.n) for h, delta in flat]

    def second_moments(self, place: int, of_outputs: Tensor, of_inputs: Tensor) -> Tensor:
        """Give the mean squares of a layer's gradients along uᵢ vⱼᵀ, [out, m], for the columns u and v of two bases."""
        h, delta = self._laid_out.layers[place]
        along = (of_outputs.T @ delta.flatten(1)).view(delta.shape).square().sum(1)
        return along @ (h @ of_inputs).square() / self.n

    def of(self, rows: Tensor) -> Self:
        inputs, deltas = [h[rows] for h in self._raw_inputs], [delta[..., rows, :] for delta in self._raw_deltas]
        some = type(self)(self.values[..., rows], inputs, deltas, self._layout)
        if self.roots is not None:
            whole = self.roots
            some.roots = lambda inner=None: whole(rows if inner is None else rows[inner])
        return some

    def weighted(self, weights: Tensor) -> Self:
        deltas = [delta * weights[:, None] for delta in self._raw_deltas]
        return type(self)(self.values * weights, self._raw_inputs, deltas, self._layout)

    def by_layer(self, v: Tensor, function: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Give v [p] with each layer's [W, b], [out, m], replaced by function(layer's place, [W, b])."""
        torch.index_select(v, 0, self._layout.order, out=self._packed)
        for place, matrix in enumerate(self._matrices):
            matrix.copy_(function(place, matrix))
        return self._packed[self._layout.inverse]


class DenseScores(Scores):
    """Ψ as a matrix: slow and general; see `dense_scores`.

    Args:
        values: [n].
        matrix: Ψ [n, p].
    """

    def __init__(self, values: Tensor, matrix: Tensor) -> None:
        super().__init__(values, matrix.shape[1])
        self.matrix = matrix

    def matvec(self, v: Tensor) -> Tensor:
        return self.matrix @ v

    def rmatvec(self, u: Tensor) -> Tensor:
        return self.matrix.T @ u

    def diagonal(self) -> Tensor:
        return self.matrix.square().mean(0)

    def trace(self) -> Tensor:
        return self.matrix.square().sum() / self.n

    def gram(self) -> Tensor:
        return self.matrix @ self.matrix.T

    def dense(self) -> Tensor:
        return self.matrix

    def of(self, rows: Tensor) -> Self:
        return type(self)(self.values[rows], self.matrix[rows])

    def weighted(self, weights: Tensor) -> Self:
        return type(self)(self.values * weights, self.matrix * weights[:, None])


def scores(actor: Any, s: Tensor, a: Tensor) -> tuple[Scores, Any]:
    """Give Ψ = ∇ log π(a|s), [n, p], and the policy's distributions, from one forward pass.

    Args:
        actor: a module from observations to distributions. Where its layers do not factor, Ψ is a matrix.
        s: normalized observations, [n, O].
        a: actions, [n, *A].
    """
    passes: list[Any] = []

    def log_prob() -> Tensor:
        passes.append(actor(s))
        return passes[0].log_prob(a)

    try:
        Psi = capture(actor, log_prob)
    except UnfactoredModuleError:
        return dense_scores(actor, lambda actor, s, a: actor(s).log_prob(a), s, a), actor(s)
    Psi.roots = lambda rows=None: capture(actor, lambda: actor(s if rows is None else s[rows]).fisher_roots())
    return Psi, passes[0]


def capture(module: nn.Module, forward: Callable[[], Tensor]) -> FactoredScores:
    """Give the scores of a module of Linear and `Constant` layers, from one forward and one backward pass.

    Args:
        module: whose parameters count. Modules without parameters of their own (activations, containers) are free.
        forward: calls the module on n samples, each layer once, and returns one output per sample, [n], which depends
            on that sample alone: log π(a|s) or V(s); or K of them, [K, n], each of which takes a backward pass.

    Raises:
        UnfactoredModuleError: a module with parameters is neither Linear nor Constant, or layers share a parameter.
        ValueError: the output is not [n] or [K, n], a layer is not called exactly once on [n, in], the output does not
            depend on it, or a later operation overwrites what it read or returned.
    """
    layers = _layers(module)
    layout = Layout.of(module, layers)
    calls: dict[nn.Module, list[tuple[Any, Tensor, int, int]]] = {layer: [] for layer in layers}
    hooks = [
        layer.register_forward_hook(
            lambda layer, read, output: calls[layer].append(
                (*read, output, getattr(read[0], "_version", 0), output._version)
            )
        )
        for layer in layers
    ]
    try:
        with torch.enable_grad():
            values = forward()
    finally:
        for hook in hooks:
            hook.remove()
    if values.ndim not in (1, 2) or values.numel() == 0:
        raise ValueError(
            f"the output has shape {tuple(values.shape)}; return one number per sample, [n], n at least 1, or K of "
            "them, [K, n]."
        )
    n, unused = values.shape[-1], "takes no part in the output; pass only the module whose parameters do."
    inputs: list[Tensor] = []
    returned: list[Tensor] = []
    for layer in layers:
        if not calls[layer]:
            raise ValueError(f"{layer} {unused}")
        if len(calls[layer]) > 1:
            raise ValueError(f"{layer} is called twice in one forward pass; its score is then no outer product.")
        read, output, *versions = calls[layer][0]
        if output.shape[:-1] != (n,):
            raise ValueError(f"{layer} returned {tuple(output.shape)} for {n} outputs; call it on [n, in].")
        if versions != [getattr(read, "_version", 0), output._version]:
            raise ValueError(
                f"what {layer} read or returned was overwritten in place; use operations that are not in place "
                "(such as ReLU without inplace=True)."
            )
        inputs.append(read.detach() if isinstance(read, Tensor) else output.new_empty((read, 0)))
        returned.append(output)
    with torch.enable_grad():
        # Of sums: gradients that are given to autograd have it import SymPy, for half a second of every start.
        sums = [output.sum() for output in (values[None] if values.ndim == 1 else values)]
    passes = [torch.autograd.grad(total, returned, retain_graph=True, allow_unused=True) for total in sums]
    deltas: list[Tensor] = []
    for layer, output, parts in zip(layers, returned, zip(*passes, strict=True), strict=True):
        if all(part is None for part in parts):
            raise ValueError(f"{layer} {unused}")
        given = [torch.zeros_like(output) if part is None else part for part in parts]
        deltas.append(given[0] if values.ndim == 1 else torch.stack(given))
    return FactoredScores(values.detach(), inputs, deltas, layout)


def is_factored(module: nn.Module) -> bool:
    """Say whether the module's layers are ones that `capture` takes."""
    try:
        Layout.of(module, _layers(module))
    except UnfactoredModuleError:
        return False
    return True


def dense_scores(module: nn.Module, output: Callable[..., Tensor], *batch: Tensor) -> DenseScores:
    """Give the scores of any module by per-sample differentiation, n times p numbers.

    output(module, *batch) gives [n]; batch are tensors with n rows each.
    """
    call = _Bound(module, output)
    parameters = {name: parameter.detach() for name, parameter in call.named_parameters()}

    def one(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
        return functional_call(call, parameters, tuple(row[None] for row in sample))[0]

    rows = vmap(grad(one), in_dims=(None, *(0 for _ in batch)))(parameters, *batch)
    with torch.no_grad():
        values = output(module, *batch)
    return DenseScores(values, torch.cat([row.flatten(1) for row in rows.values()], dim=1))


class _Bound(nn.Module):
    """output(module, ...) as a module, so that functional_call can exchange the parameters."""

    def __init__(self, module: nn.Module, output: Callable[..., Tensor]) -> None:
        super().__init__()
        self.module = module
        self.output = output

    def forward(self, *sample: Tensor) -> Tensor:
        return self.output(self.module, *sample)


def _layers(module: nn.Module) -> list[nn.Module]:
    """List the module's Linear and Constant layers; others with parameters of their own are refused."""
    layers: list[nn.Module] = []
    for part in module.modules():
        if isinstance(part, (nn.Linear, Constant)):
            layers.append(part)
        elif next(part.parameters(recurse=False), None) is not None:
            raise UnfactoredModuleError(
                f"{type(part).__name__} has parameters; factored scores know Linear and Constant. Use dense_scores."
            )
    if not layers:
        raise UnfactoredModuleError(f"{type(module).__name__} has no Linear or Constant layer, so there are no scores.")
    return layers
