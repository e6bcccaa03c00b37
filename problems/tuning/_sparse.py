"""What models with a kink share: a smooth loss, a prox, and weights of which most are zero."""

from __future__ import annotations

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

import bilevel
from bilevel._support import SupportAware, inverse_curvature
from bilevel.linear import DENSE_LIMIT
from bilevel.prox import AbstractProx

from ._coordinate_descent import CoordinateDescent, available
from ._criteria import AbstractCriterion, CrossValidation
from ._foldwise import Foldwise
from ._gathered import GatheredSupport, GramSupport, capacity
from ._linear import at, squared

HOST = 200
"""Number of weights, over all folds, from which on an unnamed solver is scikit-learn's coordinate descent."""


CG_STEPS = 150
"""Steps of conjugate gradients on a support, where the system is too large to be solved densely."""


class Smooth(eqx.Module):
    """Half the mean squared error on the training rows, summed over folds."""

    criterion: AbstractCriterion

    def __call__(self, x: Array, y: Array) -> Float[Array, ""]:
        return self.criterion.training(at(x, squared), lambda w: jnp.zeros((), w.dtype), y)


class Grams(eqx.Module):
    """The same, up to a constant, where there are more rows than features: y'Hy / 2 - c'y summed over folds, with each
    fold's H = X' W X and c = X' W b, W its weights of rows. No product with X is left."""

    matrices: Float[Array, "k p p"]
    linear: Float[Array, "k p"]

    def __init__(self, X: np.ndarray, targets: np.ndarray, train: np.ndarray):
        """Data of shape (K, n, p), (n,) or (K, n), and (K, n)."""
        weighted = X * train[:, :, None]
        self.matrices = jnp.asarray(weighted.swapaxes(1, 2) @ X)
        self.linear = jnp.asarray((np.broadcast_to(targets, train.shape)[:, None] @ weighted)[:, 0])

    def __call__(self, x: Array, y: Array) -> Float[Array, ""]:
        return jnp.sum(y * (0.5 * jnp.einsum("kpq,kq->kp", self.matrices, y) - self.linear))


class SparseTraining(bilevel.AbstractInner):
    """A `bilevel.Composite` that knows where to start: half the mean squared error plus what `prox` is the prox of.

    `weights(x)`, where it is not None, are those of |w_j| and w_j^2 / 2, for solvers that know the elastic net only:
    from `host` weights on, over all folds, scikit-learn's coordinate descent is called. `step`: as for `Composite`;
    with it `grams` may stand for the rows.
    """

    composite: bilevel.Composite
    criterion: AbstractCriterion
    weights: Any
    host: int = eqx.field(static=True)

    def __init__(
        self,
        criterion: AbstractCriterion,
        prox: AbstractProx,
        weights: Any = None,
        host: int = HOST,
        step: Any = None,
        grams: Grams | None = None,
    ):
        self.host = host
        self.composite = bilevel.Composite(Smooth(criterion) if grams is None else grams, prox, step=step)
        self.criterion = criterion
        self.weights = weights

    @property
    def smooth(self):
        """The smooth part, (x, y) -> scalar."""
        return self.composite.smooth

    @property
    def is_step(self):
        return True

    @property
    def linear_solver(self):
        criterion, folds = self.criterion, self.criterion.folds
        smooth: Any = self.smooth
        if isinstance(smooth, Grams):
            return GramSupport(smooth.matrices, self.composite.step)
        if folds and criterion.start.size * folds <= DENSE_LIMIT:  # K small factorizations instead of a large one
            return Foldwise(folds)
        # on a support that is not the solution's the system may be singular: the solver is asked before CG is done
        plain = SupportAware(max_steps=CG_STEPS)
        rows, features = criterion.X.shape[-2:]
        most = capacity(rows, features)
        if self.weights is None or self.composite.step is None or most is None:
            return plain
        one = jnp.full((1, rows), 1 / rows, criterion.X.dtype)
        train = criterion.train if isinstance(criterion, CrossValidation) else one
        # a lasso with more weights than rows has no unique solution
        enough = most == features or getattr(self.composite.prox, "quadratic", 0) is None
        return GatheredSupport(criterion.X, train, self.composite.step, most, None if enough else plain)

    @property
    def default_solver(self):
        size = self.criterion.start.size * (self.criterion.folds or 1)
        if self.weights is not None and size >= self.host and available():
            return CoordinateDescent()
        return self.composite.default_solver

    @property
    def compiles_quickly(self):
        return isinstance(self.default_solver, CoordinateDescent)  # which does most of the work, elsewhere

    def initial(self):
        """Zero weights, of shape (p,) or (folds, p)."""
        return self.criterion.initial()

    def optimality(self, x, y):
        return self.composite.optimality(x, y)

    def forward_backward(self, x, y, gradient, t):
        """One forward-backward step, for solvers that take such steps."""
        return self.composite.forward_backward(x, y, gradient, t)

    def step_length(self, x, y):
        """Its step length."""
        return self.composite.step_length(x, y)

    def active_part(self, x, y):
        return self.composite.active_part(x, y)

    def smooth_between(self, x, y, z):
        return self.composite.smooth_between(x, y, z)

    def status_at(self, x, y):
        return self.composite.status_at(x, y)

    def check(self, x, y):
        self.criterion.check(y)
        self.composite.check(x, y)


class AbstractSparseTuning(bilevel.AbstractBilevelProblem):
    """A criterion and the training that goes with it, `step` being its step length; judged by half the mean squared
    error."""

    criterion: eqx.AbstractVar[AbstractCriterion]
    step: eqx.AbstractVar[Float[Array, ""]]

    @abc.abstractmethod
    def training(self, criterion: AbstractCriterion) -> SparseTraining:
        """The training of the weights on the rows of a criterion."""

    @property
    def inner(self) -> SparseTraining:
        """The training of the weights, in all folds at once where there are folds."""
        training = self.training(self.criterion)
        return eqx.tree_at(lambda t: t.composite.step, training, self.step, is_leaf=lambda a: a is None)

    def outer(self, x: ArrayLike, y: ArrayLike) -> Float[Array, ""]:
        """Half the mean squared error on the validation rows, averaged over folds."""
        return self.criterion.validation(at(jnp.asarray(x), squared), jnp.asarray(y))

    def refit(self, x: ArrayLike) -> Float[Array, " p"]:
        """The weights trained at x on all rows of `X` and `y`: the model to keep after tuning. Differentiable in x.

        With `cv` these are the rows of all folds; a validation set stays aside. Raises `bilevel.NotConverged`.
        """
        inner = self.training(self.criterion.everything())
        return bilevel.solve(inner, jnp.asarray(x, self.criterion.X.dtype), inner.initial()).y[0]

    def predictions(self, owner: str, y: Any, X: Any) -> Float[Array, " m"]:
        """X y; for the weights of K folds the average."""
        X = self.criterion.rows(owner, X)
        return (self.criterion.models(owner, y) @ X.T).mean(axis=0)


SMALL = 1000
"""Rows or features up to which the largest eigenvalue is found on the host, where nothing is compiled for it."""


def step_length(criterion: AbstractCriterion) -> Array:
    """1 / L of the mean squared error of all folds, shape (), once: it is the same at all weights."""
    X = criterion.X
    if min(X.shape) <= SMALL:
        train = criterion.train if isinstance(criterion, CrossValidation) else np.full((1, len(X)), 1 / len(X))
        return jnp.asarray(exact_step_length(np.asarray(X), np.asarray(train)), X.dtype)
    return _powers(criterion)


@eqx.filter_jit
def _powers(criterion: AbstractCriterion) -> Array:
    return inverse_curvature(Smooth(criterion), jnp.zeros((), criterion.X.dtype), criterion.initial())


def exact_step_length(X: np.ndarray, train: np.ndarray) -> float:
    """1 / L, L the largest eigenvalue of any fold's X' diag(weights) X; X of shape (n, p), or (K, n, p); or 1."""
    roots = np.sqrt(np.asarray(train, np.float64))
    if X.ndim == 2 and X.shape[0] < X.shape[1]:  # the same rows in every fold
        products = X @ X.T
        matrices = (products * root[:, None] * root for root in roots)
    else:
        weighted = ((X[k] if X.ndim == 3 else X) * root[:, None] for k, root in enumerate(roots))
        matrices = (w @ w.T if w.shape[0] < w.shape[1] else w.T @ w for w in weighted)
    largest = max(float(np.linalg.eigvalsh(matrix)[-1]) for matrix in matrices)
    return 1 / largest if largest > 0 else 1.0


def repeated(X: Float[np.ndarray, "n p"]) -> np.ndarray:
    """For each column the first one that it equals, but for round-off and its sign; itself where there is none before.

    Equal columns under one l1 penalty share a weight in any way: the lasso's predictions are unique, its weights not.
    """
    n, p = X.shape
    sizes = np.sqrt(np.einsum("np,np->p", X, X))
    first = np.arange(p)
    marks = np.abs(np.random.default_rng(0).normal(size=n) @ X)  # equal where columns are
    order, alike = np.argsort(marks, kind="stable"), _ALIKE * sizes * np.sqrt(n)
    order = order[sizes[order] > 0]  # zeros, of which there may be thousands, have no weight
    for here, j in enumerate(order):
        for i in order[here + 1 :]:
            if marks[i] - marks[j] > alike[i] + alike[j]:
                break
            sign = np.sign(X[:, i] @ X[:, j])
            if np.linalg.norm(X[:, i] - sign * X[:, j]) <= _ALIKE * sizes[i]:
                first[[i, j]] = min(first[i], first[j])
    return first


_ALIKE = 1e-10  # relative


def without_repeated(criterion: AbstractCriterion, penalties: Any, groups: Any) -> AbstractCriterion:
    """The criterion with zeros in columns that repeat others, if all have one penalty: weights there are then zero."""
    if groups is not None or penalties != "shared":
        return criterion
    judged: Any = getattr(criterion, "X_val", None)  # folds are judged on the same rows
    rows = np.asarray(criterion.X if judged is None else jnp.concatenate([criterion.X, judged]), np.float64)
    kept = repeated(rows) == np.arange(rows.shape[1])
    if kept.all():
        return criterion
    where: Any = (lambda c: c.X) if judged is None else (lambda c: (c.X, c.X_val))
    return eqx.tree_at(where, criterion, replace_fn=lambda X: jnp.where(kept, X, 0))


def start_below(criterion: AbstractCriterion) -> Float[Array, ""]:
    """log of a tenth of the smallest l1 penalty at which all weights trained on all rows are zero."""
    X, b = criterion.X, criterion.targets
    most = jnp.max(jnp.abs(X.T @ b)) / len(b)
    return jnp.log(jnp.where(most > 0, most, 1) / 10)
