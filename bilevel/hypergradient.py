"""Value, gradient and error at x."""

from __future__ import annotations

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from . import _trees as trees
from ._entry import check_tolerance, finish, prepare_problem
from ._precision import full_products, hoisted, kept_copies, worth_lowering
from ._trees import ravel
from .adjoint import AbstractAdjoint, Estimate, ImplicitAdjoint, Target, differentiable_estimate, usable
from .bounds import ErrorBound
from .errors import Status
from .problem import AbstractBilevelProblem
from .reparametrize import check_round_trip
from .solve import Attempt, _number, outcome, rounds

__all__ = ["Hypergradient", "estimate", "hypergradient"]


class Hypergradient(eqx.Module):
    """The hypergradient of h(x) = G(x, y*(x)) and how wrong it is.

    `value`: G(x, y); `gradient`: like x; `error`: an estimate of |gradient - grad h(x)|_2 over all leaves, absolute,
    asymptotically exact and never below round-off (infinite where it cannot be trusted); `y`: the corrected point
    used; `inner_residual`: |F(x, y)|_2; `adjoint_residual`: |G_y - F_y' v|_2; `converged`, `status`; `steps`: of the
    inner solver; `evaluations`: of F (inner gradients); `products`: with dF/dy (Hessian-vector products), n for
    each dense matrix; `bound`: a guaranteed bound on the error where `error_bound=` was given, else None.
    """

    value: Float[Array, "*batch"]
    gradient: PyTree
    error: Float[Array, "*batch"]
    y: PyTree
    inner_residual: Float[Array, "*batch"]
    adjoint_residual: Float[Array, "*batch"]
    converged: Bool[Array, "*batch"]
    status: Status
    steps: Int[Array, "*batch"]
    evaluations: Int[Array, "*batch"]
    products: Int[Array, "*batch"]
    bound: Float[Array, "*batch"] | None = None

    def __repr__(self):
        size = None if trees.is_traced(self.gradient) or jnp.ndim(self.value) else trees.norm(self.gradient)
        return (
            f"Hypergradient(value={_number(self.value)}, |gradient|={'…' if size is None else _number(size)}, "
            f"error={_number(self.error)}, status={self.status})"
        )


@full_products()
def estimate(
    problem: AbstractBilevelProblem,
    x: PyTree,
    y: PyTree,
    adjoint: AbstractAdjoint | None = None,
    *,
    error_bound: ErrorBound | None = None,
) -> Hypergradient:
    """The hypergradient at this y, as it is: no inner solve, one correction and one derivative rule.

    **Arguments:** `problem`; `x`, `y`: trees of floating arrays; `adjoint`: the derivative rule, `ImplicitAdjoint()`;
    `error_bound`: constants from which a guaranteed `.bound` follows; None: the problem's own, if it knows them.

    **Returns:** a `Hypergradient`; `.converged` means that the correction was accepted, the linear solves converged
    and the error estimate can be trusted. Nothing is raised for that: the point is the caller's.

    **Raises:** TypeError, ValueError for arguments that do not fit.
    """
    x, y = prepare_problem("estimate", problem, x, y, "y")
    adjoint = _rule("estimate", adjoint)
    if isinstance(adjoint, ImplicitAdjoint) and adjoint.reparametrization is not None:
        check_round_trip("estimate", adjoint.reparametrization, problem.inner, x, y)
    return _bounded("estimate", _estimate(problem, x, y, adjoint), problem, x, adjoint, error_bound)


def _bounded(function: str, result: Hypergradient, problem, x, adjoint, constants) -> Hypergradient:
    """The result with its guaranteed bound, where constants are known."""
    constants = problem.error_constants(x) if constants is None else constants
    if constants is None:
        return result
    if not isinstance(constants, ErrorBound):
        raise TypeError(f"bilevel.{function}: error_bound must be an ErrorBound(…), found {constants!r}.")
    if not isinstance(adjoint, ImplicitAdjoint) or adjoint.reparametrization is not None:
        raise ValueError(
            f"bilevel.{function}: an error_bound is of implicit differentiation in y itself; use ImplicitAdjoint() "
            "without a reparametrization."
        )
    return eqx.tree_at(
        lambda r: r.bound, result, _bound(constants, problem, x, result), is_leaf=lambda leaf: leaf is None
    )


@eqx.filter_jit
def _bound(constants, problem, x, result):
    bound = constants.at(problem, x, result.y, result.adjoint_residual)
    return jnp.where(jnp.isfinite(result.value), bound, jnp.inf)


def _rule(function: str, adjoint: Any) -> AbstractAdjoint:
    if adjoint is None:
        return ImplicitAdjoint()
    if not isinstance(adjoint, AbstractAdjoint):
        raise TypeError(
            f"bilevel.{function}: adjoint must be a derivative rule such as ImplicitAdjoint(), found {adjoint!r}."
        )
    return adjoint


def _package(found: Estimate, unravel, converged, status, steps, evaluations, products) -> tuple:
    """The fields of a Hypergradient; NaN and an infinite error where there is no usable y or adjoint."""
    here = usable(found.status)
    mask = lambda tree: jax.tree.map(lambda a: jnp.where(here, a, jnp.nan), tree)
    y = unravel(found.flat)
    error = jnp.where(here, found.error, jnp.inf)
    facts = (
        error,
        found.inner_residual,
        found.adjoint_residual,
        converged,
        status,
        steps,
        evaluations,
        products,
    )
    return (mask(found.value), mask(found.gradient), y), facts


def _assemble(differentiable, facts) -> Hypergradient:
    (value, gradient, y), (error, inner, adjoint, *rest) = differentiable, facts
    return Hypergradient(value, gradient, error, y, inner, adjoint, *rest)


@eqx.filter_jit
def _estimate(problem, x, y, adjoint) -> Hypergradient:
    def work(x, y):
        found = adjoint.estimate(problem, x, y)
        _, unravel = ravel(y)
        zero = jnp.zeros((), jnp.int32)
        return _package(found, unravel, found.status.code == 0, found.status, zero, found.evaluations, found.products)

    return _assemble(*differentiable_estimate(problem, x, y, work, adjoint))


@full_products()
def hypergradient(
    problem: AbstractBilevelProblem,
    x: PyTree,
    y0: PyTree,
    *,
    rtol: float = 1e-6,
    atol: float = 0.0,
    solver: Any = None,
    adjoint: AbstractAdjoint | None = None,
    max_steps: int = 2000,
    throw: bool = True,
    error_bound: ErrorBound | None = None,
) -> Hypergradient:
    """The gradient of h(x) = G(x, y*(x)) to the accuracy asked for.

    Solves the inner problem loosely, corrects, estimates the error, and goes further only if the estimate says so.

    **Arguments:** `problem`: a `BilevelProblem`. `x`, `y0`: trees of floating arrays; y0 is where the inner solver
    starts. `rtol`, `atol`: converged means 3 error <= max(rtol |gradient|, atol). `solver`: None (Newton steps where
    they work, jaxopt's L-BFGS where they do not, or the inner problem's own), an object of `bilevel.solvers`, an
    optimistix solver, a jaxopt class, or a function `x -> y`. `adjoint`: the derivative rule, `ImplicitAdjoint()`.
    `max_steps`: steps of the inner solver in all. `error_bound`: as for `estimate`.

    **Returns:** a `Hypergradient`. Its value, gradient and y can be differentiated again.

    **Raises:** TypeError, ValueError for arguments that do not fit; `NotConverged` (inside a transformation: a
    run-time error with the same text) where the accuracy is not reached or there is no usable solution, unless
    `throw=False`: then the best gradient with its `.error`, or NaN with an infinite error, and `.status`. Warns if
    x does not enter the inner problem.
    """
    check_tolerance("hypergradient", rtol, atol, max_steps)
    x, y0 = prepare_problem("hypergradient", problem, x, y0, "y0")
    adjoint = _rule("hypergradient", adjoint)
    copies = kept_copies((problem.inner, problem.outer), x, y0)
    goals = (jnp.asarray(rtol), jnp.asarray(atol))
    result, touches = _hypergradient(problem, x, y0, *goals, solver, adjoint, max_steps, copies)
    result = finish("hypergradient", result, result.converged, result.status, throw, problem, x, y0)
    if not trees.is_traced(touches) and not bool(touches) and bool(jnp.isfinite(result.value)):
        _warn_if_x_is_absent(problem.inner, x, result.y)
    return _bounded("hypergradient", result, problem, x, adjoint, error_bound)


@eqx.filter_jit
def _hypergradient(problem, x, y0, rtol, atol, solver, adjoint, max_steps, copies):
    newton = adjoint.correction_used is not None and adjoint.correction_used.uses_newton
    default = solver is None and problem.inner.default_solver is None
    # where the data are small a Newton step is tried at once; where they are large its matrix is the dear part
    first = newton and default and not worth_lowering(problem.inner, x, y0)
    result, touches, _ = search(problem, x, y0, rtol, atol, solver, adjoint, max_steps, first, copies=copies)
    return result, touches


def search(
    problem, x, y0, rtol, atol, solver, adjoint, max_steps, newton_first, guess=None, aim=None, step=None, copies=(),
    differentiable=True,
):  # fmt: skip
    """The traced body of `hypergradient`: `(Hypergradient, whether x enters the inner problem, (v, h(x), s))`, v flat,
    h to third order, s the length of the Newton step still to go. `aim`, `step`: of the `Target`. `copies`: of
    `kept_copies((inner, outer))`. `differentiable`: the result may be differentiated again."""

    def work(x, y0):
        flat, unravel = ravel(y0)
        goals = (rtol, atol, rtol if aim is None else aim)
        target = Target(
            *(goal.astype(flat.dtype) for goal in goals), step=None if step is None else step.astype(flat.dtype)
        )

        def attempt(y):
            found = adjoint.estimate(problem, x, y, target=target, guess=guess)
            reached = target.allows(found.gradient, found.error) & (found.status.code == 0)
            allowed = jnp.maximum(target.rtol * trees.norm(found.gradient).astype(flat.dtype), target.atol)
            factor = jnp.clip(0.1 * allowed / jnp.where(found.error > 0, found.error, 1), 1e-4, 0.1)
            factor = jnp.where(jnp.isfinite(found.error) & found.usable, factor, 0.1)
            newton = adjoint.correction_used is not None and adjoint.correction_used.uses_newton
            again = found.contracted & jnp.asarray(newton)
            return Attempt(
                found.flat,
                found.inner_residual,
                reached,
                again,
                factor,
                found,
                found.evaluations,
                found.products,
                ~(found.usable & found.at_floor & (allowed <= 3 * found.floor)),  # steps do not lower round-off
            )

        data = (problem.inner, problem.outer) if worth_lowering(problem.inner, x, y0) else ()
        with hoisted(data, copies):
            out = rounds(attempt, problem.inner, x, y0, solver, max_steps=max_steps, newton_first=newton_first)
        found = out.found
        status = outcome(found.status, out.reached, found.at_floor, out.steps >= max_steps, max_steps)
        fields = _package(found, unravel, out.reached, status, out.steps, out.evaluations, out.products)
        return fields[0], (
            *fields[1],
            found.inner_touches_x,
            (found.adjoint, found.refined, jnp.linalg.norm(found.step)),
        )

    if differentiable:
        found, (*facts, touches, extras) = differentiable_estimate(problem, x, y0, work, adjoint)
    else:  # nothing is traced for derivatives that nobody takes
        found, (*facts, touches, extras) = work(x, y0)
    return _assemble(found, facts), touches, extras


def _warn_if_x_is_absent(inner, x, y) -> None:
    """F_x' v was exactly zero: ask at other points, in random directions, before saying that x does not matter (where
    a penalty keeps all of y at zero it does, but not nearby)."""
    key = jax.random.PRNGKey(0)
    leaves, structure = jax.tree.flatten(x)
    keys = jax.random.split(key, len(leaves) + 1)
    tangent = jax.tree.unflatten(
        structure, [jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys[1:], leaves, strict=True)]
    )
    noise = jax.tree.map(lambda a: jax.random.normal(keys[0], a.shape, a.dtype), y)

    def matters(size: float, shift: float) -> bool:
        there = jax.tree.map(lambda a, b: a + jnp.asarray(size, a.dtype) * b, y, noise)
        beside = jax.tree.map(lambda a: a + jnp.asarray(shift, a.dtype), x)
        moved = jax.jvp(lambda x: inner.optimality(x, there), (beside,), (tangent,))[1]
        return bool(trees.norm(moved) > 0)

    if not any(
        matters(size, shift) for size, shift in ((1.0, 0.0), (1.0, 1.0), (1.0, -1.0), (10.0, 10.0), (10.0, -10.0))
    ):
        warnings.warn(
            "bilevel.hypergradient: x does not enter the inner problem (dF/dx is zero), so the hypergradient is the "
            "outer function's own derivative in x. Is x missing from the inner objective?",
            stacklevel=3,
        )
