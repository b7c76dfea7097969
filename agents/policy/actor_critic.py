"""The policies that agents train by gradients: an actor, alone or with a critic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor, nn

from agents.policy.base import Policy, units
from agents.policy.distributions import Distribution
from agents.policy.features import network
from agents.policy.networks import Actor, Critic, activation_key


def reset(net: nn.Sequential) -> nn.Sequential:
    """Draw the weights anew as PyTorch's layers do."""
    for layer in net:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    return net


class ActorPolicy(Policy):
    """An actor on observations that the policy itself normalizes, for algorithms that learn no values.

    Args:
        observation_space: a Box or MultiBinary, flattened, or Discrete or MultiDiscrete, one-hot.
        action_space: Box, Discrete, MultiDiscrete or MultiBinary.
        net_arch: hidden layer sizes.
        activation_fn: key or class of `ACTIVATIONS`.
        log_std_init: initial log standard deviation of Gaussian actions, in units of their bounds' half width.
        normalize_observations: whether the normalizer learns; otherwise it stays the identity.
        rbf_features: random Fourier features, where the network has them.
        ortho_init: whether weights begin orthogonal; otherwise as PyTorch's layers do.
    """

    options: ClassVar[tuple[str, ...]] = ("net_arch", "activation_fn", "log_std_init", "normalize_observations")
    options_of_its_own: ClassVar[tuple[str, ...]] = ("ortho_init",)
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
        ortho_init: bool = True,
    ) -> None:
        super().__init__(observation_space, action_space, normalize_observations=normalize_observations)
        size, activation = self.observation_size, activation_key(activation_fn)
        # A small last layer makes the first policy nearly the same in every state.
        net = network(self.actor_kind, size, net_arch, self.head.outputs, activation, 0.01, rbf_features)
        self.actor = Actor(self.head, net if ortho_init else reset(net), log_std_init, units(action_space))

    def distribution(self, observations: Tensor) -> Distribution:
        """Give the action distributions for observations [n, *O]."""
        return self.actor(self.normalize(observations))

    def get_distribution(self, obs: Tensor) -> Distribution:
        """Do as `distribution`; SB3's name."""
        return self.distribution(obs)


class ActorCriticPolicy(ActorPolicy):
    """Actor and critic on observations that the policy itself normalizes.

    Args:
        observation_space: a Box or MultiBinary, flattened, or Discrete or MultiDiscrete, one-hot.
        action_space: Box, Discrete, MultiDiscrete or MultiBinary.
        net_arch: hidden layer sizes of actor and critic; or, as in SB3, {"pi": sizes, "vf": sizes}.
        activation_fn: key or class of `ACTIVATIONS`.
        log_std_init: initial log standard deviation of Gaussian actions, in units of their bounds' half width.
        normalize_observations: whether the normalizer learns; otherwise it stays the identity.
        value_network: of the critic, one of `NETWORKS`.
        rbf_features: random Fourier features, where a network has them.
        ortho_init: whether weights begin orthogonal; otherwise as PyTorch's layers do.
    """

    options: ClassVar[tuple[str, ...]] = (*ActorPolicy.options, "value_network", "rbf_features")

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        *,
        net_arch: Sequence[int] | Mapping[str, Sequence[int]] = (64, 64),
        activation_fn: str | type[nn.Module] = "tanh",
        log_std_init: float = 0.0,
        normalize_observations: bool = True,
        value_network: str = "mlp",
        rbf_features: int = 250,
        ortho_init: bool = True,
    ) -> None:
        sizes = net_arch if isinstance(net_arch, Mapping) else {"pi": net_arch, "vf": net_arch}
        super().__init__(
            observation_space,
            action_space,
            net_arch=sizes["pi"],
            activation_fn=activation_fn,
            log_std_init=log_std_init,
            normalize_observations=normalize_observations,
            rbf_features=rbf_features,
            ortho_init=ortho_init,
        )
        size, activation = self.observation_size, activation_key(activation_fn)
        # Values begin at zero, whatever the units of reward.
        values = network(value_network, size, sizes["vf"], 1, activation, 0.0, rbf_features)
        self.critic = Critic(values if ortho_init else reset(values))

    def forward(self, obs: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Give actions [n, *A] before clipping, values [n, 1] and the actions' log-probabilities [n], as SB3 does."""
        actions = self.choose(obs, deterministic)
        log_prob = self.distribution(obs).log_prob(actions)
        counted = actions if self._first is None else actions + self._first
        return counted.reshape(-1, *self.head.shape), self.predict_values(obs), log_prob

    def evaluate_actions(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give values [n, 1], log-probabilities of actions [n, *A] in nats, [n], and entropies [n], as SB3 does."""
        distribution = self.distribution(obs)
        internal = actions if self._first is None else actions - self._first
        log_prob = distribution.log_prob(internal.reshape(-1, *self.head.action_shape))
        return self.predict_values(obs), log_prob, distribution.entropy()

    def predict_values(self, obs: Tensor) -> Tensor:
        """Give V of observations [n, *O] in reward units, [n, 1], as SB3 does."""
        return self.critic(self.normalize(obs))[:, None]


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
