"""The group lasso."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from bilevel import prox

from ._criteria import AbstractCriterion, criterion
from ._penalties import group_numbers
from ._sparse import AbstractSparseTuning, SparseTraining, start_below, step_length


class GroupLassoTuning(AbstractSparseTuning):
    """The log-penalties x of a group lasso, tuned for its validation error.

    Inner: minimize over the weights w, with n training rows X w ~ b,

        |X w - b|^2 / (2n) + sum_g exp(x_g) |w_g|_2,

    w_g the weights of group g, which vanish together. Outer: half the mean squared error on the validation rows.
    There is no intercept: center the data.

    **Arguments:** `X`, `y`, `X_val`, `y_val`, `cv`: as for `RidgeTuning`. `groups`: an integer per feature, numbered
    from 0 (None: each feature is a group, which is the lasso). `penalties`: "shared", x of shape (), or "per-group",
    x of shape (number of groups,).

    y has shape (p,), with `cv` (K, p).

    **Raises:** ValueError, TypeError as `RidgeTuning` does.
    """

    criterion: AbstractCriterion
    step: Float[Array, ""]
    groups: tuple[int, ...] = eqx.field(static=True)
    penalties: str = eqx.field(static=True)

    def __init__(
        self,
        X: Any,
        y: Any,
        X_val: Any = None,
        y_val: Any = None,
        *,
        cv: Any = None,
        penalties: Any = "shared",
        groups: Any = None,
    ):
        owner = "GroupLassoTuning"
        if not (isinstance(penalties, str) and penalties in ("shared", "per-group")):
            raise ValueError(f"{owner}: `penalties` must be 'shared' or 'per-group', found {penalties!r}.")
        self.penalties = penalties
        self.criterion = criterion(owner, X, y, X_val, y_val, cv)
        self.step = step_length(self.criterion)
        p = self.criterion.X.shape[1]
        self.groups = tuple(range(p)) if groups is None else group_numbers(owner, groups, p)

    @property
    def _shape(self) -> tuple[int, ...]:
        return () if self.penalties == "shared" else (max(self.groups) + 1,)

    def training(self, criterion: AbstractCriterion) -> SparseTraining:
        """The training on the rows of a criterion."""
        count, folds = max(self.groups) + 1, criterion.folds
        labels = np.asarray(self.groups)
        if folds is not None:  # the groups of different folds are different groups
            labels = labels + count * np.arange(folds)[:, None]
        return SparseTraining(criterion, prox.group_lasso(GroupWeights(self._shape, count, folds or 1), labels))

    def initial(self) -> tuple[Array, Array]:
        """`(x0, y0)`: a tenth of the smallest l1 penalty that leaves no weight."""
        return jnp.broadcast_to(start_below(self.criterion), self._shape), self.criterion.initial()

    def predict(self, y: ArrayLike, X: Any) -> Float[Array, " m"]:
        """The predictions X y, shape (m,), for X of shape (m, p) and weights of shape (p,), such as `refit` gives.

        For the weights of K folds, shape (K, p), the average of their predictions.
        """
        return self.predictions("GroupLassoTuning.predict", y, X)


class GroupWeights(eqx.Module):
    """x -> the weight of each group of each fold."""

    shape: tuple[int, ...] = eqx.field(static=True)
    count: int = eqx.field(static=True)
    folds: int = eqx.field(static=True)

    def __call__(self, x: Array) -> Array:
        if jnp.shape(x) != self.shape:
            raise ValueError(f"the log-penalties x must have shape {self.shape}, found {jnp.shape(x)}.")
        return jnp.tile(jnp.broadcast_to(jnp.exp(x), (self.count,)), self.folds)
