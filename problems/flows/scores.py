"""How far a forecast is from a snapshot."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from . import _inputs as inputs
from ._kernel import half_squares
from ._pairing import optimal_pairs


def earth_mover(particles: Any, snapshot: Any, *, weights: Any = None, snapshot_weights: Any = None) -> float:
    """The earth mover's distance W_1, the ground cost the Euclidean distance: exact, a float, not differentiable.

    `particles`: (n, d); `snapshot`: (m, d); weights (n,), (m,), default equal, normalized. Equal numbers of equal
    weights take an assignment, other cases a linear program.
    """
    x, z, a, b = _clouds("flows.earth_mover", particles, snapshot, weights, snapshot_weights)
    x, z = np.asarray(x, np.float64), np.asarray(z, np.float64)
    squares = np.maximum(np.sum(x**2, 1)[:, None] + np.sum(z**2, 1) - 2 * x @ z.T, 0)
    if x.shape[1] <= 16:
        squares = sum(np.subtract.outer(x[:, k], z[:, k]) ** 2 for k in range(x.shape[1]))
    return optimal_pairs(np.sqrt(squares), np.asarray(a, np.float64), np.asarray(b, np.float64)).cost


def mmd(
    particles: Any, snapshot: Any, *, weights: Any = None, snapshot_weights: Any = None, width: Any = None
) -> Float[Array, ""]:
    """The squared maximum mean discrepancy with the kernel exp(-|x - z|^2 / (2 width^2)), differentiable.

    `width`: None takes the snapshot's root mean squared distance between its points over the square root of 2, a
    constant of every derivative. Otherwise as `earth_mover`.
    """
    x, z, a, b = _clouds("flows.mmd", particles, snapshot, weights, snapshot_weights)
    if width is None:
        mean = b @ z
        width = lax.stop_gradient(jnp.sqrt(b @ jnp.sum(jnp.square(z - mean), axis=1)))
    square = inputs.number("flows.mmd", "`width`", width, x.dtype) ** 2
    mean_of = lambda u, p, v, q: p @ jnp.exp(-half_squares(u, v) / square) @ q
    return mean_of(x, a, x, a) - 2 * mean_of(x, a, z, b) + mean_of(z, b, z, b)


def _clouds(owner, particles, snapshot, weights, snapshot_weights):
    x = inputs.points(owner, "`particles`", particles)
    z = inputs.points(owner, "`snapshot`", snapshot, dimension=x.shape[1], like="`particles`")
    dtype = inputs.common_dtype(x, z)
    a = inputs.weights(owner, "`weights`", weights, len(x), dtype)
    b = inputs.weights(owner, "`snapshot_weights`", snapshot_weights, len(z), dtype)
    return x.astype(dtype), z.astype(dtype), a / jnp.sum(a), b / jnp.sum(b)
