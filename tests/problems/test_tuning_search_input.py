"""HypergradientSearchCV on input that is odd but allowed, and on input that is refused once it is looked at closely."""

import re

import numpy as np
import pandas as pd
import pytest
import sklearn.linear_model as sk
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from problems.tuning import HypergradientSearchCV

RNG = np.random.default_rng(5)
N, P = 40, 4
X = RNG.normal(size=(N, P))
B = X @ [1.0, -0.3, 0.0, 1.0] + RNG.normal(size=N)
PIPELINE = make_pipeline(StandardScaler(), sk.Ridge())
GRID = {"ridge__alpha": np.logspace(-3, 3, 13)}


def as_pandas(X):
    return pd.DataFrame(X, columns=list("abcd"))


def as_polars(X):
    polars = pytest.importorskip("polars")
    return polars.DataFrame(X, schema=list("abcd"))


@pytest.mark.long
def test_features_that_are_constant_or_huge_or_tiny():
    """All in one program: shapes are those of the first."""
    for odd in (X * [1, 0, 1, 1] + [0, 7, 0, 0], X * [1e8, 1, 1e-8, 1]):
        search = HypergradientSearchCV(PIPELINE).fit(odd, B)
        grid = GridSearchCV(PIPELINE, GRID, scoring="neg_mean_squared_error", cv=5).fit(odd, B)
        assert search.best_score_ >= grid.best_score_ - 1e-5 * abs(grid.best_score_)
        raw = HypergradientSearchCV(sk.Ridge()).fit(odd, B)
        np.testing.assert_allclose(raw.hypergradient_history_[-1]["value"], -raw.best_score_, rtol=1e-4)


@pytest.mark.parametrize("frame", [as_pandas, as_polars])
def test_frames_give_the_arrays_results_and_keep_their_names(frame):
    plain = HypergradientSearchCV(PIPELINE).fit(X, B)
    search = HypergradientSearchCV(PIPELINE).fit(frame(X), B)
    assert list(search.feature_names_in_) == list("abcd")
    assert list(search.best_estimator_.feature_names_in_) == list("abcd")
    np.testing.assert_allclose(search.best_params_["ridge__alpha"], plain.best_params_["ridge__alpha"])
    np.testing.assert_allclose(search.predict(frame(X)), plain.predict(X))
    with pytest.raises(ValueError, match="feature names should match"):
        search.predict(frame(X).rename({"a": "z"}) if frame is as_polars else frame(X).rename(columns={"a": "z"}))


@pytest.mark.slow
def test_whole_weights_are_rows_that_come_several_times():
    """A fold whose rows are repeated is the same fold, with weights."""
    times = RNG.integers(1, 4, N)
    rows = np.repeat(np.arange(N), times)
    pairs = [(np.arange(0, 20), np.arange(20, 40)), (np.arange(20, 40), np.arange(0, 20))]
    repeated = [(np.flatnonzero(np.isin(rows, a)), np.flatnonzero(np.isin(rows, b))) for a, b in pairs]
    weighted = HypergradientSearchCV(sk.Ridge(), cv=pairs, tol=1e-6).fit(X, B, sample_weight=times.astype(float))
    plain = HypergradientSearchCV(sk.Ridge(), cv=repeated, tol=1e-6).fit(X[rows], B[rows])
    np.testing.assert_allclose(weighted.best_score_, plain.best_score_, rtol=1e-6)
    np.testing.assert_allclose(weighted.best_params_["alpha"], plain.best_params_["alpha"], rtol=1e-2)


@pytest.mark.slow
def test_fewer_rows_than_features():
    wide = RNG.normal(size=(12, P * 10))
    search = HypergradientSearchCV(sk.Ridge(), cv=3).fit(wide, wide[:, 0])
    assert np.isfinite(search.best_score_)


@pytest.mark.parametrize(
    ("labels", "cv", "scoring", "message"),
    [
        (
            np.arange(N) % 2,
            [(np.arange(20), np.arange(20, 40, 2))],
            None,
            "fold 0: its validation rows lack the class 1",
        ),
        (np.arange(N) // 20, [(np.arange(20), np.arange(20, 40))], None, "fold 0: its training rows lack the class 1"),
    ],
)
def test_a_class_that_a_fold_lacks_is_named(labels, cv, scoring, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        HypergradientSearchCV(sk.LogisticRegression(), cv=cv, scoring=scoring).fit(X, labels)


def test_rows_without_weight_do_not_count_as_rows_of_a_class():
    labels = np.arange(N) % 2
    with pytest.raises(ValueError, match="fold 0: its training rows lack the class 0"):
        HypergradientSearchCV(sk.LogisticRegression(), cv=3).fit(X, labels, sample_weight=1.0 * labels)
