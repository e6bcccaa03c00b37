"""The estimator study (after Ye, Peyré, Cremers, Ablin 2024): hypergradient error against inner error."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import bilevel

ESTIMATORS = {
    "plain": bilevel.ImplicitAdjoint(correction=None),
    "Jacobi": bilevel.ImplicitAdjoint(correction=bilevel.Jacobi(damping=1.0), guard=False),
    "Newton": bilevel.ImplicitAdjoint(guard=False),
    "Exp": bilevel.ImplicitAdjoint(correction=None, reparametrization=bilevel.Exp()),
    "JacobiScaling": bilevel.ImplicitAdjoint(correction=None, reparametrization=bilevel.JacobiScaling()),
    "GradientCoordinates": bilevel.ImplicitAdjoint(correction=None, reparametrization=bilevel.GradientCoordinates()),
}
DISTANCES = np.logspace(1.5, -3.5, 26)


class Ridge(eqx.Module):
    """|A y - b|^2 / (2 N) + sum exp(x_j) y_j^2 / (2 n)."""

    A: jax.Array
    b: jax.Array

    def __call__(self, x, y):
        return jnp.mean((self.A @ y - self.b) ** 2) / 2 + jnp.sum(jnp.exp(x) * y**2) / (2 * y.size)


class Logistic(eqx.Module):
    """Mean logistic loss, with the same penalty where `penalized`."""

    A: jax.Array
    b: jax.Array
    penalized: bool = eqx.field(static=True)

    def __call__(self, x, y):
        loss = jnp.mean(jax.nn.softplus(-self.b * (self.A @ y)))
        return loss + jnp.sum(jnp.exp(x) * y**2) / (2 * y.size) if self.penalized else loss


class Linear(eqx.Module):
    """b'y + |x|^2: affine in y."""

    b: jax.Array

    def __call__(self, x, y):
        return jnp.vdot(self.b, y) + jnp.sum(x**2)


class Quadratic(eqx.Module):
    """|A y - b|^2 / 2."""

    A: jax.Array
    b: jax.Array

    def __call__(self, x, y):
        return jnp.sum((self.A @ y - self.b) ** 2) / 2


def scaled(features):
    """Each column to [-1, 1]."""
    low, high = features.min(axis=0), features.max(axis=0)
    return 2 * (features - low) / (high - low) - 1


def case(name: str, seed: int):
    """`(problem, x)` of one of the figures, its random parts drawn from the seed."""
    from mlxtend.data import autompg_data
    from sklearn.datasets import load_breast_cancer

    random = np.random.RandomState(seed)
    if name.startswith("ridge"):
        features, target = autompg_data()
        A = jnp.asarray(scaled(np.asarray(features[:, :7], float)))
        n = A.shape[1]
        inner = Ridge(A, jnp.asarray(np.asarray(target, float)))
        b_outer = jnp.asarray(random.randn(n))
        outer = Linear(b_outer) if "linear" in name else Quadratic(jnp.asarray(random.randn(n, n)), b_outer)
        return bilevel.BilevelProblem(inner, outer), jnp.asarray(random.uniform(3, 6, n))
    data: Any = load_breast_cancer()
    order = random.permutation(len(data.target))
    A = jnp.asarray(scaled(data.data)[order])
    b = jnp.asarray(np.where(data.target == 1, 1.0, -1.0)[order])
    half = len(b) // 2
    problem = bilevel.BilevelProblem(Logistic(A[:half], b[:half], True), Logistic(A[half:], b[half:], False))
    return problem, jnp.asarray(random.uniform(-1, 1, A.shape[1]))


CASES = ("ridge, linear outer", "ridge, quadratic outer", "logistic, logistic outer")


@eqx.filter_jit
def _descend(problem, x, y, step, wanted, solution):
    """Gradient descent until |y - y*| falls below `wanted`."""

    def unfinished(carry):
        y, count = carry
        return (jnp.linalg.norm(y - solution) > wanted) & (count < 50_000)

    def body(carry):
        y, count = carry
        return y - step * problem.inner.optimality(x, y), count + 1

    return jax.lax.while_loop(unfinished, body, (y, 0))[0]


def errors(name: str, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """`(distances, {estimator: errors})` along gradient-descent iterates from a distant start."""
    problem, x = case(name, seed)
    random = np.random.RandomState(1000 + seed)
    y0 = jnp.zeros_like(x)
    solution = bilevel.solve(problem.inner, x, y0, rtol=1e-13).y
    truth = bilevel.hypergradient(problem, x, solution, rtol=1e-10, throw=False).gradient
    loss: Any = getattr(problem.inner, "objective")  # noqa: B009
    hessian = jax.hessian(loss, argnums=1)(x, solution)
    # ridge: 1.8 / L. Logistic: the bound L <= lambda_max(A'A) / (4 N) + largest penalty, so that every step descends
    curvature = float(jnp.linalg.eigvalsh(hessian)[-1])
    if "logistic" in name:
        top = float(jnp.linalg.norm(loss.A, 2)) ** 2 / (4 * loss.A.shape[0])
        curvature = top + float(jnp.exp(x).max()) / x.size
    start = 2 * random.randn(x.size)
    y = jnp.asarray(start + 10**1.5 * (start - np.asarray(solution)) / np.linalg.norm(start - np.asarray(solution)))
    points = []
    for wanted in DISTANCES:
        y = _descend(problem, x, y, jnp.asarray(1.8 / curvature), jnp.asarray(wanted), solution)
        points.append(y)
    points = jnp.stack(points)
    distances = np.linalg.norm(points - solution, axis=1)
    found = {
        key: np.linalg.norm(_estimates(problem, x, points, rule) - truth, axis=1) for key, rule in ESTIMATORS.items()
    }
    return distances, found


@eqx.filter_jit
def _estimates(problem, x, points, rule):
    return jax.lax.map(lambda y: bilevel.estimate(problem, x, y, rule).gradient, points)


def slope(distances: np.ndarray, values: np.ndarray, floor: float) -> float:
    """The slope of log error against log distance over the last decade and a half above round-off."""
    keep = (distances <= 10**-1.5) & (values > floor) & np.isfinite(values)
    if keep.sum() < 3:
        return float("nan")
    return float(np.polyfit(np.log(distances[keep]), np.log(values[keep]), 1)[0])
