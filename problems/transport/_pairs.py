"""What is done with all pairs of points: sums of exponentials of (f_i + g_j - c_ij) / epsilon, over rows and columns.

`Matrix` holds the costs; `_clouds.Cloud` makes them from the points, a block at a time. An infinite cost is a pair
that is forbidden: its exponential is exactly zero, and so are all derivatives through it.
"""

from __future__ import annotations

import abc

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float


class AbstractPairs(eqx.Module):
    """All pairs of n points on the left and m on the right, with their costs."""

    @abc.abstractmethod
    def swapped(self) -> AbstractPairs:
        """Left and right exchanged."""

    @abc.abstractmethod
    def exponentials(self, f: Array, g: Array, epsilon: Array) -> Float[Array, "n m"]:
        """exp((f_i + g_j - c_ij) / epsilon), as a matrix."""

    @abc.abstractmethod
    def sums(self, f: Array, g: Array, a: Array, b: Array, epsilon: Array) -> tuple[Array, Array]:
        """The row and column sums of a_i b_j exp((f_i + g_j - c_ij) / epsilon), shapes (n,) and (m,)."""

    @abc.abstractmethod
    def products(
        self, f: Array, g: Array, a: Array, b: Array, epsilon: Array, left: Array | None, right: Array | None
    ) -> tuple[Array | None, Array | None]:
        """The matrix pi_ij = a_i b_j exp((f_i + g_j - c_ij) / epsilon) times `right`, shape (m,) or (m, k), and its
        transpose times `left`; None for None."""

    @abc.abstractmethod
    def soft_min(self, g: Array, b: Array, epsilon: Array) -> Float[Array, " n"]:
        """log sum_j b_j exp((g_j - c_ij) / epsilon), shape (n,): minus infinity where all pairs are forbidden."""

    @abc.abstractmethod
    def open_rows(self, b: Array) -> Bool[Array, " n"]:
        """Whether a row has a pair that is not forbidden with a point of positive weight."""

    @abc.abstractmethod
    def spread(self) -> Array:
        """About the range of the finite costs."""


class Matrix(AbstractPairs):
    """The costs as a matrix, shape (n, m)."""

    costs: Float[Array, "n m"]

    def swapped(self):
        return Matrix(self.costs.T)

    def exponentials(self, f, g, epsilon):
        return jnp.exp((f[:, None] + g[None, :] - _finite(self.costs)) / epsilon)

    def sums(self, f, g, a, b, epsilon):
        # potentials enter by factors that are one here: so a derivative along them is two products of the one matrix
        # with vectors, where differentiating the matrix would form another
        near_f, near_g = lax.stop_gradient((f, g))
        E = self.exponentials(near_f, near_g, epsilon)
        left, right = a * jnp.exp((f - near_f) / epsilon), b * jnp.exp((g - near_g) / epsilon)
        return left * (E @ right), right * (left @ E)

    def products(self, f, g, a, b, epsilon, left, right):
        E = self.exponentials(f, g, epsilon)
        ahead = None if right is None else _scale(a, E @ _scale(b, right))
        back = None if left is None else _scale(b, E.T @ _scale(a, left))
        return ahead, back

    def soft_min(self, g, b, epsilon):
        return self.soft_min_and_terms(g, b, epsilon)[0]

    def soft_min_and_terms(self, g, b, epsilon):
        """`soft_min`, and what it sums: (soft, top, E) with E_ij exp(top_i) = exp((g_j - c_ij) / epsilon)."""
        top = jnp.max(jnp.where(b > 0, g, -jnp.inf)[None, :] - self.costs, axis=1)
        top = lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
        # the weights are factors, so that a weight of zero has a derivative too
        terms = jnp.exp(jnp.minimum((g[None, :] - _finite(self.costs) - top[:, None]) / epsilon, ceiling_of(g)))
        total = terms @ b
        top = top / epsilon
        soft = jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1)) + top, -jnp.inf)
        return soft, top, terms

    def open_rows(self, b):
        return jnp.any((self.costs != jnp.inf) & (b > 0)[None, :], axis=1)

    def spread(self):
        # rows first: XLA's reduction to one number at once is several times slower
        low = jnp.min(jnp.min(self.costs, axis=1))
        high = jnp.max(jnp.max(jnp.where(self.costs != jnp.inf, self.costs, -jnp.inf), axis=1))
        return jnp.where(high > low, high - low, 0)


def _finite(costs: Array) -> Array:
    """The costs, with a number instead of infinity whose exponentials, and their derivatives, are exactly zero."""
    large = float(jnp.finfo(costs.dtype).max) ** 0.4
    return jnp.where(costs == jnp.inf, large, costs)


def ceiling_of(g: Array) -> float:
    """Largest exponent taken (relative to the largest of a point with weight: only points without weight come near)."""
    return float(np.log(float(jnp.finfo(g.dtype).max))) - 10


def _scale(weights, v):
    return weights * v if v.ndim == 1 else weights[:, None] * v
