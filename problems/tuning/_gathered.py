"""Solving with dF/dy of a sparse least-squares problem on the columns of its support, gathered into a small matrix."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from bilevel._dense import Dense, factor_definite
from bilevel._support import SupportAware
from bilevel.errors import Status
from bilevel.linear import AbstractLinearSolver, LinearSolution, refine

LARGEST = 1024
"""Largest number of columns that are gathered: above it a factorization takes longer than conjugate gradients do."""


class Support(eqx.Module):
    """What `GatheredSupport` prepares: of each fold the `places` of the weights that are not held at zero, the `slopes`
    of the prox there, the `columns` of X, and the factorized matrix; `too_many`: there are more."""

    places: Int[Array, "k c"]
    slopes: Float[Array, "k c"]
    columns: Float[Array, "k n c"]
    factor: Dense
    too_many: Array

    @property
    def condition(self) -> Array:
        return jnp.max(self.factor.condition)

    @property
    def status(self) -> Status:
        worst: Any = jax.tree.map(jnp.max, self.factor.status)  # codes are ordered
        return Status.where(self.too_many, Status("singular"), worst)


class GatheredSupport(AbstractLinearSolver):
    """For A = dF/dy = I - D (I - t H), D diagonal, H = X' W X for each of K folds: Cholesky of

        S = D (I - D) + t D H D

    on at most `capacity` columns that D does not hold at zero. With it, as in `bilevel._support.SupportAware`,

        A s  = b  has  s = b + D w,            S w = D (b - t H b),
        A' v = g  has  v = g + D z - t H D z,  S z = D g,

    so that a solve takes one product with X or X', not the two of a product with H, and S is prepared once for all of a
    hypergradient's solves. Where there are more columns: conjugate gradients, or "singular" without a `fallback`.

    `X`: (n, p), or (K, n, p); `weights`: (K, n), of the rows; `step`: t.
    """

    X: Float[Array, "*k n p"]
    weights: Float[Array, "k n"]
    step: Float[Array, ""]
    capacity: int = eqx.field(static=True)
    fallback: SupportAware | None = None

    @property
    def keeps(self):
        return True

    def cost(self, system):
        return max(1, self.capacity**2 // (2 * self.X.shape[-1]))  # in products with H

    def prepare(self, system):
        active = system.active
        if active is None:
            raise ValueError("GatheredSupport is for Composite problems only.")
        diagonal = active(jnp.ones((system.size,), system.dtype)).reshape(len(self.weights), -1)

        def one(X, weights, diagonal):
            slopes, places = lax.top_k(diagonal, self.capacity)  # what is zero among them has no effect
            columns = X[:, places]
            scaled = columns * slopes * jnp.sqrt(weights * self.step)[:, None]
            matrix = scaled.T @ scaled + jnp.diag(jnp.where(slopes > 0, slopes * (1 - slopes), 1))
            return places, slopes, columns, factor_definite(matrix)

        too_many = jnp.any(jnp.count_nonzero(diagonal, axis=1) > self.capacity)
        if self.X.ndim == 3:
            parts = lax.map(lambda each: one(*each), (self.X, self.weights, diagonal))
        else:
            parts = lax.map(lambda each: one(self.X, *each), (self.weights, diagonal))
        places, slopes, columns, factor = parts
        return Support(places, slopes, columns, factor, too_many)

    def _apply(self, state: Support, b, transpose: bool):
        """A^-1 b or A'^-1 b, at the point of the state."""
        lines = b.reshape(len(self.weights), -1)
        spread = lambda values: jax.vmap(lambda line, at, v: line.at[at].add(v))(lines, state.places, values)
        solve = lambda right: jax.vmap(lambda factor, r: factor.solve(r, False))(state.factor, right)
        own = jnp.take_along_axis(lines, state.places, axis=1)
        if transpose:
            moved = state.slopes * solve(state.slopes * own)
            fit = self.step * self.weights * jnp.einsum("knc,kc->kn", state.columns, moved)
            back = jnp.einsum("knp,kn->kp", self.X, fit) if self.X.ndim == 3 else fit @ self.X
            return (spread(moved) - back).reshape(-1)
        fit = jnp.einsum("knp,kp->kn", self.X, lines) if self.X.ndim == 3 else lines @ self.X.T
        curved = jnp.einsum("knc,kn->kc", state.columns, self.step * self.weights * fit)
        return spread(state.slopes * solve(state.slopes * (own - curved))).reshape(-1)

    def solve(self, state, system, b, *, transpose=False, rtol=None, guess=None, forcing=None):
        def small():
            return refine(
                lambda r: self._apply(state, r, transpose), system, b, transpose=transpose, rtol=rtol, guess=guess,
                condition=state.condition, status=state.status,
            )  # fmt: skip

        plain = self.fallback
        if plain is None:
            return small()
        other = lambda: plain.solve(None, system, b, transpose=transpose, rtol=rtol, guess=guess)
        return _either(state.too_many, other, small)

    def approximate(self, state, system, b, *, rtol=0.03, transpose=False):
        def small():
            value = self._apply(state, b, transpose)
            return LinearSolution(value, jnp.zeros_like(b), state.status, state.condition, jnp.asarray(1))

        plain = self.fallback
        if plain is None:
            return small()
        other = lambda: plain.approximate(None, system, b, rtol=rtol, transpose=transpose)
        return _either(state.too_many, other, small)


def _either(first, one, other):
    """`one()` where `first` holds, else `other()`, in the dtypes of `one()`."""
    shape = jax.eval_shape(one)
    return lax.cond(first, one, lambda: jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), other(), shape))


def capacity(rows: int, features: int) -> int | None:
    """How many columns to gather: a power of two, no fewer than rows, which is what a lasso's solution has at most.
    None where they are too many."""
    wanted = min(features, 2 ** max(5, (rows - 1).bit_length()))
    return wanted if wanted <= LARGEST else None
