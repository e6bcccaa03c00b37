"""The search does not depend on units, and says where it could not go on."""

from typing import Any, cast

import numpy as np
import pytest
import sklearn.linear_model as sk
from sklearn.datasets import load_breast_cancer
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC

from problems.tuning import HypergradientSearchCV

RNG = np.random.default_rng(12)
N = 50
X = RNG.normal(size=(N, 4)) * [1.0, 0.5, 2.0, 1.0]
Y = X @ np.array([1.0, -0.5, 0.0, 0.3]) + 2 * RNG.normal(size=N)
COUNTS = RNG.poisson(np.exp(0.3 * X[:, 0]))
LABELS = (Y > 0).astype(int)


@pytest.mark.long
@pytest.mark.parametrize(
    ("estimator", "y", "power"),
    [
        (sk.Ridge(), Y, 0),
        (sk.Lasso(tol=1e-8), Y, 1),
        (sk.HuberRegressor(max_iter=1000, tol=1e-8), Y, -1),
        (sk.PoissonRegressor(solver="newton-cholesky", tol=1e-8), COUNTS, 1),
    ],
)
def test_targets_in_other_units_have_the_same_penalties_but_for_units(estimator, y, power):
    found = [HypergradientSearchCV(estimator, cv=3).fit(X, unit * y) for unit in (1.0, 1e-3)]
    alphas = [search.best_params_["alpha"] for search in found]
    # a Poisson model cannot be trained in other units, and so ends a little elsewhere
    rtol = 2e-3 if isinstance(estimator, sk.PoissonRegressor) else 1e-5
    np.testing.assert_allclose(alphas[1], alphas[0] * 1e-3**power, rtol=rtol)
    steps = [len(search.hypergradient_history_) for search in found]
    assert steps[0] == steps[1]


@pytest.mark.long
def test_own_penalties_do_not_depend_on_the_targets_units():
    options = {"cv": 3, "penalties": "per-feature", "shrinkage": 0.05}
    found = [HypergradientSearchCV(sk.Ridge(), **options).fit(X, unit * Y).best_params_["alpha"] for unit in (1, 1e-4)]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    assert np.ptp(np.log(found[0])) > 0.1


@pytest.mark.long
@pytest.mark.parametrize("kind", [sk.Lasso, sk.ElasticNet])
def test_features_in_units_of_their_own(kind):
    """The largest feature says when all weights are zero, the smallest wants a penalty thousands of times smaller."""
    features = np.concatenate([X, 1e4 * RNG.normal(size=(N, 1))], axis=1)
    target = 3 * X[:, 0] + 0.3 * RNG.normal(size=N)
    found = HypergradientSearchCV(kind(tol=1e-8), cv=3).fit(features, target)
    grid = {"alpha": np.geomspace(1e-3, 1e3, 60)}
    best = GridSearchCV(sk.Lasso(tol=1e-8), grid, cv=3, scoring="neg_mean_squared_error").fit(features, target)
    assert found.best_score_ >= 1.002 * best.best_score_


@pytest.mark.long
def test_huber_regression_with_outliers_a_hundred_times_as_large():
    y = Y.copy()
    y[::10] = 300.0
    found = HypergradientSearchCV(sk.HuberRegressor(max_iter=1000), cv=3).fit(X, y)
    grid = {"alpha": np.geomspace(1e-6, 1e4, 40)}
    best = GridSearchCV(sk.HuberRegressor(max_iter=1000), grid, cv=3, scoring="neg_mean_squared_error").fit(X, y)
    assert found.best_score_ >= 1.001 * best.best_score_


def test_the_poisson_criterion_is_the_deviance():
    search = HypergradientSearchCV(
        sk.PoissonRegressor(solver="newton-cholesky", tol=1e-8), cv=3, scoring="neg_mean_poisson_deviance"
    ).fit(X, COUNTS)
    np.testing.assert_allclose(search.hypergradient_history_[-1]["value"], -search.best_score_, rtol=1e-6)


@pytest.mark.long
def test_a_criterion_that_falls_beyond_a_bound_is_said_to():
    data, labels = (a[np.random.RandomState(0).permutation(569)[:150]] for a in load_breast_cancer(return_X_y=True))
    with pytest.warns(ConvergenceWarning, match="ended at a bound .*, beyond which the criterion still falls, by .*%"):
        HypergradientSearchCV(make_pipeline(StandardScaler(), SVC())).fit(data, labels)


def test_an_estimator_that_does_not_converge_is_noticed():
    with pytest.warns(ConvergenceWarning) as seen:
        HypergradientSearchCV(sk.PoissonRegressor(tol=1e6), cv=3).fit(X, COUNTS * (1 + 9 * (X[:, 0] > 0)))
    assert any("does the estimator converge" in str(one.message) for one in seen)


def test_liblinear_penalizes_the_intercept_and_so_does_the_criterion():
    rows = np.r_[np.flatnonzero(LABELS), np.flatnonzero(LABELS == 0)[:6]]
    solver = sk.LogisticRegression(solver="liblinear", tol=1e-8)
    search = HypergradientSearchCV(solver, cv=3).fit(X[rows] + 3, LABELS[rows])
    np.testing.assert_allclose(search.hypergradient_history_[-1]["value"], -search.best_score_, rtol=1e-4)


@pytest.mark.parametrize(
    ("estimator", "option"),
    [
        (sk.LogisticRegression(penalty=cast(Any, None)), "penalty=None"),
        (sk.LogisticRegression(penalty="l1", solver="liblinear"), "penalty='l1'"),
        (LinearSVC(multi_class="crammer_singer"), "multi_class='crammer_singer'"),
    ],
)
def test_options_that_mean_another_model_are_refused(estimator, option):
    with pytest.raises(ValueError, match=f"{option}.* cannot be tuned"):
        HypergradientSearchCV(estimator).fit(X, LABELS)


def test_groups_of_rows_come_with_the_splits():
    with pytest.raises(ValueError, match="GroupKFold needs groups of rows.*cv=list"):
        HypergradientSearchCV(sk.Ridge(), cv=GroupKFold(3)).fit(X, Y)
    splits = list(GroupKFold(3).split(X, Y, np.arange(N) % 7))
    assert HypergradientSearchCV(sk.Ridge(), cv=splits).fit(X, Y).n_splits_ == 3
