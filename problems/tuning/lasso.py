"""The lasso."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from bilevel import prox

from ._criteria import AbstractCriterion, criterion
from ._penalties import Penalties
from ._sparse import AbstractSparseTuning, SparseTraining, start_below, step_length, without_repeated


class LassoTuning(AbstractSparseTuning):
    """The log-penalties x of a lasso, tuned for its validation error.

    Inner: minimize over the weights w, with n training rows X w ~ b,

        |X w - b|^2 / (2n) + sum_j exp(x_j) |w_j|,

    which is scikit-learn's `Lasso(alpha=exp(x), fit_intercept=False)` where x is shared. Outer: half the mean squared
    error on the validation rows. There is no intercept: center the data. The adjoint is solved on the weights that
    are not zero (`bilevel.Composite`), so that no matrix of p x p is formed where there are many features. With a
    shared penalty the weight of a feature that equals another one, or minus it, is zero: any share of theirs would do.

    **Arguments:** `X`, `y`, `X_val`, `y_val`, `cv`, `groups`: as for `RidgeTuning`. `penalties`: "shared", x of shape
    (), or "per-feature", x of shape (p,). `initial()` starts at a tenth of the smallest penalty that leaves no weight.

    y has shape (p,), with `cv` (K, p).

    **Raises:** ValueError, TypeError as `RidgeTuning` does.
    """

    criterion: AbstractCriterion
    step: Float[Array, ""]
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
        self.criterion = without_repeated(criterion("LassoTuning", X, y, X_val, y_val, cv), penalties, groups)
        self.step = step_length(self.criterion)
        self.penalties = Penalties("LassoTuning", penalties, groups, self.criterion.X.shape[1])

    def training(self, criterion: AbstractCriterion) -> SparseTraining:
        """The training on the rows of a criterion."""
        weights = Weights(self.penalties)
        return SparseTraining(criterion, prox.l1(First(weights)), weights)

    def initial(self) -> tuple[Array, Array]:
        """`(x0, y0)` to start from."""
        start = jnp.broadcast_to(start_below(self.criterion), self.penalties.shape)
        return start, self.criterion.initial()

    def predict(self, y: ArrayLike, X: Any) -> Float[Array, " m"]:
        """The predictions X y, shape (m,), for X of shape (m, p) and weights of shape (p,), such as `refit` gives.

        For the weights of K folds, shape (K, p), the average of their predictions.
        """
        return self.predictions("LassoTuning.predict", y, X)


class Weights(eqx.Module):
    """x -> the weights of |w_j| and of w_j^2 / 2."""

    penalties: Penalties

    def __call__(self, x: Array) -> tuple[Array, Array]:
        return jnp.exp(self.penalties.spread(x)), jnp.zeros((), x.dtype)


class First(eqx.Module):
    """x -> the weights of |w_j|."""

    weights: Any

    def __call__(self, x: Array) -> Array:
        return self.weights(x)[0]


class Second(eqx.Module):
    """x -> the weights of w_j^2 / 2."""

    weights: Any

    def __call__(self, x: Array) -> Array:
        return self.weights(x)[1]
