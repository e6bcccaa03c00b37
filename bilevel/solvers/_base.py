"""The interface of a solver, and the choice of one."""

from __future__ import annotations

import abc
import inspect
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jaxtyping import PyTree


class Found(NamedTuple):
    """A point `y`, the solver's `steps`, and how many evaluations of F (gradients, for a minimization) it took."""

    y: PyTree
    steps: jax.Array
    evaluations: jax.Array


class AbstractSolver(eqx.Module):
    """Interface of an inner solver."""

    @abc.abstractmethod
    def find(self, inner, x: PyTree, y0: PyTree, *, tol: jax.Array, max_steps: int) -> Found:
        """A y with |F(x, y)|_2 <= tol, as far as `max_steps` steps reach. Is traced; tol may be."""

    def check(self, inner) -> None:
        """Raises ValueError, in a sentence, where this solver is not for this kind of inner problem."""

    @property
    def exact(self) -> bool:
        """Whether a second call cannot improve on the first (closed forms, black boxes without a tolerance)."""
        return False


def resolve(solver: Any, inner) -> AbstractSolver:
    """The solver object for what a user may pass as `solver=`, fit for this inner problem or refused (ValueError).

    None: the inner problem's own, else jaxopt's L-BFGS for a minimization, Anderson acceleration for a fixed point,
    damped Newton for any other residual.
    A `bilevel.solvers` object is taken as it is; an optimistix solver, a jaxopt solver class, or a function `x -> y`
    or `(x, y0) -> y` is wrapped.
    """
    found = _resolve(solver, inner)
    found.check(inner)
    return found


def _resolve(solver: Any, inner) -> AbstractSolver:
    from .anderson import Anderson
    from .closed_form import ClosedForm
    from .jaxopt import Jaxopt
    from .newton import DampedNewton
    from .optimistix import Optimistix, is_optimistix

    if solver is None:
        solver = inner.default_solver
    if solver is None:
        if inner.minimizes:
            return Jaxopt()
        return Anderson() if inner.is_step else DampedNewton()
    if isinstance(solver, AbstractSolver):
        return solver
    if is_optimistix(solver):
        return Optimistix(solver)
    if inspect.isclass(solver) and solver.__module__.split(".")[0] == "jaxopt":
        return Jaxopt(solver)
    if callable(solver) and not inspect.isclass(solver):
        return ClosedForm(solver)
    raise TypeError(
        f"bilevel: solver must be None, an object of bilevel.solvers, an optimistix solver, a jaxopt solver class, or "
        f"a function x -> y, found {solver!r}."
    )
