"""Training on wrong labels: one weight for each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from . import _data
from ._criteria import AbstractCriterion, criterion
from ._labels import class_labels, class_numbers, named
from ._linear import AbstractJudgedTuning
from ._penalties import AbstractPenalties
from .multinomial import cross_entropy


class Fixed(AbstractPenalties):
    """(scale/2) |w|^2, whatever x of shape (rows,) is."""

    shape: tuple[int, ...] = eqx.field(static=True)
    scale: Float[Array, ""]

    def ridge(self, x, w):
        if jnp.shape(x) != self.shape:
            raise ValueError(f"the logits x of the sample weights must have shape {self.shape}, found {jnp.shape(x)}.")
        return 0.5 * self.scale * jnp.sum(jnp.square(w))


class DataCleaning(AbstractJudgedTuning):
    """A weight for every training row, so that the model trained with them is good on a clean validation set: rows
    whose labels are wrong lose their weight.

    Inner: minimize over w of shape (c, p + 1), for c classes, weights and an intercept,

        mean over the n rows of sigmoid(x_i) cross_entropy_i(w) + (penalty/2) |w|^2.

    Outer: the mean cross-entropy of the validation rows. Its own minimum over n weights fits the validation rows too
    well, and ranks labels worse than a few steps towards it do; so `bilevel.minimize` is given, as this problem's prox,
    the penalty decay/(2n) |x|^2, which `outer` does not contain.

    **Arguments:** `X`: shape (n, p), real and finite. `y`: labels, some of them wrong, integers or strings, shape
    (n,). `X_val`, `y_val`: a clean validation set, shapes (m, p) and (m,), no label that y does not have. `penalty`:
    a number > 0, fixed. `decay`: a number >= 0; its default is what ranked labels well on the two data sets of the
    tests and the example, so their figures are no test of it: keep some clean rows aside to choose it.

    x has shape (n,), y has shape (c, p + 1).

    **Raises:** ValueError, TypeError naming the argument.
    """

    criterion: AbstractCriterion
    penalties: Fixed
    decay: Float[Array, ""]
    classes: tuple = eqx.field(static=True)

    def __init__(self, X: Any, y: Any, X_val: Any, y_val: Any, *, penalty: float = 1e-2, decay: float = 0.1):
        owner = "DataCleaning"
        if X_val is None or y_val is None:
            raise ValueError(f"{owner}: pass a clean validation set, `X_val` and `y_val`.")
        if not float(penalty) > 0:
            raise ValueError(f"{owner}: `penalty` must be positive, found {penalty!r}.")
        if not float(decay) >= 0:
            raise ValueError(f"{owner}: `decay` must be at least 0, found {decay!r}.")
        self.classes = classes = class_labels(owner, y)
        y, y_val = class_numbers(owner, "y", y, classes), class_numbers(owner, "y_val", y_val, classes)
        start = lambda X, y: jnp.zeros((len(classes), X.shape[1]), X.dtype)
        self.criterion = criterion(owner, X, y, X_val, y_val, None, start=start, features=with_ones)
        self.penalties = Fixed((len(y),), jnp.asarray(penalty, self.criterion.X.dtype))

        self.decay = jnp.asarray(decay / len(y), self.criterion.X.dtype)

    @property
    def prox(self) -> Callable:
        """x / (1 + t decay / n): of t times the penalty on the logits."""
        return lambda x, t: x / (1 + t * self.decay)

    def penalty(self, x: Array) -> Float[Array, ""]:
        """decay/(2n) |x|^2."""
        return 0.5 * self.decay * jnp.sum(jnp.square(x))

    @staticmethod
    def losses(x, X, w, targets):
        return jax.nn.sigmoid(x) * cross_entropy(X @ w.T, targets)

    def outer(self, x: ArrayLike, y: ArrayLike) -> Float[Array, ""]:
        """The mean cross-entropy of the validation rows."""
        return self.criterion.validation(lambda X, w, t: cross_entropy(X @ w.T, t), jnp.asarray(y))

    def predict_proba(self, y: ArrayLike, X: Any) -> Float[Array, "m c"]:
        """The probabilities of the classes, shape (m, c), for X of shape (m, p) and weights y of shape (c, p + 1)."""
        p = self.criterion.X.shape[-1] - 1
        X = _data.features("DataCleaning.predict", "X", X, columns=p).astype(self.criterion.X.dtype)
        w = self.criterion.models("DataCleaning.predict", y)[0]
        return jax.nn.softmax(with_ones(X) @ w.T)

    def predict(self, y: ArrayLike, X: Any) -> Any:
        """The labels of the most probable classes, shape (m,), as they were given."""
        return named(self.classes, jnp.argmax(self.predict_proba(y, X), axis=1))


def with_ones(X: Array) -> Array:
    """X with a last column of ones."""
    return jnp.concatenate([X, jnp.ones((len(X), 1), X.dtype)], axis=1)
