"""The potentials of one step with the first marginal exact: Newton's steps with conjugate gradients.

With B = diag(a)^-1/2 p diag(columns)^-1/2 for the coupling p, every linear system here has the matrix
S = I - (1 - ratio) B B', symmetric, with eigenvalues in [ratio, 1] (docs/theory/flows.md, "The reduced step").
Exponentials are dear: those of one potential serve all potentials nearby, up to factors of rows and columns.
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


# ------------------------------------------------------------------------------------------------ sums


def _log_sums(exponents: Float[Array, "n m"], axis: int) -> Float[Array, " k"]:
    """log of the sums of exp over one axis. Nobody differentiates here, so no matrix of exponentials is kept."""
    top = jnp.max(exponents, axis=axis, keepdims=True)
    return jnp.log(jnp.sum(jnp.exp(exponents - top), axis=axis)) + jnp.squeeze(top, axis)


def _columns(kernel: Kernel, f: Array) -> Float[Array, " m"]:
    return _log_sums((kernel.log_a + f / kernel.epsilon)[:, None] - kernel.cost, 0)


def _right(kernel: Kernel, w: Array, columns: Array) -> Float[Array, " m"]:
    """log of what exp((f - c) / epsilon) is multiplied with in the coupling, besides a."""
    return kernel.log_b + kernel.tilt(w, columns)


def _sides(kernel: Kernel, w: Array, f: Array) -> Sides:
    """From the costs, for f of any size."""
    columns = _columns(kernel, f)
    return Sides(_log_sums(_right(kernel, w, columns)[None, :] - kernel.cost, 1), columns)


class Near(NamedTuple):
    """`matrix` = exp((f - c) / epsilon - top) at one f, the largest entry of each column 1. At other f, at a distance
    of at most `_reach`, sums are products with it."""

    matrix: Float[Array, "n m"]
    f: Float[Array, " n"]
    top: Float[Array, " m"]


def _near(kernel: Kernel, f: Array) -> Near:
    exponents = (f / kernel.epsilon)[:, None] - kernel.cost
    top = jnp.max(exponents, axis=0)
    return Near(jnp.exp(exponents - top[None, :]), f, top)


def _reach(dtype) -> float:
    """How far f / epsilon may move before a sum that matters could leave the range of the exponent."""
    return 300.0 if jnp.finfo(dtype).bits >= 64 else 35.0


def _moved(kernel: Kernel, f: Array, near: Near) -> tuple[Array, Array]:
    """How far f / epsilon is from near's at the points there are: beside a constant, and the constant, which may be
    huge (it moves F by `ratio` times as much) and only shifts the columns."""
    there = kernel.log_a > -jnp.inf
    weights = jnp.exp(kernel.log_a)
    moved = jnp.where(there, (f - near.f) / kernel.epsilon, 0)
    constant = (weights @ moved) / jnp.sum(weights)
    return jnp.where(there, moved - constant, 0), constant


def _sides_near(kernel: Kernel, w: Array, f: Array, near: Near) -> Sides:
    """Not finite where f is too far, up to a constant."""
    moved, constant = _moved(kernel, f, near)
    far = jnp.max(jnp.abs(moved)) > _reach(f.dtype)
    columns = near.top + jnp.log(jnp.exp(kernel.log_a + moved) @ near.matrix) + constant
    right = _right(kernel, w, columns) + near.top
    shift = jnp.max(right)
    rows = jnp.log(near.matrix @ jnp.exp(right - shift)) + shift - near.f / kernel.epsilon
    return Sides(jnp.where(far, jnp.inf, rows), columns)


# ------------------------------------------------------------------------------------------------ linear systems


class Scaled(NamedTuple):
    """B = diag(left) matrix diag(right); `root` (m,): the roots of the column sums of the coupling."""

    matrix: Float[Array, "n m"]
    left: Float[Array, " n"]
    right: Float[Array, " m"]
    root: Float[Array, " m"]

    def forward(self, v: Float[Array, "m *K"]) -> Float[Array, "n *K"]:
        return _rowwise(self.left, self.matrix @ _rowwise(self.right, v))

    def back(self, v: Float[Array, "n *K"]) -> Float[Array, "m *K"]:
        v = _rowwise(self.left, v)
        return _rowwise(self.right, v @ self.matrix if v.ndim == 1 else self.matrix.T @ v)


def _rowwise(scale: Array, v: Array) -> Array:
    return scale * v if v.ndim == 1 else scale[:, None] * v


def _scaled(matrix: Array, rows: Array, columns: Array, root_a: Array) -> Scaled:
    """B of the coupling a rows matrix columns, whose row sums are a."""
    sums = columns * ((root_a**2 * rows) @ matrix)
    root = jnp.sqrt(sums)
    return Scaled(matrix, root_a * rows, jnp.where(sums > 0, columns / jnp.where(sums > 0, root, 1), 0), root)


def _scaled_near(kernel: Kernel, w: Array, sides: Sides, near: Near) -> Scaled:
    right = _right(kernel, w, sides.columns) + near.top
    shift = jnp.max(right)
    rows = jnp.exp(shift - near.f / kernel.epsilon - sides.rows)
    return _scaled(near.matrix, rows, jnp.exp(right - shift), jnp.exp(kernel.log_a / 2))


@eqx.filter_jit
def normalized(kernel: Kernel, sides: Sides) -> Float[Array, "n m"]:
    """B at a balanced solution."""
    left, right = kernel.log_a / 2 - sides.rows, kernel.log_b / 2 - sides.columns
    return jnp.exp(left[:, None] + right[None, :] - kernel.cost)


def solve_scaled(B: Scaled, ratio, rhs, rtol, root_a, max_steps: int = 400):
    """S z = rhs, shape (n,), by conjugate gradients beside a^1/2, of length 1 in `root_a`: B's singular vector, along
    which S is `ratio` exactly, and singular for the balanced problem (there z has no part along it)."""

    def off(v):
        return v - root_a * (root_a @ v)

    def unfinished(carry):
        _, _, _, square, count = carry
        return (square > goal) & (count < max_steps)

    def body(carry):
        z, r, p, square, count = carry
        Ap = off(p - (1 - ratio) * B.forward(B.back(p)))
        curvature = p @ Ap
        alpha = jnp.where(curvature > 0, square / jnp.where(curvature > 0, curvature, 1), 0)
        z, r = z + alpha * p, r - alpha * Ap
        new = r @ r
        return z, r, r + new / square * p, new, count + 1

    part = jnp.where(ratio > 0, (root_a @ rhs) / jnp.where(ratio > 0, ratio, 1), 0)
    rhs = off(rhs)
    goal = rtol**2 * (rhs @ rhs)
    z = lax.while_loop(unfinished, body, (jnp.zeros_like(rhs), rhs, rhs, rhs @ rhs, jnp.asarray(0)))[0]
    return z + part * root_a


def solve_block(B: Scaled, ratio, rhs, rtol, guess, max_steps: int = 100):
    """`(z, rhs - S z)`, S z = rhs, shape (n, K), by block conjugate gradients from `guess` on: all columns share one
    space of directions, so that a few products with B do. Residuals are kept orthonormal [Dubrulle 2001], directions
    that are nearly dependent are left to a new start."""
    apply = lambda v: v - (1 - ratio) * B.forward(B.back(v))
    longest = lambda v: jnp.linalg.norm(v, axis=0)
    eps = float(jnp.finfo(rhs.dtype).eps)
    goal = jnp.maximum(rtol * longest(rhs), 10 * eps * jnp.max(longest(rhs)))

    def again(carry):
        _, R, size, old, count = carry
        return jnp.any(longest(R) > goal) & (size < 0.1 * old) & (count < max_steps)

    def start(carry):
        z, R, size, _, count = carry
        least = jnp.maximum(goal, 1e-4 * longest(R))
        Q, C = _orthonormal(R)

        def unfinished(carry):
            return jnp.any(longest(carry[3]) > least) & (carry[4] < max_steps)

        def body(carry):
            z, Q, P, C, count = carry
            AP = apply(P)
            values, vectors = jnp.linalg.eigh(P.T @ AP)
            there = values > 10 * len(values) * eps * values[-1]  # directions left out are zeros of it, to round-off
            T = (vectors * jnp.where(there, 1 / jnp.where(there, values, 1), 0)) @ vectors.T
            z, (Q, turn) = z + P @ (T @ C), _orthonormal(Q - AP @ T)
            return z, Q, Q + P @ turn.T, turn @ C, count + 1

        z, *_, count = lax.while_loop(unfinished, body, (z, Q, Q, C, count))
        R = rhs - apply(z)
        return z, R, jnp.linalg.norm(R), size, count

    R = rhs - apply(guess)
    z, R, *_ = lax.while_loop(
        again, start, (guess, R, jnp.linalg.norm(R), jnp.full((), jnp.inf, R.dtype), jnp.asarray(0))
    )
    return z, R


def _orthonormal(v: Float[Array, "n K"]) -> tuple[Float[Array, "n K"], Float[Array, "K K"]]:
    """`(Q, C)` with v = Q C up to what is nearly dependent, Q's columns orthonormal or zero."""
    sizes = jnp.linalg.norm(v, axis=0)
    unit = v / jnp.where(sizes > 0, sizes, 1)
    values, vectors = jnp.linalg.eigh(unit.T @ unit)
    kept = values > jnp.sqrt(jnp.finfo(v.dtype).eps) * 1e-2 * values[-1]
    roots = jnp.sqrt(jnp.where(kept, values, 1))
    return unit @ (vectors * jnp.where(kept, 1 / roots, 0)), (vectors * jnp.where(kept, roots, 0)).T * sizes


# ------------------------------------------------------------------------------------------------ potentials


@eqx.filter_jit
def find(kernel: Kernel, w: Array, f: Array, tol: Array) -> tuple[Array, Array, Sides, Array]:
    """`(f, |a^1/2 F|, sides, steps)`, the second below tol as far as round-off allows; `ratio` = 0: the balanced
    problem."""
    root_a = jnp.exp(kernel.log_a / 2)
    along = root_a / jnp.linalg.norm(root_a)
    floor = 8 * jnp.finfo(f.dtype).eps
    there = root_a > 0

    def at(f, near):
        sides = _sides_near(kernel, w, f, near)
        size = jnp.linalg.norm(jnp.where(there, root_a * (f + kernel.epsilon * sides.rows), 0))
        return sides, jnp.where(jnp.isfinite(size), size, jnp.inf)

    def swept(f):  # a constant in f moves F by `ratio` times it: the right one first
        rows = _sides(kernel, w, f).rows
        mean = jnp.sum(jnp.where(there, root_a**2 * (f + kernel.epsilon * rows), 0)) / jnp.sum(root_a**2)
        constant = jnp.where(kernel.ratio > 0, (1 - 1 / kernel.ratio) * mean, 0)
        return constant - kernel.epsilon * rows

    def sweep(carry):
        f, *_, count = carry  # first only looked at
        f = lax.cond(count < 0, lambda: f, lambda: swept(f))
        near = _near(kernel, f)
        return f, near, *at(f, near), count + 1

    def unswept(carry):
        *_, size, count = carry
        return (size > jnp.maximum(tol, kernel.epsilon)) & (count < 20)

    zero = jnp.zeros_like(w)
    nothing = Near(jnp.zeros((len(f), len(w)), f.dtype), f, zero), Sides(f, zero), jnp.full((), jnp.inf, f.dtype)
    f, near, sides, size, count = lax.while_loop(unswept, sweep, (f, *nothing, jnp.asarray(-1)))
    goal = lambda f: jnp.maximum(tol, floor * jnp.linalg.norm(root_a * f))

    def unfinished(carry):
        f, _, _, size, stuck, count = carry
        return (size > goal(f)) & ~stuck & (count < STEPS)

    def body(carry):
        f, near, sides, size, _, count = carry
        B = _scaled_near(kernel, w, sides, near)
        rhs = jnp.where(there, root_a * (f + kernel.epsilon * sides.rows), 0)
        forcing = jnp.clip(jnp.maximum(size / kernel.epsilon, 0.3 * goal(f) / size), 1e-6, 0.1)
        z = solve_scaled(B, kernel.ratio, rhs, forcing, along)
        # the rows that are not there follow by one sweep at the end
        move = jnp.where(there, z / jnp.where(there, root_a, 1), 0)

        def halve(trial):
            t = trial[0] / 2
            return t, *at(f - t * move, near)

        long = lambda trial: ~(trial[2] < (1 - 1e-4 * trial[0]) * size) & (trial[0] > 1e-3)
        # the first trial is the full step: from twice that on, so that the program holds one copy of it
        first = jnp.full((), 2, f.dtype), sides, jnp.full((), jnp.inf, f.dtype)
        t, new_sides, new = lax.while_loop(long, halve, first)
        better = new < size
        f = jnp.where(better, f - t * move, f)
        sides = Sides(*(jnp.where(better, one, other) for one, other in zip(new_sides, sides, strict=True)))
        moved = jnp.max(jnp.abs(_moved(kernel, f, near)[0]))
        anew = lambda: _near(kernel, jnp.where(there, f, -kernel.epsilon * sides.rows))
        near = lax.cond(moved > _reach(f.dtype) / 10, anew, lambda: near)
        return f, near, sides, jnp.minimum(new, size), ~better, count + 1

    start = f, near, sides, size, jnp.asarray(False), count
    f, _, sides, size, _, count = lax.while_loop(unfinished, body, start)
    return jnp.where(there, f, -kernel.epsilon * sides.rows), size, sides, count


@eqx.filter_jit
def explicit(kernel: Kernel, w: Array) -> tuple[Array, Sides]:
    """f where the step has a closed form, `ratio` = 1."""
    rows = _log_sums((kernel.log_b - w / kernel.epsilon)[None, :] - kernel.cost, 1)
    return -kernel.epsilon * rows, Sides(rows, _columns(kernel, -kernel.epsilon * rows))


def curvature(
    kernel: Kernel, w: Array, sides: Sides, directions: Float[Array, "m K"], rtol, guess, closed: bool
) -> tuple[Array, Array]:
    """`(H, df)`: the Hessian of minus the step's value along w -> w + directions @ theta, shape (K, K), and the
    derivative of f, shape (n, K). At the solution. Equation (6.4) of docs/theory/flows.md in the source's space.
    `sides`: of `find`; `guess`: a df from nearby; `closed`: `ratio` = 1, S is the identity.

    With residuals R of at most `rtol` in S Z = ratio M, the term Z'R makes H right to R'R: a loose rtol will do, and
    what is wrong in H is positive, so that a Newton step is too short and never uphill."""
    root_a = jnp.exp(kernel.log_a / 2)
    laws = jnp.exp(_right(kernel, w, sides.columns)[None, :] - kernel.cost - sides.rows[:, None])
    B = _scaled(laws, jnp.ones_like(sides.rows), jnp.ones_like(sides.columns), root_a)
    mean = (B.root**2 @ directions) / jnp.sum(B.root**2)
    centred = B.root[:, None] * (directions - mean)
    M = B.forward(centred)
    near = root_a[:, None] * (guess - mean)
    Z, rest = (M, None) if closed else solve_block(B, kernel.ratio, kernel.ratio * M, rtol, near)
    product = M.T @ Z if rest is None else M.T @ Z + Z.T @ rest / kernel.ratio
    H = kernel.ratio / kernel.epsilon * (centred.T @ centred - product)
    df = jnp.where(root_a > 0, 1 / jnp.where(root_a > 0, root_a, 1), 0)[:, None] * Z + mean
    return (H + H.T) / 2, df
