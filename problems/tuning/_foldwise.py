"""Solving with the Hessian of K folds: they share no unknowns, so it is block diagonal."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax import lax
from jaxtyping import Array, Float, PyTree

from bilevel._dense import factor_definite, factor_general
from bilevel._operators import register_definite
from bilevel.errors import Status
from bilevel.linear import AbstractLinearSolver, Direct

INVERTED = 256
"""Largest block of LU whose inverse is formed: a product with it compiles in a tenth of the time of solves with row
exchanges, of which a program has a dozen. What it loses to them is round-off, which refinement sees."""


class Blocks(eqx.Module):
    """A prepared `Direct` for each block, behind the interface of one."""

    parts: PyTree  # with a leading axis
    inverses: Float[Array, "k p p"] | None = None

    def solve(self, b: Array, transpose: bool) -> Array:
        """The blocks' solutions, flat like b."""
        rows = b.reshape(len(self.parts.condition), -1)
        if self.inverses is not None:
            return jnp.einsum("kji,kj->ki" if transpose else "kij,kj->ki", self.inverses, rows).reshape(-1)
        return jax.vmap(lambda part, row: part.solve(row, transpose))(self.parts, rows).reshape(-1)

    @property
    def condition(self) -> Array:
        return jnp.max(self.parts.condition)

    @property
    def status(self) -> Status:
        return jax.tree.map(jnp.max, self.parts.status)  # the worst: codes are ordered


class FoldHessian(lx.AbstractLinearOperator):
    """The Hessian of K folds at (x, y), y of shape (K, …), by its diagonal blocks: `training.hessians(x, y)`, of shape
    (K, p, p), which are computed only where they are asked for."""

    training: Any
    x: Any
    y: Any

    def blocks(self) -> Float[Array, "k p p"]:
        """The blocks."""
        return self.training.hessians(self.x, self.y)

    def mv(self, vector):
        blocks = self.blocks()
        return jnp.einsum("kij,kj->ki", blocks, vector.reshape(len(blocks), -1)).reshape(vector.shape)

    def as_matrix(self):
        return jax.scipy.linalg.block_diag(*self.blocks())

    def transpose(self):
        return self

    def in_structure(self):
        return jax.ShapeDtypeStruct(self.y.shape, self.y.dtype)

    def out_structure(self):
        return self.in_structure()


register_definite(
    FoldHessian,
    materialise=lambda operator: lx.MatrixLinearOperator(operator.as_matrix()),
    diagonal=lambda operator: jnp.diagonal(operator.blocks(), axis1=1, axis2=2).reshape(-1),
)


class Foldwise(AbstractLinearSolver):
    """`bilevel.Direct` on the `folds` equal diagonal blocks of dF/dy. What is outside them is taken to be zero.

    The blocks are those of a declared `FoldHessian`, or come from p products with unknowns of all folds at once, p the
    number of unknowns in a fold; then there are K factorizations of size p instead of one of K p.
    """

    folds: int = eqx.field(static=True)

    def prepare(self, system):
        size = system.size // self.folds
        if isinstance(system.operator, FoldHessian):
            blocks = system.operator.blocks()
        else:  # the j-th unit vector of every fold at once: one product is the j-th column of every block
            units = jnp.tile(jnp.eye(size, dtype=system.dtype), (1, self.folds))
            columns = jax.vmap(system.mv)(units).reshape(size, self.folds, size)
            blocks = jnp.transpose(columns, (1, 2, 0))

        factorize = factor_definite if system.definite else factor_general
        if system.definite or size > INVERTED:
            return Blocks(lax.map(factorize, blocks))

        def inverted(block):
            part = factorize(block)
            return part, jax.vmap(lambda unit: part.solve(unit, False), out_axes=1)(jnp.eye(size, dtype=system.dtype))

        return Blocks(*lax.map(inverted, blocks))

    def cost(self, system):
        return system.size // self.folds

    def solve(self, state, system, b, **options):
        return Direct().solve(state, system, b, **options)

    def approximate(self, state, system, b, **options):
        return Direct().approximate(state, system, b, **options)

    @property
    def keeps(self):
        return True
