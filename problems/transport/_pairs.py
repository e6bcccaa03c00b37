"""What is done with all pairs of points: sums of exponentials of (f_i + g_j - c_ij) / epsilon, over rows and columns.

`Matrix` holds the costs; `_clouds.Cloud` makes them from the points, a block at a time. An infinite cost is a pair
that is forbidden: its exponential is exactly zero, and so are all derivatives through it.
"""

from __future__ import annotations

import abc
import functools

import equinox as eqx
import jax
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
        return _exponentials(self.costs, f, g, epsilon)

    def sums(self, f, g, a, b, epsilon):
        return _sums(self.costs, f, g, a, b, epsilon)

    def products(self, f, g, a, b, epsilon, left, right):
        E = self.exponentials(f, g, epsilon)
        ahead = None if right is None else _scale(a, E @ _scale(b, right))
        back = None if left is None else _scale(b, E.T @ _scale(a, left))
        return ahead, back

    def soft_min(self, g, b, epsilon):
        # chosen once more, so that no derivative comes through an infinite cost
        forbidden = Matrix(jnp.where(self.costs == jnp.inf, jnp.inf, self.costs))
        return forbidden.soft_min_and_terms(g, b, epsilon)[0]

    def soft_min_and_terms(self, g, b, epsilon):
        """`soft_min`, and what it sums: (soft, top, E) with E_ij exp(top_i) = exp((g_j - c_ij) / epsilon)."""
        top = jnp.max(jnp.where(b > 0, g, -jnp.inf)[None, :] - self.costs, axis=1)
        top = lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
        # the weights are factors, so that a weight of zero has a derivative too
        terms = jnp.exp(jnp.minimum((g[None, :] - self.costs - top[:, None]) / epsilon, ceiling_of(g)))
        total, top = terms @ b, top / epsilon
        soft = jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1)) + top, -jnp.inf)
        return soft, top, terms

    def open_rows(self, b):
        return jnp.any((self.costs != jnp.inf) & (b > 0)[None, :], axis=1)

    def spread(self):
        # rows first: XLA's reduction to one number at once is several times slower
        low = jnp.min(jnp.min(self.costs, axis=1))
        high = jnp.max(jnp.max(jnp.where(self.costs != jnp.inf, self.costs, -jnp.inf), axis=1))
        return jnp.where(high > low, high - low, 0)


@jax.custom_jvp
def _exponentials(costs, f, g, epsilon):
    return jnp.exp((f[:, None] + g[None, :] - costs) / epsilon)


@functools.partial(_exponentials.defjvp, symbolic_zeros=True)
def _exponentials_along(primals, tangents):
    """Autodiff's, but exactly zero at forbidden pairs, whatever the tangent of an infinite cost."""
    d_costs, d_f, d_g, d_epsilon = (_or_none(t) for t in tangents)
    costs, f, g, epsilon = primals
    E = _exponentials(costs, f, g, epsilon)
    change = _change_of_exponents(E, costs, f, g, epsilon, d_costs, d_epsilon)
    if d_f is not None:
        change = change + (d_f / epsilon)[:, None]
    if d_g is not None:
        change = change + (d_g / epsilon)[None, :]
    return E, E * change


def _change_of_exponents(E, costs, f, g, epsilon, d_costs, d_epsilon):
    """The part of the exponents' tangent that comes from costs and epsilon, shape (n, m)."""
    change = jnp.zeros_like(E)
    if d_costs is not None:
        change = change - jnp.where(E > 0, d_costs, 0) / epsilon
    if d_epsilon is not None:
        exponent = (f[:, None] + g[None, :] - jnp.where(E > 0, costs, 0)) / epsilon
        change = change - jnp.where(E > 0, exponent, 0) * (d_epsilon / epsilon)
    return change


@jax.custom_jvp
def _sums(costs, f, g, a, b, epsilon):
    E = _exponentials(costs, f, g, epsilon)
    return a * (E @ b), b * (a @ E)


@functools.partial(_sums.defjvp, symbolic_zeros=True)
def _sums_along(primals, tangents):
    """In f, g, a and b a derivative is two products of the same matrix with vectors; autodiff would form another matrix
    for each."""
    costs, f, g, a, b, epsilon = primals
    d_costs, d_f, d_g, d_a, d_b, d_epsilon = (_or_none(t) for t in tangents)
    E = _exponentials(costs, f, g, epsilon)
    ahead, back = E @ b, a @ E
    d_log_f, d_log_g = (jnp.zeros_like(p) if d is None else d / epsilon for p, d in ((f, d_f), (g, d_g)))
    d_a, d_b = (jnp.zeros_like(p) if d is None else d for p, d in ((a, d_a), (b, d_b)))
    rows = ahead * (a * d_log_f + d_a) + a * (E @ (b * d_log_g + d_b))
    columns = back * (b * d_log_g + d_b) + b * ((a * d_log_f + d_a) @ E)
    if d_costs is not None or d_epsilon is not None:
        change = E * _change_of_exponents(E, costs, f, g, epsilon, d_costs, d_epsilon)
        rows, columns = rows + a * (change @ b), columns + b * (a @ change)
    return (a * ahead, b * back), (rows, columns)


def _or_none(tangent):
    return None if isinstance(tangent, jax.custom_derivatives.SymbolicZero) else tangent


def ceiling_of(g: Array) -> float:
    """Largest exponent taken (relative to the largest of a point with weight: only points without weight come near)."""
    return float(np.log(float(jnp.finfo(g.dtype).max))) - 10


def _scale(weights, v):
    return weights * v if v.ndim == 1 else weights[:, None] * v
