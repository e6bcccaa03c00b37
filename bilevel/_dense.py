"""Dense factorizations that say when a matrix is numerically singular or no minimum's Hessian."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jax import lax

from .errors import Status


class Dense(eqx.Module):
    factor: jax.Array
    permutation: jax.Array
    left: jax.Array
    right: jax.Array
    condition: jax.Array
    status: Status
    cholesky: bool = eqx.field(static=True)

    def solve(self, b, transpose: bool):
        if self.cholesky:
            return self.right * jsl.cho_solve((self.factor, True), self.left * b)
        first, last = (self.right, self.left) if transpose else (self.left, self.right)
        return last * jsl.lu_solve((self.factor, self.permutation), first * b, trans=1 if transpose else 0)


def factor_definite(a: jax.Array) -> Dense:
    """Cholesky of the symmetrically scaled matrix; what fails is told apart by its smallest eigenvalue."""
    n, dtype = a.shape[0], a.dtype
    a = 0.5 * (a + a.T)
    diagonal = jnp.diagonal(a)
    scale = jnp.where(diagonal > 0, 1 / jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1)), 1)
    scaled = a * scale[:, None] * scale[None, :]
    factor = jnp.linalg.cholesky(scaled, symmetrize_input=False)
    pivots = jnp.square(jnp.diagonal(factor))
    smallest = jnp.min(pivots)
    threshold = _threshold(n, dtype) * jnp.max(pivots)
    good = jnp.all(jnp.isfinite(factor)) & (smallest > threshold)

    def why(matrix):
        values = jnp.linalg.eigvalsh(matrix)
        size = jnp.max(jnp.abs(values))
        saddle = values[0] < -10 * _threshold(n, dtype) * size
        status = Status.where(saddle, Status("not_a_minimum"), Status("singular"))
        return Status.where(jnp.isfinite(size), status, Status("non_finite")).code

    code = lax.cond(good, lambda _: Status("converged").code, why, scaled)
    condition = jnp.where(good, jnp.max(pivots) / jnp.where(good, smallest, 1), jnp.inf)
    unused = jnp.zeros((0,), jnp.int32)
    return Dense(factor, unused, scale, scale, condition, Status(code), True)


def factor_general(a: jax.Array) -> Dense:
    """LU with partial pivoting of the row- and column-scaled matrix."""
    n, dtype = a.shape[0], a.dtype
    rows = jnp.max(jnp.abs(a), axis=1)
    left = jnp.where(rows > 0, 1 / jnp.where(rows > 0, rows, 1), 1)
    scaled = a * left[:, None]
    columns = jnp.max(jnp.abs(scaled), axis=0)
    right = jnp.where(columns > 0, 1 / jnp.where(columns > 0, columns, 1), 1)
    scaled = scaled * right[None, :]
    factor, permutation = jsl.lu_factor(scaled)
    pivots = jnp.abs(jnp.diagonal(factor))
    smallest, largest = jnp.min(pivots), jnp.max(pivots)
    good = smallest > _threshold(n, dtype) * largest
    status = Status.where(good, Status("converged"), Status("singular"))
    status = Status.where(jnp.all(jnp.isfinite(a)), status, Status("non_finite"))
    condition = jnp.where(good, largest / jnp.where(good, smallest, 1), jnp.inf)
    return Dense(factor, permutation.astype(jnp.int32), left, right, condition, status, False)


def _threshold(n: int, dtype) -> float:
    return 2.0 * max(n, 8) * float(jnp.finfo(dtype).eps)
