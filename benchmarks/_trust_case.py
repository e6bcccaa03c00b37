"""What a hard case is, how an outcome is judged, and how each peer is called."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

import bilevel

CASES: dict[str, Callable[[], Case]] = {}


@dataclass
class Case:
    """`ours()` gives the gradient or raises `NotConverged`; `may` lists what is allowed: "right" or a status word."""

    truth: Any
    ours: Callable[[], Any]
    may: tuple[str, ...] = ("right",)
    tolerance: float = 1e-6
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)


def case(name: str):
    """Lists a function that makes a case."""

    def add(make):
        CASES[name] = make
        return make

    return add


def outcome(call: Callable[[], Any], truth: Any) -> tuple[str, float]:
    """`("", relative error)` of a number, or `(what was said, nan)` of a refusal. A NaN counts as a refusal."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = np.asarray(jax.block_until_ready(call()))
    except bilevel.NotConverged as error:
        return error.result.status.word, np.nan
    except Exception as error:  # whatever a peer raises is its way of refusing
        return type(error).__name__, np.nan
    if not np.all(np.isfinite(found)):
        return "nan", np.nan
    truth = np.asarray(truth)
    return "", float(np.linalg.norm(found - truth) / (np.linalg.norm(truth) or 1.0))


# ------------------------------------------------------------------------------------------------ peers


def minimizers(f, g, x, y0) -> dict[str, Callable]:
    def with_jaxopt():
        import jaxopt

        solve = jaxopt.LBFGS(lambda y, x: f(x, y)).run
        return jax.grad(lambda x: g(x, solve(y0, x).params))(x)

    def with_optimistix():
        import optimistix

        def h(x):
            solver = optimistix.LBFGS(rtol=1e-8, atol=1e-8)
            return g(x, optimistix.minimise(lambda y, x: f(x, y), solver, y0, x, max_steps=5000).value)

        return jax.grad(h)(x)

    return {"jaxopt": with_jaxopt, "optimistix": with_optimistix}


def root_finders(residual, g, x, y0) -> dict[str, Callable]:
    def with_jaxopt():
        import jaxopt

        solve = jaxopt.Broyden(lambda y, x: residual(x, y)).run
        return jax.grad(lambda x: g(x, solve(y0, x).params))(x)

    def with_optimistix():
        import optimistix

        def h(x):
            solver = optimistix.Newton(rtol=1e-8, atol=1e-8)
            return g(x, optimistix.root_find(lambda y, x: residual(x, y), solver, y0, x).value)

        return jax.grad(h)(x)

    return {"jaxopt": with_jaxopt, "optimistix": with_optimistix}


def fixed_points(step, g, x, y0) -> dict[str, Callable]:
    def with_jaxopt():
        import jaxopt

        solve = jaxopt.AndersonAcceleration(lambda y, x: step(x, y)).run
        return jax.grad(lambda x: g(x, solve(y0, x).params))(x)

    def with_optimistix():
        import optimistix

        def h(x):
            solver = optimistix.FixedPointIteration(rtol=1e-8, atol=1e-8)
            return g(x, optimistix.fixed_point(lambda y, x: step(x, y), solver, y0, x, max_steps=5000).value)

        return jax.grad(h)(x)

    return {"jaxopt": with_jaxopt, "optimistix": with_optimistix}


def proximal_peers(smooth, proximal, g, x, y0) -> dict[str, Callable]:
    def with_jaxopt():
        import jaxopt

        solve = jaxopt.ProximalGradient(
            lambda y, hyper: smooth(hyper, y), lambda v, hyper, scaling: proximal(hyper, v, scaling)
        ).run
        return jax.grad(lambda x: g(x, solve(y0, x, x).params))(x)

    return {"jaxopt": with_jaxopt}
