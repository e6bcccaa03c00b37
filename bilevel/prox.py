"""Proximal operators for `Composite`: `prox(x, v, t)` is the minimizer in p of t r(x, p) + |p - v|_2^2 / 2.

v and the result are trees of floating arrays, t is a positive scalar. A weight (radius, scale, bound) may be

- a number or an array, or a tree like y,
- a function of x that gives one of these, through which derivatives flow.

A scalar weight applies to every leaf, an array to a leaf of its shape. Numbers and arrays are leaves of the operator,
cast to the dtype of each leaf of y, so that another value does not recompile. Formulas: Parikh and Boyd, Proximal
algorithms, 2014, section 6. Each has its true derivative wherever it has one; at a kink it has the one of the side on
which the set or the penalty is active, and `Composite` tells such points apart.

Box, half-line and ball are optax's. The simplex is not: optax 0.2.8 computes it in the default dtype and does not
trace under strict dtype promotion.
"""

from __future__ import annotations

import abc
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from ._trees import ravel
from .problem import as_node

__all__ = [
    "AbstractProx", "box", "elastic_net", "group_lasso", "l1", "l2_ball", "non_negative", "simplex",
]  # fmt: skip


class AbstractProx(eqx.Module):
    """Interface of the ready-made operators: called with `(x, v, t)`, gives a tree like v."""

    @abc.abstractmethod
    def __call__(self, x: PyTree, v: PyTree, t: Any) -> PyTree:
        """The minimizer in p of t r(x, p) + |p - v|_2^2 / 2."""


def _weight(value: Any, owner: str, name: str, *, sign: str = "at least 0") -> Any:
    """A weight as leaves: a function stays one, numbers become arrays and, where concrete, must have this sign."""
    if callable(value):
        return as_node(value)
    value = jax.tree.map(jnp.asarray, value)
    for leaf in jax.tree.leaves(value):
        if sign and not isinstance(leaf, jax.core.Tracer) and leaf.size:
            least = float(jnp.min(leaf))
            if not (least > 0 if sign == "positive" else least >= 0):
                raise ValueError(f"bilevel.prox.{owner}: {name} must be {sign}, found {least}.")
    return value


def _per_leaf(weight: Any, x: PyTree, v: PyTree, name: str) -> list[jax.Array]:
    """The weight for each leaf of v, in its dtype, shaped to broadcast against it."""
    value = weight(x) if callable(weight) else weight
    leaves = jax.tree.leaves(v)
    if jax.tree.structure(value) == jax.tree.structure(v):
        parts = jax.tree.leaves(value)
    elif len(jax.tree.leaves(value)) == 1:
        parts = jax.tree.leaves(value) * len(leaves)
    else:
        raise ValueError(
            f"bilevel.prox: {name} must be a number, an array, or a tree like y, found the structure "
            f"{jax.tree.structure(value)} for a y of the structure {jax.tree.structure(v)}."
        )
    parts = [jnp.asarray(part).astype(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
    for part, leaf in zip(parts, leaves, strict=True):
        if not _fits(part.shape, leaf.shape):
            raise ValueError(f"bilevel.prox: {name} of shape {part.shape} does not fit a leaf of shape {leaf.shape}.")
    return parts


def _fits(shape: tuple, into: tuple) -> bool:
    try:
        return np.broadcast_shapes(shape, into) == into
    except ValueError:
        return False


def _scalar(weight: Any, x: PyTree, dtype: Any, name: str) -> jax.Array:
    value = jnp.asarray(weight(x) if callable(weight) else weight)
    if value.shape != ():
        raise ValueError(f"bilevel.prox: {name} must be one number, found shape {value.shape}.")
    return value.astype(dtype)


def _map(function: Any, v: PyTree, *parts: list[jax.Array]) -> PyTree:
    leaves, structure = jax.tree.flatten(v)
    return jax.tree.unflatten(structure, [function(*row) for row in zip(leaves, *parts, strict=True)])


def _soft(v: jax.Array, threshold: jax.Array) -> jax.Array:
    """sign(v) max(|v| - threshold, 0), with derivative 0 or 1 and nothing in between."""
    outside = jnp.abs(v) > threshold
    return jnp.where(outside, v - jnp.sign(v) * threshold, 0)


class _ElasticNet(AbstractProx):
    absolute: Any
    quadratic: Any

    def __call__(self, x, v, t):
        first = _per_leaf(self.absolute, x, v, "the l1 weight")
        if self.quadratic is None:
            return _map(lambda a, w: _soft(a, jnp.asarray(t, a.dtype) * w), v, first)
        second = _per_leaf(self.quadratic, x, v, "the l2 weight")

        def shrink(a, w, u):
            step = jnp.asarray(t, a.dtype)
            return _soft(a, step * w) / (1 + step * u)

        return _map(shrink, v, first, second)


class _GroupLasso(AbstractProx):
    weight: Any
    labels: Any
    count: int = eqx.field(static=True)
    axis: int = eqx.field(static=True)

    def __call__(self, x, v, t):
        leaves = jax.tree.leaves(v)
        value = self.weight(x) if callable(self.weight) else self.weight
        weights = jax.tree.leaves(value)
        if len(weights) == 1:
            weights = weights * len(leaves)
        if len(weights) != len(leaves):
            raise ValueError(
                f"bilevel.prox.group_lasso: the weight must be one array or one for each of y's {len(leaves)} leaves, "
                f"found {len(weights)}."
            )
        return _map(lambda a, w: self._shrink(a, jnp.asarray(w), jnp.asarray(t, a.dtype)), v, weights)

    def _shrink(self, v, weight, t):
        weight = weight.astype(v.dtype)
        if self.labels is None:
            squares = jnp.sum(jnp.square(v), axis=self.axis, keepdims=True)
            if weight.ndim:
                weight = jnp.expand_dims(weight, self.axis)
        else:
            if self.labels.shape != v.shape:
                raise ValueError(
                    f"bilevel.prox.group_lasso: groups of shape {self.labels.shape} do not fit y of shape {v.shape}."
                )
            flat = self.labels.reshape(-1)
            sums = jax.ops.segment_sum(jnp.square(v).reshape(-1), flat, num_segments=self.count)
            squares = sums[flat].reshape(v.shape)
            if weight.ndim:
                weight = weight[flat].reshape(v.shape)
        kept = squares > jnp.square(t * weight)
        length = jnp.sqrt(jnp.where(kept, squares, 1))
        return jnp.where(kept, (1 - t * weight / length) * v, 0)


class _NonNegative(AbstractProx):
    def __call__(self, x, v, t):
        return optax.projections.projection_non_negative(v)


class _Box(AbstractProx):
    lower: Any
    upper: Any

    def __call__(self, x, v, t):
        structure = jax.tree.structure(v)
        full = lambda bound, name: jax.tree.unflatten(structure, _per_leaf(bound, x, v, name))
        return optax.projections.projection_box(v, full(self.lower, "lower"), full(self.upper, "upper"))


class _Simplex(AbstractProx):
    scale: Any

    def __call__(self, x, v, t):
        flat, unravel = ravel(v)
        scale = _scalar(self.scale, x, flat.dtype, "scale")
        fixed, total = jax.lax.stop_gradient((flat, scale))
        # the support first (sorted, as many entries as stay above their common shift), then the shift from it: this
        # order differentiates as the projection does
        down = -jnp.sort(-fixed)
        excess = jnp.cumsum(down) - total
        ranks = jnp.arange(1, flat.size + 1, dtype=flat.dtype)
        size = jnp.maximum(jnp.count_nonzero(down * ranks > excess), 1)
        support = fixed > (excess[size - 1] / size.astype(flat.dtype))
        count = jnp.maximum(jnp.count_nonzero(support), 1).astype(flat.dtype)
        shift = (jnp.sum(jnp.where(support, flat, 0)) - scale) / count
        return unravel(jnp.where(support, flat - shift, 0))


class _Ball(AbstractProx):
    radius: Any

    def __call__(self, x, v, t):
        flat, unravel = ravel(v)
        radius = _scalar(self.radius, x, flat.dtype, "radius")
        return unravel(optax.projections.projection_l2_ball(flat, radius))


def l1(weight: Any) -> AbstractProx:
    """r = sum_j w_j |y_j| (the lasso): soft thresholding at t w. `weight` >= 0."""
    return _ElasticNet(_weight(weight, "l1", "weight"), None)


def elastic_net(l1_weight: Any, l2_weight: Any) -> AbstractProx:
    """r = sum_j w_j |y_j| + u_j y_j^2 / 2: soft thresholding at t w, divided by 1 + t u. Both weights >= 0."""
    weights = (_weight(l1_weight, "elastic_net", "l1_weight"), _weight(l2_weight, "elastic_net", "l2_weight"))
    return _ElasticNet(*weights)


def group_lasso(weight: Any, groups: Any = None, *, axis: int = -1) -> AbstractProx:
    """r = sum_g w_g |y_g|_2: each group shrinks by (1 - t w_g / |v_g|)_+.

    **Arguments:** `weight` >= 0: a number, an array with one weight a group, or a function of x giving one of these
    (for a y of several leaves also a list of them). `groups`: integer labels 0, 1, … of y's shape, for a y of one
    leaf; or None: the slices of each leaf along `axis` are its groups (the rows of a matrix).

    **Raises:** ValueError if the labels are not non-negative integers, or do not fit y.
    """
    if groups is None:
        return _GroupLasso(_weight(weight, "group_lasso", "weight"), None, 0, axis)
    labels = np.asarray(groups)
    if not np.issubdtype(labels.dtype, np.integer) or labels.size == 0 or labels.min() < 0:
        raise ValueError("bilevel.prox.group_lasso: groups must be integer labels 0, 1, … of y's shape.")
    return _GroupLasso(_weight(weight, "group_lasso", "weight"), jnp.asarray(labels), int(labels.max()) + 1, axis)


def non_negative() -> AbstractProx:
    """r is zero where y >= 0, infinite elsewhere: max(v, 0)."""
    return _NonNegative()


def box(lower: Any, upper: Any) -> AbstractProx:
    """r is zero where lower <= y <= upper, infinite elsewhere: v clipped. Infinite bounds are allowed."""
    bounds = _Box(_weight(lower, "box", "lower", sign=""), _weight(upper, "box", "upper", sign=""))
    pair = [jax.tree.leaves(bound) for bound in (bounds.lower, bounds.upper)]
    if len(pair[0]) == len(pair[1]) and not any(callable(b) for b in (lower, upper)):
        for low, high in zip(*pair, strict=True):
            if not any(isinstance(a, jax.core.Tracer) for a in (low, high)) and not bool(np.all(low <= high)):
                raise ValueError(f"bilevel.prox.box: lower must not be above upper, found {low} and {high}.")
    return bounds


def simplex(scale: Any = 1.0) -> AbstractProx:
    """r is zero where y >= 0 and the sum of all entries (over all leaves) is `scale` > 0, infinite elsewhere.

    Projection by sorting (Held, Wolfe, Crowder 1974; Duchi et al. 2008), derivative: u minus its mean on the support.
    """
    return _Simplex(_weight(scale, "simplex", "scale", sign="positive"))


def l2_ball(radius: Any = 1.0) -> AbstractProx:
    """r is zero where |y|_2 <= `radius` > 0 (over all leaves), infinite elsewhere: v rescaled."""
    return _Ball(_weight(radius, "l2_ball", "radius", sign="positive"))
