"""BFGS in a box-shaped trust region: its step is the model's minimum, its matrix stays definite, and where it ends."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize as so

import bilevel
from bilevel._oracle import Evaluation, Oracle
from bilevel._outer import Setting
from bilevel._trust_region import box_minimum, damped_bfgs, trust_region, with_directions

from .test_minimize import PROBLEM, X0, Y0, true_gradient, usual  # noqa: F401  (a fixture)


@pytest.mark.parametrize("seed", range(8))
def test_a_step_is_the_minimum_in_the_box(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 30))
    root = rng.normal(size=(n + 2, n)) * np.exp(2 * rng.normal(size=n))
    g, matrix = root.T @ rng.normal(size=n + 2), root.T @ root
    lower, upper = -rng.exponential(size=n), rng.exponential(size=n)
    lower[rng.random(n) < 0.2] = 0  # at a bound
    p = box_minimum(g, matrix, lower, upper)
    assert np.all((p >= lower) & (p <= upper))
    slope = g + matrix @ p
    scaled = np.clip(p - slope / np.diag(matrix), lower, upper) - p
    np.testing.assert_allclose(scaled, 0, atol=1e-6)
    exact = so.lsq_linear(root, -np.linalg.lstsq(root.T, g, rcond=None)[0], (lower, upper + 1e-300), "bvls", tol=1e-14)
    model = lambda p: g @ p + 0.5 * p @ matrix @ p
    assert model(p) <= model(exact.x) + 1e-9 * abs(model(exact.x))


def test_the_matrix_follows_gradients_and_stays_definite():
    rng = np.random.default_rng(0)
    matrix, hessian = np.eye(5), np.diag([1.0, 2.0, 3.0, 4.0, -5.0])
    for _ in range(20):
        move = rng.normal(size=5)
        turn = hessian @ move
        matrix = damped_bfgs(matrix, move, turn)
        assert np.linalg.eigvalsh(matrix)[0] > 0
        if move @ turn > 0.9 * move @ matrix @ move:
            np.testing.assert_allclose(matrix @ move, turn, atol=1e-9)


class Plain(Oracle):
    """A plain function of x, `(value, gradient)`, as an oracle."""

    def __init__(self, function, x0):
        self.function, self.x0, self.dtype, self.asked = function, np.asarray(x0, float), jnp.dtype(float), []

    def __call__(self, x):
        self.asked.append(x)
        value, gradient = self.function(x)
        return Evaluation(x, float(value), np.asarray(gradient, float), 0.0, np.zeros(0), np.zeros(0), False)


def run(function, x0, lower=-np.inf, upper=np.inf, tol=1e-8, noise=1e-12):
    """The method on a plain function of x: (last point accepted, number of evaluations, last word)."""
    oracle, taken = Plain(function, x0), []
    x0, asked = oracle.x0, oracle.asked
    setting = Setting(np.broadcast_to(lower, x0.shape), np.broadcast_to(upper, x0.shape), None, None, tol, 500)

    def on_step(found):
        taken.append(found)
        return setting.optimality(found) > tol

    said = trust_region(oracle, setting, on_step)
    assert all(np.all((x >= lower) & (x <= upper)) for x in asked)
    assert all(b.value <= a.value + noise for a, b in zip(taken, taken[1:], strict=False))
    return taken[-1], len(asked), said


def test_curved_valleys_bounds_and_saddles():
    found, count, _ = run(lambda x: (so.rosen(x), so.rosen_der(x)), [-1.2, 1.0, -1.2, 1.0])
    np.testing.assert_allclose(found.x, 1, atol=1e-6)
    assert count < 120
    # held by a bound, that is where the valley is left
    held, _, _ = run(lambda x: (so.rosen(x), so.rosen_der(x)), [-1.2, 1.0], upper=0.5)
    np.testing.assert_allclose(held.x, [0.5, 0.25], atol=1e-6)
    # from beside a saddle, where h is not convex, down to a minimum
    saddle = lambda x: (x[0] ** 2 - x[1] ** 2 + x[1] ** 4, [2 * x[0], -2 * x[1] + 4 * x[1] ** 3])
    found, _, _ = run(saddle, [1.0, 1e-3])
    np.testing.assert_allclose([found.x[0], abs(found.x[1])], [0, 0.5**0.5], atol=1e-6)


def test_flat_directions_do_not_wait_for_steep_ones():
    """Curvatures over six orders of magnitude: fewer evaluations than SciPy's L-BFGS-B, to the same accuracy."""
    curvature = np.logspace(0, -6, 40)
    target = np.random.default_rng(0).uniform(-5, 5, size=40)
    bowl = lambda x: (np.sum(curvature * np.log(np.cosh(x - target))), curvature * np.tanh(x - target))
    found, count, _ = run(bowl, np.zeros(40), -9.0, 9.0, tol=1e-8)
    peer = so.minimize(bowl, np.zeros(40), jac=True, bounds=[(-9, 9)] * 40, options={"ftol": 0, "gtol": 1e-8})
    assert 2 * count < peer.nfev
    assert found.value <= peer.fun + 1e-7


def test_the_first_step_says_how_curved_it_is_elsewhere():
    bowl = lambda x: (float(np.sum(np.cosh(x))), np.sinh(x))
    assert run(bowl, 1e-2 * np.random.default_rng(0).normal(size=40))[1] < 10


def test_directions_steeper_than_the_first_step_are_found_out():
    """Most directions are two to six times as curved as those of the first step, whose curvature overshoots there."""
    rng = np.random.default_rng(0)
    curvature = np.append(np.full(5, 1.0), rng.uniform(2, 6, size=115))
    target = np.append(np.full(5, 10.0), 0.3 * rng.normal(size=115))
    bowl = lambda x: (0.5 * np.sum(curvature * (x - target) ** 2), curvature * (x - target))
    found, count, _ = run(bowl, np.zeros(120), tol=1e-6, noise=1e-9)
    np.testing.assert_allclose(found.x, target, atol=1e-5)
    assert count < 25  # 31 without


def test_directions_form_an_orthonormal_basis():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(5, 7))
    vectors[3] = vectors[0] - 2 * vectors[1]  # nothing new
    basis = with_directions(np.zeros((7, 0)), *vectors[:4], 1e-9 * vectors[4])
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-14)
    np.testing.assert_allclose(basis @ basis.T @ vectors.T, vectors.T, atol=1e-13)
    assert with_directions(np.eye(7), vectors[0]).shape == (7, 7)


def test_it_ends_where_round_off_ends_it():
    noisy = lambda x: (1 + np.sum(x**2) + 1e-9 * np.sin(1e9 * x[0]), 2 * x + 1e-9 * (2 + np.cos(1e9 * x)))
    found, count, end = run(noisy, np.ones(3), tol=0.0, noise=3e-9)
    np.testing.assert_allclose(found.x, 0, atol=1e-3)
    assert end.cause == "the trust region"
    assert end.round_off
    assert count < 500


def test_minimize_with_it(usual):  # noqa: F811
    result = bilevel.minimize(PROBLEM, X0, Y0, method="trust-region", tol=1e-8)
    assert result.converged
    np.testing.assert_allclose(result.x, usual.x, atol=1e-5)
    held = bilevel.minimize(PROBLEM, X0, Y0, method="Trust-Region", bounds=(-1.5, jnp.full(6, 0.5)), tol=1e-8)
    assert held.converged
    step = jnp.clip(held.x - true_gradient(held.x), -1.5, 0.5) - held.x
    assert float(jnp.abs(step).max()) <= 1e-6
