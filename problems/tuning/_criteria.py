"""Outer criteria of linear models, held-out and K-fold: on which rows weights are trained and judged.

A criterion holds the data. It turns a loss per row, `loss(prediction, target)`, into a training and a validation
loss of the weights; K folds are trained as one problem whose y has a leading fold axis.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from . import _data
from ._folds import folds

RowLoss = Callable[[Array, Array], Array]


class AbstractCriterion(eqx.Module):
    """Interface; `X` of shape (n, p) and `targets` of shape (n,) are the rows that models are trained on."""

    X: eqx.AbstractVar[Float[Array, "n p"]]
    targets: eqx.AbstractVar[Float[Array, " n"]]

    @property
    @abc.abstractmethod
    def folds(self) -> int | None:
        """The length of y's leading fold axis, or None where there is no such axis."""

    @abc.abstractmethod
    def training(self, loss: RowLoss, penalty: Callable[[Array], Array], y: Array) -> Float[Array, ""]:
        """The mean of `loss` over the training rows plus `penalty(w)`; summed over folds."""

    @abc.abstractmethod
    def validation(self, loss: RowLoss, y: Array) -> Float[Array, ""]:
        """The mean of `loss` over the validation rows; averaged over folds."""

    def everything(self) -> CrossValidation:
        """One fold that trains on all rows of X."""
        n = len(self.targets)
        weights = jnp.full((1, n), 1 / n, self.X.dtype)
        return CrossValidation(self.X, self.targets, weights, weights)

    def initial(self) -> Array:
        """Zero weights, of shape (p,) or (folds, p)."""
        lead = () if self.folds is None else (self.folds,)
        return jnp.zeros((*lead, self.X.shape[1]), self.X.dtype)

    def scores(self, owner: str, y: Any, X: Any) -> Float[Array, "k m"]:
        """X w for each row w of y, or for y itself: shape (folds or 1, m)."""
        X = _data.features(owner, "X", X, columns=self.X.shape[1]).astype(self.X.dtype)
        if jnp.ndim(y) not in (1, 2) or jnp.shape(y)[-1] != X.shape[1]:
            p = X.shape[1]
            raise ValueError(f"{owner}: the weights y must have shape ({p},) or (folds, {p}), found {jnp.shape(y)}.")
        return jnp.atleast_2d(y) @ X.T

    def check(self, y: Array) -> None:
        """Raises ValueError unless y has the shape of `initial()`."""
        shape = jax.eval_shape(self.initial).shape
        if jnp.shape(y) != shape:
            meaning = "(features,)" if self.folds is None else "(folds, features)"
            raise ValueError(f"the weights y must have shape {meaning} = {shape}, found {jnp.shape(y)}.")


class HeldOut(AbstractCriterion):
    """Trained on (X, targets), judged on (X_val, targets_val)."""

    X: Float[Array, "n p"]
    targets: Float[Array, " n"]
    X_val: Float[Array, "m p"]
    targets_val: Float[Array, " m"]

    @property
    def folds(self):
        return None

    def training(self, loss, penalty, y):
        self.check(y)
        return jnp.mean(loss(self.X @ y, self.targets)) + penalty(y)

    def validation(self, loss, y):
        self.check(y)
        return jnp.mean(loss(self.X_val @ y, self.targets_val))


class CrossValidation(AbstractCriterion):
    """Fold k is trained and judged on all rows, with the weights `train[k]` and `judge[k]`; each sums to one.

    So folds may differ in size, the data are held once, and the K products X w are one matrix product.
    """

    X: Float[Array, "n p"]
    targets: Float[Array, " n"]
    train: Float[Array, "k n"]
    judge: Float[Array, "k n"]

    @property
    def folds(self):
        return self.train.shape[0]

    def training(self, loss, penalty, y):
        self.check(y)

        def one(w, weight):
            return jnp.vdot(weight, loss(self.X @ w, self.targets)) + penalty(w)

        return jnp.sum(jax.vmap(one)(y, self.train))

    def validation(self, loss, y):
        self.check(y)
        return jnp.mean(jax.vmap(lambda w, weight: jnp.vdot(weight, loss(self.X @ w, self.targets)))(y, self.judge))


def criterion(
    owner: str, X: Any, y: Any, X_val: Any, y_val: Any, cv: Any, *, stratified: bool = False
) -> AbstractCriterion:
    """The criterion that a model's arguments describe; raises ValueError, TypeError naming the one at fault."""
    X = _data.features(owner, "X", X)
    given, y = y, _data.targets(owner, "y", y, "X", X)
    if (X_val is None) != (y_val is None):
        alone, missing = ("y_val", "X_val") if X_val is None else ("X_val", "y_val")
        raise ValueError(f"{owner}: `{alone}` comes without `{missing}`.")
    if (X_val is None) == (cv is None):
        found = "neither" if cv is None else "both"
        raise ValueError(f"{owner}: pass a validation set (`X_val`, `y_val`) or `cv`, found {found}.")
    if cv is None:
        X_val = _data.features(owner, "X_val", X_val, columns=X.shape[1]).astype(X.dtype)
        return HeldOut(X, y, X_val, _data.targets(owner, "y_val", y_val, "X_val", X_val))
    pairs = folds(owner, cv, X, given, stratified=stratified)
    train, judge = (np.stack([_shares(pair[part], len(y)) for pair in pairs]) for part in (0, 1))
    return CrossValidation(X, y, jnp.asarray(train, X.dtype), jnp.asarray(judge, X.dtype))


def _shares(rows: np.ndarray, n: int) -> np.ndarray:
    """The weight of each of n rows in the mean over `rows`, in which a row may appear more than once."""
    return np.bincount(rows, minlength=n) / len(rows)
