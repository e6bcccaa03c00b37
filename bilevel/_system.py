"""dF/dy at one point in flat coordinates, from autodiff or from the operator a problem declares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
from jax import lax
from jaxtyping import PyTree

from . import _precision as precision
from ._trees import ravel, ravel_like
from .errors import Status

_COLUMNS = 256  # columns of a dense matrix formed at once: bounds memory, keeps matrix products large


class LinearSystem(NamedTuple):
    """dF/dy at one point in flat coordinates: products `mv` and `rmv` (transposed), and what is known of it."""

    mv: Callable[[jax.Array], jax.Array]
    rmv: Callable[[jax.Array], jax.Array]
    size: int
    dtype: Any
    symmetric: bool
    definite: bool
    operator: Any  # lineax operator on y's structure, or None
    unravel: Callable[[jax.Array], PyTree]
    gauge: Callable[[jax.Array], jax.Array] | None
    defect: jax.Array | None = None  # how far dF/dy is from vanishing along the gauge, relative to its size
    lower: Callable[[], LinearSystem] | None = None  # the same in float32, where that pays
    active: Callable[[jax.Array], jax.Array] | None = None  # the derivative of the prox of a forward-backward residual

    def product(self, v: jax.Array, transpose: bool) -> jax.Array:
        return self.rmv(v) if transpose else self.mv(v)

    def matrix(self) -> jax.Array:
        """The dense matrix, shape (n, n), formed from products with unit vectors in blocks of columns."""
        identity = jnp.eye(self.size, dtype=self.dtype)
        if self.size <= _COLUMNS:
            return jax.vmap(self.mv, out_axes=1)(identity)
        return lax.map(self.mv, identity, batch_size=_COLUMNS).T

    @property
    def gauge_status(self) -> Status:
        """`not_a_gauge` where dF/dy does not vanish along the declared gauge."""
        if self.defect is None:
            return Status()
        false = self.defect > jnp.sqrt(jnp.finfo(self.dtype).eps)
        return Status.where(false, Status("not_a_gauge"), Status())

    def off_gauge(self, v: jax.Array) -> jax.Array:
        """v without its part along the gauge."""
        return v if self.gauge is None else v - self.gauge(v)


def hessian_matrix(function: Callable[[jax.Array], jax.Array], point: jax.Array) -> jax.Array:
    """The dense Hessian, shape (n, n), of a scalar function of a vector: for operators that problems declare."""
    return jax.hessian(function)(point)


def row_curvatures(function: Callable[[jax.Array], jax.Array], rows: jax.Array) -> jax.Array:
    """Of a sum of functions of single rows, shape (n,) or (n, c): each row's second derivative, (n,) or (n, c, c)."""

    def along(unit):
        return jax.jvp(jax.grad(function), (rows,), (jnp.broadcast_to(unit, rows.shape),))[1]

    if rows.ndim == 1:
        return along(jnp.ones((), rows.dtype))
    return jax.vmap(along, out_axes=1)(jnp.eye(rows.shape[1], dtype=rows.dtype))


def linear_system(inner, x: PyTree, y: PyTree, *, lower: bool = False) -> tuple[jax.Array, LinearSystem]:
    """F(x, y), flat, and dF/dy there, linearized once (each product is then one pass forward and one back).

    `lower`: offer the system in float32 as well.
    """
    flat, unravel = ravel(y)

    def optimality(flat):
        return ravel_like(inner.optimality(x, unravel(flat)), flat.dtype)

    residual, mv = jax.linearize(optimality, flat)
    if inner.symmetric:
        rmv = mv
    else:
        transposed = jax.linear_transpose(mv, flat)
        rmv = lambda v: transposed(v)[0]
    operator = inner.operator_at(x, y)
    if operator is not None:
        _check_operator(operator, flat.size)
    gauge = defect = None
    if inner.gauge_part(x, y) is not None:  # shift the flat directions away from zero: a solve on the quotient
        gauge = lambda v: ravel_like(inner.gauge_part(x, unravel(v)), flat.dtype)
        size, defect = size_along(mv, gauge, flat)
        mv, rmv = shifted(mv, gauge, size), shifted(rmv, gauge, size)
    low = None
    if lower:
        low = lambda: linear_system(precision.lowered(inner), precision.lowered(x), precision.lowered(y))[1]
    part = inner.active_part(x, y)
    active = None if part is None else lambda w: ravel_like(part(unravel(w)), flat.dtype)
    system = LinearSystem(
        mv,
        rmv,
        flat.size,
        flat.dtype,
        inner.symmetric,
        inner.definite,
        operator,
        unravel,
        gauge,
        defect,
        low,
        active,
    )
    return residual, system


def size_along(mv, gauge, flat) -> tuple[jax.Array, jax.Array]:
    """The size of the matrix on a probe off the gauge, and on one along it relative to that."""
    probe = jnp.cos(jnp.arange(1, flat.size + 1, dtype=flat.dtype))
    along = gauge(probe)
    off = probe - along
    tiny = jnp.finfo(flat.dtype).tiny
    size = jnp.linalg.norm(mv(off)) / jnp.maximum(jnp.linalg.norm(off), tiny)
    size = jnp.where(size > 0, size, 1)
    return size, jnp.linalg.norm(mv(along)) / jnp.maximum(jnp.linalg.norm(along), tiny) / size


def shifted(mv, gauge, size):
    """mv + size * (projector on the gauge)."""
    return lambda v: mv(v) + size * gauge(v)


def _check_operator(operator, size: int) -> None:
    if not isinstance(operator, lx.AbstractLinearOperator):
        raise TypeError(f"bilevel: `operator(x, y)` must return a lineax operator, found {type(operator).__name__}.")
    if operator.in_size() != size or operator.out_size() != size:
        raise ValueError(
            f"bilevel: `operator(x, y)` must map y's structure to itself ({size} numbers), found a map from "
            f"{operator.in_size()} to {operator.out_size()}."
        )


def spectral_norm(system: LinearSystem, steps: int = 20, safety: float = 1.05) -> jax.Array:
    """|A| by power iteration on A'A from a fixed start, times a safety factor."""
    v = jnp.cos(jnp.arange(1, system.size + 1, dtype=system.dtype))

    def body(_, v):
        w = system.rmv(system.mv(v / jnp.linalg.norm(v)))
        return jnp.where(jnp.linalg.norm(w) > 0, w, v / jnp.linalg.norm(v))

    v = lax.fori_loop(0, steps, body, v)
    size = jnp.sqrt(jnp.linalg.norm(v))
    return jnp.where(size > 0, safety * size, 1)
