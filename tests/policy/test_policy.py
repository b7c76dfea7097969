"""Action distributions, observation normalisation and the policy around them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, preprocess_obs
from torch import distributions as reference

from agents import NPG
from agents.policy.actor_critic import ActorCriticPolicy, LinearPolicy, RBFPolicy
from agents.policy.base import Moments, ObservationNormalizer
from agents.policy.distributions import Bernoullis, Categoricals, DiagonalGaussian, Head
from agents.policy.networks import ACTIVATIONS, activation_key, mlp

N = 7


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_gaussian_equals_torch() -> None:
    mean, log_std, other_mean, other_log_std, a = (random(N, 3) for _ in range(5))
    ours, other = DiagonalGaussian(mean, log_std), DiagonalGaussian(other_mean, other_log_std)
    theirs, their_other = reference.Normal(mean, log_std.exp()), reference.Normal(other_mean, other_log_std.exp())
    torch.testing.assert_close(ours.log_prob(a), theirs.log_prob(a).sum(-1))
    torch.testing.assert_close(ours.entropy(), theirs.entropy().sum(-1))
    torch.testing.assert_close(ours.kl(other), reference.kl_divergence(theirs, their_other).sum(-1))
    torch.testing.assert_close(ours.mode(), mean)
    torch.testing.assert_close(ours.sample(a), mean + log_std.exp() * a)


def test_categoricals_equal_torch_and_ignore_choices_that_an_action_does_not_have() -> None:
    head = Head.of(spaces.MultiDiscrete([3, 4]))
    outputs, other_outputs = random(N, 7), random(N, 7)
    ours, other = head.distribution(outputs), head.distribution(other_outputs)
    parts = [reference.Categorical(logits=x) for x in outputs.split((3, 4), -1)]
    others = [reference.Categorical(logits=x) for x in other_outputs.split((3, 4), -1)]
    a = torch.stack([part.sample() for part in parts], -1)
    expected = sum(part.log_prob(a[:, i]) for i, part in enumerate(parts))
    torch.testing.assert_close(ours.log_prob(a), expected)
    torch.testing.assert_close(ours.entropy(), sum(part.entropy() for part in parts))
    kl = sum(reference.kl_divergence(p, q) for p, q in zip(parts, others, strict=True))
    torch.testing.assert_close(ours.kl(other), kl)
    torch.testing.assert_close(ours.mode(), torch.stack([part.probs.argmax(-1) for part in parts], -1))


def test_the_entropy_of_actions_with_different_choices_has_a_derivative() -> None:
    outputs = random(N, 7).requires_grad_()
    ours = Head.of(spaces.MultiDiscrete([3, 4])).distribution(outputs).entropy()
    theirs = sum(reference.Categorical(logits=x).entropy() for x in outputs.split((3, 4), -1))
    gradients = [torch.autograd.grad(entropy.sum(), outputs)[0] for entropy in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_bernoullis_equal_torch() -> None:
    logits, other_logits = random(N, 4), random(N, 4)
    theirs, their_other = reference.Bernoulli(logits=logits), reference.Bernoulli(logits=other_logits)
    a = theirs.sample()
    ours = Bernoullis(logits)
    torch.testing.assert_close(ours.log_prob(a.long()), theirs.log_prob(a).sum(-1))
    torch.testing.assert_close(ours.entropy(), theirs.entropy().sum(-1))
    torch.testing.assert_close(ours.kl(Bernoullis(other_logits)), reference.kl_divergence(theirs, their_other).sum(-1))
    torch.testing.assert_close(ours.mode(), theirs.probs.round().long())


def test_sampling_has_the_distributions_frequencies() -> None:
    n = 40_000
    probabilities = torch.tensor([0.5, 0.2, 0.3])
    categorical = Categoricals(probabilities.log().expand(n, 1, 3), ())
    found = torch.bincount(categorical.sample(torch.rand(n, 1)), minlength=3) / n
    torch.testing.assert_close(found, probabilities, atol=0.01, rtol=0)
    bits = Bernoullis(torch.logit(torch.tensor([0.1, 0.8])).expand(n, 2)).sample(torch.rand(n, 2))
    torch.testing.assert_close(bits.float().mean(0), torch.tensor([0.1, 0.8]), atol=0.01, rtol=0)


def test_sampling_never_leaves_the_choices() -> None:
    nearly_one = torch.full((1, 1), 1.0 - 2**-24)
    head = Head.of(spaces.MultiDiscrete([2, 3]))
    sampled = head.distribution(torch.zeros(1, 5)).sample(nearly_one.expand(1, 2))
    assert sampled.tolist() == [[1, 2]]
    assert head.distribution(torch.zeros(1, 5)).sample(torch.zeros(1, 2)).tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("space", "outputs", "action_shape"),
    [
        (spaces.Box(-1, 1, (3,)), 3, (3,)),
        (spaces.Box(-1, 1, (2, 2)), 4, (4,)),
        (spaces.Discrete(5), 5, ()),
        (spaces.MultiDiscrete([2, 3]), 5, (2,)),
        (spaces.MultiBinary(4), 4, (4,)),
    ],
    ids=str,
)
def test_heads_fit_their_spaces(space: spaces.Space, outputs: int, action_shape: tuple[int, ...]) -> None:
    head = Head.of(space)
    assert head.outputs == outputs
    policy = ActorCriticPolicy(spaces.Box(-1, 1, (6,)), space)
    observations = torch.zeros(N, 6)
    noise = torch.rand(N, *head.noise_shape)
    with torch.no_grad():
        actions = policy.choose(observations, noise=noise)
    assert actions.shape == (N, *action_shape)
    assert actions.dtype == head.action_dtype
    assert policy.distribution(observations).log_prob(actions).shape == (N,)
    environment_actions = policy.to_environment(actions * 10 if head.kind == "gaussian" else actions)
    assert all(space.contains(row.numpy().astype(space.dtype)) for row in environment_actions)
    predicted, _ = policy.predict(np.zeros((N, 6), dtype=np.float32))
    assert predicted.shape == (N, *space.shape)


@pytest.mark.parametrize(
    "space", [spaces.MultiDiscrete([[2, 2]]), spaces.Box(0, 9, (2,), np.int64), spaces.Text(3)], ids=str
)
def test_other_action_spaces_are_refused(space: spaces.Space) -> None:
    with pytest.raises(ValueError, match="is not supported"):
        Head.of(space)


def test_normalizer_has_the_moments_of_all_batches_and_is_the_identity_before() -> None:
    normalizer = ObservationNormalizer(3)
    batches = [random(size, 3) * 4 + 100 for size in (5, 1, 64)]
    observations = torch.randn(4, 3)
    torch.testing.assert_close(normalizer(observations), observations)
    for batch in batches:
        normalizer.merge(Moments.of(batch))
    everything = torch.cat(batches)
    expected = (everything - everything.mean(0)) / everything.std(0, correction=0)
    torch.testing.assert_close(normalizer(everything.float()), expected.float(), atol=1e-4, rtol=1e-4)


def test_normalizer_bounds_what_it_has_never_seen_vary() -> None:
    normalizer = ObservationNormalizer(2)
    normalizer.merge(Moments.of(torch.tensor([[1.0, 5.0]]).expand(10, 2)))
    assert normalizer(torch.tensor([[1.0, 5.0], [2.0, 4.0]])).tolist() == [[0.0, 0.0], [10.0, -10.0]]


def test_normalizer_is_saved_with_the_policy_and_frozen_while_acting() -> None:
    box = spaces.Box(-1, 1, (3,))
    policy, loaded = ActorCriticPolicy(box, box), ActorCriticPolicy(box, box)
    policy.update_normalizer(torch.randn(50, 3) * 7)
    before = policy.normalizer.count.clone()
    policy.predict(np.zeros((2, 3)))
    assert torch.equal(policy.normalizer.count, before)
    loaded.load_state_dict(policy.state_dict())
    observations = torch.randn(4, 3)
    assert torch.equal(loaded.normalize(observations), policy.normalize(observations))
    plain = ActorCriticPolicy(box, box, normalize_observations=False)
    plain.update_normalizer(torch.randn(50, 3) * 7)
    assert torch.equal(plain.normalize(observations), observations)


@pytest.mark.parametrize(
    "space", [spaces.Discrete(4), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3), spaces.MultiBinary((2, 2))]
)
def test_choices_are_seen_as_in_sb3(space: spaces.Space) -> None:
    policy = ActorCriticPolicy(space, spaces.Discrete(2))
    seen = torch.as_tensor(np.stack([space.sample() for _ in range(6)]))
    policy.update_normalizer(seen)  # which leaves them as they are
    torch.testing.assert_close(policy.normalize(seen), preprocess_obs(seen, space).flatten(1), rtol=0, atol=0)
    assert policy.observation_size == get_flattened_obs_dim(space)


def test_a_distribution_stays_what_it_was_when_the_parameters_change() -> None:
    policy = ActorCriticPolicy(spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)))
    old = policy.actor(torch.randn(5, 3))
    with torch.no_grad():
        for parameter in policy.actor.parameters():
            parameter += 0.1
    new = policy.actor(torch.zeros(5, 3))
    torch.testing.assert_close(new.log_std - old.log_std, torch.full((5, 2), 0.1))


def test_networks_start_orthogonal_with_the_last_layer_small() -> None:
    first, _, second, _, last = mlp(8, (16, 16), 2, "tanh", output_gain=0.01)
    torch.testing.assert_close(first.weight.T @ first.weight, 2 * torch.eye(8))
    torch.testing.assert_close(second.weight.T @ second.weight, 2 * torch.eye(16))
    torch.testing.assert_close(last.weight @ last.weight.T, 1e-4 * torch.eye(2))
    with pytest.raises(ValueError, match="activation is 'sine'"):
        ActorCriticPolicy(spaces.Box(-1, 1, (2,)), spaces.Discrete(2), activation_fn="sine")


def test_a_policy_alone_is_neither_saved_nor_loaded() -> None:
    policy = ActorCriticPolicy(spaces.Box(-1, 1, (2,)), spaces.Discrete(2))
    with pytest.raises(NotImplementedError, match="Save the agent"):
        policy.save("x.zip")
    with pytest.raises(NotImplementedError, match="nothing is unpickled"):
        ActorCriticPolicy.load("x.zip")


@pytest.mark.parametrize("space", [spaces.Box(-1, 1, (2,)), spaces.MultiDiscrete([2, 3])], ids=str)
def test_the_linear_policy_is_affine_in_the_normalised_observations(space: spaces.Space) -> None:
    policy = LinearPolicy(spaces.Box(-1, 1, (6,)), space, net_arch=(8,))
    policy.update_normalizer(torch.randn(50, 6) * 7)
    outputs = policy.actor.head.outputs
    gaussian = policy.actor.head.kind == "gaussian"
    assert sum(x.numel() for x in policy.actor.parameters()) == outputs * (6 + 1 + gaussian)
    first, second = policy.normalize(torch.randn(2, N, 6).flatten(0, 1)).split(N)
    middle = policy.actor.net((first + second) / 2)
    torch.testing.assert_close(middle, (policy.actor.net(first) + policy.actor.net(second)) / 2)
    assert sum(x.numel() for x in policy.critic.parameters()) == (6 + 1) * 8 + 8 + 1


def test_the_rbf_policy_is_linear_in_fixed_sines() -> None:
    box = spaces.Box(-1, 1, (3,))
    policy = RBFPolicy(box, box, rbf_features=2000)
    features = policy.actor.net[0]
    s = torch.randn(N, 3)
    expected = torch.sin(s @ features.projection + features.phase)
    torch.testing.assert_close(features(s), expected)
    assert sum(x.numel() for x in policy.actor.parameters()) == 3 * (2000 + 1 + 1)
    assert features.projection.std().item() == pytest.approx(6**-0.5, rel=0.03)
    assert features.phase.abs().max().item() == pytest.approx(np.pi, abs=0.02)
    # The mean product of two observations' features approaches half the Gaussian kernel of width ν.
    kernel = torch.exp(-torch.cdist(s, s).square() / (2 * 6.0)) / 2
    torch.testing.assert_close(expected @ expected.T / 2000, kernel, atol=0.05, rtol=0)


def test_random_features_are_saved_with_the_policy_and_not_trained() -> None:
    box = spaces.Box(-1, 1, (3,))
    policy, loaded = (RBFPolicy(box, box, rbf_features=20) for _ in range(2))
    observations, noise = torch.randn(4, 3), torch.randn(4, 3)
    assert not torch.equal(policy.actor.net[0](observations), loaded.actor.net[0](observations))
    loaded.load_state_dict(policy.state_dict())
    assert torch.equal(policy.choose(observations, noise=noise), loaded.choose(observations, noise=noise))
    assert torch.equal(policy.choose(observations, noise=noise), loaded.sampler()(observations, noise))
    assert "actor.net.0.phase" in policy.state_dict()
    assert not any(x.requires_grad for x in policy.actor.net[0].buffers())


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("kind", ["box", "discrete"])
@pytest.mark.parametrize("policy_class", [ActorCriticPolicy, LinearPolicy, RBFPolicy])
def test_a_sampler_acts_as_the_policy(policy_class: type[ActorCriticPolicy], kind: str, activation: str) -> None:
    box = spaces.Box(-1, 1, (3,))
    policy = policy_class(
        box, box if kind == "box" else spaces.Discrete(4), net_arch=(7, 6, 5), activation_fn=activation
    )
    with torch.no_grad():
        for parameter in policy.actor.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    policy.update_normalizer(5 + 2 * torch.randn(50, 3))
    observations = 5 + 2 * torch.randn(N, 3, dtype=torch.float64)
    observations[0, 0] = 1e3  # beyond the normalizer's bound
    noise = torch.rand(N, *policy.head.noise_shape)
    expected = policy.choose(observations, noise=noise)
    torch.testing.assert_close(policy.sampler()(observations, noise), expected, atol=1e-5, rtol=1e-5)


def test_tanh_is_torchs_to_float32s_precision() -> None:
    x = torch.linspace(-20, 20, 10_001, requires_grad=True)
    y = ACTIVATIONS["tanh"]()(x)
    exact = torch.tanh(x.detach().double())
    assert (y - exact).abs().max() < 2e-7
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert (slope - (1 - exact.square())).abs().max() < 5e-7
    assert activation_key(torch.nn.Tanh) == "tanh"


def test_tanh_has_all_derivatives() -> None:
    tanh, x, v = ACTIVATIONS["tanh"](), torch.randn(3, 2).double().requires_grad_(), torch.randn(3, 2).double()
    assert torch.autograd.gradcheck(tanh, x)
    assert torch.autograd.gradgradcheck(tanh, x)
    slope = 1 - torch.tanh(x).square()
    torch.testing.assert_close(torch.func.jvp(tanh, (x,), (v,))[1], v * slope)
    per_sample = torch.func.vmap(torch.func.grad(lambda row: tanh(row).sum()))(x.detach())
    torch.testing.assert_close(per_sample, slope.detach())


def test_a_first_policy_does_not_depend_on_the_number_of_threads() -> None:
    def first(threads: int) -> torch.Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            agent = NPG("MlpPolicy", "Hopper-v5", num_envs=1, net_arch=(400, 300), seed=0, device="cpu")
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        return torch.nn.utils.parameters_to_vector(agent.policy.parameters())

    assert torch.equal(first(1), first(4))
