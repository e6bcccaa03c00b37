"""The same inner problem in other coordinates: problem -> problem."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from .problem import AbstractInner, Minimization, as_given, as_node

__all__ = ["AbstractReparametrization", "Reparametrization", "in_coordinates", "reparametrize"]


class AbstractReparametrization(eqx.Module):
    """Interface: y = forward(x, z), z = inverse(x, y)."""

    @abc.abstractmethod
    def forward(self, x: PyTree, z: PyTree) -> PyTree:
        """y, of y's structure."""

    @abc.abstractmethod
    def inverse(self, x: PyTree, y: PyTree) -> PyTree:
        """z, of y's structure."""

    def at(self, inner: AbstractInner, x: PyTree, y: PyTree) -> AbstractReparametrization:
        """The same map with the constants of a local one set at (x, y)."""
        return self


class Reparametrization(AbstractReparametrization):
    """A pair of functions `forward(x, z) -> y` and `inverse(x, y) -> z`."""

    _forward: Any
    _inverse: Any

    def __init__(self, forward: Callable, inverse: Callable):
        self._forward, self._inverse = as_node(forward), as_node(inverse)

    def forward(self, x, z):
        return as_given(self._forward)(x, z)

    def inverse(self, x, y):
        return as_given(self._inverse)(x, y)


class _Composed(eqx.Module):
    """objective(x, phi(x, z)) as a function of (x, z)."""

    function: Any
    phi: AbstractReparametrization

    def __call__(self, x, z):
        return self.function(x, self.phi.forward(x, z))


def reparametrize(inner: AbstractInner, phi: AbstractReparametrization) -> AbstractInner:
    """The inner problem in the coordinates z, y = phi.forward(x, z)."""
    return Minimization(_Composed(as_node(inner.objective_at), phi))


def in_coordinates(inner, outer, phi, x, y):
    """`(inner, outer, z, back)` of a problem in the coordinates of phi, local constants set at (x, y)."""
    local = phi.at(inner, x, y)
    return reparametrize(inner, local), _Composed(as_node(outer), local), local.inverse(x, y), local.forward
