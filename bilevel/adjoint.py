"""The derivative rules: the only file that knows the implicit function theorem.

Formulas and their laws: docs/theory/hypergradients. In short, with F(x, y) = 0 the inner optimality, G the outer
function and F_y' v = G_y,

    Omega(x, y) = G_x - F_x' v,     dy*/dx = -F_y^-1 F_x,

and with l(x, y) = G - v'F (v frozen) the derivative of Omega in y along p is g_x - F_x' F_y^-T g_y, where
(g_x, g_y) is the tangent of grad l along (0, p).
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from . import _trees as trees
from ._precision import can_lower, lowered, raised
from ._trees import ravel, ravel_like
from .correct import AbstractCorrection, Newton, correct
from .errors import Status, meanings
from .linear import AbstractLinearSolver, MixedPrecision, both, choose, linear_system, refine
from .problem import as_node
from .reparametrize import AbstractReparametrization, in_coordinates

__all__ = ["AbstractAdjoint", "Estimate", "ImplicitAdjoint", "Target"]

_CHORDS = 8  # corrections with one factorization before a new one is made
_STALE = 0.3  # relative residual up to which a factorization from elsewhere may stand in for the one here
_CONTRACTION = 0.5  # residuals must fall at least by this factor for an error estimate to be trusted
UNUSABLE = (
    "singular",
    "not_a_minimum",
    "non_finite",
    "unbounded",
    "gauge_dependent",
    "degenerate_active_set",
)


class Target(NamedTuple):
    """The accuracy wanted of a hypergradient: converged means 3 error <= max(rtol |gradient|, atol); `aim` is the
    relative accuracy that this is expected to come to, by which the linear solves are first judged."""

    rtol: jax.Array
    atol: jax.Array
    aim: jax.Array

    def allows(self, gradient: PyTree, error: jax.Array) -> jax.Array:
        size = trees.norm(gradient)
        nothing = size == 0  # no dependence at all: exactly zero, and exactly right
        return (3 * error <= jnp.maximum(self.rtol.astype(size.dtype) * size, self.atol.astype(size.dtype))) | (
            nothing & (error == 0)
        )


class Estimate(NamedTuple):
    """A hypergradient at a point, with everything a caller needs to judge or to improve it."""

    flat: jax.Array  # the point used
    value: jax.Array
    gradient: PyTree
    error: jax.Array
    floor: jax.Array  # the share of `error` that is round-off
    inner_residual: jax.Array
    adjoint_residual: jax.Array
    adjoint: jax.Array  # v, flat
    residual: jax.Array  # F, flat
    step: jax.Array  # the Newton step still to go, flat
    status: Status
    inner_touches_x: jax.Array  # False where F_x' v is exactly zero although v is not
    contracted: jax.Array  # whether the correction lowered the residual
    quality: jax.Array  # how wrong the prepared state is at this point: relative residual of its own solutions
    evaluations: jax.Array  # of F
    products: jax.Array  # with F_y, those of a dense matrix included

    @property
    def usable(self) -> jax.Array:
        return usable(self.status) & jnp.isfinite(self.inner_residual)


def usable(status: Status) -> jax.Array:
    """Whether there is a y and an adjoint at all."""
    bad = [status.code == Status(word).code for word in UNUSABLE]
    return ~jnp.any(jnp.stack(bad), axis=0)


class AbstractAdjoint(eqx.Module):
    """Interface of a derivative rule.

    `estimate` gives the hypergradient at a point with its error; `differentiable` runs an inner solve and attaches
    the rule to its y.
    """

    @property
    def correction_used(self) -> AbstractCorrection | None:
        """The correction `solve` applies, once, after the solver."""
        return None

    @property
    def linear_solver_used(self) -> Any:
        """The linear solver asked for, or None."""
        return None

    @abc.abstractmethod
    def estimate(self, problem, x, y, *, target: Target | None = None, guess=None) -> Estimate:
        """The hypergradient at (x, y), y as it is up to the rule's own correction. Traced. With a `target`
        the rule may go on improving y by its own means."""

    @abc.abstractmethod
    def differentiable(self, inner, x, y0, work: Callable, *, throw: bool) -> tuple[PyTree, PyTree]:
        """`work(x, y0) -> (y, facts)` with y differentiable in x and in what the inner problem closes over."""


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
            found = plain.estimate(_Pair(inner, outer), x, z, target=target, guess=guess)
            _, unravel = ravel(z)
            flat, _ = ravel(back(x, unravel(found.flat)))
            return found._replace(flat=flat)
        return _estimate(self, problem, x, y, target, guess)

    def differentiable(self, inner, x, y0, work, *, throw):
        return implicit(inner, x, y0, work, self.linear_solver, throw=throw)


class _Pair(NamedTuple):
    inner: Any
    outer: Callable


# ------------------------------------------------------------------------------------------------ at a point


def _estimate(adjoint: ImplicitAdjoint, problem, x, y, target, guess) -> Estimate:
    inner = problem.inner
    flat, unravel = ravel(y)
    eps = float(jnp.finfo(flat.dtype).eps)
    solver = adjoint.solver_for(inner, x, y)
    correction = adjoint.correction
    newton = correction is not None and correction.uses_newton
    improving = newton and target is not None
    moved = correct(correction, solver, inner, x, flat, unravel, guard=adjoint.guard, loose=target is not None)
    if target is not None:
        rtol = jnp.clip(0.1 * target.aim, 10 * eps, 1e-3).astype(flat.dtype)
    elif correction is None:
        rtol = jnp.asarray(max(1e-10, 50 * eps), flat.dtype)
    else:  # order two needs an adjoint residual of the order of the squared inner error
        relative = moved.moved / jnp.maximum(jnp.linalg.norm(flat), jnp.finfo(flat.dtype).tiny)
        rtol = jnp.clip(0.01 * relative**2, 50 * eps, max(1e-6, 50 * eps)).astype(flat.dtype)
    here, at, extra, last = moved.flat, moved.at, jnp.zeros((), jnp.int32), moved.moved
    if improving and solver.keeps:
        here, extra, last = _descend(inner, x, unravel, solver, moved, target)
        at = None
    found = evaluate(problem, x, here, unravel, solver, moved.state, guess=guess, rtol=rtol, at=at)
    trusted = moved.settled | ~moved.used
    if newton:
        trusted = trusted | _contracts(found, last, solver)
    else:
        after = ravel_like(inner.optimality(x, unravel(found.flat - found.step)), flat.dtype)
        trusted = _tiny(found) | (jnp.linalg.norm(after) <= _CONTRACTION * found.inner_residual)
    untrusted = Status.where(trusted, Status(), Status("estimate_untrusted"))
    found = found._replace(
        status=found.status.then(moved.status).then(untrusted), evaluations=found.evaluations + extra
    )
    if improving:
        found = _chords(problem, x, unravel, solver, moved.state, found, target, rtol)
    inexact = (found.status.code == Status("correction_rejected").code) | (
        found.status.code == Status("estimate_untrusted").code
    )
    return found._replace(
        error=jnp.where(inexact, jnp.inf, found.error),
        evaluations=found.evaluations + moved.evaluations,
        products=found.products + moved.products,
        contracted=moved.used & (moved.after <= 0.9 * moved.before),
    )


def _contracts(found: Estimate, last: jax.Array, solver) -> jax.Array:
    """Whether the step still to go is clearly shorter than the last one taken, and is the right step: what an error
    estimate of first order rests on. A state prepared elsewhere must still solve with dF/dy of this point."""
    right = found.quality <= _STALE if solver.keeps else jnp.asarray(True)
    return (right & (jnp.linalg.norm(found.step) <= _CONTRACTION * last)) | _tiny(found)


def _tiny(found: Estimate) -> jax.Array:
    """Whether the step still to go is round-off."""
    eps = jnp.finfo(found.flat.dtype).eps
    return jnp.linalg.norm(found.step) <= 1e3 * eps * jnp.linalg.norm(found.flat)


def _descend(inner, x, unravel, solver, moved, target: Target):
    """Steps with the factorization there is while they pay: until the step is small against the accuracy wanted."""
    small = jnp.clip(target.aim.astype(moved.flat.dtype), 1e-12, 1e-3)
    residual, system = moved.at

    def step_at(residual, system):
        step = system.off_gauge(solver.approximate(moved.state, system, system.off_gauge(residual)).value)
        return jnp.where(jnp.all(jnp.isfinite(step)), step, 0)

    def unfinished(carry):
        point, size, last, step, count, _ = carry
        worth = jnp.linalg.norm(step) > small * jnp.linalg.norm(point)
        return worth & (size <= _CONTRACTION * last) & (count < 2 * _CHORDS)

    def body(carry):
        point, size, _, step, count, taken = carry
        new = point - step
        residual, system = linear_system(inner, x, unravel(new))
        new_size = jnp.linalg.norm(residual)
        lower = new_size < size
        new_step = jnp.where(lower, step_at(residual, system), 0)
        taken = jnp.where(lower, jnp.linalg.norm(step), taken)
        return jnp.where(lower, new, point), jnp.where(lower, new_size, size), size, new_step, count + 1, taken

    zero = jnp.zeros((), jnp.int32)
    start = (moved.flat, moved.after, moved.before, step_at(residual, system), zero, moved.moved)
    point, _, _, _, count, taken = lax.while_loop(unfinished, body, start)
    return point, count, taken


def _chords(problem, x, unravel, solver, state, found: Estimate, target: Target, rtol) -> Estimate:
    """Takes the step that the error estimate has computed anyway, with the factorization there is, while it helps."""

    def unfinished(carry):
        found, helps, count, _ = carry
        return ~target.allows(found.gradient, found.error) & helps & (count < _CHORDS)

    def body(carry):
        found, _, count, rtol = carry
        new = evaluate(problem, x, found.flat - found.step, unravel, solver, state, guess=found.adjoint, rtol=rtol)
        # where the step was round-off only the adjoint was in want
        lower = (new.inner_residual <= found.inner_residual) | _tiny(found)
        contracts = _contracts(new, jnp.linalg.norm(found.step), solver) | _tiny(found)
        helps = (new.error < 0.9 * found.error) & new.usable & lower & contracts
        new = new._replace(products=found.products + new.products, evaluations=found.evaluations + new.evaluations)
        return trees.where(helps, new, found), helps, count + 1, 0.1 * rtol

    trusted = found.status.code == 0
    found, *_ = lax.while_loop(unfinished, body, (found, trusted, jnp.asarray(0), 0.1 * rtol))
    return found


def evaluate(problem, x, flat, unravel, solver, state, *, guess, rtol, at=None) -> Estimate:
    """Omega at this very point, and the estimate of its error to first order in the step still to go.

    Two sweeps of approximate solves, each with the adjoint's right-hand side and one of the error estimate's side by
    side (one pass over the data serves both), and in between the adjoint's residual with the products of this point:
    v = v_0 + A^-T rho_0, and the error vector g_x - F_x' A^-T g_y, to which what remains of rho is added in norm.
    `at`: `(F, system)` of this point, where the caller has them.
    """
    inner = problem.inner
    eps = float(jnp.finfo(flat.dtype).eps)
    residual, system = linear_system(inner, x, unravel(flat)) if at is None else at

    def outer(x, flat):
        return problem.outer(x, unravel(flat)).astype(flat.dtype)

    value, (g_x, g_y) = jax.value_and_grad(outer, argnums=(0, 1))(x, flat)
    pull_x = jax.vjp(lambda x: ravel_like(inner.optimality(x, unravel(flat)), flat.dtype), x)[1]
    status = Status("converged")
    if system.gauge is not None:
        along, size = jnp.linalg.norm(system.gauge(g_y)), jnp.linalg.norm(g_y)
        slides = along > jnp.sqrt(eps) * size
        status = Status.where(slides, Status("gauge_dependent"), status)
    g_y = system.off_gauge(g_y)

    sweep = jnp.clip(jnp.sqrt(rtol), 1e-8, 0.03).astype(flat.dtype)
    rest = g_y if guess is None else g_y - system.rmv(guess)
    first, forward = both(solver, state, system, rest, sweep, system.off_gauge(residual))
    step = system.off_gauge(forward.value)
    v = first.value if guess is None else guess + first.value
    if system.symmetric:  # side by side: one pass over the data
        product, ahead = jax.vmap(system.mv)(jnp.stack([v, step]))
    else:
        product, ahead = system.rmv(v), system.mv(step)
    asked, rest = rest, g_y - product
    quality = jnp.maximum(_ratio(rest, asked), _ratio(system.off_gauge(residual) - ahead, residual))
    low = isinstance(solver, MixedPrecision)  # one digit will do: where float32 pays, this is the place for it
    tangent = _lagrangian_tangent(problem, x, unravel(flat), v, step, low)
    second, turn = both(solver, state, system, rest, sweep, system.off_gauge(tangent[1]))
    adjoint = refine(
        lambda r: solver.approximate(state, system, r, rtol=sweep, transpose=True).value, system, g_y,
        transpose=True, rtol=rtol, guess=v + second.value, condition=second.condition, status=first.status,
    )  # fmt: skip
    v = system.off_gauge(adjoint.value)
    coupling = pull_x(v)[0]
    gradient = trees.subtract(g_x, coupling)

    vector = trees.subtract(tangent[0], pull_x(system.off_gauge(turn.value))[0])
    # J'rho of the adjoint's last residual, from its effect in the second sweep and by how much it shrank since
    shrunk = _ratio(adjoint.residual, rest)
    left = trees.norm(pull_x(system.off_gauge(second.value))[0]).astype(flat.dtype) * shrunk
    condition = jnp.maximum(adjoint.condition, forward.condition)
    scale = trees.norm(g_x) + trees.norm(coupling)
    floor = eps * jnp.where(jnp.isfinite(condition), condition, 1).astype(scale.dtype) * scale
    finite = jnp.isfinite(value) & trees.all_finite(gradient) & jnp.all(jnp.isfinite(residual))
    finite = Status.where(finite, Status("converged"), Status("non_finite"))
    status = status.then(adjoint.status).then(forward.status).then(finite)
    touches = trees.norm(coupling) > 0
    return Estimate(
        flat=flat,
        value=value,
        gradient=gradient,
        error=(trees.norm(vector) + floor).astype(flat.dtype) + left,
        floor=floor.astype(flat.dtype),
        inner_residual=jnp.linalg.norm(residual),
        adjoint_residual=jnp.linalg.norm(adjoint.residual),
        adjoint=v,
        residual=residual,
        step=step,
        status=status,
        inner_touches_x=touches | (jnp.linalg.norm(v) == 0),
        contracted=jnp.asarray(True),
        quality=quality,
        evaluations=jnp.ones((), jnp.int32),
        products=(adjoint.products + first.products + second.products + 1).astype(jnp.int32),
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


# ------------------------------------------------------------------------------------------------ the rule


def implicit(inner, x, y0, work: Callable, linear_solver: Any, *, throw: bool) -> tuple[PyTree, PyTree]:
    """`work(x, y0) -> (y, facts)`, with dy = -F_y^-1 dF at the y returned; in every mode and any order.

    What the functions close over is hoisted into arguments first, so that derivatives flow to it as well.
    """
    solve, transposed = _closed_solves(inner, x, y0, linear_solver, throw=throw)
    inputs = (
        eqx.filter_closure_convert(work, x, y0),
        eqx.filter_closure_convert(lambda x, y: inner.optimality(x, y), x, y0),
        solve,
        transposed,
        x,
        y0,
    )
    return _implicit(inputs, symmetric=inner.symmetric)


def _closed_solves(inner, x, y0, linear_solver, *, throw: bool):
    """The solves with F_y and its transpose as functions `(x, y, b)` that close over nothing traced."""
    flat, _ = ravel(y0)

    def closed(transpose):
        return eqx.filter_closure_convert(
            lambda x, y, b: _solve_at(inner, x, y, b, linear_solver, transpose=transpose, throw=throw),
            x,
            y0,
            flat,
        )

    ahead = closed(False)
    return ahead, ahead if inner.symmetric else closed(True)


def _solve_at(inner, x, y, b, linear_solver, *, transpose: bool, throw: bool):
    """F_y(x, y)^-1 b by the linear solver asked for, to round-off; NaN (or an error) where there is no solution."""
    x, y = jax.tree.map(lax.stop_gradient, (x, y))
    solver = choose(linear_solver, inner, x, y)
    _, system = linear_system(inner, x, y)
    answer = solver.solve(solver.prepare(system), system, system.off_gauge(b), transpose=transpose)
    value = system.off_gauge(answer.value)
    if throw:
        texts = [f"bilevel.solve, derivative: {sentence}." for sentence in meanings()]
        bad = ~(answer.status == Status("converged"))
        return eqx.internal.branched_error_if(value, bad, answer.status.code, texts)
    return jnp.where(usable(answer.status), value, jnp.nan)


@eqx.filter_custom_jvp
def _implicit(inputs, *, symmetric):
    work, _, _, _, x, y0 = inputs
    return jax.tree.map(jnp.asarray, work(x, y0))


@_implicit.def_jvp
def _implicit_jvp(primals, tangents, *, symmetric):
    (inputs,), (t_inputs,) = primals, tangents
    _, optimality, solve, transposed, x, _ = inputs
    y, facts = _implicit(inputs, symmetric=symmetric)
    if jax.tree.leaves(t_inputs[5]):
        _warn_start()
    fixed, moving, t_moving = _split((optimality, x), (t_inputs[1], t_inputs[4]))
    if not jax.tree.leaves(t_moving):
        return (y, facts), jax.tree.map(lambda a: None, (y, facts))
    flat, unravel = ravel(y)

    def at_y(moving):
        function, x = eqx.combine(fixed, moving)
        return ravel_like(function(x, y), flat.dtype)

    t_residual = jax.jvp(at_y, (moving,), (t_moving,))[1]
    t_flat = solve_linear(optimality, solve, transposed, x, y, -t_residual, symmetric)
    return (y, facts), (unravel(t_flat), _refused(facts, jnp.sum(t_residual)))


def differentiable_estimate(problem, x, y0, work: Callable, adjoint: AbstractAdjoint) -> tuple[PyTree, PyTree]:
    """`work(x, y0) -> ((value, gradient, y), facts)`, whose value, gradient and y can be differentiated again.

    Their derivatives are those of h at the y returned: dvalue = the hypergradient, dgradient = the hyper-Hessian,
    dy = the implicit Jacobian, each by linear solves with F_y there.
    """
    solve, transposed = _closed_solves(problem.inner, x, y0, adjoint.linear_solver_used, throw=False)
    inputs = (
        eqx.filter_closure_convert(work, x, y0),
        eqx.filter_closure_convert(lambda x, y: problem.inner.optimality(x, y), x, y0),
        solve,
        transposed,
        x,
        y0,
        eqx.filter_closure_convert(lambda x, y: problem.outer(x, y), x, y0),
    )
    return _estimate_rule(inputs, symmetric=problem.inner.symmetric)


@eqx.filter_custom_jvp
def _estimate_rule(inputs, *, symmetric):
    return jax.tree.map(jnp.asarray, inputs[0](inputs[4], inputs[5]))


@_estimate_rule.def_jvp
def _estimate_rule_jvp(primals, tangents, *, symmetric):
    (inputs,), (t_inputs,) = primals, tangents
    _, optimality, solve, transposed, x, _, outer = inputs
    result, facts = _estimate_rule(inputs, symmetric=symmetric)
    if jax.tree.leaves(t_inputs[5]):
        _warn_start()
    fixed, moving, t_moving = _split((optimality, outer, x), (t_inputs[1], t_inputs[6], t_inputs[4]))
    if not jax.tree.leaves(t_moving):
        return (result, facts), jax.tree.map(lambda a: None, (result, facts))
    here = lax.stop_gradient(result[2])
    flat, _ = ravel(here)

    def at_solution(moving):
        optimality, outer, x = eqx.combine(fixed, moving)
        y, _ = _implicit((_as_it_is, optimality, solve, transposed, x, here), symmetric=symmetric)
        value, (g_x, g_y) = jax.value_and_grad(outer, argnums=(0, 1))(x, y)
        g_y = ravel_like(g_y, flat.dtype)
        v = solve_linear(optimality, solve, transposed, x, y, g_y, symmetric, transpose=True)
        pull = jax.vjp(lambda x: ravel_like(optimality(x, y), flat.dtype), x)[1]
        return value.astype(result[0].dtype), trees.subtract(g_x, pull(v)[0]), y

    t_result = jax.jvp(at_solution, (moving,), (t_moving,))[1]
    probe = t_result[0]
    return (result, facts), (t_result, _refused(facts, probe))


def _as_it_is(x, y):
    return y, ()


def _split(primals, tangents):
    """`(fixed, moving, tangents)`: what has no tangent apart from what has."""
    absent = jax.tree.map(lambda t: t is None, tangents, is_leaf=lambda t: t is None)
    fixed, moving = eqx.partition(primals, absent, is_leaf=lambda t: t is None)
    return fixed, moving, tangents


def _refused(facts, probe):
    return jax.tree.map(lambda a: _refuse(a, probe) if jnp.issubdtype(a.dtype, jnp.inexact) else None, facts)


def solve_linear(optimality, solve, transposed, x, y, b, symmetric: bool, *, transpose: bool = False):
    """F_y(x, y)^-1 b as an operation that can be differentiated and transposed any number of times."""
    flat, unravel = ravel(y)

    def function(point):
        return ravel_like(optimality(x, unravel(point)), flat.dtype)

    def product(v):
        return jax.jvp(function, (flat,), (v,))[1]

    def product_transposed(v):
        return jax.vjp(function, flat)[1](v)[0]

    ahead, back = (lambda _, b: solve(x, y, b)), (lambda _, b: transposed(x, y, b))
    if transpose and not symmetric:
        product, ahead, back = product_transposed, back, ahead
    return lax.custom_linear_solve(product, b, ahead, back, symmetric=symmetric)


def _refuse(like: jax.Array, probe: jax.Array) -> jax.Array:
    """The tangent of a number that reports on a computation: NaN forward, an error backward; never a silent zero."""

    def forward(_, t):
        return jnp.full_like(t, jnp.nan)

    def backward(_, ct):
        return eqx.error_if(jnp.zeros_like(ct), ct != 0, _NO_DERIVATIVE)

    t = lax.custom_linear_solve(lambda v: v, probe, forward, backward)
    return jnp.broadcast_to(t, like.shape).astype(like.dtype)


_NO_DERIVATIVE = (
    "bilevel: the residual and error fields of a result report on the computation and have no derivative; "
    "differentiate .y, .value, .gradient or .aux."
)


_warned_start = False


def _warn_start() -> None:
    global _warned_start
    if not _warned_start:
        import warnings

        _warned_start = True
        warnings.warn(
            "bilevel: the starting point y0 is being differentiated. The solution of the inner problem does not depend "
            "on where the solver starts, so its derivative in y0 is exactly zero (said once).",
            stacklevel=2,
        )
