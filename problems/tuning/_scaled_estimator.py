"""A scikit-learn estimator with a penalty (or a length scale) of its own for each feature."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, MetaEstimatorMixin, clone, is_classifier
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted, validate_data


def _has(name: str):
    return available_if(lambda self: hasattr(self.estimator, name))


class FeatureScaled(MetaEstimatorMixin, BaseEstimator):
    """`estimator` fitted on features that are multiplied by `scale`: where scikit-learn has one penalty, others are
    other units of the features. `coef_` is in the units of the features as they come.

    **Arguments:** `estimator`: a scikit-learn estimator; `scale`: shape (features,), positive.
    """

    def __init__(self, estimator: Any, scale: Any):
        self.estimator = estimator
        self.scale = scale

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> FeatureScaled:
        """Fits the estimator on the scaled features."""
        X = validate_data(self, X)
        options = {} if sample_weight is None else {"sample_weight": sample_weight}
        fresh: Any = clone(self.estimator)
        self.estimator_ = fresh.fit(X * np.asarray(self.scale), y, **options)
        if hasattr(self.estimator_, "classes_"):
            self.classes_ = self.estimator_.classes_
        return self

    def _scaled(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        checked: Any = validate_data(self, X, reset=False)
        return checked * np.asarray(self.scale)

    @property
    def coef_(self) -> np.ndarray:
        """The coefficients of the features as they come."""
        return self.estimator_.coef_ * np.asarray(self.scale)

    @property
    def intercept_(self) -> Any:
        """The estimator's."""
        return self.estimator_.intercept_

    def predict(self, X: Any) -> np.ndarray:
        """The estimator's predictions."""
        return self.estimator_.predict(self._scaled(X))

    @_has("predict_proba")
    def predict_proba(self, X: Any) -> np.ndarray:
        """The estimator's probabilities."""
        return self.estimator_.predict_proba(self._scaled(X))

    @_has("decision_function")
    def decision_function(self, X: Any) -> np.ndarray:
        """The estimator's decision function."""
        return self.estimator_.decision_function(self._scaled(X))

    def score(self, X: Any, y: Any) -> float:
        """The estimator's score: accuracy or R^2."""
        return self.estimator_.score(self._scaled(X), y)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        inner = self.estimator.__sklearn_tags__()
        tags.estimator_type, tags.classifier_tags, tags.regressor_tags = (
            inner.estimator_type, inner.classifier_tags, inner.regressor_tags,
        )  # fmt: skip
        tags.target_tags.required = is_classifier(self.estimator) or tags.target_tags.required
        return tags
