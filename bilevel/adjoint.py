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
from ._trees import ravel, ravel_like
from .correct import AbstractCorrection, Newton, correct
from .errors import Status, meanings
from .linear import AbstractLinearSolver, choose, linear_system
from .reparametrize import AbstractReparametrization, in_coordinates

__all__ = ["AbstractAdjoint", "Estimate", "ImplicitAdjoint", "Target"]

_CHORDS = 8  # corrections with one factorization before a new one is made
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
    contracted: jax.Array  # whether the correction at least halved the residual
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
    def estimate(self, problem, x, y, *, target: Target | None = None, guess=None, final=True) -> Estimate:
        """The hypergradient at (x, y), y as it is up to the rule's own correction. Traced. With a `target` the rule may
        go on improving y by its own means; unless `final` it may stop where another factorization is due."""

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
        size = sum(leaf.size for leaf in jax.tree.leaves(y))
        return choose(self.linear_solver, inner, size, inner.operator_at(x, y) is not None)

    def estimate(self, problem, x, y, *, target=None, guess=None, final=True):
        if self.reparametrization is not None:
            inner, outer, z, back = in_coordinates(problem.inner, problem.outer, self.reparametrization, x, y)
            plain = eqx.tree_at(lambda a: a.reparametrization, self, None, is_leaf=lambda a: a is None)
            found = plain.estimate(_Pair(inner, outer), x, z, target=target, guess=guess, final=final)
            _, unravel = ravel(z)
            flat, _ = ravel(back(x, unravel(found.flat)))
            return found._replace(flat=flat)
        return _estimate(self, problem, x, y, target, guess, final)

    def differentiable(self, inner, x, y0, work, *, throw):
        return implicit(inner, x, y0, work, self.linear_solver, throw=throw)


class _Pair(NamedTuple):
    inner: Any
    outer: Callable


# ------------------------------------------------------------------------------------------------ at a point


def _estimate(adjoint: ImplicitAdjoint, problem, x, y, target, guess, final) -> Estimate:
    inner = problem.inner
    flat, unravel = ravel(y)
    eps = float(jnp.finfo(flat.dtype).eps)
    solver = adjoint.solver_for(inner, x, y)
    correction = adjoint.correction
    newton = correction is not None and correction.uses_newton
    one_digit = None if target is None else jnp.asarray(1e-4, flat.dtype)  # what the forward solve needs at least
    moved = correct(correction, solver, inner, x, flat, unravel, guard=adjoint.guard, rtol=one_digit)
    if target is not None:
        rtol = jnp.clip(0.03 * target.aim, 10 * eps, 1e-3).astype(flat.dtype)
    elif correction is None:
        rtol = jnp.asarray(max(1e-10, 50 * eps), flat.dtype)
    else:  # order two needs an adjoint residual of the order of the squared inner error
        relative = moved.moved / jnp.maximum(jnp.linalg.norm(flat), jnp.finfo(flat.dtype).tiny)
        rtol = jnp.clip(0.01 * relative**2, 50 * eps, max(1e-6, 50 * eps)).astype(flat.dtype)

    def evaluated(_):
        here, extra = moved.flat, jnp.zeros((), jnp.int32)
        if newton and target is not None:
            here, extra = _descend(inner, x, here, unravel, solver, moved, target)
        found = evaluate(problem, x, here, unravel, solver, moved.state, guess=guess, rtol=rtol)
        untrusted = Status.where(
            _trusted(newton, moved, found, inner, x, unravel), Status(), Status("estimate_untrusted")
        )
        found = found._replace(
            status=found.status.then(moved.status).then(untrusted), evaluations=found.evaluations + extra
        )
        if newton and target is not None:
            found = _chords(problem, x, unravel, solver, moved.state, found, target, rtol)
        return found

    if newton and target is not None:
        # a step that worked, but from afar: another factorization comes first, all further work here would be lost
        far = moved.used & ~moved.settled & (moved.status.code == 0) & ~jnp.asarray(final)
        far = far & (moved.after > 0.25 * moved.before) & (moved.after <= _CONTRACTION * moved.before)
        empty = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(evaluated, 0))
        skipped = empty._replace(
            flat=moved.flat, inner_residual=moved.after, error=jnp.full_like(empty.error, jnp.inf),
            status=Status("estimate_untrusted"), inner_touches_x=jnp.asarray(True),
        )  # fmt: skip
        found = lax.cond(far, lambda _: skipped, evaluated, 0)
    else:
        found = evaluated(0)
    inexact = (found.status.code == Status("correction_rejected").code) | (
        found.status.code == Status("estimate_untrusted").code
    )
    return found._replace(
        error=jnp.where(inexact, jnp.inf, found.error),
        evaluations=found.evaluations + moved.evaluations,
        products=found.products + moved.products,
        contracted=moved.used & (moved.after <= _CONTRACTION * moved.before),
    )


def _trusted(newton: bool, moved, found: Estimate, inner, x, unravel) -> jax.Array:
    """Whether the residual contracts under Newton steps, which is what the error estimate rests on."""
    eps = jnp.finfo(found.flat.dtype).eps
    if newton:
        return (moved.after <= moved.before * _CONTRACTION) | moved.settled | ~moved.used
    after = ravel_like(inner.optimality(x, unravel(found.flat - found.step)), found.flat.dtype)
    tiny = jnp.linalg.norm(found.step) <= 1e3 * eps * jnp.linalg.norm(found.flat)
    return (jnp.linalg.norm(after) <= _CONTRACTION * found.inner_residual) | tiny


def _descend(inner, x, flat, unravel, solver, moved, target: Target):
    """Steps with the factorization there is while they pay: until the step is small against the accuracy wanted."""
    small = jnp.clip(target.aim.astype(flat.dtype), 1e-12, 1e-3)

    def unfinished(carry):
        point, size, last, step, count, _ = carry
        worth = jnp.linalg.norm(step) > small * jnp.linalg.norm(point)
        return worth & (size <= 0.25 * last) & (count < _CHORDS)

    def body(carry):
        point, size, _, step, count, _ = carry
        new = point - step
        residual, system = linear_system(inner, x, unravel(new))
        new_size = jnp.linalg.norm(residual)
        rough = solver.rough(moved.state, system, system.off_gauge(residual))
        lower = (new_size < size) & jnp.all(jnp.isfinite(rough.value))
        new_step = jnp.where(lower, system.off_gauge(rough.value), 0)
        point = jnp.where(lower, new, point)
        return point, jnp.where(lower, new_size, size), size, new_step, count + 1, rough.products

    residual, system = linear_system(inner, x, unravel(flat))
    step = system.off_gauge(solver.rough(moved.state, system, system.off_gauge(residual)).value)
    step = jnp.where(jnp.all(jnp.isfinite(step)), step, 0)
    zero = jnp.zeros((), jnp.int32)
    start = (flat, moved.after, moved.before, step, zero, zero.astype(jnp.asarray(0).dtype))
    point, _, _, _, count, _ = lax.while_loop(unfinished, body, start)
    return point, count + 1


def _chords(problem, x, unravel, solver, state, found: Estimate, target: Target, rtol) -> Estimate:
    """Takes the step that the error estimate has computed anyway, with the factorization there is, while it helps."""

    eps = jnp.finfo(found.flat.dtype).eps

    def unfinished(carry):
        found, helps, count, _ = carry
        return ~target.allows(found.gradient, found.error) & helps & (count < _CHORDS)

    def body(carry):
        found, _, count, rtol = carry
        new = evaluate(problem, x, found.flat - found.step, unravel, solver, state, guess=found.adjoint, rtol=rtol)
        tiny = jnp.linalg.norm(found.step) <= 1e3 * eps * jnp.linalg.norm(found.flat)  # only the adjoint is in want
        lower = (new.inner_residual <= found.inner_residual) | tiny
        helps = (new.error < 0.9 * found.error) & new.usable & lower
        new = new._replace(products=found.products + new.products, evaluations=found.evaluations + new.evaluations)
        return trees.where(helps, new, found), helps, count + 1, 0.1 * rtol

    trusted = found.status.code == 0
    found, *_ = lax.while_loop(unfinished, body, (found, trusted, jnp.asarray(0), 0.1 * rtol))
    return found


def evaluate(problem, x, flat, unravel, solver, state, *, guess, rtol) -> Estimate:
    """Omega at this very point, and the estimate of its error to first order in the step still to go.

    One linearization of F; one adjoint solve, refined with the products of this point; one tangent of grad l and
    one rough adjoint solve, which carries the adjoint's own residual along: the error vector is
    g_x - F_x' F_y^-T (g_y - rho), rho = G_y - F_y' v.
    """
    inner = problem.inner
    eps = float(jnp.finfo(flat.dtype).eps)
    residual, system = linear_system(inner, x, unravel(flat))

    def outer(x, flat):
        return problem.outer(x, unravel(flat)).astype(flat.dtype)

    def optimality(x, flat):
        return ravel_like(inner.optimality(x, unravel(flat)), flat.dtype)

    value, (g_x, g_y) = jax.value_and_grad(outer, argnums=(0, 1))(x, flat)
    status = Status("converged")
    if system.gauge is not None:
        along, size = jnp.linalg.norm(system.gauge(g_y)), jnp.linalg.norm(g_y)
        slides = along > jnp.sqrt(eps) * size
        status = Status.where(slides, Status("gauge_dependent"), status)
    g_y = system.off_gauge(g_y)
    adjoint = solver.solve(state, system, g_y, transpose=True, rtol=rtol, guess=guess)
    v = system.off_gauge(adjoint.value)
    pull_x = jax.vjp(lambda x: optimality(x, flat), x)[1]
    coupling = pull_x(v)[0]
    gradient = trees.subtract(g_x, coupling)

    forward = solver.rough(state, system, system.off_gauge(residual))
    step = system.off_gauge(forward.value)

    def lagrangian(x, flat):
        return outer(x, flat) - jnp.vdot(v, optimality(x, flat))

    tangent = jax.jvp(lambda point: jax.grad(lagrangian, argnums=(0, 1))(x, point), (flat,), (step,))[1]
    turn = solver.rough(state, system, system.off_gauge(tangent[1] - adjoint.residual), transpose=True)
    vector = trees.subtract(tangent[0], pull_x(system.off_gauge(turn.value))[0])
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
        error=(trees.norm(vector) + floor).astype(flat.dtype),
        floor=floor.astype(flat.dtype),
        inner_residual=jnp.linalg.norm(residual),
        adjoint_residual=jnp.linalg.norm(adjoint.residual),
        adjoint=v,
        residual=residual,
        step=step,
        status=status,
        inner_touches_x=touches | (jnp.linalg.norm(v) == 0),
        contracted=jnp.asarray(True),
        evaluations=jnp.ones((), jnp.int32),
        products=(adjoint.products + forward.products + turn.products).astype(jnp.int32),
    )


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
    solver = choose(linear_solver, inner, b.size, inner.operator_at(x, y) is not None)
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
