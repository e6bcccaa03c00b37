"""One entropic step between weighted points, reduced to one potential: everything a step and its inverse share.

The model, for a source a and a reference b, costs c and w (a function of the target only), t = kappa - epsilon:

    min over p >= 0 with row sums a of <c + w, p> + epsilon KL(p | a x b) + t KL(columns of p | b).

Its second potential has a closed form in the first, f, for every kappa > 0 (docs/theory/flows.md, "The reduced step"),
so f is the only unknown. `ratio` = epsilon / kappa is 1 for the explicit step, 0 where the columns are exactly b.
"""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class Kernel(eqx.Module):
    """Points, log-weights and numbers of one step; weights of zero (log -inf) are points that are not there."""

    source: Float[Array, "n d"]
    target: Float[Array, "m d"]
    log_a: Float[Array, " n"]
    log_b: Float[Array, " m"]
    epsilon: Float[Array, ""]
    ratio: Float[Array, ""]

    @property
    def cost(self) -> Float[Array, "n m"]:
        """|x - z|^2 / 2 / epsilon."""
        return half_squares(self.source, self.target) / self.epsilon

    def columns(self, f: Float[Array, " n"], cost: Float[Array, "n m"] | None = None) -> Float[Array, " m"]:
        """log sum_i a_i exp((f_i - c_ij) / epsilon)."""
        cost = self.cost if cost is None else cost
        return _log_sums(self.log_a + f / self.epsilon, cost, 0)

    def tilt(self, w: Float[Array, " m"], columns: Float[Array, " m"]) -> Float[Array, " m"]:
        """log of what b is multiplied with in the coupling, besides exp((f - c) / epsilon)."""
        return -self.ratio * w / self.epsilon + (self.ratio - 1) * columns

    def residual(self, w: Float[Array, " m"], f: Float[Array, " n"]) -> Float[Array, " n"]:
        """epsilon log(row sums / a) at f: zero at the solution, a contraction's step for ratio <= 1."""
        cost = self.cost
        rows = _log_sums(self.log_b + self.tilt(w, self.columns(f, cost)), cost, 1)
        return f + self.epsilon * rows

    def log_density(self, w: Float[Array, " m"], f: Float[Array, " n"]) -> Float[Array, " m"]:
        """log of the new weights divided by b."""
        return self.ratio * (self.columns(f) - w / self.epsilon)

    def weights(self, w: Float[Array, " m"], f: Float[Array, " n"]) -> Float[Array, " m"]:
        """The new weights: the column sums of the coupling."""
        return jnp.exp(self.log_b + self.log_density(w, f))

    def coupling(self, w: Float[Array, " m"], f: Float[Array, " n"]) -> Float[Array, "n m"]:
        """The coupling, rows for the source."""
        cost = self.cost
        right = self.log_b + self.tilt(w, self.columns(f, cost))
        return jnp.exp((self.log_a + f / self.epsilon)[:, None] + right[None, :] - cost)

    def density_residual(self, w: Float[Array, " m"], u: Float[Array, " m"]) -> Float[Array, " m"]:
        """u / ratio less the log-sums of the columns, with the f under which the rows are right: zero where u is the
        log of the new weights divided by b. Its derivative in u is well scaled down to ratio = inf."""
        rows = self._density_rows(w, u)
        return u / self.ratio - (_log_sums(self.log_a - rows, self.cost, 0) - w / self.epsilon)

    def density_coupling(self, w: Float[Array, " m"], u: Float[Array, " m"]) -> Float[Array, "n m"]:
        """The coupling at u, its rows right."""
        rows = self._density_rows(w, u)
        return jnp.exp((self.log_a - rows)[:, None] + self._density_right(w, u)[None, :] - self.cost)

    def _density_right(self, w, u):
        return self.log_b - w / self.epsilon + (1 - 1 / self.ratio) * u

    def _density_rows(self, w, u):
        return _log_sums(self._density_right(w, u), self.cost, 1)

    def dual(self, w: Float[Array, " m"], f: Float[Array, " n"]) -> Float[Array, ""]:
        """<f, a> - kappa |new weights|: at the solution the value of the step, up to constants of (a, b, kappa)."""
        a = jnp.exp(self.log_a)
        mass = jnp.sum(self.weights(w, f))
        return jnp.sum(jnp.where(a > 0, f, 0) * a) - self.epsilon / self.ratio * (mass - jnp.sum(a))


def half_squares(x: Float[Array, "n d"], z: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """|x - z|^2 / 2 for all pairs: by differences in few dimensions, else by one product of centred points."""
    if x.shape[1] <= 4:
        return sum(jnp.square(x[:, None, k] - z[None, :, k]) for k in range(x.shape[1])) / 2  # type: ignore[return-value]
    middle = lax.stop_gradient(jnp.mean(z, axis=0))
    x, z = x - middle, z - middle
    squares = (jnp.sum(x * x, 1)[:, None] + jnp.sum(z * z, 1)[None, :]) / 2 - x @ z.T
    return jnp.maximum(squares, 0)


def log_weights(weights: Float[Array, " n"]) -> Float[Array, " n"]:
    """log, -inf at zero with a derivative of zero."""
    there = weights > 0
    return jnp.where(there, jnp.log(jnp.where(there, weights, 1)), -jnp.inf)


def least_root(a: Array) -> Array:
    """Of the smallest weight that is there: |F| <= |a^1/2 F| divided by it."""
    return jnp.sqrt(jnp.min(jnp.where(a > 0, a, jnp.inf)))


def _log_sums(given: Float[Array, " k"], cost: Float[Array, "n m"], axis: int) -> Float[Array, " r"]:
    """log of the sum over `axis` of exp(given - cost), `given` along that axis, written so that derivatives in `given`
    are products with one matrix."""
    along = (lambda v: v[:, None]) if axis == 0 else (lambda v: v[None, :])
    across = (lambda v: v[None, :]) if axis == 0 else (lambda v: v[:, None])
    fixed = lax.stop_gradient(given)
    exponents = along(fixed) - cost
    top = lax.stop_gradient(jnp.max(exponents, axis=axis))
    matrix = jnp.exp(exponents - across(top))
    moved = jnp.where(jnp.isneginf(fixed), 1, jnp.exp(jnp.where(jnp.isneginf(fixed), 0, given - fixed)))
    return jnp.log(moved @ matrix if axis == 0 else matrix @ moved) + top
