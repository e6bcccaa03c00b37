"""Penalized B-splines: a basis for each feature, and the roughness of what it spans."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.interpolate import BSpline

DEGREE = 3


class Basis(NamedTuple):
    """Cubic B-splines of every feature, equidistant knots on [low_j, high_j], centred: the columns of `keep_j` span the
    combinations whose mean over the training rows is zero. Shapes (d,), (d,), (d, splines, splines - 1)."""

    low: np.ndarray
    high: np.ndarray
    keep: np.ndarray

    def columns(self, j: int, values: np.ndarray) -> np.ndarray:
        """The basis of feature j, shape (m, splines - 1); constant outside the range of the training rows."""
        return _splines(values, self.low[j], self.high[j], self.keep.shape[1]) @ self.keep[j]

    def design(self, X: np.ndarray) -> np.ndarray:
        """A column of ones, then the bases of all features, shape (m, 1 + d (splines - 1))."""
        return np.hstack([np.ones((len(X), 1)), *(self.columns(j, X[:, j]) for j in range(X.shape[1]))])

    def roughness(self) -> np.ndarray:
        """S_j of |second differences of the coefficients|^2, shape (d, splines - 1, splines - 1)."""
        second = np.diff(np.eye(self.keep.shape[1]), 2, axis=0) @ self.keep
        return np.swapaxes(second, 1, 2) @ second


def basis(owner: str, X: np.ndarray, splines: int) -> Basis:
    """The basis for the rows X (n, d); ValueError where a feature is constant."""
    low, high = X.min(0), X.max(0)
    flat = np.flatnonzero(~(high > low))
    if flat.size:
        j = flat[0]
        raise ValueError(f"{owner}: feature {j} of `X` is constant ({low[j]:g}); leave it out.")
    keep = []
    for j in range(X.shape[1]):
        mean = _splines(X[:, j], low[j], high[j], splines).mean(0)
        keep.append(np.linalg.qr(np.column_stack([mean, np.eye(splines)[:, 1:]]))[0][:, 1:])
    return Basis(low, high, np.stack(keep))


def _splines(values: Any, low: float, high: float, splines: int) -> np.ndarray:
    step = (high - low) / (splines - DEGREE)
    knots = low + step * np.arange(-DEGREE, splines + 1)
    inside = np.clip(np.asarray(values, float), low, high - 1e-9 * (high - low))
    return BSpline.design_matrix(inside, knots, DEGREE, extrapolate=True).toarray()
