"""The loose part in float32: where the data are large, an error that the correction forgives anyway is cheaper there.

An iteration on large data costs the time to read them, and float32 halves that; a dense matrix costs flops, and
float32 halves those. What decides the result (the residual, the last products, the gradient) stays in float64.
"""

from __future__ import annotations

import contextlib
import contextvars
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

WORTH = 2**19
"""Numbers in an inner problem's data from which casting them pays (`python -m benchmarks.threshold` measures it)."""


_hoisted: contextvars.ContextVar[dict[int, tuple[Any, Any]] | None] = contextvars.ContextVar("hoisted", default=None)


@contextlib.contextmanager
def hoisted(tree: PyTree):
    """Casts the tree's arrays here, once; `lowered` of the same arrays inside takes these. For loops, whose bodies
    would else cast all data again at every turn."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array) and leaf.dtype == jnp.float64]
    token = _hoisted.set({id(leaf): (leaf, leaf.astype(jnp.float32)) for leaf in leaves})
    try:
        yield
    finally:
        _hoisted.reset(token)


def lowered(tree: PyTree) -> PyTree:
    """The tree with its float64 arrays in float32."""
    known = _hoisted.get() or {}

    def lower(leaf: Any) -> Any:
        if id(leaf) in known:
            return known[id(leaf)][1]
        if isinstance(leaf, (jax.Array, np.ndarray)) and leaf.dtype == jnp.float64:
            return jnp.asarray(leaf, jnp.float32)
        return leaf

    return jax.tree.map(lower, tree)


def raised(tree: PyTree, like: PyTree) -> PyTree:
    """The tree in the dtypes of another one."""
    return jax.tree.map(lambda a, b: a.astype(b.dtype), tree, like)


def can_lower(function, *arguments: PyTree) -> bool:
    """Whether a function of trees computes in float32 once all its float64 leaves are cast.

    It does not where it closes over float64 arrays or names the dtype itself; then nothing is cast.
    """
    low = lowered(arguments)
    try:
        out = jax.eval_shape(lowered(function), *low)
    except Exception:  # a user's function may refuse float32 in any way it likes: that is an answer
        return False
    return all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(out))


def worth_lowering(inner, x: PyTree, y: PyTree) -> bool:
    """Whether this inner problem has enough data of its own, all of it in float64, and F computes in float32."""
    leaves = [leaf for leaf in jax.tree.leaves(inner) if isinstance(leaf, (jax.Array, np.ndarray))]
    size = sum(leaf.size for leaf in leaves if leaf.dtype == jnp.float64)
    if size < WORTH or any(leaf.dtype != jnp.float64 for leaf in jax.tree.leaves(y)):
        return False
    return can_lower(lambda inner, x, y: inner.optimality(x, y), inner, x, y)
