"""Penalties on the coefficients theta of an inverse problem: each knows its value and its proximal operator."""

from __future__ import annotations

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._checks import as_floating, is_concrete

__all__ = ["L1", "AbstractPenalty", "Box", "Group", "NuclearNorm", "Sign"]


class AbstractPenalty(eqx.Module):
    """Interface of a penalty: `value(theta)`, and `prox(theta, t)`, the minimizer of t value(p) + |p - theta|^2 / 2."""

    @abc.abstractmethod
    def value(self, theta: Array) -> Float[Array, ""]:
        """The penalty at theta (of a constraint: zero)."""

    @abc.abstractmethod
    def prox(self, theta: Array, t: Any) -> Array:
        """The proximal operator of t times the penalty, like theta."""

    @abc.abstractmethod
    def check(self, owner: str, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless it fits a theta of this shape."""

    @property
    def bounds_all(self) -> bool:
        """Whether it grows in every direction, so that directions the loss does not see are determined by it."""
        return True


def _weight(owner: str, weight: Any) -> Array:
    array = as_floating(owner, "weight", weight)
    if is_concrete(array):
        numbers = np.asarray(array)
        if not np.all(np.isfinite(numbers)) or np.any(numbers < 0):
            raise ValueError(f"{owner}: `weight` must be finite and at least 0, found {weight!r}.")
    return array


def _fits(owner: str, name: str, array: Array, shape: tuple[int, ...]) -> None:
    if array.ndim and array.shape != shape:
        raise ValueError(f"{owner}: the penalty's `{name}` has shape {array.shape}, but theta has {shape}.")


class L1(AbstractPenalty):
    """sum_k weight_k |theta_k|; `weight` >= 0: a number, or an array like theta. Traced or not."""

    weight: Array

    def __init__(self, weight: Any):
        self.weight = _weight("L1", weight)

    def value(self, theta):
        return jnp.sum(self.weight.astype(theta.dtype) * jnp.abs(theta))

    def prox(self, theta, t):
        threshold = jnp.asarray(t, theta.dtype) * self.weight.astype(theta.dtype)
        return jnp.sign(theta) * jnp.maximum(jnp.abs(theta) - threshold, 0)

    def check(self, owner, shape):
        _fits(owner, "weight", self.weight, shape)


class Group(AbstractPenalty):
    """weight sum_g |theta_g|_2 over groups of coefficients; `groups`: an integer label for each entry of theta."""

    weight: Array
    groups: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, weight: Any, groups: Any):
        self.weight = _weight("Group", weight)
        labels = np.asarray(groups)
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or labels.size == 0 or labels.min() < 0:
            raise ValueError("Group: `groups` must be one integer label, 0 or more, for each entry of theta.")
        self.groups = tuple(int(g) for g in labels)

    def _lengths(self, theta):
        labels = np.asarray(self.groups)
        squares = jax.ops.segment_sum(jnp.square(theta), labels, num_segments=max(self.groups) + 1)
        return jnp.sqrt(jnp.where(squares > 0, squares, 0)), labels

    def value(self, theta):
        return self.weight.astype(theta.dtype) * jnp.sum(self._lengths(theta)[0])

    def prox(self, theta, t):
        lengths, labels = self._lengths(theta)
        keep = jnp.maximum(1 - jnp.asarray(t, theta.dtype) * self.weight / jnp.where(lengths > 0, lengths, 1), 0)
        return theta * keep[labels].astype(theta.dtype)

    def check(self, owner, shape):
        if shape != (len(self.groups),):
            raise ValueError(f"{owner}: the penalty has {len(self.groups)} group labels, but theta has shape {shape}.")


class NuclearNorm(AbstractPenalty):
    """weight times the sum of singular values of theta as a matrix of `shape` (None: theta is one already)."""

    weight: Array
    shape: tuple[int, int] | None = eqx.field(static=True)

    def __init__(self, weight: Any, shape: tuple[int, int] | None = None):
        self.weight = _weight("NuclearNorm", weight)
        self.shape = None if shape is None else (int(shape[0]), int(shape[1]))

    def _svd(self, theta):
        matrix = theta if self.shape is None else theta.reshape(self.shape)
        return jnp.linalg.svd(matrix, full_matrices=False)

    def value(self, theta):
        return self.weight.astype(theta.dtype) * jnp.sum(self._svd(theta)[1])

    def prox(self, theta, t):
        U, s, Vt = self._svd(theta)
        s = jnp.maximum(s - jnp.asarray(t, theta.dtype) * self.weight.astype(theta.dtype), 0)
        return ((U * s) @ Vt).reshape(theta.shape)

    def check(self, owner, shape):
        size = int(np.prod(shape))
        if self.shape is None and len(shape) != 2:
            raise ValueError(f"{owner}: NuclearNorm(weight, shape) needs a shape (p, q): theta has shape {shape}.")
        if self.shape is not None and self.shape[0] * self.shape[1] != size:
            raise ValueError(f"{owner}: the penalty's shape {self.shape} does not hold the {size} entries of theta.")


class Box(AbstractPenalty):
    """lower <= theta <= upper, each a number or an array like theta; infinite bounds are allowed."""

    lower: Array
    upper: Array

    def __init__(self, lower: Any = -np.inf, upper: Any = np.inf):
        self.lower, self.upper = as_floating("Box", "lower", lower), as_floating("Box", "upper", upper)
        if is_concrete(self.lower) and is_concrete(self.upper):
            if not np.all(np.asarray(self.lower) <= np.asarray(self.upper)):
                raise ValueError("Box: `lower` must be at most `upper` in every entry.")

    def value(self, theta):
        return jnp.zeros((), theta.dtype)

    def prox(self, theta, t):
        return jnp.clip(theta, self.lower.astype(theta.dtype), self.upper.astype(theta.dtype))

    def check(self, owner, shape):
        _fits(owner, "lower", self.lower, shape)
        _fits(owner, "upper", self.upper, shape)

    @property
    def bounds_all(self):
        return False


class Sign(AbstractPenalty):
    """theta_k >= 0 where `signs` is 1, <= 0 where it is -1, free where it is 0; one number or one for each entry."""

    signs: Array

    def __init__(self, signs: Any = 1):
        self.signs = as_floating("Sign", "signs", signs)
        if is_concrete(self.signs) and not np.isin(np.asarray(self.signs), (-1, 0, 1)).all():
            raise ValueError(f"Sign: `signs` must be 1, -1 or 0, found {signs!r}.")

    def value(self, theta):
        return jnp.zeros((), theta.dtype)

    def prox(self, theta, t):
        signs = self.signs.astype(theta.dtype)
        return jnp.where((signs != 0) & (signs * theta < 0), 0, theta)

    def check(self, owner, shape):
        _fits(owner, "signs", self.signs, shape)

    @property
    def bounds_all(self):
        return False
