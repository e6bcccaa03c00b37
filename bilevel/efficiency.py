"""Why one estimator beats another: the efficiency constant, and the Hessian of h."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from . import _trees as trees
from ._entry import prepare_problem
from ._precision import full_products
from ._trees import check_like, ravel
from .adjoint import AbstractAdjoint, ImplicitAdjoint, hessian_product, moved_point, parts_at
from .errors import NotConverged
from .problem import AbstractBilevelProblem
from .reparametrize import in_coordinates
from .solve import solve

__all__ = ["EfficiencyConstant", "efficiency_constant", "hessian_vector_product"]


class EfficiencyConstant(eqx.Module):
    """|d Omega_hat / dy| at y*, the first-order constant of an estimator's error in the inner error, in operator norm,
    and the norms of its three parts: the Jacobian of y* that moves, the outer function's curvature, and its coupling of
    x and y. Super-efficient means `value` zero. The parts need not add up: they may cancel."""

    value: Float[Array, ""]
    jacobian: Float[Array, ""]
    curvature: Float[Array, ""]
    coupling: Float[Array, ""]

    def __repr__(self):
        parts = ", ".join(f"{k}={float(getattr(self, k)):.4g}" for k in ("value", "jacobian", "curvature", "coupling"))
        return f"EfficiencyConstant({parts})"


@full_products()
def efficiency_constant(
    problem: AbstractBilevelProblem, x: PyTree, adjoint: AbstractAdjoint | None = None, *, y0: PyTree
) -> EfficiencyConstant:
    """The efficiency constant of an implicit rule at x (docs/theory, "The error theorem"), by matrix-free power
    iteration on Omega_y' Omega_y, Omega_y taken by autodiff at the inner solution.

    **Arguments:** `adjoint`: an `ImplicitAdjoint` with any correction (its guard is ignored) and reparametrization;
    `y0`: where the inner solve starts. **Raises:** TypeError for other rules (their error is no function of y alone);
    `NotConverged` if the inner problem cannot be solved.
    """
    x, y0 = prepare_problem("efficiency_constant", problem, x, y0, "y0")
    adjoint = ImplicitAdjoint() if adjoint is None else adjoint
    if not isinstance(adjoint, ImplicitAdjoint):
        raise TypeError(f"bilevel.efficiency_constant: adjoint must be an ImplicitAdjoint, found {adjoint!r}.")
    solution = solve(problem.inner, x, y0)
    return _constant(problem, x, solution.y, adjoint)


class _Coordinates(eqx.Module):
    inner: Any
    function: Any

    def outer(self, x, y):
        return self.function(x, y)


@eqx.filter_jit
def _constant(problem, x, y, adjoint) -> EfficiencyConstant:
    flat, unravel = ravel(y)
    into = outof = lambda flat: flat
    _, curvature, coupling = parts_at(problem, x, y, adjoint.linear_solver)
    if adjoint.reparametrization is not None:
        inner, outer, z, back = in_coordinates(problem.inner, problem.outer, adjoint.reparametrization, x, y)
        problem = _Coordinates(inner, outer)
        z_flat, unravel_z = ravel(z)
        outof = lambda point: ravel(back(x, unravel_z(point)))[0]
        jacobian = jax.jacfwd(outof)(z_flat)
        into = lambda flat: z_flat + jnp.linalg.solve(jacobian, flat - lax.stop_gradient(outof(z_flat)))
        y, unravel = z, unravel_z
    whole = parts_at(problem, x, y, adjoint.linear_solver)[0]  # in the estimator's coordinates
    move = lambda flat: moved_point(adjoint, problem.inner, x, into(flat), unravel)
    moved = lambda flat: outof(move(flat))
    functions = {
        "value": lambda f: whole(move(f)),
        "jacobian": lambda f: whole(move(f)) - curvature(moved(f)) - coupling(moved(f)),
        "curvature": lambda f: curvature(moved(f)),
        "coupling": lambda f: coupling(moved(f)),
    }
    return EfficiencyConstant(**{name: _operator_norm(function, flat) for name, function in functions.items()})


def _operator_norm(function, point, steps: int = 100) -> jax.Array:
    """|d function| at the point by power iteration on its derivative and the transpose."""
    _, ahead = jax.linearize(function, point)
    back = jax.linear_transpose(ahead, point)
    start = 1 + 0.5 * jnp.cos(jnp.arange(1, point.size + 1, dtype=point.dtype))

    def body(_, carry):
        v, _ = carry
        v = v / jnp.linalg.norm(v)
        image = ahead(v)
        w = back(image)[0]
        dead = jnp.linalg.norm(w) == 0
        return jnp.where(dead, v, w), jnp.linalg.norm(image)

    return lax.fori_loop(0, steps, body, (start, jnp.zeros((), point.dtype)))[1]


@full_products()
def hessian_vector_product(problem: AbstractBilevelProblem, x: PyTree, y: PyTree, v: PyTree) -> PyTree:
    """The Hessian of h(x) = G(x, y*(x)) times v, like x: at the Newton point of y, by two more solves, no nesting.

    Error O(e^2) in the inner error of y. **Raises:** TypeError, ValueError for arguments that do not fit;
    `NotConverged` (a run-time NaN inside a transformation) where F_y cannot be solved with.
    """
    x, y = prepare_problem("hessian_vector_product", problem, x, y, "y")
    v = trees.float_tree(v, "hessian_vector_product", "v", empty=True)
    check_like(v, x, "hessian_vector_product", "argument `v`", "x")
    product, status = _product(problem, x, y, v)
    if not trees.is_traced(status.code) and status.word not in ("converged", "correction_rejected", "linear_solve"):
        raise NotConverged(f"bilevel.hessian_vector_product: {status.meaning}.")
    return product


@eqx.filter_jit
def _product(problem, x, y, v):
    return hessian_product(problem, x, y, v)
