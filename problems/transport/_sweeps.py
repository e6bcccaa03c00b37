"""The dual of a transport problem and Sinkhorn sweeps that maximize it, in the log domain or on the kernel; derivations
in docs/theory/transport.md.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ._pairs import AbstractPairs, Matrix, ceiling_of


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
        return self.f_of(self.pairs.soft_min(g, self.b, self.epsilon))

    def f_of(self, soft: Array) -> Array:
        """The maximizer in f, given `soft_min` of g."""
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


def log_sweeps(dual: Dual, state: State, tol: Array, count: Array) -> State:
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


def kernel_sweeps(dual: Dual, state: State, tol: Array, count: Array) -> State:
    """Up to `count` sweeps on the kernel exp((f + g - c) / epsilon) at the potentials given, absorbed at the end; it
    ends early where the scalings grow large. One log-domain half sweep comes first, so that no row underflows."""
    g0, epsilon = state.g, dual.epsilon
    # the terms of that half sweep are the kernel, up to factors of its rows
    assert isinstance(dual.pairs, Matrix)
    soft, top, E = dual.pairs.soft_min_and_terms(g0, dual.b, epsilon)
    f0 = dual.f_of(soft)
    left = jnp.where(dual.a > 0, dual.a * jnp.exp(f0 / epsilon + top), 0)
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
        rows = left * (E @ (dual.b * jnp.exp(log_v)))
        u = jnp.exp(log_u)
        gap = u * rows - want_f * (1 if dual.tau_1 is None else jnp.exp(-epsilon / dual.tau_1 * log_u))
        if dual.tau_1 is not None:
            gap = jnp.where(rows > 0, gap, 0)
        size = jnp.sqrt(jnp.vdot(gap, gap) + jnp.vdot(gap_g, gap_g))
        new_u = eta_1 * ratio(want_f, rows)
        columns = dual.b * ((left * jnp.exp(new_u)) @ E)
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
    columns = dual.b * (left @ E)
    gap_g = columns - want_g if dual.tau_2 is None else jnp.where(columns > 0, columns - want_g, 0)
    start = (zero_f, zero_g, gap_g, big, jnp.ones_like(big), 0)
    log_u, log_v, _, size, rate, k = lax.while_loop(unfinished, body, start)
    return State(f0 + epsilon * log_u, g0 + epsilon * log_v, size, rate, state.steps + k)
