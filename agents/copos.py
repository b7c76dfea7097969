"""Compatible policy search (Pajarinen et al. 2019): a natural gradient that bounds the KL and the loss of entropy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from agents import noise
from agents.base import Agent
from agents.config import above, at_least, between
from agents.natural import make_curvature
from agents.natural.critic_fits import CRITIC_FITS, CriticFitConfig
from agents.natural.curvature import check_solver
from agents.natural.scores import scores
from agents.natural.step import CURVES, KL_TOLERANCE, Rejections, step_size
from agents.policy.actor_critic import POLICIES, ActorCriticPolicy
from agents.policy.distributions import Distribution, Head
from agents.policy.networks import Actor, assign_parameters
from agents.rollout.buffer import Rollout, advantages, explained_variance, standardize
from agents.saving import Stateful
from envs.sb3 import SB3View

SHORTEST = 0.1
"""The least η above its floor, in units of the natural gradient's √(wᵀ F w / 2 ε): where the bound on entropy alone
binds, the dual's η goes to 0 and the hidden layers' step w / η to infinity."""
TRIES = 20
"""Values of η that are tried for one that keeps the bounds."""


@dataclass(frozen=True, kw_only=True)
class COPOSConfig(CriticFitConfig):
    """Hyperparameters of COPOS; ε, b and λ as in the paper's experiments."""

    fisher: Literal["compatible", "analytic", "kfac", "ekfac", "diagonal", "empirical", "adaptive"] = "compatible"
    """Estimate of the Fisher matrix, as of `NPGConfig`; compatible is the paper's."""
    cg_damping: Annotated[float, at_least(0)] = 0.1
    """Damping of the Fisher matrix, in units of its mean eigenvalue tr(F) / p."""
    target_kl: Annotated[float, above(0)] = 0.01
    """ε: the most mean KL(new || old) of an update, in nats."""
    entropy_decrease: Annotated[float, above(0)] | None = None
    """b: the most mean entropy that an update may lose, in nats; None takes 2 H₀ / (number of updates) with the entropy
    H₀ of the first policy (for discrete actions, of equal probabilities)."""
    gae_lambda: Annotated[float, between(0, 1)] = 0.98
    """λ of generalized advantage estimation (Schulman et al. 2016)."""


class COPOS(Agent):
    """Compatible policy search: max E[Â] with KL(new || old) ≤ ε and H(old) - H(new) ≤ b, in natural parameters.

    Â(s, a) = ∇ log π(a|s)ᵀ w is the compatible value function of the natural gradient w. Given the features of the
    hidden layers the policy is log-linear, and its natural parameters θ become (η θ + w_θ) / (η + ω); those of the
    hidden layers, β, become β + w_β / η. Arguments: see `Agent` and `COPOSConfig`.

    Source: Pajarinen et al. 2019, "Compatible natural gradient policy search",
    https://doi.org/10.1007/s10994-019-05807-0.

    Differs from the paper: σ is diagonal; the dual is minimized by finding the roots of its derivatives; where the true
    KL or loss of entropy is above its bound, η grows until it is not, but never shrinks; advantages are standardized,
    and the critic is fitted, as by `NPG`.

    Raises:
        ValueError: as of `NPG`; or the actor's last layer is not Linear; or b has no default, as H₀ is not above 0.
        FloatingPointError: no direction was usable for several iterations in a row.
    """

    name: ClassVar[str] = "copos"
    policy_aliases = POLICIES
    dashboard: ClassVar[dict[str, dict[str, list[str]]]] = {
        "do the constraints hold": {
            "KL(new || old), nats": ["train/kl"],
            "entropy and its bound, nats": ["train/entropy", "train/entropy_bound"],
            "η and ω": ["train/eta", "train/omega"],
        },
        **{group: CURVES[group] for group in ("do the fits explain", "does it learn", "where the seconds go")},
    }
    Config = COPOSConfig
    config: COPOSConfig
    entropy_decrease: float
    policy: ActorCriticPolicy

    # Learning --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def train(self, batch: Rollout) -> None:
        """Fit Â, minimize the dual over η and ω, update the policy with them; then fit the critic."""
        c, policy = self.config, self.policy
        observations, a = batch["observations"].flatten(0, 1), batch["actions"].flatten(0, 1)
        s = policy.normalize(observations)
        A, returns = advantages(batch, policy.critic(s), policy, c.gamma, c.gae_lambda)
        explained = explained_variance(returns, returns - A)
        A = standardize(A)
        Psi, old = scores(policy.actor, s, a)
        few = c.curvature_samples
        rows = None if few is None else noise.few(self.stream_seed, "curvature", self.counter, len(s), few)
        step = self.curvature.direction(Psi, A, rows)  # Â = Ψ w

        eta = omega = math.inf
        if 0 < step.quadratic < math.inf:
            update = Update(policy.actor, step.direction, s)
            dual = Dual(policy.head, update.log_linear(), c.target_kl, self.entropy_decrease)
            eta, omega = dual.minimize(1 / step_size(step.quadratic, c.target_kl))
            eta, omega = update.search(old, dual, eta, omega)
        new = policy.actor(s)
        values = {
            "kl": new.kl(old).mean(),
            "entropy": new.entropy().mean(),
            "entropy_bound": old.entropy().mean() - self.entropy_decrease,
            "gain": (torch.expm1(new.log_prob(a) - Psi.values) * A).mean(),
            "compatible_r2": step.compatible_r2,
            "explained_variance": explained,
        }
        metrics = dict(zip(values, torch.stack([x.double() for x in values.values()]).tolist(), strict=True))

        self.critic_fit.fit(policy.critic, s, policy.critic.update_scale(returns), rows)
        self.stop_reason = self.rejections.count(1 / eta, step, line_search=False)
        metrics["rejected_updates"] = self.rejections.updates
        self.record(metrics | ({"eta": eta, "omega": omega} if eta < math.inf else {}))
        policy.update_normalizer(observations)

    # Set-up ----------------------------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        super()._setup_model()
        c, actor, seed = self.config, self.policy.actor, self.stream_seed
        last_layer(actor)
        self.rejections = Rejections(5)
        self.curvature = make_curvature(c, actor, seed)
        self.critic_fit = CRITIC_FITS[c.critic](c, self.policy.critic, self.curvature.precondition, seed)

    def _connect(self, env: SB3View) -> None:
        n, p = self.config.n_steps * env.num_envs, sum(x.numel() for x in self.policy.actor.parameters())
        check_solver(self.config.solver, min(self.config.curvature_samples or n, n), p)
        super()._connect(env)

    def _plan(self) -> None:
        """Find b, which is known only once the training's length is."""
        c, head = self.config, self.policy.head
        log_std = c.log_std_init + self.policy.actor.log_unit.mean().item()
        of_one = 0.5 * math.log(2 * math.pi * math.e) + log_std if head.kind == "gaussian" else math.log(2)
        first = sum(map(math.log, head.choices)) if head.kind == "categorical" else head.outputs * of_one
        updates = -(-self._total_timesteps // self.steps_per_iteration)
        self.entropy_decrease = 2 * first / updates if c.entropy_decrease is None else c.entropy_decrease
        if self.entropy_decrease <= 0:
            raise ValueError(f"the first policy has an entropy of {first:.3g} nats; give entropy_decrease.")

    def parts(self) -> dict[str, Stateful]:
        return {"rejections": self.rejections, "curvature": self.curvature, "critic": self.critic_fit}


@dataclass
class LogLinear:
    """Policies with natural parameters (η θ + w_θ) / (η + ω), as outputs and log σ.

    Those of a Gaussian are 1 / σ², which changes by -2 w_σ / σ² along w, and y / σ², by (m - 2 w_σ y) / σ².

    Attributes:
        y: outputs, or the last layer's parameters per output: [..., K].
        m: their change along w, [..., K].
        log_std, w_std: log σ and its change, [K]; None for discrete actions.
    """

    y: Tensor
    m: Tensor
    log_std: Tensor | None = None
    w_std: Tensor | None = None

    def at(self, eta: float, omega: float) -> tuple[Tensor, Tensor | None]:
        """Give the new y and log σ; η is above 2 w_σ."""
        if self.log_std is None or self.w_std is None:
            return (eta * self.y + self.m) / (eta + omega), None
        rest = eta - 2 * self.w_std
        return self.y + self.m / rest, self.log_std + 0.5 * torch.log((eta + omega) / rest)


class Dual:
    """g(η, ω) = η ε + ω (b - H_old) + (η + ω) mean_s log ∫ exp((η log π_old + Â) / (η + ω)) da.

    It is convex with the derivatives ε - KL(new || old) and b - (H_old - H_new), where the hidden layers count as
    linear; so it is minimized by the largest change that keeps both bounds.

    Args:
        head: of the actions.
        policies: at n states, [n, K]; float64.
        epsilon, b: nats, above 0.
    """

    def __init__(self, head: Head, policies: LogLinear, epsilon: float, b: float) -> None:
        self.head, self.policies, self.epsilon, self.b, self.floor = head, policies, epsilon, b, 0.0
        if policies.w_std is not None:
            self.floor = max(2 * policies.w_std.max().item(), 0.0)
            # σ is the same in all states, and the KL quadratic in m: the root mean square stands for all of them.
            m = policies.m.square().mean(0, keepdim=True).sqrt()
            self.policies = LogLinear(torch.zeros_like(m), m, policies.log_std, policies.w_std)
        self.old = head.distribution(self.policies.y, policies.log_std)

    def constraints(self, eta: float, omega: float) -> tuple[float, float]:
        """Give the mean KL(new || old) and H_old - H_new, in nats."""
        new = self.head.distribution(*self.policies.at(eta, omega))
        return new.kl(self.old).mean().item(), (self.old.entropy() - new.entropy()).mean().item()

    def omega(self, eta: float) -> float:
        """Minimize g over ω ≥ 0 for an η above the floor."""
        return root(lambda omega: self.b - self.constraints(eta, omega)[1], eta)

    def minimize(self, size: float) -> tuple[float, float]:
        """Minimize g over η and ω ≥ 0, with η at least `SHORTEST` times its expected size above the floor."""
        least = self.floor + SHORTEST * size

        def slope(more: float) -> float:
            return self.epsilon - self.constraints(least + more, self.omega(least + more))[0]

        eta = least + root(slope, size)
        return eta, self.omega(eta)


def root(slope: Callable[[float], float], size: float) -> float:
    """Find the root x ≥ 0, of about a size, of an increasing function that gets above 0; 0 if it begins there."""
    from scipy.optimize import brentq  # not above: it takes its time, and only some runs use it

    if slope(0.0) >= 0:
        return 0.0
    while slope(size) < 0:
        size *= 4
    return float(brentq(slope, 0.0, size, xtol=1e-12 * size, rtol=1e-12))


class Update:
    """The policies that an actor may become along w, one for each η and ω.

    Args:
        actor: its parameters are changed in place.
        w: the direction, [p].
        s: normalized observations, [n, O].
    """

    def __init__(self, actor: Actor, w: Tensor, s: Tensor) -> None:
        self.actor, self.before, self.w, self.s = actor, copy.deepcopy(actor), copy.deepcopy(actor), s
        assign_parameters(self.w, w)
        self.stds = [x.log_std.bias for x in (self.before, self.w) if x.log_std is not None]

    def log_linear(self) -> LogLinear:
        """Give the policies at s, as if the hidden layers were linear; float64."""
        theta, w = (dict(x.net.named_parameters()) for x in (self.before, self.w))
        outputs = jvp(lambda parameters: functional_call(self.before.net, parameters, (self.s,)), (theta,), (w,))
        return LogLinear(*(x.cpu().double() for x in (*outputs, *self.stds)))

    def search(self, old: Distribution, dual: Dual, eta: float, omega: float) -> tuple[float, float]:
        """Update with the first of growing η, and their ω, that keeps both bounds; infinite ones if none does."""
        for _ in range(TRIES):
            new = self.take(eta, omega)
            kl, drop = new.kl(old).mean().item(), (old.entropy() - new.entropy()).mean().item()
            within = drop <= (1 + KL_TOLERANCE) * dual.b
            if within and kl <= (1 + KL_TOLERANCE) * dual.epsilon:
                return eta, omega
            # The KL falls as 1 / η²; by how much the entropy falls too far, as fast, but from b on.
            factor = max(math.sqrt(kl / dual.epsilon), 1.0 if within else 2.0) if math.isfinite(kl) else 10.0
            eta = dual.floor + factor * (eta - dual.floor)
            omega = dual.omega(eta)
        self.actor.load_state_dict(self.before.state_dict())
        return math.inf, math.inf

    def take(self, eta: float, omega: float) -> Distribution:
        """Put the policy of η and ω into the actor, and give its distributions at s."""
        for x, beta, w in zip(self.actor.parameters(), self.before.parameters(), self.w.parameters(), strict=True):
            x.copy_(beta + w / eta)  # of the hidden layers; others are overwritten
        last, *layers = map(last_layer, (self.actor, self.before, self.w))
        theta, w_theta = (torch.cat((layer.weight, layer.bias[:, None]), 1).T for layer in layers)
        new, log_std = LogLinear(theta, w_theta, *self.stds).at(eta, omega)
        last.weight.copy_(new[:-1].T)
        last.bias.copy_(new[-1])
        if self.actor.log_std is not None and log_std is not None:
            self.actor.log_std.bias.copy_(log_std)
        return self.actor(self.s)


def last_layer(actor: Actor) -> nn.Linear:
    """Return the layer that is log-linear; ValueError if it is no Linear with a bias."""
    *_, last = actor.net.modules()
    if not isinstance(last, nn.Linear) or last.bias is None:
        raise ValueError(f"the actor ends in {last}; copos updates natural parameters: give a Linear with a bias.")
    return last
