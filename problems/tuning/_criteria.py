"""Outer criteria, held-out and K-fold: on which rows weights are trained and judged.

A criterion holds the data. It turns the loss of each row, `losses(X, w, targets)`, into a training and a validation
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

from bilevel._system import hessian_matrix

from . import _data
from ._folds import folds

RowLosses = Callable[[Array, Array, Array], Array]
"""(X of shape (n, p), weights w, targets) -> the loss of each row, shape (n,)."""


class AbstractRows(eqx.Module):
    """Rows to train on: `X` and `targets`; `start` are the weights of one model."""

    X: eqx.AbstractVar[Float[Array, "*k n p"]]
    targets: eqx.AbstractVar[Float[Array, "..."]]
    start: eqx.AbstractVar[Float[Array, "..."]]

    @property
    @abc.abstractmethod
    def folds(self) -> int | None:
        """The length of y's leading fold axis, or None where there is no such axis."""

    @abc.abstractmethod
    def training(self, losses: RowLosses, penalty: Callable[[Array], Array], y: Array) -> Float[Array, ""]:
        """The mean of `losses` over the training rows plus `penalty(w)`; summed over folds."""

    @abc.abstractmethod
    def hessians(
        self, losses: RowLosses, penalty: Callable[[Array], Array], y: Array, own: Callable | None = None
    ) -> Float[Array, "k s s"]:
        """The Hessian of `training` in the weights of each fold, of which there are s; without folds there is one.
        `own(X, w, targets, weights)`: that of the weighted sum of the losses, where it is known."""

    def everything(self) -> CrossValidation:
        """One fold that trains on all rows of X."""
        n = len(self.targets)
        weights = jnp.full((1, n), 1 / n, self.X.dtype)
        return CrossValidation(self.X, self.targets, self.start, weights, weights)

    def initial(self) -> Array:
        """`start`, once for each fold where there are folds."""
        lead = () if self.folds is None else (self.folds,)
        return jnp.broadcast_to(self.start, (*lead, *self.start.shape))

    def rows(self, owner: str, X: Any) -> Float[Array, "m p"]:
        """X as rows to predict, in the problem's dtype."""
        return _data.features(owner, "X", X, columns=self.X.shape[-1]).astype(self.X.dtype)

    def models(self, owner: str, y: Any) -> Array:
        """y as models, one a row: shape (folds or 1, *the shape of one model)."""
        one = self.start.shape
        y = jnp.asarray(y)
        if y.shape[y.ndim - len(one) :] != one or y.ndim not in (len(one), len(one) + 1):
            comma = "," if len(one) == 1 else ""
            size = ", ".join(map(str, one))
            raise ValueError(
                f"{owner}: the weights y must have shape ({size}{comma}) or (folds, {size}), found {y.shape}."
            )
        return y.reshape(-1, *one)

    def check(self, y: Array) -> None:
        """Raises ValueError unless y has the shape of `initial()`."""
        shape = jax.eval_shape(self.initial).shape
        if jnp.shape(y) != shape:
            inner = "features" if self.start.ndim == 1 else "classes, features"
            meaning = f"({inner},)" if self.folds is None and self.start.ndim == 1 else f"({inner})"
            meaning = meaning if self.folds is None else f"(folds, {inner})"
            raise ValueError(f"the weights y must have shape {meaning} = {shape}, found {jnp.shape(y)}.")


class AbstractCriterion(AbstractRows):
    """Rows to train on, and rows to judge by."""

    @abc.abstractmethod
    def validation(self, losses: RowLosses, y: Array) -> Float[Array, ""]:
        """The mean of `losses` over the validation rows; averaged over folds."""


class HeldOut(AbstractCriterion):
    """Trained on (X, targets), judged on (X_val, targets_val)."""

    X: Float[Array, "n p"]
    targets: Float[Array, "n ..."]
    start: Float[Array, "..."]
    X_val: Float[Array, "m p"]
    targets_val: Float[Array, "m ..."]

    @property
    def folds(self):
        return None

    def training(self, losses, penalty, y):
        self.check(y)
        return jnp.mean(losses(self.X, y, self.targets)) + penalty(y)

    def hessians(self, losses, penalty, y, own=None):
        self.check(y)
        weights = jnp.full(len(self.X), 1 / len(self.X), self.X.dtype)
        return _hessian(losses, penalty, own)(self.X, self.targets, y, weights)[None]

    def validation(self, losses, y):
        self.check(y)
        return jnp.mean(losses(self.X_val, y, self.targets_val))


class CrossValidation(AbstractCriterion):
    """Fold k is trained and judged on all rows, with the weights `train[k]` and `judge[k]`; each sums to one.

    So folds may differ in size, the data are held once, and the K products X w are one matrix product. X may also
    have a leading fold axis, where each fold has its own features (scaled by its own training rows, say), and so may
    the targets.
    """

    X: Float[Array, "*k n p"]
    targets: Float[Array, "..."]
    start: Float[Array, "..."]
    train: Float[Array, "k n"]
    judge: Float[Array, "k n"]

    @property
    def folds(self):
        return self.train.shape[0]

    def training(self, losses, penalty, y):
        self.check(y)

        def one(X, targets, w, weight):
            return jnp.vdot(weight, losses(X, w, targets)) + penalty(w)

        return jnp.sum(self._each(one)(self.X, self.targets, y, self.train))

    def validation(self, losses, y):
        self.check(y)

        def one(X, targets, w, weight):
            return jnp.vdot(weight, losses(X, w, targets))

        return jnp.mean(self._each(one)(self.X, self.targets, y, self.judge))

    def hessians(self, losses, penalty, y, own=None):
        self.check(y)
        return self._each(_hessian(losses, penalty, own))(self.X, self.targets, y, self.train)

    def _each(self, one: Callable) -> Callable:
        axes = (0 if self.X.ndim == 3 else None, 0 if self.targets.ndim == 2 else None, 0, 0)
        return jax.vmap(one, in_axes=axes)


class Formula(AbstractRows):
    """Trained on all rows and judged by a formula of the model's own. The sum of the losses is divided by `divisor`: n,
    or n - 1 where the formula is that of leave-one-out, so that what is trained on n - 1 rows is trained on their mean
    loss, as folds are."""

    X: Float[Array, "n p"]
    targets: Float[Array, "n ..."]
    start: Float[Array, "..."]
    divisor: int = eqx.field(static=True)

    @property
    def folds(self):
        return None

    def training(self, losses, penalty, y):
        self.check(y)
        return jnp.sum(losses(self.X, y, self.targets)) / self.divisor + penalty(y)

    def hessians(self, losses, penalty, y, own=None):
        self.check(y)
        weights = jnp.full(len(self.X), 1 / self.divisor, self.X.dtype)
        return _hessian(losses, penalty, own)(self.X, self.targets, y, weights)[None]


def _hessian(losses: RowLosses, penalty: Callable[[Array], Array], own: Callable | None) -> Callable:
    """(X, targets, w, weights) -> the Hessian of the weighted sum of the losses plus the penalty in w, shape (s, s)."""

    def hessian(X, targets, w, weights):
        def objective(flat):
            w_there = flat.reshape(w.shape)
            fit = jnp.zeros((), flat.dtype) if own is not None else jnp.vdot(weights, losses(X, w_there, targets))
            return fit + penalty(w_there)

        rest = hessian_matrix(objective, w.reshape(-1))
        return rest if own is None else own(X, w, targets, weights) + rest

    return hessian


def leverage(X: Float[Array, "n p"], divisor: int, hessian: Float[Array, "p p"]) -> Float[Array, " n"]:
    """The diagonal of H = X (X'X + divisor S)^-1 X', S the penalty's Hessian."""
    root = jnp.linalg.cholesky(X.T @ X / divisor + hessian)
    return jnp.sum(jnp.square(jax.scipy.linalg.solve_triangular(root, X.T, lower=True)), axis=0) / divisor


def criterion(
    owner: str,
    X: Any,
    y: Any,
    X_val: Any,
    y_val: Any,
    cv: Any,
    *,
    stratified: bool = False,
    start: Callable[[Array, Array], Array] | None = None,
    features: Callable[[Array], Array] | None = None,
) -> AbstractCriterion:
    """The criterion that a model's arguments describe; raises ValueError, TypeError naming the one at fault.

    `start`: the weights of one model for given rows and targets,
    zeros of shape (p,) where it is None. `features`: of checked rows, what the model is linear in.
    """
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
        y_val = _data.targets(owner, "y_val", y_val, "X_val", X_val)
        if features is not None:
            X, X_val = features(X), features(X_val)
        first = jnp.zeros(X.shape[1], X.dtype) if start is None else start(X, y)
        return HeldOut(X, y, first, X_val, y_val)
    pairs = folds(owner, cv, X, given, stratified=stratified)
    train, judge = (np.stack([shares(pair[part], len(y)) for pair in pairs]) for part in (0, 1))
    X = X if features is None else features(X)
    first = jnp.zeros(X.shape[1], X.dtype) if start is None else start(X, y)
    return CrossValidation(X, y, first, jnp.asarray(train, X.dtype), jnp.asarray(judge, X.dtype))


def formula(
    owner: str, X: Any, y: Any, *, left_out: int, features: Callable | None = None, start: Any = None
) -> Formula:
    """All rows to train on, and to judge by a formula."""
    X = _data.features(owner, "X", X)
    y = _data.targets(owner, "y", y, "X", X)
    if len(y) <= left_out + 1:
        raise ValueError(f"{owner}: leaving rows out takes more than {len(y)} of them.")
    X = X if features is None else features(X)
    return Formula(X, y, jnp.zeros(X.shape[1], X.dtype) if start is None else start(X, y), len(y) - left_out)


def shares(rows: np.ndarray, n: int) -> np.ndarray:
    """The weight of each of n rows in the mean over `rows`, in which a row may appear more than once."""
    return np.bincount(rows, minlength=n) / len(rows)
