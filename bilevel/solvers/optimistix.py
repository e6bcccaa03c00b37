"""optimistix: any of its minimizers, root finders, least-squares and fixed-point solvers (an optional package)."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp

from .._trees import ravel, ravel_like
from ._base import AbstractSolver, Found


def is_optimistix(solver: Any) -> bool:
    """Whether the object is an optimistix solver, without importing optimistix."""
    if "optimistix" not in sys.modules:
        return False
    import optimistix as optx

    kinds = (optx.AbstractMinimiser, optx.AbstractRootFinder, optx.AbstractFixedPointSolver)
    return isinstance(solver, (*kinds, optx.AbstractLeastSquaresSolver))


class Optimistix(AbstractSolver):
    """Wraps `solver`, an optimistix object. Its own rtol and atol say when it stops; `tol` ends it no earlier, so
    give it the tolerance you want of the loose part (the correction and the error estimate do the rest).
    """

    solver: Any

    @property
    def exact(self) -> bool:
        return True

    def check(self, inner):
        import optimistix as optx

        name, kind = type(self.solver).__name__, type(inner).__name__
        if isinstance(self.solver, optx.AbstractMinimiser) and not inner.minimizes:
            raise ValueError(
                f"bilevel: optimistix.{name} minimizes an objective, and {kind} has none that could be minimized as it "
                "is; leave `solver` out, or pass a root finder such as optimistix.Newton."
            )
        if isinstance(self.solver, optx.AbstractFixedPointSolver) and not inner.is_step:
            raise ValueError(
                f"bilevel: optimistix.{name} iterates a fixed-point map, and {kind} has none; it is for FixedPoint."
            )

    def find(self, inner, x, y0, *, tol, max_steps):
        import optimistix as optx

        flat, unravel = ravel(y0)

        def residual(point, _):
            return ravel_like(inner.optimality(x, unravel(point)), point.dtype)

        if isinstance(self.solver, optx.AbstractMinimiser):
            fn = lambda point, _: inner.objective_at(x, unravel(point)).astype(point.dtype)
            out = optx.minimise(fn, self.solver, flat, max_steps=max_steps, throw=False)
        elif isinstance(self.solver, optx.AbstractFixedPointSolver):
            fn = lambda point, _: point - residual(point, None)
            out = optx.fixed_point(fn, self.solver, flat, max_steps=max_steps, throw=False)
        else:
            out = optx.root_find(residual, self.solver, flat, max_steps=max_steps, throw=False)
        steps = jnp.asarray(out.stats["num_steps"])
        return Found(unravel(jax.lax.stop_gradient(out.value)), steps, steps + 1)
