"""A smooth function plus a penalty or a constraint known by its proximal operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from ._functions import as_given, callable_node, check_scalar
from ._support import SupportAware, inverse_curvature
from ._trees import check_like, is_traced, ravel, shapes_of
from .errors import Status
from .problem import AbstractInner

__all__ = ["Composite"]


class Composite(AbstractInner):
    """y*(x) minimizes `smooth(x, y)` + r(x, y), r convex and known by its proximal operator.

    F(x, y) = y - prox(x, y - t grad_y smooth(x, y), t), which is zero at the solution for every t > 0; here t = 1 / L
    with L the size of the smooth part's Hessian at (x, y), a constant of every derivative. dF/dy = I - D (I - t H) is
    not symmetric; D, the derivative of the prox, is zero where the solution is held at a kink, and so it finds the
    support (active set) of any prox by itself. Newton's step and the adjoint are those of the smooth problem on the
    support (Bertrand et al. 2020, 2022; derived in docs/theory, section "Nonsmooth inner problems"): exact once the
    support is right. Before, `estimate_untrusted` says so; where the solution sits on an edge between two supports
    (strict complementarity fails) it has no derivative: `degenerate_active_set`.

    **Arguments:** `smooth(x, y) -> scalar`, floating, twice differentiable in y. `prox(x, v, t) -> like y`: the
    minimizer in p of t r(x, p) + |p - v|^2 / 2, differentiable by JAX where it has a derivative; `bilevel.prox` has
    ready-made ones. x and y may be any trees of floating arrays. `step`: t, a number or an array of shape (); None:
    1 / L by power iteration wherever F is evaluated.

    **Raises:** TypeError if either is not callable; ValueError when used with functions whose results do not fit.
    """

    _smooth: Any
    _prox: Any
    step: Any

    def __init__(self, smooth: Callable, prox: Callable, *, step: Any = None):
        self._smooth = callable_node(smooth, "Composite", "smooth")
        if not callable(prox):
            raise TypeError(f"bilevel.Composite: `prox` must be a function (x, v, t) -> like y, found {prox!r}.")
        self._prox = callable_node(prox, "Composite", "prox")
        if step is not None and not is_traced(step) and not (jnp.shape(step) == () and 0 < step < jnp.inf):
            raise ValueError(f"bilevel.Composite: `step` must be a positive number, found {step!r}.")
        self.step = step

    @property
    def smooth(self) -> Callable:
        return as_given(self._smooth)

    @property
    def prox(self) -> Callable:
        return as_given(self._prox)

    @property
    def is_step(self) -> bool:
        return True

    @property
    def linear_solver(self):
        return SupportAware()

    @property
    def default_solver(self):
        from .solvers.fista import Fista  # solvers import problems, not the other way round

        return Fista()

    def optimality(self, x, y):
        """y - prox(x, y - t grad smooth, t)."""
        return self.residual(x, y, self.step_length(x, y))

    def residual(self, x: PyTree, y: PyTree, t: jax.Array) -> PyTree:
        """F with a step length t > 0 of the caller's."""
        v = self._forward(x, y, t)
        moved = self._prox(x, v, t)
        # a prox may map NaN to a number: |v| > t is false of it
        return jax.tree.map(lambda a, b, c: jnp.where(jnp.isfinite(c), a - b.astype(a.dtype), jnp.nan), y, moved, v)

    def _forward(self, x, y, t):
        """v = y - t grad smooth: where the prox is evaluated."""
        gradient = jax.grad(self._smooth, argnums=1)(x, y)
        return jax.tree.map(lambda a, g: a - t.astype(a.dtype) * g.astype(a.dtype), y, gradient)

    def step_length(self, x: PyTree, y: PyTree) -> jax.Array:
        """t = 1 / L, a constant of every derivative."""
        if self.step is not None:
            return lax.stop_gradient(jnp.asarray(self.step, ravel(y)[0].dtype))
        return inverse_curvature(self._smooth, x, y)

    def forward_backward(self, x: PyTree, y: PyTree, gradient: jax.Array, t: jax.Array) -> PyTree:
        """prox(x, y - t gradient, t), with the gradient of the smooth part given (flat)."""
        flat, unravel = ravel(y)
        return self._prox(x, unravel(flat - t * gradient), t)

    # -------------------------------------------------------------------------------------------- the active set

    def active_part(self, x, y):
        """w -> D w with D the derivative of the prox at this point: symmetric, 0 <= D <= I."""
        t = self.step_length(x, y)
        return jax.linearize(lambda v: self._prox(x, v, t), self._forward(x, y, t))[1]

    def _derivative(self, x, v, t, w):
        return jax.jvp(lambda v: self._prox(x, v, t), (v,), (w,))[1]

    def smooth_between(self, x, y, z):
        """Whether the active set is the same at y and at z.

        D u for one u without zeros at both points: rows of D that vanish at one only, or a large change, tell.
        """
        t = self.step_length(x, y)
        return self._alike(x, self._forward(x, y, t), self._forward(x, z, t), t, 0.5)

    def status_at(self, x, y):
        """`degenerate_active_set` where the prox has no derivative at this point, to round-off."""
        t = self.step_length(x, y)
        at = self._forward(x, y, t)
        flat, unravel = ravel(at)
        back, _ = ravel(self._prox(x, at, t))
        eps = float(jnp.finfo(flat.dtype).eps)
        top = lambda a: jnp.max(jnp.abs(a), initial=0)
        near = min(eps**0.5, 3e-5) * top(flat - back) + 1e3 * eps * top(flat)
        aside = near * _probe(flat)
        same = self._alike(x, unravel(flat + aside), unravel(flat - aside), t, 1e-3)
        return Status.where(same, Status(), Status("degenerate_active_set"))

    def _alike(self, x, v1, v2, t, allowed):
        flat, unravel = ravel(v1)
        u = _probe(flat)
        one, two = (ravel(self._derivative(x, v, t, unravel(u)))[0] for v in (v1, v2))
        size = jnp.maximum(jnp.max(jnp.abs(one), initial=0), jnp.max(jnp.abs(two), initial=0))
        zero = 10 * jnp.finfo(flat.dtype).eps * size
        same_rows = jnp.all((jnp.abs(one) > zero) == (jnp.abs(two) > zero))
        return same_rows & (jnp.max(jnp.abs(one - two), initial=0) <= allowed * size)

    def check(self, x, y):
        check_scalar(shapes_of(self._smooth, x, y), "Composite", "smooth")
        t = jnp.ones((), ravel(y)[0].dtype)
        check_like(shapes_of(self._prox, x, y, t), y, "Composite", "prox(x, v, t)", "y")


def _probe(flat: jax.Array) -> jax.Array:
    """A vector without zeros, signs and sizes without pattern, the same in every call."""
    k = jnp.arange(1, flat.size + 1, dtype=flat.dtype)
    return jnp.where(jnp.cos(7.1 * k * k + 1.3 * k) >= 0, 1, -1).astype(flat.dtype) * (0.75 + 0.25 * jnp.sin(3.7 * k))
