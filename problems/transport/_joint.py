"""Newton's method on (theta, g) at once for the convex losses of inverse transport, f eliminated exactly.

J(theta, g) = <c_theta, pi_hat> + min over f of -Psi is jointly convex; eliminating g from its Hessian by the Schur
complement leaves the exact Hessian of the loss in theta (derived in docs/theory/transport.md). With a penalty the
step in theta is a proximal one in the metric of that Hessian.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jax import lax
from jaxtyping import Array

from ._hessian import schur_matrix
from ._pairs import Matrix
from ._sweeps import Dual, decay, eta


class Setting(eqx.Module):
    """Features (K, n, m), their sums against the observation (K,), and the transport problem but for its cost, which is
    sum_k theta_k features_k - shift."""

    features: Array
    observed: Array
    shift: Array | None
    a: Array
    b: Array
    epsilon: Array
    tau: tuple[Array | None, Array | None]

    def dual(self, theta: Array) -> Dual:
        costs = jnp.tensordot(theta, self.features, 1)
        if self.shift is not None:
            costs = costs - self.shift
        return Dual(Matrix(costs), self.a, self.b, self.epsilon, *self.tau)


class Local(NamedTuple):
    """What one evaluation at (theta, g) gives: `value` of J up to a constant, its best `f`, the `gradient` of J in
    theta and `rest` in g, `reduced`: the gradient of the loss in theta to first order, its exact `hessian`, `raw`: the
    diagonal of the second moments, and `along_g`, `back_g`: dg = back_g - along_g dtheta."""

    value: Array
    f: Array
    gradient: Array
    rest: Array
    reduced: Array
    hessian: Array
    raw: Array
    along_g: Array
    back_g: Array


@eqx.filter_jit
def value_at(setting: Setting, theta: Array, g: Array) -> Array:
    """J up to a constant."""
    dual = setting.dual(theta)
    return jnp.vdot(theta, setting.observed) + dual.semi_dual(dual.best_f(g), g)


@eqx.filter_jit
def local_at(setting: Setting, theta: Array, g: Array) -> Local:
    """J, its derivatives, and the loss's own Hessian."""
    dual = setting.dual(theta)
    epsilon, K = setting.epsilon, len(theta)
    f = dual.best_f(g)
    pi = dual.a[:, None] * dual.pairs.exponentials(f, g, epsilon) * dual.b[None, :]
    rows, columns = jnp.sum(pi, axis=1), jnp.sum(pi, axis=0)
    want = dual.b * decay(g, dual.tau_2)
    live = (dual.b > 0) & (columns > 0)
    rest = jnp.where(live, columns - want, 0)
    along_rows, along_columns, moments = _sums(setting.features, pi)
    gradient, moments = setting.observed - jnp.sum(along_rows, axis=1), moments / epsilon
    raw = jnp.diagonal(moments)

    share = jnp.where(rows > 0, eta(dual.tau_1, epsilon) / jnp.where(rows > 0, rows, 1), 0)
    cross = jnp.where(live, (along_rows * share) @ pi - along_columns, 0) / epsilon  # (K, m): H in (theta, g)
    moments = moments - (along_rows * share) @ along_rows.T / epsilon
    diagonal = columns / epsilon + (0 if dual.tau_2 is None else want / dual.tau_2)
    diagonal = jnp.where(live, diagonal, 1)
    scale = 1 / jnp.sqrt(diagonal)
    gauge = live.astype(g.dtype) if dual.balanced else None
    matrix = schur_matrix(pi, share / epsilon, diagonal, gauge) * scale[:, None] * scale[None, :]
    ridge = 4 * float(jnp.finfo(g.dtype).eps)
    factor = jnp.linalg.cholesky(matrix + ridge * jnp.eye(len(g), dtype=g.dtype), symmetrize_input=False)
    solve = lambda right: scale[:, None] * jsl.cho_solve((factor, True), scale[:, None] * right)
    solved = solve(jnp.concatenate([cross, rest[None, :]]).T)
    along_g, back_g = solved[:, :K], -solved[:, K]
    hessian = moments - cross @ along_g
    reduced = gradient + cross @ back_g
    value = jnp.vdot(theta, setting.observed) + dual.semi_dual(f, g)
    return Local(value, f, gradient, rest, reduced, (hessian + hessian.T) / 2, raw, along_g, back_g)


_BLOCK = 2**14
"""Entries of features that are weighted at once: what is made of them stays in the cache."""


def _sums(features: Array, pi: Array) -> tuple[Array, Array, Array]:
    """Features weighted by pi summed over columns (K, n), over rows (K, m), and their second moments (K, K)."""
    K, n, m = features.shape
    count = max(1, min(n, _BLOCK // (K * m)))
    while n % count:
        count -= 1

    def body(carry, start):
        columns, moments = carry
        here = lax.dynamic_slice_in_dim(features, start, count, 1)
        weighted = here * lax.dynamic_slice_in_dim(pi, start, count, 0)
        moments = moments + weighted.reshape(K, -1) @ here.reshape(K, -1).T
        return (columns + jnp.sum(weighted, axis=1), moments), jnp.sum(weighted, axis=2)

    zeros = jnp.zeros((K, m), pi.dtype), jnp.zeros((K, K), pi.dtype)
    (columns, moments), rows = lax.scan(body, zeros, jnp.arange(0, n, count))
    return jnp.moveaxis(rows, 0, 1).reshape(K, n), columns, moments


@eqx.filter_jit
def step_at(local: Local, theta: Array, penalty: Any) -> tuple[Array, Array]:
    """The Newton step (dtheta, dg), proximal where there is a penalty."""
    if penalty is None:
        dtheta = _definite_solve(local.hessian, -local.reduced)
    else:
        dtheta = _proximal_step(local.hessian, local.reduced, theta, penalty) - theta
    return dtheta, local.back_g - local.along_g @ dtheta


def _definite_solve(H: Array, b: Array) -> Array:
    diagonal = jnp.diagonal(H)
    scale = jnp.where(diagonal > 0, 1 / jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1)), 1)
    factor = jnp.linalg.cholesky(H * scale[:, None] * scale[None, :], symmetrize_input=False)
    return scale * jsl.cho_solve((factor, True), scale * b)


def _proximal_step(H: Array, gradient: Array, theta: Array, penalty: Any, steps: int = 20_000) -> Array:
    """The minimizer in p of gradient'(p - theta) + (p - theta)'H(p - theta) / 2 + penalty(p): accelerated proximal
    gradient with restarts, to round-off."""
    eps = float(jnp.finfo(theta.dtype).eps)
    flat = theta.reshape(-1)
    length = 1 / jnp.linalg.norm(H, ord=2)
    prox = lambda p: penalty.prox(p.reshape(theta.shape), length).reshape(-1)

    def unfinished(carry):
        _, _, _, move, size, k = carry
        return (move > 4 * eps * size) & (k < steps)

    def body(carry):
        p, q, t, _, _, k = carry
        new = prox(q - length * (gradient + H @ (q - flat)))
        uphill = jnp.vdot(q - new, new - p) > 0
        next_t = jnp.where(uphill, 1.0, (1 + jnp.sqrt(1 + 4 * t * t)) / 2)
        forward = jnp.where(uphill, 0.0, (t - 1) / next_t)
        move = jnp.maximum(jnp.max(jnp.abs(new - p)), jnp.max(jnp.abs(new - q)))
        return new, new + forward * (new - p), next_t, move, jnp.max(jnp.abs(new)) + eps, k + 1

    one = jnp.ones((), theta.dtype)
    start = (flat, flat, one, jnp.full_like(one, jnp.inf), one, 0)
    return lax.while_loop(unfinished, body, start)[0].reshape(theta.shape)


@eqx.filter_jit
def optimality_at(reduced: Array, theta: Array, penalty: Any) -> Array:
    """The largest entry of the gradient, with a penalty of the residual theta - prox(theta - gradient)."""
    if penalty is None:
        return jnp.max(jnp.abs(reduced))
    moved = penalty.prox(theta - reduced.reshape(theta.shape), jnp.ones((), theta.dtype))
    return jnp.max(jnp.abs(theta - moved))


def error_floor(setting: Setting, local: Local) -> Array:
    """About how much round-off there is in the gradient."""
    eps = jnp.finfo(local.f.dtype).eps
    size = jnp.sqrt(jnp.sum(setting.observed**2)) + jnp.linalg.norm(setting.observed - local.gradient)
    return 4 * eps * size + jnp.linalg.norm(local.reduced - local.gradient) * jnp.sqrt(eps)
