"""
Own penalties, and a pull towards one
=====================================

A penalty for each feature can express which features matter, and can fit the folds instead of the truth. Here the truth
is sparse: five features of thirty count. In the second experiment thirty measurements of a tumour come with ninety
useless columns in a group of their own. In both, `HypergradientSearchCV` tunes one shared penalty, own ones without any
restraint, and own ones that are pulled towards the shared one as strongly as nested cross-validation says.
"""

import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, mean_squared_error
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from problems.tuning import HypergradientSearchCV

SPLITS = 2


def sparse_truth(seed):
    """240 rows to train on, 2000 to test."""
    rng = np.random.default_rng(seed)
    truth = np.zeros(30)
    truth[:5] = 2 * rng.normal(size=5)
    X = rng.normal(size=(2240, 30))
    return X[:240], X[240:], *np.split(X @ truth + 3 * rng.normal(size=2240), [240])


def useless_features(seed):
    """Breast cancer with ninety permuted columns."""
    rng = np.random.default_rng(seed)
    X, labels = load_breast_cancer(return_X_y=True)
    X = np.hstack([X, *(rng.permuted(X, axis=0) for _ in range(3))])
    return train_test_split(X, labels, test_size=0.25, random_state=seed, stratify=labels)


ridge = make_pipeline(StandardScaler(), Ridge())
logistic = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
two_groups = {"groups": np.repeat([0, 1], [30, 90])}
experiments = {
    "sparse truth": (ridge, sparse_truth, {"penalties": "per-feature"}),
    "useless features": (logistic, useless_features, two_groups),
}
kinds = {"shared": None, "own, free": 0, "own, pulled": "auto"}

# %%

ratios = {}
for name, (estimator, make, own) in experiments.items():
    rows = []
    for seed in range(SPLITS):
        X, X_test, y, y_test = make(seed)
        losses = {}
        for kind, shrinkage in kinds.items():
            options = {} if shrinkage is None else {**own, "shrinkage": shrinkage, "random_state": 0}
            begin = time.perf_counter()
            search = HypergradientSearchCV(estimator, **options).fit(X, y)
            seconds = time.perf_counter() - begin
            if estimator is ridge:
                losses[kind] = mean_squared_error(y_test, search.predict(X_test))
            else:
                losses[kind] = log_loss(y_test, search.predict_proba(X_test))
            print(
                f"{name}, split {seed}, {kind:<12} validation {-search.best_score_:8.4f}   test {losses[kind]:8.4f}   "
                f"strength {search.shrinkage_:<5} {seconds:5.1f} s"
            )
        rows.append([losses[kind] / losses["shared"] for kind in kinds])
    ratios[name] = np.array(rows)
    print(f"{name}: test loss against shared, median: " + ", ".join(
        f"{kind} {value:.3f}" for kind, value in zip(kinds, np.median(rows, axis=0), strict=True)
    ))  # fmt: skip

# %%
# The picture: test losses relative to one shared penalty; below one is better.

figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
for axis, (name, values) in zip(axes, ratios.items(), strict=True):
    axis.axhline(1, color="gray", lw=1)
    axis.plot(np.arange(3), values.T, "o-", alpha=0.6)
    axis.set(title=name, xticks=range(3), xticklabels=kinds, ylabel="test loss / that of one shared penalty")

picture = Path("build", "own_penalties.png").absolute()
picture.parent.mkdir(exist_ok=True)
figure.savefig(picture, dpi=120)
print(f"The picture: {picture}")
