"""Small cases of every tuning problem, for the contract that `pytest --problems=problems.tuning` runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .additive import AdditiveTuning
from .cleaning import DataCleaning
from .denoising import DenoisingTuning
from .elastic_net import ElasticNetTuning
from .gaussian_process import GaussianProcessTuning
from .group_lasso import GroupLassoTuning
from .huber import HuberTuning
from .kernel_ridge import KernelRidgeTuning
from .lasso import LassoTuning
from .logistic import LogisticTuning
from .multinomial import MultinomialTuning
from .poisson import PoissonTuning
from .ridge import RidgeTuning
from .support_vector import SupportVectorTuning


def _data(key: jax.Array, rows: int = 24, columns: int = 4):
    first, second, third = jax.random.split(key, 3)
    X = jax.random.normal(first, (rows, columns))
    score = X @ jax.random.normal(second, (columns,)) + jax.random.normal(third, (rows,))
    return X, score


def _signs(score):
    return jnp.where(score > jnp.median(score), 1, -1)


def _counts(score):
    return jnp.round(jnp.exp(0.3 * score) + 0.5)


def _held_out(model, targets=lambda score: score, **options):
    def make(key):
        X, y = _data(key)
        y = targets(y)
        problem = model(X[:16], y[:16], X[16:], y[16:], **options)
        return problem, *problem.initial()

    return make


def _orthogonal(model):
    """On orthogonal features Newton's step finds the support from everywhere, so that its order can be seen."""

    def make(key):
        X, y = _data(key)
        train = 4 * jnp.linalg.qr(X[:16])[0]
        problem = model(train, train @ jnp.asarray([1.0, -2.0, 1.5, 0.0]) + 0.1 * y[:16], X[16:], y[16:])
        return problem, *problem.initial()

    return make


def _folds(model, targets=lambda score: score, cv: Any = 2, **options):
    def make(key):
        X, y = _data(key)
        problem = model(X, targets(y), cv=cv, **options)
        return problem, *problem.initial()

    return make


def _thirds(score):
    return jnp.digitize(score, jnp.quantile(score, jnp.asarray([0.33, 0.66])))


def _denoising(key):
    first, second = jax.random.split(key)
    clean = jnp.cumsum(jax.random.normal(first, (1, 5, 5)), axis=2)
    noisy = clean + 0.5 * jax.random.normal(second, clean.shape)
    problem = DenoisingTuning(noisy, clean, size=2, filters=2, delta=0.3)
    return problem, *problem.initial()


def examples() -> dict[str, Callable]:
    """A dict from a name to a function `key -> (problem, x, y0)`."""
    return {
        "ridge, held out": _held_out(RidgeTuning),
        "ridge, folds, shared": _folds(RidgeTuning, cv=3, penalties="shared"),
        "logistic, folds, groups": _folds(LogisticTuning, _signs, groups=[0, 0, 1, 1]),
        "multinomial, held out": _held_out(MultinomialTuning, _thirds, penalties="per-class"),
        "lasso, held out": _orthogonal(LassoTuning),
        "elastic net, held out": _orthogonal(ElasticNetTuning),
        "group lasso, held out": _held_out(GroupLassoTuning, groups=[0, 0, 1, 1]),
        "poisson, folds": _folds(PoissonTuning, _counts),
        "huber, held out": _held_out(HuberTuning),
        "support vector, held out": _held_out(SupportVectorTuning, _signs),
        "kernel ridge, leave-one-out": _folds(KernelRidgeTuning, cv="loo"),
        "gaussian process, marginal likelihood": _folds(GaussianProcessTuning, cv="marginal-likelihood"),
        "additive, generalized cross-validation": _folds(AdditiveTuning, cv="gcv", splines=5),
        "data cleaning": _held_out(DataCleaning, _thirds),
        "denoising": _denoising,
    }
