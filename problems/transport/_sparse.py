"""An observed coupling between point clouds as a list of pairs, so that no (n, m) matrix is formed."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .clouds import PointCloudCost


class ObservedPairs(eqx.Module):
    """A coupling of shape (n, m) that is zero but at `rows`, `columns`, each pair listed once."""

    rows: Int[Array, " N"]
    columns: Int[Array, " N"]
    weights: Float[Array, " N"]
    shape: tuple[int, int] = eqx.field(static=True)

    @classmethod
    def of_samples(cls, pairs: np.ndarray, shape: tuple[int, int], dtype: Any) -> ObservedPairs:
        """The frequencies of index pairs, shape (N, 2)."""
        found, counts = np.unique(pairs, axis=0, return_counts=True)
        weights = jnp.asarray(counts / len(pairs), dtype)
        return cls(jnp.asarray(found[:, 0]), jnp.asarray(found[:, 1]), weights, shape)

    @property
    def dtype(self) -> Any:
        return self.weights.dtype

    def astype(self, dtype: Any) -> ObservedPairs:
        return ObservedPairs(self.rows, self.columns, self.weights.astype(dtype), self.shape)

    def sum(self, axis: int | None = None) -> Array:
        """The mass (None), the row sums (1) or the column sums (0)."""
        if axis is None:
            return jnp.sum(self.weights)
        index, count = (self.rows, self.shape[0]) if axis == 1 else (self.columns, self.shape[1])
        return jnp.zeros(count, self.dtype).at[index].add(self.weights)

    def kl(self, a: Array, b: Array) -> Array:
        """KL(self | a b')."""
        product = a[self.rows] * b[self.columns]
        ratio = jnp.where(product > 0, self.weights / jnp.where(product > 0, product, 1), 1)
        return jnp.vdot(self.weights, jnp.log(ratio)) - self.sum() + jnp.sum(a) * jnp.sum(b)

    def cost(self, cost: PointCloudCost, theta: Any) -> Array:
        """The sum of the costs of the pairs, times their weights."""
        return jnp.vdot(self.weights, cost.pairs(theta).at(self.rows, self.columns))
