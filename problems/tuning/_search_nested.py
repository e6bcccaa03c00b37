"""How strongly own penalties are pulled towards the shared one: nested cross-validation."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from sklearn.model_selection import KFold, StratifiedKFold, check_cv
from sklearn.utils import _safe_indexing

import bilevel

from ._search_folds import final_step, fold_data
from ._search_loop import Search

STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01)
"""What "auto" tries besides infinity, in units of the criterion at the shared optimum."""

ROUGH = 5e-2
"""Tolerance of searches for own penalties where "auto" chooses how strong their pull is: what the last half percent of
the criterion is worth on other rows, five splits cannot tell."""


def choose_strength(nested: Nested, near: np.ndarray, random_state: Any) -> tuple[float, dict[float, list[float]]]:
    """The largest strength whose mean test loss over the nested splits is within one standard error of the best's, the
    error being that of the paired differences; infinity is one of them. Splits are searched side by side, in threads:
    all run the same compiled program, and most of the time is spent in it. Not so where it calls the host back."""

    def one(split: tuple[np.ndarray, np.ndarray]) -> list[float] | None:
        train, test = split
        with jax.enable_x64(True):  # a setting of the thread
            search = nested.inner(train)
            if search is None:
                return None
            shared = search.shared(near)
            found, point = [nested.loss(search, shared.x, train, test)], shared
            for strength in STRENGTHS:
                with contextlib.suppress(bilevel.NotConverged):  # then the point of the strength before stands for it
                    point = search.own(shared, strength, point)
                found.append(nested.loss(search, point.x, train, test))
            return found

    splits = nested.splits(random_state)
    threads = min(len(splits), os.cpu_count() or 1) if nested.on_device else 1
    with ThreadPoolExecutor(max(1, threads)) as pool:
        rows = [row for row in pool.map(one, splits) if row is not None]
    losses = {strength: [row[k] for row in rows] for k, strength in enumerate((np.inf, *STRENGTHS))}
    if len(rows) < 2:
        return np.inf, losses
    table = {s: np.array(v) for s, v in losses.items()}
    best = min(table, key=lambda s: table[s].mean())
    for strength in table:  # from the largest
        gap = table[strength] - table[best]
        if gap.mean() <= gap.std(ddof=1) / np.sqrt(len(gap)):
            return strength, losses
    return best, losses


class Nested:
    """What `choose_strength` asks: outer splits, the search within one, and the loss on what it leaves out."""

    def __init__(self, search: Any, family, before, rows, y, targets, weights, own, classifier, unit):
        self.search, self.family, self.before, self.rows, self.y = search, family, before, rows, y
        self.targets, self.weights, self.own, self.classifier, self.unit = targets, weights, own, classifier, unit

    @property
    def on_device(self) -> bool:
        """Whether no inner solver is a function on the host, as that of large lassos is."""
        return self.family.name not in ("Lasso", "ElasticNet")

    def splits(self, random_state: Any) -> list:
        """The outer splits: five, shuffled (stratified for classifiers), or as many as the smallest class allows."""
        if not self.classifier:
            return list(KFold(min(5, len(self.y)), shuffle=True, random_state=random_state).split(self.targets))
        count = min(5, int(np.unique(self.y, return_counts=True)[1].min()))
        if count < 2:
            return []
        folds = StratifiedKFold(count, shuffle=True, random_state=random_state)
        return list(folds.split(self.targets, self.y))

    def inner(self, rows: np.ndarray) -> Search | None:
        """The search on the training rows of an outer split, or None where folds would lack a class."""
        own_splits = self.search.cv if not hasattr(self.search.cv, "__iter__") else self.search.n_splits_
        labels = self.y[rows]
        try:
            splitter: Any = check_cv(own_splits, labels, classifier=self.classifier)
            pairs = list(splitter.split(rows, labels))
        except ValueError:
            return None
        if len(pairs) != self.search.n_splits_:
            return None
        if self.classifier and any(len(np.unique(labels[a])) < len(np.unique(self.y)) for a, _ in pairs):
            return None
        pairs = [(rows[a], rows[b]) for a, b in pairs]
        folds = fold_data(self.before, self.rows, self.y, pairs, self.weights)
        setup = self.family.setup(folds, self.targets, self.own)
        return Search(setup, min(40, self.search.n_iter), max(ROUGH, self.search.tol), 0, self.unit)

    def loss(self, search: Search, x: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
        """Minus the score on the test rows of the estimator at x, fitted on the training rows."""
        model = self.search._final(self.family, search, x, self.own, False)
        options = {}
        if self.weights is not None:
            options = {f"{final_step(self.search.estimator)[2]}sample_weight": self.weights[train]}
        model.fit(_safe_indexing(self.rows, train), self.y[train], **options)
        judged = {} if self.weights is None else {"sample_weight": self.weights[test]}
        return -float(self.search.scorer_(model, _safe_indexing(self.rows, test), self.y[test], **judged))
