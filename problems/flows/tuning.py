"""Choosing epsilon, the sharpening and the l1 weight by hypergradients: three levels deep."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

import bilevel

from . import _inputs as inputs
from ._folds import Fit, Joint, Shrink
from ._penalties import L1
from ._snapshots import LIMIT, SOFT
from .features import Linear
from .inverse import InverseJKO
from .scores import mmd
from .simulate import simulate

OWNER = "flows.LeaveOneOut"
WORDS = ("epsilon", "sharpening", "l1")


class LeaveOneOut(bilevel.AbstractBilevelProblem):
    """Leave-one-snapshot-out: the mean squared MMD of one-step forecasts of snapshots that were left out of the fit.

    The innermost problem finds the potentials of the steps, the inner one theta for each fold, y of shape
    (folds, K); the outer variable x is a dict of logarithms, of those of "epsilon", "sharpening" and "l1" named in
    `tune`. Fold s fits without snapshot s (without the steps to and from it), and forecasts it from snapshot s - 1.
    With a positive sharpening (or internal energy) the two inner levels are one: they minimize one convex function of
    theta and potentials, y is a pair of both, the potentials (folds, n_t) for each step.

    **Arguments:** `model`: an `InverseJKO` with features linear in theta and finite sharpening; what is not tuned
    stays as it is there, what is tuned starts there. `snapshots`: those of the model.

    **Raises:** ValueError, TypeError naming the argument.
    """

    model: InverseJKO
    clouds: tuple[Array, ...]
    masks: Float[Array, "folds steps"]
    folds: tuple[int, ...] = eqx.field(static=True)
    tune: tuple[str, ...] = eqx.field(static=True)

    def __init__(self, model: InverseJKO, snapshots: Any, tune: Any = ("epsilon",)):
        if not isinstance(model, InverseJKO):
            raise TypeError(f"{OWNER}: `model` must be a flows.InverseJKO, found {type(model).__name__}.")
        self.tune = (tune,) if isinstance(tune, str) else tuple(tune)
        wrong = [word for word in self.tune if word not in WORDS]
        if wrong or not self.tune:
            raise ValueError(f"{OWNER}: `tune` must name some of {WORDS}, found {wrong or self.tune}.")
        if model.inner.designs is None or model.inner.mode == LIMIT:
            raise ValueError(f"{OWNER}: `model` needs features linear in theta, and a finite sharpening.")
        if "sharpening" in self.tune and not (model.inner.mode == SOFT and float(model.sharpening) > 0):
            raise ValueError(f"{OWNER}: to tune the sharpening, start from a model with a positive one.")
        if "l1" in self.tune and not (isinstance(model.penalty_, L1) and model.penalty_.weight.shape == ()):
            raise ValueError(f"{OWNER}: to tune the l1 weight, start from a model with penalty=L1(weight), one number.")
        self.model, self.clouds = model, inputs.snapshots(OWNER, snapshots)
        steps, count = model.inner.count, len(self.clouds)
        if steps != count - 1:
            raise ValueError(f"{OWNER}: `snapshots` must be those of the model, {steps + 1}, found {count}.")
        touched = [[s in (t, t + 1) for t in range(steps)] for s in range(1, count)]
        self.folds = tuple(s for s, row in enumerate(touched, 1) if not all(row))
        if not self.folds:
            raise ValueError(f"{OWNER}: leaving a snapshot out leaves no step to fit; give at least three `snapshots`.")
        rows = [[0.0 if hit else 1.0 for hit in touched[s - 1]] for s in self.folds]
        self.masks = jnp.asarray(rows, model.epsilon.dtype)

    @property
    def fit(self) -> Fit:
        """The inner objective."""
        return Fit(self.model, self.masks, self.tune)

    @property
    def inner(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """theta of all folds: a minimization, with an l1 penalty a composite one."""
        if self.model.penalty_ is not None:
            return bilevel.Composite(self.fit, Shrink(self.fit))
        return Joint(self.fit) if self.fit.joint else bilevel.Minimization(self.fit)

    def outer(self, x: dict, y: PyTree) -> Float[Array, ""]:
        """The mean over folds of the squared MMD between forecast and snapshot."""
        potential, sizes = self.model.inner.potential, self.model.inner.step_sizes
        assert isinstance(potential, Linear)
        thetas = self.fit.theta(y)
        total = jnp.zeros((), thetas.dtype)
        for row, s in enumerate(self.folds):
            theta = thetas[row, : potential.count]
            path = simulate(potential, theta, self.clouds[s - 1], steps=1, step_size=sizes[s - 1])
            total = total + mmd(path[-1], self.clouds[s])
        return total / len(self.folds)

    def initial(self) -> tuple[dict, PyTree]:
        """`(x0, y0)`: the logarithms of the model's own numbers, and zeros."""
        model = self.model
        own = {"epsilon": model.epsilon, "sharpening": model.sharpening, "l1": getattr(model.penalty_, "weight", None)}
        x0 = {word: jnp.log(jnp.asarray(own[word], model.epsilon.dtype)) for word in self.tune}
        return x0, self.fit.initial()

    def chosen(self, x: dict) -> dict[str, float]:
        """The numbers at x themselves, not their logarithms."""
        return {word: float(np.exp(x[word])) for word in self.tune}
