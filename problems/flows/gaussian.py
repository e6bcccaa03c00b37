"""The JKO step between Gaussians in closed form, for the potential V = (z - centre)' Q (z - centre) / 2.

Formulas: docs/theory/flows.md, section "Gaussians". Nothing here assumes that the covariance and Q commute. All
results are differentiable (three times) in every argument.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from problems.transport.gaussian import sqrtm

__all__ = ["entropic_jko_step", "jko_step"]

Gaussian = tuple[Float[Array, " d"], Float[Array, "d d"]]


def jko_step(mean: Any, covariance: Any, Q: Any, centre: Any, step_size: Any, temperature: Any) -> Gaussian:
    """argmin over mu of W_2(N(mean, covariance), mu)^2 / 2 + step_size (<V, mu> + temperature int mu log mu).

    **Arguments:** `mean`, `centre`: shape (d,); `covariance`: (d, d), symmetric positive definite; `Q`: (d, d),
    symmetric, I + step_size Q positive definite; `step_size` > 0; `temperature` >= 0.

    **Returns:** `(mean, covariance)` of the minimizer, shapes (d,) and (d, d). Derived in docs/theory/flows.md.

    **Raises:** ValueError for shapes that do not fit, NaN, asymmetry, a covariance that is not positive definite, a
    step after which the energy is unbounded below.
    """
    m, S, Q, v, tau, M = _checked("jko_step", mean, covariance, Q, centre, step_size)
    T = _number("jko_step", "temperature", temperature, m.dtype, zero=True)
    root, back = _roots(S)
    A = _symmetric(back @ M @ back)  # B = S^1/2 [(I + 4 kappa A)^1/2 - I] S^1/2 / (2 kappa), without the cancellation
    eye = jnp.eye(len(m), dtype=m.dtype)
    inner = sqrtm(eye + 4 * tau * T * A) + eye
    to = back @ jnp.linalg.solve(2 * A, inner) @ root  # B^-1 S^1/2 up to a rotation: B^-1 = to S^-1
    to = to @ back @ back
    return _mean(m, Q, v, tau, M), _symmetric(to @ S @ to.T)


def entropic_jko_step(
    mean: Any, covariance: Any, Q: Any, centre: Any, step_size: Any, epsilon: Any, kappa: Any
) -> Gaussian:
    """argmin over mu of W_epsilon(N(mean, covariance), mu) + step_size <V, mu> + kappa int mu log mu.

    W_epsilon(a, mu) is the minimum over couplings p of <|x - z|^2 / 2, p> + epsilon KL(p | a x mu).

    **Arguments:** as for `jko_step`; `epsilon` > 0: the entropy; `kappa` >= 0: the whole weight of the internal energy
    (kappa = epsilon is the explicit step; kappa = 0 needs covariance > epsilon (I + step_size Q)).

    **Returns:** `(mean, covariance)` of the minimizer, shapes (d,) and (d, d). Derived in docs/theory/flows.md.

    **Raises:** ValueError as `jko_step`, and with kappa = 0 where the minimizer is degenerate.
    """
    m, S, Q, v, tau, M = _checked("entropic_jko_step", mean, covariance, Q, centre, step_size)
    epsilon = _number("entropic_jko_step", "epsilon", epsilon, m.dtype)
    kappa = _number("entropic_jko_step", "kappa", kappa, m.dtype, zero=True)
    _, back = _roots(S)
    A = _symmetric(epsilon * back @ M @ back)
    _check_degenerate(A, kappa)
    eye, k = jnp.eye(len(m), dtype=m.dtype), kappa / epsilon
    # k L^2 + (I - A) L - A = 0 for L = epsilon^2 S^-1/2 Lambda S^-1/2, solved for its inverse
    inverse = jnp.linalg.solve(2 * A, eye - A + sqrtm(jnp.matmul(eye - A, eye - A) + 4 * k * A))
    inverse = _symmetric(inverse)
    covariance = epsilon**2 * back @ (inverse + inverse @ inverse) @ back
    return _mean(m, Q, v, tau, M), _symmetric(covariance)


def _mean(m, Q, v, tau, M):
    return jnp.linalg.solve(M, m + tau * (Q @ v))


def _symmetric(a):
    return (a + a.T) / 2


def _roots(S):
    root = sqrtm(S)
    return root, _symmetric(jnp.linalg.inv(root))


def _checked(owner, mean, covariance, Q, centre, step_size):
    m, S, Q, v = (_array(owner, *pair) for pair in (
        ("mean", mean), ("covariance", covariance), ("Q", Q), ("centre", centre)
    ))  # fmt: skip
    dtype = jnp.result_type(m, S) if m.dtype == S.dtype else jnp.promote_types(m.dtype, S.dtype)
    m, S, Q, v = (a.astype(dtype) for a in (m, S, Q, v))
    if m.ndim != 1 or m.size == 0:
        raise ValueError(f"flows.gaussian.{owner}: `mean` must have shape (d,), found {m.shape}.")
    d = m.size
    for name, a, shape in (("covariance", S, (d, d)), ("Q", Q, (d, d)), ("centre", v, (d,))):
        if a.shape != shape:
            raise ValueError(f"flows.gaussian.{owner}: `{name}` must have shape {shape}, found {a.shape}.")
    tau = _number(owner, "step_size", step_size, dtype)
    _check_symmetric(owner, "covariance", S)
    _check_symmetric(owner, "Q", Q)
    M = jnp.eye(d, dtype=dtype) + tau * Q
    _check_definite(owner, "`covariance` must be positive definite", S)
    _check_definite(owner, "the energy is unbounded below, I + step_size Q must be positive definite", M)
    return m, S, Q, v, tau, M


def _array(owner: str, name: str, value: Any) -> Array:
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"flows.gaussian.{owner}: `{name}` must hold real numbers, found dtype {array.dtype}.")
        array = array.astype(float)
    if not isinstance(array, jax.core.Tracer) and not np.isfinite(np.asarray(array)).all():
        raise ValueError(f"flows.gaussian.{owner}: `{name}` has entries that are NaN or infinite.")
    return array


def _number(owner: str, name: str, value: Any, dtype: Any, *, zero: bool = False) -> Array:
    array = _array(owner, name, value).astype(dtype)
    if array.shape != ():
        raise ValueError(f"flows.gaussian.{owner}: `{name}` must be one number, found shape {array.shape}.")
    if not isinstance(array, jax.core.Tracer) and not (float(array) >= 0 if zero else float(array) > 0):
        bound = "at least 0" if zero else "positive"
        raise ValueError(f"flows.gaussian.{owner}: `{name}` must be {bound}, found {float(array):g}.")
    return array


def _check_symmetric(owner: str, name: str, a: Array) -> None:
    if isinstance(a, jax.core.Tracer):
        return
    found = np.asarray(a)
    gap = np.abs(found - found.T).max()
    if gap > 1e3 * float(jnp.finfo(a.dtype).eps) * np.abs(found).max():
        raise ValueError(
            f"flows.gaussian.{owner}: `{name}` must be symmetric, it differs from its transpose by {gap:g}."
        )


def _check_definite(owner: str, what: str, a: Array) -> None:
    if isinstance(a, jax.core.Tracer):
        return
    least = np.linalg.eigvalsh(np.asarray(a))[0]
    if not least > 0:
        raise ValueError(f"flows.gaussian.{owner}: {what}; its smallest eigenvalue is {least:g}.")


def _check_degenerate(A: Array, kappa: Array) -> None:
    if isinstance(A, jax.core.Tracer) or isinstance(kappa, jax.core.Tracer) or float(kappa) > 0:
        return
    largest = np.linalg.eigvalsh(np.asarray(A))[-1]
    if not largest < 1:
        raise ValueError(
            "flows.gaussian.entropic_jko_step: with kappa = 0 the minimizer is degenerate unless covariance > epsilon "
            f"(I + step_size Q); along some direction the right side is {largest:g} times the left. Lower `epsilon`, "
            "or give `kappa`."
        )
