"""HypergradientSearchCV: against grids, in pipelines, with scikit-learn's checks, on bad input."""

import re

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import sklearn.linear_model as sk
from sklearn.ensemble import RandomForestRegressor
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from sklearn.utils.estimator_checks import parametrize_with_checks

from problems.tuning import HypergradientSearchCV

RNG = np.random.default_rng(3)
N, P = 60, 4
X = RNG.normal(size=(N, P)) * [1.0, 3.0, 0.3, 1.0] + [0.0, 5.0, 0.0, 1.0]
B = X @ [1.0, -0.3, 0.0, 1.0] + RNG.normal(size=N)
LABELS = np.where(B + 0.5 * RNG.normal(size=N) > np.median(B), "yes", "no")
GRID = np.logspace(-4, 4, 60)


@pytest.mark.parametrize(
    ("estimator", "y", "name"),
    [
        (make_pipeline(StandardScaler(), sk.Ridge()), B, "ridge__alpha"),
        pytest.param(sk.Ridge(), B, "alpha", marks=pytest.mark.slow),
        pytest.param(
            make_pipeline(StandardScaler(), sk.LogisticRegression(tol=1e-8)), LABELS, "logisticregression__C",
            marks=pytest.mark.slow,
        ),
        pytest.param(sk.Lasso(), B, "alpha", marks=pytest.mark.slow),
        pytest.param(make_pipeline(StandardScaler(), KernelRidge()), B, "kernelridge__alpha", marks=pytest.mark.slow),
        pytest.param(sk.PoissonRegressor(max_iter=1000, tol=1e-7), np.exp(0.3 * B), "alpha", marks=pytest.mark.slow),
        pytest.param(sk.HuberRegressor(max_iter=1000), B, "alpha", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_it_is_at_least_as_good_as_a_grid(estimator, y, name):
    search = HypergradientSearchCV(estimator).fit(X, y)
    scoring = "neg_log_loss" if y is LABELS else "neg_mean_squared_error"
    grid = GridSearchCV(estimator, {name: GRID}, scoring=scoring, cv=5).fit(X, y)
    assert set(search.best_params_) == {name}
    assert search.best_score_ >= grid.best_score_ - 1e-5 * abs(grid.best_score_)
    at_best = estimator.set_params(**search.best_params_)
    np.testing.assert_allclose(search.best_score_, cross_val_score(at_best, X, y, cv=5, scoring=scoring).mean())
    last = search.hypergradient_history_[-1]
    np.testing.assert_allclose(last["value"], -search.best_score_, rtol=1e-4)
    assert {"value", "gradient_norm", "error"} <= set(last)
    np.testing.assert_array_equal(search.predict(X), search.best_estimator_.predict(X))


@pytest.mark.long
def test_own_penalties_are_features_in_other_units():
    pipeline = make_pipeline(StandardScaler(), sk.Ridge())
    search = HypergradientSearchCV(pipeline, penalties="per-feature", shrinkage=0).fit(X, B)
    alphas = search.best_params_["ridge__alpha"]
    assert alphas.shape == (P,)
    Z = StandardScaler().fit_transform(X)
    weights = np.linalg.solve(Z.T @ Z + np.diag(alphas), Z.T @ (B - B.mean()))
    np.testing.assert_allclose(search.best_estimator_[-1].coef_, weights, rtol=1e-6)
    np.testing.assert_allclose(search.hypergradient_history_[-1]["value"], -search.best_score_, rtol=1e-6)
    shared = HypergradientSearchCV(pipeline).fit(X, B)
    assert search.best_score_ >= shared.best_score_
    held = HypergradientSearchCV(pipeline, penalties="per-feature", shrinkage=np.inf).fit(X, B)
    np.testing.assert_allclose(held.best_score_, shared.best_score_, rtol=1e-6)
    auto = HypergradientSearchCV(pipeline, groups=[0, 0, 1, 1], random_state=0).fit(X, B)
    assert auto.shrinkage_ in auto.shrinkage_scores_
    assert auto.shrinkage_ > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "y"),
    [
        (LinearSVC(), LABELS),
        (SVC(), LABELS),
        (sk.ElasticNet(), B),
        (KernelRidge(kernel="rbf"), B),
        (sk.LogisticRegression(), np.digitize(B, [0.0, 1.0])),
    ],
)
def test_the_other_estimators(estimator, y):
    search = HypergradientSearchCV(estimator).fit(X, y)
    assert search.best_score_ >= cross_val_score(estimator, X, y, cv=5, scoring=search.scorer_).mean() - 0.02


@pytest.mark.slow
@parametrize_with_checks(
    [HypergradientSearchCV(sk.Ridge(), cv=3), HypergradientSearchCV(sk.LogisticRegression(), cv=3)]
)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def test_frames_keep_their_names_and_rows_may_have_weights():
    frame = pd.DataFrame(X, columns=list("abcd"))
    pipeline = make_pipeline(StandardScaler(), sk.Ridge())
    search = HypergradientSearchCV(pipeline).fit(frame, B)
    assert list(search.feature_names_in_) == list("abcd")
    weights = RNG.uniform(0.5, 2, N)
    search = HypergradientSearchCV(pipeline).fit(X, B, sample_weight=weights)
    np.testing.assert_allclose(search.hypergradient_history_[-1]["value"], -search.best_score_, rtol=1e-4)


@pytest.mark.parametrize(
    ("estimator", "options", "data", "message"),
    [
        (RandomForestRegressor(), {}, (X, B), "cannot differentiate RandomForestRegressor; it tunes ElasticNet"),
        (sk.Ridge(), {"penalties": "per-row"}, (X, B), "found 'per-row'"),
        (sk.Ridge(), {"groups": [0, 1]}, (X, B), "`groups` has 2 entries, but `X` has 4 features"),
        (sk.Ridge(), {"groups": [0, 1, 0, 1], "penalties": "per-feature"}, (X, B), "not both"),
        (sk.Ridge(), {"shrinkage": -1}, (X, B), "`shrinkage` must be 'auto' or a number >= 0, found -1"),
        (sk.Ridge(), {"n_iter": 0}, (X, B), "`n_iter` must be an integer >= 1"),
        (sk.Ridge(), {"tol": 0}, (X, B), "`tol` must be positive"),
        (sk.Ridge(), {}, (scipy.sparse.csr_matrix(X), B), "sparse matrix"),
        (sk.Ridge(), {}, (X, B[:39]), "inconsistent numbers of samples"),
        (sk.Ridge(), {}, (np.where(X > 5, np.nan, X), B), "NaN"),
        (make_pipeline(StandardScaler(), sk.Ridge()), {}, (X[:40], B[:39]), "40 rows, but `y` has 39"),
        (sk.LogisticRegression(), {}, (X, np.ones(N)), "1 class"),
        (sk.LogisticRegression(), {"cv": [(np.arange(3), np.arange(3, 6))]}, (X, np.arange(N) // 30), "lack the class"),
        (sk.LogisticRegression(class_weight="balanced"), {}, (X, LABELS), "class_weight='balanced'"),
        (sk.Ridge(positive=True), {}, (X, B), "positive=True"),
        (sk.PoissonRegressor(), {}, (X, B), "targets y >= 0"),
    ],
)
def test_bad_input_is_named(estimator, options, data, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        HypergradientSearchCV(estimator, **options).fit(*data)
