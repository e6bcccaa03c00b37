"""Moving an inexact y closer: y <- y - P(x, y)^-1 F(x, y) for a preconditioner P.

P only moves the point (Ye, Peyré, Cremers, Ablin 2024; docs/theory, "A moved evaluation point"): it is evaluated,
never differentiated. Newton makes the error quadratic; any P with |I - P^-1 F_y| < 1 shrinks its constant.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from ._trees import check_like, coarsest, ravel_like
from .errors import Status
from .linear import AbstractLinearSolver, LinearSystem, MixedPrecision, linear_system
from .problem import as_given, as_node

__all__ = ["AbstractCorrection", "Corrected", "Jacobi", "Newton", "Preconditioner", "correct"]


class AbstractCorrection(eqx.Module):
    """Interface: `steps` times y <- y - `displacement`."""

    steps: eqx.AbstractVar[int]

    @abc.abstractmethod
    def displacement(
        self, x: PyTree, y: PyTree, residual: jax.Array, system: LinearSystem, solve: Callable
    ) -> tuple[jax.Array, Status]:
        """P(x, y)^-1 F, flat, of shape (n,), from F flat; `solve(b)` solves with dF/dy and gives (value, status)."""

    @property
    def uses_newton(self) -> bool:
        """Whether P is dF/dy, so that its prepared state can be kept for the adjoint."""
        return False


def _check_steps(steps: Any, owner: str) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"bilevel.{owner}: steps must be an integer, found {steps!r}.")
    if steps < 1:
        raise ValueError(f"bilevel.{owner}: steps must be at least 1, found {steps}.")


class Newton(AbstractCorrection):
    """P = dF/dy: the error e of y becomes O(e^2), after `steps` steps O(e^(2^steps)). Derived in docs/theory."""

    steps: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        _check_steps(self.steps, "Newton")

    def displacement(self, x, y, residual, system, solve):
        return solve(residual)

    @property
    def uses_newton(self):
        return True


class Preconditioner(AbstractCorrection):
    """Any P: `solve(x, y, F) -> P^-1 F`, of y's structure (frozen Hessian, quasi-Newton inverse, scaled identity)."""

    _solve: Any
    steps: int = eqx.field(static=True)

    def __init__(self, solve: Callable, steps: int = 1):
        if not callable(solve):
            raise TypeError(f"bilevel.Preconditioner: `solve` must be a function (x, y, F) -> like y, found {solve!r}.")
        _check_steps(steps, "Preconditioner")
        self._solve = as_node(solve)
        self.steps = steps

    @property
    def solve(self) -> Callable:
        return as_given(self._solve)

    def displacement(self, x, y, residual, system, solve):
        moved = self._solve(x, y, system.unravel(residual))
        check_like(moved, y, "Preconditioner", "the value of solve(x, y, F)", "y")
        return ravel_like(moved, residual.dtype), Status("converged")


class Jacobi(AbstractCorrection):
    """P = diag(dF/dy) / damping.

    **Arguments:** `steps`; `damping`: a number, or None: 1 / lambda_max(D^-1/2 F_y D^-1/2), by power iteration with
    a safety factor, so that the spectral radius of I - P^-1 F_y stays below one for every positive definite F_y.
    `damping=1.0` is the undamped correction, which makes things worse once that eigenvalue exceeds 2. The diagonal
    takes n products with dF/dy.
    """

    steps: int = eqx.field(static=True, default=1)
    damping: float | None = None

    def __check_init__(self):
        _check_steps(self.steps, "Jacobi")
        if isinstance(self.damping, (int, float)) and not self.damping > 0:
            raise ValueError(f"bilevel.Jacobi: damping must be positive, found {self.damping}.")

    def displacement(self, x, y, residual, system, solve):
        diagonal = diagonal_of(system)
        damping = self.damping
        if damping is None:
            damping = 1 / scaled_spectral_radius(system, diagonal)
        safe = jnp.where(diagonal != 0, diagonal, 1)
        move = jnp.asarray(damping, residual.dtype) * residual / safe
        status = Status.where(jnp.all(diagonal > 0), Status("converged"), Status("not_a_minimum"))
        return move, status


def diagonal_of(system: LinearSystem) -> jax.Array:
    """diag(dF/dy), shape (n,), by n products, a block of columns at a time."""
    if system.size <= 256:
        return jnp.diagonal(system.matrix())

    def entry(i):
        unit = jnp.zeros((system.size,), system.dtype).at[i].set(1)
        return system.mv(unit)[i]

    return lax.map(entry, jnp.arange(system.size), batch_size=256)


def scaled_spectral_radius(
    system: LinearSystem, diagonal: jax.Array, steps: int = 60, safety: float = 1.1
) -> jax.Array:
    """lambda_max(D^-1/2 F_y D^-1/2) by power iteration, times a safety factor; lies in [1, n] for F_y > 0."""
    root = jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1))
    v = 1 + 0.5 * jnp.cos(jnp.arange(1, system.size + 1, dtype=system.dtype))

    def body(_, carry):
        v, _ = carry
        v = v / jnp.linalg.norm(v)
        w = system.mv(v / root) / root
        return w, jnp.linalg.norm(w)

    _, size = lax.fori_loop(0, steps, body, (v, jnp.ones((), system.dtype)))
    return safety * jnp.maximum(size, 1)


class Corrected(NamedTuple):
    """The moved point `flat`, the `start` it was moved from, the residuals before and after, the length of the
    displacement, whether it is `used`, whether y was `settled` (the displacement is round-off), the prepared `state`
    of the linear solver, `(F, system)` there, a `status`, and the numbers of evaluations of F and of products with
    dF/dy."""

    flat: jax.Array
    start: jax.Array
    before: jax.Array
    after: jax.Array
    moved: jax.Array
    used: jax.Array
    settled: jax.Array
    state: PyTree
    at: tuple[jax.Array, LinearSystem]
    status: Status
    evaluations: jax.Array
    products: jax.Array


def correct(
    correction: AbstractCorrection | None, solver: AbstractLinearSolver, inner, x: PyTree, flat: jax.Array,
    unravel: Callable, *, guard: bool = True, loose: bool = False, forcing: Any = 1e-3,
) -> Corrected:  # fmt: skip
    """Applies the whole correction and judges it once: it is used if finite and |F(x, ŷ)| < |F(x, y)|.

    At round-off, where no step can lower the residual any more, y is kept and that is no failure. `loose`: the caller
    judges the outcome himself, so Newton's system is solved without a residual test of its own, and `at` is that of
    the moved point even where it is refused. `forcing`: the relative residual of that solve.
    """
    low = isinstance(solver, MixedPrecision)
    residual, system = linear_system(inner, x, unravel(flat), lower=low)
    before = jnp.linalg.norm(residual)
    products, prepared = jnp.asarray(0, jnp.int32), jnp.asarray(solver.cost(system), jnp.int32)
    if correction is None:
        one = jnp.asarray(1, jnp.int32)
        state = solver.prepare(system)
        return Corrected(
            flat, flat, before, before, jnp.zeros_like(before), jnp.asarray(True), before == 0, state,
            (residual, system), Status.where(jnp.isfinite(before), Status(), Status("non_finite")), one, prepared,
        )  # fmt: skip

    status = Status.where(jnp.isfinite(before), Status(), Status("non_finite"))
    state, condition = None, jnp.ones((), flat.dtype)
    point, at = flat, residual
    move = jnp.zeros_like(flat)
    for k in range(correction.steps):
        if k > 0:
            at, system = linear_system(inner, x, unravel(point), lower=low)
        if correction.uses_newton:
            state = solver.prepare(system)
            size = jnp.linalg.norm(point)
            if loose:
                answer = solver.approximate(state, system, at, rtol=forcing)
            else:
                answer = solver.solve(state, system, at, forcing=(1e-3, size))
            solve = lambda b, a=answer: (a.value, a.status)
            condition = jnp.maximum(condition, answer.condition)
            products = products + prepared + answer.products.astype(jnp.int32)
        else:
            solve = lambda b: (b, Status("converged"))
        move, said = correction.displacement(x, unravel(point), at, system, solve)
        move = system.off_gauge(move)
        status = status.then(said)
        point = point - move
    residual, system = linear_system(inner, x, unravel(point), lower=low)
    after = jnp.linalg.norm(residual)
    moved = jnp.linalg.norm(flat - point)
    eps = coarsest(unravel(flat))
    length = jnp.maximum(jnp.linalg.norm(flat), jnp.asarray(inner.unit_at(x, unravel(flat)), flat.dtype))
    settled = (moved <= 100 * eps * condition * length) | (before == 0)
    lower = jnp.isfinite(after) & (after < before)
    stopped_short = status == Status("linear_solve")  # an early stop is no reason to refuse: the residual judges
    if guard:
        used = lower
        said = Status.where(lower | settled, Status("converged"), Status("correction_rejected"))
    else:
        used = jnp.isfinite(after)
        said = Status.where(used, Status("converged"), Status("correction_rejected"))
    status = Status.where((status == Status("converged")) | stopped_short, said, status)
    kept = jnp.where(used, point, flat)
    if not loose or not correction.uses_newton:
        residual, system = linear_system(inner, x, unravel(kept), lower=low)
    if not correction.uses_newton:
        state = solver.prepare(system)
        products = products + prepared
    after = jnp.where(used, after, before)
    evaluations = jnp.asarray(correction.steps + 1, jnp.int32)
    return Corrected(
        kept, flat, before, after, moved, used, settled, state, (residual, system), status, evaluations, products
    )
