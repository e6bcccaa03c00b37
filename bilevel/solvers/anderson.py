"""Anderson acceleration of a step that contracts."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
from jax import lax

from .._trees import ravel, ravel_like
from ._base import AbstractSolver, Found


class Anderson(AbstractSolver):
    """The default for `FixedPoint`: y <- the combination of the last `depth` images T(y_i) = y_i - F(x, y_i) whose
    residuals cancel best (Anderson 1965, type II), and a plain step, from which the memory starts anew, where that
    has not lowered |F|.

    One evaluation a step, 2 `depth` vectors of memory. `depth=0`: plain iteration.
    """

    depth: int = eqx.field(static=True, default=5)

    def __check_init__(self):
        if isinstance(self.depth, bool) or not isinstance(self.depth, int) or self.depth < 0:
            raise ValueError(f"bilevel.solvers.Anderson: depth must be an integer of at least 0, found {self.depth!r}.")

    def check(self, inner):
        if not inner.is_step:
            raise ValueError(
                f"bilevel.solvers.Anderson: {type(inner).__name__} has no step y - F(x, y) that contracts; it is for "
                "FixedPoint and Composite."
            )

    def find(self, inner, x, y0, *, tol, max_steps):
        flat, unravel = ravel(y0)
        tol = jnp.asarray(tol, flat.dtype)
        depth = min(self.depth, flat.size)
        eps = jnp.finfo(flat.dtype).eps

        def move_at(point):
            return -ravel_like(inner.optimality(x, unravel(point)), flat.dtype)

        def unfinished(carry):
            _, move, _, _, _, step, _ = carry
            size = jnp.linalg.norm(move)
            return (size > tol) & (step < max_steps) & jnp.isfinite(size)

        def body(carry):
            point, move, points, moves, kept, step, best = carry
            target = point + move
            if depth:
                used = (jnp.arange(depth) < kept)[:, None]
                d_points, d_moves = jnp.where(used, point - points, 0), jnp.where(used, move - moves, 0)
                gram = d_moves @ d_moves.T
                scale = jnp.where(jnp.trace(gram) > 0, jnp.trace(gram), 1)
                weights = jnp.linalg.solve(gram + 10 * eps * scale * jnp.eye(depth, dtype=flat.dtype), d_moves @ move)
                accelerated = target - weights @ (d_points + d_moves)
                target = jnp.where(jnp.all(jnp.isfinite(accelerated)), accelerated, target)
                points = jnp.roll(points, 1, axis=0).at[0].set(point)
                moves = jnp.roll(moves, 1, axis=0).at[0].set(move)
            new = move_at(target)
            size = jnp.linalg.norm(new)
            better = jnp.isfinite(size) & ((size <= 2 * best) | (kept == 0))
            # refused: the plain step is next, with nothing remembered
            plain = point + move
            back = lax.cond(better, lambda: new, lambda: move_at(plain))
            target = jnp.where(better, target, plain)
            kept = jnp.where(better, jnp.minimum(kept + 1, depth), 0)
            return target, back, points, moves, kept, step + 1, jnp.minimum(best, jnp.linalg.norm(back))

        start = move_at(flat)
        memory = jnp.zeros((depth, flat.size), flat.dtype)
        zero = jnp.asarray(0)
        carry = (flat, start, memory, memory, zero, zero, jnp.linalg.norm(start))
        point, _, _, _, _, steps, _ = lax.while_loop(unfinished, body, carry)
        return Found(unravel(point), steps, steps + 1)
