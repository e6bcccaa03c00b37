"""What linear models share: the training of their weights, and the bilevel problem around it."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

import bilevel
from bilevel._precision import WORTH
from bilevel._system import row_curvatures
from bilevel.linear import DENSE_LIMIT
from bilevel.solvers.newton import DampedNewton

from ._criteria import AbstractCriterion, AbstractRows, RowLosses
from ._foldwise import FoldHessian, Foldwise
from ._penalties import AbstractPenalties


@dataclasses.dataclass(frozen=True)
class OfPredictions:
    """Losses of rows (x, X, w, targets) -> (n,) that see the weights, (p,) or (classes, p), through X w' alone:
    `loss(predictions, targets)`, row by row. Their Hessian is made of the rows' curvatures, one product of matrices."""

    loss: Callable

    def __call__(self, x, X, w, targets):
        return self.loss(X @ w.T, targets)

    def hessian(self, X: Float[Array, "n p"], w: Array, targets: Array, weights: Float[Array, " n"]) -> Array:
        """The Hessian of the weighted sum in w, flat."""
        total = lambda predictions: jnp.vdot(weights, self.loss(predictions, targets))
        curvatures = row_curvatures(total, X @ w.T)
        if w.ndim == 1:
            return (X * curvatures[:, None]).T @ X
        classes, p = w.shape
        first, second = np.triu_indices(classes)  # curvatures are symmetric, and so is each block: half of them will do
        scaled = curvatures[:, first, second].T[:, None, :] * X.T
        pairs = (scaled.reshape(-1, len(X)) @ X).reshape(-1, p, p)
        number = np.zeros((classes, classes), int)
        number[first, second] = number[second, first] = np.arange(len(first))
        return jnp.transpose(pairs[number], (0, 2, 1, 3)).reshape(w.size, w.size)


class Training(bilevel.AbstractMinimization):
    """Minimize over the weights the mean training loss plus a quadratic penalty, in every fold.

    A `bilevel.Minimization` that knows where to start and that folds do not interact.
    """

    criterion: AbstractRows
    penalties: AbstractPenalties
    losses: Callable = eqx.field(static=True)

    def objective(self, x: Array, y: Array) -> Float[Array, ""]:
        """The objective, summed over folds."""
        return self.criterion.training(at(x, self.losses), lambda w: self.penalties.ridge(x, w), y)

    def objective_at(self, x, y):
        return self.objective(x, y)

    def initial(self):
        """The weights to start from, with a leading fold axis where there are folds."""
        return self.criterion.initial()

    @property
    def _foldwise(self) -> bool:
        """Whether Hessians are formed, fold by fold. Without folds they are where there is more than one class, whose
        curvatures make them cheap; else the engine's own choice is as good, and knows large data."""
        known = isinstance(self.losses, OfPredictions) and self.criterion.start.ndim == 2
        small = self.criterion.X.size < WORTH
        return self.criterion.start.size <= DENSE_LIMIT and (self.criterion.folds is not None or (known and small))

    def operator_at(self, x, y):
        return FoldHessian(self, x, y) if self._foldwise else None

    def hessians(self, x: Array, y: Array) -> Float[Array, "k s s"]:
        """The Hessian of each fold in its weights. One fold after another it is a few products of matrices; as columns
        of all folds at once, which is what products with dF/dy give, it takes several times as long."""
        own = self.losses.hessian if isinstance(self.losses, OfPredictions) else None
        return self.criterion.hessians(at(x, self.losses), lambda w: self.penalties.ridge(x, w), y, own)

    @property
    def linear_solver(self):
        return Foldwise(self.criterion.folds or 1) if self._foldwise else None

    @property
    def default_solver(self):
        # the linear solver at hand makes its steps cheap, and it compiles faster than L-BFGS
        return DampedNewton() if self._foldwise else None


class AbstractLinearTuning(bilevel.AbstractBilevelProblem):
    """Rows to train on, penalties and the loss of each row; how a model is judged is the subclass's."""

    criterion: eqx.AbstractVar[AbstractRows]
    penalties: eqx.AbstractVar[AbstractPenalties]

    @staticmethod
    @abc.abstractmethod
    def losses(x: Array, X: Float[Array, "n p"], w: Array, targets: Array) -> Float[Array, " n"]:
        """The loss of each row, shape (n,)."""

    @property
    def inner(self) -> Training:
        """The training of the weights, in all folds at once where there are folds."""
        return Training(self.criterion, self.penalties, self.losses)

    def initial(self) -> tuple[Array, Array]:
        """`(x0, y0)` to start from: log-penalties of zero, and weights of zero."""
        return jnp.zeros(self.penalties.shape, self.criterion.X.dtype), self.criterion.initial()

    def refit(self, x: ArrayLike) -> Float[Array, "..."]:
        """The weights trained at x on all rows of `X` and `y`: the model to keep after tuning. Differentiable in x.

        With `cv` these are the rows of all folds; a validation set stays aside. Raises `bilevel.NotConverged`.
        """
        penalties, x = self.penalties.general(jnp.asarray(x, self.criterion.X.dtype))
        inner = Training(self.criterion.everything(), penalties, self.losses)
        return bilevel.solve(inner, x, inner.initial()).y[0]


class AbstractJudgedTuning(AbstractLinearTuning):
    """Judged by the loss it is trained by."""

    criterion: eqx.AbstractVar[AbstractCriterion]

    def outer(self, x: ArrayLike, y: ArrayLike) -> Float[Array, ""]:
        """The mean loss on the validation rows, averaged over folds."""
        return self.criterion.validation(at(jnp.asarray(x), self.losses), jnp.asarray(y))


def at(x: Array, losses: Callable) -> RowLosses:
    """The losses at x."""
    return lambda X, w, targets: losses(x, X, w, targets)


def squared(x: Array, X: Float[Array, "n p"], w: Float[Array, " p"], targets: Float[Array, " n"]) -> Float[Array, " n"]:
    """Half the squared error of each row."""
    return 0.5 * jnp.square(X @ w - targets)
