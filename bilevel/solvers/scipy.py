"""SciPy's minimizers and root finders, on the host."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._trees import ravel, ravel_like
from ._base import AbstractSolver, Found


class Scipy(AbstractSolver):
    """`scipy.optimize.minimize(method=…)` for a minimization, `scipy.optimize.root(method=…)` for any other
    residual. Works traced, too (one host call per batch element under `vmap`), but not inside another host call.

    **Arguments:** `method`: None: "L-BFGS-B", resp. "hybr".
    """

    method: str | None = eqx.field(static=True, default=None)

    def find(self, inner, x, y0, *, tol, max_steps):
        import scipy.optimize as so

        flat, unravel = ravel(y0)
        dtype = flat.dtype
        minimizes = inner.minimizes

        @jax.jit
        def value_and_grad(inner_leaves, x, point):
            problem = eqx.combine(inner_leaves, inner_static)
            point = point.astype(dtype)
            if not minimizes:
                return ravel_like(problem.optimality(x, unravel(point)), dtype)
            value, gradient = jax.value_and_grad(problem.objective_at, argnums=1)(x, unravel(point))
            return value, ravel_like(gradient, dtype)

        inner_leaves, inner_static = eqx.partition(inner, eqx.is_array)

        def call(inner_leaves, x, point, tol):
            def function(p):
                out = value_and_grad(inner_leaves, x, jnp.asarray(p, dtype))
                return jax.tree.map(lambda a: np.asarray(a, np.float64), out)

            start, tol = np.asarray(point, np.float64), float(tol)
            if minimizes:
                method = self.method or "L-BFGS-B"
                options = {"maxiter": max_steps}
                if method == "L-BFGS-B":  # its gradient test is on the largest entry, ours on the 2-norm
                    options |= {"gtol": tol / np.sqrt(start.size), "ftol": 0.0, "maxfun": 20 * max_steps}
                elif method in ("BFGS", "CG"):
                    options |= {"gtol": tol, "norm": 2}
                out = so.minimize(lambda p: function(p), start, jac=True, method=method, options=options)
                steps, evaluations = out.nit, out.nfev
            else:
                out = so.root(function, start, method=self.method or "hybr", tol=max(tol, 1e-15))
                steps = evaluations = out.nfev
            return np.asarray(out.x, dtype), np.int32(steps), np.int32(evaluations)

        shapes = (
            jax.ShapeDtypeStruct(flat.shape, dtype),
            jax.ShapeDtypeStruct((), jnp.int32),
            jax.ShapeDtypeStruct((), jnp.int32),
        )
        tol = jnp.asarray(tol, dtype)
        point, steps, evaluations = jax.pure_callback(
            call, shapes, inner_leaves, x, flat, tol, vmap_method="sequential"
        )
        return Found(unravel(point), steps, evaluations)
