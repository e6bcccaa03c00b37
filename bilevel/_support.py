"""Solving with dF/dy of a forward-backward residual, on its support."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from . import linear
from ._trees import ravel, ravel_like
from .krylov import conjugate_gradient
from .linear import AbstractLinearSolver, Direct, LinearSolution

__all__ = ["SupportAware"]

_POWER_STEPS = 8  # of the iteration for L; any t > 0 gives the same solution, so a rough one will do


def inverse_curvature(function: Callable, x: PyTree, y: PyTree) -> jax.Array:
    """1 / L, L the largest |eigenvalue| of the Hessian in y of `function(x, y)` by power iteration, or 1 where that is
    zero. A constant of every derivative."""
    still = lambda tree: jax.tree.map(lambda a: lax.stop_gradient(a) if eqx.is_array(a) else a, tree)
    function, x, y = still((function, x, y))
    flat, unravel = ravel(y)

    def gradient(point):
        return ravel_like(jax.grad(function, argnums=1)(x, unravel(point)), flat.dtype)

    hessian = jax.linearize(gradient, flat)[1]
    start = 1 + 0.5 * jnp.cos(jnp.arange(1, flat.size + 1, dtype=flat.dtype))

    def body(_, carry):
        v, _ = carry
        w = hessian(v)
        size = jnp.linalg.norm(w)
        return w / jnp.where(size > 0, size, 1), size

    _, size = lax.fori_loop(0, _POWER_STEPS, body, (start / jnp.linalg.norm(start), jnp.ones((), flat.dtype)))
    fine = (size > 0) & jnp.isfinite(size)
    return lax.stop_gradient(jnp.where(fine, 1 / jnp.where(fine, size, 1), 1))


class SupportAware(AbstractLinearSolver):
    """For A = dF/dy = I - D (I - t H), D the prox's derivative (`LinearSystem.active`), H the smooth part's Hessian:
    LU of A up to `bilevel.linear.DENSE_LIMIT` unknowns, above it conjugate gradients on the support, never forming A.

    S = A D = D (I - D) + t D H D is symmetric, and positive definite on the range of D where the solution is a strict
    minimum. With it (insert to check; derived in docs/theory)

        A s  = b  has  s = b + D w,          S w = b - A b = D (I - t H) b,
        A' v = g  has  v = g + z - A' z,     S z = D g,

    w and z in the range of D, where conjugate gradients stay. A takes one Hessian product, and so does a step.

    **Arguments:** `rtol`: relative residual to stop at; None: what the caller needs. A singular or indefinite S is
    found by Ritz values and curvatures: what the right-hand side (dense: a fixed probe) does not excite is missed.
    """

    rtol: float | None = None
    max_steps: int | None = eqx.field(static=True, default=None)

    def _dense(self, system) -> bool:
        return system.size <= linear.DENSE_LIMIT

    @property
    def keeps(self):
        return True

    def cost(self, system):
        return system.size if self._dense(system) else 0

    def prepare(self, system):
        active = system.active
        if active is None:
            raise ValueError("bilevel: SupportAware() is for Composite problems only; use Krylov() or Direct().")
        if not self._dense(system):
            return None
        state = Direct().prepare(system)
        # LU does not see the sign of the curvature on the support
        part = active(jnp.cos(jnp.arange(1, system.size + 1, dtype=system.dtype)))
        said = linear.curvature_status(lambda w: system.mv(active(w)), part)
        return eqx.tree_at(lambda s: s.status, state, state.status.then(said))

    def solve(self, state, system, b, *, transpose=False, rtol=None, guess=None, forcing=None):
        if state is not None:
            return Direct().solve(state, system, b, transpose=transpose, rtol=rtol, guess=guess)
        eps = float(jnp.finfo(b.dtype).eps)
        wanted = self.rtol if self.rtol is not None else rtol if rtol is not None else 50 * eps
        rest = b if guess is None else b - system.product(guess, transpose)
        right = system.active(rest) if transpose else rest - system.mv(rest)
        size = jnp.linalg.norm(right)
        goal = jnp.asarray(wanted, b.dtype) * jnp.linalg.norm(b)  # the residual of A s = b is that of S w
        relative = goal / jnp.where(size > 0, size, 1)
        found = conjugate_gradient(
            lambda w: system.mv(system.active(w)), right, rtol=relative, max_steps=self.max_steps,
            forcing=None if self.rtol is not None or guess is not None else forcing,
        )  # fmt: skip
        if transpose:
            value = rest + found.value - system.rmv(found.value)
        else:
            value = rest + system.active(found.value)
        value = value if guess is None else guess + value
        residual = b - system.product(value, transpose)
        extra = 3 if guess is None else 4
        return LinearSolution(value, residual, found.status, found.condition, found.steps + extra)

    def approximate(self, state, system, b, *, rtol=0.03, transpose=False):
        if state is not None:
            return Direct().approximate(state, system, b, transpose=transpose)
        return self.solve(state, system, b, transpose=transpose, rtol=rtol)
