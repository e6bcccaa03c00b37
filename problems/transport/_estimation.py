"""Inverse transport with a penalty as an inner problem: so that the penalty's weight can be an outer variable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp

import bilevel
from bilevel.problem import as_given, as_node

from .inverse import InverseOT
from .penalties import AbstractPenalty


def estimation(problem: InverseOT, penalty: Callable) -> bilevel.Composite:
    """The estimate itself as an inner problem: y = (theta, f, g) minimizes the loss, jointly in the coefficients and
    the potentials (a convex function, equation (3.1) derived in docs/theory/transport.md), plus a penalty that depends
    on x.

    Over it, a bilevel problem chooses the penalty: `BilevelProblem(estimation(train, lambda x: L1(jnp.exp(x))), outer)`
    with, for example, `outer = lambda x, y: held_out.outer(y[0], y[1:])`, the loss of other observations with the same
    reference marginals and the same tau (their potentials then are those of y).

    **Arguments:** `problem`: an `InverseOT` whose loss is the gap or its sharpened form; its own penalty is not used.
    `penalty`: a function x -> `L1(weight)` or the like.

    **Returns:** a `bilevel.Composite`; y0 is `(theta0, *potentials)` of `problem.initial()`.

    **Raises:** TypeError, ValueError for arguments that do not fit.
    """
    if not isinstance(problem, InverseOT):
        raise TypeError(f"transport.estimation: `problem` must be an InverseOT, found {type(problem).__name__}.")
    if problem._outer is not None:
        raise ValueError("transport.estimation: `problem` has an `outer` of its own, which is no convex loss of theta.")
    if not callable(penalty):
        raise TypeError(f"transport.estimation: `penalty` must be a function x -> L1(weight), found {penalty!r}.")
    return bilevel.Composite(_Joint(problem), _ProxOfTheta(as_node(penalty)))


class _Joint(eqx.Module):
    """The loss at potentials that need not be those of theta."""

    problem: InverseOT

    def __call__(self, x, y):
        theta, f, g = y
        value = self.problem.outer(theta, (f, g))
        if not self.problem.inner._balanced:
            return value
        # balanced potentials slide: this holds them where both have the same mean, and changes nothing else
        inner = self.problem.inner
        return value + 0.5 * jnp.square(jnp.vdot(inner.a, f) - jnp.vdot(inner.b, g)) / inner.epsilon


class _ProxOfTheta(eqx.Module):
    penalty: Any

    def __call__(self, x, v, t):
        theta, f, g = v
        found = as_given(self.penalty)(x)
        if not isinstance(found, AbstractPenalty):
            raise TypeError(f"transport.estimation: `penalty(x)` must be an L1(weight) or the like, found {found!r}.")
        return found.prox(theta, t), f, g
