"""Another linear solver in float32, refined in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from ..errors import Status
from ._base import AbstractLinearSolver, LinearSolution, refine
from ._direct import Direct


class MixedPrecision(AbstractLinearSolver):
    """Another solver in float32 as the preconditioner of refinement in float64 (for data too large for the cache).

    Where float32 finds the matrix singular or indefinite, float64 decides.
    """

    low: AbstractLinearSolver

    def prepare(self, system):
        assert system.lower is not None
        lower = system.lower()
        state = self.low.prepare(lower)
        if not isinstance(self.low, Direct):
            return lower, state, None
        good = state.status.code == 0
        shape = jax.eval_shape(lambda: self.low.prepare(system))
        nothing = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shape)
        return lower, state, lax.cond(good, nothing, lambda: self.low.prepare(system))

    def cost(self, system):
        return self.low.cost(system)

    def _apply(self, state, b, transpose, rtol):
        """`(value, status, condition, products)` of a solve in float32, b scaled to length one first."""
        lower, low_state, full = state
        size = jnp.linalg.norm(b)
        scale = jnp.where(size > 0, size, 1)
        unit = (b / scale).astype(lower.dtype)
        if full is None:
            out = self.low.approximate(low_state, lower, unit, transpose=transpose, rtol=jnp.clip(rtol, 1e-4, 0.1))
            value = out.value.astype(b.dtype) * scale
            return value, out.status, out.condition.astype(b.dtype), out.products
        good = low_state.status.code == 0
        value = lax.cond(
            good,
            lambda: low_state.solve(unit, transpose).astype(b.dtype) * scale,
            lambda: full.solve(b, transpose),
        )
        status = Status.where(good, Status(), full.status)
        condition = jnp.where(good, low_state.condition.astype(b.dtype), full.condition)
        return value, status, condition, jnp.asarray(0)

    def solve(self, state, system, b, *, transpose=False, rtol=None, guess=None, forcing=None):
        wanted = jnp.asarray(50 * jnp.finfo(b.dtype).eps if rtol is None else rtol, b.dtype)
        value, status, condition, products = self._apply(state, b, transpose, wanted)
        start = value
        if guess is not None:  # whichever is closer
            rest = jnp.linalg.norm(b - system.product(guess, transpose))
            start = jnp.where(rest < 1e-4 * jnp.linalg.norm(b), guess, value)
        out = refine(
            lambda r: self._apply(state, r, transpose, wanted)[0], system, b, transpose=transpose, rtol=rtol,
            guess=start, condition=condition, status=status,
        )  # fmt: skip
        if isinstance(self.low, Direct):
            return out._replace(products=out.products + products)
        # iterative: float32 is no judge of the matrix, and where it does not get there float64 goes on
        fallback = lambda: self.low.solve(None, system, b, transpose=transpose, rtol=rtol, forcing=forcing)
        return lax.cond(
            out.status.code == 0,
            lambda: jax.tree.map(lambda a, b: a.astype(b.dtype), out, jax.eval_shape(fallback)),
            fallback,
        )

    def approximate(self, state, system, b, *, rtol=0.03, transpose=False):
        value, status, condition, products = self._apply(state, b, transpose, jnp.asarray(rtol, b.dtype))
        return LinearSolution(value, jnp.zeros_like(b), status, condition, products)

    @property
    def keeps(self):
        return self.low.keeps
