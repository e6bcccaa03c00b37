"""Inverse JKO: the potential that drives a population, from its snapshots."""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

import bilevel
from bilevel._precision import full_products

from . import _inputs as inputs
from . import _newton as newton
from ._density import log_density
from ._snapshots import CLOSED, LIMIT, SOFT, Steps, make_steps
from .features import Linear, Neural, as_potential
from .simulate import simulate
from .step import bad_potential

OWNER = "flows.InverseJKO"


class InverseJKO(bilevel.AbstractBilevelProblem):
    """The coefficients x = theta of V = sum_k theta_k phi_k whose JKO steps explain independent snapshots.

    The outer function is the sharpened Fenchel-Young loss, summed over steps, with a and b the weights of two
    consecutive snapshots X, Y and c = |x - y|^2 / 2:

        L = step_size <V, b> + W_epsilon(a, b) - UOT_{epsilon, inf, sharpening}(c + step_size V; a, b) >= 0,

    transport whose first marginal is exact and whose second is penalized by sharpening * KL(· | b): (6.1) of
    docs/theory/flows.md. It is convex in theta, and zero at the truth for data that come from an entropic step with
    `internal` as here (calibrated data). On other data (an SDE, an exact JKO step) it has a bias that no number of
    particles removes. `sharpening=0` has a closed-form inner solution (a softmax regression); `sharpening=inf` is the
    limit of rho * L, a least-squares problem.

    **Arguments:** `snapshots`: two or more arrays (n_t, d). `features`: a function z -> (K,) of one point, such as
    `Quadratic()`; a function (x, z) -> scalar or `Neural(network)` for potentials that are not linear in x: then the
    loss is not convex, and `bilevel.minimize` finds a local minimum. `step_size` > 0: a number, or one for each step.
    `epsilon` > 0. `sharpening`: rho in [0, inf]. `internal`: kappa >= 0, the weight of a known internal energy
    kappa ∫ mu log mu (temperature times step size for diffusing particles), or "fit": the temperature is the last
    entry of theta. `interaction`: features r -> (K',) of a difference r = z - z' of two points, whose coefficients
    follow those of V in theta; their field is frozen at the data. `penalty`: None or `L1(weight)`. `weights`: a
    sequence of weights of the particles, (n_t,) each. `log_density`: the log-density of each snapshot but the first at
    its points, which `internal` needs; None: estimated with a Gaussian kernel, which adds a bias to V. `without`: the
    number of a snapshot to leave out, with the steps to and from it.

    y is a tuple of potentials, (n_t,) for each step; at `sharpening=inf` one intercept for each step. All numbers are
    leaves and may be traced (a traced `sharpening` counts as positive and finite).

    **Raises:** ValueError, TypeError naming the argument: fewer than two snapshots, an empty one, different dimensions,
    NaN, numbers that are not positive, features that are NaN or -inf on a snapshot; `NotConverged` where the transport
    between two snapshots cannot be solved. `newton` and `bilevel.minimize` raise ValueError for features that the data
    cannot tell apart.
    """

    inner: Steps
    sharpening: Float[Array, ""]
    internal: Float[Array, ""] | None
    penalty_: Any
    epsilon: Float[Array, ""]

    def __init__(
        self,
        snapshots: Any,
        features: Any,
        step_size: Any,
        epsilon: Any,
        *,
        sharpening: Any = 0,
        internal: Any = 0,
        interaction: Any = None,
        penalty: Any = None,
        weights: Any = None,
        log_density: Any = None,
        without: Any = None,
    ):
        clouds = inputs.snapshots(OWNER, snapshots)
        dtype, d = clouds[0].dtype, clouds[0].shape[1]
        sizes = inputs.step_sizes(OWNER, step_size, len(clouds) - 1, dtype)
        self.epsilon = inputs.number(OWNER, "`epsilon`", epsilon, dtype)
        masses = inputs.snapshot_weights(OWNER, weights, clouds)
        keep = inputs.kept_steps(OWNER, without, len(clouds))
        rho, infinite, zero = _sharpening(sharpening, dtype)
        fit = isinstance(internal, str)
        if fit and internal != "fit":
            raise ValueError(f"{OWNER}: `internal` must be a number or 'fit', found {internal!r}.")
        kappa = None if fit else inputs.number(OWNER, "`internal`", internal, dtype, zero=True)
        none = not fit and inputs.concrete(internal) and float(internal) == 0
        self.sharpening, self.internal = rho, kappa
        self.penalty_ = _checked_penalty(penalty)
        potential = as_potential(OWNER, features, d, dtype)
        logs = None if none else [_log_densities(log_density, clouds, masses)[t] for t in keep]
        offsets = None if logs is None or kappa is None else tuple(kappa * one for one in logs)
        mode = LIMIT if infinite else CLOSED if zero and (none or fit) else SOFT
        strength = jnp.zeros_like(rho) if infinite else rho if kappa is None else rho + kappa
        sources, targets = (tuple(clouds[t + k] for t in keep) for k in (0, 1))
        pair = tuple(masses[t] for t in keep), tuple(masses[t + 1] for t in keep)
        sizes = sizes[np.asarray(keep)]
        self.inner = make_steps(sources, targets, *pair, potential, offsets, sizes, self.epsilon, strength, mode)
        extra = _extra_features(interaction, targets, pair[1], logs if fit else None)
        if extra is not None:
            if self.inner.designs is None:
                raise ValueError(f"{OWNER}: `interaction` and internal='fit' need features that are linear in theta.")
            both = tuple(jnp.concatenate(pair, axis=1) for pair in zip(self.inner.designs, extra, strict=True))
            self.inner = eqx.tree_at(lambda s: s.designs, self.inner, both)
        _check_designs(self.inner)

    # ------------------------------------------------------------------------------------------------ the problem

    def outer(self, x: PyTree, y: PyTree) -> Float[Array, ""]:
        """The loss at inner potentials y, summed over steps."""
        return sum(self.inner.loss(x, y, t) for t in range(self.inner.count))  # type: ignore[return-value]

    def before_minimizing(self, x, y):
        """Raises ValueError where the data cannot tell linear features apart, with the flat direction."""
        if self.penalty_ is None and self.inner.designs is not None:
            eps = float(jnp.finfo(self.epsilon.dtype).eps)
            newton.check_identified(f"{OWNER}, bilevel.minimize", newton.gram(self.inner), eps)

    @property
    def prox(self):
        return None if self.penalty_ is None else self.penalty_.prox

    def penalty(self, x):
        return None if self.penalty_ is None else self.penalty_.value(x)

    def initial(self) -> tuple[PyTree, PyTree]:
        """`(theta0, y0)`: zeros, of shape (K,) and of y's structure; a network starts where it is."""
        potential = self.inner.potential
        if isinstance(potential, Neural):
            return potential.parameters, self.inner.initial()
        if self.inner.designs is None:
            raise ValueError(
                f"{OWNER}: a potential (x, z) -> scalar does not say what x is; pass x0 and inner.initial()."
            )
        return jnp.zeros((self.inner.designs[0].shape[1],), self.epsilon.dtype), self.inner.initial()

    def potential(self, x: PyTree, z: Array) -> Float[Array, ""]:
        """V at one point, without interaction."""
        if isinstance(self.inner.potential, Linear):
            x = x[: self.inner.potential.count]
        return self.inner.potential(x, z)

    # ------------------------------------------------------------------------------------------------ the loss

    @full_products()
    def loss(self, theta: PyTree) -> Float[Array, ""]:
        """The loss at theta, differentiable; without the penalty. Zero at the truth of calibrated data."""
        theta = jax.tree.map(jnp.asarray, theta)
        if self.inner.mode == SOFT:
            y = bilevel.solve(self.inner, theta, self.inner.initial()).y
        else:
            y0 = self.inner.initial()
            y = jax.tree.map(lambda a, r: a - r, y0, self.inner.optimality(theta, y0))
        return self.outer(theta, y)

    @full_products()
    def hessian(self, theta: Any) -> Float[Array, "K K"]:
        """The Hessian of `loss`, shape (K, K), exact: (6.4) of docs/theory/flows.md."""
        self._needs_linear("hessian")
        theta = jnp.asarray(theta, self.epsilon.dtype)
        return newton.hessian(self.inner, theta)

    def conditioning(self, theta: Any) -> float:
        """The 2-norm condition number of `hessian`: what sharpening changes, for better or worse."""
        values = np.linalg.eigvalsh(np.asarray(self.hessian(theta), np.float64))
        return float(values[-1] / values[0]) if values[0] > 0 else math.inf

    @full_products()
    def newton(self, theta0: Any = None, tol: float = 1e-10, *, max_steps: int = 50) -> bilevel.Result:
        """Minimizes loss (plus penalty) by Newton's steps with the exact Hessian, damped where they are too long.

        **Arguments:** `theta0`: shape (K,), default zeros. `tol`: bounds the largest entry of the gradient; with a
        penalty that of theta - prox(theta - gradient). **Returns:** a `bilevel.Result`; where round-off or `max_steps`
        ends it, `converged` is False and `message` says so. **Raises:** ValueError where features are collinear and
        there is no penalty (the flat direction is named), and for potentials that are not linear.
        """
        self._needs_linear("newton")
        theta = self.initial()[0] if theta0 is None else inputs.real(f"{OWNER}.newton", "`theta0`", theta0)
        shape = self.inner.designs[0].shape[1:]  # type: ignore[index]
        if theta.shape != shape:
            raise ValueError(f"{OWNER}.newton: `theta0` must have shape {shape}, found {theta.shape}.")
        return newton.minimize(f"{OWNER}.newton", self.inner, self.penalty_, theta, tol, max_steps)

    def _needs_linear(self, method: str) -> None:
        if self.inner.designs is None:
            raise ValueError(
                f"{OWNER}.{method}: this potential is not linear in x, its loss is not convex; use bilevel.minimize."
            )

    # ------------------------------------------------------------------------------------------------ forecasts

    def predict(self, theta: PyTree, particles: Any, steps: int, *, step_size: Any = None) -> Array:
        """Particles that follow V (without interaction, without noise) for `steps` explicit Euler steps, shape
        (steps + 1, n, d); `step_size`: default that of the last step between snapshots."""
        size = self.inner.step_sizes[-1] if step_size is None else step_size
        return simulate(self.potential, theta, particles, steps=steps, step_size=size)

    def __repr__(self):
        sizes = [f"{len(x)} -> {len(z)}" for x, z in zip(self.inner.sources, self.inner.targets, strict=True)]
        show = lambda a: f"{float(a):g}" if inputs.concrete(a) and isinstance(a, jax.Array) else "…"
        rho = "inf" if self.inner.mode == LIMIT else show(self.sharpening)
        return (
            f"InverseJKO(steps of {', '.join(sizes)} points in dimension {self.inner.targets[0].shape[1]}, "
            f"epsilon={show(self.epsilon)}, sharpening={rho}, internal={show(self.internal)})"
        )


def _sharpening(value: Any, dtype: Any) -> tuple[Array, bool, bool]:
    """rho as an array (0 for inf), and whether it is inf, or 0."""
    if inputs.concrete(value) and isinstance(value, (int, float, np.number, np.ndarray, jax.Array)):
        if np.ndim(value) == 0 and np.isposinf(np.asarray(value)):
            return jnp.zeros((), dtype), True, False
    rho = inputs.number(OWNER, "`sharpening`", value, dtype, zero=True)
    return rho, False, inputs.concrete(value) and float(value) == 0


def _checked_penalty(penalty: Any) -> Any:
    if penalty is None or (callable(getattr(penalty, "prox", None)) and callable(getattr(penalty, "value", None))):
        return penalty
    raise TypeError(f"{OWNER}: `penalty` must be None or an object with prox(x, t) and value(x), found {penalty!r}.")


def _log_densities(given: Any, clouds, masses) -> tuple[Array, ...]:
    if given is None:
        return tuple(log_density(z, z, b) for z, b in zip(clouds[1:], masses[1:], strict=True))
    if not isinstance(given, (list, tuple)) or len(given) != len(clouds) - 1:
        raise ValueError(f"{OWNER}: `log_density` must have one array for each of {len(clouds) - 1} snapshots.")
    out = []
    for t, (one, z) in enumerate(zip(given, clouds[1:], strict=True), 1):
        array = inputs.real(OWNER, f"`log_density`, of snapshot {t},", one).astype(z.dtype)
        if array.shape != z.shape[:1]:
            raise ValueError(
                f"{OWNER}: `log_density` of snapshot {t} must have shape ({len(z)},), found {array.shape}."
            )
        out.append(array)
    return tuple(out)


def _extra_features(interaction: Any, targets, masses, logs) -> tuple[Array, ...] | None:
    """The columns that follow the features of V: the frozen field of an interaction, the log-density."""
    columns = [[] for _ in targets]
    if interaction is not None:
        as_potential(f"{OWNER}, `interaction`", interaction, targets[0].shape[1], targets[0].dtype)
        for part, z, b in zip(columns, targets, masses, strict=True):
            field = jax.lax.map(
                lambda at, z=z, b=b: b @ jax.vmap(lambda other: interaction(at - other).astype(z.dtype))(z), z
            )
            part.append(field)
    if logs is not None:
        for part, one in zip(columns, logs, strict=True):
            part.append(one[:, None])
    return tuple(jnp.concatenate(part, axis=1) for part in columns) if columns[0] else None


def _check_designs(steps: Steps) -> None:
    """Raises ValueError where a feature is NaN or infinite on a snapshot."""
    for t, design in enumerate(steps.designs or ()):
        if inputs.concrete(design) and not np.isfinite(np.asarray(design)).all():
            values = np.asarray(design)
            k = int(np.argmax(~np.isfinite(values).all(0)))
            kind = np.where(np.isfinite(values[:, k]), 0.0, -np.inf)
            bad_potential(
                f"{OWNER}: `features`, number {k} (values that are NaN or infinite: the potential is unbounded below),",
                kind, np.asarray(steps.targets[t]), f"the snapshot that step {t} leads to",
            )  # fmt: skip
