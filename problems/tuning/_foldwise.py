"""Solving with the Hessian of K folds: they share no unknowns, so it is block diagonal."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from bilevel.errors import Status
from bilevel.linear import AbstractLinearSolver, Direct


class Blocks(eqx.Module):
    """A prepared `Direct` for each block, behind the interface of one."""

    parts: PyTree  # with a leading axis

    def solve(self, b: Array, transpose: bool) -> Array:
        """The blocks' solutions, flat like b."""
        rows = b.reshape(len(self.parts.condition), -1)
        return jax.vmap(lambda part, row: part.solve(row, transpose))(self.parts, rows).reshape(-1)

    @property
    def condition(self) -> Array:
        return jnp.max(self.parts.condition)

    @property
    def status(self) -> Status:
        return jax.tree.map(jnp.max, self.parts.status)  # the worst: codes are ordered


class Foldwise(AbstractLinearSolver):
    """`bilevel.Direct` on the `folds` equal diagonal blocks of dF/dy. What is outside them is taken to be zero.

    With p unknowns a fold it takes p products instead of K p, and K factorizations of size p instead of one of K p.
    """

    folds: int = eqx.field(static=True)

    def prepare(self, system):
        size = system.size // self.folds
        # the j-th unit vector of every fold at once: one product is the j-th column of every block
        units = jnp.tile(jnp.eye(size, dtype=system.dtype), (1, self.folds))
        columns = jax.vmap(system.mv)(units).reshape(size, self.folds, size)

        def factorize(block):
            return Direct().prepare(system._replace(mv=lambda v: block @ v, rmv=lambda v: v @ block, size=size))

        return Blocks(lax.map(factorize, jnp.transpose(columns, (1, 2, 0))))

    def cost(self, system):
        return system.size // self.folds

    def solve(self, state, system, b, **options):
        return Direct().solve(state, system, b, **options)

    def approximate(self, state, system, b, **options):
        return Direct().approximate(state, system, b, **options)

    @property
    def keeps(self):
        return True
