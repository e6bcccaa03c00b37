"""Folds as the search needs them: what each fold's pipeline makes of all rows, and which rows count where."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from sklearn.base import clone
from sklearn.pipeline import Pipeline
from sklearn.utils import _safe_indexing


class Folds(NamedTuple):
    """`X` (K, n, p): all rows as the pipeline fitted on fold k's training rows transforms them. `train`, `judge`, both
    (K, n): the weight of each row in the sum of losses that fold k is trained on, and in the mean it is judged by."""

    X: np.ndarray
    train: np.ndarray
    judge: np.ndarray


def final_step(estimator: Any) -> tuple[Any, Any, str]:
    """(what comes before, the last step, the prefix of its parameters)."""
    if not isinstance(estimator, Pipeline):
        return None, estimator, ""
    before = estimator[:-1] if len(estimator.steps) > 1 else None
    return before, estimator.steps[-1][1], f"{estimator.steps[-1][0]}__"


def fold_data(before: Any, X: Any, y: np.ndarray, pairs: list, sample_weight: np.ndarray | None) -> Folds:
    """The folds of (training, validation) row indices; rows in neither part of a fold have no weight in it."""
    n = len(y)
    own = np.ones(n) if sample_weight is None else sample_weight
    transformed, train, judge = [], np.zeros((len(pairs), n)), np.zeros((len(pairs), n))
    for k, (rows, held_out) in enumerate(pairs):
        transformed.append(transform(before, X, y, rows))
        train[k, rows] = own[rows]
        mass = own[held_out].sum()
        judge[k, held_out] = own[held_out] / (mass if mass > 0 else 1)
    return Folds(np.stack(transformed), train, judge)


def transform(before: Any, X: Any, y: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """All rows, by the steps fitted on some of them."""
    if before is None:
        return np.asarray(X, float)
    fresh: Any = clone(before)
    fitted = fresh.fit(_safe_indexing(X, rows), _safe_indexing(y, rows))
    made = fitted.transform(X)
    return np.asarray(made.toarray() if hasattr(made, "toarray") else made, float)
