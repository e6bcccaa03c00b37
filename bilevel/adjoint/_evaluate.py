"""Omega at a point, and the estimate of its error."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from .. import _trees as trees
from .._precision import can_lower, lowered, raised
from .._trees import ravel, ravel_like
from ..errors import Status
from ..linear import MixedPrecision, linear_system, refine
from ..problem import as_node
from ._base import Estimate

# The solves that the error vector is made of: relative residual above which those with a stale factorization are
# refined (parts of the vector may cancel), and down to which. Each refinement takes a product.
_DULL, _SHARP = 0.1, 3e-3


def evaluate(problem, x, flat, unravel, solver, state, *, guess, rtol, at=None, named=None, rough=0.03) -> Estimate:
    """Omega at this very point, and the estimate of its error to first order in the step still to go.

    Two sweeps of approximate adjoint solves, and in between the residual with the products of this point: v = v_0 +
    A^-T rho_0, and the error vector g_x - F_x' A^-T (g_y - rho) with what remains of rho.
    `at`: `(F, system)` of this point, where the caller has them. `named`: `(solver, state)` of a linear solver whose
    limits are the user's: it alone gives v, as it is; `solver` serves the estimate. `rough`: accuracy of the solves
    that only the estimate needs.
    """
    inner = problem.inner
    eps = float(jnp.finfo(flat.dtype).eps)
    residual, system = linear_system(inner, x, unravel(flat)) if at is None else at

    def outer(x, flat):
        return problem.outer(x, unravel(flat)).astype(flat.dtype)

    value, (g_x, g_y) = jax.value_and_grad(outer, argnums=(0, 1))(x, flat)
    pull_x = jax.vjp(lambda x: ravel_like(inner.optimality(x, unravel(flat)), flat.dtype), x)[1]
    given = jnp.isfinite(value) & trees.all_finite((g_x, g_y)) & jnp.all(jnp.isfinite(residual))
    status = Status.where(given, Status(), Status("non_finite"))
    status = status.then(inner.status_at(x, unravel(flat))).then(system.gauge_status)
    if system.gauge is not None:
        along, size = jnp.linalg.norm(system.gauge(g_y)), jnp.linalg.norm(g_y)
        slides = (along > jnp.sqrt(eps) * size) | _changes_along(system, outer, x, flat, value)
        status = status.then(Status.where(slides, Status("gauge_dependent"), Status()))
    g_y = _without_noise(problem, x, flat, unravel, value, system.off_gauge(g_y))
    if guess is not None:  # for no right-hand side no residual but zero is small
        guess = jnp.where(jnp.any(g_y != 0), guess, 0)

    low = isinstance(solver, MixedPrecision)  # one digit will do: where float32 pays, this is the place for it
    turned = lambda v, step: _lagrangian_tangent(problem, x, unravel(flat), v, step, low)
    if named is None:
        enough = rtol * jnp.linalg.norm(g_y)
        least = float(jnp.finfo(flat.dtype).tiny)  # G_y may be zero
        missing = lambda rest: jnp.clip(
            enough / jnp.maximum(jnp.linalg.norm(rest), jnp.maximum(enough, least)), 1e-16, 1
        )
        rest = g_y
        if guess is not None:
            rest = lax.cond(jnp.any(guess != 0), lambda: g_y - system.rmv(guess), lambda: g_y)
        approximate = functools.partial(solver.approximate, state, system)

        def sharpened(b, value, residual, quality, *, transpose):
            """`(value, residual, products)`, refined where the state is stale: parts of the error vector may cancel."""

            def refined():
                again = lambda r: approximate(r, rtol=rough, transpose=transpose).value
                found = refine(
                    again, system, b, transpose=transpose, rtol=_SHARP, guess=value, condition=1.0, status=Status()
                )
                return found.value, found.residual, found.products

            return lax.cond(quality > _DULL, refined, lambda: (value, residual, jnp.asarray(0)))

        sweep = jnp.clip(jnp.sqrt(missing(rest)), 1e-8, 0.1).astype(flat.dtype)
        first = approximate(rest, rtol=sweep, transpose=True)
        forward = approximate(residual, rtol=rough)
        step = system.off_gauge(forward.value)
        v = first.value if guess is None else guess + first.value
        asked, rest = rest, g_y - system.rmv(v)
        quality, extra = jnp.zeros((), flat.dtype), jnp.asarray(0)
        if solver.keeps:
            missing = residual - system.mv(step)
            quality = jnp.maximum(_ratio(rest, asked), _ratio(missing, residual))
            step, _, first_extra = sharpened(residual, step, missing, quality, transpose=False)
            v, rest, second_extra = sharpened(g_y, v, rest, quality, transpose=True)
            step, extra = system.off_gauge(step), first_extra + second_extra
        tangent = turned(v, step)
        second = approximate(rest, rtol=sweep, transpose=True)
        adjoint = refine(
            lambda r: approximate(r, rtol=sweep, transpose=True).value, system, g_y,
            transpose=True, rtol=rtol, guess=v + second.value, condition=second.condition, status=first.status,
        )  # fmt: skip
        back = system.off_gauge(tangent[1] - adjoint.residual)
        turn = approximate(back, rtol=rough, transpose=True)
        if solver.keeps:
            value_turned, _, last_extra = sharpened(back, turn.value, back, quality, transpose=True)
            turn, extra = turn._replace(value=value_turned), extra + last_extra
    else:
        adjoint = named[0].solve(named[1], system, g_y, transpose=True, rtol=rtol, guess=guess)
        step = solver.approximate(state, system, residual, rtol=rough)
        first = second = forward = step
        extra = 0
        step, quality = system.off_gauge(step.value), jnp.zeros((), flat.dtype)
        tangent = turned(system.off_gauge(adjoint.value), step)
        back = system.off_gauge(tangent[1] - adjoint.residual)
        turn = solver.approximate(state, system, back, rtol=rough, transpose=True)
    v = system.off_gauge(adjoint.value)
    coupling = pull_x(v)[0]
    gradient = trees.subtract(g_x, coupling)

    vector = trees.subtract(tangent[0], pull_x(system.off_gauge(turn.value))[0])
    condition = jnp.maximum(adjoint.condition, forward.condition)
    scale = trees.norm(g_x) + trees.norm(coupling)
    floor = (
        trees.coarsest(x, unravel(flat)) * jnp.where(jnp.isfinite(condition), condition, 1).astype(scale.dtype) * scale
    )
    finite = Status.where(trees.all_finite(gradient), Status(), Status("non_finite"))
    status = status.then(adjoint.status).then(forward.status).then(finite)
    touches = trees.norm(coupling) > 0
    return Estimate(
        flat=flat,
        value=value,
        refined=value - jnp.vdot(v, residual) - jnp.vdot(adjoint.residual - tangent[1] / 2, step),
        gradient=gradient,
        error=(trees.norm(vector) + floor).astype(flat.dtype),
        vector=vector,
        floor=floor.astype(flat.dtype),
        inner_residual=jnp.linalg.norm(residual),
        adjoint_residual=jnp.linalg.norm(adjoint.residual),
        adjoint=v,
        step=step,
        status=status,
        inner_touches_x=touches | (jnp.linalg.norm(v) == 0),
        contracted=jnp.asarray(True),
        quality=quality,
        eps=jnp.asarray(trees.coarsest(unravel(flat)), flat.dtype),
        unit=jnp.asarray(inner.unit_at(x, unravel(flat)), flat.dtype),
        smooth=inner.smooth_between(x, unravel(flat), unravel(flat - step)),
        evaluations=jnp.ones((), jnp.int32),
        products=(adjoint.products + first.products + second.products + 1 + extra).astype(jnp.int32),
    )


def _changes_along(system, outer, x, flat, value):
    """Whether G is another at a point moved along the gauge (its slope may vanish there at this y by accident), by
    more than the round-off of what as long a move off the gauge changes."""
    probe = jnp.cos(jnp.arange(1, flat.size + 1, dtype=flat.dtype))
    size = jnp.maximum(1, jnp.linalg.norm(flat))

    def change(way):
        length = jnp.linalg.norm(way)
        return jnp.abs(outer(x, flat + way * jnp.where(length > 0, size / length, 0)) - value)

    along, small = change(system.gauge(probe)), jnp.sqrt(jnp.finfo(flat.dtype).eps)
    visible = along > small * jnp.abs(value)
    return visible & lax.cond(visible, lambda: along > small * change(system.off_gauge(probe)), lambda: visible)


def _without_noise(problem, x, flat, unravel, value, g_y):
    """G_y, exactly zero where it is round-off of G_yy y: where G has its minimum at y* the adjoint solve is none."""

    def negligible():
        slope = jax.grad(lambda p: problem.outer(x, unravel(p)).astype(flat.dtype))
        scale = jnp.abs(jax.jvp(slope, (flat,), (flat,))[1])  # entry by entry: each is noise of its own terms
        return jnp.all(jnp.abs(g_y) <= 50 * jnp.finfo(flat.dtype).eps * scale)

    flat_here = jnp.linalg.norm(g_y) * jnp.linalg.norm(flat) <= 1e-6 * jnp.abs(value)  # seldom: ask what is noise
    return jnp.where(lax.cond(flat_here, negligible, lambda: jnp.asarray(False)), 0, g_y)


def evaluate_value(problem, x, flat, unravel, solver, state, *, at=None, rough=0.03) -> Estimate:
    """The same where G_y vanishes at y*: the gradient is G_x, and its error what G_x changes by along the step still
    to go. No adjoint system is solved (value-only path, derived in docs/theory)."""
    residual, system = linear_system(problem.inner, x, unravel(flat)) if at is None else at
    slope = jax.value_and_grad(lambda x, p: problem.outer(x, unravel(p)).astype(flat.dtype))
    (value, gradient), along = jax.linearize(lambda p: slope(x, p), flat)
    forward = solver.approximate(state, system, residual, rtol=rough)
    step = system.off_gauge(forward.value)
    condition = jnp.where(jnp.isfinite(forward.condition), forward.condition, 1)
    size = trees.norm(gradient)
    floor = (trees.coarsest(x, unravel(flat)) * condition.astype(size.dtype) * size).astype(flat.dtype)
    change, vector = along(step)
    given = jnp.isfinite(value) & trees.all_finite(gradient) & jnp.all(jnp.isfinite(residual))
    status = Status.where(given, Status(), Status("non_finite"))
    status = status.then(problem.inner.status_at(x, unravel(flat))).then(system.gauge_status).then(forward.status)
    zero = jnp.zeros((), flat.dtype)
    return Estimate(
        flat=flat,
        value=value,
        refined=value - change / 2,
        gradient=gradient,
        error=trees.norm(vector).astype(flat.dtype) + floor,
        vector=vector,
        floor=floor,
        inner_residual=jnp.linalg.norm(residual),
        adjoint_residual=zero,
        adjoint=jnp.zeros_like(flat),
        step=step,
        status=status,
        inner_touches_x=jnp.asarray(True),
        contracted=jnp.asarray(True),
        quality=_ratio(residual - system.mv(step), residual) if solver.keeps else zero,
        eps=jnp.asarray(trees.coarsest(unravel(flat)), flat.dtype),
        unit=jnp.asarray(problem.inner.unit_at(x, unravel(flat)), flat.dtype),
        smooth=problem.inner.smooth_between(x, unravel(flat), unravel(flat - step)),
        evaluations=jnp.ones((), jnp.int32),
        products=(forward.products + 1).astype(jnp.int32),
    )


def _ratio(a, b):
    size = jnp.linalg.norm(b)
    return jnp.where(size > 0, jnp.linalg.norm(a) / jnp.where(size > 0, size, 1), 0)


def _lagrangian_tangent(problem, x, y, v, step, low: bool):
    """The tangent of grad l along (0, step), l = G - v'F with v frozen: `(like x, flat)`."""
    flat = ravel_like(y, v.dtype)
    size = jnp.linalg.norm(step)
    scale = jnp.where(size > 0, size, 1)

    def tangent(inner, outer, x, y, v, unit):
        point, unravel = ravel(y)

        def lagrangian(x, point):
            y = unravel(point)
            pairing = jnp.vdot(v, ravel_like(inner.optimality(x, y), v.dtype))
            return outer(x, y).astype(v.dtype) - pairing

        return jax.jvp(lambda p: jax.grad(lagrangian, argnums=(0, 1))(x, p), (point,), (unit,))[1]

    arguments = (problem.inner, as_node(problem.outer), x, y, v, step / scale)
    if low and can_lower(tangent, *arguments):
        arguments = lowered(arguments)
    along_x, along_y = raised(tangent(*arguments), (x, flat))
    return jax.tree.map(lambda a: a * scale.astype(a.dtype), along_x), along_y * scale
