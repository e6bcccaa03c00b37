"""Problems and peers of `python -m benchmarks.transport`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize


def clouds(n: int, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array, float]:
    """Two clouds of n points in the plane, uniform weights, and the median of their squared distances."""
    rng = np.random.default_rng(seed)
    X, Y = rng.normal(size=(n, 2)), 0.7 * rng.normal(size=(n, 2)) + [1.0, 0.0]
    distances = np.sum((X[:500, None] - Y[None, :500]) ** 2, axis=-1)
    return jnp.asarray(X), jnp.asarray(Y), jnp.full(n, 1 / n), float(np.median(distances))


class Squares(eqx.Module):
    """X -> |X_i - Y_j|^2: the outer variable is the cloud X."""

    Y: jax.Array

    def __call__(self, X):
        return jnp.sum(X**2, axis=1)[:, None] + jnp.sum(self.Y**2, axis=1)[None, :] - 2 * X @ self.Y.T


class Barycenters(eqx.Module):
    """A function of the coupling: how far the barycentric map is from a rotation of X."""

    Y: jax.Array

    def __call__(self, X, coupling):
        image = coupling @ self.Y * len(X)
        return jnp.mean((image - X[:, ::-1]) ** 2)


def fixed(x):
    """A cost that is x itself: a matrix."""
    return x


def in_turns(calls: dict[str, Callable], repeats: int) -> dict[str, tuple[float, Any]]:
    """The median seconds of calls made in turns (of fewer, where a turn takes long), and their last results. The calls
    have been made before."""
    results: dict[str, Any] = {}
    found: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            results[name] = jax.block_until_ready(call())
            found[name].append(time.perf_counter() - start)
        if time.perf_counter() - begin > 30:
            break
    return {name: (float(np.median(seconds)), results[name]) for name, seconds in found.items()}


def seconds_of(function: Callable, repeats: int) -> tuple[float, Any]:
    """The same of one call, made once before."""
    jax.block_until_ready(function())
    return in_turns({"": function}, repeats)[""]


def ott_coupling(costs, a, epsilon, threshold):
    """The coupling of ott-jax, implicitly differentiable."""
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn

    geom = geometry.Geometry(cost_matrix=costs, epsilon=epsilon, relative_epsilon=None)
    solver = sinkhorn.Sinkhorn(threshold=threshold, max_iterations=50_000, lse_mode=True)
    return solver(linear_problem.LinearProblem(geom, a=a, b=a)).matrix


def sweeps(X, Y, a, epsilon, count: int, unrolled: bool):
    """The coupling after log-domain sweeps; `unrolled`: kept for reverse mode."""
    C, log_a = Squares(Y)(X), jnp.log(a)

    def body(_, g):
        f = -epsilon * jax.nn.logsumexp(log_a + (g - C) / epsilon, axis=1)
        return -epsilon * jax.nn.logsumexp(log_a[:, None] + (f[:, None] - C) / epsilon, axis=0)

    g = jnp.zeros(len(Y))
    if unrolled:
        g, _ = jax.lax.scan(lambda g, _: (body(0, g), None), g, None, length=count)
    else:
        g = jax.lax.fori_loop(0, count, body, g)
    f = -epsilon * jax.nn.logsumexp(log_a + (g - C) / epsilon, axis=1)
    return jnp.exp(log_a[:, None] + log_a + (f[:, None] + g - C) / epsilon)


def cg_adjoint(X, Y, a, epsilon, loss, threshold):
    """The gradient in X of loss(X, coupling): log-domain sweeps until the marginals are off by `threshold`, then the
    adjoint system by conjugate gradients to the same relative residual, with the coupling formed once."""
    C, log_a = Squares(Y)(X), jnp.log(a)

    def body(carry):
        g, _, k = carry
        f = -epsilon * jax.nn.logsumexp(log_a + (g - C) / epsilon, axis=1)
        new = -epsilon * jax.nn.logsumexp(log_a[:, None] + (f[:, None] - C) / epsilon, axis=0)
        return new, jnp.sum(a * jnp.abs(jnp.expm1((g - new) / epsilon))), k + 1

    unfinished = lambda carry: (carry[1] > threshold) & (carry[2] < 50_000)
    g, *_ = jax.lax.while_loop(unfinished, body, (jnp.zeros(len(Y)), jnp.inf, 0))
    f = -epsilon * jax.nn.logsumexp(log_a + (g - C) / epsilon, axis=1)
    pi = jnp.exp(log_a[:, None] + log_a + (f[:, None] + g - C) / epsilon)
    g_x, Z = jax.grad(loss, argnums=(0, 1))(X, pi)
    rows, columns, weighted = pi.sum(1), pi.sum(0), Z * pi
    product = lambda v: (rows * v[0] + pi @ v[1], v[0] @ pi + columns * v[1])
    b = (weighted.sum(1), weighted.sum(0))
    (u, w), _ = jax.scipy.sparse.linalg.cg(product, b, tol=threshold, M=lambda v: (v[0] / rows, v[1] / columns))
    slope = pi * (u[:, None] + w - Z) / epsilon
    return g_x + jax.vjp(Squares(Y), X)[1](slope)[0]


# ------------------------------------------------------------------------------------------------ inverse transport


def inverse_data(n: int, K: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
    """Features of two clouds, counts of 20 n^2 pairs drawn from the coupling of random coefficients, and epsilon."""
    rng = np.random.default_rng(seed)
    side = int(round(np.sqrt(K)))
    P, Q = rng.normal(size=(n, side)), rng.normal(size=(n, side))
    features = -np.einsum("ip,jq->pqij", P, Q).reshape(K, n, n)
    theta = 0.5 * rng.normal(size=K) / np.sqrt(side)
    pi = np.exp(-np.tensordot(theta, features, 1))
    for _ in range(200):
        pi *= (1 / n) / pi.sum(axis=1, keepdims=True)
        pi *= (1 / n) / pi.sum(axis=0, keepdims=True)
    counts = rng.multinomial(20 * n * n, pi.ravel() / pi.sum()).reshape(n, n)
    return features, counts.astype(float), 1.0


def joint_lbfgs(features: np.ndarray, counts: np.ndarray, epsilon: float, tol: float) -> Callable:
    """L-BFGS on (theta, f, g) of the joint convex objective, down to a gradient of tol (of a coupling of mass one)."""
    K, n, m = features.shape
    F, observed = jnp.asarray(features), jnp.asarray(counts / counts.sum())
    a, b = observed.sum(1), observed.sum(0)

    def objective(z):
        theta, f, g = z[:K], z[K : K + n], z[K + n :]
        C = jnp.tensordot(theta, F, 1)
        pi = a[:, None] * b * jnp.exp((f[:, None] + g - C) / epsilon)
        return jnp.vdot(C, observed) + epsilon * jnp.sum(pi) - f @ a - g @ b

    both = jax.jit(jax.value_and_grad(objective))

    def call():
        options = {"maxiter": 20_000, "maxfun": 40_000, "gtol": tol, "ftol": 0.0, "maxcor": 20}
        function = lambda z: tuple(np.asarray(v, float) for v in both(jnp.asarray(z)))
        out = scipy.optimize.minimize(function, np.zeros(K + n + m), jac=True, method="L-BFGS-B", options=options)
        return out.x[:K], float(np.max(np.abs(out.jac))), out.nit

    return call


def poisson_table(features: np.ndarray, counts: np.ndarray, epsilon: float):
    """One row for each pair: the count, the scaled features, and its row and column."""
    import pandas as pd

    K, n, m = features.shape
    table = pd.DataFrame(-features.reshape(K, -1).T / epsilon, columns=[f"x{k}" for k in range(K)])
    table["count"] = counts.ravel()
    table["row"], table["column"] = np.repeat(np.arange(n), m), np.tile(np.arange(m), n)
    return table
