"""Preconditioned conjugate gradients that also report what they saw of the spectrum.

lineax's CG is not used for this one job because it keeps its coefficients to itself: the curvature p'Ap (a
saddle shows as a negative one) and the Ritz values (a singular matrix shows as a vanishing one) are what lets
`bilevel` refuse an answer instead of returning a number. Everything else Krylov is lineax's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .errors import Status

_KEPT = 48  # Lanczos coefficients kept for the Ritz values: later ones hardly move the extreme values we ask for


class ConjugateGradientResult(NamedTuple):
    """`value` with its recomputed `residual` b - A x, the `steps` taken, a `status`, and `condition`: the ratio of
    the extreme Ritz values of the preconditioned matrix, a lower bound on its condition number."""

    value: jax.Array
    residual: jax.Array
    steps: jax.Array
    status: Status
    condition: jax.Array


class _State(NamedTuple):
    x: jax.Array
    r: jax.Array
    p: jax.Array
    gamma: jax.Array
    step: jax.Array
    curvature_ok: jax.Array
    alphas: jax.Array
    betas: jax.Array


def conjugate_gradient(
    mv: Callable[[jax.Array], jax.Array],
    b: jax.Array,
    *,
    rtol: jax.Array | float,
    guess: jax.Array | None = None,
    preconditioner: Callable[[jax.Array], jax.Array] | None = None,
    max_steps: int | None = None,
    forcing: tuple[float, jax.Array] | None = None,
    verify: bool = True,
    condition: jax.Array | None = None,
) -> ConjugateGradientResult:
    """Solves A x = b for a symmetric positive definite A given by its product.

    Stops when |b - A x| <= rtol |b|; with `forcing=(c, scale)` already at min(max(rtol, c |x| / scale), 0.01) |b|,
    the forcing that keeps an inexact Newton step of second order (Dembo, Eisenstat, Steihaug 1982). All arrays are
    flat of shape (n,) and one floating dtype. With K = n steps it reproduces the dense solve up to round-off; it
    finishes early without NaN. The residual is recomputed, one more product, unless `verify` is False. Status
    `not_a_minimum` at negative curvature, `singular` at vanishing Ritz values relative to the largest (what the
    right-hand side does not excite is not seen), `linear_solve` when it stops short. `condition`: where an earlier run
    has found it, so that no Ritz values are computed (they cost more than some products of a small matrix).
    """
    n, dtype = b.shape[0], b.dtype
    eps = jnp.finfo(dtype).eps
    precondition = preconditioner if preconditioner is not None else (lambda v: v)
    limit = 10 * n + 10 if max_steps is None else max_steps
    b_norm = jnp.linalg.norm(b)
    zero = jnp.zeros_like(b)
    x = zero if guess is None else guess
    r = b if guess is None else b - mv(guess)
    z = precondition(r)
    kept = min(_KEPT, limit) if condition is None else 1
    state = _State(
        x, r, z, jnp.vdot(r, z), jnp.asarray(0), jnp.asarray(True),
        jnp.zeros((kept,), dtype), jnp.zeros((kept,), dtype),
    )  # fmt: skip

    def tolerance(x):
        relative = jnp.asarray(rtol, dtype)
        if forcing is not None:
            c, scale = forcing
            share = jnp.asarray(c, dtype) * jnp.linalg.norm(x) / jnp.maximum(scale, jnp.finfo(dtype).tiny)
            relative = jnp.maximum(relative, jnp.minimum(share, jnp.asarray(0.01, dtype)))
        return relative * b_norm

    def unfinished(s: _State):
        large = jnp.linalg.norm(s.r) > tolerance(s.x)
        return large & (s.step < limit) & s.curvature_ok & (s.gamma > 0) & jnp.isfinite(s.gamma)

    def body(s: _State):
        ap = mv(s.p)
        curvature = jnp.vdot(s.p, ap)
        ok = curvature > 0
        alpha = jnp.where(ok, s.gamma / jnp.where(ok, curvature, 1), 0)
        x, r = s.x + alpha * s.p, s.r - alpha * ap
        z = precondition(r)
        gamma = jnp.vdot(r, z)
        beta = gamma / s.gamma
        slot = jnp.minimum(s.step, kept - 1)
        write = ok & (s.step < kept)
        alphas = s.alphas.at[slot].set(jnp.where(write, alpha, s.alphas[slot]))
        betas = s.betas.at[slot].set(jnp.where(write, beta, s.betas[slot]))
        return _State(x, r, z + beta * s.p, gamma, s.step + 1, ok, alphas, betas)

    end = lax.while_loop(unfinished, body, state)
    rest = b - mv(end.x) if verify else end.r
    residual = jnp.linalg.norm(rest)
    if condition is None:
        smallest, largest = _ritz(end.alphas, end.betas, end.step, kept)
        condition = jnp.where(smallest > 0, largest / jnp.where(smallest > 0, smallest, 1), jnp.inf)
        condition = jnp.where(end.step == 0, jnp.ones_like(condition), condition)
    else:
        largest = 1 / jnp.where(end.alphas[0] > 0, end.alphas[0], 1)  # a Rayleigh quotient: below it
    negative = ~end.curvature_ok
    vanishing = condition * _round_off(n, eps) >= 1
    # round-off of the recurrence against the true residual: a factor ten is forgiven, and what round-off forbids
    reached = residual <= jnp.maximum(10 * tolerance(end.x), 50 * eps * condition * b_norm)
    status = Status.where(reached, Status("converged"), Status("linear_solve"))
    status = Status.where(vanishing, Status("singular"), status)
    # zero curvature is a null direction, not a descent direction
    status = Status.where(negative, _curvature_status(mv, end, largest), status)
    status = Status.where(jnp.isfinite(residual), status, Status("non_finite"))
    return ConjugateGradientResult(end.x, rest, end.step, status, condition)


def _round_off(n: int, eps):
    """How large, relative to the largest, round-off makes a Ritz value that should be zero. Errors of sums of n terms
    add up like sqrt(n); n eps, a factorization's, would call a condition number of 30 singular at 3e5 unknowns in
    float32."""
    return eps * min(n, max(_KEPT, math.isqrt(n)))


def _curvature_status(mv, end: _State, largest) -> Status:
    """Zero curvature, up to round-off of the largest Ritz value, is a null direction; clearly negative a saddle."""
    curvature = jnp.vdot(end.p, mv(end.p))
    size = jnp.abs(largest) * jnp.vdot(end.p, end.p)
    null = jnp.abs(curvature) <= 10 * _round_off(end.p.shape[0], jnp.finfo(curvature.dtype).eps) * size
    return Status.where(null, Status("singular"), Status("not_a_minimum"))


def _ritz(alphas, betas, steps, kept):
    """Extreme eigenvalues of the Lanczos matrix that conjugate gradients build on the way."""
    used = jnp.arange(kept) < steps
    safe = jnp.where(used & (alphas != 0), alphas, 1)
    inverse = jnp.where(used & (alphas != 0), 1 / safe, 1 / safe[0])
    carry = jnp.where(used, betas, 0)
    diagonal = inverse + jnp.concatenate([jnp.zeros_like(carry[:1]), carry[:-1] * inverse[:-1]])
    inside = used[1:]
    off = jnp.where(inside, jnp.sqrt(jnp.maximum(carry[:-1], 0)) * inverse[:-1], 0)
    diagonal = jnp.where(used, diagonal, inverse[0])
    matrix = jnp.diag(diagonal) + jnp.diag(off, 1) + jnp.diag(off, -1)
    matrix = jnp.where(jnp.all(jnp.isfinite(matrix)), matrix, jnp.eye(kept, dtype=matrix.dtype))
    values = jnp.linalg.eigvalsh(matrix)
    return values[0], values[-1]
