"""Log-penalties: one for all features, one for each group of them, or one for each."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

KINDS = ("per-feature", "shared")


class Penalties(eqx.Module):
    """(1/2p) sum_j exp(x_j) w_j^2 over p features, x of shape `shape`: (p,), () when shared, (number of groups,)."""

    features: int = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    groups: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(self, owner: str, penalties: Any, groups: Any, features: int, *, default: str = "per-feature"):
        if not (isinstance(penalties, str) and penalties in KINDS):
            words = " or ".join(repr(kind) for kind in KINDS)
            raise ValueError(f"{owner}: `penalties` must be {words} (or pass `groups`), found {penalties!r}.")
        self.features = features
        self.groups = None
        if groups is None:
            self.shape = () if penalties == "shared" else (features,)
            return
        if penalties != default:
            raise ValueError(f"{owner}: pass `groups` or `penalties={penalties!r}`, not both.")
        self.groups = _group_numbers(owner, groups, features)
        self.shape = (max(self.groups) + 1,)

    def per_feature(self, x: Float[Array, "..."]) -> Float[Array, " p"]:
        """x spread over the features, shape (p,)."""
        if jnp.shape(x) != self.shape:
            raise ValueError(f"the log-penalties x must have shape {self.shape}, found {jnp.shape(x)}.")
        if self.groups is not None:
            return x[np.asarray(self.groups)]
        return jnp.broadcast_to(x, (self.features,))

    def unshared(self) -> Penalties:
        """One penalty per feature, for the log-penalties that `per_feature` gives."""
        return Penalties("", "per-feature", None, self.features)

    def ridge(self, x: Float[Array, "..."], w: Float[Array, " p"]) -> Float[Array, ""]:
        """(1/2p) sum_j exp(x_j) w_j^2."""
        return jnp.vdot(jnp.exp(self.per_feature(x)), jnp.square(w)) / (2 * self.features)


def _group_numbers(owner: str, groups: Any, features: int) -> tuple[int, ...]:
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
