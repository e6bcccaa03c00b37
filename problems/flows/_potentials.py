"""The potentials of one step with the first marginal exact: Newton's steps with conjugate gradients.

With B = diag(a)^-1/2 p diag(columns)^-1/2 for the coupling p, every linear system here has the matrix
S = I - (1 - ratio) B B', symmetric, with eigenvalues in [ratio, 1] (docs/theory/flows.md, "The reduced step").
"""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._kernel import Kernel

STEPS = 60


class Law(NamedTuple):
    """The step at one f: `residual` F, B of shape (n, m), the roots of a and of the column sums."""

    residual: Float[Array, " n"]
    B: Float[Array, "n m"]
    root_a: Float[Array, " n"]
    root_p: Float[Array, " m"]


def law(kernel: Kernel, w: Float[Array, " m"], f: Float[Array, " n"]) -> Law:
    """Residual and B at f."""
    cost = kernel.cost
    columns = kernel.columns(f, cost)
    right = kernel.log_b + kernel.tilt(w, columns)
    logits = right[None, :] - cost
    rows = jax.nn.logsumexp(logits, axis=1)
    forward = jnp.exp(logits - rows[:, None])  # the law of the target given the source, whatever f is
    root_a = jnp.exp(kernel.log_a / 2)
    sums = (root_a**2) @ forward
    root_p = jnp.sqrt(sums)
    B = root_a[:, None] * forward * jnp.where(sums > 0, 1 / jnp.where(sums > 0, root_p, 1), 0)[None, :]
    return Law(f + kernel.epsilon * rows, B, root_a, root_p)


def solve_scaled(B, ratio, rhs, rtol, root_a=None, max_steps: int = 400):
    """S z = rhs for each column of rhs, shape (n, k), by conjugate gradients; without its part along `root_a`, where
    that is given (the balanced problem, which is singular along it)."""

    def off(v):
        return v if root_a is None else v - root_a[:, None] * (root_a @ v)[None, :]

    def apply(v):
        return off(v - (1 - ratio) * (B @ (B.T @ v)))

    rhs = off(rhs)
    size = jnp.sum(rhs * rhs, 0)
    goal = rtol**2 * size

    def unfinished(carry):
        _, _, _, squares, count = carry
        return jnp.any(squares > goal) & (count < max_steps)

    def body(carry):
        z, r, p, squares, count = carry
        going = squares > goal
        Ap = apply(p)
        curvature = jnp.sum(p * Ap, 0)
        alpha = jnp.where(going & (curvature > 0), squares / jnp.where(curvature > 0, curvature, 1), 0)
        z, r = z + alpha * p, r - alpha * Ap
        new = jnp.sum(r * r, 0)
        beta = jnp.where(going & (squares > 0), new / jnp.where(squares > 0, squares, 1), 0)
        return z, r, jnp.where(going, r + beta * p, p), jnp.where(going, new, squares), count + 1

    z, *_ = lax.while_loop(unfinished, body, (jnp.zeros_like(rhs), rhs, rhs, size, jnp.asarray(0)))
    return z


@eqx.filter_jit
def find(kernel: Kernel, w: Array, f: Array, tol: Array) -> tuple[Array, Array, Array]:
    """`(f, |a^1/2 F|, steps)` with the last below tol as far as round-off allows; `ratio` = 0: the balanced problem."""
    root_a = jnp.exp(kernel.log_a / 2)
    balanced = kernel.ratio == 0
    floor = 8 * jnp.finfo(f.dtype).eps

    def size_at(f):
        size = jnp.linalg.norm(root_a * kernel.residual(w, f))
        return jnp.where(jnp.isfinite(size), size, jnp.inf)

    def sweep(carry):
        f, size, count = carry
        f = f - kernel.residual(w, f)
        return f, size_at(f), count + 1

    def unswept(carry):
        _, size, count = carry
        return (size > jnp.maximum(tol, kernel.epsilon)) & (count < 20)

    f, size, count = lax.while_loop(unswept, sweep, (f, size_at(f), jnp.asarray(0)))

    def unfinished(carry):
        f, size, stuck, count = carry
        return (size > jnp.maximum(tol, floor * jnp.linalg.norm(root_a * f))) & ~stuck & (count < STEPS)

    def body(carry):
        f, size, _, count = carry
        at = law(kernel, w, f)
        rhs = (at.root_a * at.residual)[:, None]
        along = jnp.where(balanced, 1, 0).astype(f.dtype) * at.root_a / jnp.linalg.norm(at.root_a)
        forcing = jnp.clip(size / kernel.epsilon, 1e-6, 0.1)
        z = solve_scaled(at.B, kernel.ratio, rhs, forcing, along)[:, 0]
        # the rows that are not there follow by one sweep at the end
        move = jnp.where(at.root_a > 0, z / jnp.where(at.root_a > 0, at.root_a, 1), 0)
        halve = lambda t: (t[0] / 2, size_at(f - t[0] / 2 * move))
        long = lambda t: ~(t[1] < (1 - 1e-4 * t[0]) * size) & (t[0] > 1e-3)
        t, new = lax.while_loop(long, halve, (jnp.ones((), f.dtype), size_at(f - move)))
        better = new < size
        return jnp.where(better, f - t * move, f), jnp.minimum(new, size), ~better, count + 1

    f, size, _, count = lax.while_loop(unfinished, body, (f, size, jnp.asarray(False), count))
    f = jnp.where(root_a > 0, f, f - kernel.residual(w, f))
    return f, size, count


def curvature(kernel: Kernel, w: Array, f: Array, directions: Float[Array, "m K"], rtol) -> tuple[Array, Array]:
    """`(H, df)`: the Hessian of minus the step's value along w -> w + directions @ theta, shape (K, K), and the
    derivative of f, shape (n, K). At the solution f. Equation (6.4) of docs/theory/flows.md in the source's space."""
    at = law(kernel, w, f)
    mean = (at.root_p**2 @ directions) / jnp.sum(at.root_p**2)
    centred = at.root_p[:, None] * (directions - mean)
    M = at.B @ centred
    Z = solve_scaled(at.B, kernel.ratio, kernel.ratio * M, rtol)
    H = kernel.ratio / kernel.epsilon * (centred.T @ centred - M.T @ Z)
    df = jnp.where(at.root_a > 0, 1 / jnp.where(at.root_a > 0, at.root_a, 1), 0)[:, None] * Z + mean
    return (H + H.T) / 2, df
