"""Costs between point clouds that are never formed as a matrix: everything in blocks of rows, memory O(n + m)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bilevel.problem import as_given, as_node

from . import _checks as checks
from ._pairs import AbstractPairs

KINDS = ("sqeuclidean", "bilinear", "mahalanobis")
_ENTRIES = 2**21
"""Entries of a block: a few blocks of float64 fit in the cache of large machines and in the memory of small ones."""


class Cloud(AbstractPairs):
    """Pairs of points P, shape (n, d), and Q, shape (m, e), with costs `cost(P_i, Q_j)` by blocks of rows: squared
    distances (`kind` "distance"), minus inner products ("product"), or a function of two points."""

    P: Float[Array, "n d"]
    Q: Float[Array, "m e"]
    function: Any
    kind: str = eqx.field(static=True)
    flipped: bool = eqx.field(static=True, default=False)

    def swapped(self):
        return Cloud(self.Q, self.P, self.function, self.kind, not self.flipped)

    def block(self, P: Array) -> Array:
        """The costs of some rows, shape (rows, m)."""
        if self.kind == "product":
            return -(P @ self.Q.T)
        if self.kind == "distance":
            squares = jnp.sum(P**2, axis=1)[:, None] + jnp.sum(self.Q**2, axis=1)[None, :]
            return jnp.maximum(squares - 2 * (P @ self.Q.T), 0)
        pair = (lambda p, q: self.function(q, p)) if self.flipped else self.function
        return jax.vmap(lambda p: jax.vmap(lambda q: pair(p, q))(self.Q))(P)

    def at(self, i: Array, j: Array) -> Array:
        """The costs of some pairs, shape (N,), from their indices, each of shape (N,)."""
        if self.kind == "product":
            return -jnp.sum(self.P[i] * self.Q[j], axis=1)
        if self.kind == "distance":
            return jnp.sum(jnp.square(self.P[i] - self.Q[j]), axis=1)
        pair = (lambda p, q: self.function(q, p)) if self.flipped else self.function
        return jax.vmap(pair)(self.P[i], self.Q[j])

    def _rows(self, count: int) -> tuple[int, int]:
        rows = max(1, min(count, _ENTRIES // max(1, len(self.Q))))
        return rows, -(-count // rows)

    def _scan(self, step: Callable, carry: Any, *rows: Array) -> tuple[Any, Any]:
        """`step(carry, costs, *rows) -> (carry, out)` over blocks of rows, padded with the last; out of n rows. Nothing
        of a block is kept for derivatives: it is computed again."""
        n = len(self.P)
        size, count = self._rows(n)
        index = jnp.minimum(jnp.arange(size * count), n - 1).reshape(count, size)
        real = (jnp.arange(size * count) < n).reshape(count, size)

        @jax.checkpoint
        def body(carry, block):
            picked, here = block
            return step(carry, self.block(self.P[picked]), here, *(r[picked] for r in rows))

        carry, out = lax.scan(body, carry, (index, real))
        return carry, jax.tree.map(lambda v: v.reshape(size * count, *v.shape[2:])[:n], out)

    def exponentials(self, f, g, epsilon):
        return jnp.exp((f[:, None] + g[None, :] - self.block(self.P)) / epsilon)

    def sums(self, f, g, a, b, epsilon):
        def step(columns, costs, real, f, a):
            E = jnp.exp((f[:, None] + g[None, :] - costs) / epsilon)
            return columns + jnp.where(real, a, 0) @ E, a * (E @ b)

        columns, rows = self._scan(step, jnp.zeros_like(g), f, a)
        return rows, b * columns

    def products(self, f, g, a, b, epsilon, left, right):
        ahead = right is not None
        w: Any = None if right is None else (b * right if right.ndim == 1 else b[:, None] * right)
        u = jnp.zeros_like(f) if left is None else left
        weigh = lambda a, v: a * v if v.ndim == 1 else a[:, None] * v

        def step(back, costs, real, f, a, u):
            E = jnp.exp((f[:, None] + g[None, :] - costs) / epsilon)
            out = weigh(a, E @ w) if ahead else jnp.zeros_like(f)
            if left is not None:
                back = back + E.T @ weigh(jnp.where(real, a, 0), u)
            return back, out

        start = jnp.zeros(g.shape + u.shape[1:], g.dtype)
        back, out = self._scan(step, start, f, a, u)
        return (out if ahead else None), (None if left is None else weigh(b, back))

    def soft_min(self, g, b, epsilon):
        weight = jnp.where(b > 0, 0.0, -jnp.inf)

        def step(carry, costs, real):
            exponent = (g[None, :] - costs) / epsilon
            top = lax.stop_gradient(jnp.max(exponent + weight, axis=1))
            return carry, jnp.log(jnp.exp(exponent - top[:, None]) @ b) + top

        return self._scan(step, 0)[1]

    def open_rows(self, b):
        return jnp.ones(len(self.P), bool)

    def spread(self):
        some = self.block(self.P[:: max(1, len(self.P) // 64)])
        return jnp.max(some) - jnp.min(some)


class _At(eqx.Module):
    """A function of (x, p, q) at one x."""

    kind: Any
    x: Any

    def __call__(self, p: Array, q: Array) -> Array:
        return self.kind(self.x, p, q)


class PointCloudCost(eqx.Module):
    """The costs between points X, shape (n, d), and Y, shape (m, e), as the `cost` of a transport problem, without the
    (n, m) matrix: all that needs it goes over blocks of rows, in memory O(n + m).

    **Arguments:** `kind`: "sqeuclidean", |X_i - Y_j|^2, where x is anything; "bilinear", -X_i'A Y_j, where x is A of
    shape (d, e); "mahalanobis", |M (X_i - Y_j)|^2, where x is M of shape (k, d); or a function
    `kind(x, p, q)` of two points, for example `lambda x, p, q: eqx.combine(x, static)(p, q)` with the arrays of an
    equinox network as x. X and Y are leaves: derivatives flow to the points.

    **Raises:** ValueError naming the argument: shapes that do not fit, NaN, an unknown kind.
    """

    X: Float[Array, "n d"]
    Y: Float[Array, "m e"]
    _kind: Any
    name: str = eqx.field(static=True)

    def __init__(self, X: Any, Y: Any, kind: Any = "sqeuclidean"):
        owner = "PointCloudCost"
        X, Y = checks.as_floating(owner, "X", X, 2), checks.as_floating(owner, "Y", Y, 2)
        for label, points in (("X", X), ("Y", Y)):
            if points.size == 0:
                raise ValueError(f"{owner}: `{label}` is empty, its shape is {points.shape}.")
            checks.check_finite(owner, label, points)
        if isinstance(kind, str):
            if kind not in KINDS:
                raise ValueError(f"{owner}: `kind` must be one of {', '.join(KINDS)} or a function, found {kind!r}.")
            if kind != "bilinear" and X.shape[1] != Y.shape[1]:
                raise ValueError(f"{owner}: `X` has {X.shape[1]} coordinates, but `Y` has {Y.shape[1]}.")
        elif not callable(kind):
            raise TypeError(f"{owner}: `kind` must be a word or a function (x, p, q) -> cost, found {kind!r}.")
        dtype = checks.common_dtype(X, Y)
        self.X, self.Y = X.astype(dtype), Y.astype(dtype)
        self.name = kind if isinstance(kind, str) else "function"
        self._kind = None if isinstance(kind, str) else as_node(kind)

    @property
    def kind(self) -> Any:
        """The kind, as it was given."""
        return self.name if self._kind is None else as_given(self._kind)

    def check_weights(self, owner: str, n: int, m: int) -> None:
        """Raises ValueError unless there is a weight for each point."""
        for label, points, name, count in (("X", self.X, "a", n), ("Y", self.Y, "b", m)):
            if len(points) != count:
                raise ValueError(f"{owner}: `{name}` has {count} entries, but the cost's `{label}` has {len(points)}.")

    def pairs(self, x: Any) -> Cloud:
        """All pairs at x, for the solvers."""
        if self.name == "sqeuclidean":
            center = lax.stop_gradient(jnp.mean(self.Y, axis=0))  # smaller numbers, less cancellation
            return Cloud(self.X - center, self.Y - center, None, "distance")
        if self.name == "function":
            return Cloud(self.X, self.Y, _At(self._kind, x), "function")
        x = jnp.asarray(x).astype(self.X.dtype)
        d, e = self.X.shape[1], self.Y.shape[1]
        if self.name == "bilinear":
            if x.shape != (d, e):
                raise ValueError(f"bilevel.PointCloudCost: x must have shape {(d, e)}, that of A, found {x.shape}.")
            return Cloud(self.X @ x, self.Y, None, "product")
        if x.ndim != 2 or x.shape[1] != d:
            raise ValueError(f"bilevel.PointCloudCost: x must have shape (k, {d}), that of M, found {x.shape}.")
        center = lax.stop_gradient(jnp.mean(self.Y, axis=0))
        return Cloud((self.X - center) @ x.T, (self.Y - center) @ x.T, None, "distance")

    def initial(self) -> Array:
        """A theta for inverse problems: zeros of A's shape, the identity for M."""
        d, e = self.X.shape[1], self.Y.shape[1]
        if self.name == "bilinear":
            return jnp.zeros((d, e), self.X.dtype)
        if self.name == "mahalanobis":
            return jnp.eye(d, dtype=self.X.dtype)
        raise ValueError("PointCloudCost: a function as cost knows no theta to start from; pass `theta0`.")

    def __call__(self, x: Any) -> Float[Array, "n m"]:
        """The costs as a matrix, for those that fit."""
        pairs = self.pairs(x)
        return pairs.block(pairs.P)

    def __repr__(self):
        return f"PointCloudCost({len(self.X)} x {len(self.Y)} points, {self.name})"
