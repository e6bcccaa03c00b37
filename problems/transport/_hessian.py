"""The Hessian of the dual in (f, g), and solving with it by its Schur complement on the smaller side.

With the coupling pi it is [[D1, pi / epsilon], [pi' / epsilon, D2]], D diagonal (derived in docs/theory/transport.md).
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array

from bilevel._dense import factor_definite
from bilevel.errors import Status
from bilevel.krylov import conjugate_gradient
from bilevel.linear import AbstractLinearSolver, Direct, LinearSolution, refine

from ._pairs import AbstractPairs, Matrix

DIRECT_LIMIT = 1200
"""Points on the smaller side up to which the Schur complement is factorized."""


class DualHessian(lx.AbstractLinearOperator):
    """Maps (u, w) to (D1 u + pi w / epsilon, pi'u / epsilon + D2 w). `slow`: about the smallest eigenvalue that the
    scaled Schur complement has on constants (zero: they are the gauge)."""

    pairs: AbstractPairs
    f: Array
    g: Array
    a: Array
    b: Array
    epsilon: Array
    first: Array
    second: Array
    slow: Array

    def coupling(self) -> Array:
        """The matrix pi, shape (n, m)."""
        return self.a[:, None] * self.pairs.exponentials(self.f, self.g, self.epsilon) * self.b[None, :]

    def cross(self, left: Any, right: Any) -> tuple[Any, Any]:
        """(pi right, pi'left) / epsilon, None for None."""
        ahead, back = self.pairs.products(self.f, self.g, self.a, self.b, self.epsilon, left, right)
        divide = lambda v: None if v is None else v / self.epsilon
        return divide(ahead), divide(back)

    def mv(self, vector):
        u, w = vector
        ahead, back = self.cross(u, w)
        return self.first * u + ahead, back + self.second * w

    def as_matrix(self):
        corner = self.coupling() / self.epsilon
        return jnp.block([[jnp.diag(self.first), corner], [corner.T, jnp.diag(self.second)]])

    def transpose(self):
        return self

    def in_structure(self):
        return jax.eval_shape(lambda: (self.first, self.second))

    def out_structure(self):
        return self.in_structure()


for _ask, _answer in (
    (lx.is_symmetric, True), (lx.is_positive_semidefinite, True), (lx.is_negative_semidefinite, False),
    (lx.is_diagonal, False), (lx.is_tridiagonal, False), (lx.is_lower_triangular, False),
    (lx.is_upper_triangular, False), (lx.has_unit_diagonal, False),
):  # fmt: skip
    _ask.register(DualHessian)(lambda operator, answer=_answer: answer)
lx.linearise.register(DualHessian)(lambda operator: operator)
lx.materialise.register(DualHessian)(lambda operator: operator)
lx.conj.register(DualHessian)(lambda operator: operator)
lx.diagonal.register(DualHessian)(lambda operator: jnp.concatenate([operator.first, operator.second]))


class _Prepared(eqx.Module):
    """A factorized Schur complement, behind the interface of a factorized matrix; `left`: it is that of f."""

    corner: Array  # pi / epsilon
    first: Array
    second: Array
    mask: Array | None  # the gauge direction, of unit length
    factor: Any
    left: bool = eqx.field(static=True)

    def solve(self, b: Array, transpose: bool) -> Array:
        """The solution, flat like b; b and the solution are off the gauge."""
        n = len(self.first)
        r1, r2 = b[:n], b[n:]
        if self.left:
            u = self.factor.solve(r1 - self.corner @ (r2 / self.second), False)
            w = (r2 - u @ self.corner) / self.second
        else:
            w = self.factor.solve(r2 - (r1 / self.first) @ self.corner, False)
            u = (r1 - self.corner @ w) / self.first
        v = jnp.concatenate([u, w])
        return v if self.mask is None else v - self.mask * jnp.vdot(self.mask, v)

    @property
    def condition(self) -> Array:
        return self.factor.condition

    @property
    def status(self) -> Status:
        return self.factor.status


def schur_matrix(corner: Array, inverse: Array, diagonal: Array, gauge: Array | None) -> Array:
    """diag(diagonal) - corner' diag(inverse) corner, shape (m, m), lifted along the gauge where there is one."""
    half = jnp.sqrt(inverse)[:, None] * corner
    matrix = jnp.diag(diagonal) - half.T @ half
    if gauge is None:
        return matrix
    # in the scaling by the diagonal the gauge is sqrt(diagonal), whose eigenvalue is lifted from 0 to 1
    direction = diagonal * gauge
    return matrix + direction[:, None] * direction[None, :] / jnp.vdot(gauge, direction)


class SchurComplement(AbstractLinearSolver):
    """Solves with a `DualHessian`. `direct=True`: Cholesky of the Schur complement on the smaller side; False:
    conjugate gradients on it, scaled by its diagonal, constants deflated; None: the first up to a measured size.

    Where the Hessian has been put in other coordinates it is `bilevel.Direct`.
    """

    direct: bool | None = eqx.field(static=True, default=None)

    def _dense(self, system) -> bool:
        operator = system.operator
        small = min(len(operator.first), len(operator.second))
        return isinstance(operator.pairs, Matrix) and (small <= DIRECT_LIMIT if self.direct is None else self.direct)

    def prepare(self, system):
        operator = system.operator
        if not isinstance(operator, DualHessian):
            return Direct().prepare(system)
        if not self._dense(system):
            return operator
        left = len(operator.first) < len(operator.second)
        corner, first, second = operator.coupling() / operator.epsilon, operator.first, operator.second
        mask = _gauge_direction(system)
        if left:
            gauge = None if mask is None else (mask != 0).astype(first.dtype)[: len(first)]
            matrix = schur_matrix(corner.T, 1 / second, first, gauge)
        else:
            gauge = None if mask is None else (mask != 0).astype(first.dtype)[len(first) :]
            matrix = schur_matrix(corner, 1 / first, second, gauge)
        return _Prepared(corner, first, second, mask, factor_definite(matrix), left)

    def cost(self, system):
        return 0  # no product with dF/dy is taken

    @property
    def keeps(self):
        return True

    def solve(self, state, system, b, *, transpose=False, rtol=None, guess=None, forcing=None):
        if not isinstance(state, DualHessian):
            return Direct().solve(state, system, b, transpose=transpose, rtol=rtol, guess=guess, forcing=forcing)
        eps = float(jnp.finfo(b.dtype).eps)
        target = jnp.asarray(50 * eps if rtol is None else rtol, b.dtype)
        first = _iterate(state, system, b, jnp.maximum(0.1 * target, 4 * eps))
        return refine(
            lambda r: _iterate(state, system, r, 1e-3).value, system, b, transpose=transpose, rtol=target,
            guess=first.value if guess is None else guess, condition=first.condition, status=first.status,
        )._replace(products=first.products)  # fmt: skip

    def approximate(self, state, system, b, *, rtol=0.03, transpose=False):
        if not isinstance(state, DualHessian):
            return Direct().approximate(state, system, b, rtol=rtol, transpose=transpose)
        return _iterate(state, system, b, rtol)


def _gauge_direction(system) -> Array | None:
    """The declared gauge as a unit vector; there is at most one."""
    if system.gauge is None:
        return None
    probe = jnp.cos(jnp.arange(1, system.size + 1, dtype=system.dtype))
    along = system.gauge(probe)
    return along / jnp.linalg.norm(along)


def _iterate(operator: DualHessian, system, b: Array, rtol: Any) -> LinearSolution:
    """Conjugate gradients on the Schur complement of g (or f, where it is smaller)."""
    n = len(operator.first)
    r1, r2 = b[:n], b[n:]
    left = n < len(operator.second)
    near, far = (operator.first, operator.second) if left else (operator.second, operator.first)
    r_near, r_far = (r1, r2) if left else (r2, r1)
    to_near = (lambda v: operator.cross(None, v)[0]) if left else (lambda v: operator.cross(v, None)[1])
    to_far = (lambda v: operator.cross(v, None)[1]) if left else (lambda v: operator.cross(None, v)[0])
    scale = 1 / jnp.sqrt(near)
    constants = jnp.where(near_weight(operator, left) > 0, jnp.sqrt(near), 0)
    constants = constants / jnp.linalg.norm(constants)
    gauge = system.gauge is not None

    def product(v):
        w = scale * v
        out = v - scale * to_near(to_far(w) / far)
        return out + constants * jnp.vdot(constants, v) if gauge else out

    lift = 0 if gauge else 1 / operator.slow - 1
    precondition = None if gauge else (lambda v: v + lift * constants * jnp.vdot(constants, v))
    right = scale * (r_near - to_near(r_far / far))
    out = conjugate_gradient(
        product, right, rtol=rtol, preconditioner=precondition, max_steps=10 * len(near) + 10, verify=False
    )
    near_value = scale * out.value
    far_value = (r_far - to_far(near_value)) / far
    value = system.off_gauge(jnp.concatenate([near_value, far_value] if left else [far_value, near_value]))
    products = out.steps + 1
    return LinearSolution(value, jnp.zeros_like(b), out.status, out.condition, products)


def near_weight(operator: DualHessian, left: bool) -> Array:
    """The weights on the side of the Schur complement."""
    return operator.a if left else operator.b
