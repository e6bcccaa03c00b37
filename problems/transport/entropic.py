"""Entropic optimal transport as an inner problem: y = (f, g) maximizes the dual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import bilevel
from bilevel._trees import check_like
from bilevel.problem import as_given, as_node

from . import _checks as checks
from ._hessian import DualHessian, SchurComplement
from ._pairs import AbstractPairs, Matrix
from ._solvers import Automatic
from ._sweeps import Dual
from ._trouble import trouble_with_costs


class AbstractTransport(bilevel.AbstractMinimization):
    """What balanced and unbalanced transport share: everything but the constructor.

    The dual, for potentials y = (f, g), with phi(f; a, t) = t sum_i a_i (1 - exp(-f_i / t)), at t = inf <f, a>:

        Psi(f, g) = phi(f; a, tau_1) + phi(g; b, tau_2) - epsilon (|pi| - |a| |b|),
        pi_ij = a_i b_j exp((f_i + g_j - c_ij) / epsilon)

    (derived in docs/theory/transport.md). F is the gradient of -Psi, in units of mass. The potential of a point of
    weight zero is returned as 0; wherever it matters (a derivative in that weight) its limit is used instead.
    """

    _cost: eqx.AbstractVar[Any]
    a: eqx.AbstractVar[Float[Array, " n"]]
    b: eqx.AbstractVar[Float[Array, " m"]]
    epsilon: eqx.AbstractVar[Float[Array, ""]]
    _tau: eqx.AbstractVar[tuple[Array | None, Array | None]]
    _absent: eqx.AbstractVar[tuple[bool, bool]]

    @property
    def cost(self) -> Callable:
        """The cost, as it was given."""
        return as_given(self._cost)

    # ---- results

    def value(self, x: Any, y: Any) -> Float[Array, ""]:
        """The value of the dual at y: a lower bound of the transport cost, exact at the solution to second order, so
        that its gradient needs no adjoint."""
        p = self._at(x, y)
        total = jnp.sum(self._rows_and_columns(p)[0])
        gain = _gain(p.f, self.a, self._tau[0], p.open_a) + _gain(p.g, self.b, self._tau[1], p.open_b)
        return gain - self.epsilon * (total - jnp.sum(self.a) * jnp.sum(self.b))

    def coupling(self, x: Any, y: Any) -> Float[Array, "n m"]:
        """The coupling pi, as a matrix of shape (n, m)."""
        p = self._at(x, y)
        return self.a[:, None] * p.pairs.exponentials(p.f, p.g, self.epsilon) * self.b[None, :]

    def marginals(self, x: Any, y: Any) -> tuple[Float[Array, " n"], Float[Array, " m"]]:
        """The coupling's row and column sums, shapes (n,) and (m,), without the matrix where the cost has none."""
        return self._rows_and_columns(self._at(x, y))

    def apply(self, x: Any, y: Any, v: Any) -> Float[Array, "n ..."]:
        """The coupling times v, of shape (m,) or (m, k), without the matrix where the cost has none."""
        v = jnp.asarray(v)
        if v.ndim not in (1, 2) or v.shape[0] != len(self.b):
            raise ValueError(
                f"{type(self).__name__}.apply: `v` must have shape ({len(self.b)},) or ({len(self.b)}, k), found "
                f"{v.shape}."
            )
        p = self._at(x, y)
        out, _ = p.pairs.products(p.f, p.g, self.a, self.b, self.epsilon, None, v.astype(self.a.dtype))
        assert out is not None
        return out

    def initial(self) -> tuple[Float[Array, " n"], Float[Array, " m"]]:
        """Zero potentials, shapes (n,) and (m,)."""
        return jnp.zeros_like(self.a), jnp.zeros_like(self.b)

    # ---- what the engine asks

    def objective_at(self, x, y):
        return -self.value(x, y)

    def optimality(self, x, y):
        """The violations of the two marginal conditions, a tuple of shapes (n,) and (m,)."""
        p = self._at(x, y)
        rows, columns = self._rows_and_columns(p)
        first = rows - self.a * _decay(p.f, self._tau[0])
        second = columns - self.b * _decay(p.g, self._tau[1])
        return jnp.where(p.use_f, first, p.own_f), jnp.where(p.use_g, second, p.own_g)

    @property
    def linear_solver(self):
        return SchurComplement()

    @property
    def default_solver(self):
        return Automatic()

    def operator_at(self, x, y):
        p = self._at(x, y)
        rows, columns = self._rows_and_columns(p)
        first = rows / self.epsilon + _curvature(p.f, self.a, self._tau[0])
        second = columns / self.epsilon + _curvature(p.g, self.b, self._tau[1])
        etas = [_eta(t, self.epsilon) for t in self._tau]
        slow = 1 - etas[0] * etas[1]
        first, second = jnp.where(p.use_f, first, 1), jnp.where(p.use_g, second, 1)
        return DualHessian(p.pairs, p.f, p.g, self.a, self.b, self.epsilon, first, second, slow)

    def gauge_part(self, x, v):
        if not self._balanced:
            return None
        left, right = (self.a > 0).astype(self.a.dtype), (self.b > 0).astype(self.b.dtype)
        along = (jnp.vdot(left, v[0]) - jnp.vdot(right, v[1])) / (jnp.sum(left) + jnp.sum(right))
        return along * left, -along * right

    def size_of_error(self, x, y, residual, step):
        """The l1 violation of the marginals, against the mass."""
        error = jnp.sum(jnp.abs(residual[0])) + jnp.sum(jnp.abs(residual[1]))
        f = jnp.where(self.a > 0, y[0], 0)
        mass = jnp.maximum(jnp.sum(self.a * _decay(f, self._tau[0])), 1e-3 * jnp.sum(self.a))
        return error, mass

    def residual_wanted(self, x, rtol, atol):
        """That of marginals violated by rtol times the mass, which is known if a marginal is kept."""
        kept = [w for w, t in zip((self.a, self.b), self._tau, strict=True) if t is None]
        if not kept:
            return None
        return jnp.maximum(rtol * jnp.sum(kept[0]), atol) / float(np.sqrt(len(self.a) + len(self.b)))

    def unit_at(self, x, y):
        """epsilon: potentials that differ by much less give the same coupling."""
        return self.epsilon * float(np.sqrt(len(self.a) + len(self.b)))

    def length_scale(self, x, y):
        """epsilon again: what the marginals hardly see may still be far off."""
        return self.unit_at(x, y)

    def check(self, x, y):
        name = type(self).__name__
        check_like(y, self.initial(), name, "y", "the potentials (f, g)")
        found = eqx.filter_eval_shape(self._cost_at, x)
        if isinstance(found, Matrix):
            shape = found.costs.shape
            if shape != (len(self.a), len(self.b)):
                raise ValueError(
                    f"bilevel.{name}: `cost(x)` must have shape ({len(self.a)}, {len(self.b)}), one entry for each "
                    f"pair of weights in `a` and `b`, found {shape}."
                )

    def trouble_at(self, x, y):
        pairs = self._cost_at(x)
        if not isinstance(pairs, Matrix):
            return None
        return trouble_with_costs(pairs.costs, self.a, self.b, (self._tau[0] is None, self._tau[1] is None))

    # ---- parts

    @property
    def _balanced(self) -> bool:
        return self._tau[0] is None and self._tau[1] is None

    def _cost_at(self, x) -> AbstractPairs:
        found = self._cost.pairs(x) if hasattr(self._cost, "pairs") else self._cost(x)
        if isinstance(found, AbstractPairs):
            return found
        costs = jnp.asarray(found)
        if costs.ndim != 2:
            raise ValueError(
                f"bilevel.{type(self).__name__}: `cost(x)` must be a matrix of shape ({len(self.a)}, {len(self.b)}), "
                f"found shape {costs.shape}."
            )
        return Matrix(costs.astype(self.a.dtype))

    def _at(self, x, y) -> _Point:
        """The point with everything that is derived from it: potentials off the gauge, and at points without weight
        their limits."""
        pairs = self._cost_at(x)
        along = self.gauge_part(x, y)  # what follows does not depend on it, to round-off
        f, g = y if along is None else (y[0] - along[0], y[1] - along[1])
        own_f, own_g = y
        use_f, use_g = (jnp.ones(len(w), bool) for w in (self.a, self.b))
        open_a, open_b = use_f, use_g
        if isinstance(pairs, Matrix):
            open_a, open_b = pairs.open_rows(self.b), pairs.swapped().open_rows(self.a)
            use_f = open_a if self._tau[0] is not None else use_f
            use_g = open_b if self._tau[1] is not None else use_g
            f, g = jnp.where(use_f, f, 0), jnp.where(use_g, g, 0)
        if self._absent[0]:
            limit = -_eta(self._tau[0], self.epsilon) * self.epsilon * pairs.soft_min(g, self.b, self.epsilon)
            f = jnp.where(self.a > 0, f, jnp.where(jnp.isfinite(limit), limit, 0))
            use_f = use_f & (self.a > 0)
        if self._absent[1]:
            weights = self.a
            limit = (
                -_eta(self._tau[1], self.epsilon) * self.epsilon * pairs.swapped().soft_min(f, weights, self.epsilon)
            )
            g = jnp.where(self.b > 0, g, jnp.where(jnp.isfinite(limit), limit, 0))
            use_g = use_g & (self.b > 0)
        return _Point(pairs, f, g, own_f, own_g, use_f, use_g, open_a, open_b)

    def _rows_and_columns(self, p: _Point):
        return p.pairs.sums(p.f, p.g, self.a, self.b, self.epsilon)

    def dual(self, x) -> Dual:
        """The problem at x as the solvers of this package see it."""
        return Dual(self._cost_at(x), self.a, self.b, self.epsilon, *self._tau)

    def __repr__(self):
        tau = "" if self._balanced else f", tau=({', '.join(_shown(t) for t in self._tau)})"
        return f"{type(self).__name__}({len(self.a)} x {len(self.b)} points, epsilon={_shown(self.epsilon)}{tau})"


class _Point(eqx.Module):
    pairs: AbstractPairs
    f: Array  # potentials, with limits where weights are zero
    g: Array
    own_f: Array  # as given
    own_g: Array
    use_f: Array  # where F is the marginal condition; elsewhere F = y
    use_g: Array
    open_a: Array  # where some pair is allowed
    open_b: Array


def _eta(t: Array | None, epsilon: Array) -> Array:
    return jnp.ones_like(epsilon) if t is None else t / (t + epsilon)


def _decay(f: Array, t: Array | None) -> Array:
    return jnp.ones_like(f) if t is None else jnp.exp(-f / t)


def _curvature(f: Array, a: Array, t: Array | None) -> Array:
    return jnp.zeros_like(f) if t is None else a * jnp.exp(-f / t) / t


def _gain(f: Array, a: Array, t: Array | None, is_open: Array) -> Array:
    """phi(f; a, t); a point all of whose pairs are forbidden has f = inf."""
    if t is None:
        return jnp.vdot(f, a)
    return t * jnp.vdot(a, jnp.where(is_open, -jnp.expm1(-f / t), 1))


def _shown(value: Any) -> str:
    if value is None:
        return "inf"
    return f"{float(value):.4g}" if checks.is_concrete(value) and jnp.ndim(value) == 0 else "…"


def _prepare(owner: str, cost: Any, a: Any, b: Any, epsilon: Any, tau: Any) -> tuple:
    """The fields of a transport problem, checked."""
    if not callable(cost):
        raise TypeError(
            f"{owner}: `cost` must be a function x -> (n, m) costs or a PointCloudCost, found {type(cost).__name__}; a "
            f"fixed matrix C is lambda x: C."
        )
    a, b = checks.check_weights(owner, "a", a), checks.check_weights(owner, "b", b)
    if hasattr(cost, "check_weights"):
        cost.check_weights(owner, len(a), len(b))
    epsilon = checks.check_positive(owner, "epsilon", epsilon)
    pair = checks.tau_pair(owner, tau)
    dtype = checks.common_dtype(a, b)
    a, b, epsilon = a.astype(dtype), b.astype(dtype), epsilon.astype(dtype)
    pair = tuple(None if t is None else t.astype(dtype) for t in pair)
    if all(t is None for t in pair):
        checks.check_equal_mass(owner, a, b)
    absent = tuple(not checks.is_concrete(w) or not bool(np.all(np.asarray(w) > 0)) for w in (a, b))
    return as_node(cost), a, b, epsilon, pair, absent


class EntropicOT(AbstractTransport):
    """Entropic transport with both marginals kept exactly:

        min over pi >= 0, pi 1 = a, pi'1 = b of <cost(x), pi> + epsilon KL(pi | a b').

    **Arguments:** `cost`: a function x -> (n, m) costs, where infinity forbids a pair, or a `PointCloudCost`. `a`, `b`:
    weights of shapes (n,) and (m,), at least 0, of equal total; their floating dtype is the problem's. `epsilon`: a
    positive number. All may be traced; what `cost` closes over and these carry derivatives.

    y = (f, g), the potentials, determined up to (f + c, g - c): the gauge is declared, and an outer function that sees
    it is refused. `bilevel.solve` judges by the marginals: they, the value and the coupling are right to rtol. Where
    epsilon is so small that parts of the problem hardly see each other, the potentials of one part against another's
    are as right as Newton steps make them; where round-off in the marginals hides them altogether, `solve` still gives
    the coupling, but a derivative through it is refused, and `bilevel.hypergradient` says the same.

    **Raises:** TypeError, ValueError naming the argument: negative weights, unequal masses, NaN, epsilon <= 0, shapes
    that do not fit.
    """

    _cost: Any
    a: Float[Array, " n"]
    b: Float[Array, " m"]
    epsilon: Float[Array, ""]
    _tau: tuple[Array | None, Array | None]
    _absent: tuple[bool, bool] = eqx.field(static=True)

    def __init__(self, cost: Any, a: Any, b: Any, epsilon: Any):
        fields = _prepare("EntropicOT", cost, a, b, epsilon, np.inf)
        self._cost, self.a, self.b, self.epsilon, self._tau, self._absent = fields

    @property
    def tau(self) -> tuple[Any, Any]:
        """(inf, inf): both marginals are kept exactly."""
        return np.inf, np.inf


class UnbalancedOT(AbstractTransport):
    """Entropic transport whose marginals are only penalised:

        min over pi >= 0 of <cost(x), pi> + epsilon KL(pi | a b') + tau_1 KL(pi 1 | a) + tau_2 KL(pi'1 | b),

    KL(p|q) = sum p log(p/q) - p + q. `tau`: a positive number or a pair (tau_1, tau_2); infinite: that marginal is kept
    exactly. Traced, it counts as finite. The other arguments are those of `EntropicOT`; masses need not agree unless
    both tau are infinite.
    """

    _cost: Any
    a: Float[Array, " n"]
    b: Float[Array, " m"]
    epsilon: Float[Array, ""]
    _tau: tuple[Array | None, Array | None]
    _absent: tuple[bool, bool] = eqx.field(static=True)

    def __init__(self, cost: Any, a: Any, b: Any, epsilon: Any, tau: Any):
        fields = _prepare("UnbalancedOT", cost, a, b, epsilon, tau)
        self._cost, self.a, self.b, self.epsilon, self._tau, self._absent = fields

    @property
    def tau(self) -> tuple[Any, Any]:
        """(tau_1, tau_2), infinite where a marginal is kept exactly."""
        first, second = (np.inf if t is None else t for t in self._tau)
        return first, second
