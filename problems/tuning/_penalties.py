"""Log-penalties: one for all features, one for each group of them, or one for each."""

from __future__ import annotations

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

KINDS = ("per-feature", "shared")


class AbstractPenalties(eqx.Module):
    """Interface of what is added to the training loss: x of shape `shape`, and a quadratic penalty `ridge(x, w)`."""

    shape: eqx.AbstractVar[tuple[int, ...]]

    @abc.abstractmethod
    def ridge(self, x: Array, w: Array) -> Float[Array, ""]:
        """The penalty of the weights w of one model."""

    def general(self, x: Array) -> tuple[AbstractPenalties, Array]:
        """The same penalty and x, in the form that most kinds share: so that they compile once together."""
        return self, x


class Penalties(AbstractPenalties):
    """(scale/2) sum_j exp(x_j) w_j^2 over p features, x of shape `shape`: (p,), () when shared, (number of groups,).

    `scale` is 1/p unless said otherwise. Weights may have a leading axis of classes; with `classes` given, "per-class"
    is a kind as well, and x then has shape (classes,).
    """

    features: int = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    groups: tuple[int, ...] | None = eqx.field(static=True)
    per_class: bool = eqx.field(static=True)
    scale: float = eqx.field(static=True)

    def __init__(
        self,
        owner: str,
        penalties: Any,
        groups: Any,
        features: int,
        *,
        default: str = "shared",
        classes: int | None = None,
        scale: float | None = None,
    ):
        kinds = KINDS if classes is None else (*KINDS, "per-class")
        if not (isinstance(penalties, str) and penalties in kinds):
            words = " or ".join(repr(kind) for kind in kinds)
            raise ValueError(f"{owner}: `penalties` must be {words} (or pass `groups`), found {penalties!r}.")
        self.features = features
        self.scale = 1 / features if scale is None else scale
        self.per_class = penalties == "per-class"
        self.groups = None
        if groups is None:
            sizes = {"shared": (), "per-feature": (features,), "per-class": (classes,)}
            self.shape = sizes[penalties]  # type: ignore[assignment]
            return
        if penalties != default:
            raise ValueError(f"{owner}: pass `groups` or `penalties={penalties!r}`, not both.")
        self.groups = group_numbers(owner, groups, features)
        self.shape = (max(self.groups) + 1,)

    def spread(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """x spread over the weights: shape (p,), or (classes, 1) where each class has its own."""
        if jnp.shape(x) != self.shape:
            raise ValueError(f"the log-penalties x must have shape {self.shape}, found {jnp.shape(x)}.")
        if self.per_class:
            return x[:, None]
        if self.groups is not None:
            return x[np.asarray(self.groups)]
        return jnp.broadcast_to(x, (self.features,))

    def general(self, x):
        if self.per_class:
            return self, x
        return Penalties("", "per-feature", None, self.features, scale=self.scale), self.spread(x)

    def ridge(self, x: Float[Array, "..."], w: Float[Array, "..."]) -> Float[Array, ""]:
        """(scale/2) sum_j exp(x_j) w_j^2."""
        return jnp.sum(jnp.exp(self.spread(x)) * jnp.square(w)) * (self.scale / 2)

    def lasso(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The weights exp(x_j) of |w_j|."""
        return jnp.exp(self.spread(x))


def group_numbers(owner: str, groups: Any, features: int) -> tuple[int, ...]:
    array = np.asarray(groups)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{owner}: `groups` must be one integer per feature, found shape {array.shape}, dtype {array.dtype}."
        )
    if len(array) != features:
        raise ValueError(f"{owner}: `groups` has {len(array)} entries, but `X` has {features} features.")
    if array.min() < 0:
        raise ValueError(f"{owner}: `groups` must be numbered from 0, found {array.min()}.")
    unused = np.setdiff1d(np.arange(array.max() + 1), array)
    if unused.size:
        raise ValueError(f"{owner}: `groups` goes up to {array.max()}, but no feature is in group {unused[0]}.")
    return tuple(int(g) for g in array)
