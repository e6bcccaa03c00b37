"""The search: a scikit-learn estimator's penalties, tuned by hypergradients."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import numpy as np
from sklearn.base import BaseEstimator, MetaEstimatorMixin, clone, is_classifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import get_scorer
from sklearn.model_selection import check_cv, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.utils import _safe_indexing, column_or_1d
from sklearn.utils._tags import get_tags
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from bilevel._compiling import one_thread

from ._penalties import group_numbers
from ._search_folds import final_step, fold_data
from ._search_loop import SMALL, Search
from ._search_nested import ROUGH, Nested, choose_strength
from ._search_setup import SMOOTH_SCORES, SUPPORTED, Family

KINDS = ("shared", "per-feature")


def _has(name: str):
    return available_if(lambda self: hasattr(getattr(self, "best_estimator_", self.estimator), name))


class HypergradientSearchCV(MetaEstimatorMixin, BaseEstimator):
    """Tunes the penalties of a scikit-learn estimator: any number of them, by hypergradients of a K-fold criterion.

    **Arguments:** `estimator`: `Ridge`, `LogisticRegression`, `Lasso`, `ElasticNet`, `KernelRidge`, `SVC`, `LinearSVC`,
    `PoissonRegressor` or `HuberRegressor`, or a `Pipeline` that ends in one; a pipeline's transformers are fitted
    inside each fold. `penalties`: "shared": one penalty (`alpha`, `C`; for the "rbf" kernel also `gamma`, for
    `ElasticNet` also `l1_ratio`); "per-feature": one for each feature of the last step (for "rbf" one length scale
    each). `groups`: an integer per feature, numbered from 0: one penalty each. `cv`: as in scikit-learn. `scoring`: a
    name; None: "neg_mean_squared_error", "neg_log_loss" (classifiers with probabilities) or "accuracy". Optimized
    exactly: these two, "r2", and "neg_mean_poisson_deviance" for `PoissonRegressor`; through a surrogate all others:
    the squared error, the log loss, the squared hinge (`LinearSVC`) or the log loss of decision values (`SVC`, with a
    rounded hinge). `shrinkage`: how strongly own log-penalties are pulled to their shared value: 0, a number (in units
    of the shared optimum's value), or "auto": by nested cross-validation over strengths and infinity, the largest
    within one standard error (of paired differences) of the best; own penalties are then searched until five steps gain
    less than half a percent. Its splits are of rows at random: where rows come in groups, choose a number. `n_iter`,
    `tol`: of the outer optimization otherwise. `random_state`: of the nested splits. `verbose`: 1: a progress bar.

    **Attributes:** `best_params_`, `best_score_`, `best_estimator_`, `hypergradient_history_` (a dict a step: `step`,
    `value`, `gradient_norm`, `error`), `shrinkage_` (the strength used), `shrinkage_scores_` ("auto": strength -> test
    losses of the nested splits), `n_splits_`, `scorer_`, `classes_`, `n_features_in_`, `feature_names_in_`.

    **Raises:** ValueError, TypeError in `fit`: an estimator or an option it cannot differentiate, by name; sparse
    matrices; NaN; lengths that do not fit; a fold that trains on one class.
    """

    def __init__(
        self,
        estimator: Any,
        *,
        penalties: Any = "shared",
        groups: Any = None,
        cv: Any = 5,
        scoring: Any = None,
        shrinkage: Any = "auto",
        n_iter: Any = 100,
        tol: Any = 1e-4,
        random_state: Any = None,
        verbose: Any = 0,
    ):
        self.estimator = estimator
        self.penalties = penalties
        self.groups = groups
        self.cv = cv
        self.scoring = scoring
        self.shrinkage = shrinkage
        self.n_iter = n_iter
        self.tol = tol
        self.random_state = random_state
        self.verbose = verbose

    # -------------------------------------------------------------------------------------------- fitting

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> HypergradientSearchCV:
        """Tunes on (X, y), shapes (n, p) and (n,), and refits on all rows."""
        before, last, prefix = self._checked()
        rows, y = self._data(X, y, before)
        weights = None if sample_weight is None else _check_sample_weight(sample_weight, rows, dtype=np.float64)
        classifier = is_classifier(last)
        score, self.scorer_ = self._scoring(last)
        family = Family(last, score)
        splitter: Any = check_cv(self.cv, y, classifier=classifier)
        try:
            pairs = [(np.asarray(a), np.asarray(b)) for a, b in splitter.split(rows, y)]
        except ValueError as error:
            if "groups" not in str(error):
                raise
            raise ValueError(
                f"HypergradientSearchCV: {type(splitter).__name__} needs groups of rows, which `fit` does not take "
                "(`groups` are groups of features); pass cv=list(splitter.split(X, y, groups))."
            ) from error
        self.n_splits_ = len(pairs)
        if classifier:
            self._classes(y, pairs, weights, judged=score == "neg_log_loss")
        targets = family.targets(y)
        folds = fold_data(before, rows, y, pairs, weights)
        with one_thread(folds.X.size <= SMALL), jax.enable_x64(True):
            own = family.tied(folds, self._own(folds.X.shape[2]))
            search = Search(family.setup(folds, targets, own), self.n_iter, self.tol, self.verbose)
            shared = search.shared()
            several = int(search.setup.own.sum()) > 1
            self.shrinkage_ = np.inf if not several else self.shrinkage
            if several and self.shrinkage == "auto":
                nested = Nested(self, family, before, rows, y, targets, weights, own, classifier, search.unit)
                self.shrinkage_, self.shrinkage_scores_ = choose_strength(nested, shared.x, self.random_state)
                search.tol = max(ROUGH, self.tol)  # what was judged is what is taken
            found = shared if np.isinf(self.shrinkage_) else search.own(shared, float(self.shrinkage_))
        if search.failed:
            _warn(
                f"a hypergradient failed {len(search.failed)} times, and the search went on without it; a better "
                f"penalty may have been missed. The first time, {search.failed[0]}"
            )
        if PRESSED < found.pressed < PERFECT:
            _warn(
                "a penalty ended at a bound of the search, beyond which the criterion still falls, by "
                f"{found.pressed:.1%} for each unit of its logarithm: try further ones by hand, or scale the features."
            )
        self.hypergradient_history_ = found.history
        single = not several
        self.best_params_ = self._named(family, prefix, search, found.x, own, single)
        self.best_estimator_ = self._final(family, search, found.x, own, single)
        fit_options = {} if weights is None else {f"{prefix}sample_weight": weights}
        self.best_score_ = self._score_of_folds(rows, y, pairs, weights, prefix)
        expected = 1 - found.value if score == "r2" else -found.value
        if score in SMOOTH_SCORES and np.isinf(self.shrinkage_) and weights is None:
            gap = abs(self.best_score_ - expected)
            if gap > APART * abs(found.value) + 1e-3 * search.worst:
                _warn(
                    f"scikit-learn's fits with the penalty found score {self.best_score_:.6g}, those of the search "
                    f"{expected:.6g}: does the estimator converge (its `tol`, `max_iter`)?"
                )
        self.best_estimator_.fit(rows, y, **fit_options)
        if hasattr(self.best_estimator_, "classes_"):
            self.classes_ = self.best_estimator_.classes_
        return self

    def _score_of_folds(self, rows: Any, y: np.ndarray, pairs: list, weights: Any, prefix: str) -> float:
        """The mean fold score of the best estimator; with sample weights both fits and scores are weighted."""
        if weights is None:
            return float(np.mean(cross_val_score(self.best_estimator_, rows, y, cv=pairs, scoring=self.scorer_)))
        scores = []
        for train, test in pairs:
            model: Any = clone(self.best_estimator_)
            model.fit(_safe_indexing(rows, train), y[train], **{f"{prefix}sample_weight": weights[train]})
            new = _safe_indexing(rows, test)
            scores.append(self.scorer_(model, new, y[test], sample_weight=weights[test]))
        return float(np.mean(scores))

    def _checked(self) -> tuple[Any, Any, str]:
        before, last, prefix = final_step(self.estimator)
        name = type(last).__name__
        if name not in SUPPORTED or not type(last).__module__.startswith("sklearn."):
            raise ValueError(
                f"HypergradientSearchCV: cannot differentiate {name}; it tunes {', '.join(SUPPORTED)}, alone or at the "
                "end of a Pipeline."
            )
        if not (isinstance(self.penalties, str) and self.penalties in KINDS):
            raise ValueError(
                f"HypergradientSearchCV: `penalties` must be 'shared' or 'per-feature' (or pass `groups`), found "
                f"{self.penalties!r}."
            )
        if self.groups is not None and self.penalties != "shared":
            raise ValueError("HypergradientSearchCV: pass `groups` or `penalties='per-feature'`, not both.")
        strength: Any = self.shrinkage
        number = isinstance(strength, (int, float, np.number)) and not isinstance(self.shrinkage, bool)
        if not (isinstance(self.shrinkage, str) and self.shrinkage == "auto") and not (number and strength >= 0):
            raise ValueError(
                f"HypergradientSearchCV: `shrinkage` must be 'auto' or a number >= 0, found {self.shrinkage!r}."
            )
        if not (isinstance(self.n_iter, (int, np.integer)) and self.n_iter >= 1):
            raise ValueError(f"HypergradientSearchCV: `n_iter` must be an integer >= 1, found {self.n_iter!r}.")
        if not float(self.tol) > 0:
            raise ValueError(f"HypergradientSearchCV: `tol` must be positive, found {self.tol!r}.")
        return before, last, prefix

    def _data(self, X: Any, y: Any, before: Any) -> tuple[Any, np.ndarray]:
        """X as it goes into the pipeline, and y of shape (n,)."""
        if hasattr(X, "toarray"):
            raise ValueError(
                "HypergradientSearchCV: `X` is a sparse matrix; Sparse data was passed, but dense data is required. "
                "Use X.toarray()."
            )
        if y is None:
            raise ValueError("HypergradientSearchCV requires y to be passed, but the target y is None.")
        classifier = is_classifier(self.estimator)
        if before is None:
            checked, y = validate_data(self, X, y, dtype=np.float64, y_numeric=not classifier, ensure_min_samples=2)
            rows = checked
        else:  # the pipeline may want names or columns that are no numbers
            validate_data(self, X, y, skip_check_array=True)
            rows = X if hasattr(X, "columns") else np.asarray(X)
            y = column_or_1d(np.asarray(y), warn=True)
            if len(rows) != len(y):
                raise ValueError(f"HypergradientSearchCV: `X` has {len(rows)} rows, but `y` has {len(y)} entries.")
        if not classifier:
            y = np.asarray(y, float)
            if not np.all(np.isfinite(y)):
                raise ValueError("HypergradientSearchCV: `y` contains NaN or infinity.")
        if type(final_step(self.estimator)[1]).__name__ == "PoissonRegressor" and (np.any(y < 0) or not np.any(y > 0)):
            raise ValueError("HypergradientSearchCV: PoissonRegressor takes targets y >= 0, not all zero.")
        return rows, y

    def _classes(self, y: np.ndarray, pairs: list, weights: np.ndarray | None, judged: bool) -> None:
        """Raises ValueError where there is one class, or training rows lack one; with `judged` validation rows too.
        Rows without weight do not count."""
        check_classification_targets(y)
        classes = np.unique(y)
        if len(classes) < 2:
            raise ValueError(
                "HypergradientSearchCV: a classifier needs at least 2 classes, `y` has 1 class only: "
                f"{classes.tolist()[0]!r}."
            )
        for k, pair in enumerate(pairs):
            for part, rows in zip(("training", "validation"), pair if judged else pair[:1], strict=False):
                missing = np.setdiff1d(classes, y[rows if weights is None else rows[weights[rows] > 0]])
                if missing.size:  # without it a model is another one, and scikit-learn's log loss is none
                    raise ValueError(
                        f"HypergradientSearchCV: `cv`, fold {k}: its {part} rows lack the class "
                        f"{missing.tolist()[0]!r}; use fewer folds, or stratified ones."
                    )

    def _own(self, features: int) -> np.ndarray:
        if self.groups is not None:
            return np.asarray(group_numbers("HypergradientSearchCV", self.groups, features))
        return np.arange(features) if self.penalties == "per-feature" else np.zeros(features, int)

    def _scoring(self, last: Any) -> tuple[str | None, Any]:
        name = self.scoring
        if name is None:
            name = "neg_mean_squared_error"
            if is_classifier(last):
                name = "neg_log_loss" if hasattr(last, "predict_proba") else "accuracy"
        return (name if isinstance(name, str) else None), get_scorer(name) if isinstance(name, str) else name

    def _named(self, family: Family, prefix: str, search: Search, x, own, single: bool) -> dict[str, Any]:
        setup = search.setup
        found = family.parameters(x + setup.offset, own, single, x <= setup.lower + 1e-6)
        return {prefix + name: value for name, value in found.items()}

    def _final(self, family: Family, search: Search, x, own, single: bool) -> Any:
        setup = search.setup
        last = family.expressed(family.parameters(x + setup.offset, own, single, x <= setup.lower + 1e-6))
        if not isinstance(self.estimator, Pipeline):
            return last
        whole: Any = clone(self.estimator)
        return whole.set_params(**{whole.steps[-1][0]: last})

    # -------------------------------------------------------------------------------------------- afterwards

    def _rows(self, X: Any) -> Any:
        check_is_fitted(self, "best_estimator_")
        if isinstance(self.estimator, Pipeline):
            validate_data(self, X, reset=False, skip_check_array=True)
            return X if hasattr(X, "columns") else np.asarray(X)
        return validate_data(self, X, reset=False, dtype=np.float64)

    def predict(self, X: Any) -> np.ndarray:
        """The best estimator's predictions, shape (m,)."""
        rows = self._rows(X)
        return self.best_estimator_.predict(rows)

    @_has("predict_proba")
    def predict_proba(self, X: Any) -> np.ndarray:
        """The best estimator's probabilities, shape (m, classes)."""
        rows = self._rows(X)
        return self.best_estimator_.predict_proba(rows)

    @_has("decision_function")
    def decision_function(self, X: Any) -> np.ndarray:
        """The best estimator's decision function."""
        rows = self._rows(X)
        return self.best_estimator_.decision_function(rows)

    def score(self, X: Any, y: Any) -> float:
        """The score of the best estimator, by `scoring`; where that is None its own: R^2, accuracy."""
        rows = self._rows(X)
        if self.scoring is None:
            return float(self.best_estimator_.score(rows, y))
        return float(self.scorer_(self.best_estimator_, rows, y))

    def plot(self, ax: Any = None) -> Any:
        """Draws the criterion, the gradient's norm and its error per step; returns the matplotlib axes."""
        import matplotlib.pyplot as plt

        check_is_fitted(self, "best_estimator_")
        ax = plt.subplots()[1] if ax is None else ax
        steps = [h["step"] for h in self.hypergradient_history_]
        ax.plot(steps, [h["value"] for h in self.hypergradient_history_], "k:", label="criterion")
        ax.set(xlabel="outer step", ylabel="criterion")
        twin = ax.twinx()
        twin.semilogy(steps, [h["gradient_norm"] for h in self.hypergradient_history_], label="|gradient|")
        twin.semilogy(steps, [h["error"] for h in self.hypergradient_history_], label="its error")
        twin.legend()
        return ax

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        inner = get_tags(self.estimator)
        tags.estimator_type = inner.estimator_type
        tags.classifier_tags, tags.regressor_tags = inner.classifier_tags, inner.regressor_tags
        tags.target_tags.required = True
        tags.target_tags.single_output = True
        tags.target_tags.multi_output = False
        tags.target_tags.positive_only = inner.target_tags.positive_only
        if tags.classifier_tags is not None and type(final_step(self.estimator)[1]).__name__ == "SVC":
            tags.classifier_tags.multi_class = False
        tags.input_tags.sparse = False
        tags.input_tags.allow_nan = isinstance(self.estimator, Pipeline) and inner.input_tags.allow_nan
        return tags


PRESSED, PERFECT, APART = 0.01, 0.5, 0.05
"""What is worth a warning: the share of the criterion by which it falls at a bound for each unit of a log-penalty (at
most so large: else it falls like a power of the penalty, to the zero of a perfect fit), and by which scikit-learn's
scores differ from it."""


def _warn(what: str) -> None:
    warnings.warn(f"HypergradientSearchCV: {what}", ConvergenceWarning, stacklevel=3)
