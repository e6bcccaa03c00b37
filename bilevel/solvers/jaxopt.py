"""jaxopt: the default provider, imported here alone and only when used (it is frozen, nothing else depends on it)."""

from __future__ import annotations

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from .._trees import ravel, ravel_like
from ._base import AbstractSolver, Found


def _import():
    with warnings.catch_warnings():  # its farewell DeprecationWarning is for whoever chose it, which is us
        warnings.simplefilter("ignore", DeprecationWarning)
        import jaxopt
    return jaxopt


class Jaxopt(AbstractSolver):
    """A jaxopt minimizer (default L-BFGS with zoom line search), its loop driven here so that it can be traced,
    stopped by a traced tolerance, and counted.

    **Arguments:** `solver`: None or a jaxopt class such as `jaxopt.BFGS`, `jaxopt.GradientDescent`; `options`: its
    further constructor arguments.
    """

    solver: Any = eqx.field(static=True)
    options: tuple = eqx.field(static=True)

    def __init__(self, solver: Any = None, **options):
        self.solver = solver
        self.options = tuple(sorted(options.items()))

    def find(self, inner, x, y0, *, tol, max_steps):
        jaxopt = _import()
        make = jaxopt.LBFGS if self.solver is None else self.solver
        flat, unravel = ravel(y0)

        def value_and_grad(point):
            y = unravel(point)
            value, gradient = jax.value_and_grad(inner.objective_at, argnums=1)(x, y)
            return value.astype(point.dtype), ravel_like(gradient, point.dtype)

        options = {"maxiter": max_steps, "tol": 0.0, "implicit_diff": False, "jit": True, "unroll": False}
        if make is jaxopt.LBFGS:
            options |= {"stop_if_linesearch_fails": True, "history_size": 30, "maxls": 20}
        options |= dict(self.options)
        minimizer = make(fun=value_and_grad, value_and_grad=True, **options)
        state = minimizer.init_state(flat)
        gradient = getattr(state, "grad", None)
        start = jnp.linalg.norm(gradient if gradient is not None else value_and_grad(flat)[1])
        tol = jnp.asarray(tol, flat.dtype)
        failed = jnp.asarray(False)
        promoted = jax.eval_shape(lambda p, s: minimizer.update(p, s), flat, state).state

        def cast(state):  # carry dtypes that update() returns, so that the loop's carry is closed
            return jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), state, promoted)

        def unfinished(carry):
            point, _, size, step, stuck = carry
            return (size > tol) & (step < max_steps) & ~stuck & jnp.all(jnp.isfinite(point))

        def body(carry):
            point, state, size, step, stuck = carry
            new_point, new_state = minimizer.update(point, state)
            new_size = jnp.asarray(new_state.error, flat.dtype)
            still = jnp.all(new_point == point)
            return new_point, cast(new_state), new_size, step + 1, still

        carry = (flat, cast(state), start, jnp.asarray(0), failed)
        point, state, _, steps, _ = lax.while_loop(unfinished, body, carry)
        evaluations = getattr(state, "num_grad_eval", steps + 1)
        return Found(unravel(point), steps, jnp.asarray(evaluations, steps.dtype))
