"""What `LeaveOneOut` minimizes inside: the losses of all folds, each without a snapshot."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

import bilevel
from bilevel.solvers import DampedNewton
from bilevel.solvers._base import AbstractSolver

from ._penalties import L1
from ._snapshots import SOFT, Steps
from .inverse import InverseJKO


class Fit(eqx.Module):
    """The inner objective. y: one theta for each fold, (folds, K); where the steps have no closed form a pair of that
    and of their potentials, one array (folds, n_t) for each step, which are unknowns as well: theta and potentials
    minimize one convex function together ((6.3) of docs/theory/flows.md), and no step is solved inside another solve.
    """

    model: InverseJKO
    masks: Float[Array, "folds steps"]
    tune: tuple[str, ...] = eqx.field(static=True)

    @property
    def joint(self) -> bool:
        """Whether the potentials are unknowns."""
        return self.model.inner.mode == SOFT

    def setting(self, x: dict) -> tuple[Steps, Any]:
        """The steps and the l1 weight at x."""
        model = self.model
        epsilon = jnp.exp(x["epsilon"]) if "epsilon" in self.tune else model.epsilon
        strength = model.inner.strength
        if "sharpening" in self.tune:
            strength = strength - model.sharpening + jnp.exp(x["sharpening"])
        steps = eqx.tree_at(lambda s: (s.epsilon, s.strength), model.inner, (epsilon, strength))
        weight = jnp.exp(x["l1"]) if "l1" in self.tune else getattr(model.penalty_, "weight", None)
        return steps, weight

    def theta(self, y: PyTree) -> Float[Array, "folds K"]:
        """The coefficients in y."""
        return y[0] if self.joint else y

    def initial(self) -> PyTree:
        """Zeros."""
        folds, dtype = len(self.masks), self.model.epsilon.dtype
        theta = jnp.zeros((folds, *self.model.initial()[0].shape), dtype)
        parts = tuple(jnp.zeros((folds, len(a)), dtype) for a in self.model.inner.source_weights)
        return (theta, parts) if self.joint else theta

    def __call__(self, x: dict, y: PyTree) -> Float[Array, ""]:
        """The loss of each fold, summed over folds, up to constants of y."""
        steps, _ = self.setting(x)

        def closed(theta, mask):
            start = steps.initial()
            f = jax.tree.map(lambda a, r: a - r, start, steps.optimality(theta, start))
            return sum(mask[t] * steps.loss(theta, f, t) for t in range(steps.count))

        def joint(theta, parts, mask):
            scales = scaling(steps)
            f = [v * s for v, s in zip(parts, scales, strict=True)]
            unused = [
                0.5 * jnp.sum(jnp.where(s > 0, 1 - mask[t], 1) * v**2)
                for t, (v, s) in enumerate(zip(parts, scales, strict=True))
            ]
            return sum(mask[t] * steps.loss(theta, f, t) + unused[t] for t in range(steps.count))

        if self.joint:
            return jnp.sum(jax.vmap(joint)(y[0], y[1], self.masks))
        return jnp.sum(jax.vmap(closed)(y, self.masks))


def scaling(steps: Steps) -> list[Array]:
    """What the unknowns of each step are multiplied with to be potentials: their Hessian then is S, of size 1. Zero for
    points that are not there."""
    return [jnp.where(a > 0, jnp.sqrt(steps.epsilon / jnp.where(a > 0, a, 1)), 0) for a in steps.source_weights]


class Shrink(eqx.Module):
    """The prox of the l1 penalty, whose weight x may hold."""

    fit: Fit

    def __call__(self, x: dict, v: PyTree, t: Any) -> PyTree:
        shrunk = L1(self.fit.setting(x)[1]).prox(self.fit.theta(v), t)
        return (shrunk, v[1]) if self.fit.joint else shrunk


class Joint(bilevel.AbstractMinimization):
    """theta and potentials of all folds."""

    fit: Fit

    def objective_at(self, x, y):
        return self.fit(x, y)

    @property
    def default_solver(self):
        return JointSolver()

    def initial(self):
        return self.fit.initial()


class JointSolver(AbstractSolver):
    """Sweeps of each step's potentials at the theta given, then Newton in everything."""

    sweeps: int = eqx.field(static=True, default=30)

    def find(self, inner, x, y0, *, tol, max_steps):
        steps, _ = inner.fit.setting(x)
        theta, parts = y0

        def swept(theta, parts, t, scale):
            kernel, w = steps.kernel(t), steps.work(theta, t)
            f = jax.lax.fori_loop(0, self.sweeps, lambda _, f: f - kernel.residual(w, f), parts * scale)
            return jnp.where(scale > 0, f / jnp.where(scale > 0, scale, 1), 0)

        started = tuple(
            mask[:, None] * jax.vmap(lambda a, v, t=t, s=scale: swept(a, v, t, s))(theta, v)
            for t, (v, scale, mask) in enumerate(zip(parts, scaling(steps), inner.fit.masks.T, strict=True))
        )
        return DampedNewton().find(inner, x, (theta, started), tol=tol, max_steps=max_steps)
