"""The implicit function theorem as one rule that can be differentiated and transposed any number of times."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from .. import _trees as trees
from .._precision import full_products
from .._trees import ravel, ravel_like
from ..errors import Status, meanings
from ..linear import choose, linear_system
from ._base import AbstractAdjoint, near, usable

_LOST = 0.01  # share of an inner problem's `length_scale` to which round-off in F leaves y open


def implicit(inner, x, y0, work: Callable, linear_solver: Any, *, throw: bool) -> tuple[PyTree, PyTree]:
    """`work(x, y0) -> (y, facts)`, with dy = -F_y^-1 dF at the y returned; in every mode and any order.

    What the functions close over is hoisted into arguments first, so that derivatives flow to it as well.
    """
    solve, transposed = closed_solves(inner, x, y0, linear_solver, throw=throw)
    inputs = (
        eqx.filter_closure_convert(work, x, y0),
        eqx.filter_closure_convert(lambda x, y: inner.optimality(x, y), x, y0),
        solve,
        transposed,
        x,
        y0,
    )
    return _implicit(inputs, symmetric=inner.symmetric)


def frozen(work: Callable, x, y0) -> PyTree:
    """`work(x, y0)` as a constant of every derivative, whatever it closes over."""
    return _frozen((eqx.filter_closure_convert(work, x, y0), x, y0))


@eqx.filter_custom_jvp
def _frozen(inputs):
    return jax.tree.map(jnp.asarray, inputs[0](inputs[1], inputs[2]))


@_frozen.def_jvp
def _frozen_jvp(primals, tangents):
    out = _frozen(primals[0])
    return out, jax.tree.map(lambda a: None, out)


def closed_solves(inner, x, y0, linear_solver, *, throw: bool):
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
    residual, system = linear_system(inner, x, y)
    state = solver.prepare(system)
    answer = solver.solve(state, system, system.off_gauge(b), transpose=transpose)
    value = system.off_gauge(answer.value)
    status = answer.status.then(inner.status_at(x, y))
    if inner.length_scale(x, y) is not None:  # `solve` has judged by something else than y
        step = system.off_gauge(solver.approximate(state, system, residual).value)
        known = near(inner, x, y, step) & (jnp.finfo(b.dtype).eps * answer.condition <= _LOST)
        status = Status.where(known | ~usable(status), status, Status("singular"))
    if throw:
        texts = [f"bilevel.solve, derivative: {sentence}." for sentence in meanings()]
        bad = ~(status == Status("converged"))
        return eqx.internal.branched_error_if(value, bad, status.code, texts)
    return jnp.where(usable(status), value, jnp.nan)


@eqx.filter_custom_jvp
def _implicit(inputs, *, symmetric):
    work, _, _, _, x, y0 = inputs
    return jax.tree.map(jnp.asarray, work(x, y0))


@_implicit.def_jvp
@full_products()
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
    solve, transposed = closed_solves(problem.inner, x, y0, adjoint.linear_solver_used, throw=False)
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
@full_products()
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
        _warned_start = True
        warnings.warn(
            "bilevel: the starting point y0 is being differentiated. The solution of the inner problem does not depend "
            "on where the solver starts, so its derivative in y0 is exactly zero (said once).",
            stacklevel=2,
        )
