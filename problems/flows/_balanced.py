"""The part of a loss that is the same for all x: balanced entropic transport of two snapshots."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy.sparse.linalg import ArpackError, svds

import bilevel
from bilevel._precision import full_products
from bilevel.solvers._base import AbstractSolver, Found
from problems import transport

from . import _inputs as inputs
from . import _potentials as potentials
from ._kernel import Kernel, half_squares, least_root


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
        f, _, _, count = potentials.find(kernel, jnp.zeros_like(kernel.log_b), y0, tol * least_root(a))
        f = f - jnp.sum(jnp.where(a > 0, f, 0) * a)
        return Found(f, jnp.maximum(count, 1), jnp.maximum(count, 1))


@full_products()
def balanced(kernel: Kernel, potentials_matter: bool) -> tuple[Array, Array]:
    """The target's potential g and W_epsilon. Unless `potentials_matter`, g may be anyone's guess: where points are so
    far apart that the coupling falls into parts, to round-off nothing determines one part's potential against
    another's, and W_epsilon does not depend on it.

    **Raises:** NotConverged where what is needed was not found.
    """
    if all(inputs.concrete(leaf) for leaf in jax.tree.leaves(kernel)):
        _check_precision(kernel)
        return _concrete(kernel, potentials_matter)
    f = bilevel.solve(Balanced(kernel), None, jnp.zeros_like(kernel.log_a)).y
    return _other(kernel, f, kernel.columns(f))


def _check_precision(kernel: Kernel) -> None:
    """Potentials are epsilon times logarithms of sums near one, and so known to about eps times epsilon. An inner
    residual does not show it, because its own round-off is as large."""
    lost = float(jnp.finfo(kernel.epsilon.dtype).eps * kernel.epsilon)
    largest = float(jnp.max(kernel.cost) * kernel.epsilon)
    if lost > 1e-3 * largest > 0:
        raise bilevel.NotConverged(
            f"flows.InverseJKO: `epsilon` = {float(kernel.epsilon):g} is so large beside the largest cost, "
            f"{largest:.2g}, that {kernel.epsilon.dtype} holds potentials to {lost:.1e} only; lower `epsilon`, or use "
            "float64."
        )


@eqx.filter_jit
def _other(kernel: Kernel, f: Array, columns: Array) -> tuple[Array, Array]:
    a, b, g = jnp.exp(kernel.log_a), jnp.exp(kernel.log_b), -kernel.epsilon * columns
    mean = jnp.sum(jnp.where(a > 0, f, 0) * a)
    g = g + mean  # of the f whose mean is zero
    return g, jnp.sum(jnp.where(b > 0, g, 0) * b)


def _concrete(kernel: Kernel, potentials_matter: bool) -> tuple[Array, Array]:
    """The same without the engine's derivative rule, which nobody needs here: compiles and runs faster."""
    eps = float(jnp.finfo(kernel.epsilon.dtype).eps)
    zero = jnp.zeros_like(kernel.log_b)
    f, size, sides, _ = potentials.find(kernel, zero, jnp.zeros_like(kernel.log_a), jnp.asarray(0.0, zero.dtype))
    size, scale = float(size), float(jnp.linalg.norm(jnp.exp(kernel.log_a / 2) * f)) + float(kernel.epsilon)
    # where epsilon is so small that round-off hides it, any point has a small residual
    found = size <= min(1e4 * eps * scale, 1e-3 * float(kernel.epsilon))
    if not potentials_matter:
        return _other(kernel, f, sides.columns) if found else _by_sweeps(kernel)
    wrong = size
    if found:
        gap = _gap(kernel, sides)
        wrong = max(size, eps * scale) / gap if gap > 0 else np.inf
        found = wrong <= np.sqrt(eps) * scale
    if not found:
        raise bilevel.NotConverged(_message(kernel, "its potentials", wrong))
    return _other(kernel, f, sides.columns)


def _message(kernel: Kernel, what: str, wrong: float) -> str:
    return (
        f"flows.InverseJKO: the entropic transport between two snapshots did not converge, {what} may be wrong by "
        f"{wrong:.1e}; raise `epsilon` (now {float(kernel.epsilon):g}) or scale the points."
    )


def _gap(kernel: Kernel, sides: potentials.Sides) -> float:
    """The smallest eigenvalue of S = I - BB' beside a^1/2: what residuals are divided by in the potentials."""
    B = np.asarray(potentials.normalized(kernel, sides))
    along = np.sqrt(np.exp(np.asarray(kernel.log_a)))
    along /= np.linalg.norm(along)
    B = B - np.outer(along, along @ B)
    if min(B.shape) < 100:
        return 1 - float(np.linalg.norm(B, 2)) ** 2
    start = np.random.default_rng(0).normal(size=min(B.shape)).astype(B.dtype)
    try:
        return 1 - float(np.max(np.asarray(svds(B, 1, v0=start, return_singular_vectors=False)))) ** 2
    except ArpackError:  # many singular values next to 1
        return 0.0


def _by_sweeps(kernel: Kernel) -> tuple[Array, Array]:
    """By the solver of `EntropicOT`, which gets to the right marginals where Newton's systems are singular."""
    a, b = jnp.exp(kernel.log_a), jnp.exp(kernel.log_b)
    cost = half_squares(kernel.source, kernel.target)
    problem = transport.EntropicOT(jax.tree_util.Partial(_given, cost), a, b / jnp.sum(b) * jnp.sum(a), kernel.epsilon)
    (f, g), wrong = _swept(problem)
    found = _other(kernel, f, kernel.columns(f))
    # sums that are off by some mass move W by at most that mass times the range of what is paid for it
    bound = float(wrong * (jnp.max(cost) + jnp.max(g) - jnp.min(g)))
    if not bound <= np.sqrt(jnp.finfo(f.dtype).eps) * (abs(float(found[1])) + float(kernel.epsilon)):
        raise bilevel.NotConverged(_message(kernel, "its value", bound))
    return found


def _given(cost, x):
    return cost


@eqx.filter_jit
def _swept(problem: transport.EntropicOT):
    y0 = problem.initial()
    tol = 1e3 * jnp.finfo(y0[0].dtype).eps * jnp.linalg.norm(problem.a)
    y = problem.default_solver.find(problem, None, y0, tol=tol, max_steps=1000).y
    rows, columns = problem.marginals(None, y)
    return y, jnp.sum(jnp.abs(rows - problem.a)) + jnp.sum(jnp.abs(columns - problem.b))
