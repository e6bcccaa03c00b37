"""From a scikit-learn estimator and folds to a `SearchProblem`, and from its x back to the estimator's parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.base import clone
from sklearn.metrics.pairwise import pairwise_kernels

from . import _search_families as families
from . import _search_kernels as kernels
from ._criteria import CrossValidation
from ._scaled_estimator import FeatureScaled
from ._search_folds import Folds
from ._sparse import Grams, exact_step_length, repeated

SUPPORTED = (
    "ElasticNet", "HuberRegressor", "KernelRidge", "Lasso", "LinearSVC", "LogisticRegression", "PoissonRegressor",
    "Ridge", "SVC",
)  # fmt: skip
SMOOTH_SCORES = ("neg_mean_squared_error", "neg_log_loss", "r2", "neg_mean_poisson_deviance")


@dataclasses.dataclass
class Setup:
    """Everything about x: `own` says which entries are own penalties, `offset` is log of the parameter at x = 0,
    `lower`, `upper` its bounds, `scan` the points tried first; `problem(shared, center, strength, unit)` makes the
    problem."""

    own: np.ndarray
    offset: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    scan: np.ndarray
    parts: Callable[[families.Mixing], tuple]  # mixing -> (training, judge)
    kinks: bool = False  # whether the criterion has them

    def around(self, x: Any) -> tuple[np.ndarray, np.ndarray]:
        """The values of the scan next to one of its points, entry by entry, or the bounds where it ends."""
        below = np.where(self.scan < x - 1e-9, self.scan, self.lower).max(axis=0)
        above = np.where(self.scan > x + 1e-9, self.scan, self.upper).min(axis=0)
        return below, above

    def problem(self, shared: bool, center: np.ndarray, strength: float, unit: float) -> families.SearchProblem:
        """Own penalties or one shared one, pulled towards `center`; the criterion divided by `unit`."""
        weights = self.own / max(1, self.own.sum())
        on_device = lambda a: jnp.asarray(np.asarray(a, float))
        mixing = families.Mixing(on_device(shared), on_device(weights))
        training, judge = self.parts(mixing)
        numbers = (on_device(a) for a in (center, strength, unit))
        return families.SearchProblem(training, judge, mixing, *numbers)


class Family:
    """What is known of one class of estimators."""

    def __init__(self, estimator: Any, scoring: str | None):
        self.estimator, self.name = estimator, type(estimator).__name__
        self.score = scoring
        self.classes: np.ndarray | None = None
        self.kernel = self.name in ("KernelRidge", "SVC")
        self.tunes_gamma = self.kernel and estimator.kernel == "rbf"
        _check_options(estimator)

    # -------------------------------------------------------------------------------------------- data to problem

    def targets(self, y: np.ndarray) -> np.ndarray:
        """Numbers: signs for two classes, places in `classes` for more, or y itself."""
        if self.name not in ("LogisticRegression", "LinearSVC", "SVC"):
            return np.asarray(y, float)
        self.classes = np.unique(y)
        places = np.searchsorted(self.classes, y)
        if self.name == "SVC" and len(self.classes) > 2:
            raise ValueError(
                f"HypergradientSearchCV: SVC is tuned for two classes only, `y` has {len(self.classes)}; use "
                "LogisticRegression or LinearSVC."
            )
        return 2.0 * places - 1 if len(self.classes) == 2 else places.astype(float)

    def tied(self, folds: Folds, own: np.ndarray) -> np.ndarray:
        """`own` (see `setup`) with one penalty for features that a lasso cannot tell apart, where each had its own."""
        if self.name != "Lasso" or len(own) != folds.X.shape[2]:
            return own
        first, alone = repeated(self._columns(folds)), np.bincount(own)[own] == 1
        return np.unique(np.where(alone & alone[first], own[first], own), return_inverse=True)[1]

    def _columns(self, folds: Folds) -> np.ndarray:
        """The features in all rows of all folds, as an intercept leaves them, shape (K n, p)."""
        X = _centred(folds.X, folds.train) if self.estimator.fit_intercept else folds.X
        return X.reshape(-1, X.shape[2])

    def setup(self, folds: Folds, y: np.ndarray, own: np.ndarray) -> Setup:
        """`own`: for each feature the number of its penalty (all zero: one shared penalty)."""
        if not np.all(np.isfinite(folds.X)):
            raise ValueError("HypergradientSearchCV: the features are NaN or infinite after the pipeline's transforms.")
        return self._kernel_setup(folds, y, own) if self.kernel else self._linear_setup(folds, y, own)

    def _judged(self, folds: Folds, y: np.ndarray) -> np.ndarray:
        """The weights of judged rows: for R^2 divided by the variance of each fold's targets."""
        if self.score != "r2":
            return folds.judge
        mean = folds.judge @ y
        variance = np.einsum("kn,kn->k", folds.judge, (y - mean[:, None]) ** 2)
        return folds.judge / np.where(variance > 0, variance, 1)[:, None]

    def _linear_setup(self, folds: Folds, y: np.ndarray, own: np.ndarray) -> Setup:
        estimator, (K, n, p) = self.estimator, folds.X.shape
        if len(own) != p:
            raise ValueError(f"HypergradientSearchCV: `groups` has {len(own)} entries, but there are {p} features.")
        name, count = self.name, int(own.max()) + 1
        liblinear = name == "LinearSVC" or getattr(estimator, "solver", "") == "liblinear"
        penalized_intercept = liblinear and estimator.fit_intercept
        intercept = estimator.fit_intercept and not penalized_intercept
        total = folds.train.sum(1, keepdims=True)
        rows, mean_target = _seen(folds, y)
        deviation = np.sqrt(_variances(folds.X, rows))
        least = 1e-12 * np.abs(folds.X).max()
        size = np.maximum(deviation, least)
        deviation = np.where(deviation > least, deviation, 1.0)
        variance = float(np.mean(size**2)) or 1.0
        X = folds.X / deviation
        if intercept:  # where the intercept is free, this changes nothing but the condition
            X = _centred(X, folds.train)
        copies = np.ones(p)
        if name in ("Lasso", "ElasticNet"):  # of equal features with one penalty the first stands for all
            first = repeated(self._columns(folds))
            first = np.where(own == own[first], first, np.arange(p))
            X, copies = np.where(first < np.arange(p), 0, X), np.bincount(first, minlength=p)[first]
        average = float(total.mean())
        by_sum = name in ("Ridge", "LogisticRegression", "HuberRegressor", "LinearSVC")
        train = folds.train / (average if by_sum else total)
        unit = 1 / deviation
        squares = name in ("Ridge", "Lasso", "ElasticNet")  # centred rows and targets: the intercept is zero
        if (intercept and not squares) or penalized_intercept:
            constant = float(estimator.intercept_scaling) if penalized_intercept else 1.0
            X = np.concatenate([X, np.full((K, n, 1), constant)], axis=2)
            unit = np.append(unit, 1.0 if penalized_intercept else 0.0)
        targets, spread_target = np.asarray(y, float), 1.0
        if name == "HuberRegressor":  # in units in which its scale is about one, whatever outliers are like
            middle = np.median(targets)
            spread_target = 1.4826 * float(np.median(np.abs(targets - middle))) or float(np.std(targets)) or 1.0
            targets = (targets - (middle if intercept else 0.0)) / spread_target
        if intercept and squares:
            targets = targets - folds.train / total @ targets[:, None]  # (K, n)
            assert targets.shape == (K, n)
        start = np.zeros(X.shape[2])
        if name == "PoissonRegressor" and intercept:
            start[-1] = np.log(max(mean_target, 1e-12))
        losses, judged = self._losses(len(self.classes) if self.classes is not None else 0)
        if self.classes is not None and len(self.classes) > 2:
            start = np.zeros((len(self.classes), X.shape[2]))
        if name == "HuberRegressor":
            start = np.append(start, 0.0)
        judged_rows = self._judged(folds, y) * spread_target**2
        criterion = CrossValidation(*(jnp.asarray(a, float) for a in (X, targets, start, train, judged_rows)))
        as_jax = lambda *arrays: tuple(jnp.asarray(a, float) for a in arrays)
        judge = families.Judge(criterion, judged)
        if name in ("Lasso", "ElasticNet"):
            slopes = np.abs(np.einsum("kn,knp->kp", train * np.broadcast_to(targets, (K, n)), X)[:, :p]) * deviation
            top = float(slopes.max())
            top = np.log(top if top > 0 else 1.0)
            # the smallest features have penalties of their own size
            sizes = size[size > least]
            further = float(np.log(sizes.max() / sizes.min())) if sizes.size else 0.0
            step = jnp.asarray(exact_step_length(X, train))
            grams = Grams(X, targets, train) if X.shape[2] <= X.shape[1] else None
            if name == "Lasso":
                offset = np.full(count, top)
                spread = families.Spread(own, len(unit) - p)
                top_, unit_ = as_jax(offset, unit)
                weights = lambda mixing: families.Absolute(mixing, top_, spread, unit_)
                parts = lambda mixing: (families.sparse(criterion, weights(mixing), step, grams), judge)
                low = -9 - further
                scan = np.linspace(-0.25, low + 1.5, int(np.ceil((-1.75 - low) / 0.5)) + 1)[:, None] * np.ones(count)
                return Setup(np.ones(count, bool), offset, np.full(count, low), np.zeros(count), scan, parts, True)
            if count > 1:
                raise ValueError("HypergradientSearchCV: ElasticNet is tuned with penalties='shared' only.")
            offset = np.array([top, np.log(variance)])
            both = families.Both(*as_jax(offset, unit, copies))
            parts = lambda mixing: (families.sparse(criterion, both, step, grams), judge)
            firsts = -1.0 - 1.5 * np.arange(5 + np.ceil(further / 1.5))
            others = (*(-9.0 - 4 * np.arange(np.ceil(further / 2), 0, -1)), -9.0, -5.0, -2.0, 0.0)
            scan = np.array([(a, b) for a in firsts for b in others])
            lower = np.array([-9 - further, -12 - 2 * further])
            return Setup(np.zeros(2, bool), offset, lower, np.array([0.0, 4.0]), scan, parts, True)
        scale = {"PoissonRegressor": 1.0, "HuberRegressor": 2 / average}.get(name, 1 / average)
        center = np.log(variance / (p * scale))
        if name == "PoissonRegressor":  # the curvature is the mean
            center += np.log(max(mean_target, 1e-12))
        # Huber's loss grows like the targets, the penalty like their squares
        offset = np.full(count, center - np.log(spread_target))
        square = unit**2 * scale
        if name == "HuberRegressor":  # the last weight is its scale
            square = np.append(square, 0.0)
        spread, (offset_, square_) = families.Spread(own, len(square) - p), as_jax(np.full(count, center), square)

        def smooth_parts(mixing):
            penalties = families.Quadratic((count,), mixing, offset_, spread, square_)
            return families.smooth(criterion, penalties, losses), judge

        # around the scale of the features' mean variance, and of every feature's own
        low = -7 + min(0.0, float(np.log(max(np.min(size**2) / variance, 1e-8))))
        high = 7.0 + max(0.0, float(np.log(np.max(size**2) / variance)))
        scan = np.linspace(low, high, int(np.ceil((high - low) / 1.2)) + 1)[:, None] * np.ones(count)
        return Setup(np.ones(count, bool), offset, np.full(count, low), np.full(count, high), scan, smooth_parts)

    def _losses(self, classes: int) -> tuple[Callable, Callable]:
        """(trained, judged)."""
        name = self.name
        if name in ("Ridge", "Lasso", "ElasticNet"):
            return families.squared, families.mean_squared
        if name == "LogisticRegression":
            trained = families.logistic if classes == 2 else families.multinomial
            return trained, _judged_logistic if classes == 2 else _judged_multinomial
        if name == "PoissonRegressor":
            deviance = self.score == "neg_mean_poisson_deviance"
            return families.poisson, _judged_poisson if deviance else families.mean_squared_of_exponential
        if name == "LinearSVC":
            return families.hinge, _judged_hinge
        return _huber(float(self.estimator.epsilon)), families.mean_squared_with_scale

    def _kernel_setup(self, folds: Folds, y: np.ndarray, own: np.ndarray) -> Setup:
        estimator, p = self.estimator, folds.X.shape[2]
        if len(own) != p:
            raise ValueError(f"HypergradientSearchCV: `groups` has {len(own)} entries, but there are {p} features.")
        count = int(own.max()) + 1 if self.tunes_gamma else 0
        if not self.tunes_gamma and own.max() > 0:
            raise ValueError(f"HypergradientSearchCV: {self.name} has own length scales with kernel='rbf' only.")
        variances = _variances(folds.X, _seen(folds, y)[0])
        typical = np.array([-np.log(max(variances.sum(), 1e-300))] * count)
        fixed = None
        if not self.tunes_gamma:
            options = {"gamma": estimator.gamma, "degree": estimator.degree, "coef0": estimator.coef0}
            if options["gamma"] in ("scale", "auto"):
                options["gamma"] = 1 / (p * folds.X.var()) if options["gamma"] == "scale" else 1 / p
            fixed = np.stack(
                [pairwise_kernels(f, metric=estimator.kernel, filter_params=True, **options) for f in folds.X]
            )
        first = np.log(0.1 * (np.mean(np.einsum("kii->ki", fixed)) if fixed is not None else 1.0))
        if self.name == "SVC":
            first = -np.log(10 * np.exp(first)) if fixed is not None else 0.0
        offset = np.append(first, typical)
        size = 1 + count
        spread = np.zeros((p, size))
        if count:
            spread[np.arange(p), 1 + own] = 1
        arrays = tuple(jnp.asarray(a, float) for a in (folds.X, offset, spread, y, folds.train, self._judged(folds, y)))
        features, offset_, spread_, targets, train, judged = arrays
        fixed_ = None if fixed is None else jnp.asarray(fixed, float)
        support = self.name == "SVC"

        def parts(mixing):
            kernel = kernels.Kernel(features, mixing, offset_, spread_, fixed_)
            training = (kernels.SupportVectorTraining if support else kernels.KernelRidgeTraining)(
                kernel, targets, train
            )
            loss = kernels.logistic if support else kernels.mean_squared
            return training, kernels.KernelJudge(kernel, targets, judged, loss, float(support))

        lower, upper = np.append(-9.0, np.full(count, -7.0)), np.append(7.0, np.full(count, 7.0))
        if support:
            lower[0], upper[0] = -7.0, 7.0
        firsts = (-4.0, -1.0, 2.0, 5.0) if support else (-7.0, -4.5, -2.0, 0.5, 3.0)
        others = (-3.0, -1.5, 0.0, 1.5, 3.0) if count else (0.0,)
        scan = np.array([np.append(a, np.full(count, b)) for a in firsts for b in others])
        return Setup(np.append(False, np.ones(count, bool)), offset, lower, upper, scan, parts)

    # -------------------------------------------------------------------------------------------- x to parameters

    def parameters(self, u: np.ndarray, own: np.ndarray, single: bool, at_lower: np.ndarray) -> dict[str, Any]:
        """scikit-learn's parameters for u, the logarithms of the penalties used (offset included)."""
        value = np.exp(u)
        if self.name == "ElasticNet":
            one, two = value[0], 0.0 if at_lower[1] else value[1]
            return {"alpha": float(one + two), "l1_ratio": float(one / (one + two))}
        if self.kernel:
            found: dict[str, Any] = {"C" if self.name == "SVC" else "alpha": float(value[0])}
            if self.tunes_gamma:
                found["gamma"] = float(value[1]) if single else value[1:][own]
            return found
        if self.name in ("LogisticRegression", "LinearSVC"):
            return {"C": float(1 / value[0]) if single else 1 / value[own]}
        return {"alpha": float(value[0]) if single else value[own]}

    def expressed(self, parameters: dict[str, Any]) -> Any:
        """An unfitted estimator with these parameters: scikit-learn's own, or one on scaled features."""
        estimator: Any = clone(self.estimator)
        arrays = {k: v for k, v in parameters.items() if np.ndim(v)}
        numbers = {k: v for k, v in parameters.items() if not np.ndim(v)}
        if not arrays:
            return estimator.set_params(**numbers)
        ((name, values),) = arrays.items()
        if np.ptp(np.log(values)) < 1e-12:
            return estimator.set_params(**numbers, **{name: float(values[0])})
        _, first = np.unique(values, return_index=True)
        middle = float(np.exp(np.mean(np.log(values[first]))))
        ratio = middle / values if name == "alpha" else values / middle
        scale = ratio if self.name == "Lasso" else np.sqrt(ratio)
        return FeatureScaled(estimator.set_params(**numbers, **{name: middle}), scale)


def _seen(folds: Folds, y: np.ndarray) -> tuple[np.ndarray, float]:
    """The share of each row in what folds train and judge on, and the mean of the targets by it."""
    rows = folds.train.sum(0)
    rows = rows / rows.sum()
    return rows, float(rows @ y)


def _centred(X: np.ndarray, train: np.ndarray) -> np.ndarray:
    """X, of shape (K, n, p), less the mean of each fold's training rows."""
    return X - np.einsum("kn,knp->kp", train / train.sum(1, keepdims=True), X)[:, None]


def _variances(X: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The variance of each feature, over folds and rows."""
    mean = np.einsum("n,knp->p", rows, X) / len(X)
    return np.einsum("n,knp->p", rows, np.square(X - mean)) / len(X)


def _judged_logistic(X, w, targets):
    return families.logistic(None, X, w, targets)


def _judged_multinomial(X, w, targets):
    return families.multinomial(None, X, w, targets)


def _judged_poisson(X, w, targets):
    """The deviance."""
    return 2 * (families.poisson(None, X, w, targets) + jax.scipy.special.xlogy(targets, targets) - targets)


def _judged_hinge(X, w, targets):
    return families.hinge(None, X, w, targets)


_HUBER: dict[float, Callable] = {}


def _huber(epsilon: float) -> Callable:
    """One function for each epsilon, so that it compiles once."""
    return _HUBER.setdefault(epsilon, families.huber(epsilon))


def _check_options(estimator: Any) -> None:
    """Raises ValueError for options that the criterion would not know of."""
    name = type(estimator).__name__
    wanted = {
        "Ridge": {"positive": (False,)},
        "Lasso": {"positive": (False,)},
        "ElasticNet": {"positive": (False,)},
        "LogisticRegression": {
            "class_weight": (None,),
            "l1_ratio": (None, 0, 0.0),
            "penalty": ("l2", "deprecated"),
        },
        "LinearSVC": {
            "class_weight": (None,),
            "loss": ("squared_hinge",),
            "penalty": ("l2",),
            "multi_class": ("ovr",),
        },
        "SVC": {"class_weight": (None,)},
    }
    for option, allowed in wanted.get(name, {}).items():
        value = getattr(estimator, option, allowed[0])
        if not any(value is a or (isinstance(value, type(a)) and value == a) for a in allowed):
            raise ValueError(
                f"HypergradientSearchCV: {name}({option}={value!r}) cannot be tuned; it must be one of {allowed}."
            )
