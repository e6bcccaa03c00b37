"""How long people wait: `python -m benchmarks.first_fit [CASE …]`, each case in a process of its own.

`HypergradientSearchCV` on n = 300, p = 64 with 5 folds, compilation included (imports are not): one shared penalty, and
one for each feature with shrinkage="auto". Seconds on the clock, and of all threads on the processor, which say more on
a busy machine. The lasso with p = 7000, compilation included. An elastic net on diabetes against scikit-learn's
`ElasticNetCV` on a grid of 10 x 100, without compilation.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import warnings
from typing import Any

import numpy as np

from . import one_of


def _data(name: str):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 64)) * np.exp(0.3 * rng.normal(size=64))
    b = X[:, :8] @ rng.normal(size=8) + 2 * rng.normal(size=300)
    labels = (b + rng.normal(size=300) > 0).astype(int)
    return X, {"logistic": labels, "poisson": rng.poisson(np.exp(b / (5 * b.std())))}.get(name, b)


def search(name: str, kind: str) -> None:
    """A fit, and the same again."""
    import sklearn.linear_model as sk
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from problems.tuning import HypergradientSearchCV

    estimators = {
        "ridge": sk.Ridge(),
        "logistic": sk.LogisticRegression(max_iter=1000),
        "lasso": sk.Lasso(),
        "elastic-net": sk.ElasticNet(),
        "poisson": sk.PoissonRegressor(max_iter=1000),
    }
    X, y = _data(name)
    options = {} if kind == "shared" else {"penalties": "per-feature", "random_state": 0}
    estimator = make_pipeline(StandardScaler(), estimators[name])
    seconds = []
    for _ in range(2):
        begin, busy = time.perf_counter(), time.process_time()
        HypergradientSearchCV(estimator, **options).fit(X, y)
        seconds += [time.perf_counter() - begin, time.process_time() - busy]
    first, first_cpu, again, again_cpu = seconds
    print(
        f"{name + ', ' + kind:28s}first fit {first:6.2f} s ({first_cpu:.2f} s of processor), the same again "
        f"{again:6.2f} s ({again_cpu:.2f} s)",
        flush=True,
    )


def wide() -> None:
    """The lasso with 7000 features."""
    import jax
    import sklearn.linear_model  # noqa: F401  imports are not timed: coordinate descent is scikit-learn's

    import bilevel
    from problems.tuning import LassoTuning

    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(2)
    X = rng.normal(size=(200, 7000))
    y = X[:, :10] @ rng.normal(size=10) + rng.normal(size=200)
    begin, busy = time.perf_counter(), time.process_time()
    problem = LassoTuning(X[:150], y[:150], X[150:], y[150:])
    found = bilevel.minimize(problem, *problem.initial(), bounds=(-6.0, 2.0), tol=1e-4)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - busy
    weights = int((found.y != 0).sum())
    print(
        f"{'lasso, p = 7000':28s}first fit {seconds:6.2f} s ({cpu:.2f} s of processor), {weights} weights", flush=True
    )


def elastic_net() -> None:
    """Second fit against a grid."""
    import jax
    import sklearn.linear_model as sk
    from sklearn.datasets import load_diabetes
    from sklearn.model_selection import KFold

    import bilevel
    from problems.tuning import ElasticNetTuning

    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("ignore")
    X, y = map(np.asarray, load_diabetes(return_X_y=True))
    X, y = X / X.std(axis=0), y - y.mean()
    folds = list(KFold(5, shuffle=True, random_state=0).split(X))
    problem = ElasticNetTuning(X, y, cv=folds)
    ratios: Any = np.linspace(0.1, 1, 10)
    ours, theirs = [], []
    for _ in range(4):
        begin = time.perf_counter()
        found = bilevel.minimize(problem, *problem.initial(), bounds=(-10.0, 5.0), tol=1e-4)
        ours.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        grid = sk.ElasticNetCV(cv=folds, fit_intercept=False, alphas=100, l1_ratio=ratios).fit(X, y)
        theirs.append(time.perf_counter() - begin)
    best = grid.mse_path_.mean(axis=-1).min()
    print(
        f"{'elastic net, diabetes':28s}later fits {np.median(ours[1:]):6.3f} s, criterion {2 * found.value:.2f}; "
        f"ElasticNetCV {np.median(theirs[1:]):6.3f} s, {best:.2f}",
        flush=True,
    )


CASES = {
    f"{name}-{kind}": (lambda name=name, kind=kind: search(name, kind))
    for kind in ("shared", "auto")
    for name in ("ridge", "logistic", "poisson", "lasso")
}
CASES |= {"elastic-net-shared": lambda: search("elastic-net", "shared"), "wide": wide, "elastic-net-grid": elastic_net}


def main() -> None:
    """Prints a line a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "cases", nargs="*", type=one_of(CASES), metavar="CASE", help=f"of {', '.join(CASES)}; by default all"
    )
    parser.add_argument("--here", action="store_true", help="in this process")
    arguments = parser.parse_args()
    for name in arguments.cases or CASES:
        if arguments.here:
            CASES[name]()
        else:
            subprocess.run([sys.executable, "-m", "benchmarks.first_fit", "--here", name], check=True)


if __name__ == "__main__":
    main()
