"""Damped Newton for residuals of every kind."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._trees import ravel, ravel_like
from ..linear import choose, linear_system
from ._base import AbstractSolver, Found


class DampedNewton(AbstractSolver):
    """y <- y - t A^-1 F with A = dF/dy and t halved until |F| falls; where no t does, it stops.

    **Arguments:** `linear_solver`: as for `ImplicitAdjoint`.
    """

    linear_solver: Any = None

    def find(self, inner, x, y0, *, tol, max_steps):
        flat, unravel = ravel(y0)
        tol = jnp.asarray(tol, flat.dtype)
        solver = choose(self.linear_solver, inner, x, y0)

        def size_at(point):
            size = jnp.linalg.norm(ravel_like(inner.optimality(x, unravel(point)), flat.dtype))
            return jnp.where(jnp.isfinite(size), size, jnp.inf)

        def unfinished(carry):
            _, size, step, stuck, _ = carry
            return (size > tol) & (step < max_steps) & ~stuck

        def body(carry):
            point, size, step, _, evaluations = carry
            residual, system = linear_system(inner, x, unravel(point))
            # |F| judges the step, so that the solve needs no test of its own
            answer = solver.approximate(solver.prepare(system), system, system.off_gauge(residual), rtol=1e-4)
            move = system.off_gauge(jnp.where(jnp.isfinite(answer.value), answer.value, 0))

            def shorten(trial):
                t, _, count = trial
                return t / 2, size_at(point - t / 2 * move), count + 1

            def too_long(trial):
                t, new, count = trial
                return ~(new < (1 - 1e-4 * t) * size) & (count < 30)

            one = jnp.ones((), flat.dtype)
            t, new, count = lax.while_loop(too_long, shorten, (one, size_at(point - move), jnp.asarray(1)))
            better = new < size
            point = jnp.where(better, point - t * move, point)
            return point, jnp.where(better, new, size), step + 1, ~better, evaluations + 1 + count

        zero = jnp.asarray(0)
        start = (flat, size_at(flat), zero, jnp.asarray(False), jnp.asarray(1))
        point, _, steps, _, evaluations = lax.while_loop(unfinished, body, start)
        return Found(jax.tree.map(lambda a: a, unravel(point)), steps, evaluations)
