"""Hyperparameter tuning: the outer variable holds the penalties of a model, the inner one its weights.

Every model is built as `Model(X, y, X_val, y_val)` or `Model(X, y, cv=K)` and is a bilevel problem: hand it to
`bilevel.hypergradient` or `bilevel.minimize`. It holds its data as leaves, so new data of the same shape do not
recompile anything, and it contains no derivatives.
"""

from typing import Any

from ._examples import examples
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

__all__ = [
    "AdditiveTuning",
    "DataCleaning",
    "DenoisingTuning",
    "ElasticNetTuning",
    "GaussianProcessTuning",
    "GroupLassoTuning",
    "HuberTuning",
    "KernelRidgeTuning",
    "HypergradientSearchCV",
    "LassoTuning",
    "LogisticTuning",
    "MultinomialTuning",
    "PoissonTuning",
    "RidgeTuning",
    "SupportVectorTuning",
    "examples",
]


def __getattr__(name: str) -> Any:
    if name == "HypergradientSearchCV":  # on first use: it needs scikit-learn, the problems do not
        from .search import HypergradientSearchCV

        return HypergradientSearchCV
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
