"""scikit-learn's coordinate descent as the solver of large lassos and elastic nets."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.solvers._base import AbstractSolver, Found
from bilevel.solvers.host import on_host

from ._criteria import CrossValidation


@functools.cache
def available() -> bool:
    """Whether scikit-learn is installed."""
    return importlib.util.find_spec("sklearn") is not None


class CoordinateDescent(AbstractSolver):
    """One `ElasticNet` fit a fold, on the host, warm-started: a black box, whose accuracy is seen in the residual.

    Weights of |w_j| that differ are scalings of the columns, weights of w_j^2 / 2 that differ are further rows.
    """

    def find(self, inner, x, y0, *, tol, max_steps):
        criterion = inner.criterion
        one, two = inner.weights(x)
        shape = jax.ShapeDtypeStruct(y0.shape, y0.dtype)
        rows = criterion.train if isinstance(criterion, CrossValidation) else None
        arguments = (criterion.X, criterion.targets, rows, one, two, y0, tol)
        y, steps = on_host(_fit, (shape, jax.ShapeDtypeStruct((), jnp.int32)), *arguments)
        return Found(y, steps, steps)


def _fit(X, targets, rows, one, two, y0, tol):
    """All folds; `rows` are the weights of the rows of each, or None where there are no folds."""
    X, targets, one, two, y0 = (np.asarray(a) for a in (X, targets, one, two, y0))
    lead = rows is None
    n = targets.shape[-1]
    rows = np.full((1, n), 1 / n, X.dtype) if rows is None else np.asarray(rows)
    starts = y0[None] if lead else y0
    steps, found = 0, np.empty_like(starts)
    p = X.shape[-1]
    one, two = (np.broadcast_to(a, (p,)).astype(np.float64) for a in (one, two))
    for k, weight in enumerate(rows):
        mine = X[k] if X.ndim == 3 else X
        wanted = targets[k] if targets.ndim == 2 else targets
        found[k], did = _one(mine, wanted, weight, one, two, starts[k], float(tol) / np.sqrt(len(rows)))
        steps += did
    return found[0] if lead else found, np.asarray(steps, np.int32)


def _one(X, targets, weight, one, two, start, tol):
    from sklearn import config_context
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import ElasticNet

    keep = weight > 0
    root = np.sqrt(weight[keep] * keep.sum())
    A = np.asarray(X[keep], np.float64)
    b = np.asarray(targets[keep], np.float64)
    if not np.allclose(root, 1):
        A, b = A * root[:, None], b * root
    n = len(b)
    scale = one / one.max() if one.max() > 0 else np.ones_like(one)
    alike = np.all(scale == 1)
    scale = np.maximum(scale, 1e-12)
    A = A if alike else A / scale
    quadratic = two / scale**2
    l2 = quadratic.min()
    rest = quadratic - l2
    if np.any(rest > 1e-12 * quadratic.max()):
        A, b = np.vstack([A, np.diag(np.sqrt(n * rest))]), np.concatenate([b, np.zeros(len(rest))])
        # the mean is over more rows now
        factor = n / len(b)
    else:
        factor = 1.0
    l1 = one.max() * factor
    l2 = l2 * factor
    model = ElasticNet(
        alpha=l1 + l2, l1_ratio=l1 / (l1 + l2), fit_intercept=False, warm_start=True, max_iter=5000,
        tol=min(1e-4, max(1e-14, (tol / max(np.linalg.norm(A.T @ b) / n, 1e-300)) ** 2)),
    )  # fmt: skip
    model.coef_ = np.asarray(start * scale, np.float64)
    # the checks of the data take longer than a fit of few: ours are
    with warnings.catch_warnings(), config_context(assume_finite=True, skip_parameter_validation=True):
        warnings.simplefilter("ignore", ConvergenceWarning)  # what is left is seen in the residual
        model.fit(np.asfortranarray(A), b, check_input=False)
    return (model.coef_ / scale).astype(start.dtype), int(np.max(model.n_iter_))
