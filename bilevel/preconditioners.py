"""Approximate inverses of dF/dy, for two uses: `Preconditioner(solve)` as a correction, and
`ConjugateGradient(preconditioner=…)`, whose limit stays exact whatever the approximation is worth.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from ._dense import Dense, factor_definite, factor_general
from ._system import linear_system
from ._trees import ravel, ravel_like

__all__ = ["FrozenHessian", "Nystrom", "ScaledIdentity", "SecantInverse"]


class _Nystrom(NamedTuple):
    """Eigenpairs of the approximation, and the smallest eigenvalue it found."""

    vectors: jax.Array
    values: jax.Array
    last: jax.Array


class Nystrom(eqx.Module):
    """For `ConjugateGradient(preconditioner=Nystrom(rank))`: a randomized Nyström approximation of a symmetric
    positive definite dF/dy as the preconditioner (Frangella, Tropp, Udell 2023; taken for the inverse itself, as by
    Hataya and Yamada 2023, the same matrix is biased).

    `rank` products with dF/dy from a Gaussian sketch (`seed`), n rank^2 arithmetic, n rank numbers of memory. It pays
    where `rank` eigenvalues stand out and several systems are solved at one point.
    """

    rank: int = eqx.field(static=True)
    seed: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"bilevel.Nystrom: rank must be an integer of at least 1, found {self.rank!r}.")

    def prepare(self, system) -> _Nystrom:
        """The sketch at one point."""
        rank, dtype = min(self.rank, system.size), system.dtype
        sketch = jax.random.normal(jax.random.PRNGKey(self.seed), (system.size, rank), dtype)
        sketch = jnp.linalg.qr(sketch)[0]
        image = lax.map(system.mv, sketch.T, batch_size=64).T
        # a tiny multiple of the identity makes the Cholesky factorization safe, and is taken off again
        shift = jnp.finfo(dtype).eps * jnp.linalg.norm(image)
        image = image + shift * sketch
        core = sketch.T @ image
        factor = jnp.linalg.cholesky((core + core.T) / 2)
        half = jax.scipy.linalg.solve_triangular(factor, image.T, lower=True).T
        vectors, singular, _ = jnp.linalg.svd(half, full_matrices=False)
        values = jnp.maximum(singular**2 - shift, 0)
        usable = jnp.all(jnp.isfinite(values)) & (values[-1] > 0)  # else: no preconditioner
        one = jnp.ones((), dtype)
        return _Nystrom(
            jnp.where(usable, vectors, 0), jnp.where(usable, values, one), jnp.where(usable, values[-1], one)
        )

    def apply(self, state: _Nystrom, v: jax.Array) -> jax.Array:
        """U (last / values) U'v + (I - U U')v."""
        inside = state.vectors.T @ v
        return v + state.vectors @ ((state.last / state.values - 1) * inside)


class SecantInverse(eqx.Module):
    """The L-BFGS approximation of the inverse of dF/dy from pairs s_k = y_{k+1} - y_k, d_k = F_{k+1} - F_k (Nocedal,
    Wright, Numerical Optimization, 2006, algorithm 7.4), oldest first; pairs with s'd <= 0 are left out.

    As a correction, `Preconditioner(SecantInverse(s, d))`; as a preconditioner that leaves the limit exact,
    `ConjugateGradient(preconditioner=SecantInverse(s, d))`. `s`, `d`: arrays of shape (k, n), y's leaves in order.
    `of_jaxopt(state)` takes them from the state that jaxopt's L-BFGS returns.
    """

    s: Array
    d: Array

    def __check_init__(self):
        if jnp.ndim(self.s) != 2 or jnp.shape(self.s) != jnp.shape(self.d):
            raise ValueError(
                f"bilevel.SecantInverse: s and d must have one shape (k, n), found {jnp.shape(self.s)} and "
                f"{jnp.shape(self.d)}."
            )

    @classmethod
    def of_jaxopt(cls, state: Any) -> SecantInverse:
        """From `jaxopt.LBFGS(…).run(…).state`; unused slots hold zeros and are left out."""
        stack = lambda tree: jax.vmap(lambda leaf: ravel(leaf)[0])(tree)
        return cls(stack(state.s_history), stack(state.y_history))

    def multiply(self, v: jax.Array) -> jax.Array:
        """The approximate inverse times v, shape (n,)."""
        s, d = self.s.astype(v.dtype), self.d.astype(v.dtype)
        curvature = jnp.sum(s * d, axis=1)
        size = jnp.sum(d * d, axis=1)
        good = curvature > 0
        rho = jnp.where(good, 1 / jnp.where(good, curvature, 1), 0)

        def down(v, k):
            alpha = rho[k] * jnp.vdot(s[k], v)
            return v - alpha * d[k], alpha

        order = jnp.arange(s.shape[0])
        q, alphas = lax.scan(down, v, order[::-1])
        scales = jnp.where(good, curvature / jnp.where(size > 0, size, 1), 0)
        newest = jnp.max(jnp.where(good, order, -1))
        scale = jnp.where(newest >= 0, scales[newest], 1)

        def up(r, pair):
            k, alpha = pair
            beta = rho[k] * jnp.vdot(d[k], r)
            return r + jnp.where(good[k], alpha - beta, 0) * s[k], None

        return lax.scan(up, scale * q, (order, alphas[::-1]))[0]

    def prepare(self, system) -> None:
        return None

    def apply(self, state: None, v: jax.Array) -> jax.Array:
        return self.multiply(v)

    def __call__(self, x: PyTree, y: PyTree, F: PyTree) -> PyTree:
        flat, unravel = ravel(F)
        return unravel(self.multiply(flat))


class FrozenHessian(eqx.Module):
    """dF/dy of `inner` factored densely at one point (x, y), and used near it: `Preconditioner(FrozenHessian(inner, x,
    y))`. First order, with the constant |I - P^-1 F_y| of docs/theory."""

    factor: Dense

    def __init__(self, inner, x: PyTree, y: PyTree):
        _, system = linear_system(inner, x, y)
        matrix = system.matrix()
        self.factor = factor_definite(matrix) if system.definite else factor_general(matrix)

    def __call__(self, x: PyTree, y: PyTree, F: PyTree) -> PyTree:
        flat, unravel = ravel(F)
        return unravel(ravel_like(self.factor.solve(flat, False), flat.dtype))


class ScaledIdentity(eqx.Module):
    """P = `scale` times the identity: `Preconditioner(ScaledIdentity(L))` takes gradient steps of size 1 / L."""

    scale: Any

    def __call__(self, x: PyTree, y: PyTree, F: PyTree) -> PyTree:
        return jax.tree.map(lambda f: f / jnp.asarray(self.scale, f.dtype), F)
