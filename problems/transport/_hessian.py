"""The Hessian of the dual in (f, g), and solving with it by its Schur complement on the smaller side.

With the coupling pi it is [[D1, pi / epsilon], [pi' / epsilon, D2]], D diagonal (derived in docs/theory/transport.md).
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax import lax
from jaxtyping import Array

from bilevel._dense import factor_definite
from bilevel._operators import register_definite
from bilevel.errors import Status
from bilevel.krylov import conjugate_gradient
from bilevel.linear import AbstractLinearSolver, Direct, LinearSolution, refine

from ._pairs import AbstractPairs, Matrix

ALWAYS_DIRECT = 150
"""Points on the smaller side up to which the Schur complement is factorized, whatever its condition."""
DIRECT_LIMIT = 2500
"""Points on the smaller side up to which it is factorized where conjugate gradients are slow."""
STEPS_OF_A_FACTOR = 1 / 16
"""Steps of conjugate gradients for each point on the smaller side that cost clearly less than a factorization."""


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


register_definite(
    DualHessian,
    materialise=lambda operator: operator,
    diagonal=lambda operator: jnp.concatenate([operator.first, operator.second]),
)


class _Scaled(eqx.Module):
    """The Hessian in the unknowns D^1/2 (f, g), in which D is the identity: `corner` is D1^-1/2 (pi / epsilon) D2^-1/2,
    `first`, `second` are D1^-1/2 and D2^-1/2, `gauge` the direction of the gauge there, of unit length, on the smaller
    side, which is that of f if `left`."""

    corner: Array
    first: Array
    second: Array
    mask: Array | None  # the gauge direction in (f, g), of unit length
    gauge: Array | None
    left: bool = eqx.field(static=True)

    @classmethod
    def of(cls, system) -> _Scaled:
        operator = system.operator
        first, second = (jnp.where(d > 0, 1 / jnp.sqrt(d), 0) for d in (operator.first, operator.second))
        corner = operator.coupling() * (first / operator.epsilon)[:, None] * second[None, :]
        left, mask, gauge = len(first) < len(second), _gauge_direction(system), None
        if mask is not None:
            near = mask[: len(first)] if left else mask[len(first) :]
            gauge = jnp.where(near != 0, jnp.sqrt(operator.first if left else operator.second), 0)
            gauge = gauge / jnp.linalg.norm(gauge)
        return cls(corner, first, second, mask, gauge, left)

    def factor(self, operator: DualHessian) -> Any:
        """The Schur complement of the smaller side, the gauge lifted, factorized; formed without the scaling, whose
        rounding would be seen where epsilon is small."""
        corner, first, second = operator.coupling() / operator.epsilon, operator.first, operator.second
        near = None if self.gauge is None else (self.gauge != 0).astype(first.dtype)
        if self.left:
            return factor_definite(schur_matrix(corner.T, 1 / second, first, near), steps=2)
        return factor_definite(schur_matrix(corner, 1 / first, second, near), steps=2)

    def solve(self, factor: Any, b: Array) -> Array:
        """The solution, flat like b; b and the solution are off the gauge."""
        n = len(self.first)
        u, w = self.first * b[:n], self.second * b[n:]
        size = lambda scale: jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
        if self.left:
            u = size(self.first) * factor.solve(size(self.first) * (u - self.corner @ w), False)
            w = w - u @ self.corner
        else:
            w = size(self.second) * factor.solve(size(self.second) * (w - u @ self.corner), False)
            u = u - self.corner @ w
        v = jnp.concatenate([self.first * u, self.second * w])
        return v if self.mask is None else v - self.mask * jnp.vdot(self.mask, v)


class _Prepared(eqx.Module):
    """A factorized Schur complement, behind the interface of a factorized matrix."""

    scaled: _Scaled
    factor: Any

    def solve(self, b: Array, transpose: bool) -> Array:
        return self.scaled.solve(self.factor, b)

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


class _Stored(eqx.Module):
    """The scaled Hessian for conjugate gradients; `condition`: what a first run of them saw."""

    operator: DualHessian
    scaled: _Scaled
    condition: Array | None = None


class _Chosen(eqx.Module):
    """Both, the factor zeros unless `direct`."""

    stored: _Stored
    factor: Any
    direct: Array


class SchurComplement(AbstractLinearSolver):
    """Solves with a `DualHessian`. `direct=True`: Cholesky of the Schur complement on the smaller side; False:
    conjugate gradients on it, scaled by its diagonal, constants deflated; None: the first for few points; for more,
    the second where a trial run needs few steps (where epsilon is large), else the first.

    Where the Hessian has been put in other coordinates it is `bilevel.Direct`.
    """

    direct: bool | None = eqx.field(static=True, default=None)

    def prepare(self, system):
        operator = system.operator
        if not isinstance(operator, DualHessian):
            return Direct().prepare(system)
        small = min(len(operator.first), len(operator.second))
        if not isinstance(operator.pairs, Matrix):
            return operator
        if self.direct or (self.direct is None and small <= ALWAYS_DIRECT):
            scaled = _Scaled.of(system)
            return _Prepared(scaled, scaled.factor(operator))
        scaled = _Scaled.of(system)
        if self.direct is False or small > DIRECT_LIMIT:
            return _Stored(operator, scaled)
        trial = _trial(operator, system, scaled, small)
        direct = trial.status.code != 0
        shape = jax.eval_shape(lambda: scaled.factor(operator))
        nothing = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shape)
        factor = lax.cond(direct, lambda: scaled.factor(operator), nothing)
        return _Chosen(_Stored(operator, scaled, trial.condition), factor, direct)

    def once(self, system, b):
        operator = system.operator
        if not isinstance(operator, DualHessian) or not isinstance(operator.pairs, Matrix):
            return super().once(system, b)
        small = min(len(operator.first), len(operator.second))
        if self.direct is not None or small > DIRECT_LIMIT:
            return super().once(system, b)
        scaled = _Scaled.of(system)
        # a factorization would be kept by nobody: it is made only where conjugate gradients are slow
        trial = _trial(operator, system, scaled, small)
        found = _iterate(operator, system, b, 0.03, scaled=scaled, condition=trial.condition, max_steps=_limit(small))

        def by_factor():
            prepared = _Prepared(scaled, scaled.factor(operator))
            exact = Direct().approximate(prepared, system, b)
            return jax.tree.map(lambda new, like: new.astype(like.dtype), exact, found)

        good = (trial.status.code == 0) & (found.status.code == 0)
        return lax.cond(good, lambda: found, by_factor)

    def cost(self, system):
        return 0  # no product with dF/dy is taken

    @property
    def keeps(self):
        return True

    def solve(self, state, system, b, *, transpose=False, rtol=None, guess=None, forcing=None):
        if not isinstance(state, DualHessian | _Stored | _Chosen):
            return Direct().solve(state, system, b, transpose=transpose, rtol=rtol, guess=guess, forcing=forcing)
        eps = float(jnp.finfo(b.dtype).eps)
        target = jnp.asarray(50 * eps if rtol is None else rtol, b.dtype)
        first = self.approximate(state, system, b, rtol=jnp.maximum(0.1 * target, 4 * eps))
        return refine(
            lambda r: self.approximate(state, system, r, rtol=1e-3).value, system, b, transpose=transpose, rtol=target,
            guess=first.value if guess is None else guess, condition=first.condition, status=first.status,
        )._replace(products=first.products)  # fmt: skip

    def approximate(self, state, system, b, *, rtol: Any = 0.03, transpose=False):
        if isinstance(state, DualHessian):
            return _iterate(state, system, b, rtol)
        if isinstance(state, _Stored):
            return _iterate(state.operator, system, b, rtol, scaled=state.scaled, condition=state.condition)
        if not isinstance(state, _Chosen):
            return Direct().approximate(state, system, b, rtol=rtol, transpose=transpose)

        def by_factor():
            found = Direct().approximate(_Prepared(state.stored.scaled, state.factor), system, b)
            return found._replace(products=jnp.zeros((), jnp.int32))

        def by_iteration():
            found = self.approximate(state.stored, system, b, rtol=rtol)
            return found._replace(products=found.products.astype(jnp.int32))

        return lax.cond(state.direct, by_factor, by_iteration)


def _limit(small: int) -> int:
    """Steps of conjugate gradients that cost clearly less than a factorization."""
    return max(int(small * STEPS_OF_A_FACTOR), 6)


def _trial(operator: DualHessian, system, scaled: _Scaled, small: int) -> LinearSolution:
    """A run of conjugate gradients for a right-hand side of many directions, each in its own scale: converged where
    they are fast."""
    probe = jnp.cos(1.7 * jnp.arange(1, system.size + 1, dtype=system.dtype))
    probe = system.off_gauge(probe * jnp.sqrt(jnp.concatenate([operator.first, operator.second])))
    return _iterate(operator, system, probe, 1e-3, scaled=scaled, max_steps=_limit(small))


def _gauge_direction(system) -> Array | None:
    """The declared gauge as a unit vector; there is at most one."""
    if system.gauge is None:
        return None
    probe = jnp.cos(jnp.arange(1, system.size + 1, dtype=system.dtype))
    along = system.gauge(probe)
    return along / jnp.linalg.norm(along)


def _iterate(
    operator: DualHessian, system, b: Array, rtol: Any, *, scaled: _Scaled | None = None, max_steps: int | None = None,
    condition: Array | None = None,
) -> LinearSolution:  # fmt: skip
    """Conjugate gradients on the Schur complement of g (or f, where it is smaller), in the unknowns D^1/2 (f, g), in
    which D is the identity; `scaled`: the Hessian there, where it has been formed."""
    n = len(operator.first)
    s1, s2 = 1 / jnp.sqrt(operator.first), 1 / jnp.sqrt(operator.second)
    if scaled is not None:
        ahead, back = (lambda v: scaled.corner @ v), (lambda v: v @ scaled.corner)
    else:
        ahead = lambda v: s1 * operator.cross(None, s2 * v)[0]
        back = lambda v: s2 * operator.cross(s1 * v, None)[1]
    r1, r2 = s1 * b[:n], s2 * b[n:]
    left = n < len(operator.second)
    r_near, r_far, to_near, to_far = (r1, r2, ahead, back) if left else (r2, r1, back, ahead)
    near = operator.first if left else operator.second
    constants = jnp.where((operator.a if left else operator.b) > 0, jnp.sqrt(near), 0)
    constants = constants / jnp.linalg.norm(constants)
    gauge = system.gauge is not None

    def product(v):
        out = v - to_near(to_far(v))
        return out + constants * jnp.vdot(constants, v) if gauge else out

    lift = 0 if gauge else 1 / operator.slow - 1
    precondition = None if gauge else (lambda v: v + lift * constants * jnp.vdot(constants, v))
    out = conjugate_gradient(
        product, r_near - to_near(r_far), rtol=rtol, preconditioner=precondition, verify=False, condition=condition,
        max_steps=10 * len(near) + 10 if max_steps is None else max_steps,
    )  # fmt: skip
    rest = r_far - to_far(out.value)
    u, w = (out.value, rest) if left else (rest, out.value)
    value = system.off_gauge(jnp.concatenate([s1 * u, s2 * w]))
    return LinearSolution(value, jnp.zeros_like(b), out.status, out.condition, out.steps + 1)
