"""The point of a polyhedron nearest to a given one: the step a constrained problem takes, differentiable in all data.

An interior-point method finds which inequalities are active (no derivative is taken of it); the step then solves the
linear system of these alone, so that it is exact to round-off and differentiable any number of times.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jax import lax

_STEPS = 80


class Polyhedron(NamedTuple):
    """{p : equality + J p = 0 in the first `equalities` rows, c + J p <= 0 in the rest}; rows of J have length one."""

    jacobian: jax.Array  # (m, n)
    constant: jax.Array  # (m,)
    size: jax.Array  # (m,): the lengths the rows had, by which their multipliers differ
    equalities: int


def polyhedron(jacobian: jax.Array, constant: jax.Array, equalities: int) -> Polyhedron:
    """The rows scaled to length one, so that slacks and multipliers are lengths."""
    squares = jnp.sum(jnp.square(jacobian), axis=1)
    size = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 1)
    return Polyhedron(jacobian / size[:, None], constant / size, size, equalities)


def active_rows(rows: Polyhedron, d: jax.Array) -> jax.Array:
    """Which rows hold with equality at the point nearest to d, shape (m,), by Mehrotra's predictor-corrector method on
    min |p - d|^2 / 2 (Nocedal and Wright 2006, algorithm 16.4); each step solves with an m x m matrix."""
    if rows.constant.shape[0] == rows.equalities:
        return jnp.ones(rows.constant.shape, bool)
    return _active_rows(*lax.stop_gradient((rows.jacobian, rows.constant, d)), rows.equalities)


@functools.partial(jax.jit, static_argnums=3)  # traced once for all the places that ask
def _active_rows(J, c, d, first: int):
    m, dtype = c.shape[0], d.dtype
    eps = float(jnp.finfo(dtype).eps)
    gram = J @ J.T
    outside = jnp.max(jnp.abs(jnp.where(jnp.arange(m) < first, c, jnp.maximum(c, 0))))
    scale = jnp.linalg.norm(d) + outside + 1e-6 * jnp.max(jnp.abs(c)) + jnp.finfo(dtype).tiny
    count = m - first

    def factor(u, s):
        barrier = jnp.zeros((m,), dtype).at[first:].set(s / u[first:])
        return jsl.cho_factor(gram + jnp.diag(barrier + 4 * eps))

    def newton(factor, p, u, s, target):
        """The step from (p, u, s) to the central path's point with products `target`."""
        stationary = p - d + J.T @ u
        primal = c + J @ p
        lam = u[first:]
        right = primal - J @ stationary
        right = right.at[first:].add(s - (lam * s - target) / lam)
        du = jsl.cho_solve(factor, right)
        dp = -stationary - J.T @ du
        ds = -(lam * s - target + s * du[first:]) / lam
        return dp, du, ds

    def longest(v, dv):
        return jnp.minimum(1, jnp.min(jnp.where(dv < 0, -v / jnp.where(dv < 0, dv, -1), 1)))

    def unfinished(carry):
        p, u, s, k = carry
        gap = jnp.vdot(u[first:], s) / count
        rest = (c + J @ p).at[first:].add(s)
        off = jnp.maximum(jnp.max(jnp.abs(rest)), jnp.max(jnp.abs(p - d + J.T @ u)))
        return ((gap > 0.1 * eps * scale**2) | (off > 100 * eps * scale)) & (k < _STEPS) & jnp.isfinite(gap)

    def body(carry):
        p, u, s, k = carry
        lam = u[first:]
        gap = jnp.vdot(lam, s) / count
        matrix = factor(u, s)
        _, du, ds = newton(matrix, p, u, s, jnp.zeros_like(s))
        a, b = longest(lam, du[first:]), longest(s, ds)
        ahead = jnp.vdot(lam + a * du[first:], s + b * ds) / count
        sigma = (ahead / gap) ** 3
        dp, du, ds = newton(matrix, p, u, s, sigma * gap - du[first:] * ds)
        a = 0.995 * jnp.minimum(longest(lam, du[first:]), longest(s, ds))
        return p + a * dp, u + a * du, s + a * ds, k + 1

    s = jnp.maximum(-(c + J @ d)[first:], scale)
    u = jnp.zeros((m,), dtype).at[first:].set(scale)
    _, u, s, _ = lax.while_loop(unfinished, body, (d, u, s, jnp.asarray(0)))
    return jnp.ones((m,), bool).at[first:].set(u[first:] > s)


def nearest(rows: Polyhedron, d: jax.Array, active: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`(p, u)`: the point nearest to d on the active rows, and their multipliers (zero for the others): p = d - J'u.

    Differentiable in everything but `active`.
    """
    J = rows.jacobian
    on = active.astype(d.dtype)
    # a little on the diagonal: rows that depend on each other share a multiplier instead of dividing by zero
    matrix = on[:, None] * (J @ J.T) * on[None, :] + jnp.diag(1 - on + 4 * jnp.finfo(d.dtype).eps * on)
    u = jnp.linalg.solve(matrix, on * (rows.constant + J @ d))
    return d - J.T @ u, u


def is_degenerate(rows: Polyhedron, p, u, active, near) -> jax.Array:
    """Whether an inequality is active with no multiplier, or touched without being active, up to the length `near`."""
    inequality = jnp.arange(active.shape[0]) >= rows.equalities
    slack = -(rows.constant + rows.jacobian @ p)
    return jnp.any(inequality & (jnp.where(active, u, slack) <= near))


def dependent(rows: Polyhedron, active: jax.Array) -> jax.Array:
    """Whether the active rows depend on each other, to round-off (no constraint qualification)."""
    on = active.astype(rows.constant.dtype)
    matrix = on[:, None] * (rows.jacobian @ rows.jacobian.T) * on[None, :] + jnp.diag(1 - on)
    return jnp.min(jnp.linalg.eigvalsh(matrix)) <= 1e2 * on.shape[0] * jnp.finfo(on.dtype).eps
