"""How many digits: all that a dtype has in products of matrices, and the loose part in float32.

Where the data are large, an error that the correction forgives anyway is cheaper in float32: an iteration on
large data costs the time to read them, and float32 halves that; a dense matrix costs flops, and float32 halves those.
What decides the result (the residual, the last products, the gradient) stays in float64.
"""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ._trees import is_traced

WORTH = 2**19
"""Numbers in an inner problem's data from which casting them pays (`python -m benchmarks.threshold` measures it)."""


@contextlib.contextmanager
def full_products():
    """Products of float32 matrices inside, and as a decorator in a function, have the digits of float32. On GPUs JAX's
    default has a third of them, which no certificate could see. Whoever has chosen a precision keeps it."""
    if jax.default_backend() == "cpu" or jax.config.jax_default_matmul_precision is not None:  # pyright: ignore
        yield
    else:
        with jax.default_matmul_precision("highest"):
            yield


_hoisted: contextvars.ContextVar[dict[int, tuple[Any, Any]] | None] = contextvars.ContextVar("hoisted", default=None)


@contextlib.contextmanager
def hoisted(tree: PyTree, copies: tuple = ()):
    """Casts the tree's arrays here, once, or takes the `copies` there are; `lowered` of the same arrays inside takes
    these. For loops, whose bodies would else cast all data again at every turn."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array) and leaf.dtype == jnp.float64]
    given = iter(copies)
    known = {}
    for leaf in leaves:
        copy = next(given, None) if leaf.size >= _LARGE else None
        known[id(leaf)] = (leaf, leaf.astype(jnp.float32) if copy is None else copy)
    token = _hoisted.set(known)
    try:
        yield
    finally:
        _hoisted.reset(token)


_LARGE = 2**14  # numbers in an array from which its copy is kept
_copies: dict[int, tuple[weakref.ref, jax.Array]] = {}


def kept_copies(tree: PyTree, *arguments: PyTree) -> tuple:
    """Float32 copies of the tree's large float64 arrays, in order, made at the first call and kept as long as the
    arrays live, so that repeated calls on the same data do not cast them again. None for NumPy arrays, which may
    change; nothing inside a transformation, and nothing where the data are small."""
    if is_traced(tree, arguments):
        return ()
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, (jax.Array, np.ndarray))]
    leaves = [leaf for leaf in leaves if leaf.dtype == jnp.float64]
    if sum(leaf.size for leaf in leaves) < WORTH:
        return ()
    return tuple(_kept(leaf) for leaf in leaves if leaf.size >= _LARGE)


def _kept(leaf: Any) -> jax.Array | None:
    if not isinstance(leaf, jax.Array):
        return None
    key = id(leaf)
    entry = _copies.get(key)
    if entry is not None and entry[0]() is leaf:
        return entry[1]
    copy = leaf.astype(jnp.float32)
    _copies[key] = (weakref.ref(leaf, lambda _: _copies.pop(key, None)), copy)
    return copy


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
