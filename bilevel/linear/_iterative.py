"""Solvers that need products with dF/dy alone."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax import lax

from .._system import spectral_norm
from .._trees import ravel_like
from ..errors import Status
from ..krylov import conjugate_gradient
from ._base import AbstractLinearSolver, LinearSolution, curvature_of


class ConjugateGradient(AbstractLinearSolver):
    """Matrix-free preconditioned conjugate gradients, for `Minimization`: one Hessian-vector product a step.

    **Arguments:** `rtol`: relative residual to stop at; None: what the caller needs. `preconditioner`: None, a
    function v -> M v on y's structure (M near the inverse Hessian, symmetric positive definite), a lineax operator,
    or an object with `prepare(system)` and `apply(state, v)` such as `Nystrom(rank)`. `max_steps`: 10 n + 10.

    A singular Hessian is detected by vanishing Ritz values only: null directions that the right-hand side does not
    excite are missed. On a problem whose dF/dy is not symmetric positive definite it is refused.
    """

    rtol: float | None = None
    preconditioner: Any = None
    max_steps: int | None = eqx.field(static=True, default=None)

    @property
    def limited(self):
        return self.rtol is not None or self.max_steps is not None

    def prepare(self, system):
        if not system.symmetric:
            raise ValueError(
                "bilevel.ConjugateGradient: dF/dy of this inner problem is not symmetric, and conjugate gradients "
                "would be silently wrong; use Krylov() or Direct()."
            )
        return self.preconditioner.prepare(system) if hasattr(self.preconditioner, "prepare") else None

    def _precondition(self, state, system):
        m = self.preconditioner
        if m is None:
            return None
        if hasattr(m, "prepare"):
            return lambda v: m.apply(state, v)
        apply = m.mv if isinstance(m, lx.AbstractLinearOperator) else m
        return lambda v: ravel_like(apply(system.unravel(v)), v.dtype)

    def solve(self, state, system, b, *, transpose=False, rtol=None, guess=None, forcing=None, verify=True):
        eps = float(jnp.finfo(b.dtype).eps)
        wanted = self.rtol if self.rtol is not None else rtol if rtol is not None else 50 * eps
        result = conjugate_gradient(
            system.mv, b, rtol=wanted, guess=guess, forcing=None if self.rtol is not None else forcing,
            preconditioner=self._precondition(state, system), max_steps=self.max_steps, verify=verify,
        )  # fmt: skip
        status = result.status
        if not system.definite:  # symmetric, but negative curvature is no statement about minima there
            saddle = status == Status("not_a_minimum")
            status = Status.where(saddle, Status("linear_solve"), status)
        extra = 2 if guess is not None else 1
        return LinearSolution(result.value, result.residual, status, result.condition, result.steps + extra)

    def approximate(self, state, system, b, *, rtol=0.03, transpose=False):
        return self.solve(state, system, b, transpose=transpose, rtol=rtol, verify=False)


class Krylov(AbstractLinearSolver):
    """Matrix-free solves of a non-symmetric dF/dy: lineax's GMRES (`method="gmres"`) or BiCGStab (`"bicgstab"`).

    **Arguments:** `rtol` as for `ConjugateGradient`; `restart`: GMRES's restart length; `max_steps`: steps, rounded
    up to whole restarts.
    """

    method: str = eqx.field(static=True, default="gmres")
    rtol: float | None = None
    restart: int = eqx.field(static=True, default=50)
    max_steps: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.method not in ("gmres", "bicgstab"):
            raise ValueError(f"bilevel.Krylov: unknown method {self.method!r}; choose 'gmres' or 'bicgstab'.")

    @property
    def limited(self):
        return self.rtol is not None or self.max_steps is not None

    def prepare(self, system):
        return curvature_of(system)

    def solve(self, state, system, b, *, transpose=False, rtol=None, guess=None, forcing=None):
        eps = float(jnp.finfo(b.dtype).eps)
        wanted = self.rtol if self.rtol is not None else rtol if rtol is not None else 50 * eps
        limit = 10 * system.size + 10 if self.max_steps is None else self.max_steps
        b_norm = jnp.linalg.norm(b)
        nothing = b_norm == 0  # lineax's Krylov methods would divide by it
        absolute: Any = jnp.where(nothing, jnp.inf, jnp.asarray(wanted, b.dtype) * b_norm)
        shape = jax.ShapeDtypeStruct(b.shape, b.dtype)
        operator = lx.FunctionLinearOperator(lambda v: system.product(v, transpose), shape)
        if self.method == "gmres":
            restart = max(1, min(self.restart, system.size, limit))
            cycles = -(-limit // restart)  # lineax counts restarts
            solver = lx.GMRES(0.0, absolute, norm=jnp.linalg.norm, max_steps=cycles, restart=restart)
        else:
            solver = lx.BiCGStab(0.0, absolute, norm=jnp.linalg.norm, max_steps=limit)
        options = {} if guess is None else {"y0": guess}
        out = lx.linear_solve(operator, jnp.where(nothing, 1, b), solver, options=options, throw=False)
        value = jnp.where(nothing, 0, out.value)
        residual = b - system.product(value, transpose)
        size = jnp.linalg.norm(residual)
        good = size <= jnp.maximum(10 * absolute, 100 * eps * b_norm)
        status = Status.where(good, Status("converged"), Status("linear_solve"))
        status = Status.where(jnp.isfinite(size), status, Status("singular"))
        status = status if state is None else state.then(status)
        steps = jnp.asarray(out.stats["num_steps"])
        return LinearSolution(value, residual, status, jnp.ones((), b.dtype), steps + 1)


class Neumann(AbstractLinearSolver):
    """The truncated series v = a sum_{k <= terms} (I - a A)^k b: cheap, biased, its residual reported.

    **Arguments:** `terms`: the last power; `step`: a, None: 1 / |A| by power iteration. Lorraine et al. 2020.
    """

    terms: int = eqx.field(static=True)
    step: float | None = None

    @property
    def limited(self):
        return True

    def prepare(self, system):
        if self.step is not None:
            return jnp.asarray(self.step, system.dtype)
        return 1 / spectral_norm(system)

    def solve(self, state, system, b, *, transpose=False, rtol=None, guess=None, forcing=None):
        def body(_, carry):
            total, term = carry
            term = term - state * system.product(term, transpose)
            return total + term, term

        total, _ = lax.fori_loop(0, self.terms, body, (b, b))
        v = state * total
        residual = b - system.product(v, transpose)
        wanted = 0.0 if rtol is None else rtol
        good = jnp.linalg.norm(residual) <= jnp.maximum(
            jnp.asarray(wanted, b.dtype), 100 * jnp.finfo(b.dtype).eps
        ) * jnp.linalg.norm(b)
        status = Status.where(good, Status("converged"), Status("linear_solve"))
        return LinearSolution(v, residual, status, jnp.ones((), b.dtype), jnp.asarray(self.terms + 1))
