"""Regression with Huber's loss."""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ._criteria import AbstractCriterion, criterion
from ._linear import AbstractJudgedTuning
from ._penalties import AbstractPenalties, Penalties


class Scaled(AbstractPenalties):
    """Penalties on all weights but the last one, by all of x but its first entry."""

    shape: tuple[int, ...] = eqx.field(static=True)
    penalties: Penalties

    def __init__(self, penalties: Penalties):
        self.shape = (1 + math.prod(penalties.shape),)
        self.penalties = penalties

    def ridge(self, x, w):
        if jnp.shape(x) != self.shape:
            raise ValueError(f"the hyperparameters x must have shape {self.shape}, found {jnp.shape(x)}.")
        return self.penalties.ridge(x[1:].reshape(self.penalties.shape), w[:-1])


class HuberTuning(AbstractJudgedTuning):
    """Huber's scale and the log-penalties of a robust regression, tuned for its validation error.

    Inner: minimize over the weights w and the logarithm of a spread s > 0, with n training rows r = (X w - b) / s and
    epsilon = 1 + exp(x_0),

        mean over rows of s + s H(r) + (1/2p) sum_j exp(x_j) w_j^2,    H(r) = r^2 up to |r| = epsilon, then linear,

    which is scikit-learn's `HuberRegressor(epsilon=1 + exp(x_0), alpha=n * exp(x_1) / (2 * p), fit_intercept=False)`
    where the penalty is shared. Outer: half the mean squared error on the validation rows. There is no intercept: add
    a column of ones where it is needed.

    **Arguments:** `X`, `y`, `X_val`, `y_val`, `cv`, `groups`: as for `RidgeTuning`. `penalties`: "shared", x of shape
    (2,), or "per-feature", x of shape (1 + p,); with `groups`, (1 + groups,). x starts with log(epsilon - 1).

    y holds the weights and then log s, shape (p + 1,), with `cv` (K, p + 1).

    **Raises:** ValueError, TypeError as `RidgeTuning` does.
    """

    criterion: AbstractCriterion
    penalties: Scaled

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
        self.criterion = criterion("HuberTuning", X, y, X_val, y_val, cv, start=_start)
        self.penalties = Scaled(Penalties("HuberTuning", penalties, groups, self.criterion.X.shape[1]))

    @staticmethod
    def losses(x, X, w, targets):
        epsilon, s = 1 + jnp.exp(x[0]), jnp.exp(w[-1])
        r = jnp.abs(X @ w[:-1] - targets) / s
        inside = r < epsilon
        square = jnp.where(inside, r, 0)
        return s + s * jnp.where(inside, square * square, 2 * epsilon * r - epsilon * epsilon)

    def outer(self, x: ArrayLike, y: ArrayLike) -> Float[Array, ""]:
        """Half the mean squared error on the validation rows, averaged over folds."""
        return self.criterion.validation(lambda X, w, t: 0.5 * jnp.square(X @ w[:-1] - t), jnp.asarray(y))

    def initial(self) -> tuple[Array, Array]:
        """`(x0, y0)`: epsilon = 1.35, log-penalties of zero, weights of zero, and the targets' spread."""
        x = jnp.zeros(self.penalties.shape, self.criterion.X.dtype)
        return x.at[0].set(float(np.log(0.35))), self.criterion.initial()

    def predict(self, y: ArrayLike, X: Any) -> Float[Array, " m"]:
        """The predictions, shape (m,), for X of shape (m, p) and y of shape (p + 1,), such as `refit` gives.

        For those of K folds, shape (K, p + 1), the average of their predictions.
        """
        X = self.criterion.rows("HuberTuning.predict", X)
        return (self.criterion.models("HuberTuning.predict", y)[:, :-1] @ X.T).mean(axis=0)


def _start(X: Array, targets: Array) -> Array:
    """No weights, and the spread of the targets."""
    spread = jnp.std(targets)
    return jnp.zeros(X.shape[1] + 1, X.dtype).at[-1].set(jnp.log(jnp.where(spread > 0, spread, 1)))
