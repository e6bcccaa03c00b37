"""Solving with dF/dy: dense, iterative, structured; always with a residual and a status.

A solver `prepare`s a state at one point (a factorization, a preconditioner) and then `solve`s at the same or a
nearby point: the state may be stale, the residual is always taken with dF/dy of the system given, and a stale
state is refined until the tolerance holds (refinement N2 of docs/theory). So one factorization serves the
correction, the adjoint and the error estimate.
"""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax import lax
from jaxtyping import PyTree

from ._dense import factor_definite, factor_general
from ._precision import worth_lowering
from ._system import LinearSystem, linear_system, size_along, spectral_norm
from ._trees import ravel_like
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


def _curvature_of(system: LinearSystem, mv=None) -> Status:
    if not system.definite:
        return Status()
    start = jnp.cos(jnp.arange(1, system.size + 1, dtype=system.dtype))
    return curvature_status(system.mv if mv is None else mv, start)


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


# ------------------------------------------------------------------------------------------------ iterative


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
        return _curvature_of(system)

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


# ------------------------------------------------------------------------------------------------ lineax


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
        moved = lambda v: flat(v) + size * system.gauge(v)
        return lx.FunctionLinearOperator(moved, shape, tags=tuple(tags))

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
        return operator, self.solver.init(operator, {}), _curvature_of(system, mv)

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


class MixedPrecision(AbstractLinearSolver):
    """Another solver in float32 as the preconditioner of refinement in float64 (for data too large for the cache).

    Where float32 finds the matrix singular or indefinite, float64 decides.
    """

    low: AbstractLinearSolver

    def prepare(self, system):
        assert system.lower is not None
        lower = system.lower()
        state = self.low.prepare(lower)
        if not isinstance(self.low, Direct):
            return lower, state, None
        good = state.status.code == 0
        shape = jax.eval_shape(lambda: self.low.prepare(system))
        nothing = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shape)
        return lower, state, lax.cond(good, nothing, lambda: self.low.prepare(system))

    def cost(self, system):
        return self.low.cost(system)

    def _apply(self, state, b, transpose, rtol):
        """`(value, status, condition, products)` of a solve in float32, b scaled to length one first."""
        lower, low_state, full = state
        size = jnp.linalg.norm(b)
        scale = jnp.where(size > 0, size, 1)
        unit = (b / scale).astype(lower.dtype)
        if full is None:
            out = self.low.approximate(low_state, lower, unit, transpose=transpose, rtol=jnp.clip(rtol, 1e-4, 0.1))
            value = out.value.astype(b.dtype) * scale
            return value, out.status, out.condition.astype(b.dtype), out.products
        good = low_state.status.code == 0
        value = lax.cond(
            good,
            lambda: low_state.solve(unit, transpose).astype(b.dtype) * scale,
            lambda: full.solve(b, transpose),
        )
        status = Status.where(good, Status(), full.status)
        condition = jnp.where(good, low_state.condition.astype(b.dtype), full.condition)
        return value, status, condition, jnp.asarray(0)

    def solve(self, state, system, b, *, transpose=False, rtol=None, guess=None, forcing=None):
        wanted = jnp.asarray(50 * jnp.finfo(b.dtype).eps if rtol is None else rtol, b.dtype)
        value, status, condition, products = self._apply(state, b, transpose, wanted)
        start = value
        if guess is not None:  # whichever is closer
            rest = jnp.linalg.norm(b - system.product(guess, transpose))
            start = jnp.where(rest < 1e-4 * jnp.linalg.norm(b), guess, value)
        out = refine(
            lambda r: self._apply(state, r, transpose, wanted)[0], system, b, transpose=transpose, rtol=rtol,
            guess=start, condition=condition, status=status,
        )  # fmt: skip
        if isinstance(self.low, Direct):
            return out._replace(products=out.products + products)
        # iterative: float32 is no judge of the matrix, and where it does not get there float64 goes on
        fallback = lambda: self.low.solve(None, system, b, transpose=transpose, rtol=rtol, forcing=forcing)
        return lax.cond(
            out.status.code == 0,
            lambda: jax.tree.map(lambda a, b: a.astype(b.dtype), out, jax.eval_shape(fallback)),
            fallback,
        )

    def approximate(self, state, system, b, *, rtol=0.03, transpose=False):
        value, status, condition, products = self._apply(state, b, transpose, jnp.asarray(rtol, b.dtype))
        return LinearSolution(value, jnp.zeros_like(b), status, condition, products)

    @property
    def keeps(self):
        return self.low.keeps


def first_reduction(inner, x: PyTree, y: PyTree) -> float:
    """By how much the first inner solve should lower |F| before a Newton step is tried.

    A dense matrix costs about n / 50 gradients where the data stream from memory and n / 8 where they sit in the
    cache (matrix products gain less there; `python -m benchmarks.threshold`). Where it is cheap it may be formed
    early, and once more if need be; where it is dear the solver goes on until one suffices.
    """
    size = sum(leaf.size for leaf in jax.tree.leaves(y))
    if size > DENSE_LIMIT:
        return 1e-4
    data = sum(leaf.nbytes for leaf in jax.tree.leaves(inner) if eqx.is_array(leaf))
    gradients = size / (50 if data > 2**25 else 8)
    return 1e-3 if gradients <= 30 else 5e-6


def choose(linear_solver: Any, inner, x: PyTree, y: PyTree, *, loose: bool = False) -> AbstractLinearSolver:
    """The solver asked for, else the inner problem's own, else by structure and size; `loose`: the caller wants about
    one digit and refines the rest itself, so that float32 may serve where it pays."""
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
    if inner.operator_at(x, y) is not None:
        return Lineax(lx.AutoLinearSolver(well_posed=True))
    size = sum(leaf.size for leaf in jax.tree.leaves(y))
    if size <= DENSE_LIMIT:
        solver = Direct()
    else:
        solver = ConjugateGradient() if inner.symmetric and inner.definite else Krylov()
    gauge = inner.gauge_part(x, y) is not None
    return MixedPrecision(solver) if loose and not gauge and worth_lowering(inner, x, y) else solver
