"""The potentials of one step with the first marginal exact: Newton's steps with conjugate gradients.

With B = diag(a)^-1/2 p diag(columns)^-1/2 for the coupling p, every linear system here has the matrix
S = I - (1 - ratio) B B', symmetric, with eigenvalues in [ratio, 1] (docs/theory/flows.md, "The reduced step").
"""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._kernel import Kernel

STEPS = 60


class Sides(NamedTuple):
    """What one pass over the costs in each direction gives at some f: `rows` = log(row sums / a) - f / epsilon,
    `columns` as `Kernel.columns`."""

    rows: Float[Array, " n"]
    columns: Float[Array, " m"]


def _log_sums(exponents: Float[Array, "n m"], axis: int) -> Float[Array, " k"]:
    """log of the sums of exp over one axis. Nobody differentiates here, so no matrix of exponentials is kept."""
    top = jnp.max(exponents, axis=axis, keepdims=True)
    return jnp.log(jnp.sum(jnp.exp(exponents - top), axis=axis)) + jnp.squeeze(top, axis)


def _columns(kernel: Kernel, f: Array, cost: Array) -> Float[Array, " m"]:
    return _log_sums((kernel.log_a + f / kernel.epsilon)[:, None] - cost, 0)


def _sides(kernel: Kernel, w: Array, f: Array, cost: Array) -> Sides:
    columns = _columns(kernel, f, cost)
    return Sides(_log_sums((kernel.log_b + kernel.tilt(w, columns))[None, :] - cost, 1), columns)


def _scaled(kernel: Kernel, w: Array, sides: Sides, cost: Array) -> tuple[Array, Array]:
    """B, shape (n, m), and the roots of the column sums, (m,), with the rows scaled to be right."""
    exponents = (kernel.log_b + kernel.tilt(w, sides.columns))[None, :] - cost + (kernel.log_a - sides.rows)[:, None]
    sums = jnp.sum(jnp.exp(exponents), axis=0)
    logs = jnp.log(jnp.where(sums > 0, sums, jnp.inf))
    halves = jnp.where(kernel.log_a > -jnp.inf, kernel.log_a, 0)
    return jnp.exp(exponents - (logs[None, :] + halves[:, None]) / 2), jnp.sqrt(sums)


def solve_scaled(B, ratio, rhs, rtol, root_a=None, guess=None, max_steps: int = 400):
    """S z = rhs for each column of rhs, shape (n, k), by conjugate gradients from `guess` or zero on; without its part
    along `root_a`, where that is given (the balanced problem, which is singular along it)."""

    def off(v):
        return v if root_a is None else v - root_a[:, None] * (root_a @ v)[None, :]

    def apply(v):
        # one column: a sum, because the product of a transposed matrix and a vector is several times slower
        turned = jnp.sum(B * v, axis=0)[:, None] if v.shape[1] == 1 else B.T @ v
        return off(v - (1 - ratio) * (B @ turned))

    rhs = off(rhs)
    goal = rtol**2 * jnp.sum(rhs * rhs, 0)
    start = jnp.zeros_like(rhs) if guess is None else guess
    rest = rhs if guess is None else rhs - apply(guess)
    size = jnp.sum(rest * rest, 0)

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

    z, *_ = lax.while_loop(unfinished, body, (start, rest, rest, size, jnp.asarray(0)))
    return z


@eqx.filter_jit
def find(kernel: Kernel, w: Array, f: Array, tol: Array) -> tuple[Array, Array, Array]:
    """`(f, |a^1/2 F|, steps)` with the last below tol as far as round-off allows; `ratio` = 0: the balanced problem."""
    root_a = jnp.exp(kernel.log_a / 2)
    along = jnp.where(kernel.ratio == 0, 1, 0).astype(f.dtype) * root_a / jnp.linalg.norm(root_a)
    floor = 8 * jnp.finfo(f.dtype).eps
    cost = kernel.cost

    def at(f):
        sides = _sides(kernel, w, f, cost)
        size = jnp.linalg.norm(root_a * (f + kernel.epsilon * sides.rows))
        return sides, jnp.where(jnp.isfinite(size), size, jnp.inf)

    def sweep(carry):
        _, sides, _, count = carry
        f = -kernel.epsilon * sides.rows
        return f, *at(f), count + 1

    def unswept(carry):
        _, _, size, count = carry
        return (size > jnp.maximum(tol, kernel.epsilon)) & (count < 20)

    f, sides, size, count = lax.while_loop(unswept, sweep, (f, *at(f), jnp.asarray(0)))
    goal = lambda f: jnp.maximum(tol, floor * jnp.linalg.norm(root_a * f))

    def unfinished(carry):
        f, _, size, stuck, count = carry
        return (size > goal(f)) & ~stuck & (count < STEPS)

    def body(carry):
        f, sides, size, _, count = carry
        B, _ = _scaled(kernel, w, sides, cost)
        rhs = (root_a * (f + kernel.epsilon * sides.rows))[:, None]
        forcing = jnp.clip(jnp.maximum(size / kernel.epsilon, 0.3 * goal(f) / size), 1e-6, 0.1)
        z = solve_scaled(B, kernel.ratio, rhs, forcing, along)[:, 0]
        # the rows that are not there follow by one sweep at the end
        move = jnp.where(root_a > 0, z / jnp.where(root_a > 0, root_a, 1), 0)

        def halve(trial):
            t = trial[0] / 2
            return t, *at(f - t * move)

        long = lambda trial: ~(trial[2] < (1 - 1e-4 * trial[0]) * size) & (trial[0] > 1e-3)
        # the first trial is the full step: from twice that on, so that the program holds one copy of it
        t, there, new = lax.while_loop(long, halve, (jnp.full((), 2, f.dtype), sides, jnp.full((), jnp.inf, f.dtype)))
        better = new < size
        here = jnp.where(better, f - t * move, f)
        there = Sides(*(jnp.where(better, one, other) for one, other in zip(there, sides, strict=True)))
        return here, there, jnp.minimum(new, size), ~better, count + 1

    f, sides, size, _, count = lax.while_loop(unfinished, body, (f, sides, size, jnp.asarray(False), count))
    return jnp.where(root_a > 0, f, -kernel.epsilon * sides.rows), size, count


@eqx.filter_jit
def explicit(kernel: Kernel, w: Array) -> Array:
    """f where the step has a closed form, `ratio` = 1."""
    return -kernel.epsilon * _log_sums((kernel.log_b - w / kernel.epsilon)[None, :] - kernel.cost, 1)


def new_weights(kernel: Kernel, w: Array, f: Array) -> tuple[Array, Array, Array]:
    """The new weights, (m,), `Kernel.dual`, and the log-sums of the columns, (m,): all from one pass."""
    a, columns = jnp.exp(kernel.log_a), _columns(kernel, f, kernel.cost)
    p = jnp.exp(kernel.log_b + kernel.ratio * (columns - w / kernel.epsilon))
    dual = jnp.sum(jnp.where(a > 0, f, 0) * a) - kernel.epsilon / kernel.ratio * (jnp.sum(p) - jnp.sum(a))
    return p, dual, columns


def curvature(
    kernel: Kernel, w: Array, f: Array, columns: Array, directions: Float[Array, "m K"], rtol, guess, closed: bool
) -> tuple[Array, Array]:
    """`(H, df)`: the Hessian of minus the step's value along w -> w + directions @ theta, shape (K, K), and the
    derivative of f, shape (n, K). At the solution f. Equation (6.4) of docs/theory/flows.md in the source's space.
    `columns`: of `new_weights`; `guess`: a df from nearby; `closed`: `ratio` = 1, S is the identity."""
    B, root_p = _scaled(kernel, w, Sides(-f / kernel.epsilon, columns), kernel.cost)
    root_a = jnp.exp(kernel.log_a / 2)
    mean = (root_p**2 @ directions) / jnp.sum(root_p**2)
    centred = root_p[:, None] * (directions - mean)
    M = B @ centred
    near = root_a[:, None] * (guess - mean)
    Z = M if closed else solve_scaled(B, kernel.ratio, kernel.ratio * M, rtol, guess=near)
    H = kernel.ratio / kernel.epsilon * (centred.T @ centred - M.T @ Z)
    df = jnp.where(root_a > 0, 1 / jnp.where(root_a > 0, root_a, 1), 0)[:, None] * Z + mean
    return (H + H.T) / 2, df
