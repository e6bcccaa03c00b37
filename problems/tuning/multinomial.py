"""Logistic regression with any number of classes."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ._criteria import AbstractCriterion, criterion
from ._labels import check_folds, class_labels, class_numbers, named
from ._linear import AbstractJudgedTuning, OfPredictions
from ._penalties import Penalties


class MultinomialTuning(AbstractJudgedTuning):
    """The log-penalties x of a multinomial logistic regression, tuned for its validation loss.

    Inner: minimize over the weights w of shape (c, p), for c classes, with n training rows X and p features,

        mean over rows of -log softmax(w X_i)[label_i] + (1/2p) sum_jk exp(x_j) w_kj^2,

    which is scikit-learn's `LogisticRegression(C=p / (n * exp(x)), fit_intercept=False)` where x is shared. Outer:
    the mean cross-entropy of the validation rows. There is no intercept: add a column of ones where it is needed.

    **Arguments:** `X`, `X_val`, `y_val`, `cv`: as for `LogisticTuning`. `y`: labels of two or more classes, integers
    or strings, shape (n,). `penalties`: "shared", x of shape (); "per-feature", x of shape (p,); "per-class", x of
    shape (c,), in the order of the sorted labels. `groups`: an integer per feature, numbered from 0.

    y has shape (c, p), with `cv` (K, c, p).

    **Raises:** ValueError, TypeError as `LogisticTuning` does; a fold that trains without one of the classes.
    """

    criterion: AbstractCriterion
    penalties: Penalties
    classes: tuple = eqx.field(static=True)

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
        owner = "MultinomialTuning"
        self.classes = classes = class_labels(owner, y)
        y = class_numbers(owner, "y", y, classes)
        y_val = None if y_val is None else class_numbers(owner, "y_val", y_val, classes)
        start = lambda X, y: jnp.zeros((len(classes), X.shape[1]), X.dtype)
        self.criterion = criterion(owner, X, y, X_val, y_val, cv, stratified=True, start=start)
        p = self.criterion.X.shape[1]
        self.penalties = Penalties(owner, penalties, groups, p, classes=len(classes))
        check_folds(owner, self.criterion)

    @property
    def losses(self):
        return OfPredictions(cross_entropy)

    def predict_proba(self, y: ArrayLike, X: Any) -> Float[Array, "m c"]:
        """The probabilities of the classes, shape (m, c), for X of shape (m, p) and weights of shape (c, p), such as
        `refit` gives. For the weights of K folds, shape (K, c, p), the average of their probabilities.
        """
        X = self.criterion.rows("MultinomialTuning.predict_proba", X)
        models = self.criterion.models("MultinomialTuning.predict_proba", y)
        return jnp.mean(jax.nn.softmax(jnp.einsum("mp,kcp->kmc", X, models)), axis=0)

    def predict(self, y: ArrayLike, X: Any) -> Any:
        """The labels of the most probable classes, shape (m,), as they were given."""
        return named(self.classes, jnp.argmax(self.predict_proba(y, X), axis=1))


def cross_entropy(scores: Float[Array, "n c"], targets: Float[Array, " n"]) -> Float[Array, " n"]:
    """-log softmax(scores)[target] of each row, the targets being numbers of classes."""
    picked = jnp.take_along_axis(scores, targets.astype(int)[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(scores, axis=1) - picked
