"""Support vector classification with the squared hinge."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from ._criteria import AbstractCriterion, criterion
from ._labels import check_folds, negative_label, signs
from ._linear import AbstractJudgedTuning
from ._penalties import Penalties


class SupportVectorTuning(AbstractJudgedTuning):
    """The log-penalties x of a linear support vector machine, tuned for its validation loss.

    Inner: minimize over the weights w, with n training rows X and labels s = ±1, and p features,

        mean over rows of max(0, 1 - s X w)^2 + (1/2p) sum_j exp(x_j) w_j^2,

    which is scikit-learn's `LinearSVC(C=p / (n * exp(x)), loss="squared_hinge", fit_intercept=False)` where x is
    shared. Outer: the mean squared hinge on the validation rows, a surrogate of the error rate. There is no intercept:
    add a column of ones where it is needed.

    **Arguments:** as for `LogisticTuning`. `penalties`: "shared", x of shape (), or "per-feature", x of shape (p,).

    y has shape (p,), with `cv` (K, p).

    **Raises:** ValueError, TypeError as `LogisticTuning` does.
    """

    criterion: AbstractCriterion
    penalties: Penalties
    negative: int = eqx.field(static=True)

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
        owner = "SupportVectorTuning"
        self.negative = negative_label(owner, y)
        y = signs(owner, "y", y, self.negative)
        y_val = None if y_val is None else signs(owner, "y_val", y_val, self.negative)
        self.criterion = criterion(owner, X, y, X_val, y_val, cv, stratified=True)
        self.penalties = Penalties(owner, penalties, groups, self.criterion.X.shape[1])
        check_folds(owner, self.criterion)

    @staticmethod
    def losses(x, X, w, targets):
        return jnp.square(jnp.maximum(1 - targets * (X @ w), 0))

    def decision_function(self, y: ArrayLike, X: Any) -> Float[Array, " m"]:
        """X y, shape (m,), positive for class 1; for the weights of K folds the average."""
        X = self.criterion.rows("SupportVectorTuning.decision_function", X)
        return (self.criterion.models("SupportVectorTuning.decision_function", y) @ X.T).mean(axis=0)

    def predict(self, y: ArrayLike, X: Any) -> Int[Array, " m"]:
        """The labels, shape (m,), coded as those given (0/1 or ±1)."""
        return jnp.where(self.decision_function(y, X) > 0, 1, self.negative)
