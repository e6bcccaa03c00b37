"""Kernel ridge regression with a length scale for each feature."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

import bilevel

from . import _data
from ._kernels import Coefficients, Rows, gaussian, rows, typical_lengths


class KernelRidgeTuning(bilevel.AbstractBilevelProblem):
    """The log length scales and the log penalty x of a kernel ridge regression, tuned for its validation error.

    Inner: coefficients c of the n training rows with (K + alpha I) c = b, K the Gaussian kernel
    exp(-1/2 sum_j ((p_j - q_j) / l_j)^2), x = (log l_1, …, log l_d, log alpha). This is scikit-learn's `KernelRidge`
    with `kernel="rbf"`, and gamma = 1 / (2 l^2) where all length scales agree. Outer: half the mean squared error on
    the validation rows.

    **Arguments:** `X`: shape (n, d), real and finite. `y`: the targets b, shape (n,). Then one of

    - `X_val`, `y_val`: a validation set;
    - `cv`: K folds as one inner problem, as for `RidgeTuning`, or "loo": leave-one-out by its closed form
      (1/2n) sum_i (c_i / [(K + alpha I)^-1]_ii)^2, c trained on all rows.

    y has shape (n,), with K folds (K, n): zero at rows that the fold leaves out.

    **Raises:** ValueError, TypeError naming the argument.
    """

    rows: Rows

    def __init__(self, X: Any, y: Any, X_val: Any = None, y_val: Any = None, *, cv: Any = None):
        self.rows = rows("KernelRidgeTuning", X, y, X_val, y_val, cv)

    @property
    def inner(self) -> Coefficients:
        """The linear system of the coefficients, in all folds at once where there are folds."""
        return Coefficients(self.rows, _scaled, 1)

    def outer(self, x: ArrayLike, y: ArrayLike) -> Float[Array, ""]:
        """Half the mean squared error on the validation rows, averaged over folds."""
        x, y, rows = jnp.asarray(x), jnp.asarray(y), self.rows
        if rows.X_val is not None:
            assert rows.targets_val is not None
            K = gaussian(x[:-1], rows.X_val, rows.X)
            return 0.5 * jnp.mean(jnp.square(K @ y - rows.targets_val))
        K = gaussian(x[:-1], rows.X, rows.X)
        if rows.folded:
            squares = jnp.square(y @ K - rows.targets)
            return 0.5 * jnp.mean(jnp.sum(rows.judge * squares, axis=1))
        return 0.5 * jnp.mean(jnp.square(y / inverse_diagonal(K, jnp.exp(x[-1]))))

    def initial(self) -> tuple[Array, Array]:
        """`(x0, y0)`: length scales of the features' spread times sqrt(d), alpha = 0.1, coefficients of zero."""
        lengths = typical_lengths(self.rows.X)
        return jnp.append(lengths, jnp.log(jnp.asarray(0.1, lengths.dtype))), self.rows.initial()

    def refit(self, x: ArrayLike) -> Float[Array, " n"]:
        """The coefficients trained at x on all rows of `X` and `y`. Raises `bilevel.NotConverged`."""
        inner = Coefficients(self.rows.everything(), _scaled, 1)
        return bilevel.solve(inner, jnp.asarray(x, self.rows.X.dtype), inner.initial()).y

    def predict(self, y: ArrayLike, X: Any, x: ArrayLike | None = None) -> Float[Array, " m"]:
        """The predictions K(X, rows) y at the hyperparameters `x`, shape (m,), for X of shape (m, d) and coefficients
        of shape (n,), such as `refit(x)` gives; for those of K folds, shape (K, n), the average.

        Coefficients mean nothing without the kernel: raises ValueError where `x` is left out.
        """
        if x is None:
            raise ValueError("KernelRidgeTuning.predict: pass `x` as well, predict(y, X, x): the kernel depends on it.")
        X = _data.features("KernelRidgeTuning.predict", "X", X, columns=self.rows.X.shape[1]).astype(self.rows.X.dtype)
        K = gaussian(jnp.asarray(x, X.dtype)[:-1], X, self.rows.X)
        return jnp.mean(jnp.atleast_2d(y) @ K.T, axis=0)


def inverse_diagonal(K: Float[Array, "n n"], alpha: Float[Array, ""]) -> Float[Array, " n"]:
    """The diagonal of (K + alpha I)^-1."""
    eye = jnp.eye(len(K), dtype=K.dtype)
    root = jnp.linalg.cholesky(K + alpha * eye)
    return jnp.sum(jnp.square(jax.scipy.linalg.solve_triangular(root, eye, lower=True)), axis=0)


def _scaled(x: Array) -> tuple[Array, Array, Array]:
    return x[:-1], jnp.ones((), x.dtype), jnp.exp(x[-1])
