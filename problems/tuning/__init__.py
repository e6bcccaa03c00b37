"""Hyperparameter tuning: the outer variable holds the penalties of a model, the inner one its weights.

Every model is built as `Model(X, y, X_val, y_val)` or `Model(X, y, cv=K)` and is a bilevel problem: hand it to
`bilevel.hypergradient` or `bilevel.minimize`. It holds its data as leaves, so new data of the same shape do not
recompile anything, and it contains no derivatives.
"""

from ._examples import examples
from .logistic import LogisticTuning
from .ridge import RidgeTuning

__all__ = ["LogisticTuning", "RidgeTuning", "examples"]
