"""Every other tuning model against scikit-learn's fits at the same hyperparameters, and differences of those."""

import re
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import sklearn.linear_model as sk
from sklearn.gaussian_process import GaussianProcessRegressor, kernels
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.svm import LinearSVC

import bilevel
from problems import tuning

N, P = 33, 3
RNG = np.random.default_rng(11)
X = RNG.normal(size=(N, P)) * [1.0, 2.0, 0.5]
B = X @ [1.0, -0.5, 0.0] + 0.5 * RNG.normal(size=N)
THREE = np.digitize(B, np.quantile(B, [0.33, 0.66]))
TWO = np.where(B > 0, 1, -1)
COUNTS = RNG.poisson(np.exp(0.5 * np.tanh(B)))
X_VAL = RNG.normal(size=(21, P))
SHUFFLED = {"shuffle": True, "random_state": 0}
ROWS = list(KFold(3, **SHUFFLED).split(X))


def half_error(prediction, truth):
    return np.mean((prediction - truth) ** 2) / 2


def averaged(fit, judge, targets, rows=ROWS):
    """The weights of each fold, and the mean over folds of `judge(model, X, targets)`."""
    models = [fit(X[a], targets[a]) for a, _ in rows]
    return models, np.mean([judge(m, X[b], targets[b]) for m, (_, b) in zip(models, rows, strict=True)])


class Case(NamedTuple):
    problem: Any
    x: Any
    reference: Any  # x -> (y, outer value), from an independent library


def lasso(x):
    fit = lambda X, b: sk.Lasso(alpha=np.exp(x), fit_intercept=False, tol=1e-14, max_iter=100000).fit(X, b)
    models, value = averaged(fit, lambda m, X, b: half_error(m.predict(X), b), B)
    return [m.coef_ for m in models], value


def elastic_net(x):
    a, b = np.exp(x)
    fit = lambda X, t: sk.ElasticNet(
        alpha=a + b, l1_ratio=a / (a + b), fit_intercept=False, tol=1e-14, max_iter=100000
    ).fit(X, t)
    models, value = averaged(fit, lambda m, X, b: half_error(m.predict(X), b), B)
    return [m.coef_ for m in models], value


def group_lasso(x):
    """Two groups, both of them kept at these x, so that BFGS on the norms themselves finds the minimum."""

    def objective(w, X, b):
        norms = np.array([np.linalg.norm(w[:2]), np.linalg.norm(w[2:])])
        return np.mean((X @ w - b) ** 2) / 2 + np.exp(x) @ norms

    def slope(w, X, b):
        norms = np.array([np.linalg.norm(w[:2])] * 2 + [np.linalg.norm(w[2:])])
        return X.T @ (X @ w - b) / len(b) + np.exp(x)[[0, 0, 1]] * w / norms

    def fit(X, b):
        start = np.linalg.lstsq(X, b)[0]
        return scipy.optimize.minimize(objective, start, (X, b), jac=slope, tol=1e-13, method="BFGS").x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return averaged(fit, lambda w, X, b: half_error(X @ w, b), B)


def poisson(x):
    fit = lambda X, b: sk.PoissonRegressor(
        alpha=np.exp(x), fit_intercept=False, tol=1e-12, solver="newton-cholesky"
    ).fit(X, b)
    judge = lambda m, X, b: np.mean(m.predict(X) - b * np.log(m.predict(X)))
    models, value = averaged(fit, judge, COUNTS)
    return [m.coef_ for m in models], value


def huber(x):
    def fit(X, b):
        alpha = len(b) * np.exp(x[1]) / (2 * P)
        return sk.HuberRegressor(
            epsilon=1 + np.exp(x[0]), alpha=alpha, fit_intercept=False, tol=1e-10, max_iter=10000
        ).fit(X, b)

    models, value = averaged(fit, lambda m, X, b: half_error(m.predict(X), b), B)
    return [np.append(m.coef_, np.log(m.scale_)) for m in models], value


def support_vector(x):
    def fit(X, b):
        C = P / (len(b) * np.exp(x))
        options: Any = {"dual": False}
        return LinearSVC(C=C, fit_intercept=False, tol=1e-12, max_iter=1000000, **options).fit(X, b)

    judge = lambda m, X, b: np.mean(np.maximum(1 - b * m.decision_function(X), 0) ** 2)
    models, value = averaged(fit, judge, TWO, list(StratifiedKFold(3, **SHUFFLED).split(X, TWO)))
    return [m.coef_[0] for m in models], value


def multinomial(x):
    def fit(X, b):
        C = P / (len(b) * np.exp(x))
        return sk.LogisticRegression(C=C, fit_intercept=False, tol=1e-12, solver="newton-cholesky").fit(X, b)

    judge = lambda m, X, b: log_loss(b, m.predict_proba(X))
    models, value = averaged(fit, judge, THREE, list(StratifiedKFold(3, **SHUFFLED).split(X, THREE)))
    return [m.coef_ for m in models], value


def kernel_ridge(x):
    scale = np.exp(-x[:-1])  # scikit-learn has one gamma: other length scales are other units of the features

    def fit(a):
        return KernelRidge(alpha=np.exp(x[-1]), kernel="rbf", gamma=0.5).fit(X[a] * scale, B[a])

    models = [fit(a) for a, _ in ROWS]
    y = np.zeros((3, N))
    for k, (a, _) in enumerate(ROWS):
        y[k, a] = models[k].dual_coef_
    return y, np.mean([half_error(m.predict(X[b] * scale), B[b]) for m, (_, b) in zip(models, ROWS, strict=True)])


def gaussian_process(x):
    kernel = kernels.ConstantKernel(np.exp(x[-2])) * kernels.RBF(np.exp(x[:-2])) + kernels.WhiteKernel(np.exp(x[-1]))
    options: Any = {"optimizer": None, "alpha": 0}
    model: Any = GaussianProcessRegressor(kernel, **options).fit(X, B)
    return model.alpha_, -model.log_marginal_likelihood() / N


CASES = {
    "lasso": lambda: Case(tuning.LassoTuning(X, B, cv=3), -1.3, lasso),
    "elastic net": lambda: Case(tuning.ElasticNetTuning(X, B, cv=3), [-1.5, -1.0], elastic_net),
    "group lasso": lambda: Case(
        tuning.GroupLassoTuning(X, B, cv=3, groups=[0, 0, 1], penalties="per-group"), [-2.0, -6.0], group_lasso
    ),
    "poisson": lambda: Case(tuning.PoissonTuning(X, COUNTS, cv=3), -2.0, poisson),
    "huber": lambda: Case(tuning.HuberTuning(X, B, cv=3), [-1.0, -2.0], huber),
    "support vector": lambda: Case(tuning.SupportVectorTuning(X, TWO, cv=3), -1.0, support_vector),
    "multinomial": lambda: Case(tuning.MultinomialTuning(X, THREE, cv=3), -2.0, multinomial),
    "kernel ridge": lambda: Case(tuning.KernelRidgeTuning(X, B, cv=3), [0.3, 0.6, 0.1, -2.0], kernel_ridge),
    "gaussian process": lambda: Case(
        tuning.GaussianProcessTuning(X, B), [0.3, 0.6, 0.1, 0.2, -1.5], gaussian_process
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_models_are_scikit_learns_and_the_gradient_is_that_of_its_fits(name):
    problem, x, reference = CASES[name]()
    x = np.asarray(x, float)
    assert problem.initial()[0].shape == x.shape
    found = bilevel.hypergradient(problem, jnp.asarray(x), problem.initial()[1], rtol=1e-7)
    assert found.converged
    y, value = reference(x)
    precision = 1e-4 if name in ("huber", "group lasso") else 1e-6  # of the reference: BFGS, L-BFGS
    np.testing.assert_allclose(found.y, y, rtol=precision, atol=precision)
    np.testing.assert_allclose(found.value, value, rtol=precision)
    h = 1e-3 if precision > 1e-5 else 1e-4
    gradient = np.empty(x.shape)
    for i in np.ndindex(*x.shape):
        step = np.zeros(x.shape)
        step[i] = h
        gradient[i] = (reference(x + step)[1] - reference(x - step)[1]) / (2 * h)
    np.testing.assert_allclose(found.gradient, gradient, rtol=2e-3 if precision > 1e-5 else 2e-5, atol=1e-7)
    if problem.inner.operator_at(x, found.y) is not None:  # the blocks of the folds are the Hessian

        @jax.jit
        def products(inner, x, y, v):
            return inner.operator_at(x, y).mv(v), jax.jvp(lambda y: inner.optimality(x, y), (y,), (v,))[1]

        v = jnp.asarray(RNG.normal(size=found.y.shape))
        np.testing.assert_allclose(*products(problem.inner, jnp.asarray(x), found.y, v), rtol=1e-9, atol=1e-12)


def test_per_class_and_group_penalties_are_sums_of_the_shared_ones_derivative():
    shared = tuning.MultinomialTuning(X, THREE, cv=3)
    y = shared.initial()[1] + jnp.asarray(RNG.normal(size=(3, P)))
    for kind in ({"penalties": "per-class"}, {"penalties": "per-feature"}, {"groups": [0, 1, 0]}):
        problem = tuning.MultinomialTuning(X, THREE, cv=3, **kind)
        x = jnp.full(problem.initial()[0].shape, 0.3)
        np.testing.assert_allclose(problem.inner.objective(x, y), shared.inner.objective(jnp.asarray(0.3), y))
    assert tuning.MultinomialTuning(X, THREE, cv=3, penalties="per-class").initial()[0].shape == (3,)


# ------------------------------------------------------------------------------------------------ leave-one-out


def brute_force(make, x):
    """The mean loss of each row by the model trained on the others."""
    parts = []
    for i in range(N):
        problem = make(np.delete(X, i, 0), np.delete(B, i), X[i : i + 1], B[i : i + 1])
        y = np.linalg.solve(*system(problem, x))
        parts.append(float(problem.outer(x, jnp.asarray(y).reshape(problem.initial()[1].shape))))
    return np.mean(parts)


def system(problem, x):
    """Matrix and right-hand side of a linear inner problem, from its objective."""
    start = problem.initial()[1]
    gradient = jax.grad(lambda v: problem.inner.objective(x, v.reshape(start.shape)))
    zero = jnp.zeros(start.size)
    return jax.jacfwd(gradient)(zero), -gradient(zero)


@pytest.mark.long
@pytest.mark.parametrize(
    ("make", "x"),
    [
        (tuning.RidgeTuning, [0.1, -0.5, 1.0]),
        (tuning.KernelRidgeTuning, [0.3, 0.6, 0.1, -2.0]),
        (tuning.GaussianProcessTuning, [0.3, 0.6, 0.1, 0.2, -1.5]),
    ],
)
def test_leave_one_out_by_its_closed_form_is_brute_force(make, x):
    x = jnp.asarray(x)
    problem = make(X, B, cv="loo")
    y = jnp.asarray(np.linalg.solve(*system(problem, x)))
    np.testing.assert_allclose(problem.outer(x, y), brute_force(make, x), rtol=1e-9)


# ------------------------------------------------------------------------------------------------ additive models


@pytest.mark.long
def test_additive_model_is_penalized_least_squares_and_its_formulas_are_those_of_the_smoother():
    x = jnp.asarray([-1.0, 0.5, -3.0])
    problem = tuning.AdditiveTuning(X, B, cv="gcv", splines=6)
    design, S = np.asarray(problem.criterion.X), np.asarray(problem.penalties.matrix(x))
    np.testing.assert_allclose(design[:, 1:].mean(0), 0, atol=1e-12)
    H = design @ np.linalg.solve(design.T @ design + N * S, design.T)
    w = np.linalg.solve(design.T @ design + N * S, design.T @ B)
    rest = B - H @ B
    gcv = np.mean(rest**2) / 2 / (1 - np.trace(H) / N) ** 2
    found = bilevel.hypergradient(problem, x, problem.initial()[1])
    np.testing.assert_allclose(found.y, w, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found.value, gcv, rtol=1e-9)
    loo = tuning.AdditiveTuning(X, B, cv="loo", splines=6)
    brute = []
    for i in range(N):
        keep = np.arange(N) != i
        A = design[keep]
        v = np.linalg.solve(A.T @ A + (N - 1) * S, A.T @ B[keep])
        brute.append((design[i] @ v - B[i]) ** 2 / 2)
    w = np.linalg.solve(design.T @ design + (N - 1) * S, design.T @ B)
    np.testing.assert_allclose(loo.outer(x, jnp.asarray(w)), np.mean(brute), rtol=1e-9)
    # straight lines and constants are what a large smoothing parameter leaves
    stiff = tuning.AdditiveTuning(X, B, cv="gcv", splines=6)
    y = stiff.refit(jnp.full(3, 9.0))
    line = sk.LinearRegression().fit(X, B)
    np.testing.assert_allclose(stiff.predict(y, X), line.predict(X), atol=1e-2)
    smooths = sum(np.asarray(stiff.smooth(y, j, X[:, j])) for j in range(3))
    np.testing.assert_allclose(smooths + B.mean(), stiff.predict(y, X), atol=1e-9)


def test_additive_models_of_labels_and_counts():
    x = jnp.asarray([-1.0, 0.5, -1.0])
    labels = np.where(RNG.random(N) < 0.3, -TWO, TWO)  # without errors the slope of a line would be infinite
    for family, targets in (("logistic", labels), ("poisson", COUNTS)):
        problem: Any = tuning.AdditiveTuning(X, targets, cv=3, family=family, splines=5)
        criterion: Any = problem.criterion
        design = np.asarray(criterion.X)
        y = np.asarray(bilevel.solve(problem.inner, x, problem.initial()[1]).y)
        for w, train in zip(y, np.asarray(criterion.train), strict=True):
            eta = design @ w
            slope = -labels / (1 + np.exp(labels * eta)) if family == "logistic" else np.exp(eta) - COUNTS
            S = np.asarray(problem.penalties.matrix(x))
            np.testing.assert_allclose(design.T @ (train * slope) + S @ w, 0, atol=1e-7)
        assert set(np.unique(problem.predict(y, X))) <= {-1, 1} or family == "poisson"


# ------------------------------------------------------------------------------------------------ cleaning, denoising


def test_data_cleaning_trains_with_weights_and_judges_without():
    clean = np.digitize(X_VAL @ [1.0, -0.5, 0.0], [-0.4, 0.4])
    problem = tuning.DataCleaning(X, THREE, X_VAL, clean, penalty=0.1)
    x = jnp.asarray(RNG.normal(size=N))
    found = bilevel.hypergradient(problem, x, problem.initial()[1])
    weights = 1 / (1 + np.exp(-np.asarray(x)))
    ones = np.column_stack([X, np.ones(N)])  # an intercept that is penalized like the weights
    model = sk.LogisticRegression(C=1 / (0.1 * N), fit_intercept=False, tol=1e-12, solver="newton-cholesky")
    model.fit(ones, THREE, sample_weight=weights)
    np.testing.assert_allclose(found.y, model.coef_, rtol=1e-5, atol=1e-7)
    new = np.column_stack([X_VAL, np.ones(21)])
    np.testing.assert_allclose(found.value, log_loss(clean, model.predict_proba(new), labels=[0, 1, 2]), rtol=1e-6)
    np.testing.assert_array_equal(problem.predict(found.y, X_VAL), model.predict(new))


def test_denoising_against_its_formula_and_total_variation():
    noisy, clean = RNG.normal(size=(2, 2, 7, 6))
    problem = tuning.DenoisingTuning(noisy, clean, size=3, filters=2, delta=0.1)
    x, y = problem.initial()
    assert x.shape == (2, 9)
    x = x + 0.3 * jnp.asarray(RNG.normal(size=x.shape))
    filters = np.einsum("km,stm->kst", x[:, 1:], problem.basis)
    np.testing.assert_allclose(np.asarray(problem.basis).sum((0, 1)), 0, atol=1e-12)
    value = np.sum((clean - noisy) ** 2) / 2
    for w, f in zip(np.asarray(x[:, 0]), filters, strict=True):
        for image in np.pad(clean, ((0, 0), (1, 1), (1, 1)), mode="symmetric"):
            answers = [[np.sum(f * image[i : i + 3, j : j + 3]) for j in range(6)] for i in range(7)]
            value += np.exp(w) * np.sum(np.sqrt(0.1**2 + np.square(answers)))
    np.testing.assert_allclose(problem.inner.objective(x, problem.clean), value, rtol=1e-12)
    assert tuning.DenoisingTuning(noisy, clean).initial()[0].size == 600
    found = bilevel.solve(problem.inner, x, y, rtol=1e-6)
    np.testing.assert_allclose(problem.denoise(x, noisy[0]), found.y[0], atol=1e-4)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_data_cleaning_finds_wrong_labels(seed):
    """The class means are four standard deviations apart."""
    rng = np.random.default_rng(seed)
    centers = 4.0 * np.array([[0, 0], [1, 0], [0, 1]])
    labels = rng.integers(0, 3, 800)
    rows = centers[labels] + rng.normal(size=(800, 2))
    wrong = rng.random(200) < 0.3
    given = np.where(wrong, (labels[:200] + rng.integers(1, 3, 200)) % 3, labels[:200])
    problem = tuning.DataCleaning(rows[:200], given, rows[200:300], labels[200:300])
    found = bilevel.minimize(problem, *problem.initial(), max_steps=100)
    assert roc_auc_score(wrong, -np.asarray(found.x)) >= 0.95
    clean = sk.LogisticRegression().fit(rows[:200], labels[:200]).score(rows[300:], labels[300:])
    assert np.mean(np.asarray(problem.predict(found.y, rows[300:])) == labels[300:]) >= clean - 0.02
    np.testing.assert_allclose(found.value, problem.outer(found.x, found.y) + problem.penalty(found.x), rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tuning.PoissonTuning(X, B, cv=3), "PoissonTuning: the targets `y` must be >= 0"),
        (lambda: tuning.PoissonTuning(X, 0 * B, cv=3), "all zero"),
        (lambda: tuning.MultinomialTuning(X, 0 * THREE, cv=3), "one class only"),
        (lambda: tuning.MultinomialTuning(X, B, cv=3), "must be classes, found the number"),
        (lambda: tuning.MultinomialTuning(X, THREE, X_VAL, np.full(21, 7)), "`y_val` must be those of `y`, found 7"),
        (lambda: tuning.MultinomialTuning(X, THREE, cv=[(np.arange(3), [5])]), "fold 0: its training rows"),
        (lambda: tuning.MultinomialTuning(X, THREE, cv=3, penalties="per-row"), "or 'per-class' (or pass `groups`)"),
        (lambda: tuning.LassoTuning(X, B[:5], cv=3), "LassoTuning: `X` has 33 rows, but `y` has 5 entries"),
        (lambda: tuning.GroupLassoTuning(X, B, cv=3, groups=[0, 1]), "`groups` has 2 entries, but `X` has 3 features"),
        (lambda: tuning.GroupLassoTuning(X, B, cv=3, penalties="each"), "must be 'shared' or 'per-group'"),
        (lambda: tuning.KernelRidgeTuning(X, B), "found neither"),
        (lambda: tuning.KernelRidgeTuning(X, B, X_VAL, X_VAL[:, 0], cv=3), "found both"),
        (lambda: tuning.AdditiveTuning(X * [1, 0, 1], B, cv="gcv"), "feature 1 of `X` is constant"),
        (lambda: tuning.AdditiveTuning(X, TWO, cv="gcv", family="logistic"), "for the family 'gaussian' only"),
        (lambda: tuning.AdditiveTuning(X, B, cv=3, family="gamma"), "`family` must be one of"),
        (lambda: tuning.AdditiveTuning(X, B, cv=3, splines=3), "`splines` must be an integer of at least 5"),
        (lambda: tuning.DataCleaning(X, THREE, None, None), "pass a clean validation set"),
        (lambda: tuning.DataCleaning(X, THREE, X, THREE, penalty=0.0), "`penalty` must be positive"),
        (lambda: tuning.DenoisingTuning(X, X[:5], size=2), "`noisy` has shape (1, 33, 3)"),
        (lambda: tuning.DenoisingTuning(X, X, size=4), "smaller than a filter of 4"),
        (lambda: tuning.DenoisingTuning(X, X, size=2, delta=0.0), "`delta` must be positive"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
