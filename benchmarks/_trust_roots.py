"""Hard cases: roots and fixed points."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

import bilevel

from ._trust_case import Case, case, fixed_points, root_finders


@case("cube root of 8")
def _cube_root():
    residual, g = lambda x, y: y**3 - x, lambda x, y: y
    x, y0 = jnp.asarray(8.0), jnp.asarray(1.0)
    ours = lambda: bilevel.hypergradient(bilevel.BilevelProblem(bilevel.Root(residual), g), x, y0).gradient
    return Case(1 / 12, ours, peers=root_finders(residual, g, x, y0))


@case("non-symmetric root, 50 unknowns")
def _non_symmetric():
    rng = np.random.default_rng(3)
    A, c = np.eye(50) + rng.normal(size=(50, 50)) / 12, rng.normal(size=50)
    B = rng.normal(size=(50, 3))
    x, y0 = jnp.asarray([0.3, -0.2, 0.7]), jnp.zeros(50)
    truth = B.T @ np.linalg.solve(A.T, c)
    residual, g = lambda x, y: A @ y - B @ x, lambda x, y: jnp.vdot(jnp.asarray(c), y)
    ours = lambda: bilevel.hypergradient(bilevel.BilevelProblem(bilevel.Root(residual), g), x, y0).gradient
    return Case(truth, ours, peers=root_finders(residual, g, x, y0))


@case("fixed point, spectral radius 0.99")
def _slow():
    rng = np.random.default_rng(4)
    Q = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    A = Q @ np.diag(np.linspace(-0.5, 0.99, 20)) @ Q.T
    x, y0 = jnp.asarray(rng.normal(size=20)), jnp.zeros(20)
    inverse = np.linalg.inv(np.eye(20) - A)
    truth = inverse.T @ (inverse @ np.asarray(x) - 1)
    step, g = lambda x, y: A @ y + x, lambda x, y: 0.5 * jnp.sum((y - 1) ** 2)
    ours = lambda: bilevel.hypergradient(bilevel.BilevelProblem(bilevel.FixedPoint(step), g), x, y0).gradient
    return Case(truth, ours, peers=fixed_points(step, g, x, y0))


@case("deep equilibrium, 200 units")
def _equilibrium():
    rng = np.random.default_rng(5)
    W, U = 0.9 * rng.normal(size=(200, 200)) / np.sqrt(200), rng.normal(size=(200, 4))
    x, y0 = jnp.asarray([0.2, -0.4, 0.1, 0.5]), jnp.zeros(200)
    y = np.zeros(200)
    for _ in range(4000):
        y = np.tanh(W @ y + U @ np.asarray(x))
    slope = 1 - y**2
    truth = (slope[:, None] * U).T @ np.linalg.solve(np.eye(200) - (slope[:, None] * W).T, y - 0.1)
    step, g = lambda x, y: jnp.tanh(W @ y + U @ x), lambda x, y: 0.5 * jnp.sum((y - 0.1) ** 2)
    ours = lambda: bilevel.hypergradient(bilevel.BilevelProblem(bilevel.FixedPoint(step), g), x, y0).gradient
    return Case(truth, ours, peers=fixed_points(step, g, x, y0))
