"""Additive models: a smooth function of each feature, and a smoothing parameter for each."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from . import _data
from ._criteria import AbstractCriterion, AbstractRows, Formula, criterion, formula, leverage
from ._labels import check_folds, negative_label, signs
from ._linear import AbstractLinearTuning, at, squared
from ._penalties import AbstractPenalties
from ._splines import Basis, basis
from .poisson import check_counts

FAMILIES = ("gaussian", "logistic", "poisson")


class Roughness(AbstractPenalties):
    """1/2 sum_j exp(x_j) w_j' S_j w_j, over blocks of weights after an intercept, which is not penalized."""

    shape: tuple[int, ...] = eqx.field(static=True)
    blocks: Float[Array, "j q q"]

    def ridge(self, x, w):
        if jnp.shape(x) != self.shape:
            raise ValueError(f"the log smoothing parameters x must have shape {self.shape}, found {jnp.shape(x)}.")
        parts = w[1:].reshape(self.blocks.shape[:2])
        return 0.5 * jnp.vdot(jnp.exp(x), jnp.einsum("jq,jqr,jr->j", parts, self.blocks, parts))

    def matrix(self, x: Float[Array, " j"]) -> Float[Array, "q q"]:
        """The penalty's Hessian, of all weights."""
        parts = jnp.exp(x)[:, None, None] * self.blocks
        return jax.scipy.linalg.block_diag(jnp.zeros((1, 1), parts.dtype), *parts)


class AdditiveTuning(AbstractLinearTuning):
    """The log smoothing parameters x of a generalized additive model, one for each feature.

    Inner: minimize over an intercept and the coefficients w_j of cubic B-splines B_j of feature j (equidistant knots,
    centred on the training rows), eta = w_0 + sum_j B_j w_j,

        mean over rows of loss(eta, b) + 1/2 sum_j exp(x_j) |second differences of w_j|^2,

    loss: (eta - b)^2 / 2 ("gaussian"), log(1 + exp(-s eta)) for labels s = ±1 ("logistic"), or exp(eta) - b eta
    ("poisson"). Outer: the mean loss of the validation rows; with `cv="gcv"` generalized cross-validation on all rows
    ("gaussian"), RSS / (2n) / (1 - tr H / n)^2, H the smoother matrix; with `cv="loo"` leave-one-out by its closed form
    ("gaussian").

    **Arguments:** `X`: shape (n, d), every feature with at least two values. `y`: targets, labels 0/1 or ±1, or counts.
    `X_val`, `y_val`, or `cv`: as for `RidgeTuning`, and "gcv" or "loo". `family`: see above. `splines`: per feature,
    at least 5.

    y has shape (1 + d (splines - 1),), with K folds a leading axis.

    **Raises:** ValueError, TypeError naming the argument; a constant feature.
    """

    criterion: AbstractRows
    penalties: Roughness
    low: Float[Array, " d"]
    high: Float[Array, " d"]
    keep: Float[Array, "d s t"]
    family: str = eqx.field(static=True)
    formula: str | None = eqx.field(static=True)
    negative: int = eqx.field(static=True)

    def __init__(
        self,
        X: Any,
        y: Any,
        X_val: Any = None,
        y_val: Any = None,
        *,
        cv: Any = None,
        family: str = "gaussian",
        splines: int = 10,
    ):
        owner = "AdditiveTuning"
        if family not in FAMILIES:
            raise ValueError(f"{owner}: `family` must be one of {FAMILIES}, found {family!r}.")
        if not (isinstance(splines, int) and splines >= 5):
            raise ValueError(f"{owner}: `splines` must be an integer of at least 5, found {splines!r}.")
        self.family, self.negative = family, 0
        if family == "logistic":
            self.negative = negative_label(owner, y)
            y = signs(owner, "y", y, self.negative)
            y_val = None if y_val is None else signs(owner, "y_val", y_val, self.negative)
        if family == "poisson":
            check_counts(owner, "y", y)
            check_counts(owner, "y_val", y_val)
        self.formula = cv if isinstance(cv, str) and cv in ("gcv", "loo") else None
        if self.formula and family != "gaussian":
            raise ValueError(f"{owner}: `cv={cv!r}` is for the family 'gaussian' only; pass a number of folds.")
        given = _data.features(owner, "X", X)
        made = basis(owner, np.asarray(given, float), splines)
        expanded = lambda rows: jnp.asarray(made.design(np.asarray(rows, float)), rows.dtype)
        start = lambda X, y: _start(family, X, y)
        if self.formula:
            left_out = 1 if self.formula == "loo" else 0
            self.criterion = formula(owner, X, y, left_out=left_out, features=expanded, start=start)
        else:
            self.criterion = criterion(
                owner, X, y, X_val, y_val, cv, stratified=family == "logistic", start=start, features=expanded
            )
        if family == "logistic":
            check_folds(owner, self.criterion)
        dtype = self.criterion.X.dtype
        self.low, self.high, self.keep = (jnp.asarray(part, dtype) for part in made)
        self.penalties = Roughness(self.low.shape, jnp.asarray(made.roughness(), dtype))

    @property
    def losses(self):
        return _LOSSES[self.family]

    def outer(self, x: ArrayLike, y: ArrayLike) -> Float[Array, ""]:
        """The mean loss on the validation rows, averaged over folds; or the closed form asked for."""
        x, y = jnp.asarray(x), jnp.asarray(y)
        if isinstance(self.criterion, AbstractCriterion):
            return self.criterion.validation(at(x, self.losses), y)
        self.criterion.check(y)
        rest = self.criterion.targets - self.criterion.X @ y
        mine = self.leverage(x)
        if self.formula == "loo":
            return 0.5 * jnp.mean(jnp.square(rest / (1 - mine)))
        return 0.5 * jnp.mean(jnp.square(rest)) / jnp.square(1 - jnp.mean(mine))

    def leverage(self, x: Float[Array, " d"]) -> Float[Array, " n"]:
        """The diagonal of the smoother matrix H of all rows at x ("gaussian"); its sum is the effective number of
        parameters."""
        divisor = self.criterion.divisor if isinstance(self.criterion, Formula) else len(self.criterion.targets)
        return leverage(self.criterion.X, divisor, self.penalties.matrix(x))

    @property
    def _basis(self) -> Basis:
        return Basis(*(np.asarray(part, float) for part in (self.low, self.high, self.keep)))

    def _eta(self, owner: str, y: ArrayLike, X: Any) -> Float[Array, "k m"]:
        X = _data.features(owner, "X", X, columns=len(self.low))
        design = jnp.asarray(self._basis.design(np.asarray(X, float)), self.criterion.X.dtype)
        return self.criterion.models(owner, y) @ design.T

    def predict_mean(self, y: ArrayLike, X: Any) -> Float[Array, " m"]:
        """The means: eta, the probability of class 1, or exp(eta), by the family; shape (m,)."""
        inverse = {"gaussian": lambda eta: eta, "logistic": jax.nn.sigmoid, "poisson": jnp.exp}[self.family]
        return inverse(self._eta("AdditiveTuning.predict", y, X)).mean(axis=0)

    def predict(self, y: ArrayLike, X: Any) -> Any:
        """The means, shape (m,), for X of shape (m, d) and one model's weights, such as `refit` gives; labels where the
        family is "logistic". For the weights of K folds, from the average of their means."""
        mean = self.predict_mean(y, X)
        return jnp.where(mean > 0.5, 1, self.negative) if self.family == "logistic" else mean

    def smooth(self, y: ArrayLike, feature: int, values: Any) -> Float[Array, " m"]:
        """The smooth function of one feature (mean zero over the training rows) at values of shape (m,)."""
        w = self.criterion.models("AdditiveTuning.smooth", y).mean(axis=0)
        mine = w[1:].reshape(self.penalties.blocks.shape[:2])[feature]
        return jnp.asarray(self._basis.columns(feature, np.asarray(values, float)), w.dtype) @ mine


_LOSSES = {
    "gaussian": squared,
    "logistic": lambda x, X, w, targets: jax.nn.softplus(-targets * (X @ w)),
    "poisson": lambda x, X, w, targets: jnp.exp(X @ w) - targets * (X @ w),
}


def _start(family: str, X: Array, y: Array) -> Array:
    """No smooth functions, and the best intercept without any."""
    mean = jnp.mean(y)
    first = {"gaussian": lambda: mean, "logistic": lambda: jnp.zeros_like(mean), "poisson": lambda: jnp.log(mean)}
    return jnp.zeros(X.shape[1], X.dtype).at[0].set(first[family]())
