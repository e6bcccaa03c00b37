"""Gaussian process regression."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

import bilevel

from . import _data
from ._kernels import Coefficients, Rows, gaussian, rows, typical_lengths
from .kernel_ridge import inverse_diagonal

MARGINAL = "marginal-likelihood"


class GaussianProcessTuning(bilevel.AbstractBilevelProblem):
    """The log length scales, the log variance and the log noise x of a Gaussian process, tuned.

    Inner: coefficients c of the n training rows with (v K + s I) c = b, K the Gaussian kernel
    exp(-1/2 sum_j ((p_j - q_j) / l_j)^2), x = (log l_1, …, log l_d, log v, log s): scikit-learn's
    `GaussianProcessRegressor(v * RBF(l) + WhiteKernel(s))`. Outer, by what is given:

    - a validation set `X_val`, `y_val`, or K folds: half the mean squared error of the posterior mean;
    - `cv="loo"`: leave-one-out by its closed form, half the mean of (c_i / [(v K + s I)^-1]_ii)^2;
    - `cv="marginal-likelihood"`, or nothing: the negative log marginal likelihood, divided by n,
      (b' c + log det(v K + s I) + n log 2 pi) / (2n).

    **Arguments:** as for `KernelRidgeTuning`. y has shape (n,), with K folds (K, n).

    **Raises:** ValueError, TypeError naming the argument.
    """

    rows: Rows
    marginal: bool = eqx.field(static=True)

    def __init__(self, X: Any, y: Any, X_val: Any = None, y_val: Any = None, *, cv: Any = None):
        nothing = X_val is None and y_val is None and cv is None
        self.marginal = nothing or (isinstance(cv, str) and cv == MARGINAL)
        cv = MARGINAL if nothing else cv
        self.rows = rows("GaussianProcessTuning", X, y, X_val, y_val, cv, formula=("loo", MARGINAL))

    @property
    def inner(self) -> Coefficients:
        """The linear system of the coefficients, in all folds at once where there are folds."""
        return Coefficients(self.rows, _scaled, 2)

    def outer(self, x: ArrayLike, y: ArrayLike) -> Float[Array, ""]:
        """The criterion that was asked for."""
        x, y, rows = jnp.asarray(x), jnp.asarray(y), self.rows
        variance, noise = jnp.exp(x[-2]), jnp.exp(x[-1])
        if rows.X_val is not None:
            assert rows.targets_val is not None
            K = variance * gaussian(x[:-2], rows.X_val, rows.X)
            return 0.5 * jnp.mean(jnp.square(K @ y - rows.targets_val))
        K = variance * gaussian(x[:-2], rows.X, rows.X)
        if rows.folded:
            squares = jnp.square(y @ K - rows.targets)
            return 0.5 * jnp.mean(jnp.sum(rows.judge * squares, axis=1))
        n = len(rows.targets)
        if not self.marginal:
            return 0.5 * jnp.mean(jnp.square(y / inverse_diagonal(K, noise)))
        root = jnp.linalg.cholesky(K + noise * jnp.eye(n, dtype=K.dtype))
        half_log_det = jnp.sum(jnp.log(jnp.diagonal(root)))
        return (0.5 * jnp.vdot(rows.targets, y) + half_log_det) / n + 0.5 * float(np.log(2 * np.pi))

    def initial(self) -> tuple[Array, Array]:
        """`(x0, y0)`: length scales of the features' spread times sqrt(d), the targets' variance, a tenth of it as
        noise; coefficients of zero."""
        lengths = typical_lengths(self.rows.X)
        variance = jnp.var(self.rows.targets)
        variance = jnp.log(jnp.where(variance > 0, variance, 1))
        x = jnp.concatenate([lengths, jnp.stack([variance, variance + float(np.log(0.1))])])
        return x, self.rows.initial()

    def refit(self, x: ArrayLike) -> Float[Array, " n"]:
        """The coefficients trained at x on all rows of `X` and `y`. Raises `bilevel.NotConverged`."""
        inner = Coefficients(self.rows.everything(), _scaled, 2)
        return bilevel.solve(inner, jnp.asarray(x, self.rows.X.dtype), inner.initial()).y

    def predict(self, y: ArrayLike, X: Any, x: ArrayLike | None = None) -> Float[Array, " m"]:
        """The posterior means at the hyperparameters `x`, shape (m,), for X of shape (m, d) and coefficients of shape
        (n,), such as `refit(x)` gives; for those of K folds, shape (K, n), the average. Raises ValueError where `x`
        is left out."""
        owner = "GaussianProcessTuning.predict"
        if x is None:
            raise ValueError(f"{owner}: pass `x` as well, predict(y, X, x): the kernel depends on it.")
        X = _data.features(owner, "X", X, columns=self.rows.X.shape[1]).astype(self.rows.X.dtype)
        x = jnp.asarray(x, X.dtype)
        K = jnp.exp(x[-2]) * gaussian(x[:-2], X, self.rows.X)
        return jnp.mean(jnp.atleast_2d(y) @ K.T, axis=0)

    def predict_std(self, X: Any, x: ArrayLike) -> Float[Array, " m"]:
        """The posterior standard deviations of new observations (noise included), shape (m,)."""
        X = _data.features("GaussianProcessTuning.predict_std", "X", X, columns=self.rows.X.shape[1])
        X, n = X.astype(self.rows.X.dtype), len(self.rows.targets)
        x = jnp.asarray(x, X.dtype)
        variance, noise = jnp.exp(x[-2]), jnp.exp(x[-1])
        K = variance * gaussian(x[:-2], self.rows.X, self.rows.X) + noise * jnp.eye(n, dtype=X.dtype)
        cross = variance * gaussian(x[:-2], self.rows.X, X)
        half = jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(K), cross, lower=True)
        return jnp.sqrt(variance + noise - jnp.sum(jnp.square(half), axis=0))


def _scaled(x: Array) -> tuple[Array, Array, Array]:
    return x[:-2], jnp.exp(x[-2]), jnp.exp(x[-1])
