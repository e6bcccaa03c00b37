"""Accelerated forward-backward steps for `Composite` and `Constrained` problems."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from .._trees import ravel, ravel_like
from ._base import AbstractSolver, Found


class Fista(AbstractSolver):
    """FISTA with gradient restart (Beck and Teboulle 2009; O'Donoghue and Candès 2015), one gradient a step.

    Starts with t = 1 / L at y0 and lowers it where the gradients met on the way show a larger curvature, so that the
    smooth part need not be quadratic, and where a step without momentum turns back half of the one before: with t at
    most 1 / L it cannot turn back more than a third, but the curvature of constraints is no part of L. Stops at
    |F| <= tol, F with the step length at hand. `monotone`: a residual that grows ends the momentum, for constraints
    that bend (on a lasso it costs up to four times the steps).
    """

    monotone: bool = eqx.field(static=True, default=False)

    def find(self, inner, x, y0, *, tol, max_steps):
        flat, unravel = ravel(y0)
        tol = jnp.asarray(tol, flat.dtype)
        one = jnp.ones((), flat.dtype)

        def gradient(point):
            return ravel_like(jax.grad(inner.smooth, argnums=1)(x, unravel(point)), flat.dtype)

        def forward_backward(z, g, t):
            return ravel_like(inner.forward_backward(x, unravel(z), g, t), flat.dtype)

        def unfinished(carry):
            *_, size, step, stuck = carry
            return (size > tol) & (step < max_steps) & ~stuck

        def body(carry):
            y, z, g, t, k, last, before, step, _ = carry
            new = forward_backward(z, g, t)
            size = jnp.linalg.norm(new - z)  # |F(new)| is no larger: the map does not expand
            turned = jnp.vdot(new - z, last) < -0.5 * jnp.vdot(last, last)
            restart = (jnp.vdot(z - new, new - y) > 0) | turned
            if self.monotone:
                restart = restart | (size > 1.05 * before)
            grown = jnp.where(restart, one, 0.5 * (1 + jnp.sqrt(1 + 4 * k * k)))
            ahead = jnp.where(restart, new, new + (k - 1) / grown * (new - y))
            g_ahead = gradient(ahead)
            moved = ahead - z
            square = jnp.vdot(moved, moved)
            # |z| matters: below its round-off the difference of two gradients says nothing about curvature
            clear = square > (100 * jnp.finfo(flat.dtype).eps) ** 2 * jnp.vdot(z, z)
            slope = jnp.vdot(g_ahead - g, moved)
            steep = clear & (t * slope > 1.001 * square)
            shorter = 0.95 * square / jnp.where(steep, slope, 1)
            fine = jnp.all(jnp.isfinite(g_ahead)) & jnp.all(jnp.isfinite(ahead))
            t_new = jnp.where(fine, jnp.where(steep, shorter, jnp.where(turned, t / 2, t)), t / 4)
            keep = lambda a, b: jnp.where(fine, a, b)
            stuck = ~fine & ~(t_new > jnp.finfo(flat.dtype).tiny)
            size = keep(size, jnp.inf)
            # after a step that was too long: on from the point itself, without momentum
            again = steep & (size > tol)
            ahead, g_ahead = lax.cond(again, lambda: (new, gradient(new)), lambda: (ahead, g_ahead))
            grown = jnp.where(again, one, grown)
            plain = fine & ((k == 1) | restart | again)  # z is `new`
            last = jnp.where(plain & (t_new == t), new - z, 0)
            z, g, k = keep(ahead, y), keep(g_ahead, g), keep(grown, one)
            g = lax.cond(fine, lambda: g, lambda: gradient(y))
            return keep(new, y), z, g, t_new, k, last, size, step + 1, stuck

        t = inner.step_length(x, unravel(flat)).astype(flat.dtype)
        zero = jnp.asarray(0)
        start = (
            flat,
            flat,
            gradient(flat),
            t,
            one,
            jnp.zeros_like(flat),
            jnp.full_like(one, jnp.inf),
            zero,
            jnp.asarray(False),
        )
        y, *_, steps, _ = lax.while_loop(unfinished, body, start)
        return Found(unravel(y), steps, steps + 10)
