"""Kernel models of a search: kernel ridge and support vector classification in every fold at once."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import bilevel
from bilevel.solvers import ClosedForm
from bilevel.solvers.newton import DampedNewton

from ._foldwise import FoldHessian, Foldwise
from ._kernels import fold_matrices
from ._search_families import Mixing

WIDTH = 0.5
"""The hinge is a parabola at margins from 1 - WIDTH to 1 + WIDTH, so that its solution can be differentiated."""


class Kernel(eqx.Module):
    """x = (…, log gammas), relative to `offset`, -> exp(-sum_j gamma_j (p_j - q_j)^2) in every fold; `fixed` (K, n, n)
    instead of features where the kernel has nothing to tune."""

    X: Float[Array, "k n d"]
    mixing: Mixing
    offset: Float[Array, " q"]
    spread: Float[Array, "d q"]
    fixed: Float[Array, "k n n"] | None

    def __call__(self, x: Array) -> Float[Array, "k n n"]:
        if self.fixed is not None:
            return self.fixed
        roots = jnp.exp(0.5 * (self.spread @ (self.mixing(x) + self.offset)))

        def one(X):
            Z = X * roots
            squares = jnp.sum(Z * Z, 1)
            return jnp.exp(-jnp.maximum(squares[:, None] + squares[None, :] - 2 * (Z @ Z.T), 0))

        return jax.vmap(one)(self.X)

    def penalty(self, x: Array) -> Float[Array, ""]:
        """exp of the first entry: alpha, or C."""
        return jnp.exp(x[0] + self.offset[0])


class KernelRidgeTraining(bilevel.AbstractInner):
    """(K + alpha / r) c = b on the rows with weight r > 0, c = 0 on the others; y of shape (folds, n)."""

    kernel: Kernel
    targets: Float[Array, " n"]
    train: Float[Array, "k n"]

    def optimality(self, x, y):
        alpha, here = self.kernel.penalty(x), self.train > 0
        a = jnp.where(here, y, 0)
        fitted = jnp.einsum("knm,km->kn", self.kernel(x), a)
        residual = fitted + alpha * y / jnp.where(here, self.train, 1) - self.targets
        return jnp.where(here, residual, y)

    def operator_at(self, x, y):
        return FoldHessian(self, x, y)

    def hessians(self, x: Array, y: Array) -> Float[Array, "k n n"]:
        """The matrix of each fold's system."""
        return fold_matrices(self.kernel(x), self.kernel.penalty(x), self.train)

    @property
    def symmetric(self):
        return True

    @property
    def definite(self):
        return True

    @property
    def linear_solver(self):
        return Foldwise(len(self.train))

    @property
    def default_solver(self):
        return ClosedForm(_stay)

    def initial(self):
        return jnp.zeros_like(self.train)


class SupportVectorTraining(bilevel.AbstractInner):
    """a_i = C r_i s_i phi(1 - s_i f_i), f = (K + 1) a: the dual coefficients of a support vector classifier whose hinge
    is rounded, phi its derivative, and whose intercept is penalized like a weight; y of shape (folds, n)."""

    kernel: Kernel
    targets: Float[Array, " n"]
    train: Float[Array, "k n"]

    def optimality(self, x, y):
        scores = jnp.einsum("knm,km->kn", self.kernel(x) + 1, y)
        slope = jnp.clip((1 - self.targets * scores + WIDTH) / (2 * WIDTH), 0, 1)
        return y - self.kernel.penalty(x) * self.train * self.targets * slope

    @property
    def linear_solver(self):
        return Foldwise(len(self.train))

    @property
    def default_solver(self):
        return DampedNewton()

    def initial(self):
        return jnp.zeros_like(self.train)


class KernelJudge(eqx.Module):
    """The mean over folds of a loss of kernel predictions."""

    kernel: Kernel
    targets: Float[Array, " n"]
    judge: Float[Array, "k n"]
    losses: Callable = eqx.field(static=True)  # (scores, targets) -> rows
    intercept: float = eqx.field(static=True)  # what is added to the kernel

    def __call__(self, x: Array, y: Array) -> Float[Array, ""]:
        scores = jnp.einsum("knm,km->kn", self.kernel(x) + self.intercept, y)
        return jnp.mean(jnp.sum(self.judge * self.losses(scores, self.targets), axis=1))


def _stay(x: Array, y0: Array) -> Array:
    return y0


def mean_squared(scores, targets):
    return jnp.square(scores - targets)


def logistic(scores, targets):
    return jax.nn.softplus(-targets * scores)
