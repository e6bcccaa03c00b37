"""Who finds the potentials: Sinkhorn sweeps in the log domain or on the kernel, Newton on the Schur complement, and the
choice between them. All maximize the dual; derivations in docs/theory/transport.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from bilevel.solvers import AbstractSolver, Found

from ._hessian import schur_matrix
from ._pairs import AbstractPairs, Matrix, ceiling_of

NEWTON_LIMIT = 2500
"""Points on the smaller side up to which `Automatic` may take Newton steps."""
CHUNK = 25
"""Sweeps between two looks at how it goes (on the kernel: between two absorptions, at most)."""


class Dual(NamedTuple):
    """A transport problem at one x: costs of all pairs, weights, epsilon, and tau (None: infinite)."""

    pairs: AbstractPairs
    a: Array
    b: Array
    epsilon: Array
    tau_1: Array | None
    tau_2: Array | None

    def swapped(self) -> Dual:
        return Dual(self.pairs.swapped(), self.b, self.a, self.epsilon, self.tau_2, self.tau_1)

    def at(self, epsilon: Array) -> Dual:
        return self._replace(epsilon=epsilon)

    @property
    def balanced(self) -> bool:
        return self.tau_1 is None and self.tau_2 is None

    def best_f(self, g: Array) -> Array:
        """The maximizer in f (zero at points without weight or without an allowed pair)."""
        soft = self.pairs.soft_min(g, self.b, self.epsilon)
        f = -eta(self.tau_1, self.epsilon) * self.epsilon * soft
        return jnp.where((self.a > 0) & jnp.isfinite(soft), f, 0)

    def gap_f(self, f: Array, soft: Array) -> Array:
        """The rows' violation at f, given `soft_min` of g."""
        rows = self.a * jnp.exp(jnp.where(jnp.isfinite(soft), f / self.epsilon + soft, -jnp.inf))
        gap = rows - self.a * decay(f, self.tau_1)
        return gap if self.tau_1 is None else jnp.where(jnp.isfinite(soft), gap, 0)

    def semi_dual(self, f: Array, g: Array) -> Array:
        """Minus the dual at (best_f(g), g), up to a constant."""
        total = jnp.vdot(self.a, decay(f, self.tau_1))  # the mass, as the rows' condition holds
        return self.epsilon * total - gain(f, self.a, self.tau_1) - gain(g, self.b, self.tau_2)

    def translate(self, f: Array, g: Array) -> Array:
        """The lambda that maximizes the dual at (f + lambda, g - lambda)."""
        if self.balanced:
            return jnp.zeros_like(self.epsilon)
        left = jnp.log(jnp.vdot(self.a, decay(f, self.tau_1)))
        right = jnp.log(jnp.vdot(self.b, decay(g, self.tau_2)))
        softness = sum(1 / t for t in (self.tau_1, self.tau_2) if t is not None)
        return (left - right) / softness


def eta(t: Array | None, epsilon: Array) -> Array:
    """tau / (tau + epsilon)."""
    return jnp.ones_like(epsilon) if t is None else t / (t + epsilon)


def decay(f: Array, t: Array | None) -> Array:
    """exp(-f / tau)."""
    return jnp.ones_like(f) if t is None else jnp.exp(-f / t)


def gain(f: Array, a: Array, t: Array | None) -> Array:
    """t sum_i a_i (1 - exp(-f_i / t))."""
    return jnp.vdot(a, f) if t is None else -t * jnp.vdot(a, jnp.expm1(-f / t))


class State(NamedTuple):
    """Potentials, |F|_2 at a point no worse than them, the factor by which the last sweep lowered it, and counts."""

    f: Array
    g: Array
    size: Array
    rate: Array
    steps: Array


# ------------------------------------------------------------------------------------------------ sweeps


def log_sweeps(dual: Dual, state: State, tol: Array, count: int) -> State:
    """Up to `count` sweeps in the log domain, each followed by the best translation."""
    back = dual.swapped()
    step_1, step_2 = (eta(t, dual.epsilon) * dual.epsilon for t in (dual.tau_1, dual.tau_2))

    def unfinished(carry):
        s, _, k = carry
        return (s.size > tol) & (k < count)

    def body(carry):
        s, gap_g, k = carry
        soft = dual.pairs.soft_min(s.g, dual.b, dual.epsilon)
        gap = dual.gap_f(s.f, soft)
        # |F| at the point where this sweep begins: unknown before the first
        size = jnp.where(k == 0, jnp.inf, jnp.sqrt(jnp.vdot(gap, gap) + jnp.vdot(gap_g, gap_g)))
        f = jnp.where((dual.a > 0) & jnp.isfinite(soft), -step_1 * soft, 0)
        soft = back.pairs.soft_min(f, dual.a, dual.epsilon)
        g = jnp.where((dual.b > 0) & jnp.isfinite(soft), -step_2 * soft, 0)
        if not dual.balanced:
            shift = dual.translate(f, g)
            before = decay(g, dual.tau_2)
            f, g = jnp.where(dual.a > 0, f + shift, 0), jnp.where(dual.b > 0, g - shift, 0)
            gap_g = dual.b * (before - decay(g, dual.tau_2))  # but for this, columns are right after a sweep
        rate = jnp.where(s.size < jnp.inf, size / jnp.where(s.size > 0, s.size, 1), 1)
        return State(f, g, size, rate, s.steps + 1), gap_g, k + 1

    return lax.while_loop(unfinished, body, (state, jnp.zeros_like(state.g), 0))[0]


def kernel_sweeps(dual: Dual, state: State, tol: Array, count: int) -> State:
    """Up to `count` sweeps on the kernel exp((f + g - c) / epsilon) at the potentials given, absorbed at the end; it
    ends early where the scalings grow large. One log-domain half sweep comes first, so that no row underflows."""
    f0 = dual.best_f(state.g)
    g0, epsilon = state.g, dual.epsilon
    K = dual.a[:, None] * dual.pairs.exponentials(f0, g0, epsilon) * dual.b[None, :]
    eta_1, eta_2 = eta(dual.tau_1, epsilon), eta(dual.tau_2, epsilon)
    want_f, want_g = dual.a * decay(f0, dual.tau_1), dual.b * decay(g0, dual.tau_2)
    limit = 0.04 * ceiling_of(f0)

    def ratio(p, q):
        good = (p > 0) & (q > 0)
        return jnp.where(good, jnp.log(jnp.where(good, p, 1)) - jnp.log(jnp.where(good, q, 1)), 0)

    def unfinished(carry):
        log_u, log_v, _, size, _, k = carry
        large = jnp.maximum(jnp.max(jnp.abs(log_u)), jnp.max(jnp.abs(log_v))) > limit
        return (size > tol) & (k < count) & ~large

    def body(carry):
        log_u, log_v, gap_g, last, _, k = carry
        rows = K @ jnp.exp(log_v)
        u = jnp.exp(log_u)
        gap = u * rows - want_f * (1 if dual.tau_1 is None else jnp.exp(-epsilon / dual.tau_1 * log_u))
        if dual.tau_1 is not None:
            gap = jnp.where(rows > 0, gap, 0)
        size = jnp.sqrt(jnp.vdot(gap, gap) + jnp.vdot(gap_g, gap_g))
        new_u = eta_1 * ratio(want_f, rows)
        columns = jnp.exp(new_u) @ K
        new_v = eta_2 * ratio(want_g, columns)
        gap_g = jnp.zeros_like(gap_g)
        if not dual.balanced:
            shift = dual.translate(f0 + epsilon * new_u, g0 + epsilon * new_v) / epsilon
            before = new_v
            new_u, new_v = jnp.where(dual.a > 0, new_u + shift, 0), jnp.where(dual.b > 0, new_v - shift, 0)
            if dual.tau_2 is not None:
                slope = -epsilon / dual.tau_2
                gap_g = jnp.where(columns > 0, want_g * (jnp.exp(slope * before) - jnp.exp(slope * new_v)), 0)
        rate = jnp.where(last < jnp.inf, size / jnp.where(last > 0, last, 1), 1)
        return new_u, new_v, gap_g, size, rate, k + 1

    zero_f, zero_g = jnp.zeros_like(f0), jnp.zeros_like(g0)
    big = jnp.full_like(state.size, jnp.inf)
    columns = jnp.sum(K, axis=0)
    gap_g = columns - want_g if dual.tau_2 is None else jnp.where(columns > 0, columns - want_g, 0)
    start = (zero_f, zero_g, gap_g, big, jnp.ones_like(big), 0)
    log_u, log_v, _, size, rate, k = lax.while_loop(unfinished, body, start)
    return State(f0 + epsilon * log_u, g0 + epsilon * log_v, size, rate, state.steps + k)


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
    epsilon where epsilon is small against the costs.
    """

    domain: str = eqx.field(static=True, default="kernel")
    annealing: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        if self.domain not in ("kernel", "log"):
            raise ValueError(f"transport.Sinkhorn: domain must be 'kernel' or 'log', found {self.domain!r}.")

    def find(self, inner, x, y0, *, tol, max_steps):
        return _find(inner, x, y0, tol, max_steps, self.domain, self.annealing, newton="never")


class SchurNewton(AbstractSolver):
    """Newton's method on the Schur complement of the smaller side, after a few sweeps. Needs the matrix of costs."""

    def find(self, inner, x, y0, *, tol, max_steps):
        return _find(inner, x, y0, tol, max_steps, "kernel", True, newton="always")


class Automatic(AbstractSolver):
    """Sweeps on the kernel (in the log domain without a matrix), with annealing where epsilon is small, and Newton
    steps as soon as the sweeps' own rate says that they would take longer."""

    def find(self, inner, x, y0, *, tol, max_steps):
        return _find(inner, x, y0, tol, max_steps, "kernel", True, newton="auto")


def _find(inner, x, y0, tol, max_steps: int, domain: str, annealing: bool, newton: str) -> Found:
    dual = inner.dual(x)
    f, g = y0
    tol = jnp.asarray(tol, f.dtype)
    swap = len(f) < len(g)
    if swap:
        dual, f, g = dual.swapped(), g, f
    matrix = isinstance(dual.pairs, Matrix)
    sweeps = kernel_sweeps if matrix and domain == "kernel" else log_sweeps
    if not matrix or len(g) > NEWTON_LIMIT:
        newton = "never" if newton == "auto" else newton
    if newton == "always" and not matrix:
        raise ValueError("transport.SchurNewton: this cost has no matrix; use Sinkhorn('log') or Automatic().")
    stages = _stages(dual, g) if annealing else jnp.zeros((), jnp.int32)
    state = _search(dual, f, g, stages, sweeps, tol, max_steps, newton)
    f, g = (state.g, state.f) if swap else (state.f, state.g)
    return Found((f, g), state.steps, 2 * state.steps)


def _stages(dual: Dual, g: Array) -> Array:
    """How many larger epsilons (4, 16, … times) to begin with: none from a start that is near, or where epsilon is not
    small against the range of the costs."""
    f = dual.best_f(g)
    _, columns = dual.pairs.sums(f, g, dual.a, dual.b, dual.epsilon)
    mass = jnp.minimum(jnp.sum(dual.a), jnp.sum(dual.b))
    far = ~(jnp.sum(jnp.abs(columns - dual.b * decay(g, dual.tau_2))) <= 0.2 * mass)
    stages = jnp.ceil(jnp.log(jnp.maximum(dual.pairs.spread() / (10 * dual.epsilon), 1)) / jnp.log(4.0))
    return jnp.where(far & jnp.isfinite(stages), jnp.minimum(stages, 12), 0).astype(jnp.int32)


def _search(
    dual: Dual, f: Array, g: Array, stages: Array, sweeps: Callable, tol: Array, max_steps: int, newton: str
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

    def promises(state):
        rate = jnp.clip(state.rate, 1e-3, 1 - 1e-7)
        left = jnp.log(jnp.maximum(state.size / jnp.maximum(tol, jnp.finfo(f.dtype).tiny), 1)) / -jnp.log(rate)
        return (left > worth) | (newton == "always")

    def unfinished(carry):
        state, stage, _, stuck = carry
        return ((state.size > tol) | (stage >= 0)) & (state.steps < max_steps) & ~stuck

    def body(carry):
        state, stage, by_newton, _ = carry
        # the last stage, 0, is the problem itself, and so is what follows, -1
        left = jnp.maximum(stage, 0)
        here = dual.at(dual.epsilon * four ** left.astype(f.dtype))
        sweep = lambda s: sweeps(here, s._replace(size=big), jnp.where(left > 0, loose, tol), CHUNK)
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
