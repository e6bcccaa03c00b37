"""Which rows each fold trains on and validates on."""

from __future__ import annotations

from typing import Any

import numpy as np

SEED = 0
"""Of the shuffle behind `cv=K`: fixed, so that the criterion is one function of the penalties."""


def folds(owner: str, cv: Any, X: Any, y: Any, *, stratified: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """The (training, validation) row indices of each fold; of n = len(y) rows.

    `cv=K` shuffles the rows once and cuts them as scikit-learn's `KFold(K, shuffle=True, random_state=0)` does, or,
    `stratified`, as its `StratifiedKFold`: every fold has the class frequencies of y up to rounding. Otherwise `cv`
    is "loo" (each row is a fold), a sequence of such pairs, or an object with scikit-learn's `split(X, y)`.

    Raises ValueError for a K outside [2, n] (stratified: outside [2, size of the smallest class]) and for pairs that
    are empty, out of range, or validate on a row they train on; TypeError for anything that is neither.
    """
    n = len(y)
    if isinstance(cv, str) and cv == "loo":
        return _pairs(np.arange(n), n)
    if isinstance(cv, (int, np.integer)) and not isinstance(cv, bool):
        return _pairs(_assign(owner, int(cv), y, stratified), int(cv))
    split = None if isinstance(cv, (str, bytes)) else getattr(cv, "split", None)
    cv = cv if split is None else split(X, y)
    if isinstance(cv, (str, bytes)) or not hasattr(cv, "__iter__"):
        raise TypeError(
            f"{owner}: `cv` must be a number of folds, a sequence of (training, validation) index pairs or an object "
            f"with a method split(X, y), found {cv!r}."
        )
    pairs = list(cv)
    if not pairs:
        raise ValueError(f"{owner}: `cv` has no folds.")
    return [_pair(owner, k, pair, n) for k, pair in enumerate(pairs)]


def _assign(owner: str, count: int, y: Any, stratified: bool) -> np.ndarray:
    """The fold in which each row is validated, shape (n,)."""
    n = len(y)
    labels, classes = np.unique(np.asarray(y), return_inverse=True) if stratified else (None, np.zeros(n, int))
    most = int(np.bincount(classes).min())
    if not 2 <= count <= most:
        what = f"the {most} rows of the smallest class" if labels is not None else f"the {n} rows"
        raise ValueError(f"{owner}: `cv` must be at least 2 and at most {what}, found {count}.")
    rng = np.random.RandomState(SEED)  # scikit-learn's generator, so that its folds are these
    if labels is None:
        order = np.arange(n)
        rng.shuffle(order)
        sizes = np.full(count, n // count)
        sizes[: n % count] += 1
        fold = np.empty(n, int)
        fold[order] = np.repeat(np.arange(count), sizes)
        return fold
    # Classes are taken in the order in which they first appear. Sorted by class and dealt out like cards, the rows
    # give each fold its share of every class; which rows of a class go where is the shuffle's.
    first = np.argsort([np.argmax(classes == c) for c in range(len(labels))])
    ranks = np.argsort(first)[classes]
    dealt = np.sort(ranks)
    fold = np.empty(n, int)
    for rank in range(len(labels)):
        share = [np.sum(dealt[k::count] == rank) for k in range(count)]
        own = np.repeat(np.arange(count), share)
        rng.shuffle(own)
        fold[ranks == rank] = own
    return fold


def _pairs(fold: np.ndarray, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(count)]


def _pair(owner: str, k: int, pair: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        train, validation = pair
    except (TypeError, ValueError) as error:
        raise ValueError(f"{owner}: `cv`, fold {k}: expected a pair (training, validation) of indices.") from error
    rows = []
    for part, given in (("training", train), ("validation", validation)):
        where = f"{owner}: `cv`, fold {k}, {part} rows"
        indices = np.asarray(given)
        if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
            raise ValueError(f"{where}: expected integers, found shape {indices.shape}, dtype {indices.dtype}.")
        if indices.size == 0:
            raise ValueError(f"{where}: there are none.")
        if indices.min() < 0 or indices.max() >= n:
            raise ValueError(f"{where}: must lie in [0, {n}), found {indices.min()} to {indices.max()}.")
        rows.append(indices)
    both = np.intersect1d(*rows)
    if both.size:
        raise ValueError(f"{owner}: `cv`, fold {k}: {both.size} rows are in both parts, the first is {both[0]}.")
    return rows[0], rows[1]
