"""Rules that differentiate a few of the problem's own steps at the y that the solver found.

The own step S(x, y) is y - F(x, y) / L for a minimization or a root (L = |F_y| by power iteration), the map itself for
a fixed point, the forward-backward step for a composite problem. The solver's own iterations are never differentiated.
Except for `UnrolledAdjoint` with many steps, all are biased: order 0 in the inner error (docs/theory, "Other
estimators").
"""

from __future__ import annotations

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from .. import _trees as trees
from .._trees import ravel, ravel_like
from ..errors import Status
from ..linear import Neumann, linear_system, spectral_norm
from ._base import AbstractAdjoint, Estimate
from ._implicit import ImplicitAdjoint
from ._rule import frozen, implicit


def step_size(inner, x, y) -> jax.Array:
    """The size a of the own step y - a F: 1 where F is a fixed-point residual, else 1 / |F_y|; not differentiated."""
    dtype = ravel(y)[0].dtype
    if inner.is_step:
        return jnp.ones((), dtype)
    x, y = jax.tree.map(lax.stop_gradient, (x, y))
    _, system = linear_system(inner, x, y)
    return lax.stop_gradient(1 / spectral_norm(system)).astype(dtype)


def own_step(inner, x, y, size):
    """y - a F(x, y), of y's structure."""
    return jax.tree.map(lambda a, f: a - size.astype(a.dtype) * f.astype(a.dtype), y, inner.optimality(x, y))


class _AbstractStepRule(AbstractAdjoint):
    """What the step rules share: the error is measured against the corrected implicit hypergradient."""

    @abc.abstractmethod
    def moved(self, inner, x, y):
        """y as a function of x by the rule's own steps from the fixed point y."""

    def estimate(self, problem, x, y, *, target=None, guess=None):
        y = jax.tree.map(lax.stop_gradient, y)
        end = self.moved(problem.inner, x, y)

        def outer(x):
            return problem.outer(x, self.moved(problem.inner, x, y))

        value, gradient = jax.value_and_grad(outer)(x)
        reference = ImplicitAdjoint().estimate(problem, x, jax.tree.map(lax.stop_gradient, end))
        flat, unravel = ravel(end)
        off = trees.norm(trees.subtract(gradient, reference.gradient)).astype(flat.dtype)
        residual = ravel_like(problem.inner.optimality(x, unravel(flat)), flat.dtype)
        finite = jnp.isfinite(value) & trees.all_finite(gradient)
        status = reference.status.then(Status.where(finite, Status(), Status("non_finite")))
        return reference._replace(
            flat=flat,
            value=value,
            gradient=gradient,
            error=off + reference.error,
            inner_residual=jnp.linalg.norm(residual),
            status=status,
            contracted=jnp.asarray(False),
        )

    def differentiable(self, inner, x, y0, work, *, throw):
        y, facts = frozen(work, x, y0)
        return self.moved(inner, x, y), facts


class UnrolledAdjoint(_AbstractStepRule):
    """Differentiates `steps` own steps K from the y found. Error of order rho^K (rho: their contraction), unrelated to
    the inner error e otherwise; order 1 in e as K grows (Franceschi 2017, Shaban 2019, Mehmood & Ochs 2020).

    Forward mode carries one tangent a step and stores nothing (few x); reverse mode stores K iterates.
    """

    steps: int = eqx.field(static=True)

    def __check_init__(self):
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"bilevel.UnrolledAdjoint: steps must be an integer of at least 1, found {self.steps!r}.")

    def moved(self, inner, x, y):
        size = step_size(inner, x, y)
        return lax.scan(lambda y, _: (own_step(inner, x, y, size), None), y, None, length=self.steps)[0]


class OneStepAdjoint(_AbstractStepRule):
    """Differentiates one own step, J = S_x(x, y), outer gradients after it. Order 0: the bias of J is at most
    rho / (1 - rho) |S_x| (Bolte, Pauwels, Vaiter 2023)."""

    def moved(self, inner, x, y):
        return own_step(inner, x, y, step_size(inner, x, y))


class JacobianFreeAdjoint(_AbstractStepRule):
    """Takes S_y for zero, J = S_x(x, y), outer gradients at y itself. Order 0 (Luketina 2016, Wu Fung 2022)."""

    def moved(self, inner, x, y):
        step = own_step(inner, x, y, step_size(inner, x, y))
        return jax.tree.map(lambda a, s: a + (s - lax.stop_gradient(s)), y, step)


class NeumannAdjoint(AbstractAdjoint):
    """Implicit differentiation with the truncated series v = a sum_{k <= terms} (I - a F_y')^k G_y. Order 0: what is
    missing is J'(I - a F_y')^(terms + 1) G_y (Lorraine, Vicol, Duvenaud 2020)."""

    terms: int = eqx.field(static=True)

    def __check_init__(self):
        if not isinstance(self.terms, int) or self.terms < 0:
            raise ValueError(f"bilevel.NeumannAdjoint: terms must be an integer of at least 0, found {self.terms!r}.")

    def estimate(self, problem, x, y, *, target=None, guess=None) -> Estimate:
        inner = problem.inner
        flat, unravel = ravel(y)
        residual, system = linear_system(inner, x, y)
        value, (g_x, g_y) = jax.value_and_grad(
            lambda x, flat: problem.outer(x, unravel(flat)).astype(flat.dtype), argnums=(0, 1)
        )(x, flat)
        answer = self._series(inner).solve(self._series(inner).prepare(system), system, g_y, transpose=True)
        pull = jax.vjp(lambda x: ravel_like(inner.optimality(x, y), flat.dtype), x)[1]
        gradient = trees.subtract(g_x, pull(answer.value)[0])
        reference = ImplicitAdjoint().estimate(problem, x, y)
        off = trees.norm(trees.subtract(gradient, reference.gradient)).astype(flat.dtype)
        return reference._replace(
            flat=flat, value=value, gradient=gradient, error=off + reference.error,
            adjoint=answer.value, adjoint_residual=jnp.linalg.norm(answer.residual),
            inner_residual=jnp.linalg.norm(residual), contracted=jnp.asarray(False),
        )  # fmt: skip

    def _series(self, inner) -> Neumann:
        return Neumann(self.terms, 1.0 if inner.is_step else None)

    def differentiable(self, inner, x, y0, work, *, throw):
        return implicit(inner, x, y0, work, self._series(inner), throw=False)
