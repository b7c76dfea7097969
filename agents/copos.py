"""Compatible policy search (Pajarinen et al. 2019): a natural gradient that bounds the KL and the loss of entropy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.functional import linear

from agents import noise
from agents.base import Agent
from agents.config import SCHEDULED, above, at_least, between
from agents.natural import check_size, make_natural
from agents.natural.critic_fits import CriticFitConfig
from agents.natural.scores import scores
from agents.natural.step import CURVES, KL_TOLERANCE, MOST_GROWTH, Rejections, step_size
from agents.policy.actor_critic import POLICIES, ActorCriticPolicy
from agents.policy.distributions import Distribution, Head
from agents.policy.networks import Actor
from agents.rollout.buffer import Rollout, advantages, explained_variance, standardize
from agents.saving import Stateful
from envs.sb3 import SB3View

SHORTEST = 0.1
"""The least η above its floor, in units of the natural gradient's √(wᵀ F w / 2 ε): where the bound on entropy alone
binds, the dual's η goes to 0 and the hidden layers' step w / η to infinity."""
FARTHEST = 1000.0
"""The η, in the same units, at which all of the KL is the entropy's: as an equality, b is halved until ε allows it."""
FEW = 256
"""States that tell where the search for η begins."""
RANGE = 20.0
"""The most by which log η may be above where it is first looked for: where a policy is all but certain, few samples of
other actions would take it far."""
HEAT = 14.0
"""The most by which log(η + ω) differs from log η."""


@dataclass(frozen=True, kw_only=True)
class COPOSConfig(CriticFitConfig):
    """Hyperparameters of COPOS; ε, b and λ as in the paper's experiments."""

    fisher: Literal["compatible", "analytic", "kfac", "ekfac", "diagonal", "empirical", "adaptive"] = "compatible"
    """Estimate of the Fisher matrix, as of `NPGConfig`; compatible is the paper's."""
    cg_damping: Annotated[float, at_least(0)] = 0.1
    """Damping of the Fisher matrix, in units of its mean eigenvalue tr(F) / p."""
    target_kl: Annotated[float, above(0)] = 0.01
    """ε: the most mean KL(new || old) of an update, in nats."""
    entropy_decrease: Annotated[float, at_least(0), SCHEDULED] | None = None
    """b: the mean entropy that an update may lose, in nats. None takes 2 H₀ / (number of updates) with the entropy H₀
    of the first policy, so that it may end at -H₀; for discrete actions H₀ / (number of updates), with that of equal
    probabilities."""
    entropy_constraint: Literal["inequality", "equality"] = "inequality"
    """inequality: an update loses at most b. equality: the entropy follows its schedule, the first policy's less b for
    each update, up or down; as far in one update as ε allows."""
    gae_lambda: Annotated[float, between(0, 1)] = 0.98
    """λ of generalized advantage estimation (Schulman et al. 2016)."""


class COPOS(Agent):
    """Compatible policy search: max E[Â] with KL(new || old) ≤ ε and H(old) - H(new) ≤ b, in natural parameters.

    Â(s, a) = ∇ log π(a|s)ᵀ w is the compatible value function of the natural gradient w. Given the features of the
    hidden layers the policy is log-linear, and its natural parameters θ become (η θ + w_θ) / (η + ω); those of the
    hidden layers, β, become β + w_β / η. Arguments: see `Agent` and `COPOSConfig`.

    Source: Pajarinen et al. 2019, "Compatible natural gradient policy search",
    https://doi.org/10.1007/s10994-019-05807-0.

    Differs from the paper: σ is diagonal; the dual is minimized by finding the roots of its derivatives; then η is
    corrected until the true KL is ε, with the ω of the true entropy for each η, where the paper's code bisects η for
    the best surrogate and solves for ω once; advantages are standardized, and the critic is fitted, as by `NPG`.

    Raises:
        ValueError: as of `NPG`; or the actor's last layer is not Linear; or b has no default, as H₀ is not above 0.
        FloatingPointError: no direction was usable for several iterations in a row.
    """

    name: ClassVar[str] = "copos"
    policy_aliases = POLICIES
    dashboard: ClassVar[dict[str, dict[str, list[str]]]] = {
        "do the constraints hold": {
            "KL(new || old), nats": ["train/kl"],
            "entropy, its bound and its schedule, nats": [
                "train/entropy",
                "train/entropy_bound",
                "train/entropy_schedule",
            ],
            "η and ω": ["train/eta", "train/omega"],
        },
        **{group: CURVES[group] for group in ("do the fits explain", "does it learn", "where the seconds go")},
    }
    Config = COPOSConfig
    config: COPOSConfig
    current: COPOSConfig
    policy: ActorCriticPolicy
    planned_decrease: float = math.nan
    """b by the training's length, which is known once it begins."""

    # Learning --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def train(self, batch: Rollout) -> None:
        """Fit the critic and Â, minimize the dual over η and ω, update the policy with them."""
        c, policy = self.config, self.policy
        observations, a = batch["observations"].flatten(0, 1), batch["actions"].flatten(0, 1)
        s = policy.normalize(observations)
        few = c.curvature_samples
        key = self.stream_seed, "curvature", self.counter
        rows = None if few is None else noise.few(*key, len(s), few, s.device)
        A, returns = advantages(batch, policy.critic(s), policy, c.gamma, c.gae_lambda)
        explained = explained_variance(returns, returns - A)
        self.critic_fit.fit(policy.critic, s, policy.critic.update_scale(returns), rows)
        if c.advantages_after_fit:
            A, _ = advantages(batch, policy.critic(s), policy, c.gamma, c.gae_lambda)
        A = standardize(A)
        Psi, old = scores(policy.actor, s, a)
        step = self.curvature.direction(Psi, A, rows)  # Â = Ψ w

        entropy, b = old.entropy().mean().item(), self.entropy_decrease
        scheduled = self.schedule.next(entropy, b, begins=self.iteration == 0)
        equality = c.entropy_constraint == "equality"
        bound = scheduled if equality else entropy - b
        eta = omega = math.inf
        if 0 < step.quadratic < math.inf:
            update = Update(policy.actor, step.direction, s)
            linear, known = update.log_linear(), None if update.exact else old
            dual = Dual(policy.head, linear, c.target_kl, entropy - bound, equality, known)
            eta, omega = update.search(dual, dual.minimize(1 / step_size(step.quadratic, c.target_kl)))
        new = policy.actor(s)
        values = {
            "kl": new.kl(old).mean(),
            "entropy": new.entropy().mean(),
            "gain": (torch.expm1(new.log_prob(a) - Psi.values) * A).mean(),
            "compatible_r2": step.compatible_r2,
            "explained_variance": explained,
        }
        metrics = dict(zip(values, torch.stack([x.double() for x in values.values()]).tolist(), strict=True))

        self.stop_reason = self.rejections.count(1 / eta, eta == math.inf and step.solution.status == "zero_rhs")
        metrics |= {"entropy_bound": bound, "entropy_schedule": scheduled, "rejected_updates": self.rejections.updates}
        self.record(metrics | ({"eta": eta, "omega": omega} if eta < math.inf else {}))
        policy.update_normalizer(observations)

    @property
    def entropy_decrease(self) -> float:
        """b now, in nats."""
        given = self.current.entropy_decrease
        return self.planned_decrease if given is None else given

    # Set-up ----------------------------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        super()._setup_model()
        if not isinstance(last := self.policy.actor.net[-1], nn.Linear) or last.bias is None:
            raise ValueError(f"the actor ends in {last}; copos updates natural parameters: give a Linear with a bias.")
        self.rejections, self.schedule = Rejections(5), EntropySchedule()
        self.curvature, self.critic_fit = make_natural(self.config, self.policy, self.stream_seed)

    def _connect(self, env: SB3View) -> None:
        check_size(self.config, self.policy.actor, env.num_envs)
        super()._connect(env)

    def _plan(self) -> None:
        """Find b, which is known only once the training's length is."""
        c, head = self.config, self.policy.head
        log_std = c.log_std_init + self.policy.actor.log_unit.mean().item()
        of_one = 0.5 * math.log(2 * math.pi * math.e) + log_std if head.kind == "gaussian" else math.log(2)
        first = sum(map(math.log, head.choices)) if head.kind == "categorical" else head.outputs * of_one
        updates = -(-self._total_timesteps // self.steps_per_iteration)
        self.planned_decrease = (2 if head.kind == "gaussian" else 1) * first / updates
        if c.entropy_decrease is None and first <= 0:
            raise ValueError(f"the first policy has an entropy of {first:.3g} nats; give entropy_decrease.")

    def parts(self) -> dict[str, Stateful]:
        return {
            "rejections": self.rejections,
            "curvature": self.curvature,
            "critic": self.critic_fit,
            "schedule": self.schedule,
        }


@dataclass
class EntropySchedule:
    """The entropy that a training is to have: that of its first policy, less b for each update, in nats."""

    entropy: float = math.nan

    def next(self, entropy: float, b: float, *, begins: bool) -> float:
        """Go on by b from where it is, or, where a training begins, from the policy's entropy."""
        self.entropy = (entropy if begins or math.isnan(self.entropy) else self.entropy) - b
        return self.entropy

    def tensors(self) -> dict[str, Tensor]:
        """Give what it keeps between updates."""
        return {} if math.isnan(self.entropy) else {"entropy": torch.tensor(self.entropy, dtype=torch.float64)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        self.entropy = tensors["entropy"].item() if "entropy" in tensors else math.nan


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


@dataclass
class Dual:
    """g(η, ω) = η ε + ω (b - H_old) + (η + ω) mean_s log ∫ exp((η log π_old + Â) / (η + ω)) da.

    It is convex with the derivatives ε - KL(new || old) and b - (H_old - H_new), where the hidden layers count as
    linear; so it is minimized by the largest change that keeps both constraints. ω is 0 or above for a bound on the
    loss of entropy; for an equality only η + ω is above 0.

    Attributes:
        head: of the actions.
        policies: at some states, [n, K], as if the hidden layers were linear; float64.
        epsilon: ε, in nats, above 0.
        b: nats. As an equality it is halved until ε allows it.
        equality: whether H_old - H_new is to be b, not only at most.
        known: the old distributions at all states, where there are hidden layers: η is then where a search begins. None
            where there are none, and the policies are at all states.
        floor: below which no η has a policy.
        heat: the last log((η + ω) / η) of discrete actions, and how the entropy lost changes with it.
    """

    head: Head
    policies: LogLinear
    epsilon: float
    b: float
    equality: bool = False
    known: Distribution | None = None
    floor: float = field(default=0.0, init=False)
    heat: tuple[float, float] = field(default=(0.0, -1.0), init=False)

    def __post_init__(self) -> None:
        x = self.linear = self.policies
        self.exact = self.known is None
        self.old = self.head.distribution(x.y, x.log_std) if self.known is None else self.known
        if x.w_std is not None:
            self.floor = max(2 * x.w_std.max().item(), 0.0)
            # σ is the same in all states, and the KL quadratic in m: the root mean square stands for all of them.
            m = x.m.square().mean(0, keepdim=True).sqrt()
            self.linear = LogLinear(torch.zeros_like(m), m, x.log_std, x.w_std)
        self.linear_old = self.head.distribution(self.linear.y, x.log_std)

    def solve(self, eta: float, policies: LogLinear | None = None) -> tuple[float, float]:
        """Minimize g over ω for an η above the floor: give ω and the mean KL(new || old) there, in nats.

        Args:
            policies: at the same states, with the hidden layers' true outputs for this η; None takes the linear ones.
        """
        x, old = (self.linear, self.linear_old) if policies is None else (policies, self.old)
        omega = self._temperature(eta, x, old) - eta
        omega = omega if self.equality else max(omega, 0.0)
        return omega, self.head.distribution(*x.at(eta, omega)).kl(old).mean().item()

    def minimize(self, size: float) -> float:
        """Minimize g over η, at least `SHORTEST` times its expected size above the floor."""

        def excess(logarithm: float) -> float:
            return self.excess(self.solve(self.floor + size * math.exp(logarithm))[1])

        ends = math.log(SHORTEST), math.log(FARTHEST) if self.equality else RANGE
        tolerance = 1e-12 if self.exact else KL_TOLERANCE / 2
        logarithm, _ = secant(excess, 0.0, -2.0, ends, tolerance)
        if self.equality and logarithm > ends[1] - 0.1:
            self.b /= 2
            while excess(ends[1] - 0.1) > tolerance:
                self.b /= 2
            logarithm, _ = secant(excess, 0.0, -2.0, ends, tolerance)
        return self.floor + size * math.exp(logarithm)

    def excess(self, kl: float) -> float:
        """Give log(KL / ε), which falls nearly as -2 log η; what is not a number is too far."""
        return math.inf if math.isnan(kl) else math.log(max(kl, 1e-300) / self.epsilon)

    def _temperature(self, eta: float, x: LogLinear, old: Distribution) -> float:
        """Find the η + ω at which H_old - H_new is b; of discrete actions it divides the logits η y + m."""
        if x.w_std is not None:
            # H_old - H_new is half the sum of log((η - 2 w_σ) / (η + ω)).
            return math.exp((torch.log(eta - 2 * x.w_std).sum().item() - 2 * self.b) / len(x.w_std))
        logits, wanted = eta * x.y + x.m, old.entropy().mean().item() - self.b

        def lost(heat: float) -> float:
            return wanted - self.head.distribution(logits / (eta * math.exp(heat))).entropy().mean().item()

        if not self.equality and lost(0.0) <= 0:
            return eta
        self.heat = secant(lost, *self.heat, (-HEAT, HEAT), 1e-13 if self.exact else 1e-6)
        return eta * math.exp(self.heat[0])


def secant(
    decreasing: Callable[[float], float], x: float, slope: float, between: tuple[float, float], tolerance: float
) -> tuple[float, float]:
    """Find the root of a decreasing function between two ends, from an x and the slope there; and the slope at it.

    Steps that would leave the interval in which the root is known to lie halve it instead. Where there is no root the
    end that is nearer to one is found; where the function jumps over 0, the place after it. The last call is of the x
    that is returned.
    """
    (low, high), last = between, None
    for _ in range(100):
        value = decreasing(x)
        low, high = (x, high) if value > 0 else (low, x)
        if last is not None and value != last[1]:
            slope = (value - last[1]) / (x - last[0])
        last = x, value
        if abs(value) <= tolerance:
            break
        if high - low <= tolerance / 10:  # it jumps there, or the root is beyond the end
            if value > 0:
                decreasing(x := high)
            break
        x = x - value / slope if slope < 0 else low
        if not low < x < high:
            x = (low + high) / 2
    return x, slope


class Update:
    """The policies that an actor may become along w, one for each η and ω.

    Args:
        actor: its parameters are changed in place.
        w: the direction, [p].
        s: normalized observations, [n, O].
    """

    def __init__(self, actor: Actor, w: Tensor, s: Tensor) -> None:
        self.actor, self.s = actor, s
        parts = dict(zip(actor.parameters(), w.split([x.numel() for x in actor.parameters()]), strict=True))
        self.theta = {name: x.detach().clone() for name, x in actor.net.named_parameters()}
        self.w = {name: parts[x].view_as(x) for name, x in actor.net.named_parameters()}
        log_std = [] if actor.log_std is None else [actor.log_std.bias]
        self.stds = [y for x in log_std for y in (x.detach().clone(), parts[x])]
        self.exact = len(self.theta) == 2

    def log_linear(self) -> LogLinear:
        """Give the policies at s, or some of it if that will do, as if the hidden layers were linear; float64."""
        net, every = self.actor.net, 1 if self.exact or self.stds else -(-len(self.s) // FEW)
        outputs = jvp(lambda theta: functional_call(net, theta, (self.s[::every],)), (self.theta,), (self.w,))
        return LogLinear(*(x.double() for x in (*outputs, *self.stds)))

    def search(self, dual: Dual, eta: float) -> tuple[float, float]:
        """Update with the η near the dual's at which the true KL is ε, and its ω; infinite ones if there is none.

        Where the dual leaves the KL below ε, so may the true one be.
        """
        omega = kl = math.inf

        def excess(logarithm: float) -> float:
            nonlocal eta, omega, kl
            eta = dual.floor + math.exp(logarithm)
            omega, kl = dual.solve(eta, self.log_linear_at(eta))
            return dual.excess(kl)

        start, slack = math.log(eta - dual.floor), dual.solve(eta)[1] < (1 - KL_TOLERANCE) * dual.epsilon
        ends = (start if slack else start - math.log(MOST_GROWTH), start + RANGE)
        secant(excess, start, -2.0, ends, KL_TOLERANCE)
        if not kl <= (1 + 2 * KL_TOLERANCE) * dual.epsilon:
            self.actor.net.load_state_dict(self.theta, strict=False)
            return math.inf, math.inf
        self.take(eta, omega)
        return eta, omega

    def log_linear_at(self, eta: float) -> LogLinear:
        """Put the hidden layers of η into the actor, and give the policies at s with their true outputs; float64."""
        hidden = self.actor.net[:-1]
        for name, x in hidden.named_parameters():
            torch.add(self.theta[name], self.w[name], alpha=1 / eta, out=x)
        features = hidden(self.s)
        outputs = (linear(features, *last_layer(layers)) for layers in (self.theta, self.w))
        return LogLinear(*(x.double() for x in (*outputs, *self.stds)))

    def take(self, eta: float, omega: float) -> None:
        """Put the natural parameters of η and ω into the actor, whose hidden layers have been put."""
        theta, w = (torch.cat((x, bias[:, None]), 1).T for x, bias in map(last_layer, (self.theta, self.w)))
        new, log_std = LogLinear(theta, w, *self.stds).at(eta, omega)
        weight, bias = last_layer(dict(self.actor.net.named_parameters()))
        weight.copy_(new[:-1].T)
        bias.copy_(new[-1])
        if self.actor.log_std is not None and log_std is not None:
            self.actor.log_std.bias.copy_(log_std)


def last_layer(parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """Give the weights [K, m] and the bias [K] of a network's last layer, by name among all."""
    return list(parameters.values())[-2:]
