"""Statistics of inverse transport: error against sample size, and the support that the l1 penalty finds."""

import numpy as np
import pytest

from problems.transport import L1, InverseOT
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
