"""Do own penalties help on new data? `python -m benchmarks.honesty [CASE …] [--splits 10]`.

`HypergradientSearchCV` with its defaults, one shared penalty against own ones (one a feature, or one a group), on
several splits of each data set. A line gives the medians of the test losses (log loss), the median and the worst change
of the test loss on the same split, and how often one shared penalty was kept.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from problems.tuning import HypergradientSearchCV

from . import one_of


class Data(NamedTuple):
    """Rows to train on and to test on, and what is tuned besides one shared penalty."""

    X: np.ndarray
    y: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray
    options: dict


EACH: dict[str, Any] = {"penalties": "per-feature"}


def _split(X: Any, y: Any, seed: int, size: float | int, options: dict) -> Data:
    X, X_test, y, y_test = map(np.asarray, train_test_split(X, y, train_size=size, random_state=seed, stratify=y))
    return Data(X, y, X_test, y_test, options)


def _cancer() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_breast_cancer(return_X_y=True)
    return np.asarray(X), np.asarray(y)


def _useless(seed: int) -> Data:
    """Three copies of all features, each column permuted on its own, in a group of their own."""
    X, y = _cancer()
    rng = np.random.default_rng(seed)
    noise = np.column_stack([rng.permutation(column) for column in np.hstack([X, X, X]).T])
    groups = np.repeat([0, 1], [X.shape[1], noise.shape[1]])
    return _split(np.hstack([X, noise]), y, seed, 0.5, {"groups": groups})


def _digits(one: int, other: int) -> Callable[[int], Data]:
    def make(seed: int) -> Data:
        X, y = map(np.asarray, load_digits(return_X_y=True))
        keep = (y == one) | (y == other)
        return _split(X[keep], y[keep], seed, 180, EACH)

    return make


def _sparse(n: int) -> Callable[[int], Data]:
    """Five features of thirty matter."""

    def make(seed: int) -> Data:
        rng = np.random.default_rng(seed)
        X = rng.normal(size=(n + 2000, 30))
        weights = np.zeros(30)
        weights[:5] = rng.normal(size=5)
        y = (rng.random(len(X)) < 1 / (1 + np.exp(-X @ weights))).astype(int)
        return Data(X[:n], y[:n], X[n:], y[n:], EACH)

    return make


CASES: dict[str, Callable[[int], Data]] = {
    "breast-cancer": lambda seed: _split(*_cancer(), seed, 0.5, EACH),
    "breast-cancer-groups": lambda seed: _split(*_cancer(), seed, 0.5, {"groups": np.repeat([0, 1, 2], 10)}),
    "useless": _useless,
    "digits-4-9": _digits(4, 9),
    "digits-3-8": _digits(3, 8),
    "sparse-240": _sparse(240),
    "sparse-1000": _sparse(1000),
}


def losses(data: Data, options: dict) -> tuple[float, float]:
    """The test loss of the search with these options, and the shrinkage it chose."""
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    search = HypergradientSearchCV(pipeline, random_state=0, **options).fit(data.X, data.y)
    return float(log_loss(data.y_test, search.predict_proba(data.X_test))), float(search.shrinkage_)


def main() -> None:
    """Prints a line a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "cases", nargs="*", type=one_of(CASES), metavar="CASE", help=f"of {', '.join(CASES)}; by default all"
    )
    parser.add_argument("--splits", type=int, default=10)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{'case':22s}{'shared':>9s}{'own':>9s}{'median':>9s}{'worst':>9s}{'kept shared':>13s}{'seconds':>9s}")
    for name in arguments.cases or CASES:
        begin = time.perf_counter()
        rows = []
        for seed in range(arguments.splits):
            data = CASES[name](seed)
            shared, _ = losses(data, {})
            own, strength = losses(data, data.options)
            rows.append((shared, own, own / shared - 1, np.isinf(strength)))
        shared, own, change, kept = (np.array(column) for column in zip(*rows, strict=True))
        print(
            f"{name:22s}{np.median(shared):9.4f}{np.median(own):9.4f}{np.median(change):+9.1%}{change.max():+9.1%}"
            f"{kept.sum():>10d}/{len(rows)}{time.perf_counter() - begin:9.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
