"""The Gaussian closed forms against their own fixed-point iteration, quadrature, SciPy, and differences."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.special

from problems import transport
from problems.transport.gaussian import (
    Gaussian,
    QuadraticCost,
    bilinear,
    bures_map,
    bures_squared,
    plan,
    sqrtm,
)  # fmt: skip

RNG = np.random.default_rng(3)
D, E = 2, 3


def spd(d, scale=1.0):
    A = RNG.normal(size=(d, d))
    return scale * (A @ A.T / d + 0.3 * np.eye(d))


S, T = spd(D), spd(D)
SOURCE = Gaussian(RNG.normal(size=D), spd(D), 1.3)
TARGET = Gaussian(RNG.normal(size=E), spd(E), 0.8)
COST = QuadraticCost(spd(D), RNG.normal(size=(D, E)), spd(E), RNG.normal(size=D), RNG.normal(size=E))
EPSILON = 0.6


def iteration(cost, source, target, epsilon, tau_1, tau_2, steps=3000):
    """Update (4.2) of the potentials' coefficients until it stands still: (mass, mean, covariance)."""
    eta_1, eta_2 = (1 / (1 + epsilon / t) for t in (tau_1, tau_2))
    A, B = (np.linalg.inv(g.covariance) for g in (source, target))
    parts: list = [np.asarray(p) for p in (cost.Cxx, cost.Cxy, cost.Cyy, cost.cx, cost.cy)]
    lz = [
        np.log(g.mass) - (g.mean @ i @ g.mean + np.linalg.slogdet(2 * np.pi * g.covariance)[1]) / 2
        for g, i in ((source, A), (target, B))
    ]

    def update(eta, inverse, mean, lz, Cyy, cy, Cxx, Cxy, cx, G, gl, g0):
        L, v = inverse + (G + Cyy) / epsilon, inverse @ mean + (gl - cy) / epsilon
        Li = np.linalg.inv(L)
        F = -eta * (Cxx - Cxy @ Li @ Cxy.T / epsilon)
        fl = eta * (cx + Cxy @ Li @ v)
        f0 = -eta * epsilon * (lz + g0 / epsilon + v @ Li @ v / 2 - np.linalg.slogdet(L / (2 * np.pi))[1] / 2)
        return F, fl, f0

    Cxx, Cxy, Cyy, cx, cy = parts
    G, gl, g0 = np.zeros_like(Cyy), np.zeros_like(cy), 0.0
    for _ in range(steps):
        before = G, gl, g0
        F, fl, f0 = update(eta_1, B, target.mean, lz[1], Cyy, cy, Cxx, Cxy, cx, G, gl, g0)
        G, gl, g0 = update(eta_2, A, source.mean, lz[0], Cxx, cx, Cyy, Cxy.T, cy, F, fl, f0)
        if all(np.allclose(new, old, rtol=1e-15, atol=1e-15) for new, old in zip((G, gl, g0), before, strict=True)):
            break
    H = np.linalg.inv(np.block([[A + (F + Cxx) / epsilon, Cxy / epsilon], [Cxy.T / epsilon, B + (G + Cyy) / epsilon]]))
    r = np.concatenate([A @ source.mean + (fl - cx) / epsilon, B @ target.mean + (gl - cy) / epsilon])
    log_mass = sum(lz) + (f0 + g0) / epsilon + r @ H @ r / 2 + np.linalg.slogdet(2 * np.pi * H)[1] / 2
    return np.exp(log_mass), H @ r, H


def differences(function, x, h=1e-4):
    """Central differences of fourth order in every entry of x; the function's values may be arrays."""
    x = np.asarray(x, float)
    rows = []
    for i in np.ndindex(*x.shape):
        unit = np.zeros_like(x)
        unit[i] = h
        at = lambda t, unit=unit: np.asarray(function(jnp.asarray(x + t * unit)))
        rows.append((8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h))
    return np.stack(rows).reshape(x.shape + rows[0].shape)


# ------------------------------------------------------------------------------------------------ square root, Bures


def test_square_root_and_its_derivatives():
    root = sqrtm(S)
    np.testing.assert_allclose(root @ root, S, rtol=1e-13)
    np.testing.assert_allclose(root, scipy.linalg.sqrtm(S), rtol=1e-12)
    dS = np.array([[0.3, -0.7], [-0.7, 1.1]])
    for at in (S, np.eye(D)):  # at the identity the eigenvalues coincide
        along = lambda t, at=at: sqrtm(jnp.asarray(at) + t * dS)
        first = jax.jit(jax.jacfwd(along))
        R = np.asarray(sqrtm(at))
        np.testing.assert_allclose(first(0.0), scipy.linalg.solve_sylvester(R, R, dS), rtol=1e-12)
        second = jax.jit(jax.jacfwd(first))
        np.testing.assert_allclose(second(0.0), differences(first, 0.0), rtol=1e-8, atol=1e-10)


def test_square_root_of_a_singular_matrix_has_a_value_and_no_false_derivative():
    singular = np.diag([4.0, 0.0])
    np.testing.assert_allclose(sqrtm(singular), np.diag([2.0, 0.0]))
    slope = jax.jacfwd(lambda t: sqrtm(jnp.asarray(singular) + t * np.eye(2)))(0.0)
    assert not np.isfinite(np.asarray(slope)[1, 1])
    np.testing.assert_allclose(bures_squared(singular, np.eye(2)), 1 + 1, rtol=1e-12)


def test_bures_distance_and_map():
    A = bures_map(S, T)
    np.testing.assert_allclose(A, A.T, rtol=1e-14)
    np.testing.assert_allclose(A @ S @ A, T, rtol=1e-12)
    expected = np.trace(S) + np.trace(T) - 2 * np.trace(A @ S)  # E|x - Ax|^2, cross term by the map
    np.testing.assert_allclose(bures_squared(S, T), expected, rtol=1e-12)
    np.testing.assert_allclose(bures_squared(S, S), 0, atol=1e-13)
    # the gradient of W_2^2 in S is I - A, of the entries of a symmetric matrix
    np.testing.assert_allclose(jax.grad(lambda S: bures_squared(S, T))(jnp.asarray(S)), np.eye(D) - A, rtol=1e-10)
    at_identity = jax.grad(lambda S: bures_squared(S, np.eye(D)))(jnp.eye(D))
    np.testing.assert_allclose(at_identity, np.zeros((D, D)), atol=1e-13)


# ------------------------------------------------------------------------------------------------ plans


@pytest.mark.parametrize("tau", [0.7, (0.4, 3.0), (np.inf, 0.5), (0.8, np.inf), np.inf])
def test_plan_is_where_the_iteration_stands_still(tau):
    target = TARGET if tau != np.inf else Gaussian(TARGET.mean, TARGET.covariance, SOURCE.mass)
    found = plan(COST, SOURCE, target, EPSILON, tau)
    pair = tau if isinstance(tau, tuple) else (tau, tau)
    mass, mean, covariance = iteration(COST, SOURCE, target, EPSILON, *pair)
    np.testing.assert_allclose(found.mass, mass, rtol=1e-11)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(np.linalg.inv(found.covariance)[:D, D:], COST.Cxy / EPSILON, rtol=1e-9)
    a, b, sums = float(SOURCE.mass), float(target.mass), [t for t in pair if t < np.inf]
    if len(sums) == 2:
        identity = EPSILON * a * b + pair[0] * a + pair[1] * b - (EPSILON + sum(pair)) * mass
        np.testing.assert_allclose(found.value, identity, rtol=1e-10)


def test_balanced_bilinear_plan_is_its_singular_values():
    source, target = Gaussian(np.zeros(D), S), Gaussian(np.zeros(E), spd(E))
    A = RNG.normal(size=(D, E))
    found = plan(bilinear(A), source, target, EPSILON)
    left, right = (np.asarray(scipy.linalg.sqrtm(np.asarray(g.covariance))) for g in (source, target))
    U, s0, Vt = np.linalg.svd(left @ A @ right, full_matrices=False)
    s = 2 * s0 / (EPSILON + np.sqrt(EPSILON**2 + 4 * s0**2))
    np.testing.assert_allclose(found.covariance[:D, D:], left @ (U * s) @ Vt @ right, rtol=1e-11)
    np.testing.assert_allclose(found.covariance[:D, :D], S, rtol=1e-11)
    np.testing.assert_allclose(found.value, -(s0 @ s) - EPSILON / 2 * np.log(1 - s**2).sum(), rtol=1e-11)
    # the value's gradient is minus the cross-covariance
    gradient = jax.grad(lambda A: plan(bilinear(A), source, target, EPSILON).value)(jnp.asarray(A))
    np.testing.assert_allclose(gradient, -found.covariance[:D, D:], rtol=1e-10)


def test_squared_distance_tends_to_the_exact_transport_as_epsilon_vanishes():
    I, zero = np.eye(D), np.zeros(D)
    source, target = Gaussian([1.0, -1.0], S), Gaussian(zero, T)
    value = lambda epsilon: float(plan(QuadraticCost(2 * I, -2 * I, 2 * I, zero, zero), source, target, epsilon).value)
    exact = 2.0 + float(bures_squared(S, T))
    # |x - y|^2: the value of Janati et al. 2020
    roots = [np.asarray(scipy.linalg.sqrtm(M)) for M in (S, T)]
    sigma = np.linalg.svd(roots[0] @ roots[1], compute_uv=False)
    for epsilon in (1.0, 0.1):
        s = 4 * sigma / (epsilon + np.sqrt(epsilon**2 + 16 * sigma**2))
        closed = 2.0 + np.trace(S) + np.trace(T) - (2 * sigma * s + epsilon / 2 * np.log(1 - s**2)).sum()
        np.testing.assert_allclose(value(epsilon), closed, rtol=1e-12)
    assert abs(value(1e-5) - exact) < 2e-4


@pytest.mark.parametrize("tau", [(0.4, 3.0), np.inf])
def test_plan_against_quadrature(tau):
    """On Gauss-Hermite points the discrete problem is that of the densities, to the accuracy of quadrature."""
    source, target = Gaussian([0.3], [[0.8]], 1.2), Gaussian([-0.2], [[0.5]], 1.2)
    cost, epsilon = QuadraticCost([[1.0]], [[-1.0]], [[1.2]], [0.2], [-0.3]), 1.0
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    grid = [float(g.mean[0]) + np.sqrt(float(g.covariance[0, 0])) * nodes for g in (source, target)]
    a, b = (float(g.mass) * weights / weights.sum() for g in (source, target))
    x, y = grid[0][:, None], grid[1][None, :]
    c = x**2 / 2 - x * y + 0.6 * y**2 + 0.2 * x - 0.3 * y
    eta_1, eta_2 = (1 / (1 + epsilon / t) for t in (tau if isinstance(tau, tuple) else (tau, tau)))
    g = np.zeros(60)
    with np.errstate(divide="ignore"):
        la, lb = np.log(a), np.log(b)
    for _ in range(400):
        f = -eta_1 * epsilon * scipy.special.logsumexp(lb + (g - c) / epsilon, axis=1)
        g = -eta_2 * epsilon * scipy.special.logsumexp(la[:, None] + (f[:, None] - c) / epsilon, axis=0)
    pi = np.exp(la[:, None] + lb + (f[:, None] + g - c) / epsilon)
    found = plan(cost, source, target, epsilon, tau)
    np.testing.assert_allclose(found.mass, pi.sum(), rtol=1e-9)
    np.testing.assert_allclose(found.mean, [(pi * x).sum() / pi.sum(), (pi * y).sum() / pi.sum()], rtol=1e-8)
    moment = (pi * x * y).sum() / pi.sum() - found.mean[0] * found.mean[1]
    np.testing.assert_allclose(found.covariance[0, 1], moment, rtol=1e-8)


@pytest.mark.parametrize(
    ("balanced", "twice"),
    [(False, False)] + [pytest.param(balanced, True, marks=pytest.mark.slow) for balanced in (True, False)],
)
def test_plan_is_differentiable_in_everything(balanced, twice):
    """In the covariances, the cost, epsilon and tau, at a point where all eigenvalues coincide."""
    direction = np.array([[0.2, -0.1], [-0.1, 0.4]])

    def numbers(t):
        source = Gaussian(t * np.ones(2), jnp.eye(2) + t * direction)
        target = Gaussian(np.zeros(2), jnp.eye(2), 1.0 if balanced else 1.5 + t)
        cost = QuadraticCost(jnp.eye(2) - t * direction, -(1 + t) * jnp.eye(2), jnp.eye(2), t * np.ones(2), np.zeros(2))
        tau = np.inf if balanced else (0.5 + t, 2.0 - t)
        found = plan(cost, source, target, 0.7 + t, tau)
        return jnp.concatenate([found.value[None], found.mass[None], found.mean, found.covariance.ravel()])

    value, first = jax.jit(numbers), jax.jit(jax.jacfwd(numbers))
    np.testing.assert_allclose(first(0.01), differences(value, 0.01, 1e-3), rtol=1e-8, atol=1e-9)
    if twice:
        second = jax.jit(jax.jacfwd(jax.jacfwd(numbers)))
        np.testing.assert_allclose(second(0.0), differences(first, 0.0, 1e-3), rtol=1e-8, atol=1e-9)
    reverse = jax.jit(jax.grad(lambda t: numbers(t)[0]))
    np.testing.assert_allclose(reverse(0.01), first(0.01)[0], rtol=1e-9)


def test_large_tau_is_the_balanced_plan_at_rate_one():
    source, target = Gaussian(np.zeros(D), S), Gaussian(np.ones(D), T)
    cost = bilinear(np.eye(D))
    exact = plan(cost, source, target, EPSILON)
    gaps = [abs(float(plan(cost, source, target, EPSILON, tau).value - exact.value)) for tau in (1e3, 1e4)]
    assert 9 < gaps[0] / gaps[1] < 11


def test_single_precision_stays_single():
    source, target = Gaussian(np.zeros(D, np.float32), S.astype(np.float32)), Gaussian(np.zeros(D, np.float32), T)
    assert target.mean.dtype == jnp.float64  # the widest that is given
    target = jax.tree.map(lambda a: a.astype(jnp.float32), target)
    found = plan(bilinear(np.eye(D, dtype=np.float32)), source, target, 0.5, 20.0)
    assert found.value.dtype == found.covariance.dtype == jnp.float32
    wide = plan(bilinear(np.eye(D)), Gaussian(np.zeros(D), S), Gaussian(np.zeros(D), T), 0.5, 20.0)
    np.testing.assert_allclose(found.covariance, wide.covariance, rtol=1e-5)
    assert "Plan(value=" in repr(found)
    assert repr(source) == "Gaussian(dimension=2, mass=1)"


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Gaussian([0.0], [[1.0, 0.0], [0.0, 1.0]]), "`covariance` has shape (2, 2), but `mean` has 1"),
        (lambda: Gaussian([0.0, 0.0], np.diag([1.0, -1.0])), "smallest eigenvalue is -1"),
        (lambda: Gaussian([0.0, 0.0], np.diag([1.0, 0.0])), "must be positive definite"),
        (lambda: Gaussian([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]]), "must be symmetric"),
        (lambda: Gaussian([0.0, np.nan], np.eye(2)), "`mean` has 1 entries that are NaN or infinite, the first at (1"),
        (lambda: Gaussian([0.0], [[1.0]], 0.0), "`mass` must be positive and finite, found 0"),
        (lambda: bures_squared(np.eye(2), np.eye(3)), "must have one shape, found (2, 2) and (3, 3)"),
        (lambda: bures_squared(np.eye(2), np.diag([1.0, -0.1])), "bures_squared: `T` must be positive semidefinite"),
        (lambda: bures_map(np.diag([1.0, 0.0]), np.eye(2)), "bures_map: `S` must be positive definite"),
        (lambda: bilinear([1.0, 2.0]), "`A` must have two axes, found shape (2,)"),
        (lambda: QuadraticCost(np.eye(2), np.eye(2), np.eye(3), [0, 0], [0, 0]), "`Cyy` must have shape (2, 2)"),
        (lambda: plan(COST, SOURCE, TARGET, 0.0), "`epsilon` must be positive and finite, found 0"),
        (lambda: plan(COST, SOURCE, TARGET, 1.0, -1.0), "`tau` must be positive and finite, found -1"),
        (lambda: plan(COST, SOURCE, TARGET, 1.0, (1.0, 1.0, 1.0)), "a number or a pair of them, found 3"),
        (lambda: plan(COST, SOURCE, TARGET, 1.0), "must have the same mass where both marginals are kept exactly"),
        (lambda: plan(COST, TARGET, SOURCE, 1.0, 1.0), "`source` has dimension 3, but `cost` has 2"),
        (lambda: plan(bilinear([[5.0]]), Gaussian([0.0], [[1.0]]), Gaussian([0.0], [[1.0]]), 0.5, 0.1), "mass escapes"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_wrong_types_are_named():
    with pytest.raises(TypeError, match="cost"):
        plan(lambda x, y: x, SOURCE, TARGET, 1.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="target"):
        plan(COST, SOURCE, None, 1.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="`epsilon` must be a positive number"):
        plan(COST, SOURCE, TARGET, "small")
    assert transport.gaussian.plan is plan
