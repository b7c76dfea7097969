"""The policy that agents train by gradients: an actor and a critic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor, nn

from agents.policy.base import Policy
from agents.policy.critic import Critic
from agents.policy.distributions import Distribution, Head
from agents.policy.networks import Constant, activation_key, network, unrolled


class Actor(nn.Module):
    """Normalised observations to action distributions. Its parameters are the theta of every direction.

    Args:
        observation_size: O.
        head: how actions are parametrised.
        net_arch: hidden layer sizes.
        activation: key of `ACTIVATIONS`.
        log_std_init: initial log standard deviation of Gaussian actions.
        kind: of its network, one of `NETWORKS`.
        rbf: number and bandwidth of random Fourier features.
    """

    def __init__(
        self,
        observation_size: int,
        head: Head,
        net_arch: Sequence[int],
        activation: str,
        log_std_init: float,
        kind: str = "mlp",
        rbf: tuple[int, float | None] = (250, None),
    ) -> None:
        super().__init__()
        self.head = head
        # A small last layer makes the first policy nearly the same in every state.
        self.net = network(kind, observation_size, net_arch, head.outputs, activation, output_gain=0.01, rbf=rbf)
        self.log_std = Constant(head.outputs, log_std_init) if head.kind == "gaussian" else None

    def forward(self, normalized: Tensor) -> Distribution:
        outputs = self.net(normalized)
        return self.head.distribution(outputs, self.log_std(len(outputs)) if self.log_std is not None else None)

    def shared_std(self, normalized: Tensor) -> Distribution:
        """`forward` without a copy of the log standard deviation for every sample: follows it when it changes."""
        return self.head.distribution(self.net(normalized), self.log_std.bias if self.log_std is not None else None)


class ActorCriticPolicy(Policy):
    """Actor and critic on observations that the policy itself normalises.

    Args:
        observation_space: a Box, flattened.
        action_space: Box, Discrete, MultiDiscrete or MultiBinary.
        net_arch: hidden layer sizes of actor and critic.
        activation_fn: key or class of `ACTIVATIONS`.
        log_std_init: initial log standard deviation of Gaussian actions.
        normalize_observations: whether the normaliser learns; otherwise it stays the identity.
        value_network: of the critic, one of `NETWORKS`.
        rbf_features: random Fourier features, where a network has them.
        rbf_bandwidth: theirs; None takes √(2 O), the root mean square distance of normalised observations [n, O].
    """

    options: ClassVar[tuple[str, ...]] = (
        "net_arch", "activation_fn", "log_std_init", "normalize_observations", "value_network", "rbf_features",
        "rbf_bandwidth",
    )  # fmt: skip
    actor_kind: ClassVar[str] = "mlp"
    """Of the actor's network, one of `NETWORKS`."""

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        *,
        net_arch: Sequence[int] = (64, 64),
        activation_fn: str | type[nn.Module] = "tanh",
        log_std_init: float = 0.0,
        normalize_observations: bool = True,
        value_network: str = "mlp",
        rbf_features: int = 250,
        rbf_bandwidth: float | None = None,
    ) -> None:
        super().__init__(observation_space, action_space, normalize_observations=normalize_observations)
        size, activation, rbf = self.observation_size, activation_key(activation_fn), (rbf_features, rbf_bandwidth)
        self.actor = Actor(size, self.head, net_arch, activation, log_std_init, self.actor_kind, rbf)
        # Values begin at zero, whatever the units of reward.
        self.critic = Critic(network(value_network, size, net_arch, 1, activation, output_gain=0.0, rbf=rbf))

    def distribution(self, observations: Tensor) -> Distribution:
        """Action distributions for observations [n, *O]."""
        return self.actor(self.normalize(observations))

    def sampler(self) -> Callable[[Tensor, Tensor], Tensor]:
        """`choose` with noise and the parameters of now, quick on small batches; equal to it up to rounding."""
        head, network = self.head, unrolled(self.actor.net)
        if self.actor.log_std is None:
            return lambda observations, noise: head.distribution(network(self.normalize(observations))).sample(noise)
        std = self.actor.log_std.bias.detach().exp()
        return lambda observations, noise: torch.addcmul(network(self.normalize(observations)), std, noise)


class LinearPolicy(ActorCriticPolicy):
    """Actions linear in the normalised observations, with a bias; net_arch and activation_fn are the critic's.

    Source: Rajeswaran et al. 2017, "Towards generalization and simplicity in continuous control", section 2,
    https://arxiv.org/abs/1703.02660. Differs from the paper: observations are normalised.
    """

    actor_kind = "linear"


class RBFPolicy(ActorCriticPolicy):
    """Actions linear in random Fourier features of the normalised observations; net_arch is the critic's.

    Source: Rajeswaran et al. 2017, section 2. Differs from the paper: observations are normalised, and the distance
    that the bandwidth stands for is known from that, not measured.
    """

    actor_kind = "rbf"


POLICIES: dict[str, type[BasePolicy]] = {
    "MlpPolicy": ActorCriticPolicy,
    "LinearPolicy": LinearPolicy,
    "RBFPolicy": RBFPolicy,
}
"""Name -> class, for algorithms that train an actor and a critic."""
