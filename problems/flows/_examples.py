"""Small cases of every flow problem, for the contract that `pytest --problems=problems.flows` runs."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

import bilevel

from .features import Quadratic
from .inverse import InverseJKO
from .step import JKOStep


class Discrepancy(eqx.Module):
    """The squared distance of the next weights to given ones."""

    step: JKOStep
    wanted: Array

    def __call__(self, x, y):
        return jnp.sum(jnp.square(self.step.next_weights(x, y) - self.wanted))


def _potential(x, z):
    return x[0] * jnp.sin(z[0]) + x[1] * jnp.sum(z**2)


def _step(key, internal):
    first, second, third = jax.random.split(key, 3)
    source, support = jax.random.normal(first, (3, 2)), jax.random.normal(second, (5, 2))
    step = JKOStep(source, support, _potential, 0.5, 0.6, internal=internal)
    wanted = jax.nn.softmax(jax.random.normal(third, (5,)))
    return bilevel.BilevelProblem(step, Discrepancy(step, wanted)), jnp.array([0.5, 1.0]), step.initial()


def _inverse(key, sharpening):
    keys = jax.random.split(key, 2)
    clouds = [jax.random.normal(k, (n, 1)) for k, n in zip(keys, (3, 4), strict=True)]
    problem = InverseJKO(clouds, Quadratic(), 0.5, 0.6, sharpening=sharpening)
    theta, y = problem.initial()
    return problem, theta + 0.3, y


def examples() -> dict[str, Callable]:
    """A dict from a name to a function `key -> (problem, x, y0)`."""
    return {
        "JKO step, explicit": lambda key: _step(key, None),
        "JKO step, little internal energy": lambda key: _step(key, 0.2),
        "inverse JKO, sharpened": lambda key: _inverse(key, 1.0),
    }
