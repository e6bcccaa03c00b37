"""Dense factorizations, in the precision of y or in a lower one."""

from __future__ import annotations

import jax.numpy as jnp

from .._dense import factor_definite, factor_general
from ._base import AbstractLinearSolver, LinearSolution, refine


class Direct(AbstractLinearSolver):
    """Dense factorization: Cholesky where dF/dy must be positive definite, else LU. Cost n products and n^3/3.

    Numerically singular (smallest scaled singular value below about n eps of the largest) is a status, never a number.
    """

    def prepare(self, system):
        matrix = system.matrix()
        return factor_definite(matrix) if system.definite else factor_general(matrix)

    def cost(self, system):
        return system.size

    def solve(self, state, system, b, *, transpose=False, rtol=None, guess=None, forcing=None):
        return refine(
            lambda r: state.solve(r, transpose), system, b, transpose=transpose, rtol=rtol, guess=guess,
            condition=state.condition, status=state.status,
        )  # fmt: skip

    def approximate(self, state, system, b, *, rtol=0.03, transpose=False):
        v = state.solve(b, transpose)
        return LinearSolution(v, jnp.zeros_like(b), state.status, state.condition, jnp.asarray(0))

    @property
    def keeps(self):
        return True
