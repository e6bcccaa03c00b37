"""Inner minimizations under equality and inequality constraints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from . import _projection as projection
from ._functions import as_given, callable_node, check_scalar
from ._support import SupportAware, inverse_curvature
from ._trees import check_like, ravel, ravel_like, shapes_of
from .errors import Status
from .problem import AbstractInner

__all__ = ["Constrained", "Multipliers"]


class Multipliers(NamedTuple):
    """Of the equalities and the inequalities, each of its constraint's shape (None where there is none)."""

    equality: Any
    inequality: Any


class Constrained(AbstractInner):
    """y*(x) minimizes `objective(x, y)` subject to `equality(x, y)` = 0 and `inequality(x, y)` <= 0.

    y is primal everywhere. F(x, y) = -p with p the step of sequential quadratic programming with Hessian I / t: the
    minimizer of |p + t grad f|^2 / 2 on the constraints linearized at y, t = 1 / (size of the Hessian of f). It is
    zero where the KKT conditions hold; with the active set that p's multipliers show, dF/dy = I - P (I - t W), P the
    projection on the tangent of the active constraints and W the Hessian of the Lagrangian: nonsingular under
    independence of the active gradients and the second-order condition (Fiacco 1983; derived in docs/theory, section
    "Nonsmooth inner problems"). `Solution.multipliers` are p's at the solution.

    An inequality that is active with a multiplier of zero has no derivative: status `degenerate_active_set`; active
    gradients that depend on each other: `singular`; a saddle within the constraints: `not_a_minimum`.

    **Arguments:** `objective(x, y) -> scalar`; `equality(x, y)`, `inequality(x, y)`: arrays of any shape, or None. All
    twice differentiable in y. Their Jacobians are formed densely, and each F solves a small quadratic program.

    **Raises:** TypeError if something is not callable; ValueError when used with functions whose results do not fit.
    """

    _objective: Any
    _equality: Any
    _inequality: Any

    def __init__(self, objective: Callable, *, equality: Callable | None = None, inequality: Callable | None = None):
        self._objective = callable_node(objective, "Constrained", "objective")
        self._equality = None if equality is None else callable_node(equality, "Constrained", "equality")
        self._inequality = None if inequality is None else callable_node(inequality, "Constrained", "inequality")

    @property
    def objective(self) -> Callable:
        return as_given(self._objective)

    @property
    def smooth(self) -> Callable:
        """What the forward step descends."""
        return as_given(self._objective)

    @property
    def equality(self) -> Callable | None:
        return as_given(self._equality)

    @property
    def inequality(self) -> Callable | None:
        return as_given(self._inequality)

    @property
    def linear_solver(self):
        return SupportAware()

    @property
    def default_solver(self):
        from .solvers.fista import Fista  # solvers import problems, not the other way round

        return Fista(monotone=True)

    # ------------------------------------------------------------------------------------------------ the step

    def _constraints(self, x, y):
        """`(equality, inequality)`, flat and in y's dtype."""
        dtype = ravel(y)[0].dtype
        both = (self._equality, self._inequality)
        return tuple(jnp.zeros((0,), dtype) if f is None else ravel_like(f(x, y), dtype) for f in both)

    def _rows(self, x, y) -> projection.Polyhedron:
        flat, unravel = ravel(y)
        all_of = lambda point: jnp.concatenate(self._constraints(x, unravel(point)))
        equalities = shapes_of(self._constraints, x, y)[0].shape[0]
        return projection.polyhedron(jax.jacrev(all_of)(flat), all_of(flat), equalities)

    def _gradient(self, x, y):
        flat, _ = ravel(y)
        return ravel_like(jax.grad(self._objective, argnums=1)(x, y), flat.dtype)

    def step_length(self, x: PyTree, y: PyTree) -> jax.Array:
        """t = 1 / (size of the objective's Hessian), a constant of every derivative."""
        return inverse_curvature(self._objective, x, y)

    def _step(self, x, y, t, gradient=None):
        """`(rows, d, active, p, u)` of the step from y."""
        rows = self._rows(x, y)
        d = -t * (self._gradient(x, y) if gradient is None else gradient)
        active = projection.active_rows(rows, d)
        return rows, d, active, *projection.nearest(rows, d, active)

    def forward_backward(self, x: PyTree, y: PyTree, gradient: jax.Array, t: jax.Array) -> PyTree:
        """y + p, p the step with length t and the given gradient of the objective (flat)."""
        flat, unravel = ravel(y)
        return unravel(flat + self._step(x, y, t, gradient)[3])

    def optimality(self, x, y, multipliers: Multipliers | None = None):
        """F = -p; with multipliers: the gradient of the Lagrangian, zero at the solution too."""
        if multipliers is None:
            flat, unravel = ravel(y)
            return unravel(-self._step(x, y, self.step_length(x, y))[3])

        def lagrangian(y):
            flat, _ = ravel(y)
            total = self._objective(x, y).astype(flat.dtype)
            given = (multipliers.equality, multipliers.inequality)
            for c, u in zip(self._constraints(x, y), given, strict=True):
                total = total if u is None else total + jnp.vdot(ravel_like(u, flat.dtype), c)
            return total

        return jax.grad(lagrangian)(y)

    def multipliers_at(self, x, y):
        """`Multipliers` of the constraints at the solution y, differentiable in x and y."""
        t = self.step_length(x, y)
        rows, _, _, _, u = self._step(x, y, t)
        u = u / (t * rows.size)
        parts = (u[: rows.equalities], u[rows.equalities :])
        shapes = [None if f is None else shapes_of(f, x, y) for f in (self._equality, self._inequality)]
        return Multipliers(
            *(None if s is None else a.reshape(s.shape).astype(s.dtype) for s, a in zip(shapes, parts, strict=True))
        )

    # ------------------------------------------------------------------------------------------------ the active set

    def active_part(self, x, y):
        flat, unravel = ravel(y)
        rows, d, active, _, _ = self._step(x, y, self.step_length(x, y))
        part = jax.linearize(lambda d: projection.nearest(rows, d, active)[0], d)[1]
        return lambda w: unravel(part(ravel_like(w, flat.dtype)))

    def smooth_between(self, x, y, z):
        t = self.step_length(x, y)
        return jnp.all(self._step(x, y, t)[2] == self._step(x, z, t)[2])

    def status_at(self, x, y):
        flat, _ = ravel(y)
        rows, d, active, p, u = self._step(x, y, self.step_length(x, y))
        eps = float(jnp.finfo(flat.dtype).eps)
        size = jnp.maximum(jnp.max(jnp.abs(flat)), jnp.max(jnp.abs(d)))
        near = min(eps**0.5, 3e-5) * jnp.linalg.norm(d) + 1e3 * eps * size
        edge = projection.is_degenerate(rows, p, u, active, near)
        status = Status.where(edge, Status("degenerate_active_set"), Status())
        return Status.where(projection.dependent(rows, active), Status("singular"), status)

    def check(self, x, y):
        check_scalar(shapes_of(self._objective, x, y), "Constrained", "objective")
        for name, f in (("equality", self._equality), ("inequality", self._inequality)):
            shape = None if f is None else shapes_of(f, x, y)
            if shape is not None and not hasattr(shape, "shape"):
                raise ValueError(f"bilevel.Constrained: `{name}` must return one array, found {shape}.")
        check_like(shapes_of(self.optimality, x, y), y, "Constrained", "the optimality F(x, y)", "y")
