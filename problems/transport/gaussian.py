"""Gaussian measures, between which entropic transport has closed forms: balanced and unbalanced, in any dimension.

The oracles of the tests, and of yours. All formulas hold for every quadratic cost; they are derived in
docs/theory/transport.md, "Gaussians". No eigenvectors are differentiated: derivatives exist at repeated eigenvalues.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from bilevel._precision import full_products

from ._checks import as_floating, check_finite, check_positive, common_dtype, is_concrete, tau_pair

__all__ = ["Gaussian", "Plan", "QuadraticCost", "bilinear", "bures_map", "bures_squared", "plan", "sqrtm"]

_ORDERS = 3
_LOG_2PI = float(np.log(2 * np.pi))


@full_products()
def sqrtm(S: Any) -> Float[Array, "d d"]:
    """The positive semidefinite square root of a symmetric positive semidefinite matrix, shape (d, d).

    Differentiable up to order three where S is positive definite, at repeated eigenvalues too (an infinite or NaN
    derivative where it is singular). The root R from an eigendecomposition, which is a constant of all derivatives,
    then three corrections R <- R + E, where E solves the Sylvester equation of that constant, R0 E + E R0 = S - R^2:
    each leaves the value and makes one more order of the derivative right (derived in docs/theory/transport.md).
    """
    return _sqrtm(_symmetric("sqrtm", "S", S))


@jax.jit
def _sqrtm(S):
    values, vectors = jnp.linalg.eigh(lax.stop_gradient(S))
    roots = jnp.sqrt(jnp.maximum(values, 0))
    sums = roots[:, None] + roots[None, :]
    regular = sums > 0
    root = vectors @ (roots[:, None] * vectors.T)
    for _ in range(_ORDERS):
        rest = vectors.T @ (S - root @ root) @ vectors
        # where both roots are zero the value is zero, and the slope that of the square root at zero
        kink = jnp.sqrt(jnp.where(regular, 1, rest - lax.stop_gradient(rest)))
        change = jnp.where(regular, rest / jnp.where(regular, sums, 1), kink)
        root = root + vectors @ change @ vectors.T
        root = (root + root.T) / 2
    return root


@full_products()
def bures_squared(S: Any, T: Any) -> Float[Array, ""]:
    """The squared Bures distance of two covariances of shape (d, d): W_2^2 of N(m, S) and N(m, T).

    tr S + tr T - 2 tr (S^1/2 T S^1/2)^1/2 [Dowson, Landau 1982]. Raises ValueError unless both are symmetric positive
    semidefinite of one shape.
    """
    S, T = _pair("bures_squared", S, T)
    root = _sqrtm(S)
    return jnp.trace(S) + jnp.trace(T) - 2 * jnp.trace(_sqrtm(_sym(root @ T @ root)))


@full_products()
def bures_map(S: Any, T: Any) -> Float[Array, "d d"]:
    """The symmetric matrix A that pushes N(0, S) to N(0, T): A S A = T, shape (d, d). S must be positive definite.

    A = S^-1/2 (S^1/2 T S^1/2)^1/2 S^-1/2. Raises ValueError as `bures_squared`, and where S is singular.
    """
    S, T = _pair("bures_map", S, T)
    _check_definite("bures_map", "S", S, strict=True)
    root = _sqrtm(S)
    middle = _sqrtm(_sym(root @ T @ root))
    factor = jsl.cho_factor(root, lower=True)
    half = jsl.cho_solve(factor, middle)
    return _sym(jsl.cho_solve(factor, half.T))


class Gaussian(eqx.Module):
    """`mass` times the normal distribution with `mean`, shape (d,), and `covariance`, shape (d, d), positive definite.

    **Raises:** ValueError where shapes do not fit, the covariance is not symmetric positive definite, or the mass is
    not positive.
    """

    mean: Float[Array, " d"]
    covariance: Float[Array, "d d"]
    mass: Float[Array, ""]

    def __init__(self, mean: Any, covariance: Any, mass: Any = 1):
        mean = as_floating("Gaussian", "mean", mean, 1)
        covariance = as_floating("Gaussian", "covariance", covariance, 2)
        dtype = common_dtype(mean, covariance)
        covariance = _symmetric("Gaussian", "covariance", covariance.astype(dtype))
        if covariance.shape[0] != mean.shape[0]:
            raise ValueError(
                f"Gaussian: `covariance` has shape {covariance.shape}, but `mean` has {mean.shape[0]} entries."
            )
        check_finite("Gaussian", "mean", mean)
        _check_definite("Gaussian", "covariance", covariance, strict=True)
        self.mean, self.covariance = mean.astype(dtype), covariance
        self.mass = check_positive("Gaussian", "mass", mass).astype(dtype)

    def __repr__(self):
        return f"Gaussian(dimension={self.mean.shape[-1]}, mass={_shown(self.mass)})"


class QuadraticCost(eqx.Module):
    """c(x, y) = x'Cxx x / 2 + x'Cxy y + y'Cyy y / 2 + cx'x + cy'y, shapes (d, d), (d, e), (e, e), (d,), (e,).

    Half the squared distance is `QuadraticCost(I, -I, I, 0, 0)` with zeros of shape (d,). Callable: `cost(x, y)`.

    **Raises:** ValueError where shapes do not fit, Cxx or Cyy is not symmetric, or an entry is not finite.
    """

    Cxx: Float[Array, "d d"]
    Cxy: Float[Array, "d e"]
    Cyy: Float[Array, "e e"]
    cx: Float[Array, " d"]
    cy: Float[Array, " e"]

    def __init__(self, Cxx: Any, Cxy: Any, Cyy: Any, cx: Any, cy: Any):
        parts = {"Cxx": (Cxx, 2), "Cxy": (Cxy, 2), "Cyy": (Cyy, 2), "cx": (cx, 1), "cy": (cy, 1)}
        arrays = {name: as_floating("QuadraticCost", name, value, ndim) for name, (value, ndim) in parts.items()}
        dtype = common_dtype(*arrays.values())
        d, e = arrays["Cxy"].shape
        shapes = {"Cxx": (d, d), "Cxy": (d, e), "Cyy": (e, e), "cx": (d,), "cy": (e,)}
        for name, array in arrays.items():
            if array.shape != shapes[name]:
                raise ValueError(
                    f"QuadraticCost: `{name}` must have shape {shapes[name]}, as `Cxy` has {(d, e)}, found "
                    f"{array.shape}."
                )
            check_finite("QuadraticCost", name, array)
        self.Cxx = _symmetric("QuadraticCost", "Cxx", arrays["Cxx"].astype(dtype))
        self.Cyy = _symmetric("QuadraticCost", "Cyy", arrays["Cyy"].astype(dtype))
        self.Cxy, self.cx, self.cy = (arrays[name].astype(dtype) for name in ("Cxy", "cx", "cy"))

    def __call__(self, x: Float[Array, " d"], y: Float[Array, " e"]) -> Float[Array, ""]:
        quadratic = x @ self.Cxx @ x / 2 + x @ self.Cxy @ y + y @ self.Cyy @ y / 2
        return quadratic + self.cx @ x + self.cy @ y

    def __repr__(self):
        return f"QuadraticCost(dimensions={self.Cxy.shape})"


def bilinear(A: Any) -> QuadraticCost:
    """The cost -x'A y, A of shape (d, e)."""
    A = as_floating("bilinear", "A", A, 2)
    d, e = A.shape
    zeros = lambda *shape: jnp.zeros(shape, A.dtype)
    return QuadraticCost(zeros(d, d), -A, zeros(e, e), zeros(d), zeros(e))


class Plan(eqx.Module):
    """The optimal coupling: `mass` times a normal distribution of `mean`, shape (d + e,), and `covariance`, shape
    (d + e, d + e). `value`: the optimal value of the transport problem.
    """

    value: Float[Array, ""]
    mass: Float[Array, ""]
    mean: Float[Array, " n"]
    covariance: Float[Array, "n n"]

    def __repr__(self):
        return f"Plan(value={_shown(self.value)}, mass={_shown(self.mass)}, dimension={self.mean.shape[-1]})"


@full_products()
def plan(cost: QuadraticCost, source: Gaussian, target: Gaussian, epsilon: Any, tau: Any = np.inf) -> Plan:
    """Entropic transport between two Gaussian measures in closed form:

        min over p of <c, p> + epsilon KL(p | source x target) + tau_1 KL(p_1 | source) + tau_2 KL(p_2 | target),

    KL(p|q) = int p log(p/q) - p + q. `tau`: a number or a pair; infinite: that marginal is kept exactly.

    The precision [[P, B], [B', Q]] of the coupling has B = Cxy / epsilon and solves P = P0 + eta_1 B Q^-1 B',
    Q = Q0 + eta_2 B' P^-1 B, with P0 = inverse covariance of the source + Cxx / (epsilon + tau_1) and eta = tau /
    (tau + epsilon); one matrix square root of size d (derived in docs/theory/transport.md). Differentiable up to order
    three in all arguments.

    **Raises:** TypeError for other arguments; ValueError where dimensions do not fit, epsilon or tau is not positive,
    masses differ although both are kept exactly, or the value is minus infinity.
    """
    _check_arguments(cost, source, target)
    epsilon = check_positive("plan", "epsilon", epsilon)
    tau_1, tau_2 = tau_pair("plan", tau)
    dtype = common_dtype(source.mean, target.mean, cost.Cxy)
    cost, source, target = jax.tree.map(lambda a: a.astype(dtype), (cost, source, target))
    epsilon = epsilon.astype(dtype)
    if tau_1 is None and tau_2 is None:
        _check_masses(source, target)
    found = _plan(cost, source, target, epsilon, tau_1, tau_2)
    if is_concrete(found.value) and not np.isfinite(float(found.value)):
        raise ValueError(
            "plan: the value is minus infinity: the cost falls faster than the Gaussians decay, so mass escapes; raise "
            "`epsilon` or `tau`, or make the quadratic part of the cost larger."
        )
    return found


@eqx.filter_jit
def _plan(cost, source, target, epsilon, tau_1, tau_2) -> Plan:
    dtype = epsilon.dtype
    slack_1, slack_2 = _slack(tau_1, epsilon), _slack(tau_2, epsilon)
    eta_1, eta_2 = 1 - epsilon * slack_1, 1 - epsilon * slack_2

    inverse_a, inverse_b = _inverse(source.covariance), _inverse(target.covariance)
    P0, Q0 = inverse_a + slack_1 * cost.Cxx, inverse_b + slack_2 * cost.Cyy
    B = cost.Cxy / epsilon
    P, Q = _precisions(P0, Q0, B, eta_1, eta_2)
    P_inverse, Q_inverse = _inverse(P), _inverse(Q)
    u0 = inverse_a @ source.mean - slack_1 * cost.cx
    v0 = inverse_b @ target.mean - slack_2 * cost.cy
    K = eta_1 * B @ Q_inverse
    u = jnp.linalg.solve(jnp.eye(len(u0), dtype=dtype) - K @ (eta_2 * B.T @ P_inverse), u0 + K @ v0)
    v = v0 + eta_2 * B.T @ (P_inverse @ u)

    precision = jnp.block([[P, B], [B.T, Q]])
    covariance = _inverse(precision)
    r = jnp.concatenate([u, v])
    mean = covariance @ r

    log_a = _log_normalizer(source, inverse_a) + _log_integral(P, u, P_inverse)
    log_b = _log_normalizer(target, inverse_b) + _log_integral(Q, v, Q_inverse)
    if tau_1 is None and tau_2 is None:
        mass = source.mass
    else:  # f0 and g0 of the potentials: two linear equations
        e_1, e_2 = epsilon * slack_1, epsilon * slack_2  # 1 - eta
        constants = -(eta_1 * e_2 * log_b + eta_2 * e_1 * log_a) / (e_1 + eta_1 * e_2)
        normalizers = _log_normalizer(source, inverse_a) + _log_normalizer(target, inverse_b)
        mass = jnp.exp(normalizers + constants + _log_integral(precision, r, covariance))
    d = len(u0)
    value = _mean_cost(cost, mass, mean, covariance, d)
    product = (
        jnp.concatenate([source.mean, target.mean]), jsl.block_diag(inverse_a, inverse_b),
        source.mass * target.mass, _logdet(source.covariance) + _logdet(target.covariance),
    )  # fmt: skip
    value = value + epsilon * _kl(mass, mean, covariance, -_logdet(precision), *product)
    for t, part, of, inverse in (
        (tau_1, slice(None, d), source, inverse_a),
        (tau_2, slice(d, None), target, inverse_b),
    ):
        if t is not None:
            block = covariance[part, part]
            reference = of.mean, inverse, of.mass, _logdet(of.covariance)
            value = value + t.astype(dtype) * _kl(mass, mean[part], block, _logdet(block), *reference)
    return Plan(value, mass, mean, covariance)


# ------------------------------------------------------------------------------------------------ parts


def _precisions(P0, Q0, B, eta_1, eta_2):
    """P and Q of `plan`, by one square root on each side: in the coordinates where P0 and Q0 are identities both are
    functions of M = B B' (or B'B), p^2 + ((eta_2 - eta_1) m - 1) p - eta_2 m = 0."""
    lower_p, lower_q = jnp.linalg.cholesky(P0), jnp.linalg.cholesky(Q0)
    scaled = jsl.solve_triangular(lower_q, jsl.solve_triangular(lower_p, B, lower=True).T, lower=True).T

    def one_side(lower, M, first, second):
        identity = jnp.eye(len(M), dtype=M.dtype)
        half = (identity - (second - first) * M) / 2
        return _sym(lower @ (half + _sqrtm(_sym(half @ half + second * M))) @ lower.T)

    P = one_side(lower_p, scaled @ scaled.T, eta_1, eta_2)
    return P, _sym(Q0 + eta_2 * B.T @ jsl.cho_solve((jnp.linalg.cholesky(P), True), B))


def _slack(t, epsilon):
    """1 / (epsilon + t), zero where t is infinite."""
    return jnp.zeros_like(epsilon) if t is None else 1 / (epsilon + t.astype(epsilon.dtype))


def _log_integral(precision, linear, inverse):
    """log of the integral of exp(-z'precision z / 2 + linear'z)."""
    d = len(linear)
    return (linear @ inverse @ linear - _logdet(precision) + d * _LOG_2PI) / 2


def _log_normalizer(g: Gaussian, inverse):
    """log of g's density at zero."""
    d = len(g.mean)
    return jnp.log(g.mass) - (g.mean @ inverse @ g.mean + _logdet(g.covariance) + d * _LOG_2PI) / 2


def _kl(mass, mean, covariance, logdet, mean_0, inverse_0, mass_0, logdet_0):
    """KL(mass N(mean, covariance) | mass_0 N(mean_0, inverse_0^-1)), unnormalised."""
    shift = mean - mean_0
    normal = (jnp.sum(inverse_0 * covariance) + shift @ inverse_0 @ shift - len(mean) + logdet_0 - logdet) / 2
    return mass * (normal + jnp.log(mass / mass_0)) - mass + mass_0


def _mean_cost(cost: QuadraticCost, mass, mean, covariance, d: int):
    second = jnp.block([[cost.Cxx, cost.Cxy], [cost.Cxy.T, cost.Cyy]])
    return mass * (jnp.sum(second * covariance) / 2 + cost(mean[:d], mean[d:]))


def _inverse(S):
    return _sym(jsl.cho_solve((jnp.linalg.cholesky(S), True), jnp.eye(len(S), dtype=S.dtype)))


def _logdet(S):
    return 2 * jnp.sum(jnp.log(jnp.diagonal(jnp.linalg.cholesky(S))))


def _sym(S):
    return (S + S.T) / 2


def _shown(value) -> str:
    return f"{float(value):.6g}" if is_concrete(value) and jnp.ndim(value) == 0 else "…"


# ------------------------------------------------------------------------------------------------ checks


def _symmetric(owner: str, name: str, S: Any) -> Array:
    S = as_floating(owner, name, S, 2)
    if S.shape[0] != S.shape[1]:
        raise ValueError(f"{owner}: `{name}` must be square, found shape {S.shape}.")
    check_finite(owner, name, S)
    if is_concrete(S):
        A = np.asarray(S)
        eps = float(np.finfo(A.dtype).eps)
        if np.max(np.abs(A - A.T), initial=0) > 1e3 * eps * np.max(np.abs(A), initial=0):
            raise ValueError(
                f"{owner}: `{name}` must be symmetric, found |S - S'| up to {np.max(np.abs(A - A.T)):.3g}."
            )
    return _sym(S)


def _check_definite(owner: str, name: str, S: Array, *, strict: bool) -> None:
    if not is_concrete(S) or S.size == 0:
        return
    values = np.linalg.eigvalsh(np.asarray(S, np.float64))
    floor = float(jnp.finfo(S.dtype).eps) * len(values) * max(abs(values[-1]), abs(values[0]))
    if values[0] < -10 * floor or (strict and values[0] <= floor):
        words = "positive definite" if strict else "positive semidefinite"
        raise ValueError(f"{owner}: `{name}` must be {words}, its smallest eigenvalue is {values[0]:.3g}.")


def _pair(owner: str, S: Any, T: Any) -> tuple[Array, Array]:
    S, T = _symmetric(owner, "S", S), _symmetric(owner, "T", T)
    if S.shape != T.shape:
        raise ValueError(f"{owner}: `S` and `T` must have one shape, found {S.shape} and {T.shape}.")
    for name, M in (("S", S), ("T", T)):
        _check_definite(owner, name, M, strict=False)
    dtype = common_dtype(S, T)
    return S.astype(dtype), T.astype(dtype)


def _check_arguments(cost: Any, source: Any, target: Any) -> None:
    if not isinstance(cost, QuadraticCost):
        raise TypeError(
            f"plan: `cost` must be a QuadraticCost (or `bilinear(A)`), found {type(cost).__name__}; half the squared "
            f"distance is QuadraticCost(I, -I, I, 0, 0)."
        )
    for name, measure, dimension in (("source", source, cost.Cxy.shape[0]), ("target", target, cost.Cxy.shape[1])):
        if not isinstance(measure, Gaussian):
            raise TypeError(f"plan: `{name}` must be a Gaussian, found {type(measure).__name__}.")
        if measure.mean.shape[0] != dimension:
            raise ValueError(
                f"plan: `{name}` has dimension {measure.mean.shape[0]}, but `cost` has {dimension} on that side."
            )


def _check_masses(source: Gaussian, target: Gaussian) -> None:
    if is_concrete(source.mass) and is_concrete(target.mass):
        first, second = float(source.mass), float(target.mass)
        if abs(first - second) > 100 * float(jnp.finfo(source.mass.dtype).eps) * max(first, second):
            raise ValueError(
                f"plan: `source` and `target` must have the same mass where both marginals are kept exactly, found "
                f"{first:.12g} and {second:.12g}; pass a finite `tau`."
            )
