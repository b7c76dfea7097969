"""The policies that agents train by gradients: an actor, alone or with a critic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor, nn

from agents.policy.base import Policy
from agents.policy.distributions import Distribution
from agents.policy.features import network
from agents.policy.networks import Actor, Critic, activation_key


class ActorPolicy(Policy):
    """An actor on observations that the policy itself normalizes, for algorithms that learn no values.

    Args:
        observation_space: a Box, flattened.
        action_space: Box, Discrete, MultiDiscrete or MultiBinary.
        net_arch: hidden layer sizes.
        activation_fn: key or class of `ACTIVATIONS`.
        log_std_init: initial log standard deviation of Gaussian actions.
        normalize_observations: whether the normalizer learns; otherwise it stays the identity.
        rbf_features: random Fourier features, where the network has them.
    """

    options: ClassVar[tuple[str, ...]] = ("net_arch", "activation_fn", "log_std_init", "normalize_observations")
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
        rbf_features: int = 250,
    ) -> None:
        super().__init__(observation_space, action_space, normalize_observations=normalize_observations)
        size, activation = self.observation_size, activation_key(activation_fn)
        # A small last layer makes the first policy nearly the same in every state.
        net = network(self.actor_kind, size, net_arch, self.head.outputs, activation, 0.01, rbf_features)
        self.actor = Actor(self.head, net, log_std_init)

    def distribution(self, observations: Tensor) -> Distribution:
        """Give the action distributions for observations [n, *O]."""
        return self.actor(self.normalize(observations))


class ActorCriticPolicy(ActorPolicy):
    """Actor and critic on observations that the policy itself normalizes.

    Args:
        observation_space: a Box, flattened.
        action_space: Box, Discrete, MultiDiscrete or MultiBinary.
        net_arch: hidden layer sizes of actor and critic.
        activation_fn: key or class of `ACTIVATIONS`.
        log_std_init: initial log standard deviation of Gaussian actions.
        normalize_observations: whether the normalizer learns; otherwise it stays the identity.
        value_network: of the critic, one of `NETWORKS`.
        rbf_features: random Fourier features, where a network has them.
    """

    options: ClassVar[tuple[str, ...]] = (*ActorPolicy.options, "value_network", "rbf_features")

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
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            net_arch=net_arch,
            activation_fn=activation_fn,
            log_std_init=log_std_init,
            normalize_observations=normalize_observations,
            rbf_features=rbf_features,
        )
        # Values begin at zero, whatever the units of reward.
        values = network(
            value_network, self.observation_size, net_arch, 1, activation_key(activation_fn), 0.0, rbf_features
        )
        self.critic = Critic(values)


class LinearPolicy(ActorCriticPolicy):
    """Actions linear in the normalized observations, with a bias; net_arch and activation_fn are the critic's.

    Source: Rajeswaran et al. 2017, "Towards generalization and simplicity in continuous control", section 2,
    https://arxiv.org/abs/1703.02660. Differs from the paper: observations are normalized.
    """

    actor_kind = "linear"


class RBFPolicy(ActorCriticPolicy):
    """Actions linear in random Fourier features of the normalized observations; net_arch is the critic's.

    Source: Rajeswaran et al. 2017, section 2. Differs from the paper: observations are normalized, and the distance
    that the bandwidth stands for is known from that, not measured.
    """

    actor_kind = "rbf"


POLICIES: dict[str, type[BasePolicy]] = {
    "MlpPolicy": ActorCriticPolicy,
    "LinearPolicy": LinearPolicy,
    "RBFPolicy": RBFPolicy,
}
"""Name -> class, for algorithms that train an actor and a critic."""
