"""Hypergradients by other packages, each jitted whole, with the loosest tolerances that reach the accuracy asked.

Each maker returns a jitted `(x, tol, linear_tol) -> gradient`: tolerances are traced, so that the search for the
loosest pair compiles once, and the function that is timed is the one that was searched.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp


def installed(name: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(name) is not None


def jaxopt_outer(problem, maxiter: int = 5000) -> Callable:
    """jaxopt: L-BFGS, implicit differentiation by `solve_cg`; (x, y0, tol, linear_tol) -> (outer value, y)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import jaxopt
        from jaxopt.linear_solve import solve_cg

    def outer(x, y0, tol, linear_tol):
        solve = functools.partial(solve_cg, tol=linear_tol, maxiter=maxiter)
        solver = jaxopt.LBFGS(
            lambda y, x: problem.inner.objective(x, y), tol=tol, maxiter=maxiter, implicit_diff_solve=solve
        )
        y = solver.run(y0, x).params
        return problem.outer(x, y), y

    return outer


def optimistix_outer(problem, maxiter: int = 5000) -> Callable:
    """optimistix: L-BFGS, implicit adjoint by `lineax.CG`; as above."""
    import lineax
    import optimistix

    def outer(x, y0, tol, linear_tol):
        solver = optimistix.LBFGS(rtol=tol, atol=tol, norm=optimistix.two_norm)
        adjoint = optimistix.ImplicitAdjoint(lineax.CG(rtol=linear_tol, atol=0.0, norm=jnp.linalg.norm))
        found = optimistix.minimise(
            lambda y, x: problem.inner.objective(x, y), solver, y0, x, adjoint=adjoint, max_steps=maxiter, throw=False,
            tags=frozenset({lineax.positive_semidefinite_tag}),
        )  # fmt: skip
        return problem.outer(x, found.value), found.value

    return outer


OUTER = {"jaxopt": jaxopt_outer, "optimistix": optimistix_outer}


def _gradient(package: str, problem, y0, maxiter: int = 5000) -> Callable:
    outer = OUTER[package](problem, maxiter)
    return jax.jit(jax.grad(lambda x, tol, linear_tol: outer(x, y0, tol, linear_tol)[0]))


PEERS = {package: functools.partial(_gradient, package) for package in OUTER}


def loosest(function: Callable, x, truth, accuracy: float):
    """`(tol, linear_tol, error)`: the loosest pair on a grid of half decades that reaches `accuracy`, or None.

    The inner tolerance is loosened first with a tight adjoint, then the adjoint's with the inner one found.
    """

    def error_of(tol, linear_tol):
        return float(jnp.linalg.norm(function(x, tol, linear_tol) - truth) / jnp.linalg.norm(truth))

    grid = [10.0 ** (-k / 2) for k in range(4, 25)]
    tol = next((t for t in grid if error_of(t, 1e-10) <= accuracy), None)
    if tol is None:
        return None
    for linear_tol in grid:
        error = error_of(tol, linear_tol)
        if error <= accuracy:
            return tol, linear_tol, error
    return None
