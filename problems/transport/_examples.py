"""Small cases of every transport problem, for the contract that `pytest --problems=problems.transport` runs."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

import bilevel

from ._observed import LinearCost
from .clouds import PointCloudCost
from .entropic import AbstractTransport, EntropicOT, UnbalancedOT
from .inverse import InverseOT


class _CouplingLoss(eqx.Module):
    """A function of the coupling."""

    transport: AbstractTransport
    weights: jax.Array

    def __call__(self, x, y):
        return jnp.sum(self.weights * jnp.sqrt(self.transport.coupling(x, y)))


class _PotentialLoss(eqx.Module):
    """A function of the potentials."""

    weights: jax.Array

    def __call__(self, x, y):
        return jnp.vdot(self.weights, jnp.sin(y[0])) + jnp.sum(jnp.square(y[1]))


def _weights(key, count: int):
    w = 0.5 + jax.random.uniform(key, (count,))
    return w / jnp.sum(w)


def _balanced(key):
    keys = jax.random.split(key, 4)
    features = jax.random.uniform(keys[0], (2, 3, 2))
    ot = EntropicOT(LinearCost(features, None), _weights(keys[1], 3), _weights(keys[2], 2), 0.5)
    problem = bilevel.BilevelProblem(ot, _CouplingLoss(ot, jax.random.normal(keys[3], (3, 2))))
    return problem, jnp.asarray([0.8, -0.4]), ot.initial()


def _unbalanced(key):
    keys = jax.random.split(key, 5)
    cost = PointCloudCost(jax.random.normal(keys[0], (3, 2)), jax.random.normal(keys[1], (2, 2)), "bilinear")
    ot = UnbalancedOT(cost, _weights(keys[2], 3), 1.5 * _weights(keys[3], 2), 1.0, (0.7, 2.0))
    problem = bilevel.BilevelProblem(ot, _PotentialLoss(jax.random.normal(keys[4], (3,))))
    return problem, jnp.asarray([[0.5, -0.2], [0.1, 0.4]]), ot.initial()


def _inverse(key):
    keys = jax.random.split(key, 2)
    features = jax.random.normal(keys[0], (2, 3, 2))
    observed = 0.2 + jax.random.uniform(keys[1], (3, 2))
    problem = InverseOT(features, observed / jnp.sum(observed), epsilon=1.0, sharpening=0.5)
    return problem, jnp.asarray([0.6, -0.3]), problem.initial()[1]


def examples() -> dict[str, Callable]:
    """A dict from a name to a function `key -> (problem, x, y0)`."""
    return {
        "balanced, coupling": _balanced,
        "unbalanced, point clouds, potentials": _unbalanced,
        "inverse, sharpened gap": _inverse,
    }
