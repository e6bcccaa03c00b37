"""What models with a kink share: a smooth loss, a prox, and weights of which most are zero."""

from __future__ import annotations

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

import bilevel
from bilevel._support import SupportAware, inverse_curvature
from bilevel.linear import DENSE_LIMIT
from bilevel.prox import AbstractProx

from ._coordinate_descent import CoordinateDescent, available
from ._criteria import AbstractCriterion
from ._foldwise import Foldwise
from ._linear import at, squared

HOST = 2000
"""Number of weights, over all folds, from which on an unnamed solver is scikit-learn's coordinate descent."""


CG_STEPS = 150
"""Steps of conjugate gradients on a support, where the system is too large to be solved densely."""


class Smooth(eqx.Module):
    """Half the mean squared error on the training rows, summed over folds."""

    criterion: AbstractCriterion

    def __call__(self, x: Array, y: Array) -> Float[Array, ""]:
        return self.criterion.training(at(x, squared), lambda w: jnp.zeros((), w.dtype), y)


class SparseTraining(bilevel.AbstractInner):
    """A `bilevel.Composite` that knows where to start: half the mean squared error plus what `prox` is the prox of.

    `weights(x)`, where it is not None, are those of |w_j| and w_j^2 / 2, for solvers that know the elastic net only:
    from `host` weights on, over all folds, scikit-learn's coordinate descent is called. `step`: as for `Composite`.
    """

    composite: bilevel.Composite
    criterion: AbstractCriterion
    weights: Any
    host: int = eqx.field(static=True)

    def __init__(
        self, criterion: AbstractCriterion, prox: AbstractProx, weights: Any = None, host: int = HOST, step: Any = None
    ):
        self.host = host
        self.composite = bilevel.Composite(Smooth(criterion), prox, step=step)
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
        folds = self.criterion.folds
        if folds and self.criterion.start.size * folds <= DENSE_LIMIT:  # K small factorizations instead of a large one
            return Foldwise(folds)
        # on a support that is not the solution's the system may be singular: the solver is asked before CG is done
        return SupportAware(max_steps=CG_STEPS)

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


@eqx.filter_jit
def step_length(criterion: AbstractCriterion) -> Float[Array, ""]:
    """1 / L of the mean squared error, once: it is the same at all weights."""
    return inverse_curvature(Smooth(criterion), jnp.zeros((), criterion.X.dtype), criterion.initial())


def start_below(criterion: AbstractCriterion) -> Float[Array, ""]:
    """log of a tenth of the smallest l1 penalty at which all weights trained on all rows are zero."""
    X, b = criterion.X, criterion.targets
    most = jnp.max(jnp.abs(X.T @ b)) / len(b)
    return jnp.log(jnp.where(most > 0, most, 1) / 10)
