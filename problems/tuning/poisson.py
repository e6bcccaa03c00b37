"""Poisson regression."""

from __future__ import annotations

from typing import Any

import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ._criteria import AbstractCriterion, criterion
from ._linear import AbstractJudgedTuning
from ._penalties import Penalties


class PoissonTuning(AbstractJudgedTuning):
    """The log-penalties x of a Poisson regression with logarithmic link, tuned for its validation deviance.

    Inner: minimize over the weights w, with n training rows, eta = X w and counts b,

        mean over rows of exp(eta) - b eta + (1/2) sum_j exp(x_j) w_j^2,

    which is scikit-learn's `PoissonRegressor(alpha=exp(x), fit_intercept=False)` where x is shared. Outer: the mean of
    exp(eta) - b eta on the validation rows: half the deviance, but for a constant. There is no intercept: add a column
    of ones where it is needed.

    **Arguments:** `X`, `X_val`, `y_val`, `cv`, `groups`: as for `RidgeTuning`. `y`: counts, or other numbers >= 0,
    shape (n,), not all zero. `penalties`: "shared", x of shape (), or "per-feature", x of shape (p,).

    y has shape (p,), with `cv` (K, p).

    **Raises:** ValueError, TypeError as `RidgeTuning` does; targets below zero.
    """

    criterion: AbstractCriterion
    penalties: Penalties

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
        owner = "PoissonTuning"
        check_counts(owner, "y", y)
        check_counts(owner, "y_val", y_val)
        self.criterion = criterion(owner, X, y, X_val, y_val, cv)
        self.penalties = Penalties(owner, penalties, groups, self.criterion.X.shape[1], scale=1.0)

    @staticmethod
    def losses(x, X, w, targets):
        eta = X @ w
        return jnp.exp(eta) - targets * eta

    def predict(self, y: ArrayLike, X: Any) -> Float[Array, " m"]:
        """The means exp(X y), shape (m,), for X of shape (m, p) and weights of shape (p,), such as `refit` gives. For
        the weights of K folds, shape (K, p), the average of their means.
        """
        X = self.criterion.rows("PoissonTuning.predict", X)
        return jnp.exp(self.criterion.models("PoissonTuning.predict", y) @ X.T).mean(axis=0)


def check_counts(owner: str, name: str, y: Any) -> None:
    """Raises ValueError where a target is below zero, or all are zero."""
    if y is None or isinstance(y, jax.core.Tracer):
        return
    array = np.asarray(y)
    if array.dtype.kind not in "biuf" or array.size == 0:
        return  # named later, with the other kinds of wrong targets
    if np.any(array < 0):
        raise ValueError(f"{owner}: the targets `{name}` must be >= 0, found {np.nanmin(array):g}.")
    if name == "y" and not np.any(array != 0):
        raise ValueError(
            f"{owner}: the targets `{name}` are all zero: their best mean is zero, which has no logarithm."
        )
