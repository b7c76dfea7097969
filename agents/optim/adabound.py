"""AdaBound and AMSBound: Adam whose element-wise step lengths are bounded ever more tightly, until it is SGD."""

from __future__ import annotations

import cmath
import math
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    ParamsT,
    _default_to_fused_or_foreach,
    _get_scalar_dtype,
    _get_value,
    _use_grad_for_differentiable,
    _view_as_real,
)

from agents.optim.effective_steps import AUTO, adam_steps, scalars_at

NONFINITE = ("raise", "skip", "ignore")
"""What a gradient that is not finite may do."""

_PUBLIC_OPTIONS = ("lr", "betas", "final_lr", "gamma", "eps", "weight_decay", "amsbound")
"""What a group of the public code holds."""

_FURTHER_OPTIONS = {
    "decoupled_weight_decay": False,
    "foreach": None,
    "maximize": False,
    "capturable": False,
    "differentiable": False,
    "nonfinite": "raise",
}
"""What it lacks, and what the public code does then."""


def handover_gamma(fraction: float, updates: int) -> float:
    """Return the gamma that hands over from Adam to SGD after a fraction of the planned updates.

    At the hand-over, update 1 / gamma, the bounds are final_lr / 2 and 2 final_lr.

    Args:
        fraction: when to hand over, as a fraction of updates, in (0, 1].
        updates: optimizer steps planned; for SB3's PPO iterations * n_epochs * minibatches.

    Raises:
        ValueError: fraction or updates is out of range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; give the hand-over as a fraction of the updates, in (0, 1].")
    if updates < 1:
        raise ValueError(f"updates is {updates}; give the number of planned optimizer steps, at least 1.")
    return 1 / (fraction * updates)


class AdaBound(Optimizer):
    """Adam with bounds on each element's step length that close in on one final length (AdaBound), optionally with
    AMSGrad's maximum (AMSBound).

    With the gradient g of update t, Adam's moments m and v, k = gamma t / (gamma t + 1) and α* = final_lr lr / base_lr:

        η = clamp(lr √(1 - β₂ᵗ) / (1 - β₁ᵗ) / (√v + eps), α* k, α* / k);   p ← p - η m

    The bounds are those of the public code, α* (1 - 1 / (gamma t + 1)) and α* (1 + 1 / (gamma t)): from (0, ∞) at the
    start, which is Adam, to α* at the end, which is SGD with momentum and dampening β₁. A form also found in print,
    0.1 ∓ 0.1 / ((1 - β₂) t + 1), has the same lower bound for gamma = 1 - β₂, but its upper bound never exceeds 0.2,
    so that it does not begin as Adam.

    Everything is proportional to lr, so a schedule scales α* too; base_lr is the lr at which α* is final_lr. SB3 writes
    its learning rate into every group before each update phase: groups keep their final_lr there, but not their lr.

    Args:
        params: parameters, named parameters or groups; a group may set every option below, and base_lr.
        lr: Adam's step size; base_lr is its value when the group is added, unless the group gives another (a schedule
            such as OneCycleLR starts away from it).
        betas: decay per update of the averages of g and g².
        final_lr: SGD's step size in the end, or "auto": Adam without bounds up to the hand-over at t = 1 / gamma, and
            then the group's median of base_lr √(1 - β₂ᵗ) / (1 - β₁ᵗ) / (√v + eps) over elements that have had a
            gradient. From then on the group holds that number.
        gamma: how fast the bounds close in, per update; `handover_gamma` turns a fraction of the planned updates
            into it.
        eps: added to √v.
        weight_decay: share of the parameter added to its gradient, or, if decoupled, taken off it at each update, times
            lr as in AdamW.
        amsbound: use the largest v so far.
        foreach: all tensors of a group together; None decides as torch.optim.Adam does.
        maximize: ascend.
        capturable: the update stays on the device and can be recorded in a CUDA graph.
        differentiable: autograd goes through the update.
        nonfinite: what a gradient with an infinite or undefined element does: "raise" a FloatingPointError that names
            the parameter, before anything changes; "skip" the whole step with a warning; or "ignore" (gradients are
            not looked at, which spares one read of a number from the device per step).

    Raises:
        ValueError: an option is out of its range, or two exclude each other.

    Source: Luo et al. 2019, https://arxiv.org/abs/1902.09843, and its code, https://github.com/Luolc/AdaBound.
    Differs from the paper: v is bias-corrected, as in its code; there is no projection and no 1/√t (use a schedule).
    Differs from its code: base_lr belongs to the group, so that copies, checkpoints and added groups go on unchanged.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        final_lr: float | str = 0.1,
        gamma: float = 1e-3,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        amsbound: bool = False,
        decoupled_weight_decay: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        nonfinite: str = "raise",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "final_lr": final_lr,
            "gamma": gamma,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsbound": amsbound,
            "decoupled_weight_decay": decoupled_weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "nonfinite": nonfinite,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its base_lr is its lr, unless it gives one.

        Raises:
            ValueError: an option of the group is out of its range.
        """
        options = {**self.defaults, **param_group}
        options.setdefault("base_lr", _get_value(options["lr"]))
        _check_options(options)
        super().add_param_group(param_group)
        param_group.setdefault("base_lr", options["base_lr"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A state that the public code saved holds no base_lr: then the lr that this optimizer was made with counts.
        own = self.__dict__.get("param_groups", ())
        super().__setstate__(state)
        for index, group in enumerate(self.param_groups):
            for option, value in _FURTHER_OPTIONS.items():
                group.setdefault(option, value)
            group.setdefault("base_lr", own[index]["base_lr"] if own else _get_value(group["lr"]))
            for parameter in group["params"]:
                values = self.state.get(parameter)
                if values and not isinstance(values["step"], Tensor):
                    values["step"] = _new_step(parameter, group, float(values["step"]))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state that AdaBound or AMSBound, this or the public one, saved.

        Raises:
            ValueError: the state is another optimizer's, or for other parameters.
        """
        _check_layout(self, state_dict)
        super().load_state_dict(state_dict)

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure: evaluates the loss and its gradients anew.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a gradient is sparse.
            FloatingPointError: a gradient is not finite, and nonfinite is "raise".
        """
        self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._gradients_usable():
            for group in self.param_groups:
                self._update(group)
        return loss

    def _gradients_usable(self) -> bool:
        """Look at all gradients before anything changes; False to skip the step."""
        usable = True
        for index, group in enumerate(self.param_groups):
            grads = {i: p.grad for i, p in enumerate(group["params"]) if p.grad is not None}
            for i, grad in grads.items():
                if grad.is_sparse:
                    raise RuntimeError(
                        f"the gradient of {_name(group, index, i)} is sparse, which {type(self).__name__} cannot use; "
                        "give its layer sparse=False, or its parameters torch.optim.SparseAdam."
                    )
            if group["nonfinite"] == "ignore" or _all_finite(grads.values()):
                continue
            bad = ", ".join(_name(group, index, i) for i, grad in grads.items() if not grad.isfinite().all())
            if not bad:  # the sum of large but finite elements has overflowed
                continue
            if group["nonfinite"] == "raise":
                raise FloatingPointError(
                    f"the gradient of {bad} is not finite; nothing was updated. Look for the cause in the loss, or "
                    "give nonfinite='skip' to leave out such steps."
                )
            warnings.warn(f"the gradient of {bad} is not finite; this step is skipped.", RuntimeWarning, stacklevel=3)
            usable = False
        return usable

    def _update(self, group: dict[str, Any]) -> None:
        params = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not params:
            return
        states = [self.state[parameter] or self._initial_state(parameter, group) for parameter in params]
        grads = [parameter.grad for parameter in params]
        exp_avgs, exp_avg_sqs = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
        maxima = [state["max_exp_avg_sq"] for state in states] if group["amsbound"] else []
        steps = [state["step"] for state in states]
        foreach = group["foreach"]
        if foreach is None:
            _, foreach = _default_to_fused_or_foreach(params, group["differentiable"])
            foreach = foreach and (group["capturable"] or not isinstance(group["lr"], Tensor))
        _view_as_real(params, grads, exp_avgs, exp_avg_sqs, *([maxima] if maxima else []))
        update = _multi_tensor if foreach else _single_tensor
        update(params, grads, exp_avgs, exp_avg_sqs, maxima, steps, group)
        if group["final_lr"] == AUTO and max(float(step) for step in steps) * group["gamma"] >= 1:
            self._measure_final_lr(group)

    def _initial_state(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        state = self.state[parameter]
        state["step"] = _new_step(parameter, group, 0.0)
        for key in ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsbound"] else ())):
            state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    @torch.no_grad()
    def _measure_final_lr(self, group: dict[str, Any]) -> None:
        steps = torch.cat([steps for _, steps in adam_steps(self, group)])
        if not math.isnan(median := steps.nanmedian().item()):
            group["final_lr"] = group["base_lr"] * median


class AMSBound(AdaBound):
    """`AdaBound` with AMSGrad's maximum: v is replaced by the largest v so far. Arguments as there, but amsbound."""

    def __init__(self, params: ParamsT, *args: Any, **kwargs: Any) -> None:
        super().__init__(params, *args, amsbound=True, **kwargs)


def _single_tensor(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    group: Mapping[str, Any],
) -> None:
    (beta1, beta2), weight_decay, differentiable = group["betas"], group["weight_decay"], group["differentiable"]
    on_device = group["capturable"] or differentiable
    for i, (param, grad, exp_avg, exp_avg_sq, step) in enumerate(
        zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)
    ):
        step += 1
        if group["maximize"]:
            grad = -grad
        if weight_decay and group["decoupled_weight_decay"]:
            param.mul_(1 - group["lr"] * weight_decay)
        elif weight_decay:
            grad = grad.add(param, alpha=weight_decay)

        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        second = exp_avg_sq
        if max_exp_avg_sqs:
            second = max_exp_avg_sqs[i]
            if differentiable:
                second.copy_(torch.maximum(second.clone(), exp_avg_sq.clone()))
            else:
                torch.maximum(second, exp_avg_sq, out=second)

        correction, floor, ceiling = scalars_at(step.to(param.device) if on_device else _get_value(step), group)
        denominator = second.sqrt()
        # Derivatives need the root and m as they are now.
        denominator = denominator + group["eps"] if differentiable else denominator.add_(group["eps"])
        denominator.clamp_(floor, ceiling)
        factor = -group["lr"] * correction
        if on_device:
            param.addcmul_((exp_avg.clone() if differentiable else exp_avg) / denominator, factor)
        else:
            param.addcdiv_(exp_avg, denominator, value=factor)


def _multi_tensor(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    group: Mapping[str, Any],
) -> None:
    (beta1, beta2), weight_decay = group["betas"], group["weight_decay"]
    buckets = Optimizer._group_tensors_by_device_and_dtype(
        [params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps]  # type: ignore[list-item]
    )
    for bucket, _ in buckets.values():
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = bucket  # type: ignore[assignment]
        if steps[0].is_cpu:
            # A number would be wrapped into a tensor once per step tensor.
            torch._foreach_add_(steps, torch.tensor(1.0), alpha=1.0)
        else:
            torch._foreach_add_(steps, 1)
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        if weight_decay and group["decoupled_weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * weight_decay)
        elif weight_decay:
            grads = list(torch._foreach_add(grads, params, alpha=weight_decay))

        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
        if max_exp_avg_sqs:
            torch._foreach_maximum_(max_exp_avg_sqs, exp_avg_sqs)

        denominators = torch._foreach_sqrt(max_exp_avg_sqs or exp_avg_sqs)
        torch._foreach_add_(denominators, group["eps"])
        if group["capturable"]:
            corrections, floors, ceilings = scalars_at(torch.stack(steps), group)
            torch._foreach_clamp_min_(denominators, floors.unbind())
            torch._foreach_clamp_max_(denominators, ceilings.unbind())
            torch._foreach_div_(denominators, (-group["lr"] * corrections).unbind())
            torch._foreach_addcdiv_(params, exp_avgs, denominators)
        else:
            corrections, floors, ceilings = zip(*(scalars_at(_get_value(step), group) for step in steps), strict=True)
            torch._foreach_clamp_min_(denominators, floors)
            torch._foreach_clamp_max_(denominators, ceilings)
            factor = -group["lr"]
            torch._foreach_addcdiv_(params, exp_avgs, denominators, [factor * x for x in corrections])


def _new_step(parameter: Tensor, group: Mapping[str, Any], value: float) -> Tensor:
    # On the host, unless captured: reading it is then free.
    return torch.tensor(value, dtype=_get_scalar_dtype(), device=parameter.device if group["capturable"] else "cpu")


def _name(group: Mapping[str, Any], index: int, i: int) -> str:
    if "param_names" in group:
        return repr(group["param_names"][i])
    return f"parameter {i} of group {index}, of shape {list(group['params'][i].shape)},"


def _all_finite(grads: Collection[Tensor]) -> bool:
    """Tell whether the gradients' sum is finite, which takes one number per device to the host."""
    totals: dict[torch.device, Tensor] = {}
    for grad in grads:
        total = grad.detach().sum()
        totals[grad.device] = totals[grad.device] + total if grad.device in totals else total
    return all(cmath.isfinite(total.item()) for total in totals.values())


def _check_options(options: Mapping[str, Any]) -> None:
    lr, final_lr, gamma, betas = (options[name] for name in ("lr", "final_lr", "gamma", "betas"))
    capturable, foreach = options["capturable"], options["foreach"]
    for conflict, remedy in (
        (foreach and options["differentiable"], "foreach=True cannot be differentiated; leave it out"),
        (
            isinstance(lr, Tensor) and (lr.dim() > 0 or (foreach and not capturable)),
            "a tensor lr needs the shape () and, with foreach=True, capturable=True; give a float",
        ),
        (
            capturable and final_lr == AUTO,
            "final_lr='auto' is measured on the host, which capturable=True rules out; give final_lr as a number",
        ),
        (
            capturable and options["nonfinite"] != "ignore",
            "gradients are looked at on the host, which capturable=True rules out; give nonfinite='ignore'",
        ),
        (
            final_lr == AUTO and options["eps"] == 0,
            "final_lr='auto' begins as Adam, which divides by eps where there is no gradient; give a positive eps",
        ),
    ):
        if conflict:
            raise ValueError(f"{remedy}.")
    for name, allowed, remedy in (
        ("lr", 0 < lr < math.inf, "a positive number; a schedule may take it to 0 later"),
        ("base_lr", 0 < options.get("base_lr", 1.0) < math.inf, "a positive number, the lr at which α* is final_lr"),
        ("final_lr", final_lr == AUTO or _is_positive(final_lr), f"a positive number, SGD's step size, or {AUTO!r}"),
        ("gamma", _is_positive(gamma), "a positive number per update, or handover_gamma(fraction, updates)"),
        ("betas", len(betas) == 2 and all(_is_fraction(beta) for beta in betas), "two numbers in [0, 1)"),
        ("eps", 0 <= options["eps"] < math.inf, "a number of at least 0"),
        ("weight_decay", 0 <= options["weight_decay"] < math.inf, "a number of at least 0"),
        ("nonfinite", options["nonfinite"] in NONFINITE, " or ".join(map(repr, NONFINITE))),
    ):
        if not allowed:
            raise ValueError(f"{name} is {options[name]!r}; give {remedy}.")


def _is_fraction(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < 1


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def _check_layout(optimizer: AdaBound, state_dict: Mapping[str, Any]) -> None:
    """Refuse groups without AdaBound's options and states that fit no parameter; torch checks how many there are."""
    kind = type(optimizer).__name__
    for index, (saved, group) in enumerate(zip(state_dict["param_groups"], optimizer.param_groups, strict=False)):
        if missing := [option for option in _PUBLIC_OPTIONS if option not in saved]:
            raise ValueError(
                f"the state is not {kind}'s: its group {index} lacks {', '.join(missing)}; load one that {kind} saved."
            )
        if saved["amsbound"] != group["amsbound"]:
            raise ValueError(
                f"the state's group {index} has amsbound={saved['amsbound']}, this optimizer's has "
                f"{group['amsbound']}; load it into {'AMSBound' if saved['amsbound'] else 'AdaBound'}."
            )
        for i, (key, parameter) in enumerate(zip(saved["params"], group["params"], strict=False)):
            for entry, value in state_dict["state"].get(key, {}).items():
                if entry != "step" and value.shape != parameter.shape:
                    raise ValueError(
                        f"the state's {entry} for {_name(group, index, i)} has the shape {list(value.shape)}, the "
                        f"parameter has {list(parameter.shape)}; load a state of the same network."
                    )
