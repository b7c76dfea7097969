"""Evolution strategies against gradients and variances that are known exactly."""

from dataclasses import astuple, replace

import pytest
import torch
from torch.func import jacrev

from agents.evolution.engine import METHODS, Estimate, Scheme, estimate, join, start
from benchmarks.baselines import tbptt
from benchmarks.toys import InfluenceBalancing, ToyRegression

THETA = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)


class LinearSystem:
    """s' = A s + B θ; each step scores -|s - c|²/2. Quadratic in the parameters of all steps."""

    A = torch.tensor([[0.9, 0.4], [-0.3, 0.8]], dtype=torch.float64)
    B = torch.tensor([[1.0, 0.5, 0.0], [0.2, -1.0, 0.7]], dtype=torch.float64)
    c = torch.tensor([1.0, -0.5], dtype=torch.float64)

    def init(self, keys, slots):
        return {"s": torch.zeros(len(keys), 2, dtype=torch.float64), "steps": torch.zeros_like(keys)}

    def unroll(self, theta, state, window):
        s, score = state["s"], 0
        for _ in range(window):
            s = s @ self.A.T + theta @ self.B.T
            score = score - 0.5 * (s - self.c).square().sum(1)
        return {"s": s, "steps": state["steps"] + window}, score, torch.zeros(len(s), dtype=torch.bool)


class Quadratic(LinearSystem):
    """Steps without a memory."""

    A = torch.zeros(2, 2, dtype=torch.float64)


class Survival:
    """s' = s + θ; a step that begins with s at most 1 scores 1, and the episode ends beyond."""

    def init(self, keys, slots):
        return {"s": torch.zeros(len(keys), 1, dtype=torch.float64), "steps": torch.zeros_like(keys)}

    def unroll(self, theta, state, window):
        s, steps, score = state["s"], state["steps"], torch.zeros(len(theta), dtype=torch.float64)
        for _ in range(window):
            alive = s[:, 0] <= 1
            score, steps = score + alive, steps + alive
            s = torch.where(alive[:, None], s + theta, s)
        return {"s": s, "steps": steps}, score, s[:, 0] > 1


class Recorder(Survival):
    """Survival that remembers how it was called."""

    def __init__(self):
        self.begun, self.rows = [], []

    def init(self, keys, slots):
        self.begun.append((keys.tolist(), slots.tolist()))
        return super().init(keys, slots)

    def unroll(self, theta, state, window):
        self.rows.append(len(theta))
        return super().unroll(theta, state, window)


def scheme(method, pairs=4, window=1, horizon=4, **options):
    window = horizon if method == "es" else window
    options = {"staggered": False, **options}
    return Scheme.of(method, particles=2 * pairs, window=window, horizon=horizon, **options)


def windows(task, scheme, count, theta=THETA, sigma=0.5, seed=0):
    """Estimates of consecutive windows at a fixed θ; sigma may be a list."""
    particles, found = start(scheme, theta, seed), []
    for index in range(count):
        now = sigma[index] if isinstance(sigma, list) else sigma
        result, particles = estimate(task, scheme, theta, now, particles)
        found.append(result)
    return found


def episode(task, scheme, **options):
    """One gradient of a whole episode's score for each shard of 32 pairs, [shards, P]."""
    count = scheme.horizon // scheme.window
    return sum(result.sums for result in windows(task, scheme, count, **options)) / 32


def effects(task, count=4):
    """What θ in window τ does to the score of window t: [t, τ, P]."""

    def scores(thetas):
        state, found = task.init(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)), []
        for theta in thetas:
            state, score, _ = task.unroll(theta[None], state, 1)
            found.append(score[0])
        return torch.stack(found)

    return jacrev(scores)(THETA.expand(count, -1))


def exact_variance(g, block, after=0):
    """The reference's formula for perturbations that last for `block` windows: P Σ|G|² + Σ<G[s,τ], G[τ,s]>.

    G[s, τ] sums the effects of τ on the windows from max(s, τ) + after on.
    """
    count, _, size = g.shape
    blocks = count // block
    g = g.unflatten(0, (blocks, block)).sum(1).unflatten(1, (blocks, block)).sum(2)
    G = torch.stack(
        [torch.stack([g[max(s, tau) + after :, tau].sum(0) for tau in range(blocks)]) for s in range(blocks)]
    )
    return size * G.square().sum() + (G * G.transpose(0, 1)).sum()


def assert_mean(samples, expected, errors=4.5):
    interval = errors * samples.std(0) / len(samples) ** 0.5
    assert ((samples.mean(0) - expected).abs() <= interval + 1e-12).all()
    # The interval is narrow enough to mean something.
    assert interval.max() < 0.1 * expected.norm()


def assert_variance(samples, expected):
    """A sample variance of 2048 shards is within 8 % with near certainty."""
    torch.testing.assert_close(32 * samples.var(0).sum(), expected, rtol=0.08, atol=0)


@pytest.mark.parametrize("task", [Quadratic(), LinearSystem()], ids=["quadratic", "linear system"])
@pytest.mark.parametrize("method", [method for method in METHODS if method != "truncated_es"])
def test_the_mean_is_the_gradient(method, task):
    options = {"resample_every": 2} if method == "gpes" else {}
    samples = episode(task, scheme(method, 16384, **options))
    assert_mean(samples, effects(task).sum((0, 1)))


SHAPE = torch.tensor([[1.5, 0.5, 0.0], [0.5, 0.75, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize("method", ["pes", "nres"])
def test_shaped_perturbations_give_the_gradient_in_their_metric(method):
    task, pairs = LinearSystem(), scheme(method, 16384)
    particles, sums = start(pairs, THETA, 0), 0
    for _ in range(4):
        result, particles = estimate(task, pairs, THETA, 0.5, particles, lambda noise: noise @ SHAPE)
        sums = sums + result.sums
    assert_mean(sums / 32, SHAPE @ SHAPE @ effects(task).sum((0, 1)))
    covariance = particles.epsilon.T.cov()
    torch.testing.assert_close(covariance, 0.25 * SHAPE @ SHAPE, rtol=0.05, atol=0.01)


def test_an_analytic_part_is_not_shaped():
    analytic = scheme("pes_analytic")
    with pytest.raises(ValueError, match="shape=None"):
        estimate(LinearSystem(), analytic, THETA, 0.5, start(analytic, THETA, 0), lambda noise: noise)


def test_truncated_es_estimates_only_what_a_window_does_to_itself():
    task = LinearSystem()
    g = effects(task)
    samples = episode(task, scheme("truncated_es", 16384))
    assert_mean(samples, g.diagonal().sum(1))
    with pytest.raises(AssertionError):
        assert_mean(samples, g.sum((0, 1)))


def test_truncated_es_has_the_wrong_sign_on_influence_balancing():
    task, theta = InfluenceBalancing(), torch.tensor([0.5], dtype=torch.float64)
    signs = {}
    for method in ("pes", "truncated_es"):
        found = windows(task, scheme(method, 512, horizon=None), 100, theta, sigma=0.1)
        signs[method] = sum(result.gradient for result in found[30:]).sign().item()
    assert signs == {"pes": -1, "truncated_es": 1}


@pytest.mark.parametrize(("method", "block"), [("pes", 1), ("gpes", 2), ("nres", 4), ("es", 4)])
@pytest.mark.parametrize("task", [Quadratic(), LinearSystem()], ids=["quadratic", "linear system"])
def test_the_variance_is_the_exact_formula(method, block, task):
    options = {"resample_every": block} if method == "gpes" else {}
    samples = episode(task, scheme(method, 65536, **options))
    assert_variance(samples, exact_variance(effects(task), block))


def test_the_variance_of_truncated_es():
    local = effects(LinearSystem()).diagonal().T
    samples = episode(LinearSystem(), scheme("truncated_es", 65536))
    assert_variance(samples, (len(THETA) + 1) * local.square().sum())


@pytest.mark.parametrize("method", ["pes", "nres", "pes_analytic"])
def test_a_sigma_schedule_leaves_the_mean_alone(method):
    task = LinearSystem()
    samples = episode(task, scheme(method, 16384), sigma=[0.8, 0.4, 0.2, 0.1])
    interval = 4.5 * samples.std(0) / len(samples) ** 0.5
    expected = effects(task).sum((0, 1))
    assert ((samples.mean(0) - expected).abs() <= interval).all()
    assert interval.max() < 0.25 * expected.norm()


def survival_gradient(theta, sigma, blocks, half=0.05, samples=1_000_000):
    """Central difference of the mean score under smoothing, windows of 2 steps, with common random numbers."""
    noise = torch.randn(samples, blocks, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moves = sigma * noise.repeat_interleave(2, 1)

    def mean_score(theta):
        s = (theta + moves).cumsum(1)[:, :-1]
        return 1 + (s <= 1).cumprod(1).sum(1).double().mean()

    return ((mean_score(theta + half) - mean_score(theta - half)) / (2 * half)).item()


@pytest.mark.parametrize("staggered", [False, True])
def test_survival_counts_when_episodes_end_early(staggered):
    theta, count = torch.tensor([0.25], dtype=torch.float64), 200
    survival = scheme("pes", 1024, window=2, horizon=8, staggered=staggered)
    found = windows(Survival(), survival, count, theta, sigma=0.3)[4:]
    begun = sum((result.phase == 0).sum() for result in found)
    # At fixed θ the mean is the gradient over the mean lifetime of a pair.
    gradient = sum(result.sums.sum() for result in found) / begun
    assert gradient.item() == pytest.approx(survival_gradient(theta, 0.3, 4), rel=0.05)


def test_truncated_es_does_not_see_survival():
    theta = torch.tensor([0.25], dtype=torch.float64)
    found = windows(Survival(), scheme("truncated_es", 1024, window=2, horizon=8), 200, theta, sigma=0.3)
    gradient = sum(result.sums.sum() for result in found) / sum((result.phase == 0).sum() for result in found)
    assert abs(gradient) < 0.5 * abs(survival_gradient(theta, 0.3, 4))


def equal(a: Estimate, b: Estimate) -> bool:
    return all(torch.equal(x, y) for x, y in zip(astuple(a), astuple(b), strict=True))


def test_special_cases_coincide_to_the_bit():
    task = LinearSystem()

    def run(method, **options):
        return windows(task, scheme(method, 40, **options), 8)

    for a, b in (
        (run("gpes", resample_every=1), run("pes")),
        (run("gpes", resample_every=4), run("nres")),
        (run("pes", window=4), run("es")),
        (run("nres", window=4), run("es")),
    ):
        assert all(map(equal, a, b))


def test_nres_windows_add_up_to_es():
    task = LinearSystem()
    nres = sum(result.gradient for result in windows(task, scheme("nres", 40), 4))
    (es,) = windows(task, scheme("es", 40), 1)
    torch.testing.assert_close(nres, es.gradient)
    (truncated,) = windows(task, scheme("truncated_es", 40, window=4), 1)
    torch.testing.assert_close(truncated.gradient, es.gradient)


def test_a_whole_episode_in_one_analytic_window_has_no_variance():
    task, theta = ToyRegression(20), torch.tensor([-1.0, -2.0], dtype=torch.float64)
    (result,) = windows(task, scheme("pes_analytic", 1, window=20, horizon=20), 1, theta)
    first = torch.zeros(1, dtype=torch.int64)
    gradient, _, _ = tbptt(task, theta, task.init(first, first), 20)
    torch.testing.assert_close(result.gradient, gradient)


def test_analytic_pes_varies_by_effects_on_later_windows_only():
    samples = episode(LinearSystem(), scheme("pes_analytic", 65536))
    assert_variance(samples, exact_variance(effects(LinearSystem()), 1, after=1))


class KeyedRegression(ToyRegression):
    """Starts where the key says."""

    def init(self, keys, slots):
        state = super().init(keys, slots)
        return {**state, "x": state["x"] + keys[:, None] / 2**31}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_shards_computed_apart_are_those_computed_together(dtype):
    task, joint = KeyedRegression(40), scheme("pes", 101, window=10, horizon=40, staggered=True)
    theta = torch.tensor([-1.0, -2.0], dtype=dtype)
    together = start(joint, theta, 7)
    apart = [start(joint, theta, 7, first_pair=first, pairs=n) for first, n in ((0, 32), (32, 64), (96, 5))]
    for _ in range(9):
        whole, together = estimate(task, joint, theta, 0.3, together)
        parts = [estimate(task, joint, theta, 0.3, particles) for particles in apart]
        apart = [particles for _, particles in parts]
        merged = join([part for part, _ in parts])
        assert equal(whole, merged)
        assert torch.equal(whole.gradient, merged.gradient)
        theta = theta + 1e-4 * whole.gradient
    assert whole.gradient.dtype == dtype


def test_equal_seeds_agree_and_unequal_ones_differ():
    a, b, c = (windows(LinearSystem(), scheme("pes", 40), 6, seed=seed) for seed in (1, 1, 2))
    assert all(map(equal, a, b))
    assert not any(torch.equal(x.gradient, y.gradient) for x, y in zip(a, c, strict=True))


def test_a_window_can_be_repeated_from_the_same_particles():
    survival = scheme("pes", 40, window=2, horizon=8)
    theta = torch.tensor([0.4], dtype=torch.float64)
    particles = start(survival, theta, 0)
    for _ in range(3):
        _, particles = estimate(Survival(), survival, theta, 0.5, particles)
    first, _ = estimate(Survival(), survival, theta, 0.5, particles)
    again, _ = estimate(Survival(), survival, theta, 0.5, particles)
    assert equal(first, again)


def test_a_dead_twin_scores_nothing_and_is_not_stepped():
    # ε is set by hand: the first twin of pair 0 dies in its first window, the second one lives to the horizon.
    task, pes, theta = Recorder(), scheme("nres", 2, window=2, horizon=6), torch.zeros(1, dtype=torch.float64)
    first, particles = estimate(task, pes, theta, 1e-9, start(pes, theta, 0))
    assert first.scores.tolist() == [2, 2, 2, 2]
    particles = replace(particles, epsilon=torch.tensor([[2.0], [0.0]], dtype=torch.float64))
    second, particles = estimate(task, pes, theta, 1e-9, particles)
    assert second.scores.tolist() == [1, 2, 2, 2]
    assert second.deaths.tolist() == [1, 0]
    assert second.steps.tolist() == [3, 4]
    third, particles = estimate(task, pes, theta, 1e-9, particles)
    assert third.scores.tolist() == [0, 2, 2, 2]
    assert third.deaths.tolist() == [0, 0]
    assert third.steps.tolist() == [2, 4]
    assert third.phase.tolist() == [2, 2]
    assert task.rows == [4, 4, 3]
    fourth, _ = estimate(task, pes, theta, 1e-9, particles)
    assert fourth.phase.tolist() == [0, 0]
    assert len(task.begun) == 2


def test_a_pair_resets_alone_and_its_twins_share_a_key():
    task, pes, theta = Recorder(), scheme("nres", 3, window=1, horizon=None), torch.full((1,), 0.1, dtype=torch.float64)
    _, particles = estimate(task, pes, theta, 1e-9, start(pes, theta, 0))
    far = {**particles.state, "s": torch.tensor([0.0, 0, 1, 1, 0, 0], dtype=torch.float64)[:, None]}
    _, particles = estimate(task, pes, theta, 1e-9, replace(particles, state=far))
    result, particles = estimate(task, pes, theta, 1e-9, particles)
    assert result.phase.tolist() == [2, 0, 2]
    (first_keys, _), (keys, slots) = task.begun
    assert slots == [2, 3]
    assert keys[0] == keys[1]
    assert first_keys[::2] == first_keys[1::2]
    assert len({*first_keys, *keys}) == 4
    assert result.phases.tolist() == [1, 0, 2]
    norms = result.xi_by_phase
    assert norms[0] == result.xi_norm[1]
    assert norms[1].isnan()
    assert norms[2] == result.xi_norm[::2].mean()


def test_a_new_episode_forgets_the_old_perturbations():
    found = windows(LinearSystem(), scheme("pes", 64), 5)
    norms = [result.xi_norm.square().mean().item() for result in found]
    assert norms[:4] == pytest.approx([12, 24, 36, 48], rel=0.35)
    assert norms[4] == pytest.approx(12, rel=0.35)


def test_staggered_phases_stay_even():
    found = windows(LinearSystem(), scheme("pes", 40, horizon=8, staggered=True), 24)
    for result in found[8:]:
        counts = result.phases
        assert len(counts) == 8
        assert counts.min() >= 4
        assert counts.max() <= 7
    assert [len(result.phases) for result in found[:3]] == [1, 2, 3]


def test_steps_count_the_mean_particle_too():
    for method, rows in (("pes", 2), ("truncated_es", 3), ("pes_analytic", 3)):
        (result,) = windows(LinearSystem(), scheme(method, 5, window=2), 1)
        assert result.steps.tolist() == [2 * rows] * 5
        assert result.scores.shape == (10,)


def test_signal_to_noise():
    (result,) = windows(LinearSystem(), scheme("es", 40), 1)
    # Gradients of the pairs one by one, from their ranges' definition: ε (L⁺ - L⁻) / 2σ².
    particles = start(scheme("es", 40), THETA, 0)
    _, particles = estimate(LinearSystem(), scheme("es", 40), THETA, 0.5, particles)
    pairs = particles.epsilon * (result.scores[::2] - result.scores[1::2])[:, None] / (2 * 0.5**2)
    torch.testing.assert_close(result.gradient, pairs.mean(0))
    expected = pairs.mean(0).norm() / (pairs.var(0).sum() / 40).sqrt()
    torch.testing.assert_close(result.signal_to_noise, expected)


def test_one_pair_and_scores_that_are_not_finite():
    (result,) = windows(LinearSystem(), scheme("pes", 1), 1)
    assert result.gradient.isfinite().all()
    assert result.signal_to_noise.isnan()

    class Broken(LinearSystem):
        def unroll(self, theta, state, window):
            state, score, ended = super().unroll(theta, state, window)
            return state, score / 0, ended

    (result,) = windows(Broken(), scheme("pes", 3), 1)
    assert not result.gradient.isfinite().any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"particles": 5}, "particles is 5; give an even number"),
        ({"particles": 0}, "particles is 0; give an even number"),
        ({"window": 3}, "horizon is 4; give a multiple of the window, 3"),
        ({"window": 0}, "window is 0; give 1 step or more"),
        ({"window": None}, "pes_ needs a window"),
        ({"horizon": 0}, "horizon is 0"),
        ({"method": "npes"}, "method is 'npes'; give one of .*pes"),
        ({"method": "gpes"}, "resample_every is None for gpes"),
        ({"method": "gpes", "resample_every": -1}, "resample_every is -1; give 1 window or more"),
        ({"resample_every": 2}, "resample_every is 2 for pes"),
        ({"method": "es", "window": 2}, "es unrolls whole episodes, but window is 2 and horizon is 4"),
        ({"method": "es", "horizon": None}, "es unrolls whole episodes"),
    ],
)
def test_schemes_that_make_no_sense_are_refused(options, words):
    options = {"method": "pes", "particles": 4, "window": 1, "horizon": 4, **options}
    if options["window"] is None:
        options["horizon"] = None
        words = words.replace("pes_", "pes")
    with pytest.raises(ValueError, match=words):
        Scheme.of(options.pop("method"), **options)


def test_bad_calls_are_refused():
    for options in ({"resample_every": 2}, {"shared": True}):
        with pytest.raises(ValueError, match="analytic needs a new perturbation"):
            Scheme(4, 1, analytic=True, **options)
    pes = scheme("pes", 40)
    particles = start(pes, THETA, 0)
    for sigma in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"sigma is {sigma}; give a positive"):
            estimate(LinearSystem(), pes, THETA, sigma, particles)
    with pytest.raises(ValueError, match="the particles have 3 parameters"):
        estimate(LinearSystem(), pes, THETA[:2], 1, particles)
    with pytest.raises(ValueError, match="one vector"):
        start(pes, THETA[None], 0)
    for first, count in ((1, 2), (32, 9), (0, 0), (64, None), (-32, 1)):
        with pytest.raises(ValueError, match="no range of the 40 pairs"):
            start(pes, THETA, 0, first_pair=first, pairs=count)


def test_tasks_that_break_the_protocol_are_refused():
    class Stepless(LinearSystem):
        def init(self, keys, slots):
            return {"s": super().init(keys, slots)["s"]}

    class Wide(LinearSystem):
        def unroll(self, theta, state, window):
            state, score, ended = super().unroll(theta, state, window)
            return state, score[:, None], ended

    class Numbers(LinearSystem):
        def unroll(self, theta, state, window):
            state, score, ended = super().unroll(theta, state, window)
            return state, score, ended.double()

    for task, method, words in (
        (Stepless(), "pes", 'holds s; it needs "steps"'),
        (Wide(), "pes", r"scores \(6, 1\)"),
        (Numbers(), "pes", "ended is boolean"),
        (Survival(), "pes_analytic", "use pes instead"),
    ):
        theta = THETA[:1] if isinstance(task, Survival) else THETA
        with pytest.raises(ValueError, match=words):
            windows(task, scheme(method, 2 if method == "pes_analytic" else 3), 1, theta)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_gives_the_same_estimates(method):
    options = {"resample_every": 2} if method == "gpes" else {}
    toy, theta = scheme(method, 40, window=5, horizon=20, **options), torch.tensor([-1.0, -2.0], dtype=torch.float64)
    cpu = windows(ToyRegression(20), toy, 5, theta)
    gpu = windows(ToyRegression(20), toy, 5, theta.cuda())
    for a, b in zip(cpu, gpu, strict=True):
        torch.testing.assert_close(a.gradient, b.gradient.cpu())
