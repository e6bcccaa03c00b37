"""Implicit differentiation at a corrected point."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from .. import _trees as trees
from .._compiling import held
from .._trees import ravel, ravel_like
from ..correct import AbstractCorrection, Newton, correct
from ..errors import Status
from ..linear import AbstractLinearSolver, choose, linear_system
from ..reparametrize import AbstractReparametrization, in_coordinates
from ._base import AbstractAdjoint, Estimate, Target, usable
from ._evaluate import evaluate, evaluate_value
from ._rule import implicit

_CHORDS = 8  # corrections with one factorization before a new one is made
_STALE = 0.3  # relative residual up to which a factorization from elsewhere may stand in for the one here
_LOOSE = 0.1  # relative residual of a Newton step that others may follow: |F| seldom falls further where F is curved
_SLOW = 0.9  # fall of |F| up to which they are worth taking: each costs a fraction of an evaluation
_CONTRACTION = 0.5  # residuals must fall at least by this factor for an error estimate to be trusted


class ImplicitAdjoint(AbstractAdjoint):
    """The implicit function theorem at the corrected point. Error O(e^2) in the inner error e with the default
    correction `Newton()`, O(e) without one (Ye, Peyré, Cremers, Ablin 2024; derived in docs/theory).

    **Arguments:** `linear_solver`: None (dense up to a measured size, then matrix-free), `Direct()`,
    `ConjugateGradient()`, `Krylov()`, `Neumann(terms)`, or any lineax solver. `correction`: `Newton()`, `Jacobi()`,
    `Preconditioner(solve)`, or None: plain implicit differentiation. `reparametrization`: coordinates z in which the
    rule is applied, y = phi(x, z). `guard`: a correction that does not lower |F| is not used, and `.status` says so.
    """

    linear_solver: Any = None
    correction: AbstractCorrection | None = Newton()
    reparametrization: AbstractReparametrization | None = None
    guard: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        if self.correction is not None and not isinstance(self.correction, AbstractCorrection):
            raise TypeError(
                f"bilevel.ImplicitAdjoint: correction must be Newton(), Jacobi(), Preconditioner(solve) or None, "
                f"found {self.correction!r}."
            )
        if self.reparametrization is not None and not isinstance(self.reparametrization, AbstractReparametrization):
            raise TypeError(
                f"bilevel.ImplicitAdjoint: reparametrization must be a bilevel reparametrization such as Exp(), found "
                f"{self.reparametrization!r}."
            )

    @property
    def correction_used(self):
        return self.correction

    @property
    def linear_solver_used(self):
        return self.linear_solver

    def solver_for(self, inner, x, y) -> AbstractLinearSolver:
        """The linear solver this rule uses for an inner problem at (x, y)."""
        return choose(self.linear_solver, inner, x, y, loose=True)

    def estimate(self, problem, x, y, *, target=None, guess=None):
        if self.reparametrization is not None:
            inner, outer, z, back = in_coordinates(problem.inner, problem.outer, self.reparametrization, x, y)
            plain = eqx.tree_at(lambda a: a.reparametrization, self, None, is_leaf=lambda a: a is None)
            found = plain.estimate(_Pair(inner, outer, problem.value_only), x, z, target=target, guess=guess)
            _, unravel = ravel(z)
            flat, _ = ravel(back(x, unravel(found.flat)))
            return found._replace(flat=flat)
        return _estimate(self, problem, x, y, target, guess)

    def differentiable(self, inner, x, y0, work, *, throw):
        return implicit(inner, x, y0, work, self.linear_solver, throw=throw)


class LinearizedAdjoint(AbstractAdjoint):
    """Omega(x, y) - Omega_y(x, y) s at the y given, s the Newton step: order two in the inner error with one matrix.

    y is not moved, and F, G and the matrix are evaluated at y alone; what is subtracted is the vector whose norm the
    error estimate of plain differentiation is (derived in docs/theory, "A moved evaluation point"). `.error` is that
    norm still, the size of what was subtracted: asymptotically an upper bound, so `hypergradient` with this rule does
    the work of a plain one and returns more than it promises. Exact where Omega is affine in y.

    **Arguments:** `linear_solver`: as for `ImplicitAdjoint`.
    """

    linear_solver: Any = None

    @property
    def linear_solver_used(self):
        return self.linear_solver

    def estimate(self, problem, x, y, *, target=None, guess=None):
        rough = 100 * float(jnp.finfo(ravel(y)[0].dtype).eps)  # what is subtracted must be right to order two
        plain = ImplicitAdjoint(self.linear_solver, correction=None)
        found = _estimate(plain, problem, x, y, target, guess, rough=rough)
        return found._replace(gradient=trees.subtract(found.gradient, found.vector))

    def differentiable(self, inner, x, y0, work, *, throw):
        return implicit(inner, x, y0, work, self.linear_solver, throw=throw)


class _Pair(NamedTuple):
    inner: Any
    outer: Callable
    value_only: bool = False


def _estimate(adjoint: ImplicitAdjoint, problem, x, y, target, guess, rough: float | None = None) -> Estimate:
    inner = problem.inner
    flat, unravel = ravel(y)
    eps = float(jnp.finfo(flat.dtype).eps)
    solver = adjoint.solver_for(inner, x, y)
    correction = adjoint.correction
    newton = correction is not None and correction.uses_newton
    improving = newton and target is not None
    goal: Any = target
    if rough is None:
        rough = 1e-3 if target is None else 0.03
    forcing = 1e-3 if target is None else jnp.clip(target.aim, 1e-3, 1e-2)
    stepwise = improving and not solver.keeps and not solver.limited and goal.step is not None
    if stepwise:  # more steps follow where they are wanted: none is solved further than it goes
        known: Any = goal.step
        forcing = jnp.where(jnp.isfinite(known), _LOOSE, forcing)
    moved = correct(
        correction, solver, inner, x, flat, unravel, guard=adjoint.guard, loose=target is not None, forcing=forcing
    )
    if target is not None:
        rtol = jnp.clip(0.2 * target.aim, 10 * eps, 1e-3).astype(flat.dtype)
    elif correction is None:
        rtol = jnp.asarray(max(1e-10, 50 * eps), flat.dtype)
    else:  # order two needs an adjoint residual of the order of the squared inner error
        relative = moved.moved / jnp.maximum(jnp.linalg.norm(flat), jnp.finfo(flat.dtype).tiny)
        rtol = jnp.clip(1e-3 * relative**2, 50 * eps, max(1e-6, 50 * eps)).astype(flat.dtype)
    named = None
    helper, prepared = solver, moved.state
    if solver.limited:  # the estimate of what its limits do needs a solver without them
        named, helper = (solver, moved.state), choose(None, inner, x, y)
        prepared = helper.prepare(moved.at[1])
    here, at, extra, last = moved.flat, moved.at, jnp.zeros((), jnp.int32), moved.moved
    more = jnp.zeros((), jnp.int32)
    if improving and (solver.keeps or stepwise):
        here, extra, last, more = _descend(inner, x, unravel, solver, moved, goal)
        at = None
    judge = lambda found: _judge(found, moved, last, newton, helper, inner, x, unravel, limited=named is not None)
    if problem.value_only and newton:  # without Newton's step the adjoint's is the one solve, and worth an order
        found = evaluate_value(problem, x, here, unravel, helper, prepared, at=at, rough=rough)
        found = found._replace(status=judge(found))
    elif improving:
        evaluated = functools.partial(
            evaluate, problem, x, unravel=unravel, solver=helper, state=prepared, named=named, rough=0.1
        )
        found = _improve(evaluated, here, helper, guess, judge, goal, rtol)
    else:
        found = evaluate(
            problem, x, here, unravel, helper, prepared, guess=guess, rtol=rtol, at=at, named=named, rough=rough
        )
        found = found._replace(status=judge(found))
    found = found._replace(evaluations=found.evaluations + extra, products=found.products + more)
    inexact = (found.status.code == Status("correction_rejected").code) | (
        found.status.code == Status("estimate_untrusted").code
    )
    # a refused correction may have been evaluated at the refused point: what is reported is y
    return found._replace(
        inner_residual=jnp.where(moved.used, found.inner_residual, moved.before),
        error=jnp.where(inexact, jnp.inf, found.error),
        evaluations=found.evaluations + moved.evaluations,
        products=found.products + moved.products,
        contracted=moved.used & (moved.after <= 0.9 * moved.before),
    )


def _judge(found: Estimate, moved, last, newton: bool, solver, inner, x, unravel, limited: bool) -> Status:
    """The status of a first evaluation: its own trouble, the correction's, or that its error is not to be trusted."""
    trusted = moved.settled | ~moved.used
    if newton:
        trusted = trusted | _contracts(found, last, solver)
    else:
        after = ravel_like(inner.optimality(x, unravel(found.flat - found.step)), found.flat.dtype)
        trusted = _tiny(found) | (jnp.linalg.norm(after) <= _CONTRACTION * found.inner_residual)
    untrusted = Status.where(trusted, Status(), Status("estimate_untrusted"))
    own = found.status
    if solver.keeps and not limited:  # a factorization does not stop short: it was made too far away
        stale = (own.code == Status("linear_solve").code) & (found.quality > 100 * found.eps)  # else: round-off
        own = Status.where(stale, Status("estimate_untrusted"), own)
    status = own.then(moved.status).then(untrusted)
    # another piece of a nonsmooth F: what was prepared at y says nothing here, not even why a solve stopped short
    crossed = ~inner.smooth_between(x, unravel(moved.start), unravel(found.flat)) & usable(status) & ~moved.settled
    return Status.where(crossed & moved.used, Status("estimate_untrusted"), status)


def _contracts(found: Estimate, last: jax.Array, solver) -> jax.Array:
    """Whether the step still to go is clearly shorter than the last one taken, and is the right step: what an error
    estimate of first order rests on. A state prepared elsewhere must still solve with dF/dy of this point."""
    right = found.quality <= _STALE if solver.keeps else jnp.asarray(True)
    right = right & found.smooth
    return (right & (jnp.linalg.norm(found.step) <= _CONTRACTION * last)) | _tiny(found)


def _tiny(found: Estimate) -> jax.Array:
    """Whether the step still to go is round-off."""
    return jnp.linalg.norm(found.step) <= 1e3 * found.eps * jnp.maximum(jnp.linalg.norm(found.flat), found.unit)


def _descend(inner, x, unravel, solver, moved, target: Target):
    """Further Newton steps while they pay: `(point, evaluations of F, length of the last step, products)`. A
    factorization that is kept gives each at once, and they end where one is short against the accuracy wanted. Without
    one a step takes products, and is taken where the one still to go, guessed from how |F| fell, is longer than what
    the target says will do."""
    small = jnp.clip(target.aim.astype(moved.flat.dtype), 1e-12, 1e-3)
    enough: Any = target.step
    residual, system = moved.at
    zero = jnp.zeros((), jnp.int32)

    def solved(residual, system, rtol):
        found = solver.approximate(moved.state, system, residual, rtol=rtol)
        step = system.off_gauge(found.value)
        return jnp.where(jnp.all(jnp.isfinite(step)), step, 0), jnp.asarray(found.products, jnp.int32)

    def propose(point, residual, system, size, last, taken, lower):
        """The next step, whether to take it, and the products it took."""
        if solver.keeps:
            step, products = solved(residual, system, 0.03)
            worth = jnp.linalg.norm(step) > small * jnp.linalg.norm(point)
            return step, lower & (size <= _CONTRACTION * last) & worth, products
        fall = size / jnp.where(last > 0, last, 1)  # that of the next step is its square, at best
        ahead = taken * fall
        go = lower & (fall <= _SLOW) & (ahead > enough)
        wanted = 0.5 * enough / jnp.where(ahead > 0, ahead, 1)
        rtol = jnp.clip(jnp.maximum(wanted, 0.5 * fall**2), 1e-3, _LOOSE)
        step, products = lax.cond(
            go, lambda: solved(residual, system, rtol), lambda: (jnp.zeros_like(point), jnp.zeros_like(zero))
        )
        return step, go, products

    def unfinished(carry):
        *_, go, count, _ = carry
        return go & (count < 2 * _CHORDS)

    def body(carry):
        point, size, step, taken, _, count, products = carry
        new = point - step
        residual, system = linear_system(inner, x, unravel(new))
        new_size = jnp.linalg.norm(residual)
        lower = new_size < size
        taken = jnp.where(lower, jnp.linalg.norm(step), taken)
        next_step, go, spent = propose(new, residual, system, new_size, size, taken, lower)
        point, size = jnp.where(lower, new, point), jnp.where(lower, new_size, size)
        return point, size, next_step, taken, go, count + 1, products + spent

    step, go, products = propose(
        moved.flat, residual, system, moved.after, moved.before, moved.moved, jnp.asarray(True)
    )
    start = (moved.flat, moved.after, step, moved.moved, go, zero, products)
    point, _, _, taken, _, count, products = lax.while_loop(unfinished, body, start)
    return point, count, taken, products


def _improve(evaluated: Callable, here, solver, guess, judge, target: Target, rtol) -> Estimate:
    """Evaluates, and then takes the step that the error estimate has computed anyway, with the factorization there is,
    while that helps. One loop, so that the evaluation is compiled (and traced) once."""
    start = jnp.zeros_like(here) if guess is None else guess
    at: Any = eqx.filter_closure_convert(
        lambda flat, v, rtol: evaluated(flat=flat, guess=v, rtol=rtol), here, start, rtol
    )
    empty = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), at.out_struct)
    empty = empty._replace(flat=here, adjoint=start)

    def unfinished(carry):
        found, helps, count, _ = carry
        enough = target.allows(found.gradient, found.error)
        return (count == 0) | (~enough & helps & (count < _CHORDS))

    def body(carry):
        found, _, count, rtol = carry
        first = count == 0
        point = found.flat - found.step  # no step before the first evaluation
        here, point = held(at, point)
        new = here(point, found.adjoint, rtol)
        # where the step was round-off only the adjoint was in want
        lower = (new.inner_residual <= found.inner_residual) | _tiny(found)
        contracts = _contracts(new, jnp.linalg.norm(found.step), solver) | _tiny(found)
        helps = (new.error < 0.9 * found.error) & new.usable & lower & contracts
        status = judge(new)
        new = new._replace(
            status=Status.where(first, status, new.status),
            products=found.products + new.products,
            evaluations=found.evaluations + new.evaluations,
        )
        helps = jnp.where(first, status.code == 0, helps)
        return trees.where(first | helps, new, found), helps, count + 1, 0.1 * rtol

    found, *_ = lax.while_loop(unfinished, body, (empty, jnp.asarray(True), jnp.asarray(0), rtol))
    return found
