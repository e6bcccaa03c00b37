"""All steps between consecutive snapshots as one inner problem: they share x and no unknowns."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

import bilevel
from bilevel.solvers._base import AbstractSolver, Found

from . import _potentials as potentials
from ._balanced import balanced
from ._kernel import Kernel, least_root, log_weights
from ._solver import Identity
from .features import Linear

CLOSED, SOFT, LIMIT = "closed", "soft", "limit"


class Steps(bilevel.AbstractInner):
    """y = one potential f_t of shape (n_t,) for each step; at sharpening = inf one intercept each, shape (steps,).

    `weights` are the targets', `designs` the features at the targets, (m_t, K), or None for a potential of another
    kind; `offsets` the known part of the work; `strength` = sharpening + kappa; `balanced` the potential g of each
    target, (m_t,), and `values` W_epsilon of each step: (6.1) of docs/theory/flows.md.
    """

    sources: tuple[Array, ...]
    targets: tuple[Array, ...]
    source_weights: tuple[Array, ...]
    weights: tuple[Array, ...]
    potential: Any
    designs: tuple[Array, ...] | None
    offsets: tuple[Array, ...] | None
    step_sizes: Float[Array, " steps"]
    epsilon: Float[Array, ""]
    strength: Float[Array, ""]
    balanced: tuple[Array, ...]
    values: tuple[Array, ...]
    mode: str = eqx.field(static=True)

    # ------------------------------------------------------------------------------------------------ one step

    @property
    def count(self) -> int:
        """How many steps there are."""
        return len(self.targets)

    def kernel(self, t: int, ratio: Any = None) -> Kernel:
        """Points, weights and numbers of step t."""
        if ratio is None:
            one = jnp.ones_like(self.epsilon)
            ratio = one if self.mode == CLOSED else self.epsilon / (self.epsilon + self.strength)
        a, b = log_weights(self.source_weights[t]), log_weights(self.weights[t])
        return Kernel(self.sources[t], self.targets[t], a, b, self.epsilon, ratio)

    def work(self, x: PyTree, t: int) -> Float[Array, " m"]:
        """step_size V (and what is known besides) at the target's points."""
        if self.designs is not None:
            values = self.designs[t] @ x
        else:
            values = jax.vmap(lambda z: self.potential(x, z))(self.targets[t])
        w = self.step_sizes[t] * values.astype(self.epsilon.dtype)
        return w if self.offsets is None else w + self.offsets[t]

    def loss(self, x: PyTree, y: PyTree, t: int) -> Float[Array, ""]:
        """The loss of step t at the potential (or intercept) y_t."""
        w, b = self.work(x, t), self.weights[t]
        if self.mode == LIMIT:
            return 0.5 * jnp.vdot(b, jnp.square(self.balanced[t] + w - y[t]))
        return jnp.vdot(b, w) + self.values[t] - self.kernel(t).dual(w, y[t])

    def new_weights(self, x: PyTree, y: PyTree, t: int) -> Float[Array, " m"]:
        """The model's weights of the target."""
        return self.kernel(t).weights(self.work(x, t), y[t])

    # ------------------------------------------------------------------------------------------------ the engine's

    def optimality(self, x, y):
        if self.mode == LIMIT:
            means = [jnp.vdot(self.weights[t], self.balanced[t] + self.work(x, t)) for t in range(self.count)]
            return y - jnp.stack(means)
        return tuple(self.kernel(t).residual(self.work(x, t), y[t]) for t in range(self.count))

    def initial(self):
        """Zeros."""
        if self.mode == LIMIT:
            return jnp.zeros_like(self.step_sizes)
        return tuple(jnp.zeros_like(a) for a in self.source_weights)

    @property
    def linear_solver(self):
        return None if self.mode == SOFT else Identity()

    @property
    def default_solver(self):
        return SnapshotSolver()

    def check(self, x, y):
        if self.designs is not None:
            shape, wanted = np.shape(x), self.designs[0].shape[1:]
            if shape != wanted:
                raise ValueError(f"bilevel.InverseJKO: theta must have shape {wanted}, found {shape}.")
        super().check(x, y)


class SnapshotSolver(AbstractSolver):
    """Each step by itself: closed forms, else Newton with conjugate gradients."""

    def find(self, inner, x, y0, *, tol, max_steps):
        one = jnp.asarray(1)
        if inner.mode != SOFT:
            return Found(jax.tree.map(lambda y, r: y - r, y0, inner.optimality(x, y0)), one, one)
        found, steps = [], jnp.asarray(0)
        for t in range(inner.count):
            kernel, w = inner.kernel(t), inner.work(x, t)
            share = tol * least_root(inner.source_weights[t]) / np.sqrt(inner.count)
            f, _, _, count = potentials.find(kernel, w, y0[t], share)
            found.append(f)
            steps = steps + count
        return Found(tuple(found), jnp.maximum(steps, 1), jnp.maximum(steps, 1))


def make_steps(
    sources, targets, source_weights, weights, potential, offsets, step_sizes, epsilon, strength, mode
) -> Steps:
    """The inner problem: features evaluated once, balanced potentials found once."""
    designs = None
    if isinstance(potential, Linear):
        designs = tuple(jax.vmap(potential.features)(z).astype(z.dtype) for z in targets)
    steps = Steps(
        sources, targets, source_weights, weights, potential, designs, offsets, step_sizes, epsilon, strength, (), (),
        mode,
    )  # fmt: skip
    others, values = zip(
        *(balanced(steps.kernel(t, jnp.zeros_like(epsilon)), mode == LIMIT) for t in range(steps.count)), strict=True
    )
    return eqx.tree_at(lambda s: (s.balanced, s.values), steps, (tuple(others), tuple(values)))
