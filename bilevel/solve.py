"""solve(inner, x, …): the differentiable map x -> y."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from . import _precision as precision
from ._compiling import held
from ._entry import check_tolerance, finish, prepare_inner
from ._trees import ravel, ravel_like
from .adjoint import NEARER, AbstractAdjoint, ImplicitAdjoint, near, usable
from .correct import correct
from .errors import Status
from .linear import choose, first_reduction, linear_system
from .problem import AbstractInner
from .solvers import resolve

__all__ = ["Solution", "solve"]

ROUNDS = 16


class Solution(eqx.Module):
    """What `solve` found. `y`, `aux` and `multipliers` (of a `Constrained` problem) are
    differentiable; the rest reports on the computation.

    `residual`: |F(x, y)|_2; `steps`: of the inner solver; `converged`: the accuracy asked for was reached;
    `status`: why it ended.
    """

    y: PyTree
    residual: Float[Array, "*batch"]
    steps: Int[Array, "*batch"]
    converged: Bool[Array, "*batch"]
    status: Status
    aux: PyTree = None
    multipliers: PyTree = None

    def __repr__(self):
        return (
            f"Solution(status={self.status}, residual={_number(self.residual)}, steps={_number(self.steps)}, "
            f"y={eqx.tree_pformat(self.y)})"
        )


def _number(a) -> str:
    if isinstance(a, jax.core.Tracer) or jnp.ndim(a) > 0:
        return eqx.tree_pformat(a)
    return f"{a.item():.3g}" if jnp.issubdtype(a.dtype, jnp.floating) else str(a.item())


class Attempt(NamedTuple):
    """One round's outcome, as `rounds` needs it: the point, |F| there, whether the target was met, whether the
    point was improved by a Newton step (then another one is tried before the solver), how much smaller |F| should
    get, the caller's own `found`, the evaluations and products it took, and whether it is worth the solver's steps
    (else the rounds end where Newton steps do)."""

    flat: jax.Array
    residual: jax.Array
    reached: jax.Array
    newton: jax.Array
    factor: jax.Array
    found: PyTree
    evaluations: jax.Array
    products: jax.Array
    worth_solving: jax.Array


class Rounds(NamedTuple):
    found: PyTree
    reached: jax.Array
    steps: jax.Array
    evaluations: jax.Array
    products: jax.Array


def rounds(
    attempt: Callable, inner, x: PyTree, y0: PyTree, solver: Any, *, max_steps: int, newton_first: bool,
    wanted: Any = None,
) -> Rounds:  # fmt: skip
    """Loose inner solve (to |F| = `wanted`, where that is known), attempt, and only if the attempt says so: further.

    After an attempt whose Newton step worked, the next round goes on from its point without the solver; after one
    that was refused, the solver goes on to a smaller residual. The loop ends when the target is reached, when
    neither helps any more (`stalled`), or after `max_steps` steps of the solver.
    """
    who = resolve(solver, inner)
    low = solver is None and inner.default_solver is None and precision.worth_lowering(inner, x, y0)
    flat, unravel = ravel(y0)
    begin = precision.lowered((inner, x, y0)) if low else (inner, x, y0)
    big = jnp.asarray(jnp.inf, flat.dtype)
    if wanted is None:
        size0 = jnp.linalg.norm(ravel_like(begin[0].optimality(*begin[1:]), flat.dtype))
        tol = big if newton_first else first_reduction(inner, x, y0) * size0
    else:  # the solver will see whether y0 is good enough
        size0, tol = big, wanted.astype(flat.dtype)
    traced: Any = eqx.filter_closure_convert(attempt, y0)  # once: its shapes are asked for before it is run
    empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), traced.out_struct)
    zero = jnp.zeros((), jnp.int32)
    start = (flat, tol, size0, empty, zero, zero, zero, zero, jnp.asarray(False))

    def unfinished(carry):
        _, _, _, last, count, steps, *_, stalled = carry
        return (count == 0) | (~last.reached & (count < ROUNDS) & (steps < max_steps) & ~stalled)

    def body(carry):
        point, tol, size, last, count, steps, evaluations, products, _ = carry
        ask = (size > tol) | ~jnp.isfinite(size)
        if who.exact:  # asked once; what is left is the correction's
            ask = count == 0
        else:
            ask = ask & (steps < max_steps)

        def run_with(inner, x, y):
            found = who.find(inner, x, y, tol=tol, max_steps=max_steps)
            return ravel_like(found.y, flat.dtype), found.steps.astype(jnp.int32), found.evaluations.astype(jnp.int32)

        def run(point):
            full = lambda point: run_with(inner, x, unravel(point))
            if not low:
                return full(point)
            loose = lambda point: run_with(*precision.lowered((inner, x, unravel(point))))
            return lax.cond(tol > 2e-6 * size0, loose, full, point)

        nothing = jnp.zeros((), jnp.int32)
        new, did, spent = lax.cond(ask, run, lambda point: (point, nothing, nothing), point)
        here, new = held(traced, new)
        new_attempt = here(unravel(new))
        progress = new_attempt.residual < 0.9 * size
        asked_in_vain = ask & (did <= 1) & ~progress & (count > 0)
        # a refused Newton step says nothing about the solver: it gets its turn first
        stalled = jnp.where(ask, asked_in_vain | (~progress & (count > 1)), jnp.asarray(False))
        stalled = stalled | (jnp.asarray(who.exact) & (count > 0) & ~progress)
        again = new_attempt.newton & progress
        stalled = stalled | ~(again | new_attempt.worth_solving)
        goal = new_attempt.factor * new_attempt.residual
        next_tol = jnp.where(again, big, jnp.minimum(goal, jnp.where(jnp.isfinite(tol), tol, goal)))
        return (
            new_attempt.flat, next_tol, new_attempt.residual, new_attempt, count + 1,
            steps + did, evaluations + spent + new_attempt.evaluations, products + new_attempt.products, stalled,
        )  # fmt: skip

    _, _, _, last, _, steps, evaluations, products, _ = lax.while_loop(unfinished, body, start)
    return Rounds(last.found, last.reached, steps, evaluations, products)


class _Located(NamedTuple):
    flat: jax.Array
    residual: jax.Array
    at_floor: jax.Array  # the error left is round-off
    status: Status
    accepted: jax.Array  # what `solve` promises is kept; `Attempt.reached` may want more, as long as it can be had


def _locate(inner, x, y, adjoint: AbstractAdjoint, rtol, atol, wanted) -> Attempt:
    """Corrects y once and measures what is left by the next Newton step. Where |F| is what is `wanted` and the Newton
    step from y itself is short enough, y stays."""
    if wanted is None:
        return _corrected(inner, x, y, adjoint, rtol, atol)
    flat, _ = ravel(y)
    solver = choose(adjoint.linear_solver_used, inner, x, y, loose=True)
    residual, system = linear_system(inner, x, y)
    size, status = jnp.linalg.norm(residual), system.gauge_status.then(inner.status_at(x, y))
    no = jnp.asarray(False)

    # not in a branch of its own, where what F has computed already would be computed again
    rough = solver.once(system, residual)
    fine = (size <= wanted) & (status.code == 0) & usable(rough.status)
    left = jnp.where(fine, system.off_gauge(rough.value), jnp.inf)
    unit = jnp.maximum(jnp.linalg.norm(system.off_gauge(flat)), inner.unit_at(x, y))
    there = (jnp.linalg.norm(left) <= jnp.maximum(rtol * unit, atol)) & near(inner, x, y, left, NEARER)
    corrected = eqx.filter_closure_convert(lambda y: _corrected(inner, x, y, adjoint, rtol, atol), y)
    located = _Located(flat, size, no, status, ~no)
    found = Attempt(flat, size, ~no, no, jnp.zeros_like(size), located, jnp.asarray(1), jnp.asarray(0), no)
    found = jax.tree.map(lambda a, like: a.astype(like.dtype), found, corrected.out_struct)
    return lax.cond(there, lambda: found, lambda: corrected(y))


def _corrected(inner, x, y, adjoint: AbstractAdjoint, rtol, atol) -> Attempt:
    flat, unravel = ravel(y)
    eps = jnp.finfo(flat.dtype).eps
    solver = choose(adjoint.linear_solver_used, inner, x, y, loose=True)
    moved = correct(adjoint.correction_used, solver, inner, x, flat, unravel, loose=True)
    y_hat = unravel(moved.flat)
    residual, system = linear_system(inner, x, y_hat)
    rough = solver.approximate(moved.state, system, residual)
    step = system.off_gauge(rough.value)
    own = inner.size_of_error(x, y_hat, unravel(residual), unravel(step))
    if own is None:  # along a gauge y has a size, and its round-off, but no error
        error, scale, size = (jnp.linalg.norm(a) for a in (step, system.off_gauge(moved.flat), moved.flat))
    else:
        error, scale = own
        size = scale
    allowed = jnp.maximum(rtol * scale, atol).astype(flat.dtype)
    floor = 4 * eps * jnp.where(jnp.isfinite(rough.condition), rough.condition, 1) * size
    finite = Status.where(jnp.isfinite(moved.before), Status(), Status("non_finite"))
    status = finite.then(system.gauge_status).then(rough.status).then(moved.status).then(inner.status_at(x, y_hat))
    fine = usable(status) & jnp.isfinite(error)
    contracted = (moved.after <= 0.5 * moved.before) & moved.used
    accepted = fine & (error <= allowed) & inner.smooth_between(x, y_hat, unravel(moved.flat - step))
    reached = accepted & near(inner, x, y_hat, step, NEARER)
    newton = adjoint.correction_used is not None and adjoint.correction_used.uses_newton
    factor = jnp.clip(0.3 * allowed / jnp.where(error > 0, error, 1), 1e-4, 0.1)
    factor = jnp.where(fine, factor, 0.1)
    at_floor = fine & (error <= 10 * floor)
    located = _Located(moved.flat, moved.after, at_floor, status, accepted)
    again = jnp.asarray(newton) & contracted
    evaluations, products = moved.evaluations + 1, moved.products + rough.products.astype(jnp.int32)
    worth = ~(accepted | (at_floor & (allowed <= floor)))  # steps do not lower round-off
    return Attempt(moved.flat, moved.after, reached, again, factor, located, evaluations, products, worth)


@precision.full_products()
def solve(
    inner: AbstractInner | Callable,
    x: PyTree,
    y0: PyTree,
    *,
    solver: Any = None,
    adjoint: AbstractAdjoint | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
    max_steps: int = 2000,
    throw: bool = True,
) -> Solution:
    """The inner solution y*(x), differentiable in x and in whatever the inner functions close over.

    **Arguments:** `inner`: an inner problem, or a function `(x, y) -> scalar` to minimize over y. `x`, `y0`: any
    trees of floating arrays; y0 is where the solver starts and fixes structure, shapes and dtypes of y. `solver`:
    None (the inner problem's own, else Newton steps where they work and jaxopt's L-BFGS where they do not), an
    object of `bilevel.solvers`, an optimistix solver, a jaxopt class, or a function `x -> y`. `adjoint`: the
    derivative rule, `ImplicitAdjoint()`. `rtol`, `atol`: bound the estimated |y - y*|_2 against |y|_2 (defaults:
    1e-10 in float64, 1e-5 in float32). `max_steps`: steps of the solver in all.

    **Returns:** a `Solution`; `.y` is the corrected point, at which the derivative rule is taken.

    **Raises:** TypeError, ValueError for arguments that do not fit; `NotConverged` (inside a transformation: a
    run-time error with the same text) unless `throw=False`; then `.converged` and `.status` say it, and y is NaN
    where there is none.
    """
    inner, x, y0 = prepare_inner("solve", inner, x, y0)
    dtype = ravel(y0)[0].dtype
    rtol = (1e-10 if jnp.finfo(dtype).bits >= 64 else 1e-5) if rtol is None else rtol
    check_tolerance("solve", rtol, atol, max_steps)
    adjoint = ImplicitAdjoint() if adjoint is None else adjoint
    if not isinstance(adjoint, AbstractAdjoint):
        raise TypeError(
            f"bilevel.solve: adjoint must be a derivative rule such as ImplicitAdjoint(), found {adjoint!r}."
        )
    solution = _solve(
        inner, x, y0, solver, adjoint, jnp.asarray(rtol, dtype), jnp.asarray(atol, dtype), max_steps, throw
    )
    return finish("solve", solution, solution.converged, solution.status, throw, inner, x, y0)


@eqx.filter_jit
def _solve(inner, x, y0, solver, adjoint, rtol, atol, max_steps, throw) -> Solution:
    newton = adjoint.correction_used is not None and adjoint.correction_used.uses_newton
    default = solver is None and inner.default_solver is None
    first = newton and default and not precision.worth_lowering(inner, x, y0)

    def work(x, y0):
        wanted = inner.residual_wanted(x, rtol, atol)
        with precision.hoisted(inner if precision.worth_lowering(inner, x, y0) else ()):
            out = rounds(
                lambda y: _locate(inner, x, y, adjoint, rtol, atol, wanted), inner, x, y0, solver,
                max_steps=max_steps, newton_first=first, wanted=wanted,
            )  # fmt: skip
        found = out.found
        reached = found.accepted
        _, unravel = ravel(y0)
        status = outcome(found.status, reached, found.at_floor, out.steps >= max_steps, max_steps)
        here = usable(found.status) & jnp.all(jnp.isfinite(found.flat))
        y = jax.tree.map(lambda a: jnp.where(here, a, jnp.nan), unravel(found.flat))
        return y, (found.residual, out.steps, reached, status)

    y, (residual, steps, reached, status) = adjoint.differentiable(inner, x, y0, work, throw=throw)
    return Solution(y, residual, steps, reached, status, inner.aux_at(x, y), inner.multipliers_at(x, y))


_FEW = 20  # solver steps, of which running out says more than what the matrix looks like there


def outcome(status: Status, reached, at_floor, exhausted, max_steps: int) -> Status:
    """The final word: what makes a result unusable first, then whether the target was met, then why not."""
    why = Status.where(at_floor, Status("round_off"), Status("max_steps"))
    # where the solver had steps left, what stopped the correction is the reason
    why = Status.where((status.code == 0) | exhausted | at_floor, why, status)
    final = Status.where(reached, Status("converged"), why)
    cut_short = exhausted & ~reached & (max_steps < _FEW)
    return Status.where(usable(status) | cut_short, final, status)
