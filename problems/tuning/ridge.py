"""Ridge regression."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ._criteria import AbstractCriterion, AbstractRows, Formula, criterion, formula, leverage
from ._linear import AbstractLinearTuning, at, squared
from ._penalties import Penalties


class RidgeTuning(AbstractLinearTuning):
    """The log-penalties x of a ridge regression, tuned for its validation error.

    Inner: minimize over the weights w, with n training rows X w ~ b and p features,

        |X w - b|^2 / (2n) + (1/2p) sum_j exp(x_j) w_j^2,

    which is scikit-learn's `Ridge(alpha=n * exp(x) / p, fit_intercept=False)` where x is shared. Outer: half the mean
    squared error on the validation rows. There is no intercept: center the data, or add a column of ones.

    **Arguments:** `X`: shape (n, p), real and finite; its floating dtype is the problem's (other dtypes become JAX's
    default). `y`: the targets b, shape (n,). Then one of

    - `X_val`, `y_val`: a validation set, shapes (m, p) and (m,);
    - `cv`: K folds as one inner problem. A number shuffles the rows once and cuts them like scikit-learn's
      `KFold(cv, shuffle=True, random_state=0)`. Otherwise a sequence of (training, validation) row indices, or an
      object with `split(X, y)`. The inner objective is the sum over folds, the outer function their average;
    - `cv="loo"`: leave-one-out by its closed form, (1/2n) sum_i (r_i / (1 - H_ii))^2 with the residuals r of the
      weights trained on all rows and H = X (X'X + (n-1) D)^-1 X', D = diag(exp(x) / p): as with n folds.

    `penalties`: "per-feature", x of shape (p,), or "shared", x of shape (). `groups`: an integer per feature,
    numbered from 0; x then has one entry per group.

    y has shape (p,), with K folds (K, p). The arrays are leaves: `jax.tree.map` over the problem casts them, and other
    data of the same shape compile nothing anew.

    **Raises:** ValueError, TypeError naming the argument: shapes or lengths that do not fit, NaN or infinity, a
    sparse X, both or neither of validation set and `cv`, unknown `penalties`, unusable `groups` or folds.
    """

    criterion: AbstractRows
    penalties: Penalties

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
        if isinstance(cv, str) and cv == "loo" and X_val is None and y_val is None:
            self.criterion = formula("RidgeTuning", X, y, left_out=1)
        else:
            self.criterion = criterion("RidgeTuning", X, y, X_val, y_val, cv)
        self.penalties = Penalties("RidgeTuning", penalties, groups, self.criterion.X.shape[1], default="per-feature")

    @staticmethod
    def losses(x, X, w, targets):
        return squared(x, X, w, targets)

    def outer(self, x: ArrayLike, y: ArrayLike) -> Float[Array, ""]:
        """Half the mean squared error on the validation rows, averaged over folds."""
        x, y = jnp.asarray(x), jnp.asarray(y)
        if isinstance(self.criterion, AbstractCriterion):
            return self.criterion.validation(at(x, squared), y)
        assert isinstance(self.criterion, Formula)
        self.criterion.check(y)
        X, targets = self.criterion.X, self.criterion.targets
        hessian = jnp.diag(jnp.exp(self.penalties.spread(x)) * self.penalties.scale)
        rest = 1 - leverage(X, self.criterion.divisor, hessian)
        return 0.5 * jnp.mean(jnp.square((X @ y - targets) / rest))

    def predict(self, y: ArrayLike, X: Any) -> Float[Array, " m"]:
        """The predictions X y, shape (m,), for X of shape (m, p) and weights of shape (p,), such as `refit` gives.

        For the weights of K folds, shape (K, p), the average of their predictions.
        """
        X = self.criterion.rows("RidgeTuning.predict", X)
        return (self.criterion.models("RidgeTuning.predict", y) @ X.T).mean(axis=0)
