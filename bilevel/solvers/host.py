"""Any black box on the host that returns a y: the correction repairs its accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from .._trees import check_like
from ._base import AbstractSolver, Found
from .closed_form import takes_start


class Host(AbstractSolver):
    """`function(x) -> y` or `function(x, y0) -> y` on NumPy arrays, called back from traced code (one call per
    batch element under `vmap`). It has no tolerance of ours: its accuracy is seen in the residual.
    """

    function: Callable = eqx.field(static=True)

    @property
    def exact(self) -> bool:
        return True

    def find(self, inner, x, y0, *, tol, max_steps):
        def call(x, y0):
            y: Any = self.function(x, y0) if takes_start(self.function) else self.function(x)
            check_like(y, y0, "solvers.Host", "the function's value", "y0")
            return jax.tree.map(lambda a, b: np.asarray(a, b.dtype), y, y0)

        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), y0)
        y = on_host(call, shapes, x, y0)
        return Found(y, jnp.asarray(1), jnp.asarray(1))


def on_host(function: Callable, shapes: PyTree, *arguments: PyTree) -> PyTree:
    """`function` of trees of NumPy arrays, called back from traced code; `shapes` is what it returns.

    Wide numbers travel as pairs of narrow ones. The thread that calls back knows nothing of `jax.enable_x64(True)`, a
    setting of the thread that it was written in, and would round them.
    """
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(arguments)]
    structure = jax.tree.structure(arguments)

    def there(*leaves):
        wide = [_wide(leaf, dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]
        found = function(*jax.tree.unflatten(structure, wide))
        return [_narrow(np.asarray(leaf)) for leaf in jax.tree.leaves(found)]

    def back(a, shape):
        return lax.bitcast_convert_type(a, shape.dtype) if shape.dtype.itemsize == 8 else a

    outer = jax.tree.leaves(shapes)
    sent = [jax.ShapeDtypeStruct((*s.shape, 2), np.uint32) if s.dtype.itemsize == 8 else s for s in outer]
    given = [
        lax.bitcast_convert_type(leaf, jnp.uint32) if dtype.itemsize == 8 else leaf
        for leaf, dtype in zip(map(jnp.asarray, jax.tree.leaves(arguments)), dtypes, strict=True)
    ]
    found = jax.pure_callback(there, sent, *given, vmap_method="sequential")
    return jax.tree.unflatten(jax.tree.structure(shapes), [back(a, s) for a, s in zip(found, outer, strict=True)])


def _wide(leaf: Any, dtype: Any) -> np.ndarray:
    leaf = np.ascontiguousarray(leaf)
    return leaf.view(dtype)[..., 0] if np.dtype(dtype).itemsize == 8 else leaf


def _narrow(leaf: np.ndarray) -> np.ndarray:
    if leaf.dtype.itemsize != 8:
        return leaf
    return np.ascontiguousarray(leaf).reshape(*leaf.shape, 1).view(np.uint32)
