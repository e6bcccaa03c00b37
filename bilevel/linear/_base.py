"""The interface of a linear solver, refinement, and the search for negative curvature."""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from .._system import LinearSystem
from ..errors import Status
from ..krylov import conjugate_gradient


class LinearSolution(NamedTuple):
    """A solution with its recomputed residual b - A v (a vector), status, an estimate of the condition number seen
    (a lower bound) and the number of products with dF/dy it took."""

    value: jax.Array
    residual: jax.Array
    status: Status
    condition: jax.Array
    products: jax.Array

    @property
    def usable(self) -> jax.Array:
        """The value can be used, its residual taken into account (converged, or merely stopped short)."""
        return (self.status.code == 0) | (self.status.code == Status("linear_solve").code)


class AbstractLinearSolver(eqx.Module):
    """Interface of a linear solver: `prepare(system)` once, `solve(state, system, b, …)` often."""

    @abc.abstractmethod
    def prepare(self, system: LinearSystem) -> PyTree:
        """What can be computed once and still helps nearby: a factorization, a preconditioner."""

    def cost(self, system: LinearSystem) -> int:
        """The number of products that `prepare` takes."""
        return 0

    @abc.abstractmethod
    def solve(self, state, system, b, *, transpose=False, rtol=None, guess=None, forcing=None) -> LinearSolution:
        """Solves A v = b (or A' v = b), A of `system`, to |b - A v| <= rtol |b|; `forcing` as in `krylov.py`."""

    def approximate(self, state, system, b, *, rtol: Any = 0.03, transpose: bool = False) -> LinearSolution:
        """A solution to about `rtol` (a stale state as good as it is), its residual not tested: for error estimates,
        and for callers who look at the residual themselves."""
        return self.solve(state, system, b, transpose=transpose, rtol=rtol)

    def once(self, system: LinearSystem, b: jax.Array) -> LinearSolution:
        """`approximate` where nothing is kept for another right-hand side."""
        return self.approximate(self.prepare(system), system, b)

    @property
    def limited(self) -> bool:
        """Whether the user set its accuracy or its steps: then its answer is taken as it is, error and all."""
        return False

    @property
    def keeps(self) -> bool:
        """Whether the prepared state does most of the work, and is worth keeping at nearby points."""
        return False


def refine(apply, system: LinearSystem, b, *, transpose, rtol, guess, condition, status) -> LinearSolution:
    """v <- v + P^-1 (b - A v) while it contracts: exact solves with a stale or approximate P."""
    b_norm = jnp.linalg.norm(b)
    eps = jnp.finfo(b.dtype).eps
    # without a tolerance: until round-off, but at most a few refinements
    target = (4 * eps if rtol is None else jnp.maximum(jnp.asarray(rtol, b.dtype), 4 * eps)) * b_norm
    v = apply(b) if guess is None else guess
    r = b - system.product(v, transpose)

    def unfinished(carry):
        _, _, size, last, count = carry
        return (size > target) & (size < 0.7 * last) & (count < 20)

    def body(carry):
        v, r, size, _, count = carry
        new_v = v + apply(r)
        new_r = b - system.product(new_v, transpose)
        new_size = jnp.linalg.norm(new_r)
        better = new_size < size
        v, r = jnp.where(better, new_v, v), jnp.where(better, new_r, r)
        return v, r, jnp.where(better, new_size, size), size, count + 1

    size = jnp.linalg.norm(r)
    v, r, size, _, count = lax.while_loop(unfinished, body, (v, r, size, jnp.full_like(size, jnp.inf), jnp.asarray(1)))
    # round-off allows eps |A| |v|, which for a |v| much larger than |b| is more than eps |b|
    allowed = jnp.maximum(target, 100 * eps * condition * b_norm)
    good = size <= allowed
    status = status.then(Status.where(good, Status("converged"), Status("linear_solve")))
    return LinearSolution(v, r, status, condition, count)


_PROBES = 64  # steps of the search for negative curvature


def curvature_status(mv, start: jax.Array) -> Status:
    """`not_a_minimum` where conjugate gradients from `start` meet negative curvature, which others do not see."""
    found = conjugate_gradient(mv, start, rtol=1e-8, max_steps=min(_PROBES, start.size), verify=False)
    return Status.where(found.status == Status("not_a_minimum"), found.status, Status())


def curvature_of(system: LinearSystem, mv=None) -> Status:
    if not system.definite:
        return Status()
    start = jnp.cos(jnp.arange(1, system.size + 1, dtype=system.dtype))
    return curvature_status(system.mv if mv is None else mv, start)
