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

    def extremes(self, scaled: jax.Array, steps: int = 4) -> tuple[jax.Array, jax.Array]:
        """About the smallest and the largest singular value of the scaled matrix: inverse and power iteration from a
        fixed start. The last pivot alone misses small eigenvalues whose vector is spread over all unknowns. With two
        steps they may be off by a small factor; what is zero shows in two as well."""
        start = 1 + 0.5 * jnp.cos(1.7 * jnp.arange(1, scaled.shape[0] + 1, dtype=scaled.dtype))

        def unit(v):
            size = jnp.linalg.norm(v)
            return v / jnp.where(size > 0, size, 1)

        def body(_, carry):
            v, w, _, _ = carry
            v = self._bare(unit(v), False)
            w = scaled @ unit(w)
            small, large = jnp.linalg.norm(v), jnp.linalg.norm(w)
            if not self.cholesky:  # on A'A
                v, w = self._bare(v, True), scaled.T @ w
            return v, w, small, large

        one = jnp.ones((), scaled.dtype)
        _, _, small, large = lax.fori_loop(0, steps, body, (start, start, one, one), unroll=steps <= 2)
        small = jnp.where(jnp.isfinite(small) & (small > 0), 1 / jnp.where(small > 0, small, 1), 0)
        return small, large

    def _bare(self, b, transpose: bool):
        """Solves with the scaled matrix."""
        if self.cholesky:
            return jsl.cho_solve((self.factor, True), b)
        return jsl.lu_solve((self.factor, self.permutation), b, trans=1 if transpose else 0)

    def solve(self, b, transpose: bool):
        if self.cholesky:
            return self.right * self._bare(self.left * b, False)
        first, last = (self.right, self.left) if transpose else (self.left, self.right)
        return last * self._bare(first * b, transpose)


def factor_definite(a: jax.Array, steps: int = 4) -> Dense:
    """Cholesky of the symmetrically scaled matrix; what fails is told apart by its smallest eigenvalue. `steps`: of the
    estimate of its condition."""
    n, dtype = a.shape[0], a.dtype
    a = 0.5 * (a + a.T)
    diagonal = jnp.diagonal(a)
    scale = jnp.where(diagonal > 0, 1 / jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1)), 1)
    scaled = a * scale[:, None] * scale[None, :]
    factor = jnp.linalg.cholesky(scaled, symmetrize_input=False)
    unused = jnp.zeros((0,), jnp.int32)
    one = jnp.ones((), dtype)
    dense = Dense(factor, unused, scale, scale, one, Status(), True)
    smallest, largest = dense.extremes(scaled, steps)
    good = jnp.all(jnp.isfinite(factor)) & (smallest > _threshold(n, dtype) * largest)

    def why(matrix):
        values = jnp.linalg.eigvalsh(matrix)
        size = jnp.max(jnp.abs(values))
        saddle = values[0] < -10 * _threshold(n, dtype) * size
        status = Status.where(saddle, Status("not_a_minimum"), Status("singular"))
        return Status.where(jnp.isfinite(size), status, Status("non_finite")).code

    code = lax.cond(good, lambda _: Status("converged").code, why, scaled)
    condition = jnp.where(good, largest / jnp.where(good, smallest, 1), jnp.inf)
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
    permutation = permutation.astype(jnp.int32)
    dense = Dense(factor, permutation, left, right, jnp.ones((), dtype), Status(), False)
    smallest, largest = dense.extremes(scaled)
    good = smallest > _threshold(n, dtype) * largest
    status = Status.where(good, Status("converged"), Status("singular"))
    status = Status.where(jnp.all(jnp.isfinite(a)), status, Status("non_finite"))
    condition = jnp.where(good, largest / jnp.where(good, smallest, 1), jnp.inf)
    return Dense(factor, permutation, left, right, condition, status, False)


def _threshold(n: int, dtype) -> float:
    return 2.0 * max(n, 8) * float(jnp.finfo(dtype).eps)
