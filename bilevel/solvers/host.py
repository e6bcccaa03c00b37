"""Any black box on the host that returns a y: the correction repairs its accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

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
            x, y0 = jax.tree.map(np.asarray, (x, y0))
            y: Any = self.function(x, y0) if takes_start(self.function) else self.function(x)
            check_like(y, y0, "solvers.Host", "the function's value", "y0")
            return jax.tree.map(lambda a, b: np.asarray(a, b.dtype), y, y0)

        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), y0)
        y = jax.pure_callback(call, shapes, x, y0, vmap_method="sequential")
        return Found(y, jnp.asarray(1), jnp.asarray(1))
