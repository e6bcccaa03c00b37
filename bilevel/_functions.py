"""The functions a user gives: as nodes of a tree, compared, and checked by their shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np


class _Opaque(eqx.Module):
    """A plain function: compared by identity, without leaves, so that mapping over a problem meets data only."""

    function: Callable = eqx.field(static=True)

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def as_node(function: Any) -> Any:
    """The function itself where it is a tree with leaves of its own, else an opaque node around it."""
    if function is None or isinstance(function, _Opaque):
        return function
    return _Opaque(function) if jax.tree_util.all_leaves([function]) else function


def as_given(node: Any) -> Any:
    """What the user passed to `as_node`."""
    return node.function if isinstance(node, _Opaque) else node


def callable_node(function: Any, owner: str, argument: str) -> Any:
    if not callable(function):
        raise TypeError(f"bilevel.{owner}: `{argument}` must be a function (x, y) -> …, found {function!r}.")
    return as_node(function)


def check_scalar(shape: Any, owner: str, argument: str) -> None:
    leaves = jax.tree.leaves(shape)
    if len(leaves) != 1 or leaves[0].shape != ():
        found = [leaf.shape for leaf in leaves]
        raise ValueError(
            f"bilevel.{owner}: `{argument}` must return one scalar (shape ()), found shape(s) {found}. "
            "Sum or average it; return further results with has_aux=True where that is offered."
        )
    if not jnp.issubdtype(leaves[0].dtype, jnp.floating):
        raise ValueError(f"bilevel.{owner}: `{argument}` must return a floating scalar, found {leaves[0].dtype}.")


def same_function(a: Any, b: Any) -> bool:
    """Whether two nodes are one function with equal leaves; a traced leaf equals only itself."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False

    def same(p, q):
        if p is q:
            return True
        if isinstance(p, jax.core.Tracer) or isinstance(q, jax.core.Tracer):
            return False
        if eqx.is_array_like(p) and eqx.is_array_like(q):
            return np.shape(p) == np.shape(q) and bool(np.array_equal(np.asarray(p), np.asarray(q)))
        return bool(p == q)

    return all(map(same, jax.tree.leaves(a), jax.tree.leaves(b)))
