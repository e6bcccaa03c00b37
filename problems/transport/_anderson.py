"""Anderson acceleration of Sinkhorn sweeps in the log domain, with the dual as merit function."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ._sweeps import Dual, State


def anderson_sweeps(dual: Dual, state: State, tol: Array, count: Array, depth: int) -> State:
    """Up to `count` sweeps g -> T(g) in the log domain; the next g is the combination of the last `depth` images whose
    residuals T(g) - g cancel best (Anderson 1965, type II).

    A mixed g is kept where the dual there is no lower than at the last g kept, or the violation no larger (the dual
    cannot tell near its maximum); else the plain image of that g is next, with nothing remembered.
    """
    back, dtype = dual.swapped(), state.g.dtype
    eps = float(jnp.finfo(dtype).eps)
    depth = min(depth, len(state.g))
    live = dual.b > 0

    def sweep(g):
        """(f, T(g), |F|_2 and minus the dual at (best f, g))."""
        f = dual.best_f(g)
        soft = back.pairs.soft_min(f, dual.a, dual.epsilon)
        gap = back.gap_f(g, soft)
        new_f, new_g = f, back.f_of(soft)
        if not dual.balanced:
            shift = dual.translate(f, new_g)
            new_f, new_g = jnp.where(dual.a > 0, f + shift, 0), jnp.where(live, new_g - shift, 0)
        return new_f, new_g, jnp.linalg.norm(gap), dual.semi_dual(f, g)

    def unfinished(carry):
        *_, size, _, _, k, _ = carry
        return (size > tol) & (k < count)

    def body(carry):
        g, target, f, image, points, moves, kept, size, merit, rate, k, _ = carry
        new_f, new_image, new_size, new_merit = sweep(target)
        good = jnp.isfinite(new_size) & ((new_merit <= merit) | (new_size <= size))
        # refused: the last point stays, and its plain image, which always improves the dual, is next
        first = size == jnp.inf
        rate = jnp.where(first, 1, new_size / jnp.where(size > 0, size, 1))
        pick = lambda p, q: jnp.where(good, p, q)
        move, last_move = new_image - target, image - g
        if depth:
            points = jnp.where(good & ~first, jnp.roll(points, 1, axis=0).at[0].set(g), points)
            moves = jnp.where(good & ~first, jnp.roll(moves, 1, axis=0).at[0].set(last_move), moves)
            kept = jnp.where(good, jnp.where(first, 0, jnp.minimum(kept + 1, depth)), 0)
            used = (jnp.arange(depth, dtype=kept.dtype) < kept)[:, None]
            d_points, d_moves = jnp.where(used, target - points, 0), jnp.where(used, move - moves, 0)
            gram = d_moves @ d_moves.T
            scale = jnp.where(jnp.trace(gram) > 0, jnp.trace(gram), 1)
            weights = jnp.linalg.solve(gram + 10 * eps * scale * jnp.eye(depth, dtype=dtype), d_moves @ move)
            mixed = new_image - weights @ (d_points + d_moves)
            mixed = jnp.where(jnp.all(jnp.isfinite(mixed)), mixed, new_image)
        else:
            mixed = new_image
        return (
            pick(target, g), pick(mixed, image), pick(new_f, f), pick(new_image, image), points, moves, kept,
            pick(new_size, size), pick(new_merit, merit), rate, k + 1, good,
        )  # fmt: skip

    memory = jnp.zeros((depth, len(state.g)), dtype)
    big = jnp.full((), jnp.inf, dtype)
    one, zero = jnp.ones((), dtype), jnp.zeros((), jnp.int32)
    start = (state.g, state.g, state.f, state.g, memory, memory, zero, big, big, one, zero, jnp.asarray(True))
    _, _, f, g, _, _, _, size, _, rate, k, _ = lax.while_loop(unfinished, body, start)
    return state._replace(f=f, g=g, size=size, rate=rate, steps=state.steps + k)
