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

from . import _inputs as inputs
from . import _potentials as potentials
from ._kernel import Kernel, log_weights
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
            share = tol * _least_root(inner.source_weights[t]) / np.sqrt(inner.count)
            f, _, _, count = potentials.find(kernel, w, y0[t], share)
            found.append(f)
            steps = steps + count
        return Found(tuple(found), jnp.maximum(steps, 1), jnp.maximum(steps, 1))


def _least_root(a: Array) -> Array:
    """Of the smallest weight that is there: |F| <= |a^1/2 F| divided by it."""
    return jnp.sqrt(jnp.min(jnp.where(a > 0, a, jnp.inf)))


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
    balanced, values = zip(
        *(_balanced(steps.kernel(t, jnp.zeros_like(epsilon))) for t in range(steps.count)), strict=True
    )
    return eqx.tree_at(lambda s: (s.balanced, s.values), steps, (tuple(balanced), tuple(values)))


class Balanced(bilevel.AbstractInner):
    """Balanced entropic transport of two snapshots, reduced to the source's potential, with its mean removed."""

    kernel: Kernel

    def optimality(self, x, y):
        a = jnp.exp(self.kernel.log_a)
        return self.kernel.residual(jnp.zeros_like(self.kernel.log_b), y) + jnp.sum(a * y)

    def initial(self):
        return jnp.zeros_like(self.kernel.log_a)

    @property
    def default_solver(self):
        return BalancedSolver()


class BalancedSolver(AbstractSolver):
    """Newton with conjugate gradients."""

    def find(self, inner, x, y0, *, tol, max_steps):
        kernel = inner.kernel
        a = jnp.exp(kernel.log_a)
        f, _, _, count = potentials.find(kernel, jnp.zeros_like(kernel.log_b), y0, tol * _least_root(a))
        f = f - jnp.sum(jnp.where(a > 0, f, 0) * a)
        return Found(f, jnp.maximum(count, 1), jnp.maximum(count, 1))


def _balanced(kernel: Kernel) -> tuple[Array, Array]:
    """The target's potential g, and W_epsilon."""
    if all(inputs.concrete(leaf) for leaf in jax.tree.leaves(kernel)):
        return _concrete(kernel)
    f = bilevel.solve(Balanced(kernel), None, jnp.zeros_like(kernel.log_a)).y
    return _other(kernel, f, kernel.columns(f))


@eqx.filter_jit
def _other(kernel: Kernel, f: Array, columns: Array) -> tuple[Array, Array]:
    a, b, g = jnp.exp(kernel.log_a), jnp.exp(kernel.log_b), -kernel.epsilon * columns
    mean = jnp.sum(jnp.where(a > 0, f, 0) * a)
    g = g + mean  # of the f whose mean is zero
    return g, jnp.sum(jnp.where(b > 0, g, 0) * b)


def _concrete(kernel: Kernel) -> tuple[Array, Array]:
    """The same without the engine's derivative rule, which nobody needs here: compiles and runs faster."""
    eps = float(jnp.finfo(kernel.epsilon.dtype).eps)
    zero = jnp.zeros_like(kernel.log_b)
    f, size, sides, _ = potentials.find(kernel, zero, jnp.zeros_like(kernel.log_a), jnp.asarray(0.0, zero.dtype))
    scale = float(jnp.linalg.norm(jnp.exp(kernel.log_a / 2) * f)) + float(kernel.epsilon)
    if not float(size) <= 1e4 * eps * scale:
        raise bilevel.NotConverged(
            f"flows.InverseJKO: the entropic transport between two snapshots did not converge, its potentials are "
            f"wrong by about {float(size):.1e}; raise `epsilon` (now {float(kernel.epsilon):g}) or scale the points."
        )
    return _other(kernel, f, sides.columns)
