"""Inverse optimal transport: the coefficients of a cost, estimated from an observed coupling."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import bilevel
from bilevel._precision import full_products
from bilevel.minimize import Result
from bilevel.problem import as_given, as_node

from . import _checks as checks
from . import _joint as joint
from ._identified import refuse_flat
from ._newton import newton_joint
from ._observed import (
    LinearCost,
    SharpenedCost,
    check_cost,
    check_count,
    check_coupling,
    check_marginal,
    check_pairs,
    check_sharpening,
    check_support,
    kl,
    kl_of,
    shift_of,
)  # fmt: skip
from ._sparse import ObservedPairs
from .clouds import PointCloudCost
from .entropic import AbstractTransport, EntropicOT, UnbalancedOT
from .penalties import AbstractPenalty


class InverseOT(bilevel.AbstractBilevelProblem):
    """The cost sum_k theta_k features_k, from an observed coupling pi_hat; x = theta, y the potentials (f, g).

    The outer loss is the Fenchel-Young gap L(theta) = F_theta(pi_hat) - min F_theta, F_theta(pi) = <c_theta, pi> +
    epsilon KL(pi | a b') + tau_1 KL(pi 1 | a) + tau_2 KL(pi'1 | b): convex, zero exactly where pi_hat is optimal, its
    gradient is features' (pi_hat - pi_theta). With `sharpening=rho` the minimum is over F_theta + rho KL(. | pi_hat):
    convex, between 0 and the gap, zero where the gap is (derived in docs/theory/transport.md).

    **Arguments:** `features`: shape (K, n, m), finite; or a function theta -> (n, m) costs or a
    `PointCloudCost`, with `theta0` to start from.
    `coupling`: pi_hat, shape (n, m), at least 0. `a`, `b`: the reference marginals, shapes (n,) and (m,); None: those
    of the coupling, which only makes sense for marginals that are kept exactly. `epsilon` > 0; `tau`: as in
    `UnbalancedOT`. `penalty`: a `transport.L1` and the like, added by `.newton` and `bilevel.minimize`. `outer`:
    instead of the gap, any function of (theta, coupling at theta). `count`: the number of observed pairs, for
    `.standard_errors`.

    **Raises:** TypeError, ValueError naming the argument: shapes, signs, NaN, a mass of the coupling other than that of
    a marginal that is kept exactly. Features that the data cannot tell apart are taken here, by `.loss` and `.hessian`,
    and refused by `.newton` and `bilevel.minimize`.
    """

    inner: AbstractTransport
    observed: Float[Array, "n m"] | ObservedPairs
    sharpening: Float[Array, ""] | None
    _theta0: Any
    _constants: tuple[Array, Array, Array]  # KL of the observation and of its marginals, from the references
    _penalty: AbstractPenalty | None
    _outer: Any
    count: int | None = eqx.field(static=True)
    _empirical: bool = eqx.field(static=True)

    def __init__(
        self,
        features: Any,
        coupling: Any,
        a: Any = None,
        b: Any = None,
        *,
        epsilon: Any,
        tau: Any = np.inf,
        sharpening: Any = 0,
        penalty: AbstractPenalty | None = None,
        outer: Any = None,
        theta0: Any = None,
        count: int | None = None,
    ):
        owner = "InverseOT"
        observed = check_coupling(owner, coupling)
        cost, theta0 = check_cost(owner, features, theta0, observed.shape)
        dtype = checks.common_dtype(*(jax.tree.leaves(cost) if isinstance(cost, LinearCost) else [observed]))
        cost = jax.tree.map(lambda v: v.astype(dtype) if eqx.is_inexact_array(v) else v, cost)
        observed = observed.astype(dtype)
        epsilon = checks.check_positive(owner, "epsilon", epsilon).astype(dtype)
        taus = checks.tau_pair(owner, tau)
        rows, columns = observed.sum(axis=1), observed.sum(axis=0)
        a, own_a = check_marginal(owner, "a", a, rows, taus[0])
        b, own_b = check_marginal(owner, "b", b, columns, taus[1])
        a, b = a.astype(dtype), b.astype(dtype)
        check_support(owner, observed, a, b)
        self._constants = (kl_of(observed, a, b), kl(rows, a), kl(columns, b))
        rho = check_sharpening(owner, sharpening)
        self.sharpening = None if rho is None else rho.astype(dtype)
        if isinstance(observed, ObservedPairs) and (self.sharpening is not None or outer is not None):
            raise ValueError(
                f"{owner}: `sharpening` and `outer` need the coupling as a matrix, which samples of a PointCloudCost "
                f"are not made into; pass `coupling` instead."
            )
        if self.sharpening is not None:
            matrix: Any = observed
            shift = shift_of(self.sharpening, matrix, a, b)
            cost = LinearCost(cost.features, shift) if isinstance(cost, LinearCost) else SharpenedCost(cost, shift)
            epsilon = epsilon + self.sharpening
        if taus[0] is None and taus[1] is None:
            self.inner = EntropicOT(cost, a, b, epsilon)
        else:
            self.inner = UnbalancedOT(cost, a, b, epsilon, tuple(np.inf if t is None else t for t in taus))
        self.observed, self._theta0 = observed, jax.tree.map(lambda v: v.astype(dtype), theta0)
        if penalty is not None:
            if not isinstance(penalty, AbstractPenalty):
                raise TypeError(
                    f"{owner}: `penalty` must be an L1(weight) or the like, found {type(penalty).__name__}."
                )
            penalty.check(owner, jnp.shape(theta0))
        if outer is not None and not callable(outer):
            raise TypeError(f"{owner}: `outer` must be a function of (theta, coupling), found {type(outer).__name__}.")
        self._penalty, self._outer = penalty, as_node(outer)
        self.count, self._empirical = check_count(observed, count), own_a and own_b

    @classmethod
    def from_samples(cls, features: Any, pairs: Any, *, epsilon: Any, **options: Any) -> InverseOT:
        """The problem of N observed index pairs, `pairs` of shape (N, 2), integers: `coupling` holds their frequencies
        (of total mass 1), so that `.standard_errors` knows N. Further arguments as of the class. Where `features` is a
        `PointCloudCost` no matrix is formed: memory O(n + m + N).

        Raises ValueError for pairs of another shape, that are not integers, or outside of the features' (n, m).
        """
        array, shape = check_pairs(features, pairs, options.get("theta0"))
        if isinstance(features, PointCloudCost):
            observed = ObservedPairs.of_samples(array, shape, features.X.dtype)
            return cls(features, observed, epsilon=epsilon, count=len(array), **options)
        counts = np.zeros(shape)
        np.add.at(counts, (array[:, 0], array[:, 1]), 1.0)
        return cls(features, counts / len(array), epsilon=epsilon, count=len(array), **options)

    # ---- the bilevel problem

    @property
    def epsilon(self) -> Float[Array, ""]:
        """epsilon, without the sharpening (which the inner problem's holds too)."""
        return self.inner.epsilon if self.sharpening is None else self.inner.epsilon - self.sharpening

    @property
    def features(self) -> Any:
        """The features, shape (K, n, m), or the function given."""
        cost = self.inner.cost
        return cost.features if isinstance(cost, LinearCost) else cost.cost if isinstance(cost, SharpenedCost) else cost

    def costs(self, theta: Any) -> Float[Array, "n m"]:
        """The cost at theta, shape (n, m), without sharpening."""
        features: Any = self.features
        found: Any = features(theta) if callable(features) else jnp.tensordot(theta, features, 1)
        return found

    def _observed_cost(self, theta: Any) -> Array:
        if isinstance(self.observed, ObservedPairs):
            cost: Any = self.inner.cost
            return self.observed.cost(cost, theta)
        return jnp.vdot(self.costs(theta), self.observed)

    def outer(self, x, y):
        """The loss at theta = x, with potentials y."""
        if self._outer is not None:
            return as_given(self._outer)(x, self.inner.coupling(x, y))
        kl, *marginals = self._constants
        at_observed = self._observed_cost(x) + self.epsilon * kl
        for t, k in zip(self.inner._tau, marginals, strict=True):
            at_observed = at_observed + (0 if t is None else t * k)
        least = self.inner.value(x, y)
        if self.sharpening is not None:
            masses = jnp.sum(self.inner.a) * jnp.sum(self.inner.b)
            least = least + self.sharpening * (self.observed.sum() - masses)
        return at_observed - least

    def initial(self) -> tuple[Any, Any]:
        """(theta0, y0): zero coefficients (with a constraint: the nearest ones allowed) and zero potentials."""
        theta = self._theta0 if self._penalty is None else self._penalty.prox(self._theta0, 0.0)
        return theta, self.inner.initial()

    @property
    def prox(self):
        return None if self._penalty is None else self._penalty.prox

    def penalty(self, x):
        """The penalty's value at theta, None without one."""
        return None if self._penalty is None else self._penalty.value(x)

    # ---- what statisticians ask

    @full_products()
    def loss(self, theta: Any) -> Float[Array, ""]:
        """The loss at theta, without the penalty: solves the inner problem. Differentiable; raises `NotConverged`."""
        theta = jax.tree.map(lambda v: jnp.asarray(v).astype(self.observed.dtype), theta)
        return self.outer(theta, bilevel.solve(self.inner, theta, self.inner.initial()).y)

    @full_products()
    def hessian(self, theta: Any) -> Float[Array, "K K"]:
        """The exact Hessian of the loss at theta, shape (K, K) (of a theta that is a matrix: of its entries in order):
        for the convex losses of given features by the Schur complement (derived in docs/theory/transport.md)."""
        theta = jnp.asarray(theta).astype(self.observed.dtype)
        y = bilevel.solve(self.inner, theta, self.inner.initial()).y
        if self._joint is not None:
            setting, swap = self._joint
            return joint.local_at(setting, theta, y[0] if swap else y[1]).hessian
        product = lambda v: bilevel.hessian_vector_product(self, theta, y, v.reshape(theta.shape)).reshape(-1)
        return jnp.stack([product(v) for v in jnp.eye(theta.size, dtype=theta.dtype)])

    @property
    def _joint(self) -> tuple[joint.Setting, bool] | None:
        """The convex problem in (theta, g), the smaller side as g, and whether sides were exchanged; or None."""
        cost, inner = self.inner.cost, self.inner
        if not isinstance(cost, LinearCost) or self._outer is not None:
            return None
        matrix: Any = self.observed  # given features come with one
        observed = jnp.tensordot(cost.features, matrix, 2)
        setting = joint.Setting(cost.features, observed, cost.shift, inner.a, inner.b, inner.epsilon, inner._tau)
        swap = len(inner.a) < len(inner.b)
        if swap:
            features, shift = jnp.swapaxes(cost.features, 1, 2), None if cost.shift is None else cost.shift.T
            setting = joint.Setting(
                features, observed, shift, inner.b, inner.a, inner.epsilon, (inner._tau[1], inner._tau[0])
            )
        return setting, swap

    @full_products()
    def newton(self, theta0: Any = None, tol: float = 1e-10, max_steps: int = 100) -> Result:
        """Minimizes the loss (plus the penalty) by Newton's method with its exact Hessian, jointly in theta and the
        potentials; with a penalty by proximal Newton steps. For losses that are not convex, or features given as a
        function, it is `bilevel.minimize`.

        **Arguments:** `theta0`: where to start; None: `.initial()`. `tol`: bounds the largest entry of the gradient
        (with a penalty: of theta - prox(theta - gradient)), absolutely. `max_steps`: Newton steps.

        **Returns:** a `bilevel` `Result`; `converged` says whether `tol` was met, inner solutions at round-off.

        **Raises:** ValueError where theta is not identified, with the flat direction.
        """
        theta = self.initial()[0] if theta0 is None else jnp.asarray(theta0).astype(self.observed.dtype)
        if jnp.shape(theta) != jnp.shape(self._theta0):
            raise ValueError(
                f"InverseOT.newton: `theta0` must have shape {jnp.shape(self._theta0)}, found {jnp.shape(theta)}."
            )
        if not (isinstance(tol, (int, float)) and tol > 0):
            raise ValueError(f"InverseOT.newton: `tol` must be a positive number, found {tol!r}.")
        found = self._joint
        if found is None:
            self.before_minimizing(theta, self.inner.initial())
            scale = max(
                1.0, float(jnp.max(jnp.abs(bilevel.hypergradient(self, *self.initial(), throw=False).gradient)))
            )
            method = "l-bfgs-b" if self._penalty is None else "proximal-gradient"
            return bilevel.minimize(
                self, theta, self.inner.initial(), method=method, tol=tol / scale, max_steps=10 * max_steps
            )
        setting, swap = found
        return newton_joint(
            setting, swap, theta, self._penalty, tol, max_steps, self._constant(), float(self.observed.sum()),
            lambda local: self._refuse_flat("newton", local.hessian, local.raw),
        )  # fmt: skip

    def _constant(self) -> float:
        """The loss minus `joint.value_at`."""
        inner, (kl, *marginals) = self.inner, self._constants
        masses = float(jnp.sum(inner.a) * jnp.sum(inner.b))
        total = float(self.epsilon * kl) - float(inner.epsilon) * masses
        for t, k in zip(inner._tau, marginals, strict=True):
            total += 0.0 if t is None else float(t * k)
        if self.sharpening is not None:
            total -= float(self.sharpening) * (float(self.observed.sum()) - masses)
        return total

    def before_minimizing(self, x, y):
        """Raises ValueError where theta is not identified, with the flat direction."""
        if self._joint is not None and self._penalty is None or self._penalty is not None and not self._grows:
            setting, swap = self._joint or (None, False)
            if setting is not None:
                local = joint.local_at(setting, jnp.asarray(x), jnp.zeros_like(setting.b))
                self._refuse_flat("minimize", local.hessian, local.raw)

    @property
    def _grows(self) -> bool:
        return self._penalty is not None and self._penalty.bounds_all

    def _refuse_flat(self, function: str, hessian: Array, raw: Array) -> None:
        if self._grows:
            return
        refuse_flat(function, hessian, raw)

    def standard_errors(self, theta: Any, count: int | None = None) -> Float[Array, " K"]:
        """Standard errors of the minimizer theta of the gap, shape (K,), where the observation is a sample of pairs.

        Where a and b are the sample's own marginals, kept exactly, the gap is a likelihood: the roots of the diagonal
        of epsilon |pi_hat| H^-1 / N, those of the Poisson regression with two-way fixed effects. Otherwise the sandwich
        H^-1 V H^-1 with the variance V of Poisson counts (derived in docs/theory/transport.md).

        **Arguments:** `count`: the number N of pairs; None: known from `from_samples`, or from counts as coupling.

        **Raises:** ValueError where N is unknown, theta is not identified, or the loss is not the gap.
        """
        count = self.count if count is None else count
        if count is None:
            raise ValueError(
                "InverseOT.standard_errors: the observation is not known to be a sample (its entries are no counts); "
                "pass count=, the number of observed pairs."
            )
        if self.sharpening is not None or self._joint is None or self._penalty is not None:
            raise ValueError(
                "InverseOT.standard_errors: known for the Fenchel-Young gap of given features without sharpening and "
                "penalty."
            )
        theta = jnp.asarray(theta).astype(self.observed.dtype)
        setting, swap = self._joint
        y = bilevel.solve(self.inner, theta, self.inner.initial()).y
        local = joint.local_at(setting, theta, y[0] if swap else y[1])
        self._refuse_flat("standard_errors", local.hessian, local.raw)
        inverse = jnp.linalg.inv(local.hessian)
        scale = self.observed.sum() / count
        if self._empirical:
            return jnp.sqrt(jnp.diagonal(inverse) * self.inner.epsilon * scale)
        features = setting.features.reshape(len(theta), -1)
        pi = self.inner.coupling(theta, y)
        moments = (features * (pi.T if swap else pi).reshape(-1)) @ features.T
        return jnp.sqrt(jnp.diagonal(inverse @ moments @ inverse) * scale)

    def __repr__(self):
        loss = "outer=…" if self._outer is not None else "gap" if self.sharpening is None else "sharpened gap"
        penalty = "" if self._penalty is None else f", penalty={type(self._penalty).__name__}"
        return f"InverseOT(theta of shape {jnp.shape(self._theta0)}, {self.inner!r}, {loss}{penalty})"
