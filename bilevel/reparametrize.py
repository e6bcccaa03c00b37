"""The same inner problem in other coordinates: problem -> problem.

y = phi(x, z). On a minimization F becomes phi_z' F (which changes plain implicit differentiation, docs/theory,
"Reparametrization"); on any other residual F(x, phi(x, z)) = 0 (which does not). Local maps hold constants, the point
(x_0, y_0), that are not differentiated; their remaining dependence on x is.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ._system import linear_system
from ._trees import check_like, is_traced, path_name, ravel, ravel_like
from .problem import AbstractInner, as_given, as_node

__all__ = [
    "AbstractReparametrization",
    "Exp",
    "GradientCoordinates",
    "JacobiScaling",
    "Reparametrization",
    "Softplus",
    "check_round_trip",
    "in_coordinates",
    "reparametrize",
]


class AbstractReparametrization(eqx.Module):
    """Interface: y = forward(x, z), z = inverse(x, y), both of y's structure; `at` sets a local map's constants."""

    @abc.abstractmethod
    def forward(self, x: PyTree, z: PyTree) -> PyTree:
        """y."""

    @abc.abstractmethod
    def inverse(self, x: PyTree, y: PyTree) -> PyTree:
        """z."""

    def at(self, inner: AbstractInner, x: PyTree, y: PyTree) -> AbstractReparametrization:
        """The map with the constants of a local one set at (x, y)."""
        return self


class Reparametrization(AbstractReparametrization):
    """A pair of functions `forward(x, z) -> y` and `inverse(x, y) -> z`, each other's inverse at every x."""

    _forward: Any
    _inverse: Any

    def __init__(self, forward: Callable, inverse: Callable):
        for name, function in (("forward", forward), ("inverse", inverse)):
            if not callable(function):
                raise TypeError(f"bilevel.Reparametrization: `{name}` must be a function, found {function!r}.")
        self._forward, self._inverse = as_node(forward), as_node(inverse)

    def forward(self, x, z):
        return as_given(self._forward)(x, z)

    def inverse(self, x, y):
        return as_given(self._inverse)(x, y)


class Exp(AbstractReparametrization):
    """y = s exp(z), s = +1, or the signs of y at the point where it serves as coordinates of an estimator.

    A y of zero is outside its range: ValueError. Its spurious stationary points at y_j = 0 are never reached.
    """

    signs: PyTree = None

    def at(self, inner, x, y):
        return Exp(jax.tree.map(lambda a: jax.lax.stop_gradient(jnp.sign(a)), y))

    def forward(self, x, z):
        if self.signs is None:
            return jax.tree.map(jnp.exp, z)
        return jax.tree.map(lambda s, a: s * jnp.exp(a), self.signs, z)

    def inverse(self, x, y):
        if self.signs is None:
            return jax.tree.map(jnp.log, y)
        return jax.tree.map(lambda s, a: jnp.log(s * a), self.signs, y)


class Softplus(AbstractReparametrization):
    """y = log(1 + exp(z)), for positive y; anything else is outside its range: ValueError."""

    def forward(self, x, z):
        return jax.tree.map(jax.nn.softplus, z)

    def inverse(self, x, y):
        return jax.tree.map(lambda a: a + jnp.log(-jnp.expm1(-a)), y)


class _Local(AbstractReparametrization):
    """A map around a point: None until `at` has set it."""

    inner: Any = None
    centre: Any = None
    x0: Any = None

    def at(self, inner, x, y):
        return type(self)(inner, *jax.tree.map(jax.lax.stop_gradient, (y, x)))

    def _need_centre(self) -> None:
        if self.inner is None:
            name = type(self).__name__
            raise ValueError(
                f"bilevel.{name}: this map is local and knows no point yet; use it as "
                f"ImplicitAdjoint(reparametrization={name}()), or set one with {name}().at(inner, x, y)."
            )

    def _hessian(self, x) -> tuple[jax.Array, Callable]:
        """F_y(x, centre), dense of shape (n, n), and the way back from flat to y's structure."""
        flat, unravel = ravel(self.centre)
        _, system = linear_system(self.inner, x, self.centre)
        return jax.vmap(system.mv, out_axes=1)(jnp.eye(flat.size, dtype=flat.dtype)), unravel


class JacobiScaling(_Local):
    """y = D(x)^-1 z with D = diag F_y(x, y_0): diagonal scaling that follows x. n products with F_y."""

    def _diagonal(self, x):
        self._need_centre()
        matrix, unravel = self._hessian(x)
        return unravel(jnp.diagonal(matrix))

    def forward(self, x, z):
        return jax.tree.map(lambda d, a: a / d, self._diagonal(x), z)

    def inverse(self, x, y):
        return jax.tree.map(lambda d, a: a * d, self._diagonal(x), y)


class GradientCoordinates(_Local):
    """Coordinates in which the implicit Jacobian is super-efficient: a local map with the curvature of z = F(x, y),
    y = y_0 + F_y(x, y_0)^-1 [2 F_y(x_0, y_0) (z - y_0) - (F(x_0, z) - F(x_0, y_0))], without inverting F.

    Dense: n^3 / 3 and n products. Derived in docs/theory.
    """

    def forward(self, x, z):
        self._need_centre()
        there, unravel = self._hessian(x)
        here, _ = self._hessian(self.x0)
        here = jax.lax.stop_gradient(here)
        centre, point = ravel_like(self.centre, there.dtype), ravel_like(z, there.dtype)
        residual = lambda y: ravel_like(self.inner.optimality(self.x0, y), there.dtype)
        bend = residual(z) - residual(self.centre)
        return unravel(centre + jnp.linalg.solve(there, 2 * (here @ (point - centre)) - bend))

    def inverse(self, x, y):
        """By Newton's method from the point itself, near which alone the map is used."""
        self._need_centre()
        flat, unravel = ravel(y)
        start = jax.lax.stop_gradient(ravel_like(self.centre, flat.dtype))
        function = lambda z: ravel_like(self.forward(x, unravel(z)), flat.dtype) - flat

        def body(_, z):
            return z - jnp.linalg.solve(jax.jacfwd(function)(z), function(z))

        return unravel(jax.lax.fori_loop(0, 8, body, start))


class Reparametrized(AbstractInner):
    """`inner` in the coordinates z of `phi`; see `reparametrize`."""

    inner: AbstractInner
    phi: AbstractReparametrization
    convex: bool = eqx.field(static=True, default=True)

    @property
    def minimizes(self):
        return self.inner.minimizes

    @property
    def symmetric(self):
        return self.inner.minimizes

    @property
    def definite(self):
        return self.inner.minimizes and self.convex

    def objective_at(self, x, y):
        return self.inner.objective_at(x, self.phi.forward(x, y))

    def aux_at(self, x, y):
        return self.inner.aux_at(x, self.phi.forward(x, y))

    def optimality(self, x, y):
        """phi_z' F for a minimization, F(x, phi(x, z)) for any other residual."""
        if not self.inner.minimizes:
            return self.inner.optimality(x, self.phi.forward(x, y))
        value, pull = jax.vjp(lambda z: self.phi.forward(x, z), y)
        return pull(jax.tree.map(lambda f, v: f.astype(v.dtype), self.inner.optimality(x, value), value))[0]


class _Outer(eqx.Module):
    """outer(x, phi(x, z)) as a function of (x, z)."""

    function: Any
    phi: AbstractReparametrization

    def __call__(self, x, z):
        return self.function(x, self.phi.forward(x, z))


def reparametrize(inner: AbstractInner, phi: AbstractReparametrization) -> AbstractInner:
    """The inner problem in the coordinates z: `phi.forward(x, solve(reparametrize(inner, phi), x, z0).y)` solves
    `inner`. With `Exp()` that is a way to keep y positive.
    """
    if not isinstance(inner, AbstractInner):
        raise TypeError(f"bilevel.reparametrize: expected an inner problem, found {type(inner).__name__}.")
    if not isinstance(phi, AbstractReparametrization):
        raise TypeError(f"bilevel.reparametrize: expected a reparametrization such as Exp(), found {phi!r}.")
    return Reparametrized(inner, phi)


def in_coordinates(inner, outer, phi, x, y):
    """`(inner, outer, z, back)` of a problem in the coordinates of phi, local constants set at (x, y).

    Away from the solution phi_z' F has a derivative that may be indefinite although F_y is not, so the problem in z
    makes no claim of definiteness.
    """
    local = phi.at(inner, x, y)
    z = jax.lax.stop_gradient(local.inverse(x, y)) if not isinstance(local, GradientCoordinates) else y
    return Reparametrized(inner, local, convex=False), _Outer(as_node(outer), local), z, local.forward


def check_round_trip(function: str, phi: AbstractReparametrization, inner, x: PyTree, y: PyTree) -> None:
    """Raises ValueError unless forward(x, inverse(x, y)) = y, naming the leaf. Concrete values only."""
    if is_traced(x, y):
        return
    local = phi.at(inner, x, y)
    name = type(phi).__name__
    z = local.inverse(x, y)
    check_like(z, y, function, f"the inverse of {name}", "y")
    back = local.forward(x, z)
    leaves = jax.tree.leaves(z)
    pairs = zip(jax.tree_util.tree_leaves_with_path(y), jax.tree.leaves(back), strict=True)
    for k, ((path, a), b) in enumerate(pairs):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        where = f"bilevel.{function}: reparametrization {name}, leaf {path_name(path)}"
        inside = np.isfinite(b) & np.isfinite(np.asarray(leaves[k]))
        if not np.all(inside):
            value = a[~inside].ravel()[0]
            raise ValueError(f"{where}: y = {value:g} is outside its range; start elsewhere or choose another map.")
        wrong = np.abs(a - b)
        worst = np.unravel_index(np.argmax(wrong), wrong.shape) if wrong.size else ()
        if wrong.size and wrong[worst] > 1e-3 * (1 + np.abs(a[worst])):
            raise ValueError(
                f"{where}: forward and inverse do not invert each other: y = {a[worst]:g} comes back as {b[worst]:g}."
            )
