"""Solving with dF/dy: dense, iterative, structured; always with a residual and a status.

A solver `prepare`s a state at one point (a factorization, a preconditioner) and then `solve`s at the same or a
nearby point: the state may be stale, the residual is always taken with dF/dy of the system given, and a stale
state is refined until the tolerance holds (refinement N2 of docs/theory). So one factorization serves the
correction, the adjoint and the error estimate.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import lineax as lx
from jaxtyping import PyTree

from .._precision import worth_lowering
from .._system import LinearSystem, linear_system, spectral_norm
from ._base import AbstractLinearSolver, LinearSolution, curvature_status, refine
from ._direct import Direct
from ._iterative import ConjugateGradient, Krylov, Neumann
from ._lineax import Lineax
from ._mixed import MixedPrecision

__all__ = [
    "AbstractLinearSolver",
    "ConjugateGradient",
    "Direct",
    "Krylov",
    "LinearSolution",
    "LinearSystem",
    "Lineax",
    "MixedPrecision",
    "Neumann",
    "choose",
    "curvature_status",
    "first_reduction",
    "linear_system",
    "refine",
    "spectral_norm",
]

DENSE_LIMIT = 2000
"""Largest number of unknowns that is solved densely by default (measured by `python -m benchmarks.threshold`)."""


def first_reduction(inner, x: PyTree, y: PyTree) -> float:
    """By how much the first inner solve should lower |F| before a Newton step is tried.

    A dense matrix costs about n / 50 gradients where the data stream from memory and n / 8 where they sit in the
    cache (matrix products gain less there; `python -m benchmarks.threshold`). Where it is cheap it may be formed
    early, and once more if need be; where it is dear the solver goes on until one suffices.
    """
    size = sum(leaf.size for leaf in jax.tree.leaves(y))
    if size > DENSE_LIMIT:
        return 1e-4
    data = sum(leaf.nbytes for leaf in jax.tree.leaves(inner) if eqx.is_array(leaf))
    gradients = size / (50 if data > 2**25 else 8)
    return 1e-3 if gradients <= 30 else 5e-6


def choose(linear_solver: Any, inner, x: PyTree, y: PyTree, *, loose: bool = False) -> AbstractLinearSolver:
    """The solver asked for, else the inner problem's own, else by structure and size; `loose`: the caller wants about
    one digit and refines the rest itself, so that float32 may serve where it pays."""
    named = linear_solver if linear_solver is not None else inner.linear_solver
    if isinstance(named, AbstractLinearSolver):
        return named
    if isinstance(named, lx.AbstractLinearSolver):
        return Lineax(named)
    if named is not None:
        raise TypeError(
            f"bilevel: linear_solver must be Direct(), ConjugateGradient(), Krylov(), Neumann(terms) or a lineax "
            f"solver, found {named!r}."
        )
    if inner.operator_at(x, y) is not None:
        return Lineax(lx.AutoLinearSolver(well_posed=True))
    size = sum(leaf.size for leaf in jax.tree.leaves(y))
    if size <= DENSE_LIMIT:
        solver = Direct()
    else:
        solver = ConjugateGradient() if inner.symmetric and inner.definite else Krylov()
    gauge = inner.gauge_part(x, y) is not None
    return MixedPrecision(solver) if loose and not gauge and worth_lowering(inner, x, y) else solver
