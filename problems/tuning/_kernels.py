"""What kernel models share: the Gaussian kernel, and coefficients that solve a linear system in every fold."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import bilevel
from bilevel.linear import DENSE_LIMIT
from bilevel.solvers import ClosedForm

from . import _data
from ._criteria import shares
from ._folds import folds
from ._foldwise import FoldHessian, Foldwise


def gaussian(log_lengths: Float[Array, " d"], P: Float[Array, "m d"], Q: Float[Array, "n d"]) -> Float[Array, "m n"]:
    """exp(-1/2 sum_j ((p_j - q_j) / exp(l_j))^2) between the rows of P and Q."""
    P, Q = P * jnp.exp(-log_lengths), Q * jnp.exp(-log_lengths)
    squares = jnp.sum(P * P, 1)[:, None] + jnp.sum(Q * Q, 1)[None, :] - 2 * (P @ Q.T)
    return jnp.exp(-0.5 * jnp.maximum(squares, 0))


class Rows(eqx.Module):
    """Which rows are trained on: `train` (K, n) holds 1 for a row that is (2 for one that is twice), `judge` the shares
    of the rows judged. Without folds K is 1 and y has no fold axis."""

    X: Float[Array, "n d"]
    targets: Float[Array, " n"]
    train: Float[Array, "k n"]
    judge: Float[Array, "k n"]
    kind: str = eqx.field(static=True)  # "held-out", "folds" or "all": all rows are trained on, and judged by a formula
    X_val: Float[Array, "m d"] | None = None
    targets_val: Float[Array, " m"] | None = None

    @property
    def folded(self) -> bool:
        """Whether y has a leading fold axis."""
        return self.kind == "folds"

    def initial(self) -> Array:
        """Zeros of shape (n,) or (K, n)."""
        n = len(self.targets)
        return jnp.zeros((len(self.train), n) if self.folded else (n,), self.X.dtype)

    def everything(self) -> Rows:
        """The same rows, all trained on."""
        ones = jnp.ones((1, len(self.targets)), self.X.dtype)
        return Rows(self.X, self.targets, ones, ones, "all")


def rows(owner: str, X: Any, y: Any, X_val: Any, y_val: Any, cv: Any, *, formula: tuple = ("loo",)) -> Rows:
    """The rows that a model's arguments describe; ValueError, TypeError naming the one at fault."""
    X = _data.features(owner, "X", X)
    y = _data.targets(owner, "y", y, "X", X)
    if (X_val is None) != (y_val is None):
        alone, missing = ("y_val", "X_val") if X_val is None else ("X_val", "y_val")
        raise ValueError(f"{owner}: `{alone}` comes without `{missing}`.")
    if (X_val is None) == (cv is None):
        found = "neither" if cv is None else "both"
        raise ValueError(f"{owner}: pass a validation set (`X_val`, `y_val`) or `cv`, found {found}.")
    ones = jnp.ones((1, len(y)), X.dtype)
    if cv is None:
        X_val = _data.features(owner, "X_val", X_val, columns=X.shape[1]).astype(X.dtype)
        return Rows(X, y, ones, ones, "held-out", X_val, _data.targets(owner, "y_val", y_val, "X_val", X_val))
    if isinstance(cv, str) and cv in formula:
        return Rows(X, y, ones, ones, "all")
    pairs = folds(owner, cv, X, y, stratified=False)
    train = np.stack([np.bincount(a, minlength=len(y)) for a, _ in pairs]).astype(float)
    judge = np.stack([shares(b, len(y)) for _, b in pairs])
    return Rows(X, y, jnp.asarray(train, X.dtype), jnp.asarray(judge, X.dtype), "folds")


class Coefficients(bilevel.AbstractMinimization):
    """(K + alpha / r) c = b on the rows that are trained on (r times), c = 0 on the others: in every fold the minimum
    of

        1/2 c' K c + alpha/2 sum_i c_i^2 / r_i - b' c.

    `scaled(x)` gives the log length scales, the kernel's factor, and alpha.
    """

    rows: Rows
    scaled: Any = eqx.field(static=True)
    more: int = eqx.field(static=True)  # entries of x besides the length scales

    def kernel(self, x: Array, P: Array, Q: Array) -> Array:
        """The kernel at x between the rows of P and of Q."""
        lengths, factor, _ = self.scaled(x)
        return factor * gaussian(lengths, P, Q)

    def objective(self, x: Array, y: Array) -> Float[Array, ""]:
        """The objective, summed over folds."""
        rows = self.rows
        K, alpha = self.kernel(x, rows.X, rows.X), self.scaled(x)[2]

        def one(c, r):
            here = r > 0
            a = jnp.where(here, c, 0)
            diagonal = jnp.where(here, alpha / jnp.where(here, r, 1), 1)
            return 0.5 * jnp.vdot(a, K @ a) + 0.5 * jnp.vdot(diagonal, c * c) - jnp.vdot(rows.targets, a)

        return jnp.sum(jax.vmap(one)(y if rows.folded else y[None], rows.train))

    def objective_at(self, x, y):
        return self.objective(x, y)

    def check(self, x, y):
        shape = jax.eval_shape(self.rows.initial).shape
        if jnp.shape(y) != shape:
            raise ValueError(f"the coefficients y must have shape {shape}, found {jnp.shape(y)}.")
        size = self.rows.X.shape[1] + self.more
        if jnp.shape(x) != (size,):
            what = "length scales, penalty" if self.more == 1 else "length scales, variance, noise"
            raise ValueError(
                f"the hyperparameters x (logarithms of {what}) must have shape ({size},), found {jnp.shape(x)}."
            )
        super().check(x, y)

    def initial(self):
        """Zeros, one for each row (and fold)."""
        return self.rows.initial()

    def operator_at(self, x, y):
        return None if self.linear_solver is None else FoldHessian(self, x, y)

    def hessians(self, x: Array, y: Array) -> Float[Array, "k n n"]:
        """The matrix of each fold's system."""
        return fold_matrices(self.kernel(x, self.rows.X, self.rows.X), self.scaled(x)[2], self.rows.train)

    @property
    def linear_solver(self):
        few = len(self.rows.targets) <= DENSE_LIMIT
        return Foldwise(len(self.rows.train)) if self.rows.folded and few else None

    @property
    def default_solver(self):
        # linear in y: wherever one starts, the correction ends at the solution
        return ClosedForm(_stay) if len(self.rows.targets) <= DENSE_LIMIT else None


def fold_matrices(kernel: Float[Array, "*k n n"], alpha: Array, train: Float[Array, "k n"]) -> Float[Array, "k n n"]:
    """K + alpha / r between rows that a fold trains on (r times), the identity between the others."""
    here = train > 0
    diagonal = jnp.where(here, alpha / jnp.where(here, train, 1), 1)
    return jnp.where(here[:, :, None] & here[:, None, :], kernel, 0) + jax.vmap(jnp.diag)(diagonal)


def _stay(x: Array, y0: Array) -> Array:
    return y0


def typical_lengths(X: Float[Array, "n d"]) -> Float[Array, " d"]:
    """The logarithm of each feature's standard deviation, times the square root of their number: distances of
    scaled rows are then of order one."""
    deviation = jnp.std(X, axis=0)
    return jnp.log(jnp.where(deviation > 0, deviation, 1)) + 0.5 * float(np.log(X.shape[1]))
