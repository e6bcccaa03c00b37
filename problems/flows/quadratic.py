"""The quadratic estimator: least squares on the optimal pairing of consecutive snapshots."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import bilevel

from . import _inputs as inputs
from ._newton import check_identified
from ._pairing import optimal_pairs
from .features import Linear, as_potential, feature_gradients
from .simulate import simulate

OWNER = "flows.QuadraticJKO"


class QuadraticJKO(eqx.Module):
    """theta of V = sum_k theta_k phi_k from the pairs (x, y) of the optimal coupling of consecutive snapshots:

        minimize  sum over steps of  mean over pairs |step_size grad V + y - x|^2  (+ ridge |theta|^2),

    with grad V at the new point y (`at="new"`, the implicit step; exact for data of a JKO step) or at the old one x
    (`at="old"`, explicit; exact for tracked particles moved by explicit Euler steps). (6.5) of docs/theory/flows.md
    [Terpin et al. 2024].

    **Arguments:** `snapshots`, `features`, `step_size`, `weights`, `without` as for `InverseJKO`, features linear in
    theta. `ridge` >= 0. `paired=True`: particle i of a snapshot is particle i of the next, no coupling is computed.

    **Raises:** ValueError, TypeError as `InverseJKO`; `newton` for features that the data cannot tell apart.
    """

    normal: Float[Array, "K K"]
    right: Float[Array, " K"]
    constant: Float[Array, ""]
    step_sizes: Float[Array, " steps"]
    _potential: Linear

    def __init__(
        self, snapshots: Any, features: Any, step_size: Any, *, at: str = "new", ridge: Any = 0, weights: Any = None,
        paired: bool = False, without: Any = None,
    ):  # fmt: skip
        clouds = inputs.snapshots(OWNER, snapshots)
        dtype = clouds[0].dtype
        self.step_sizes = inputs.step_sizes(OWNER, step_size, len(clouds) - 1, dtype)
        masses = inputs.snapshot_weights(OWNER, weights, clouds)
        if at not in ("new", "old"):
            raise ValueError(f"{OWNER}: `at` must be 'new' or 'old', found {at!r}.")
        potential = as_potential(OWNER, features, clouds[0].shape[1], dtype)
        if not isinstance(potential, Linear):
            raise ValueError(f"{OWNER}: `features` must be linear in theta, a function z -> (K,).")
        self._potential = potential
        ridge = inputs.number(OWNER, "`ridge`", ridge, dtype, zero=True)
        count = potential.count
        normal, right, constant = ridge * jnp.eye(count, dtype=dtype), jnp.zeros((count,), dtype), jnp.zeros((), dtype)
        keep = inputs.kept_steps(OWNER, without, len(clouds))
        for t in keep:
            x, y = clouds[t], clouds[t + 1]
            rows, columns, pair_masses = _pairs(x, y, masses[t], masses[t + 1], paired, t)
            move, mass = y[columns] - x[rows], jnp.asarray(pair_masses, dtype)
            parts = _terms(potential, x[rows] if at == "old" else y[columns], move, mass, self.step_sizes[t])
            normal, right, constant = normal + parts[0], right + parts[1], constant + parts[2]
        self.step_sizes = self.step_sizes[np.asarray(keep)]
        if not np.isfinite(np.asarray(normal)).all():
            raise ValueError(f"{OWNER}: `features` have gradients that are NaN or infinite on the snapshots.")
        self.normal, self.right, self.constant = normal, right, constant

    def initial(self) -> Float[Array, " K"]:
        """Zeros."""
        return jnp.zeros_like(self.right)

    def loss(self, theta: Any) -> Float[Array, ""]:
        """The sum of squares, the ridge included."""
        theta = jnp.asarray(theta, self.right.dtype)
        return theta @ self.normal @ theta + 2 * self.right @ theta + self.constant

    def hessian(self, theta: Any = None) -> Float[Array, "K K"]:
        """The Hessian of `loss`, the same everywhere."""
        return 2 * self.normal

    def conditioning(self, theta: Any = None) -> float:
        """The 2-norm condition number of `hessian`."""
        values = np.linalg.eigvalsh(np.asarray(self.normal, np.float64))
        return float(values[-1] / values[0]) if values[0] > 0 else float("inf")

    def newton(self, theta0: Any = None, tol: float = 1e-10) -> bilevel.Result:
        """The minimum, in one step; arguments are there for likeness with `InverseJKO.newton`.

        Raises ValueError where the normal equations are singular (the flat direction is named).
        """
        H = np.asarray(self.hessian(), np.float64)
        check_identified(f"{OWNER}.newton", H, float(jnp.finfo(self.right.dtype).eps))
        scale = 1 / np.sqrt(np.diag(H))
        scaled = np.linalg.solve(H * scale[:, None] * scale, -2 * scale * np.asarray(self.right, np.float64))
        theta = jnp.asarray(scale * scaled, self.right.dtype)
        gradient = 2 * (self.normal @ theta + self.right)
        value, size = float(self.loss(theta)), float(jnp.max(jnp.abs(gradient)))
        error = float(jnp.finfo(self.right.dtype).eps) * float(jnp.linalg.norm(self.right)) * 2
        done = size <= max(tol, 100 * error)
        state = bilevel.State(1, theta, (), value, gradient, error)
        message = f"least squares, with a gradient of {size:.2e}"
        return bilevel.Result(theta, (), value, gradient, error, [state], done, message, 1, 1, 0, 0)

    def potential(self, x: Any, z: Array) -> Float[Array, ""]:
        """V at one point."""
        return self._potential(x, z)

    def predict(self, theta: Any, particles: Any, steps: int, *, step_size: Any = None) -> Array:
        """Particles that follow V for `steps` explicit Euler steps, shape (steps + 1, n, d)."""
        size = self.step_sizes[-1] if step_size is None else step_size
        return simulate(self.potential, theta, particles, steps=steps, step_size=size)

    def __repr__(self):
        return f"QuadraticJKO({len(self.right)} features, {len(self.step_sizes)} steps)"


def _pairs(x, y, a, b, paired, t):
    if paired:
        if len(x) != len(y):
            raise ValueError(
                f"{OWNER}: `paired` needs equal snapshots, number {t} has {len(x)}, the next {len(y)} points."
            )
        index = np.arange(len(x))
        return index, index, a
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    cost = np.sum(x**2, 1)[:, None] / 2 + np.sum(y**2, 1) / 2 - x @ y.T
    return optimal_pairs(cost - cost.min(), np.asarray(a, np.float64), np.asarray(b, np.float64))[:3]


@eqx.filter_jit
def _terms(potential, at, move, mass, tau):
    """Normal matrix, right side and constant of one step, in blocks of points."""

    block = 256
    pad = -len(mass) % block
    fill = lambda a: jnp.concatenate([a, jnp.broadcast_to(a[:1], (pad, *a.shape[1:]))]).reshape(-1, block, *a.shape[1:])
    mass = jnp.concatenate([mass, jnp.zeros((pad,), mass.dtype)]).reshape(-1, block)

    def blockwise(carry, group):
        z, v, m = group
        slopes = feature_gradients(potential.features, potential.count, z)  # (block, K, d)
        normal, right, constant = carry
        normal = normal + tau**2 * jnp.einsum("b,bkd,bld->kl", m, slopes, slopes)
        right = right + tau * jnp.einsum("b,bkd,bd->k", m, slopes, v)
        return (normal, right, constant + m @ jnp.sum(v * v, axis=1)), None

    count, dtype = potential.count, move.dtype
    start = jnp.zeros((count, count), dtype), jnp.zeros((count,), dtype), jnp.zeros((), dtype)
    return jax.lax.scan(blockwise, start, (fill(at), fill(move), mass))[0]
