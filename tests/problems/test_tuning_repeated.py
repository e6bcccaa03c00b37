"""Features that equal others: a lasso's weights are not unique then, its predictions and the criterion are."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.linear_model as sk
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_diabetes
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

import bilevel
from problems.tuning import HypergradientSearchCV, LassoTuning
from problems.tuning._search_loop import AGAIN
from problems.tuning._sparse import repeated

RNG = np.random.default_rng(8)
X = RNG.normal(size=(60, 6))
Y = X[:, :3] @ np.array([2.0, -1.0, 0.5]) + RNG.normal(size=60)
TWICE = np.concatenate([X, -X[:, [1]], X[:, [0, 1]]], axis=1)


@given(seed=st.integers(0, 2**32 - 1), columns=st.integers(1, 12), copies=st.integers(0, 12))
def test_repeated_columns_are_found(seed, columns, copies):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(5, columns)) * 10.0 ** rng.uniform(-6, 6, size=columns)
    of = rng.integers(0, columns, size=copies)
    both = np.concatenate([base, rng.choice([-1, 1], size=copies) * base[:, of] * (1 + 1e-14)], axis=1)
    places = rng.permutation(columns + copies)
    source = np.concatenate([np.arange(columns), of])[places]
    expected = [int(np.flatnonzero(source == one)[0]) for one in source]
    np.testing.assert_array_equal(repeated(both[:, places]), expected)


def test_no_column_repeats_a_constant_or_a_scaled_one():
    columns = np.stack([np.zeros(4), np.zeros(4), np.arange(4.0), 2 * np.arange(4.0)], axis=1)
    np.testing.assert_array_equal(repeated(columns), np.arange(4))


def test_features_of_zeros_alone_leave_the_mean():
    found = HypergradientSearchCV(sk.Lasso(), cv=3).fit(np.zeros((60, 2)), Y)
    np.testing.assert_allclose(found.predict(np.zeros((1, 2))), Y.mean())


@pytest.mark.long
def test_the_lasso_is_tuned_as_without_them():
    once, twice = (LassoTuning(data[:40], Y[:40], data[40:], Y[40:]) for data in (X, TWICE))
    found, expected = (bilevel.hypergradient(p, jnp.asarray(-2.0), p.initial()[1]) for p in (twice, once))
    np.testing.assert_allclose([found.value, found.gradient], [expected.value, expected.gradient], rtol=1e-9)
    assert not np.any(np.asarray(found.y)[6:])
    np.testing.assert_allclose(twice.predict(found.y, TWICE), once.predict(expected.y, X), atol=1e-9)
    own = LassoTuning(TWICE, Y, cv=3, penalties="per-feature")  # a smaller penalty of its own would count
    np.testing.assert_array_equal(own.criterion.X, TWICE)


@pytest.mark.long
@pytest.mark.parametrize("estimator", [sk.Lasso(), sk.ElasticNet()])
def test_the_search_finds_what_it_finds_without_them(estimator):
    once, twice = (HypergradientSearchCV(estimator, cv=3).fit(data, Y) for data in (X, TWICE))
    if isinstance(estimator, sk.Lasso):  # an elastic net shrinks the halves of a weight less
        np.testing.assert_allclose(twice.best_score_, once.best_score_, rtol=1e-5)
        return
    for alpha in (0.03, 0.1, 0.3):
        ratio = twice.best_params_["l1_ratio"]
        assert twice.best_score_ >= score(sk.ElasticNet(alpha=alpha, l1_ratio=ratio)) - 1e-9


def score(estimator):
    grid = GridSearchCV(estimator, {}, cv=3, scoring="neg_mean_squared_error").fit(TWICE, Y)
    return grid.best_score_


@pytest.mark.long
def test_own_penalties_of_equal_features_are_equal():
    found = HypergradientSearchCV(sk.Lasso(), cv=3, penalties="per-feature", shrinkage=0.1, n_iter=5).fit(TWICE, Y)
    alpha = found.best_params_["alpha"]
    assert alpha.shape == (9,)
    assert alpha[0] == alpha[7]
    assert alpha[1] == alpha[6] == alpha[8]
    assert len(set(alpha)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("kind", [sk.Lasso, sk.ElasticNet])
def test_polynomials_of_the_diabetes_data_whose_sex_is_its_own_square(kind):
    X, y = load_diabetes(return_X_y=True)
    pipeline = lambda last: make_pipeline(PolynomialFeatures(2, include_bias=False), StandardScaler(), last)
    found = HypergradientSearchCV(pipeline(kind())).fit(X, y)
    grid = {"lasso__alpha": np.geomspace(0.3, 20, 60)}
    lasso = pipeline(sk.Lasso(max_iter=100_000, tol=1e-3))
    best = GridSearchCV(lasso, grid, scoring="neg_mean_squared_error").fit(X, y).best_score_
    assert found.best_score_ >= 1.0005 * best  # both are negative


def test_a_search_that_fails_on_the_way_keeps_what_it_has_and_warns(monkeypatch):
    true, calls = bilevel.minimize, []

    def failing(problem, x, y, *, callback, max_steps, **options):
        if max_steps == 0:
            return true(problem, x, y, callback=callback, max_steps=0, **options)
        calls.append(max_steps)

        def then_fail(state):
            callback(state)
            if state.step == 1:
                raise bilevel.NotConverged("bilevel.minimize: as told.")

        return true(problem, x, y, callback=then_fail, max_steps=max_steps, **options)

    monkeypatch.setattr(bilevel, "minimize", failing)
    said = re.escape("a hypergradient failed 1 times") + ".*after 1 outer steps: bilevel.minimize: as told"
    with pytest.warns(ConvergenceWarning, match=said):
        search = HypergradientSearchCV(sk.Ridge(), cv=3).fit(X, Y + 4 * np.sin(np.arange(60.0) ** 2))
    assert len(calls) == 1 + AGAIN  # from where it was, in smaller and smaller boxes
    values = [line["value"] for line in search.hypergradient_history_]
    assert [line["step"] for line in search.hypergradient_history_] == list(range(len(calls) + 1))
    assert np.all(np.diff(values) <= 0)
