"""Potentials: V = sum_k theta_k phi_k(z) with the features phi of a class below or any `z -> (K,)`, or a network.

A feature takes one point z of shape (d,) and gives K numbers. None may be constant: constants in V change nothing.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

import bilevel
from bilevel.problem import as_given, as_node

from . import _inputs as inputs


class Quadratic(eqx.Module):
    """z_1, …, z_d, then z_i^2 / 2, then z_i z_j for i < j: K = d + d (d + 1) / 2.

    So theta = (-Q centre, diagonal of Q, upper triangle of Q) is V = (z - centre)' Q (z - centre) / 2 up to a constant;
    `coefficients` and `matrix` go from one to the other.
    """

    def __call__(self, z: Float[Array, " d"]) -> Float[Array, " K"]:
        rows, columns = np.triu_indices(len(z), 1)
        return jnp.concatenate([z, z * z / 2, z[rows] * z[columns]])

    @staticmethod
    def coefficients(Q: Any, centre: Any) -> Float[Array, " K"]:
        """theta of (z - centre)' Q (z - centre) / 2."""
        Q, centre = jnp.asarray(Q), jnp.asarray(centre)
        return jnp.concatenate([-Q @ centre, jnp.diagonal(Q), Q[np.triu_indices(len(centre), 1)]])

    @staticmethod
    def matrix(theta: Any) -> tuple[Float[Array, "d d"], Float[Array, " d"]]:
        """(Q, -Q centre) of theta."""
        theta = jnp.asarray(theta)
        d = round((np.sqrt(9 + 8 * theta.size) - 3) / 2)
        upper = jnp.zeros((d, d), theta.dtype).at[np.triu_indices(d, 1)].set(theta[2 * d :])
        return upper + upper.T + jnp.diag(theta[d : 2 * d]), theta[:d]


class Polynomials(eqx.Module):
    """All monomials of total degree 1 … `degree`, by degree, then lexicographically."""

    degree: int = eqx.field(static=True)

    def __check_init__(self):
        if isinstance(self.degree, bool) or not isinstance(self.degree, int) or self.degree < 1:
            raise ValueError(f"flows.Polynomials: `degree` must be an integer of at least 1, found {self.degree!r}.")

    def __call__(self, z: Float[Array, " d"]) -> Float[Array, " K"]:
        products = []
        for degree in range(1, self.degree + 1):
            for chosen in itertools.combinations_with_replacement(range(len(z)), degree):
                product = z[chosen[0]]
                for i in chosen[1:]:
                    product = product * z[i]
                products.append(product)
        return jnp.stack(products)


class RadialBasis(eqx.Module):
    """exp(-|z - c|^2 / (2 width^2)) for each row c of `centres`, shape (K, d). `width`: a number, or one for each."""

    centres: Float[Array, "K d"]
    width: Float[Array, "*K"]

    def __init__(self, centres: Any, width: Any):
        self.centres = inputs.points("flows.RadialBasis", "`centres`", centres)
        self.width = inputs.real("flows.RadialBasis", "`width`", width).astype(self.centres.dtype)
        if self.width.shape not in ((), (len(self.centres),)):
            raise ValueError(
                f"flows.RadialBasis: `width` must be a number, or one for each of {len(self.centres)} centres, found "
                f"shape {self.width.shape}."
            )
        if inputs.concrete(self.width) and not np.all(np.asarray(self.width) > 0):
            raise ValueError(f"flows.RadialBasis: `width` must be positive, found {np.asarray(self.width).min():g}.")

    def __call__(self, z: Float[Array, " d"]) -> Float[Array, " K"]:
        centres, width = self.centres.astype(z.dtype), self.width.astype(z.dtype)
        return jnp.exp(-jnp.sum(jnp.square(z - centres), axis=1) / (2 * width**2))


class Fourier(eqx.Module):
    """cos and sin of 2 pi <w, z> / period for all integer frequencies w, |w_i| <= k, w != 0, one of each pair ±w:
    K = (2 k + 1)^d - 1, all cosines first."""

    k: int = eqx.field(static=True)
    period: float = eqx.field(static=True, default=2 * np.pi)

    def __check_init__(self):
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"flows.Fourier: `k` must be an integer of at least 1, found {self.k!r}.")
        if not self.period > 0:
            raise ValueError(f"flows.Fourier: `period` must be positive, found {self.period!r}.")

    def frequencies(self, dimension: int) -> np.ndarray:
        """The frequencies w, shape (K / 2, d)."""
        axis = range(-self.k, self.k + 1)
        grid = np.array(list(itertools.product(axis, repeat=dimension)))
        return grid[len(grid) // 2 + 1 :]

    def __call__(self, z: Float[Array, " d"]) -> Float[Array, " K"]:
        angles = (2 * np.pi / self.period) * jnp.asarray(self.frequencies(len(z)), z.dtype) @ z
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)])


class Neural(eqx.Module):
    """V(z) = network(z) with an equinox network of d inputs and one output; x is its tree of arrays, `parameters`.

    The loss is not convex in x: `bilevel.minimize` finds a local minimum.
    """

    parameters: PyTree
    _static: Any = eqx.field(static=True)

    def __init__(self, network: Any):
        if not callable(network):
            raise TypeError(f"flows.Neural: `network` must be an equinox module z -> scalar, found {network!r}.")
        self.parameters, self._static = eqx.partition(network, eqx.is_inexact_array)

    def __call__(self, x: PyTree, z: Float[Array, " d"]) -> Float[Array, ""]:
        return jnp.reshape(eqx.combine(x, self._static)(z), ())


class Linear(eqx.Module):
    """V(x, z) = <x, features(z)>, with the features' number and names for what is said about them."""

    _features: Any
    count: int = eqx.field(static=True)

    @property
    def features(self) -> Callable:
        return as_given(self._features)

    def __call__(self, x, z):
        return jnp.vdot(x, self._features(z).astype(x.dtype))


def as_potential(owner: str, features: Any, dimension: int, dtype: Any) -> Any:
    """What `features` describes, as a function (x, z) -> scalar: a `Linear`, or a potential of another kind of x."""
    if inspect.isclass(features):
        features = features()
    if not callable(features):
        raise TypeError(f"{owner}: `features` must be a function z -> (K,) of one point, found {features!r}.")
    if isinstance(features, Neural) or _takes_two(features):
        return features if isinstance(features, Neural) else as_node(features)
    shape = jax.eval_shape(features, jax.ShapeDtypeStruct((dimension,), dtype))
    leaves = jax.tree.leaves(shape)
    if len(leaves) != 1 or leaves[0].ndim != 1 or leaves[0].size == 0:
        raise ValueError(
            f"{owner}: `features` must give one vector of K numbers at a point of shape ({dimension},), found shape(s) "
            f"{[leaf.shape for leaf in leaves]}."
        )
    return Linear(as_node(features), leaves[0].shape[0])


def _takes_two(function: Callable) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(needed) == 2


def evaluate(features: Callable, at: Float[Array, "m d"]) -> Float[Array, "m K"]:
    """The features at each of m points, shape (m, K)."""
    return jax.vmap(features)(at).astype(at.dtype)


def gradient(potential: Callable, x: PyTree, z: Array) -> Array:
    """The gradient of potential(x, ·) at z, like z: it is what vanishes where V is smallest."""
    return bilevel.Minimization(potential).optimality(x, z)


def feature_gradients(features: Callable, count: int, at: Float[Array, "m d"]) -> Float[Array, "m K d"]:
    """The gradients of K features at each of m points."""
    single = Linear(as_node(features), count)
    units = jnp.eye(count, dtype=at.dtype)
    return jax.vmap(lambda z: jax.vmap(lambda unit: gradient(single, unit, z))(units))(at)
