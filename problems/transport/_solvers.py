"""Who finds the potentials: Sinkhorn sweeps, Newton on the Schur complement, and the choice between them. All maximize
the dual; derivations in docs/theory/transport.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from bilevel.solvers import AbstractSolver, Found

from ._anderson import anderson_sweeps
from ._hessian import schur_matrix
from ._pairs import Matrix
from ._sweeps import Dual, State, decay, eta, kernel_sweeps, log_sweeps

NEWTON_LIMIT = 2500
"""Points on the smaller side up to which `Automatic` may take Newton steps."""
CHUNK = 25
"""Sweeps between two looks at how it goes (on the kernel: between two absorptions, at most)."""
REMEMBERED = 5
"""Sweeps that `Automatic` remembers for Anderson acceleration, without a matrix."""


# ------------------------------------------------------------------------------------------------ Newton


def newton_step(dual: Dual, state: State) -> State:
    """One Newton step on the semi-dual in g, damped until the dual or the violation improves (Armijo); rate inf where
    nothing helps."""
    f, g, epsilon = dual.best_f(state.g), state.g, dual.epsilon
    pi = dual.a[:, None] * dual.pairs.exponentials(f, g, epsilon) * dual.b[None, :]
    rows, columns = jnp.sum(pi, axis=1), jnp.sum(pi, axis=0)
    want = dual.b * decay(g, dual.tau_2)
    live = (dual.b > 0) & (columns > 0)
    rest = jnp.where(live, want - columns, 0)
    inverse = jnp.where(rows > 0, eta(dual.tau_1, epsilon) / (epsilon * jnp.where(rows > 0, rows, 1)), 0)
    diagonal = columns / epsilon + (0 if dual.tau_2 is None else want / dual.tau_2)
    diagonal = jnp.where(live, diagonal, 1)
    gauge = live.astype(g.dtype) if dual.balanced else None
    scale = 1 / jnp.sqrt(diagonal)
    matrix = schur_matrix(pi, inverse, diagonal, gauge) * scale[:, None] * scale[None, :]
    ridge = 10 * float(jnp.finfo(g.dtype).eps)
    factor = jnp.linalg.cholesky(matrix + ridge * jnp.eye(len(g), dtype=g.dtype), symmetrize_input=False)
    move = scale * jax.scipy.linalg.cho_solve((factor, True), scale * rest)
    fine = jnp.all(jnp.isfinite(move))
    move = jnp.where(fine, move, 0)
    slope, here, size = jnp.vdot(rest, move), dual.semi_dual(f, g), jnp.linalg.norm(rest)

    def trial(t):
        new = g + t * move
        new_f = dual.best_f(new)
        _, sums = dual.pairs.sums(new_f, new, dual.a, dual.b, epsilon)
        gap = jnp.where(live, dual.b * decay(new, dual.tau_2) - sums, 0)
        left = jnp.linalg.norm(gap)
        good = (dual.semi_dual(new_f, new) <= here - 1e-3 * t * slope) | (left <= 0.5 * size)
        return new_f, new, left, good & jnp.isfinite(left)

    def body(carry):
        t, count, *_ = carry
        return 0.4 * t, count + 1, *trial(t)

    start = (jnp.ones_like(epsilon), 0, f, g, size, jnp.asarray(False))
    _, _, new_f, new, left, good = lax.while_loop(lambda c: ~c[5] & (c[1] < 12), body, start)
    good = good & fine
    rate = jnp.where(good, left / jnp.where(size > 0, size, 1), jnp.inf)
    pick = lambda p, q: jnp.where(good, p, q)
    return State(pick(new_f, f), pick(new, g), pick(left, size), rate, state.steps + 1)


# ------------------------------------------------------------------------------------------------ solvers


class Sinkhorn(AbstractSolver):
    """Sinkhorn sweeps, each followed by the best translation (so that penalised marginals are as fast as kept ones).

    **Arguments:** `domain`: "kernel" (matrix products; potentials are absorbed into the kernel before it can under- or
    overflow) or "log"; costs without a matrix are always treated in the log domain. `annealing`: begin at a larger
    epsilon where epsilon is small against the costs. `anderson`: how many sweeps Anderson acceleration remembers (0:
    none), in the log domain; a mixed step is kept only where it improves the dual or the marginals.
    """

    domain: str = eqx.field(static=True, default="kernel")
    annealing: bool = eqx.field(static=True, default=True)
    anderson: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        if self.domain not in ("kernel", "log"):
            raise ValueError(f"transport.Sinkhorn: domain must be 'kernel' or 'log', found {self.domain!r}.")
        if isinstance(self.anderson, bool) or not isinstance(self.anderson, int) or self.anderson < 0:
            raise ValueError(
                f"transport.Sinkhorn: anderson must be a number of sweeps, 0 or more, found {self.anderson!r}."
            )
        if self.anderson and self.domain != "log":
            raise ValueError("transport.Sinkhorn: anderson acceleration is in the log domain: pass domain='log' too.")

    def find(self, inner, x, y0, *, tol, max_steps):
        log = self.domain == "log"
        return _find(inner, x, y0, tol, max_steps, log, self.anderson, self.annealing, newton="never")


class SchurNewton(AbstractSolver):
    """Newton's method on the Schur complement of the smaller side, after a few sweeps. Needs the matrix of costs."""

    def find(self, inner, x, y0, *, tol, max_steps):
        return _find(inner, x, y0, tol, max_steps, False, REMEMBERED, True, newton="always")


class Automatic(AbstractSolver):
    """Sweeps on the kernel (without a matrix: in the log domain, with Anderson acceleration), with annealing where
    epsilon is small, and Newton steps as soon as the sweeps' own rate says that they would take longer."""

    def find(self, inner, x, y0, *, tol, max_steps):
        return _find(inner, x, y0, tol, max_steps, False, REMEMBERED, True, newton="auto")


def _find(inner, x, y0, tol, max_steps: int, log: bool, depth: int, annealing: bool, newton: str) -> Found:
    """Sweeps on the kernel, or in the log domain if `log` or without a matrix, there with Anderson acceleration of
    that `depth`."""
    dual = inner.dual(x)
    f, g = y0
    tol = jnp.asarray(tol, f.dtype)
    swap = len(f) < len(g)
    if swap:
        dual, f, g = dual.swapped(), g, f
    matrix = isinstance(dual.pairs, Matrix)
    sweeps, chunk = (kernel_sweeps, CHUNK) if matrix and not log else (log_sweeps, CHUNK)
    if sweeps is log_sweeps and depth:  # which forgets everything between two looks
        sweeps, chunk = functools.partial(anderson_sweeps, depth=depth), 8 * CHUNK
    if not matrix or len(g) > NEWTON_LIMIT:
        newton = "never" if newton == "auto" else newton
    if newton == "always" and not matrix:
        raise ValueError("transport.SchurNewton: this cost has no matrix; use Sinkhorn('log') or Automatic().")
    stages = _stages(dual, g) if annealing else jnp.zeros((), jnp.int32)
    state = _search(dual, f, g, stages, sweeps, chunk, tol, max_steps, newton)
    f, g = (state.g, state.f) if swap else (state.f, state.g)
    return Found((f, g), state.steps, 2 * state.steps)


def _stages(dual: Dual, g: Array) -> Array:
    """How many larger epsilons (4, 16, … times) to begin with: none from a start that is near, or where epsilon is not
    small against the range of the costs."""
    stages = jnp.ceil(jnp.log(jnp.maximum(dual.pairs.spread() / (40 * dual.epsilon), 1)) / jnp.log(4.0))
    stages = jnp.where(jnp.isfinite(stages), jnp.minimum(stages, 12), 0).astype(jnp.int32)

    def far():
        f = dual.best_f(g)
        _, columns = dual.pairs.sums(f, g, dual.a, dual.b, dual.epsilon)
        mass = jnp.minimum(jnp.sum(dual.a), jnp.sum(dual.b))
        return ~(jnp.sum(jnp.abs(columns - dual.b * decay(g, dual.tau_2))) <= 0.2 * mass)

    return jnp.where(lax.cond(stages > 0, far, lambda: jnp.asarray(False)), stages, 0)


def _search(
    dual: Dual, f: Array, g: Array, stages: Array, sweeps: Callable, chunk: int, tol: Array, max_steps: int, newton: str
) -> State:
    """A few sweeps at each of the larger epsilons; then sweeps, and Newton steps where they are allowed and promise to
    be faster, until |F|_2 <= tol."""
    count = len(dual.b)
    # one Newton step costs about count / 24 sweeps (its matrix product against two matrix-vector products)
    worth = count / 5 + 20
    loose = jnp.maximum(0.1 * jnp.minimum(jnp.linalg.norm(dual.a), jnp.linalg.norm(dual.b)), tol)
    big = jnp.full((), jnp.inf, f.dtype)
    four = jnp.asarray(4.0, f.dtype)
    start = State(f, g, big, jnp.ones((), f.dtype), jnp.zeros((), jnp.int32))

    def sweeps_left(state):
        """As the last rate has it; infinite before the first sweep."""
        rate = jnp.clip(state.rate, 1e-3, 1 - 1e-7)
        return jnp.log(jnp.maximum(state.size / jnp.maximum(tol, jnp.finfo(f.dtype).tiny), 1)) / -jnp.log(rate)

    def promises(state):
        return (sweeps_left(state) > worth) | (newton == "always")

    def unfinished(carry):
        state, stage, _, stuck = carry
        return ((state.size > tol) | (stage >= 0)) & (state.steps < max_steps) & ~stuck

    def body(carry):
        state, stage, by_newton, _ = carry
        # the last stage, 0, is the problem itself, and so is what follows, -1
        left = jnp.maximum(stage, 0)
        here = dual.at(dual.epsilon * four ** left.astype(f.dtype))
        # each look makes the kernel anew: none on the way where the end is in sight
        known = (stage < 0) & jnp.isfinite(state.size) & jnp.isfinite(state.rate)  # not after a Newton step that failed
        many = jnp.clip(1.2 * jnp.where(known, sweeps_left(state), 1), chunk, 8 * CHUNK).astype(jnp.int32)
        many = jnp.clip(many, chunk, jnp.maximum(max_steps - state.steps, chunk))
        sweep = lambda s: sweeps(here, s._replace(size=big), jnp.where(left > 0, loose, tol), many)
        if newton == "never":
            new = sweep(state)
        else:
            new = lax.cond(by_newton, lambda s: newton_step(dual, s), sweep, state)
        failed = by_newton & ~jnp.isfinite(new.rate)  # then sweeps take over for a while
        again = ~failed & (by_newton | promises(new)) & (stage <= 0) & (newton != "never")
        frozen = (stage <= 0) & jnp.all(new.f == state.f) & jnp.all(new.g == state.g) & ~by_newton
        return new, jnp.maximum(stage - 1, -1), again, frozen

    state, *_ = lax.while_loop(unfinished, body, (start, stages, jnp.asarray(False), jnp.asarray(False)))
    return state
