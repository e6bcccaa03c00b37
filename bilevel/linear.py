"""Solving with dF/dy: dense, iterative, structured; always with a residual and a status.

A solver `prepare`s a state at one point (a factorization, a preconditioner) and then `solve`s at the same or a
nearby point: the state may be stale, the residual is always taken with dF/dy of the system given, and a stale
state is refined until the tolerance holds (refinement N2 of docs/theory). So one factorization serves the
correction, the adjoint and the error estimate.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import lineax as lx
from jax import lax
from jaxtyping import PyTree

from ._trees import ravel, ravel_like
from .errors import Status
from .krylov import conjugate_gradient

__all__ = [
    "AbstractLinearSolver",
    "ConjugateGradient",
    "Direct",
    "Krylov",
    "LinearSolution",
    "LinearSystem",
    "Neumann",
    "linear_system",
]

DENSE_LIMIT = 2000
"""Largest number of unknowns that is solved densely by default (measured by `python -m benchmarks.threshold`)."""

_COLUMNS = 256  # columns of a dense matrix formed at once: bounds memory, keeps matrix products large


class LinearSystem(NamedTuple):
    """dF/dy at one point in flat coordinates: products `mv` and `rmv` (transposed), and what is known of it."""

    mv: Callable[[jax.Array], jax.Array]
    rmv: Callable[[jax.Array], jax.Array]
    size: int
    dtype: Any
    symmetric: bool
    definite: bool
    operator: Any  # lineax operator on y's structure, or None
    unravel: Callable[[jax.Array], PyTree]
    gauge: Callable[[jax.Array], jax.Array] | None

    def product(self, v: jax.Array, transpose: bool) -> jax.Array:
        return self.rmv(v) if transpose else self.mv(v)

    def matrix(self) -> jax.Array:
        """The dense matrix, shape (n, n), formed from products with unit vectors in blocks of columns."""
        identity = jnp.eye(self.size, dtype=self.dtype)
        if self.size <= _COLUMNS:
            return jax.vmap(self.mv, out_axes=1)(identity)
        return lax.map(self.mv, identity, batch_size=_COLUMNS).T

    def off_gauge(self, v: jax.Array) -> jax.Array:
        """v without its part along the gauge."""
        return v if self.gauge is None else v - self.gauge(v)


def linear_system(inner, x: PyTree, y: PyTree) -> tuple[jax.Array, LinearSystem]:
    """F(x, y), flat, and dF/dy there, linearized once (each product is then one pass forward and one back)."""
    flat, unravel = ravel(y)

    def optimality(flat):
        return ravel_like(inner.optimality(x, unravel(flat)), flat.dtype)

    residual, mv = jax.linearize(optimality, flat)
    if inner.symmetric:
        rmv = mv
    else:
        transposed = jax.linear_transpose(mv, flat)
        rmv = lambda v: transposed(v)[0]
    operator = inner.operator_at(x, y)
    if operator is not None:
        _check_operator(operator, flat.size)
    gauge = None
    if inner.gauge_part(x, y) is not None:  # shift the flat directions away from zero: a solve on the quotient
        gauge = lambda v: ravel_like(inner.gauge_part(x, unravel(v)), flat.dtype)
        mv, rmv = _shifted(mv, gauge, flat), _shifted(rmv, gauge, flat)
    system = LinearSystem(mv, rmv, flat.size, flat.dtype, inner.symmetric, inner.definite, operator, unravel, gauge)
    return residual, system


def _shifted(mv, gauge, flat):
    """mv + s * (projector on the gauge), s the size of the matrix along one probe off the gauge."""
    probe = jnp.cos(jnp.arange(1, flat.size + 1, dtype=flat.dtype))
    probe = probe - gauge(probe)
    size = jnp.linalg.norm(mv(probe)) / jnp.maximum(jnp.linalg.norm(probe), jnp.finfo(flat.dtype).tiny)
    size = jnp.where(size > 0, size, 1)
    return lambda v: mv(v) + size * gauge(v)


def _check_operator(operator, size: int) -> None:
    if not isinstance(operator, lx.AbstractLinearOperator):
        raise TypeError(f"bilevel: `operator(x, y)` must return a lineax operator, found {type(operator).__name__}.")
    if operator.in_size() != size or operator.out_size() != size:
        raise ValueError(
            f"bilevel: `operator(x, y)` must map y's structure to itself ({size} numbers), found a map from "
            f"{operator.in_size()} to {operator.out_size()}."
        )


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
        return (self.status == Status("converged")) | (self.status == Status("linear_solve"))


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

    def rough(self, state, system, b, *, transpose=False) -> LinearSolution:
        """A solution to about one digit, for error estimates."""
        return self.solve(state, system, b, transpose=transpose, rtol=0.03)


# ------------------------------------------------------------------------------------------------ dense


class _Dense(eqx.Module):
    factor: jax.Array
    permutation: jax.Array
    left: jax.Array
    right: jax.Array
    condition: jax.Array
    status: Status
    cholesky: bool = eqx.field(static=True)

    def solve(self, b, transpose: bool):
        if self.cholesky:
            return self.right * jsl.cho_solve((self.factor, True), self.left * b)
        first, last = (self.right, self.left) if transpose else (self.left, self.right)
        return last * jsl.lu_solve((self.factor, self.permutation), first * b, trans=1 if transpose else 0)


def _factor_definite(a: jax.Array) -> _Dense:
    """Cholesky of the symmetrically scaled matrix; what fails is told apart by its smallest eigenvalue."""
    n, dtype = a.shape[0], a.dtype
    a = 0.5 * (a + a.T)
    diagonal = jnp.diagonal(a)
    scale = jnp.where(diagonal > 0, 1 / jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1)), 1)
    scaled = a * scale[:, None] * scale[None, :]
    factor = jnp.linalg.cholesky(scaled, symmetrize_input=False)
    pivots = jnp.square(jnp.diagonal(factor))
    smallest = jnp.min(pivots)
    threshold = _threshold(n, dtype) * jnp.max(pivots)
    good = jnp.all(jnp.isfinite(factor)) & (smallest > threshold)

    def why(matrix):
        values = jnp.linalg.eigvalsh(matrix)
        size = jnp.max(jnp.abs(values))
        saddle = values[0] < -10 * _threshold(n, dtype) * size
        status = Status.where(saddle, Status("not_a_minimum"), Status("singular"))
        return Status.where(jnp.isfinite(size), status, Status("non_finite")).code

    code = lax.cond(good, lambda _: Status("converged").code, why, scaled)
    condition = jnp.where(good, jnp.max(pivots) / jnp.where(good, smallest, 1), jnp.inf)
    unused = jnp.zeros((0,), jnp.int32)
    return _Dense(factor, unused, scale, scale, condition, Status(code), True)


def _factor_general(a: jax.Array) -> _Dense:
    """LU with partial pivoting of the row- and column-scaled matrix."""
    n, dtype = a.shape[0], a.dtype
    rows = jnp.max(jnp.abs(a), axis=1)
    left = jnp.where(rows > 0, 1 / jnp.where(rows > 0, rows, 1), 1)
    scaled = a * left[:, None]
    columns = jnp.max(jnp.abs(scaled), axis=0)
    right = jnp.where(columns > 0, 1 / jnp.where(columns > 0, columns, 1), 1)
    scaled = scaled * right[None, :]
    factor, permutation = jsl.lu_factor(scaled)
    pivots = jnp.abs(jnp.diagonal(factor))
    smallest, largest = jnp.min(pivots), jnp.max(pivots)
    good = smallest > _threshold(n, dtype) * largest
    status = Status.where(good, Status("converged"), Status("singular"))
    status = Status.where(jnp.all(jnp.isfinite(a)), status, Status("non_finite"))
    condition = jnp.where(good, largest / jnp.where(good, smallest, 1), jnp.inf)
    return _Dense(factor, permutation.astype(jnp.int32), left, right, condition, status, False)


def _threshold(n: int, dtype) -> float:
    return 2.0 * max(n, 8) * float(jnp.finfo(dtype).eps)


def _refine(apply, system: LinearSystem, b, *, transpose, rtol, guess, condition, status) -> LinearSolution:
    """v <- v + P^-1 (b - A v) while it contracts: exact solves with a stale or approximate P."""
    b_norm = jnp.linalg.norm(b)
    eps = jnp.finfo(b.dtype).eps
    # without a tolerance: until round-off, but at most a few refinements
    target = (4 * eps if rtol is None else jnp.maximum(jnp.asarray(rtol, b.dtype), 4 * eps)) * b_norm
    v = apply(b) if guess is None else guess
    r = b - system.product(v, transpose)

    def unfinished(carry):
        _, _, size, last, count = carry
        return (size > target) & (size < 0.5 * last) & (count < 12)

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


class Direct(AbstractLinearSolver):
    """Dense factorization: Cholesky where dF/dy must be positive definite, else LU. Cost n products and n^3/3.

    Numerically singular (smallest scaled pivot below about n eps of the largest) is a status, never a number.
    """

    def prepare(self, system):
        matrix = system.matrix()
        return _factor_definite(matrix) if system.definite else _factor_general(matrix)

    def cost(self, system):
        return system.size

    def solve(self, state, system, b, *, transpose=False, rtol=None, guess=None, forcing=None):
        return _refine(
            lambda r: state.solve(r, transpose), system, b, transpose=transpose, rtol=rtol, guess=guess,
            condition=state.condition, status=state.status,
        )  # fmt: skip

    def rough(self, state, system, b, *, transpose=False):
        v = state.solve(b, transpose)
        return LinearSolution(v, jnp.zeros_like(b), state.status, state.condition, jnp.asarray(0))


# ------------------------------------------------------------------------------------------------ iterative


class ConjugateGradient(AbstractLinearSolver):
    """Matrix-free preconditioned conjugate gradients, for `Minimization`: one Hessian-vector product a step.

    **Arguments:** `rtol`: relative residual to stop at; None: what the caller needs. `preconditioner`: None, a
    function v -> M v on y's structure (M near the inverse Hessian, symmetric positive definite), a lineax operator,
    or an object with `prepare(system)` and `apply(state, v)` such as `bilevel.linear.Nystrom`. `max_steps`: 10 n + 10.

    A singular Hessian is detected by vanishing Ritz values only: null directions that the right-hand side does not
    excite are missed. On a problem whose dF/dy is not symmetric positive definite it is refused.
    """

    rtol: float | None = None
    preconditioner: Any = None
    max_steps: int | None = eqx.field(static=True, default=None)

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

    def solve(self, state, system, b, *, transpose=False, rtol=None, guess=None, forcing=None):
        eps = float(jnp.finfo(b.dtype).eps)
        wanted = self.rtol if self.rtol is not None else rtol if rtol is not None else 50 * eps
        result = conjugate_gradient(
            system.mv, b, rtol=wanted, guess=guess, forcing=None if self.rtol is not None else forcing,
            preconditioner=self._precondition(state, system), max_steps=self.max_steps,
        )  # fmt: skip
        status = result.status
        if not system.definite:  # symmetric, but negative curvature is no statement about minima there
            saddle = status == Status("not_a_minimum")
            status = Status.where(saddle, Status("linear_solve"), status)
        extra = 2 if guess is not None else 1
        return LinearSolution(result.value, result.residual, status, result.condition, result.steps + extra)


class Krylov(AbstractLinearSolver):
    """Matrix-free solves of a non-symmetric dF/dy: lineax's GMRES (`method="gmres"`) or BiCGStab (`"bicgstab"`).

    **Arguments:** `rtol` as for `ConjugateGradient`; `restart`: GMRES's restart length; `max_steps`: products.
    """

    method: str = eqx.field(static=True, default="gmres")
    rtol: float | None = None
    restart: int = eqx.field(static=True, default=50)
    max_steps: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.method not in ("gmres", "bicgstab"):
            raise ValueError(f"bilevel.Krylov: unknown method {self.method!r}; choose 'gmres' or 'bicgstab'.")

    def prepare(self, system):
        return None

    def solve(self, state, system, b, *, transpose=False, rtol=None, guess=None, forcing=None):
        eps = float(jnp.finfo(b.dtype).eps)
        wanted = self.rtol if self.rtol is not None else rtol if rtol is not None else 50 * eps
        limit = self.max_steps or 10 * system.size + 10
        b_norm = jnp.linalg.norm(b)
        absolute = jnp.asarray(wanted, b.dtype) * b_norm
        shape = jax.ShapeDtypeStruct(b.shape, b.dtype)
        operator = lx.FunctionLinearOperator(lambda v: system.product(v, transpose), shape)
        if self.method == "gmres":
            restart = min(self.restart, system.size)
            solver = lx.GMRES(0.0, absolute, norm=jnp.linalg.norm, max_steps=limit, restart=restart)
        else:
            solver = lx.BiCGStab(0.0, absolute, norm=jnp.linalg.norm, max_steps=limit)
        options = {} if guess is None else {"y0": guess}
        out = lx.linear_solve(operator, b, solver, options=options, throw=False)
        residual = b - system.product(out.value, transpose)
        size = jnp.linalg.norm(residual)
        good = size <= jnp.maximum(10 * absolute, 100 * eps * b_norm)
        status = Status.where(good, Status("converged"), Status("linear_solve"))
        status = Status.where(jnp.isfinite(size), status, Status("singular"))
        steps = jnp.asarray(out.stats["num_steps"])
        return LinearSolution(out.value, residual, status, jnp.ones((), b.dtype), steps + 1)


class Neumann(AbstractLinearSolver):
    """The truncated series v = a sum_{k <= terms} (I - a A)^k b: cheap, biased, its residual reported.

    **Arguments:** `terms`: the last power; `step`: a, None: 1 / |A| by power iteration. Lorraine et al. 2020.
    """

    terms: int = eqx.field(static=True)
    step: float | None = None

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


def spectral_norm(system: LinearSystem, steps: int = 20, safety: float = 1.05) -> jax.Array:
    """|A| by power iteration on A'A from a fixed start, times a safety factor."""
    v = jnp.cos(jnp.arange(1, system.size + 1, dtype=system.dtype))

    def body(_, v):
        w = system.rmv(system.mv(v / jnp.linalg.norm(v)))
        return jnp.where(jnp.linalg.norm(w) > 0, w, v / jnp.linalg.norm(v))

    v = lax.fori_loop(0, steps, body, v)
    size = jnp.sqrt(jnp.linalg.norm(v))
    return jnp.where(size > 0, safety * size, 1)


# ------------------------------------------------------------------------------------------------ lineax


class Lineax(AbstractLinearSolver):
    """Any lineax solver, on the operator the problem declares, or on dF/dy from autodiff."""

    solver: lx.AbstractLinearSolver

    def _operator(self, system):
        if system.operator is not None:
            return system.operator
        tags = [lx.symmetric_tag] if system.symmetric else []
        tags += [lx.positive_semidefinite_tag] if system.definite else []
        shape = jax.ShapeDtypeStruct((system.size,), system.dtype)
        return lx.FunctionLinearOperator(system.mv, shape, tags=tuple(tags))

    def prepare(self, system):
        operator = self._operator(system)
        return operator, self.solver.init(operator, {})

    def solve(self, state, system, b, *, transpose=False, rtol=None, guess=None, forcing=None):
        operator, prepared = state
        if transpose:
            operator = operator.transpose()
            prepared, _ = self.solver.transpose(prepared, {})
        flat = system.operator is None

        def apply(r):
            out = lx.linear_solve(operator, r if flat else system.unravel(r), self.solver, state=prepared, throw=False)
            value = out.value if flat else ravel_like(out.value, r.dtype)
            failed = out.result == lx.RESULTS.singular
            return jnp.where(failed, jnp.nan, value)

        first = apply(system.off_gauge(b))
        finite = jnp.all(jnp.isfinite(first))
        status = Status.where(finite, Status("converged"), Status("singular"))
        first = jnp.where(finite, first, 0)
        one = jnp.ones((), b.dtype)
        if isinstance(self.solver, (lx.CG, lx.BiCGStab, lx.GMRES)):  # an iterative solver's tolerance is the user's
            residual = b - system.product(first, transpose)
            wanted = jnp.maximum(jnp.asarray(self.solver.rtol, b.dtype), 100 * jnp.finfo(b.dtype).eps)
            good = jnp.linalg.norm(residual) <= 10 * wanted * jnp.linalg.norm(b)
            status = Status.where(good | ~finite, status, Status("linear_solve"))
            return LinearSolution(first, residual, status, one, jnp.asarray(1))
        return _refine(
            lambda r: apply(system.off_gauge(r)), system, system.off_gauge(b), transpose=transpose, rtol=rtol,
            guess=first if guess is None else guess, condition=one, status=status,
        )  # fmt: skip


def choose(linear_solver: Any, inner, system_size: int, has_operator: bool) -> AbstractLinearSolver:
    """The solver asked for, else the inner problem's own, else by structure and size."""
    named = linear_solver if linear_solver is not None else inner.linear_solver
    if isinstance(named, AbstractLinearSolver):
        return named
    if isinstance(named, lx.AbstractLinearSolver):
        return Lineax(named)
    if named is not None:
        raise TypeError(
            f"bilevel: linear_solver must be Direct(), ConjugateGradient(), Krylov(), Neumann(terms) or a lineax "
            f"solver, found {named!r}."
        )
    if has_operator:
        return Lineax(lx.AutoLinearSolver(well_posed=True))
    if system_size <= DENSE_LIMIT:
        return Direct()
    return ConjugateGradient() if inner.symmetric and inner.definite else Krylov()
