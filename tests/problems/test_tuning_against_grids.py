"""Penalties found by descent against the best of a grid on the same criterion."""

from typing import Any

import numpy as np
import pytest
import scipy.optimize
import sklearn.linear_model as sk
from sklearn.datasets import load_diabetes
from sklearn.model_selection import KFold

import bilevel
from problems.tuning import ElasticNetTuning, HypergradientSearchCV, LassoTuning

RNG = np.random.default_rng(2)


def diabetes():
    X, y = map(np.asarray, load_diabetes(return_X_y=True))
    X = X / X.std(axis=0)
    return X, y - y.mean()


FOLDS = list(KFold(5, shuffle=True, random_state=0).split(np.zeros(442)))


@pytest.mark.slow
def test_the_lasso_is_within_a_fifth_of_a_percent_of_a_grid_of_a_hundred():
    X, y = diabetes()
    problem = LassoTuning(X, y, cv=FOLDS)
    found = bilevel.minimize(problem, *problem.initial(), bounds=(-8.0, 5.0))
    options = {"cv": FOLDS, "fit_intercept": False, "tol": 1e-8}
    grid = sk.LassoCV(**options, alphas=100).fit(X, y)
    sizes = np.array([len(b) for _, b in FOLDS])
    assert np.ptp(sizes) <= 1  # so that means of folds are means of rows, nearly
    assert 2 * found.value <= 1.002 * grid.mse_path_.mean(axis=1).min()


@pytest.mark.slow
def test_the_elastic_net_is_within_half_a_percent_of_ten_grids():
    X, y = diabetes()
    problem = ElasticNetTuning(X, y, cv=FOLDS)
    found = bilevel.minimize(problem, *problem.initial(), bounds=(-10.0, 5.0), tol=1e-4)
    options: Any = {"cv": FOLDS, "fit_intercept": False, "max_iter": 10000, "l1_ratio": np.linspace(0.1, 1, 10)}
    grid = sk.ElasticNetCV(**options, alphas=100).fit(X, y)
    assert 2 * found.value <= 1.005 * grid.mse_path_.mean(axis=-1).min()


@pytest.mark.slow
def test_an_elastic_net_that_wants_no_l2_penalty_stops_there_and_says_a_ratio_of_one():
    X = RNG.normal(size=(60, 12))
    y = X[:, 0] * 3 + 0.3 * RNG.normal(size=60)
    search = HypergradientSearchCV(sk.ElasticNet()).fit(X, y)
    assert search.best_params_["l1_ratio"] == 1.0
    lasso = HypergradientSearchCV(sk.Lasso()).fit(X, y)
    np.testing.assert_allclose(search.best_score_, lasso.best_score_, rtol=5e-3)


@pytest.mark.slow
def test_own_penalties_of_a_lasso_end_where_the_criterion_is_flat():
    X = RNG.normal(size=(60, 6))
    y = X @ [2.0, 1.0, 0.0, 0.0, 0.0, 0.0] + RNG.normal(size=60)
    search = HypergradientSearchCV(sk.Lasso(), penalties="per-feature", shrinkage=0).fit(X, y)
    values = [step["value"] for step in search.hypergradient_history_]
    assert values[-1] < values[0]
    assert len(values) < 60  # of 100 allowed: |gradient| never falls below the tolerance


@pytest.mark.slow
def test_without_shrinkage_it_is_the_criterions_own_optimum():
    n, p = 60, 4
    X = RNG.normal(size=(n, p))
    y = X @ [1.0, -0.3, 0.0, 1.0] + RNG.normal(size=n)
    search = HypergradientSearchCV(sk.Ridge(fit_intercept=False), penalties="per-feature", shrinkage=0).fit(X, y)

    def criterion(log_alphas):
        errors = []
        for train, test in KFold(5).split(X):
            A, b = X[train], y[train]
            weights = np.linalg.solve(A.T @ A + np.diag(np.exp(log_alphas)), A.T @ b)
            errors.append(np.mean((X[test] @ weights - y[test]) ** 2))
        return np.mean(errors)

    starts = RNG.uniform(-5, 8, (20, p))
    bounds = [(-3.0, 9.0)] * p  # about what the search allows itself
    best = min(scipy.optimize.minimize(criterion, s, method="L-BFGS-B", bounds=bounds).fun for s in starts)
    assert -search.best_score_ <= 1.02 * best
