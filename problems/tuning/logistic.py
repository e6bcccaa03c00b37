"""Logistic regression with two classes."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from ._criteria import AbstractCriterion, criterion
from ._labels import check_folds, negative_label, signs
from ._linear import AbstractJudgedTuning
from ._penalties import Penalties


class LogisticTuning(AbstractJudgedTuning):
    """The log-penalties x of a logistic regression, tuned for its validation loss.

    Inner: minimize over the weights w, with n training rows X and labels s = ±1, and p features,

        mean over rows of log(1 + exp(-s X w)) + (1/2p) sum_j exp(x_j) w_j^2,

    which is scikit-learn's `LogisticRegression(C=p / (n * exp(x)), fit_intercept=False)` where x is shared. Outer:
    the mean logistic loss on the validation rows. There is no intercept: add a column of ones where it is needed.

    **Arguments:** `X`: shape (n, p), real and finite; its floating dtype is the problem's (other dtypes become JAX's
    default). `y`: labels 0 and 1, or -1 and 1, shape (n,), not traced. Then one of

    - `X_val`, `y_val`: a validation set, shapes (m, p) and (m,);
    - `cv`: K folds as one inner problem. A number gives each fold the class frequencies of y, like scikit-learn's
      `StratifiedKFold(cv, shuffle=True, random_state=0)`. Otherwise a sequence of (training, validation) row
      indices, or an object with `split(X, y)`. The inner objective is the sum over folds, the outer function their
      average.

    `penalties`: "per-feature", x of shape (p,), or "shared", x of shape (). `groups`: an integer per feature,
    numbered from 0; x then has one entry per group.

    y has shape (p,), with `cv` (K, p). The arrays are leaves: `jax.tree.map` over the problem casts them, and other
    data of the same shape compile nothing anew.

    **Raises:** ValueError, TypeError naming the argument: labels of another kind or of one class only, shapes or
    lengths that do not fit, NaN or infinity, a sparse X, both or neither of validation set and `cv`, unknown
    `penalties`, unusable `groups` or folds, a fold that trains on one class only.
    """

    criterion: AbstractCriterion
    penalties: Penalties
    negative: int = eqx.field(static=True)  # the label of the class that is not 1

    def __init__(
        self,
        X: Any,
        y: Any,
        X_val: Any = None,
        y_val: Any = None,
        *,
        cv: Any = None,
        penalties: Any = "per-feature",
        groups: Any = None,
    ):
        self.negative = negative_label("LogisticTuning", y)
        y = signs("LogisticTuning", "y", y, self.negative)
        y_val = None if y_val is None else signs("LogisticTuning", "y_val", y_val, self.negative)
        self.criterion = criterion("LogisticTuning", X, y, X_val, y_val, cv, stratified=True)
        p = self.criterion.X.shape[1]
        self.penalties = Penalties("LogisticTuning", penalties, groups, p, default="per-feature")
        check_folds("LogisticTuning", self.criterion)

    @staticmethod
    def losses(x, X, w, targets):
        return jax.nn.softplus(-targets * (X @ w))

    def predict_proba(self, y: ArrayLike, X: Any) -> Float[Array, " m"]:
        """The probabilities of class 1, shape (m,), for X of shape (m, p) and weights of shape (p,), such as `refit`
        gives. For the weights of K folds, shape (K, p), the average of their probabilities.
        """
        X = self.criterion.rows("LogisticTuning.predict_proba", X)
        return jax.nn.sigmoid(self.criterion.models("LogisticTuning.predict_proba", y) @ X.T).mean(axis=0)

    def predict(self, y: ArrayLike, X: Any) -> Int[Array, " m"]:
        """The labels, shape (m,), coded as those given (0/1 or ±1): 1 where `predict_proba` exceeds one half."""
        return jnp.where(self.predict_proba(y, X) > 0.5, 1, self.negative)
