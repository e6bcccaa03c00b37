"""Small cases of every tuning problem, for the contract that `pytest --problems=problems.tuning` runs."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from .logistic import LogisticTuning
from .ridge import RidgeTuning


def _data(key: jax.Array, rows: int = 24, columns: int = 4):
    first, second, third = jax.random.split(key, 3)
    X = jax.random.normal(first, (rows, columns))
    score = X @ jax.random.normal(second, (columns,)) + jax.random.normal(third, (rows,))
    return X, score


def _ridge_held_out(key):
    X, y = _data(key)
    problem = RidgeTuning(X[:16], y[:16], X[16:], y[16:])
    return problem, *problem.initial()


def _ridge_folds(key):
    X, y = _data(key)
    problem = RidgeTuning(X, y, cv=3, penalties="shared")
    return problem, *problem.initial()


def _logistic_groups(key):
    X, score = _data(key)
    labels = jnp.where(score > jnp.median(score), 1, -1)
    problem = LogisticTuning(X, labels, cv=2, groups=[0, 0, 1, 1])
    return problem, *problem.initial()


def examples() -> dict[str, Callable]:
    """A dict from a name to a function `key -> (problem, x, y0)`."""
    return {
        "ridge, held out": _ridge_held_out,
        "ridge, folds, shared": _ridge_folds,
        "logistic, folds, groups": _logistic_groups,
    }
