"""Solving with dF/dy of a sparse least-squares problem on its support, by a factorization that all solves share."""

from __future__ import annotations

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bilevel._dense import Dense, factor_definite
from bilevel._support import SupportAware
from bilevel.errors import Status
from bilevel.linear import AbstractLinearSolver, LinearSolution, refine

LARGEST = 1024
"""Largest number of columns that are gathered: above it a factorization takes longer than conjugate gradients do."""


class Support(eqx.Module):
    """What is prepared, of each fold: the `slopes` D of the prox and the factorized matrix of the solver; where columns
    are gathered also their `places` and the `columns` of X, and whether there are `too_many`."""

    slopes: Float[Array, "k c"]
    factor: Dense
    places: Any = None  # (K, c)
    columns: Any = None  # (K, n, c)
    too_many: Array | None = None

    def solve(self, right: Float[Array, "k c"]) -> Float[Array, "k c"]:
        """The solution of each fold's system."""
        return jax.vmap(lambda factor, r: factor.solve(r, False))(self.factor, right)

    @property
    def condition(self) -> Array:
        return jnp.max(self.factor.condition)

    @property
    def status(self) -> Status:
        worst: Any = jax.tree.map(jnp.max, self.factor.status)  # codes are ordered
        return worst if self.too_many is None else Status.where(self.too_many, Status("singular"), worst)


class AbstractOnSupport(AbstractLinearSolver):
    """For A = dF/dy = I - D (I - t H), D diagonal, H the Hessian of the smooth part, K diagonal blocks: Cholesky of

        S = D (I - D) + t D H D

    on the range of D. With it, as in `bilevel._support.SupportAware`,

        A s  = b  has  s = b + D w,            S w = D (b - t H b),
        A' v = g  has  v = g + D z - t H D z,  S z = D g.
    """

    @property
    @abc.abstractmethod
    def beyond(self) -> SupportAware | None:
        """Who solves where there are too many weights, if anybody."""

    @abc.abstractmethod
    def apply(self, state: Support, b: Array, transpose: bool) -> Array:
        """A^-1 b or A'^-1 b, flat, at the point of the state."""

    @property
    def keeps(self):
        return True

    def solve(self, state, system, b, *, transpose=False, rtol=None, guess=None, forcing=None):
        def small():
            return refine(
                lambda r: self.apply(state, r, transpose), system, b, transpose=transpose, rtol=rtol, guess=guess,
                condition=state.condition, status=state.status,
            )  # fmt: skip

        plain = self.beyond
        if plain is None:
            return small()
        other = lambda: plain.solve(None, system, b, transpose=transpose, rtol=rtol, guess=guess)
        return _either(state.too_many, other, small)

    def approximate(self, state, system, b, *, rtol=0.03, transpose=False):
        def small():
            value = self.apply(state, b, transpose)
            return LinearSolution(value, jnp.zeros_like(b), state.status, state.condition, jnp.asarray(1))

        plain = self.beyond
        if plain is None:
            return small()
        other = lambda: plain.approximate(None, system, b, rtol=rtol, transpose=transpose)
        return _either(state.too_many, other, small)


def _either(first, one, other):
    """`one()` where `first` holds, else `other()`, in the dtypes of `one()`."""
    shape = jax.eval_shape(one)
    return lax.cond(first, one, lambda: jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), other(), shape))


class GatheredSupport(AbstractOnSupport):
    """H = X' W X for each of K folds, by at most `capacity` columns of X that D does not hold at zero.

    A solve takes one product with X or X', not the two of a product with H, and S is prepared once for all solves of a
    hypergradient. Where there are more columns: conjugate gradients, or "singular" without a `fallback`.

    `X`: (n, p), or (K, n, p); `weights`: (K, n), of the rows; `step`: t.
    """

    X: Float[Array, "*k n p"]
    weights: Float[Array, "k n"]
    step: Float[Array, ""]
    capacity: int = eqx.field(static=True)
    fallback: SupportAware | None = None

    @property
    def beyond(self):
        return self.fallback

    def cost(self, system):
        return max(1, self.capacity**2 // (2 * self.X.shape[-1]))  # in products with H

    def prepare(self, system):
        diagonal = _slopes(system, len(self.weights))

        def one(X, weights, diagonal):
            slopes, places = lax.top_k(diagonal, self.capacity)  # what is zero among them has no effect
            columns = X[:, places]
            scaled = columns * slopes * jnp.sqrt(weights * self.step)[:, None]
            return slopes, factor_definite(_restricted(scaled.T @ scaled, slopes)), places, columns

        too_many = jnp.any(jnp.count_nonzero(diagonal, axis=1) > self.capacity)
        if self.X.ndim == 3:
            parts = lax.map(lambda each: one(*each), (self.X, self.weights, diagonal))
        else:
            parts = lax.map(lambda each: one(self.X, *each), (self.weights, diagonal))
        slopes, factor, places, columns = parts
        return Support(slopes, factor, places, columns, too_many)

    def apply(self, state, b, transpose):
        lines = b.reshape(len(self.weights), -1)
        spread = lambda values: jax.vmap(lambda line, at, v: line.at[at].add(v))(lines, state.places, values)
        own = jnp.take_along_axis(lines, state.places, axis=1)
        if transpose:
            moved = state.slopes * state.solve(state.slopes * own)
            fit = self.step * self.weights * jnp.einsum("knc,kc->kn", state.columns, moved)
            back = jnp.einsum("knp,kn->kp", self.X, fit) if self.X.ndim == 3 else fit @ self.X
            return (spread(moved) - back).reshape(-1)
        fit = jnp.einsum("knp,kp->kn", self.X, lines) if self.X.ndim == 3 else lines @ self.X.T
        curved = jnp.einsum("knc,kn->kc", state.columns, self.step * self.weights * fit)
        return spread(state.slopes * state.solve(state.slopes * (own - curved))).reshape(-1)


class GramSupport(AbstractOnSupport):
    """H by the matrices themselves, (K, p, p): where there are few features and many rows."""

    matrices: Float[Array, "k p p"]
    step: Float[Array, ""]

    @property
    def beyond(self):
        return None

    def cost(self, system):
        return 1

    def prepare(self, system):
        slopes = _slopes(system, len(self.matrices))

        def one(H, slopes):
            return factor_definite(_restricted(self.step * H * slopes[:, None] * slopes, slopes))

        return Support(slopes, lax.map(lambda each: one(*each), (self.matrices, slopes)))

    def apply(self, state, b, transpose):
        lines = b.reshape(len(self.matrices), -1)
        curved = lambda lines: self.step * jnp.einsum("kpq,kq->kp", self.matrices, lines)
        if transpose:
            moved = state.slopes * state.solve(state.slopes * lines)
            return (lines + moved - curved(moved)).reshape(-1)
        return (lines + state.slopes * state.solve(state.slopes * (lines - curved(lines)))).reshape(-1)


def _slopes(system, folds: int) -> Float[Array, "k p"]:
    """The diagonal of D."""
    if system.active is None:
        raise ValueError("bilevel: this linear solver is for Composite problems only; use Krylov() or Direct().")
    return system.active(jnp.ones((system.size,), system.dtype)).reshape(folds, -1)


def _restricted(matrix: Float[Array, "c c"], slopes: Float[Array, " c"]) -> Float[Array, "c c"]:
    """S from t D H D: what is held at zero gets a one, and has no effect."""
    return matrix + jnp.diag(jnp.where(slopes > 0, slopes * (1 - slopes), 1))


def capacity(rows: int, features: int) -> int | None:
    """How many columns to gather: as many as rows, which is what a lasso's solution has at most, and some on the way
    there. None where they are too many."""
    wanted = min(features, max(rows, 32))
    return wanted if wanted <= LARGEST else None
