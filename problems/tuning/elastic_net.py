"""The elastic net."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from bilevel import prox

from ._criteria import AbstractCriterion, criterion
from ._penalties import Penalties
from ._sparse import AbstractSparseTuning, SparseTraining, start_below, step_length
from .lasso import First, Second


class ElasticNetTuning(AbstractSparseTuning):
    """The two log-penalties x of an elastic net, tuned for its validation error.

    Inner: minimize over the weights w, with n training rows X w ~ b,

        |X w - b|^2 / (2n) + exp(x_0) |w|_1 + exp(x_1) |w|^2 / 2,

    which is scikit-learn's `ElasticNet(alpha=a + b, l1_ratio=a / (a + b), fit_intercept=False)` with a = exp(x_0),
    b = exp(x_1). Outer: half the mean squared error on the validation rows. There is no intercept: center the data.

    **Arguments:** `X`, `y`, `X_val`, `y_val`, `cv`: as for `RidgeTuning`. `penalties`: "shared", x of shape (2,),
    or "per-feature", x of shape (2, p); with `groups`, (2, number of groups): first the l1 penalties, then the l2 ones.

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
        self.criterion = criterion("ElasticNetTuning", X, y, X_val, y_val, cv)
        self.step = step_length(self.criterion)
        self.penalties = Penalties("ElasticNetTuning", penalties, groups, self.criterion.X.shape[1])

    def training(self, criterion: AbstractCriterion) -> SparseTraining:
        """The training on the rows of a criterion."""
        weights = Pair(self.penalties)
        return SparseTraining(criterion, prox.elastic_net(First(weights), Second(weights)), weights)

    def initial(self) -> tuple[Array, Array]:
        """`(x0, y0)`: a tenth of the smallest l1 penalty that leaves no weight, for both penalties."""
        start = start_below(self.criterion)
        return jnp.broadcast_to(start, (2, *self.penalties.shape)), self.criterion.initial()

    def predict(self, y: ArrayLike, X: Any) -> Float[Array, " m"]:
        """The predictions X y, shape (m,), for X of shape (m, p) and weights of shape (p,), such as `refit` gives.

        For the weights of K folds, shape (K, p), the average of their predictions.
        """
        return self.predictions("ElasticNetTuning.predict", y, X)


class Pair(eqx.Module):
    """x -> the weights of |w_j| and of w_j^2 / 2."""

    penalties: Penalties

    def __call__(self, x: Array) -> tuple[Array, Array]:
        shape = (2, *self.penalties.shape)
        if jnp.shape(x) != shape:
            raise ValueError(f"the log-penalties x must have shape {shape}, found {jnp.shape(x)}.")
        return jnp.exp(self.penalties.spread(x[0])), jnp.exp(self.penalties.spread(x[1]))
