"""What the tuning of models that are linear in their weights has in common: inner problem, outer function, start."""

from __future__ import annotations

import abc

import equinox as eqx
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

import bilevel
from bilevel.linear import DENSE_LIMIT
from bilevel.solvers.newton import DampedNewton

from ._criteria import AbstractCriterion, RowLoss
from ._foldwise import Foldwise
from ._penalties import Penalties


class Training(bilevel.AbstractInner):
    """Minimize over the weights the mean training loss plus (1/2p) sum_j exp(x_j) w_j^2, in every fold.

    A `bilevel.Minimization` that knows where to start and that folds do not interact.
    """

    criterion: AbstractCriterion
    penalties: Penalties
    loss: RowLoss = eqx.field(static=True)

    def objective(self, x: Array, y: Array) -> Float[Array, ""]:
        """The objective, summed over folds."""
        return self.criterion.training(self.loss, lambda w: self.penalties.ridge(x, w), y)

    @property
    def _minimization(self) -> bilevel.Minimization:
        return bilevel.Minimization(self.objective)

    def optimality(self, x, y):
        return self._minimization.optimality(x, y)

    def objective_at(self, x, y):
        return self.objective(x, y)

    def check(self, x, y):
        self._minimization.check(x, y)

    def initial(self):
        """Zero weights, of shape (p,) or (folds, p)."""
        return self.criterion.initial()

    @property
    def minimizes(self):
        return True

    @property
    def symmetric(self):
        return True

    @property
    def definite(self):
        return True

    @property
    def linear_solver(self):
        folds = self.criterion.folds
        small = self.criterion.X.shape[1] <= DENSE_LIMIT
        return Foldwise(folds) if folds is not None and small else None

    @property
    def default_solver(self):
        # the linear solver at hand makes its steps cheap, and it compiles faster than L-BFGS
        return None if self.linear_solver is None else DampedNewton()


class AbstractLinearTuning(bilevel.AbstractBilevelProblem):
    """A criterion, penalties and a loss per row: `loss(prediction, target)`, elementwise."""

    criterion: eqx.AbstractVar[AbstractCriterion]
    penalties: eqx.AbstractVar[Penalties]

    @staticmethod
    @abc.abstractmethod
    def loss(prediction: Float[Array, " n"], target: Float[Array, " n"]) -> Float[Array, " n"]:
        """The loss of each row, shape (n,)."""

    @property
    def inner(self) -> Training:
        """The training of the weights, in all folds at once where there are folds."""
        return Training(self.criterion, self.penalties, self.loss)

    def outer(self, x: ArrayLike, y: ArrayLike) -> Float[Array, ""]:
        """The mean loss on the validation rows, averaged over folds."""
        return self.criterion.validation(self.loss, jnp.asarray(y))

    def initial(self) -> tuple[Array, Array]:
        """`(x0, y0)`: zeros of the problem's shapes and dtype."""
        return jnp.zeros(self.penalties.shape, self.criterion.X.dtype), self.criterion.initial()

    def refit(self, x: ArrayLike) -> Float[Array, " p"]:
        """The weights trained at x on all rows of `X` and `y`: the model to keep after tuning. Differentiable in x.

        With `cv` these are the rows of all folds; a validation set stays aside. Raises `bilevel.NotConverged`.
        """
        inner = Training(self.criterion.everything(), self.penalties.unshared(), self.loss)
        x = self.penalties.per_feature(jnp.asarray(x, self.criterion.X.dtype))  # one compilation for all kinds
        return bilevel.solve(inner, x, inner.initial()).y[0]
