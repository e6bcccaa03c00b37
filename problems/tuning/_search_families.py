"""scikit-learn's estimators as bilevel problems: which parameters are tuned, what is trained, how it is judged.

The variable x of a search holds log-penalties (or length scales), each relative to the scale that `bounds` are around.
`mix @ x` are those used: the identity, or an average where all share one, so that both are the same program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import bilevel
from bilevel import prox

from ._criteria import CrossValidation
from ._linear import OfPredictions, Training
from ._penalties import AbstractPenalties
from ._sparse import Grams, SparseTraining
from .lasso import First, Second


class Mixing(eqx.Module):
    """x with its own entries replaced by their mean, or as it is: `shared` is one or zero, so that both are one
    program; `own` is 1 / (number of own entries) where x holds one, else 0."""

    shared: Float[Array, ""]
    own: Float[Array, " q"]

    def __call__(self, x: Float[Array, " q"]) -> Float[Array, " q"]:
        return jnp.where(self.own > 0, x + self.shared * (jnp.sum(self.own * x) - x), x)


class Spread(eqx.Module):
    """Log-penalties u, shape (q,), over weights, shape (p,); weight j has that of `groups[j]`. `extra` weights follow,
    with the mean of all.

    One for all and one for each take no product with a matrix of zeros and ones, which would be compiled many times.
    """

    matrix: Float[Array, "p q"] | None
    count: int = eqx.field(static=True)
    extra: int = eqx.field(static=True)

    def __init__(self, groups: np.ndarray, extra: int):
        count = int(groups.max()) + 1
        plain = count == 1 or np.array_equal(groups, np.arange(count))
        self.matrix = None if plain else jnp.asarray(np.eye(count)[groups], float)
        self.count, self.extra = len(groups), extra

    def __call__(self, u: Float[Array, " q"]) -> Float[Array, " p"]:
        spread = jnp.broadcast_to(u, (self.count,)) if self.matrix is None else self.matrix @ u
        return jnp.append(spread, jnp.broadcast_to(jnp.mean(u), (self.extra,)))


class Quadratic(AbstractPenalties):
    """1/2 sum_j exp(mixing(x) + offset)_g(j) unit_j w_j^2; unit_j is zero for an intercept that is not penalized."""

    shape: tuple[int, ...] = eqx.field(static=True)
    mixing: Mixing
    offset: Float[Array, " q"]
    spread: Spread
    unit: Float[Array, " p"]

    def ridge(self, x, w):
        weights = jnp.exp(self.spread(self.mixing(x) + self.offset)) * self.unit
        penalty = 0.5 * jnp.sum(weights * jnp.square(w))
        if w.ndim == 2:  # intercepts of all classes may move together: zero is as good a sum as any
            penalty = penalty + jnp.where(self.unit[-1] == 0, 0.5, 0) * jnp.square(jnp.sum(w[:, -1]))
        return penalty


class Absolute(eqx.Module):
    """x -> the weights of |w_j| (from all entries of x) and zero."""

    mixing: Mixing
    offset: Float[Array, " q"]
    spread: Spread
    unit: Float[Array, " p"]

    def __call__(self, x: Array) -> tuple[Array, Array]:
        return jnp.exp(self.spread(self.mixing(x) + self.offset)) * self.unit, jnp.zeros((), x.dtype)


class Both(eqx.Module):
    """x = (log l1, log l2) -> the weights of |w_j| and of w_j^2 / 2, where w_j is the sum over `copies` equal features,
    which share it equally."""

    offset: Float[Array, "2"]
    unit: Float[Array, " p"]
    copies: Float[Array, " p"]

    def __call__(self, x: Array) -> tuple[Array, Array]:
        one, two = jnp.exp(x + self.offset)
        return one * self.unit, two * self.unit**2 / self.copies


class SearchProblem(bilevel.AbstractBilevelProblem):
    """A criterion over folds in some `unit`, in which tolerances mean something whatever the targets are measured in,
    plus strength/2 times the mean square of the distances of own penalties to a center."""

    inner: bilevel.AbstractInner
    judge: Any  # (x, y) -> scalar
    mixing: Mixing
    center: Float[Array, " q"]
    strength: Float[Array, ""]
    unit: Float[Array, ""]

    def outer(self, x, y):
        pull = jnp.sum(self.mixing.own * jnp.square(self.mixing(x) - self.center))
        return self.judge(x, y) / self.unit + 0.5 * self.strength * pull


class Judge(eqx.Module):
    """The mean over folds of a loss of linear predictions; `root` takes the square root of each fold's mean."""

    criterion: CrossValidation
    losses: Callable = eqx.field(static=True)

    def __call__(self, x: Array, y: Array) -> Float[Array, ""]:
        return self.criterion.validation(self.losses, y)


# ------------------------------------------------------------------------------------------------ losses of rows
# trained: losses(x, X, w, targets); judged: losses(X, w, targets). The last column of X is the intercept's.


def _squared(predictions, targets):
    return 0.5 * jnp.square(predictions - targets)


def _logistic(scores, targets):
    return jax.nn.softplus(-targets * scores)


def _multinomial(scores, targets):
    picked = jnp.take_along_axis(scores, targets.astype(int)[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(scores, axis=1) - picked


def _poisson(eta, targets):
    return jnp.exp(eta) - targets * eta


def _hinge(scores, targets):
    """Squared, of each class against the rest where there is a score for each class."""
    if scores.ndim == 1:
        return jnp.square(jnp.maximum(1 - targets * scores, 0))
    classes = jnp.arange(scores.shape[1], dtype=targets.dtype)
    signs = jnp.where(targets[:, None] == classes, 1.0, -1.0).astype(scores.dtype)
    return jnp.sum(jnp.square(jnp.maximum(1 - signs * scores, 0)), axis=1)


squared = OfPredictions(_squared)
logistic = OfPredictions(_logistic)
multinomial = OfPredictions(_multinomial)
poisson = OfPredictions(_poisson)
hinge = OfPredictions(_hinge)


def huber(epsilon: float) -> Callable:
    """HuberRegressor's, the last weight being the log of its scale."""

    def losses(x, X, w, targets):
        s = jnp.exp(w[-1])
        r = jnp.abs(X @ w[:-1] - targets) / s
        inside = r < epsilon
        square = jnp.where(inside, r, 0)
        return s + s * jnp.where(inside, square * square, 2 * epsilon * r - epsilon * epsilon)

    return losses


def judged_by(training: Callable) -> Callable:
    """The training loss as the loss of judged rows."""
    return lambda X, w, targets: training(None, X, w, targets)


def mean_squared(X, w, targets):
    return jnp.square(X @ w - targets)


def mean_squared_of_exponential(X, w, targets):
    return jnp.square(jnp.exp(X @ w) - targets)


def mean_squared_with_scale(X, w, targets):
    return jnp.square(X @ w[:-1] - targets)


def sparse(criterion: CrossValidation, weights: Any, step: Any, grams: Grams | None) -> SparseTraining:
    """The training of a lasso or an elastic net with the given weights, by scikit-learn, which compiles nothing."""
    first = First(weights)
    operator = prox.elastic_net(first, Second(weights)) if isinstance(weights, Both) else prox.l1(first)
    return SparseTraining(criterion, operator, weights, host=0, step=step, grams=grams)


def smooth(criterion: CrossValidation, penalties: Quadratic, losses: Callable) -> Training:
    """The training with a smooth loss and quadratic penalties."""
    return Training(criterion, penalties, losses)
