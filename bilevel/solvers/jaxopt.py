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
    """A jaxopt minimizer (default L-BFGS with zoom line search) or fixed-point iteration, its loop driven here so that
    it can be traced, stopped by a traced tolerance, and counted.

    **Arguments:** `solver`: None or a jaxopt class such as `jaxopt.BFGS`, `jaxopt.GradientDescent`, for a `FixedPoint`
    `jaxopt.AndersonAcceleration` or `jaxopt.FixedPointIteration`; `options`: its further constructor arguments.

    **Raises:** ValueError for an inner problem that is not of the solver's kind, and for Anderson acceleration or a
    Hager-Zhang line search in float32 while float64 is enabled, which jaxopt 0.8.5 cannot trace.
    """

    solver: Any = eqx.field(static=True)
    options: tuple = eqx.field(static=True)

    def __init__(self, solver: Any = None, **options):
        self.solver = solver
        self.options = tuple(sorted(options.items()))

    @property
    def _iterates(self) -> bool:
        return self.solver is not None and self.solver.__name__ in ("AndersonAcceleration", "FixedPointIteration")

    def check(self, inner):
        name = "jaxopt.LBFGS" if self.solver is None else f"jaxopt.{self.solver.__name__}"
        kind = type(inner).__name__
        if self._iterates and not inner.is_step:
            raise ValueError(f"bilevel: {name} iterates a fixed-point map, and {kind} has none; it is for FixedPoint.")
        if not self._iterates and not inner.minimizes:
            raise ValueError(
                f"bilevel: {name} minimizes an objective, and {kind} has none that could be minimized as it is; leave "
                "`solver` out, or use bilevel.solvers.DampedNewton(), bilevel.solvers.Scipy() or an optimistix root "
                "finder."
            )

    def find(self, inner, x, y0, *, tol, max_steps):
        jaxopt = _import()
        make = jaxopt.LBFGS if self.solver is None else self.solver
        flat, unravel = ravel(y0)
        self._check_dtype(flat.dtype)
        if self._iterates:
            return self._iterate(inner, x, flat, unravel, tol, max_steps)

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

    def _check_dtype(self, dtype) -> None:
        """jaxopt's Anderson acceleration and Hager-Zhang line search mix dtypes in a loop's carry."""
        name = "" if self.solver is None else self.solver.__name__
        wide = dtype != jnp.float64 and jax.dtypes.canonicalize_dtype(jnp.float64) == jnp.float64
        if wide and (name == "AndersonAcceleration" or dict(self.options).get("linesearch") == "hager-zhang"):
            what = "AndersonAcceleration" if name == "AndersonAcceleration" else "Hager-Zhang line search"
            raise ValueError(
                f"bilevel: jaxopt's {what} cannot be traced in {dtype} while float64 is enabled; use "
                "bilevel.solvers.Anderson(), another line search, or float64 data."
            )

    def _iterate(self, inner, x, flat, unravel, tol, max_steps):
        step = lambda point: point - ravel_like(inner.optimality(x, unravel(point)), point.dtype)
        options = {"maxiter": max_steps, "tol": 0.0, "implicit_diff": False, "jit": True, "unroll": False}
        iteration = self.solver(step, **(options | dict(self.options)))
        state = iteration.init_state(flat)
        shapes = jax.eval_shape(lambda p, s: iteration.update(p, s), flat, state).state
        cast = lambda state: jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), state, shapes)
        size_at = lambda point: jnp.linalg.norm(point - step(point))

        def unfinished(carry):
            point, _, size, count = carry
            return (size > jnp.asarray(tol, flat.dtype)) & (count < max_steps) & jnp.all(jnp.isfinite(point))

        def body(carry):
            point, state, _, count = carry
            new, state = iteration.update(point, state)
            new = new.astype(flat.dtype)
            return new, cast(state), size_at(new), count + 1

        start = (flat, cast(state), size_at(flat), jnp.asarray(0))
        point, _, _, steps = lax.while_loop(unfinished, body, start)
        return Found(unravel(point), steps, 2 * steps + 1)
