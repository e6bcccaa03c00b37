"""Penalties on the coefficients."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from . import _inputs as inputs


class L1(eqx.Module):
    """weight * sum_k |theta_k|: sparse potentials. `weight` >= 0: a number, or one for each coefficient (0: free)."""

    weight: Array

    def __init__(self, weight: Any):
        self.weight = inputs.real("flows.L1", "`weight`", weight)
        if inputs.concrete(self.weight) and not bool((self.weight >= 0).all()):
            raise ValueError(f"flows.L1: `weight` must not be negative, found {float(self.weight.min()):g}.")

    def value(self, x: Float[Array, " K"]) -> Float[Array, ""]:
        """The penalty at x."""
        return jnp.sum(self.weight.astype(x.dtype) * jnp.abs(x))

    def prox(self, x: Float[Array, "*folds K"], t: Any) -> Float[Array, "*folds K"]:
        """Soft thresholding at t * weight."""
        threshold = jnp.asarray(t, x.dtype) * self.weight.astype(x.dtype)
        return jnp.where(jnp.abs(x) > threshold, x - jnp.sign(x) * threshold, 0)
