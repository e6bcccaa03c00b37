"""What an inverse problem is told: features, the observed coupling and its references, checked."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bilevel.problem import as_given, as_node

from . import _checks as checks
from ._sparse import ObservedPairs
from .clouds import PointCloudCost


class LinearCost(eqx.Module):
    """theta -> sum_k theta_k features_k - shift (`shift` is minus infinity where a pair is forbidden)."""

    features: Float[Array, "K n m"]
    shift: Float[Array, "n m"] | None

    def __call__(self, theta: Array) -> Float[Array, "n m"]:
        costs = jnp.tensordot(theta, self.features, 1)
        return costs if self.shift is None else costs - self.shift


class SharpenedCost(eqx.Module):
    """Any cost, minus the shift of the sharpening."""

    _cost: Any
    shift: Float[Array, "n m"]

    def __init__(self, cost: Any, shift: Array):
        self._cost, self.shift = as_node(cost), shift

    @property
    def cost(self) -> Any:
        """The cost, as it was given."""
        return as_given(self._cost)

    def __call__(self, theta: Any) -> Float[Array, "n m"]:
        return self._cost(theta) - self.shift


def kl(p: Array, q: Array) -> Array:
    ratio = jnp.where((p > 0) & (q > 0), p / jnp.where(q > 0, q, 1), 1)
    return jnp.sum(p * jnp.log(ratio) - p + q)


def kl_of(observed: Any, a: Array, b: Array) -> Array:
    """KL(observed | a b')."""
    return observed.kl(a, b) if isinstance(observed, ObservedPairs) else kl(observed, a[:, None] * b[None, :])


def shift_of(rho: Array, observed: Array, a: Array, b: Array) -> Array:
    """rho log(pi_hat / (a b')): minus infinity where nothing was observed, zero at points without weight."""
    product = a[:, None] * b[None, :]
    seen = (observed > 0) & (product > 0)
    logarithm = jnp.log(jnp.where(seen, observed, 1) / jnp.where(product > 0, product, 1))
    return jnp.where(seen, rho * logarithm, jnp.where(product > 0, -jnp.inf, 0))


# ------------------------------------------------------------------------------------------------ checks


def check_coupling(owner: str, coupling: Any) -> Any:
    if isinstance(coupling, ObservedPairs):
        return coupling
    array = checks.as_floating(owner, "coupling", coupling, 2)
    if array.size == 0:
        raise ValueError(f"{owner}: `coupling` is empty, its shape is {array.shape}.")
    checks.check_finite(owner, "coupling", array)
    if checks.is_concrete(array):
        numbers = np.asarray(array)
        if (numbers < 0).any():
            i, j = np.argwhere(numbers < 0)[0]
            raise ValueError(f"{owner}: `coupling` has negative entries, the first is {numbers[i, j]:g} at ({i}, {j}).")
        if not numbers.any():
            raise ValueError(f"{owner}: all entries of `coupling` are zero: nothing was observed.")
    return array


def check_cost(owner: str, features: Any, theta0: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    if callable(features):
        if theta0 is None and hasattr(features, "initial"):
            theta0 = features.initial()
        if theta0 is None:
            raise ValueError(f"{owner}: with a function as `features` pass `theta0`, where to start.")
        theta0 = jax.tree.map(lambda v: checks.as_floating(owner, "theta0", v), theta0)
        return features, theta0
    array = checks.as_floating(owner, "features", features)
    if array.ndim != 3 or array.shape[0] == 0:
        raise ValueError(f"{owner}: `features` must have shape (K, n, m), found {array.shape}.")
    if array.shape[1:] != shape:
        raise ValueError(
            f"{owner}: `coupling` has shape {shape}, but `features` has {array.shape[1:]} points, its shape is "
            f"{array.shape}."
        )
    checks.check_finite(owner, "features", array)
    theta = jnp.zeros(len(array), array.dtype) if theta0 is None else checks.as_floating(owner, "theta0", theta0, 1)
    if theta.shape != (len(array),):
        raise ValueError(f"{owner}: `theta0` must have shape ({len(array)},), found {theta.shape}.")
    return LinearCost(array, None), theta


def check_pairs(features: Any, pairs: Any, theta0: Any) -> tuple[np.ndarray, tuple[int, int]]:
    """Index pairs, shape (N, 2), and how many points there are on either side."""
    array = np.asarray(pairs)
    if array.ndim != 2 or array.shape[1] != 2 or len(array) == 0:
        raise ValueError(f"InverseOT.from_samples: `pairs` must have shape (N, 2), found {array.shape}.")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"InverseOT.from_samples: `pairs` must hold integer indices, found dtype {array.dtype}.")
    if isinstance(features, PointCloudCost):
        shape = (len(features.X), len(features.Y))
    else:
        shape = jax.eval_shape(features, theta0).shape if callable(features) else np.shape(features)[1:]
    if len(shape) != 2:
        raise ValueError(f"InverseOT.from_samples: `features` must have shape (K, n, m), found {shape} points.")
    outside = np.flatnonzero(((array < 0) | (array >= np.asarray(shape))).any(axis=1))
    if outside.size:
        raise ValueError(
            f"InverseOT.from_samples: {outside.size} of the `pairs` lie outside of the features' {shape} points, "
            f"the first is {tuple(int(v) for v in array[outside[0]])}."
        )
    return array, (int(shape[0]), int(shape[1]))


def check_marginal(owner: str, name: str, given: Any, own: Array, tau: Any) -> tuple[Array, bool]:
    """The reference marginal, and whether it is the observation's own."""
    if given is None:
        if tau is not None:
            raise ValueError(
                f"{owner}: pass `{name}`: with a finite `tau` it is not the marginal of the coupling but what would be "
                f"transported if nothing were lost."
            )
        return own, True
    weights = checks.check_weights(owner, name, given)
    if weights.shape != own.shape:
        raise ValueError(f"{owner}: `{name}` has {weights.shape[0]} entries, but `coupling` has {own.shape[0]} there.")
    if tau is None and checks.is_concrete(weights) and checks.is_concrete(own):
        eps = float(jnp.finfo(own.dtype).eps)
        first, second = float(jnp.sum(weights)), float(jnp.sum(own))
        if abs(first - second) > 1e3 * eps * len(own) * max(first, second):
            raise ValueError(
                f"{owner}: `coupling` must have the mass of `{name}`, which is kept exactly, found {second:.12g} and "
                f"{first:.12g}; normalise it, or pass a finite `tau`."
            )
        same = bool(np.allclose(np.asarray(weights), np.asarray(own), rtol=1e-9, atol=0))
        return weights, same
    return weights, False


def check_support(owner: str, observed: Any, a: Array, b: Array) -> None:
    if isinstance(observed, ObservedPairs):
        i, j = np.asarray(observed.rows), np.asarray(observed.columns)
        outside = np.flatnonzero((np.asarray(a)[i] <= 0) | (np.asarray(b)[j] <= 0))
        if outside.size:
            k = outside[0]
            raise ValueError(f"{owner}: a pair ({i[k]}, {j[k]}) was observed, where `a` or `b` has no mass.")
        return
    if not all(checks.is_concrete(v) for v in (observed, a, b)):
        return
    outside = (np.asarray(observed) > 0) & ~((np.asarray(a) > 0)[:, None] & (np.asarray(b) > 0)[None, :])
    if outside.any():
        i, j = np.argwhere(outside)[0]
        raise ValueError(f"{owner}: `coupling` has mass at ({i}, {j}), where `a` or `b` has none.")


def check_sharpening(owner: str, sharpening: Any) -> Array | None:
    if checks.is_concrete(sharpening) and isinstance(sharpening, (int, float)) and sharpening == 0:
        return None
    return checks.check_positive(owner, "sharpening", sharpening)


def check_count(observed: Any, count: Any) -> int | None:
    if count is not None:
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
            raise ValueError(f"InverseOT: `count` must be the number of observed pairs, found {count!r}.")
        return int(count)
    if isinstance(observed, ObservedPairs) or not checks.is_concrete(observed):
        return None
    numbers = np.asarray(observed)
    total = float(numbers.sum())
    return int(total) if total > 1 and np.all(numbers == np.round(numbers)) else None
