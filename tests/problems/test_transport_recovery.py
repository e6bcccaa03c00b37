"""Statistics of inverse transport: error against sample size, and the support that the l1 penalty finds."""

import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from problems.transport import L1, InverseOT, estimation
from tests.problems._transport import reference

RNG = np.random.default_rng(8)
POINTS, EPSILON, SEEDS = 12, 0.5, 30
P, Q = RNG.normal(size=(POINTS, 3)), RNG.normal(size=(POINTS, 3))
FEATURES = np.stack([-P[:, None, i] * Q[None, :, j] for i in range(3) for j in range(3)])
TRUTH = np.array([0.6, 0, 0, 0, -0.4, 0, 0, 0, 0])
TAUS = {"balanced": (np.inf, np.inf), "unbalanced": (0.8, 1.5)}
WEIGHTS = np.full(POINTS, 1 / POINTS)


def coupling(kind, theta=TRUTH, features=FEATURES):
    b = WEIGHTS if kind == "balanced" else 1.5 * WEIGHTS
    return reference(np.tensordot(theta, features, 1), WEIGHTS, b, EPSILON, *TAUS[kind])[0]


def draw(pi, size, seed):
    counts = np.random.default_rng([size, seed]).multinomial(size, pi.ravel() / pi.sum())
    return counts.reshape(pi.shape) * pi.sum() / size


@pytest.mark.long
@pytest.mark.parametrize("kind", TAUS)
def test_the_error_falls_like_the_square_root_of_the_sample(kind):
    features, truth = FEATURES[[0, 4, 8]], np.array([0.6, -0.4, 0.2])
    pi = coupling(kind, truth, features)
    sizes = [100, 200, 400, 800, 1600]
    means = []
    for size in sizes:
        errors = []
        for seed in range(SEEDS):
            sample = draw(pi, size, seed)
            if kind == "balanced":
                iot = InverseOT(features, sample, epsilon=EPSILON)
            else:
                iot = InverseOT(features, sample, WEIGHTS, 1.5 * WEIGHTS, epsilon=EPSILON, tau=TAUS[kind])
            errors.append(np.linalg.norm(iot.newton(tol=1e-8).x - truth))
        means.append(np.mean(errors))
    slope = np.polyfit(np.log(sizes), np.log(means), 1)[0]
    assert abs(slope + 0.5) < 0.1, (slope, means)


def test_the_support_is_found_with_the_weight_of_theory():
    """A weight of order n^-1/2 above the noise of the gradient finds exactly the features that matter."""
    pi = coupling("balanced")
    size = 100_000
    scale = np.sqrt(np.max(np.sum(FEATURES**2 * pi, axis=(1, 2))) / size)
    for seed in range(3):
        iot = InverseOT(FEATURES, draw(pi, size, seed), epsilon=EPSILON, penalty=L1(3 * scale))
        result = iot.newton()
        assert result.converged
        assert set(np.flatnonzero(result.x)) == {0, 4}
        slope = np.asarray(result.gradient)
        assert np.max(np.abs(slope)) <= 3 * scale * (1 + 1e-6)
        np.testing.assert_allclose(slope[[0, 4]], -3 * scale * np.sign(TRUTH[[0, 4]]), rtol=1e-6)


@pytest.mark.slow
def test_the_weight_may_be_chosen_on_held_out_pairs():
    """Inverse transport inside a bilevel problem: x is the logarithm of the l1 weight, the outer loss the gap of pairs
    that the estimate has not seen. The best weight for that is known to keep too many features (it is chosen for
    prediction); the largest one that is no worse by a standard error finds the support.
    """
    pi, size = coupling("balanced"), 100_000
    train, held_out = (InverseOT(FEATURES, draw(pi, size, s), WEIGHTS, WEIGHTS, epsilon=EPSILON) for s in (0, 1))
    inner = estimation(train, lambda x: L1(jnp.exp(x)))
    # in units of the log-likelihood of all held-out pairs
    problem = bilevel.BilevelProblem(inner, lambda x, y: size / EPSILON * held_out.outer(y[0], y[1:]))
    theta0, potentials = train.initial()
    start, x0 = (theta0, *potentials), jnp.log(jnp.asarray(0.02))

    def refitted(x):
        """The estimate with that weight by Newton's method, and the loss of a held-out pair, for each pair."""
        problem = InverseOT(FEATURES, train.observed, WEIGHTS, WEIGHTS, epsilon=EPSILON, penalty=L1(np.exp(x)))
        fit = problem.newton()
        f, g = fit.y
        return fit, np.tensordot(fit.x, FEATURES, 1) - np.vdot(f, WEIGHTS) - np.vdot(g, WEIGHTS)

    mean = lambda losses: float(np.sum(losses * held_out.observed))
    found = bilevel.hypergradient(problem, x0, start, rtol=1e-6)
    difference = (mean(refitted(float(x0) + 1e-3)[1]) - mean(refitted(float(x0) - 1e-3)[1])) / 2e-3
    np.testing.assert_allclose(found.gradient, size / EPSILON * difference, rtol=1e-4)

    chosen = bilevel.minimize(problem, x0, start, tol=1e-3)
    best, losses = refitted(float(chosen.x))
    np.testing.assert_allclose(chosen.y[0], best.x, rtol=1e-5, atol=1e-8)
    assert all(mean(refitted(float(chosen.x) + s)[1]) >= mean(losses) for s in (-0.7, 0.7))
    assert {0, 4} <= set(np.flatnonzero(best.x))

    x = float(chosen.x)
    while True:  # up in steps of ten per cent
        fit, other = refitted(x + 0.1)
        worse = other - losses
        error = np.sqrt((mean(worse**2) - mean(worse) ** 2) / size)
        if mean(worse) > error:
            break
        x += 0.1
    fit = refitted(x)[0]
    assert set(np.flatnonzero(fit.x)) == {0, 4}
    slope, weight = np.asarray(fit.gradient), np.exp(x)
    assert np.max(np.abs(slope)) <= weight * (1 + 1e-6)
    np.testing.assert_allclose(slope[[0, 4]], -weight * np.sign(TRUTH[[0, 4]]), rtol=1e-6)
