"""Densities of clouds of points."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._kernel import half_squares


def log_density(
    at: Float[Array, "k d"], points: Float[Array, "n d"], weights: Float[Array, " n"]
) -> Float[Array, " k"]:
    """The log of a Gaussian kernel estimate, shape (k,), bandwidth by Silverman's rule in whitened coordinates."""
    d = points.shape[1]
    mean = weights @ points
    spread = (points - mean).T @ (weights[:, None] * (points - mean))
    spread = spread + 1e-6 * (jnp.trace(spread) / d + jnp.finfo(points.dtype).tiny) * jnp.eye(d, dtype=points.dtype)
    factor = jnp.linalg.cholesky(lax.stop_gradient(spread))
    count = 1 / jnp.sum(weights**2)
    width = (4 / ((d + 2) * count)) ** (1 / (d + 4))
    white = lambda z: jax.scipy.linalg.solve_triangular(factor, (z - mean).T, lower=True).T
    squares = half_squares(white(at), white(points)) / width**2
    scale = d * jnp.log(width) + jnp.sum(jnp.log(jnp.diagonal(factor))) + d / 2 * jnp.log(2 * jnp.pi)
    logs = jnp.log(jnp.where(weights > 0, weights, jnp.finfo(weights.dtype).tiny))
    return jax.nn.logsumexp(logs[None, :] - squares, axis=1) - scale.astype(points.dtype)
