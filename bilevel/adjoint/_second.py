"""Second derivatives of h, and how an estimator's error depends on the inner error."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from .. import _trees as trees
from .._trees import ravel, ravel_like
from ..correct import Newton, correct
from ..errors import Status
from ..linear import choose, linear_system
from ._base import usable
from ._rule import closed_solves, solve_linear


def hessian_product(problem, x, y, w, linear_solver=None):
    """`(H w, status)`: the Hessian of h times w at the Newton point of y, by two solves with one factorization.

    p = J w, then the tangent of grad l along (w, p) and one adjoint solve (docs/theory, "Hyper-Hessian"). Error
    O(e^2) in the inner error of y.
    """
    inner = problem.inner
    flat, unravel = ravel(y)
    solver = choose(linear_solver, inner, x, y)
    moved = correct(Newton(), solver, inner, x, flat, unravel)
    flat, (_, system), state = moved.flat, moved.at, moved.state

    def outer(x, flat):
        return problem.outer(x, unravel(flat)).astype(flat.dtype)

    def optimality(x, flat):
        return ravel_like(inner.optimality(x, unravel(flat)), flat.dtype)

    _, g_y = jax.grad(outer, argnums=(0, 1))(x, flat)
    adjoint = solver.solve(state, system, system.off_gauge(g_y), transpose=True)
    v = system.off_gauge(adjoint.value)
    turned = jax.jvp(lambda x: optimality(x, flat), (x,), (w,))[1]
    forward = solver.solve(state, system, system.off_gauge(-turned))
    p = system.off_gauge(forward.value)

    def lagrangian(x, flat):
        return outer(x, flat) - jnp.vdot(v, optimality(x, flat))

    (g_x, g_y) = jax.jvp(jax.grad(lagrangian, argnums=(0, 1)), (x, flat), (w, p))[1]
    back = solver.solve(state, system, system.off_gauge(g_y), transpose=True)
    pull = jax.vjp(lambda x: optimality(x, flat), x)[1]
    product = trees.subtract(g_x, pull(system.off_gauge(back.value))[0])
    status = moved.status.then(adjoint.status).then(forward.status).then(back.status)
    finite = Status.where(trees.all_finite(product), Status(), Status("non_finite"))
    status = status.then(finite)
    return jax.tree.map(lambda a: jnp.where(usable(status), a, jnp.nan), product), status


def parts_at(problem, x, y, linear_solver=None):
    """Three functions of a flat point near y: Omega whole, its curvature part and its coupling part.

    `whole(flat)` is Omega(x, flat), `curvature(flat)` is J' G_y(x, flat) with J frozen at y, `coupling(flat)` is
    G_x(x, flat): the derivatives of the last two are terms (b) and (c) of Omega_y, and what they leave is (a), the
    moving Jacobian. Each is flat, of x's size, and differentiable in its argument.
    """
    inner = problem.inner
    here, unravel = ravel(y)
    solve, transposed = closed_solves(inner, x, y, linear_solver, throw=False)
    optimality = lambda x, y: inner.optimality(x, y)
    x_flat, _ = ravel(x)

    def gradients(flat):
        g_x, g_y = jax.grad(lambda x, f: problem.outer(x, unravel(f)).astype(f.dtype), argnums=(0, 1))(x, flat)
        return ravel_like(g_x, x_flat.dtype), g_y

    def back(flat, g_y):
        y = unravel(flat)
        v = solve_linear(optimality, solve, transposed, x, y, g_y, inner.symmetric, transpose=True)
        pull = jax.vjp(lambda x: ravel_like(optimality(x, y), flat.dtype), x)[1]
        return ravel_like(pull(v)[0], x_flat.dtype)

    def whole(flat):
        g_x, g_y = gradients(flat)
        return g_x - back(flat, g_y)

    def curvature(flat):
        return -back(here, gradients(flat)[1])

    def coupling(flat):
        return gradients(flat)[0]

    return whole, curvature, coupling


def moved_point(adjoint, inner, x, flat, unravel):
    """Where an implicit rule moves `flat` to, differentiable in it (P's derivative multiplies F, zero at y*)."""
    correction = adjoint.correction_used
    if correction is None:
        return flat
    for _ in range(correction.steps):
        y = unravel(flat)
        residual, system = linear_system(inner, x, y)
        solver = choose(adjoint.linear_solver_used, inner, x, y)
        frozen = jax.tree.map(jax.lax.stop_gradient, y)
        _, fixed = linear_system(inner, x, frozen)

        def solve(b, solver=solver, fixed=fixed):
            state = solver.prepare(fixed)
            ahead = lambda _, b: solver.solve(state, fixed, b).value
            back = lambda _, b: solver.solve(state, fixed, b, transpose=True).value
            return lax.custom_linear_solve(fixed.mv, b, ahead, back, symmetric=inner.symmetric), Status()

        move, _ = correction.displacement(x, frozen, residual, fixed, solve)
        flat = flat - move
    return flat
