"""Problems the tests share, and the reference: dense Newton and a dense adjoint in float64, by autodiff alone.

Nothing here uses the engine: what it computes is what the engine is judged by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import bilevel

KINDS = ("ridge", "logistic", "poisson", "huber")


LOSSES = (
    lambda z, b: 0.5 * (z - b) ** 2,
    lambda z, b: jax.nn.softplus(-b * z),  # labels +-1
    lambda z, b: jnp.exp(z) - b * z,
    lambda z, b: jnp.sqrt(1 + (z - b) ** 2) - 1,
)


def loss(kind, z, b):
    """The losses of predictions; the family is data, so that all families of one shape share a compilation."""
    return jax.lax.switch(kind, LOSSES, z, b)


class GLMInner(eqx.Module):
    """mean loss + sum exp(x_j) y_j^2 / (2 d); the data are leaves."""

    X: Any
    b: Any
    kind: Any

    def __call__(self, x, y):
        penalty = jnp.sum(jnp.exp(x) * y**2) / (2 * y.shape[0])
        return jnp.mean(loss(self.kind, self.X @ y, self.b)) + penalty


class GLMOuter(eqx.Module):
    """mean loss on other data, without a penalty."""

    X: Any
    b: Any
    kind: Any

    def __call__(self, x, y):
        return jnp.mean(loss(self.kind, self.X @ y, self.b))


class Case(NamedTuple):
    problem: Any
    x: Any
    y0: Any


def glm(kind: str, seed: int, n: int = 60, d: int = 5, cond: float = 10.0, dtype: Any = np.float64) -> Case:
    """A random generalized linear model whose Hessian has a condition number of about `cond`."""
    rng = np.random.default_rng(seed)
    scales = cond ** (-0.5 * np.linspace(0, 1, d)) if d > 1 else np.ones(1)
    draw = lambda m: rng.normal(size=(m, d)) * scales
    X, X_val = draw(n), draw(n)
    truth = rng.normal(size=d) / np.sqrt(np.sum(scales**2))

    def labels(X):
        z = X @ truth
        if kind == "logistic":
            return np.where(rng.uniform(size=n) < 1 / (1 + np.exp(-2 * z)), 1.0, -1.0)
        if kind == "poisson":
            return rng.poisson(np.exp(z)).astype(float)
        return z + 0.3 * rng.normal(size=n)

    b, b_val = labels(X), labels(X_val)
    x = np.log(d / cond) + rng.uniform(-1, 1, size=d)
    as_leaf = lambda a: jnp.asarray(a, dtype)
    family = jnp.asarray(KINDS.index(kind))
    inner = bilevel.Minimization(GLMInner(as_leaf(X), as_leaf(b), family))
    problem = bilevel.BilevelProblem(inner, GLMOuter(as_leaf(X_val), as_leaf(b_val), family))
    return Case(problem, as_leaf(x), jnp.zeros(d, dtype))


class SmoothInner(eqx.Module):
    """Strongly convex, not quadratic, x in it linearly and not."""

    A: Any
    B: Any
    quadratic: bool = eqx.field(static=True, default=False)

    def __call__(self, x, y):
        z = self.A @ y
        bend = 0.0 if self.quadratic else jnp.sum(jnp.log(jnp.cosh(z - 0.3))) + 0.1 * jnp.sum(y**4)
        ridge = 0.5 * jnp.sum(jnp.exp(self.B.T @ x) * y**2) + 0.5 * jnp.sum(z**2)
        return bend + ridge - jnp.dot(jnp.sin(x), self.B @ y) - jnp.sum(y)


class SmoothOuter(eqx.Module):
    """Quadratic in y, coupled to x, not affine."""

    C: Any
    B: Any

    def __call__(self, x, y):
        r = self.C @ y - 1.0
        return 0.5 * jnp.dot(r, r) + jnp.dot(x, self.B @ y) ** 2 / 2 + 0.5 * jnp.dot(x, x)


def smooth(seed: int = 0, n: int = 6, m: int = 4, quadratic: bool = False, dtype: Any = np.float64) -> Case:
    """A small generic problem: every term of the error theorem is there, and none is special."""
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(n + 2, n)) / np.sqrt(n)
    B = rng.normal(size=(m, n)) / np.sqrt(n)
    C = rng.normal(size=(n, n)) / np.sqrt(n)
    A, B, C = (jnp.asarray(a, dtype) for a in (A, B, C))
    problem = bilevel.BilevelProblem(bilevel.Minimization(SmoothInner(A, B, quadratic)), SmoothOuter(C, B))
    return Case(problem, jnp.asarray(rng.uniform(-0.5, 0.5, size=m), dtype), jnp.zeros(n, dtype))


class Poly(eqx.Module):
    """y'Ay / 2 + q sum y^4 / 4 + tail exp(-sum y) - x'y: by its data convex, singular, a saddle, without a minimum."""

    A: Any
    q: Any
    tail: Any

    def __call__(self, x, y):
        y_sum = jnp.sum(y)
        bowl = 0.5 * jnp.dot(y, self.A @ y) + 0.25 * self.q * jnp.sum(y**4)
        return bowl + self.tail * jnp.exp(-y_sum) - jnp.dot(x, y)


class Affine(eqx.Module):
    c: Any

    def __call__(self, x, y):
        return jnp.dot(self.c, y) + 0.5 * jnp.sum(y**2) * self.c[0] + jnp.sum(x**2)


def poly(A, q=0.0, tail=0.0, c=(1.0, 2.0, -1.0)) -> Any:
    """A bilevel problem over a `Poly` in three variables."""
    inner = bilevel.Minimization(Poly(jnp.asarray(A, float), jnp.asarray(q, float), jnp.asarray(tail, float)))
    return bilevel.BilevelProblem(inner, Affine(jnp.asarray(c, float)))


# ------------------------------------------------------------------------------------------------ the reference


class Reference(NamedTuple):
    """y*, h, grad h, the dense F_y, the adjoint v, and the floor of round-off of theory section 4."""

    y: Any
    value: Any
    gradient: Any
    hessian: Any
    floor: Any


@eqx.filter_jit
def omega(problem, x, y):
    """Plain implicit differentiation at this very y, densely, for a flat y; any kind of inner problem."""
    F = lambda x, y: problem.inner.optimality(x, y)
    g_x, g_y = jax.grad(problem.outer, argnums=(0, 1))(x, y)
    v = jnp.linalg.solve(jax.jacfwd(F, argnums=1)(x, y).T, g_y)
    pulled = jax.vjp(lambda x: F(x, y), x)[1](v)[0]
    return jax.tree.map(lambda a, b: a - b, g_x, pulled)


@eqx.filter_jit
def _newton(inner, x, y):
    """Damped Newton until the residual falls no more, then one more step."""
    F = lambda y: inner.optimality(x, y)

    def body(carry):
        y, _, count = carry
        f = F(y)
        step = jnp.linalg.solve(jax.jacfwd(F)(y), f)
        trials = y - 0.5 ** jnp.arange(12.0)[:, None] * step
        sizes = jnp.linalg.norm(jax.vmap(F)(trials), axis=1)
        best = jnp.nanargmin(sizes)
        better = sizes[best] < jnp.linalg.norm(f)
        return jnp.where(better, trials[best], y), better, count + 1

    y, *_ = jax.lax.while_loop(lambda c: c[1] & (c[2] < 60), body, (y, jnp.asarray(True), jnp.asarray(0)))
    return y - jnp.linalg.solve(jax.jacfwd(F)(y), F(y))


def reference(problem, x, y0) -> Reference:
    """The truth for flat x and y in float64."""
    double = lambda tree: jax.tree.map(
        lambda a: a.astype(jnp.float64) if eqx.is_inexact_array(a) else a, tree, is_leaf=eqx.is_array
    )
    problem, x, y0 = double(problem), double(x), double(y0)
    y = _newton(problem.inner, x, y0)
    hessian = _hessian(problem.inner, x, y)
    gradient = omega(problem, x, y)
    g_x = jax.grad(problem.outer)(x, y)
    scale = jnp.linalg.norm(g_x) + jnp.linalg.norm(gradient - g_x)
    floor = np.finfo(np.float64).eps * np.linalg.cond(np.asarray(hessian)) * float(scale)
    return Reference(y, problem.outer(x, y), gradient, hessian, floor)


@eqx.filter_jit
def _hessian(inner, x, y):
    return jax.jacfwd(lambda y: inner.optimality(x, y))(y)


def omega_y(problem, x, y):
    """The derivative of plain implicit differentiation in y, shape (m, n), by autodiff."""
    return _omega_y(problem, x, y)


@eqx.filter_jit
def _omega_y(problem, x, y):
    return jax.jacfwd(lambda y: omega(problem, x, y))(y)


def directions(n: int, count: int, seed: int = 0) -> jax.Array:
    """Random unit vectors, shape (count, n)."""
    d = np.random.default_rng(seed).normal(size=(count, n))
    return jnp.asarray(d / np.linalg.norm(d, axis=1, keepdims=True))


def slopes(errors, distances) -> np.ndarray:
    """The fitted slope of log error against log distance, per row of `errors` (directions, distances)."""
    t = np.log(np.asarray(distances))
    return np.asarray([np.polyfit(t, row, 1)[0] for row in np.log(np.asarray(errors))])


def relative(a, b) -> float:
    """|a - b| / |b| over all leaves, in float64."""
    flat = lambda tree: np.asarray(ravel_pytree(jax.tree.map(lambda v: np.asarray(v, np.float64), tree))[0])
    a, b = flat(a), flat(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def distance(a, b) -> float:
    """|a - b| over all leaves, in float64."""
    flat = lambda tree: np.asarray(ravel_pytree(jax.tree.map(lambda v: np.asarray(v, np.float64), tree))[0])
    return float(np.linalg.norm(flat(a) - flat(b)))


def counted(function: Callable) -> tuple[Callable, list]:
    """The function, and a list that grows by one each time it is traced (or called)."""
    calls: list = []

    def wrapped(*args):
        calls.append(None)
        return function(*args)

    return wrapped, calls


def rotations(count: int, seed: int = 0) -> np.ndarray:
    """Random orthogonal matrices, shape (count, 3, 3)."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(count, 3, 3)))[0]


def rotated(*eigenvalues: float, seed: int = 0) -> np.ndarray:
    """A symmetric matrix with these three eigenvalues."""
    Q = rotations(1, seed)[0]
    return Q @ np.diag(eigenvalues) @ Q.T
