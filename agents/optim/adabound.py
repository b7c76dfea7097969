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

from agents.optim.checks import check_layout, check_options, parameter_name
from agents.optim.effective_steps import AUTO, adam_steps, scalars_at

_FURTHER_OPTIONS = {
    "decoupled_weight_decay": False,
    "foreach": None,
    "maximize": False,
    "capturable": False,
    "differentiable": False,
    "nonfinite": "raise",
}
"""What a group of the public code lacks, and what it does then."""


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
        check_options(options)
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
        check_layout(self, state_dict)
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

    @torch.no_grad()
    def begin_local_time(self, measure_final_lr: bool = False) -> None:
        """Begin t anew, where what is minimized has changed, as it does with each rollout of reinforcement learning.

        Moments and AMSBound's maximum stay; the corrections and the bounds start over. With a gamma so small that the
        bounds never close between two calls this is Adam on local time (Ellis et al. 2024,
        https://arxiv.org/abs/2412.17113).

        Args:
            measure_final_lr: set each group's final_lr to "auto" too, so that it is measured anew at t = 1 / gamma.

        Raises:
            ValueError: final_lr is to be measured, and a group's options rule it out.
        """
        groups = [group | {"final_lr": AUTO} if measure_final_lr else group for group in self.param_groups]
        for group in groups:
            check_options(group)
        for group, changed in zip(self.param_groups, groups, strict=True):
            group["final_lr"] = changed["final_lr"]
        for state in self.state.values():
            state["step"].zero_()

    def _gradients_usable(self) -> bool:
        """Look at all gradients before anything changes; False to skip the step."""
        usable = True
        for index, group in enumerate(self.param_groups):
            grads = {i: p.grad for i, p in enumerate(group["params"]) if p.grad is not None}
            for i, grad in grads.items():
                if grad.is_sparse:
                    raise RuntimeError(
                        f"the gradient of {parameter_name(group, index, i)} is sparse, which {type(self).__name__} "
                        "cannot use; give its layer sparse=False, or its parameters torch.optim.SparseAdam."
                    )
            if group["nonfinite"] == "ignore" or _all_finite(grads.values()):
                continue
            bad = ", ".join(parameter_name(group, index, i) for i, grad in grads.items() if not grad.isfinite().all())
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


def _all_finite(grads: Collection[Tensor]) -> bool:
    """Tell whether the gradients' sum is finite, which takes one number per device to the host."""
    totals: dict[torch.device, Tensor] = {}
    for grad in grads:
        total = grad.detach().sum()
        totals[grad.device] = totals[grad.device] + total if grad.device in totals else total
    return all(cmath.isfinite(total.item()) for total in totals.values())
