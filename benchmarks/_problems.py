"""The logistic problems that several benchmarks share, and their reference hypergradients."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import bilevel


class LogisticLoss(eqx.Module):
    """Mean logistic loss of weights y, plus exp(x_j) y_j^2 / (2 d) summed when `penalized`."""

    features: Float[Array, "n d"]
    labels: Float[Array, " n"]
    penalized: bool = eqx.field(static=True)

    def __call__(self, x, y):
        loss = jnp.mean(jax.nn.softplus(-self.labels * (self.features @ y)))
        if self.penalized:
            loss = loss + 0.5 / y.size * jnp.sum(jnp.exp(x) * y**2)
        return loss


SIZES = {
    "ill-conditioned (20000, 500)": (20000, 500, "decaying", -6.0),
    "ill-conditioned (2000, 1000)": (2000, 1000, "decaying", -6.0),
    "well-conditioned (4000, 3000)": (4000, 3000, "flat", -1.0),
}
"""Name: samples n, features d, scaling of the features (N(0,1) 3/sqrt(j), or N(0,1)/sqrt(d)), log-penalty x."""


def logistic_problem(n: int, d: int, scaling: str, log_penalty: float, seed: int = 0):
    """`(problem, x, y0)`: per-feature penalties, labels from a noisy linear truth, a validation set of n / 4."""
    random = np.random.RandomState(seed)
    scale = 3 / np.sqrt(np.arange(1, d + 1)) if scaling == "decaying" else np.full(d, 1 / np.sqrt(d))
    truth = random.randn(d) / np.sqrt(np.arange(1, d + 1) if scaling == "decaying" else 1)

    def draw(count):
        features = random.randn(count, d) * scale
        labels = np.where(features @ truth + random.logistic(size=count) > 0, 1.0, -1.0)
        return jnp.asarray(features), jnp.asarray(labels)

    problem = bilevel.BilevelProblem(
        bilevel.Minimization(LogisticLoss(*draw(n), True)), LogisticLoss(*draw(n // 4), False)
    )
    return problem, jnp.full(d, log_penalty), jnp.zeros(d)


def reference(problem, x, y0, steps: int = 40):
    """`(y*, hypergradient)` by dense Newton with step halving in float64, independent of the engine."""
    objective = problem.inner.objective

    @jax.jit
    def newton(y):
        gradient = jax.grad(objective, 1)(x, y)
        hessian = jax.jacfwd(jax.grad(objective, 1), 1)(x, y)
        step = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(hessian), gradient)
        return y, step, gradient, hessian

    value = jax.jit(lambda x, y: objective(x, y))
    y, hessian = y0, None
    for _ in range(steps):
        _, step, _, hessian = newton(y)
        t = 1.0
        while float(value(x, y - t * step)) > float(value(x, y)) + 1e-14 and t > 1e-6:
            t /= 2
        y = y - t * step
        if float(jnp.linalg.norm(step)) <= 1e-14 * float(jnp.linalg.norm(y)):
            break
    _, _, _, hessian = newton(y)
    g_x, g_y = jax.grad(problem.outer, (0, 1))(x, y)
    v = jnp.linalg.solve(hessian, g_y)
    pull = jax.vjp(lambda x: jax.grad(objective, 1)(x, y), x)[1]
    return y, g_x - pull(v)[0]
