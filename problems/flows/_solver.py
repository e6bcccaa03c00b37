"""Who finds the potential of a step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.sparse.linalg import gmres

from bilevel.errors import Status
from bilevel.linear import AbstractLinearSolver, LinearSolution
from bilevel.solvers._base import AbstractSolver, Found

from ._kernel import Kernel

FACTOR = 3.0  # from one kappa to the next smaller one
DENSE = 2500  # largest number of support points for a dense matrix
STEPS = 400


class Identity(AbstractLinearSolver):
    """For residuals y - (a function of x): dF/dy is the identity."""

    def prepare(self, system):
        return None

    def solve(self, state, system, b, *, transpose=False, rtol=None, guess=None, forcing=None):
        return LinearSolution(b, jnp.zeros_like(b), Status(), jnp.ones((), b.dtype), jnp.asarray(0))


class StepSolver(AbstractSolver):
    """The potential f, or the log-density u, of a `Kernel` without interaction.

    kappa = epsilon: closed form. Otherwise Newton's steps in the log-density of the new weights, in which nothing is
    stiff, from the closed form on; a small kappa is reached through a sequence of larger ones, a few steps each.
    """

    def find(self, inner, x, y0, *, tol, max_steps):
        kernel, w = inner.kernel, inner.work(x)
        if inner.closed:
            one = jnp.asarray(1)
            return Found(y0 - kernel.residual(w, y0), one, one)
        u, count = descend(kernel, w, tol)
        return Found(u, count, count)


def descend(kernel: Kernel, w: jax.Array, tol: jax.Array) -> tuple[jax.Array, jax.Array]:
    """u, its residual below tol where round-off allows, and the steps it took.

    Newton in u, the log-density, for k = kappa / epsilon, one after another. The equation is
    k u = log sum_i a_i exp((f_i(u) - c_ij - w_j) / epsilon), its Jacobian k I + (1 - k) Q R with the conditional laws
    R of target given source and Q of source given target.
    """
    dtype = w.dtype
    cost, m = kernel.cost, len(w)
    last = 1 / kernel.ratio
    end = 1e-6 if jnp.finfo(dtype).bits >= 64 else 1e-3  # of |k u - …| in each stage but the last
    least = jnp.minimum(tol, end)
    floor = 10 * jnp.finfo(dtype).eps

    def laws(u, k):
        right = kernel.log_b - w / kernel.epsilon + (1 - k) * u
        logits = right[None, :] - cost
        rows = jax.nn.logsumexp(logits, axis=1)
        forward = jnp.exp(logits - rows[:, None])
        back = (kernel.log_a - rows)[:, None] - cost
        columns = jax.nn.logsumexp(back, axis=0)
        return k * u - (columns - w / kernel.epsilon), rows, forward, jnp.exp(back - columns[None, :])

    def size_at(u, k):
        size = jnp.linalg.norm(laws(u, k)[0])
        return jnp.where(jnp.isfinite(size), size, jnp.inf)

    def newton(residual, k, forward, back):
        if m <= DENSE:
            return jnp.linalg.solve(k * jnp.eye(m, dtype=dtype) + (1 - k) * (back.T @ forward), residual)
        return gmres(lambda v: k * v + (1 - k) * (back.T @ (forward @ v)), residual, tol=1e-4, atol=0.0)[0]

    def unfinished(carry):
        _, _, done, count = carry
        return ~done & (count < STEPS)

    def body(carry):
        u, k, _, count = carry
        residual, _, forward, back = laws(u, k)
        size = jnp.linalg.norm(residual)
        move = newton(residual, k, forward, back)
        move = jnp.where(jnp.isfinite(move), move, 0)
        halve = lambda t: (t[0] / 2, size_at(u - t[0] / 2 * move, k))
        long = lambda t: ~(t[1] < (1 - 1e-4 * t[0]) * size) & (t[0] > 1e-4)
        t, new = lax.while_loop(long, halve, (jnp.ones((), dtype), size_at(u - move, k)))
        better = new < size
        u = jnp.where(better, u - t * move, u)
        here = k == last
        goal = jnp.where(here, jnp.maximum(least, floor * jnp.linalg.norm(k * u)), end)
        reached = (jnp.minimum(new, size) <= goal) | ~better
        step_down = jnp.where(last < k, jnp.maximum(k / FACTOR, last), last)
        return u, jnp.where(reached, step_down, k), reached & here, count + 1

    one = jnp.ones((), dtype)
    explicit = -laws(jnp.zeros_like(w), one)[0]
    start = jnp.where(last < 1, jnp.maximum(one / FACTOR, last), last)
    u, _, _, count = lax.while_loop(unfinished, body, (explicit, start, jnp.asarray(False), jnp.asarray(0)))
    return u, count
