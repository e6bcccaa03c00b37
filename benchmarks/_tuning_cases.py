"""The cases of `benchmarks.tuning`: each a problem, its bounds, a line for a grid, and a test loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_sample_image
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from problems import tuning


class Case(NamedTuple):
    """A problem; bounds of x; whether its inner problem is smooth; x of one number on a `line`; the test loss at x."""

    problem: Any
    bounds: tuple
    smooth: bool
    folds: int
    test: Callable[[Any], float]
    shared: Callable[[float], Any] | None = None
    line: tuple[float, float] = (-7.0, 7.0)
    method: str = "l-bfgs-b"  # of ours
    tol: float = 1e-7  # of ours: the criterion's gradient is small where the criterion is


def _bundled(load) -> tuple[np.ndarray, np.ndarray]:
    X, y = load(return_X_y=True)
    return np.asarray(X), np.asarray(y)


def _split(X, y, seed=0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    parts = train_test_split(X, y, test_size=0.25, random_state=seed)
    X, X_test, y, y_test = map(np.asarray, parts)
    scale = StandardScaler().fit(X)
    return np.asarray(scale.transform(X)), np.asarray(scale.transform(X_test)), y, y_test


def _half_error(problem, X, y):
    return lambda x: float(np.mean((np.asarray(problem.predict(problem.refit(x), X)) - y) ** 2) / 2)


def _polynomials():
    """Without the square of the sex, which has two values: scaled, it is the sex again."""
    X, y = _bundled(load_diabetes)
    expand = PolynomialFeatures(2, include_bias=False)
    X = expand.fit_transform(X)
    X, X_test, y, y_test = _split(X[:, expand.get_feature_names_out() != "x1^2"], y)
    return X, X_test, y - y.mean(), y_test - y.mean()


def lasso() -> Case:
    X, X_test, y, y_test = _polynomials()
    problem = tuning.LassoTuning(X, y, cv=5)
    return Case(problem, (-2.0, 4.0), False, 5, _half_error(problem, X_test, y_test), jnp.asarray, (-2.0, 3.5))


def elastic_net() -> Case:
    X, X_test, y, y_test = _polynomials()
    problem = tuning.ElasticNetTuning(X, y, cv=5)
    both = lambda t: jnp.asarray([t, t])
    return Case(problem, (-6.0, 4.0), False, 5, _half_error(problem, X_test, y_test), both, (-4.0, 3.5))


def sparse() -> Case:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(1000, 5000))
    y = X[:, :20] @ rng.normal(size=20) + 2 * rng.normal(size=1000)
    problem = tuning.LassoTuning(X[:400], y[:400], X[400:500], y[400:500])
    return Case(problem, (-4.0, 1.0), False, 1, _half_error(problem, X[500:], y[500:]), jnp.asarray, (-3.0, 0.5))


def logistic() -> Case:
    X, X_test, y, y_test = _split(*_bundled(load_breast_cancer))
    problem = tuning.LogisticTuning(X, y, cv=5)

    def test(x):
        p = np.asarray(problem.predict_proba(problem.refit(x), X_test))
        return float(-np.mean(np.log(np.where(y_test == 1, p, 1 - p))))

    return Case(problem, (-7.0, 7.0), True, 5, test, lambda t: jnp.full(30, t))


def multinomial() -> Case:
    X, y = _bundled(load_digits)
    X, X_test, y, y_test = train_test_split(X / 16, y, test_size=0.5, random_state=0)
    problem = tuning.MultinomialTuning(X[:600], y[:600], X[600:], y[600:], penalties="per-feature")

    def test(x):
        p = np.asarray(problem.predict_proba(problem.refit(x), X_test))
        return float(-np.mean(np.log(p[np.arange(len(y_test)), y_test])))

    return Case(problem, (-9.0, 5.0), True, 1, test, lambda t: jnp.full(64, t), method="trust-region")


def kernel_ridge() -> Case:
    X, X_test, y, y_test = _split(*_bundled(load_diabetes))
    mean, deviation = y.mean(), y.std()
    problem = tuning.KernelRidgeTuning(X, (y - mean) / deviation, cv=5)
    target = (y_test - mean) / deviation
    test = lambda x: float(np.mean((np.asarray(problem.predict(problem.refit(x), X_test, x)) - target) ** 2) / 2)
    shared = lambda t: jnp.append(jnp.full(10, 1.5), t)
    return Case(problem, (-4.0, 6.0), True, 5, test, shared, (-4.0, 4.0))


def additive() -> Case:
    from mlxtend.data import autompg_data

    X, y = autompg_data()
    X, X_test, y, y_test = train_test_split(np.asarray(X)[:, :7].astype(float), y, test_size=0.25, random_state=0)
    problem = tuning.AdditiveTuning(X, y, cv=5)
    shared = lambda t: jnp.full(7, t)
    return Case(problem, (-12.0, 8.0), True, 5, _half_error(problem, X_test, y_test), shared, (-10.0, 6.0))


def denoiser() -> Case:
    rng = np.random.default_rng(0)
    image = load_sample_image("china.jpg").mean(2)[::2, ::2] / 255
    corners = rng.integers(0, [image.shape[0] - 24, image.shape[1] - 24], (12, 2))
    clean = np.array([image[i : i + 24, j : j + 24] for i, j in corners])
    noisy = clean + 0.1 * rng.normal(size=clean.shape)
    problem = tuning.DenoisingTuning(noisy[:6], clean[:6])
    test = lambda x: float(np.mean((np.asarray(problem.denoise(x, noisy[6:])) - clean[6:]) ** 2) / 2)
    return Case(problem, (-12.0, 4.0), True, 1, test, tol=1e-10)


CASES = {
    "lasso": lasso,
    "elastic-net": elastic_net,
    "sparse": sparse,
    "logistic": logistic,
    "multinomial": multinomial,
    "kernel-ridge": kernel_ridge,
    "additive": additive,
    "denoiser": denoiser,
}
