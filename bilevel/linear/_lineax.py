"""Lineax's solvers, with the checks that they do not make."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import lineax as lx

from .._system import shifted, size_along
from .._trees import ravel_like
from ..errors import Status
from ._base import AbstractLinearSolver, LinearSolution, curvature_of, refine


class Lineax(AbstractLinearSolver):
    """Any lineax solver, on the operator the problem declares, or on dF/dy from autodiff."""

    solver: lx.AbstractLinearSolver

    def _operator(self, system):
        declared = system.operator
        if self._declared(system):
            return declared
        tags = [lx.symmetric_tag] if system.symmetric else []
        tags += [lx.positive_semidefinite_tag] if system.definite else []
        shape = jax.ShapeDtypeStruct((system.size,), system.dtype)
        if declared is None:
            return lx.FunctionLinearOperator(system.mv, shape, tags=tuple(tags))
        # singular along the gauge: shifted there, as the products of the system are
        flat = lambda v: ravel_like(declared.mv(system.unravel(v)), v.dtype)
        size, _ = size_along(flat, system.gauge, jnp.zeros((system.size,), system.dtype))
        return lx.FunctionLinearOperator(shifted(flat, system.gauge, size), shape, tags=tuple(tags))

    def _declared(self, system) -> bool:
        return system.operator is not None and system.gauge is None

    @property
    def limited(self):
        return isinstance(self.solver, (lx.CG, lx.BiCGStab, lx.GMRES))

    def prepare(self, system):
        operator = self._operator(system)
        mv = system.mv
        if self._declared(system):  # its products are the cheap ones
            mv = lambda v: ravel_like(operator.mv(system.unravel(v)), v.dtype)
        return operator, self.solver.init(operator, {}), curvature_of(system, mv)

    def solve(self, state, system, b, *, transpose=False, rtol=None, guess=None, forcing=None):
        operator, prepared, curvature = state
        if transpose:
            operator = operator.transpose()
            prepared, _ = self.solver.transpose(prepared, {})
        flat = not self._declared(system)

        def apply(r):
            out = lx.linear_solve(operator, r if flat else system.unravel(r), self.solver, state=prepared, throw=False)
            value = out.value if flat else ravel_like(out.value, r.dtype)
            failed = out.result == lx.RESULTS.singular
            return jnp.where(failed, jnp.nan, value)

        first = apply(system.off_gauge(b))
        finite = jnp.all(jnp.isfinite(first))
        status = curvature.then(Status.where(finite, Status("converged"), Status("singular")))
        first = jnp.where(finite, first, 0)
        one = jnp.ones((), b.dtype)
        if isinstance(self.solver, (lx.CG, lx.BiCGStab, lx.GMRES)):  # an iterative solver's tolerance is the user's
            residual = b - system.product(first, transpose)
            wanted = jnp.maximum(jnp.asarray(self.solver.rtol, b.dtype), 100 * jnp.finfo(b.dtype).eps)
            good = jnp.linalg.norm(residual) <= 10 * wanted * jnp.linalg.norm(b)
            status = Status.where(good | ~finite, status, Status("linear_solve"))
            return LinearSolution(first, residual, status, one, jnp.asarray(1))
        return refine(
            lambda r: apply(system.off_gauge(r)), system, system.off_gauge(b), transpose=transpose, rtol=rtol,
            guess=first if guess is None else guess, condition=one, status=status,
        )  # fmt: skip
