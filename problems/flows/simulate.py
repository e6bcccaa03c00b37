"""Forward runs: particles that follow a potential."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from . import _inputs as inputs
from .features import gradient

OWNER = "flows.simulate"


def simulate(
    potential: Callable,
    x: PyTree,
    particles: Any,
    *,
    steps: int,
    step_size: Any,
    temperature: Any = 0,
    key: Any = None,
) -> Float[Array, "times n d"]:
    """Explicit Euler steps z <- z - step_size grad V(z) + noise of variance 2 temperature step_size (Langevin).

    **Arguments:** `potential(x, z) -> scalar` at one point z of shape (d,), x any tree or None. `particles`: (n, d).
    `steps`: how many, at least 0. `step_size` > 0: a number, or one for each step. `temperature` >= 0; where it is not
    zero, `key` is a JAX PRNG key.

    **Returns:** the particles at all times, shape (steps + 1, n, d), the first being those given. Differentiable.

    **Raises:** ValueError naming the argument.
    """
    z = inputs.points(OWNER, "`particles`", particles)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"{OWNER}: `steps` must be an integer of at least 0, found {steps!r}.")
    sizes = inputs.step_sizes(OWNER, step_size, steps, z.dtype)
    still = inputs.concrete(temperature) and isinstance(temperature, (int, float)) and temperature == 0
    heat = None if still else inputs.number(OWNER, "`temperature`", temperature, z.dtype, zero=True)
    if not still and key is None:
        raise ValueError(f"{OWNER}: a `temperature` needs a `key`, such as jax.random.key(0).")
    if not callable(potential):
        raise TypeError(f"{OWNER}: `potential` must be a function (x, z) -> scalar, found {potential!r}.")
    return _run(potential, x, z, sizes, heat, key)


@eqx.filter_jit
def _run(potential, x, z, sizes, heat, key):
    def step(carry, size):
        z, key = carry
        z = z - size * jax.vmap(lambda point: gradient(potential, x, point))(z)
        if heat is not None:
            key, now = jax.random.split(key)
            z = z + jnp.sqrt(2 * heat * size) * jax.random.normal(now, z.shape, z.dtype)
        return (z, key), z

    _, path = lax.scan(step, (z, key), sizes)
    return jnp.concatenate([z[None], path])
