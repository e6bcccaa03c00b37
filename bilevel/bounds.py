"""A guaranteed bound on a hypergradient's error, where its constants are known.

`.error` is an estimate: asymptotically exact, without constants. This is the other kind: true wherever the constants
are, and usually an order of magnitude too large. Bounds of this kind are due to Ehrhardt and Roberts (2024,
arXiv:2301.04764); the form used here is (8) of docs/theory.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from . import _trees as trees
from ._system import linear_system
from ._trees import ravel, ravel_like

__all__ = ["ErrorBound"]


class ErrorBound(eqx.Module):
    """Constants of a problem at one x, each valid on the segment from y to y*(x).

    **Arguments:** `strong_convexity`: mu with F_y >= mu I (for a non-symmetric F_y: |F_y^-1| <= 1 / mu); then
    Lipschitz constants in y, operator norms where they are of matrices: `outer_x` of G_x, `outer_y` of G_y,
    `jacobian_x` of F_x, `hessian` of F_y. A constant may be traced.

    **Raises:** ValueError for mu <= 0 or a negative or non-finite constant.
    """

    strong_convexity: Any
    outer_x: Any = 0.0
    outer_y: Any = 0.0
    jacobian_x: Any = 0.0
    hessian: Any = 0.0

    def __check_init__(self):
        for name in ("strong_convexity", "outer_x", "outer_y", "jacobian_x", "hessian"):
            value = getattr(self, name)
            if trees.is_traced(value) or not isinstance(value, (int, float)):
                continue
            if not value >= 0 or value == float("inf") or (name == "strong_convexity" and value == 0):
                bound = "positive" if name == "strong_convexity" else "at least 0"
                raise ValueError(f"bilevel.ErrorBound: {name} must be a finite number, {bound}, found {value}.")

    def at(self, problem, x: PyTree, y: PyTree, adjoint_residual: jax.Array) -> jax.Array:
        """The bound on |estimate - grad h(x)|_2 for plain implicit differentiation at (x, y), whose adjoint system was
        solved to `adjoint_residual`."""
        flat, unravel = ravel(y)
        dtype = flat.dtype
        mu, l_gx, l_gy, l_fx, l_fy = (
            jnp.asarray(c, dtype)
            for c in (self.strong_convexity, self.outer_x, self.outer_y, self.jacobian_x, self.hessian)
        )
        residual, _ = linear_system(problem.inner, x, y)
        g_y = jax.grad(lambda p: problem.outer(x, unravel(p)).astype(dtype))(flat)
        f_x = _norm_of_coupling(problem.inner, x, y)
        f, g = jnp.linalg.norm(residual), jnp.linalg.norm(g_y)
        rho = adjoint_residual.astype(dtype)
        v = (g + rho) / mu
        first = l_gx + (f_x * l_gy + g * l_fx) / mu + f_x * v * l_fy / mu
        return f_x * rho / mu + first * f / mu + l_fx * l_gy * f**2 / mu**3


def _norm_of_coupling(inner, x: PyTree, y: PyTree, steps: int = 60, safety: float = 1.02) -> jax.Array:
    """|F_x|_2 by power iteration on F_x' F_x, times a safety factor."""
    dtype = ravel(y)[0].dtype
    function = lambda x: ravel_like(inner.optimality(x, y), dtype)
    _, ahead = jax.linearize(function, x)
    back = jax.linear_transpose(ahead, x)
    start = jax.tree.map(lambda a: (1 + jnp.cos(1.3 * jnp.arange(1, a.size + 1, dtype=a.dtype))).reshape(a.shape), x)

    def body(_, carry):
        v, _ = carry
        size = trees.norm(v)
        v = jax.tree.map(lambda a: a / jnp.where(size > 0, size, 1).astype(a.dtype), v)
        image = ahead(v)
        return back(image)[0], jnp.linalg.norm(image)

    return safety * lax.fori_loop(0, steps, body, (start, jnp.zeros((), dtype)))[1]
