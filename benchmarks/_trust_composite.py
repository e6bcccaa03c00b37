"""Hard cases: inner problems with a proximal term."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

import bilevel
from bilevel import prox

from ._trust_case import Case, case, proximal_peers


class _Squares(eqx.Module):
    A: Any
    b: Any

    def __call__(self, x, y):
        return 0.5 * jnp.mean((self.A @ y - self.b) ** 2)


def _regression(n: int, p: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    truth = np.zeros(p)
    truth[:6] = 2 * rng.normal(size=6)
    A, B = rng.normal(size=(n, p)), rng.normal(size=(n, p))
    return A, A @ truth + 0.1 * rng.normal(size=n), B, B @ truth


def _fista(A, b, proximal, steps: int) -> np.ndarray:
    """argmin |A y - b|^2 / (2 n) + r by accelerated forward-backward steps with restarts, NumPy alone."""
    n = b.size
    t = n / np.linalg.norm(A, 2) ** 2
    y = z = np.zeros(A.shape[1])
    k = 1.0
    for _ in range(steps):
        new = proximal(z - t * A.T @ (A @ z - b) / n, t)
        ahead = (1 + np.sqrt(1 + 4 * k * k)) / 2
        if np.vdot(z - new, new - y) > 0:
            z, k = new, 1.0
        else:
            z, k = new + (k - 1) / ahead * (new - y), ahead
        y = new
    return y


def _differences(h: Callable, x: np.ndarray, size: float = 2e-4) -> np.ndarray:
    """The gradient of h by central differences, extrapolated twice."""

    def along(e):
        once = lambda s: (h(x + s * e) - h(x - s * e)) / (2 * s)
        return (4 * once(size / 2) - once(size)) / 3

    return np.stack([along(e) for e in np.eye(x.size)]) if x.ndim else np.asarray(along(1.0))


def _composite(A, b, B, c, proximal, x, in_numpy, steps: int = 4000, loose: bool = False) -> Case:
    smooth, outer = _Squares(jnp.asarray(A), jnp.asarray(b)), _Squares(jnp.asarray(B), jnp.asarray(c))
    problem = bilevel.BilevelProblem(bilevel.Composite(smooth, proximal), outer)
    y0 = jnp.zeros(A.shape[1])
    solved = lambda x: _fista(A, b, in_numpy(x), steps)
    truth = _differences(lambda x: 0.5 * np.mean((B @ solved(x) - c) ** 2), np.asarray(x))
    if loose:

        def ours():
            near = jnp.full(A.shape[1], 1e-3)  # every entry is on: nothing is identified
            found = bilevel.estimate(problem, x, near)
            if not found.converged:
                raise bilevel.NotConverged(found.status.meaning, found)
            return found.gradient

        return Case(truth, ours, ("estimate_untrusted", "correction_rejected"))
    ours = lambda: bilevel.hypergradient(problem, x, y0).gradient
    return Case(truth, ours, peers=proximal_peers(smooth, proximal, outer, x, y0))


def _soft(v, t):
    return np.sign(v) * np.maximum(np.abs(v) - t, 0)


@case("lasso, n = 100, p = 1000")
def _lasso(n=100, p=1000, loose=False):
    A, b, B, c = _regression(n, p)
    x = jnp.asarray(np.log(0.1 * np.max(np.abs(A.T @ b)) / n))
    return _composite(A, b, B, c, prox.l1(jnp.exp), x, lambda x: lambda v, t: _soft(v, t * np.exp(x)), loose=loose)


@case("lasso before its support is identified")
def _lasso_loose():
    return _lasso(40, 60, loose=True)


@case("elastic net")
def _elastic_net():
    A, b, B, c = _regression(40, 60)
    x = jnp.asarray([np.log(0.1 * np.max(np.abs(A.T @ b)) / 40), -3.0])
    proximal = prox.elastic_net(lambda x: jnp.exp(x[0]), lambda x: jnp.exp(x[1]))
    in_numpy = lambda x: lambda v, t: _soft(v, t * np.exp(x[0])) / (1 + t * np.exp(x[1]))
    return _composite(A, b, B, c, proximal, x, in_numpy)


@case("group lasso")
def _group_lasso():
    A, b, B, c = _regression(40, 60)
    groups = np.repeat(np.arange(20), 3)
    x = jnp.asarray(np.log(0.1 * np.max(np.abs(A.T @ b)) / 40))

    def in_numpy(x):
        def apply(v, t):
            size = np.sqrt(np.bincount(groups, v**2))[groups]
            return v * np.maximum(1 - t * np.exp(x) / np.maximum(size, 1e-300), 0)

        return apply

    return _composite(A, b, B, c, prox.group_lasso(jnp.exp, groups), x, in_numpy)


class _Scaled(eqx.Module):
    A: Any
    b: Any

    def __call__(self, x, y):
        return 0.5 * jnp.mean((self.A @ y - x * self.b) ** 2)


@case("least squares on the simplex")
def _simplex():
    rng = np.random.default_rng(2)
    A, b, target = rng.normal(size=(30, 8)), rng.normal(size=30), rng.normal(size=8)
    x, y0 = jnp.asarray(1.3), jnp.full(8, 1 / 8)

    def project(v, t):
        u = np.sort(v)[::-1]
        excess = (np.cumsum(u) - 1) / np.arange(1, v.size + 1)
        return np.maximum(v - excess[np.nonzero(u > excess)[0][-1]], 0)

    truth = _differences(lambda x: 0.5 * np.sum((_fista(A, x * b, project, 4000) - target) ** 2), np.asarray(x))
    smooth, outer = _Scaled(jnp.asarray(A), jnp.asarray(b)), lambda x, y: 0.5 * jnp.sum((y - target) ** 2)
    problem = bilevel.BilevelProblem(bilevel.Composite(smooth, prox.simplex()), outer)
    ours = lambda: bilevel.hypergradient(problem, x, y0).gradient
    return Case(truth, ours, peers=proximal_peers(smooth, prox.simplex(), outer, x, y0))
