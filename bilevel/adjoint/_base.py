"""What every derivative rule is, and what an estimate says."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .. import _trees as trees
from ..correct import AbstractCorrection
from ..errors import Status

NEAR = 1e-3
"""Of an inner problem's `length_scale`: the Newton step with which dF/dy at y can pass for that at the solution."""

NEARER = 1e-4
"""Of the same: how near `solve` brings y beyond what was asked for, where Newton steps do it, so that `NEAR` holds."""

UNUSABLE = ("singular", "not_a_minimum", "non_finite", "gauge_dependent", "not_a_gauge",
            "degenerate_active_set")  # fmt: skip


class Target(NamedTuple):
    """The accuracy wanted of a hypergradient: converged means 3 error <= max(rtol |gradient|, atol); `aim` is the
    relative accuracy that this is expected to come to, by which the linear solves are first judged. `step`: the length
    of the Newton step still to go that is expected to do, infinite where nothing is known of it, None where nothing
    ever is."""

    rtol: jax.Array
    atol: jax.Array
    aim: jax.Array
    step: jax.Array | None = None

    def allows(self, gradient: PyTree, error: jax.Array) -> jax.Array:
        size = trees.norm(gradient)
        bound = jnp.maximum(self.rtol.astype(size.dtype) * size, self.atol.astype(size.dtype)).astype(error.dtype)
        nothing = (size == 0) & (error == 0)  # no dependence at all: exactly zero, and exactly right
        return (3 * error <= bound) | nothing


class Estimate(NamedTuple):
    """A hypergradient at a point, with everything a caller needs to judge or to improve it."""

    flat: jax.Array  # the point used
    value: jax.Array
    refined: jax.Array  # G at y*, right to third order in the step still to go
    gradient: PyTree
    error: jax.Array
    vector: PyTree  # like x: what the gradient is wrong by to first order in the step still to go
    floor: jax.Array  # the share of `error` that is round-off
    inner_residual: jax.Array
    adjoint_residual: jax.Array
    adjoint: jax.Array  # v, flat
    step: jax.Array  # the Newton step still to go, flat
    status: Status
    inner_touches_x: jax.Array  # False where F_x' v is exactly zero although v is not
    contracted: jax.Array  # whether the correction lowered the residual
    eps: jax.Array  # machine precision of y's coarsest leaf
    unit: jax.Array  # the inner problem's own unit of y, or zero
    quality: jax.Array  # how wrong the prepared state is at this point: relative residual of its own solutions
    smooth: jax.Array  # whether F is smooth along the step still to go
    evaluations: jax.Array  # of F
    products: jax.Array  # with F_y, those of a dense matrix included

    @property
    def at_floor(self) -> jax.Array:
        """Whether the error is round-off, by and large."""
        return self.error <= 3 * self.floor

    @property
    def usable(self) -> jax.Array:
        return usable(self.status) & jnp.isfinite(self.inner_residual)


def usable(status: Status) -> jax.Array:
    """Whether there is a y and an adjoint at all."""
    bad = [status.code == Status(word).code for word in UNUSABLE]
    return ~jnp.any(jnp.stack(bad), axis=0)


class AbstractAdjoint(eqx.Module):
    """Interface of a derivative rule.

    `estimate` gives the hypergradient at a point with its error; `differentiable` runs an inner solve and attaches
    the rule to its y.
    """

    @property
    def correction_used(self) -> AbstractCorrection | None:
        """The correction `solve` applies, once, after the solver."""
        return None

    @property
    def linear_solver_used(self) -> Any:
        """The linear solver asked for, or None."""
        return None

    @abc.abstractmethod
    def estimate(self, problem, x, y, *, target: Target | None = None, guess=None) -> Estimate:
        """The hypergradient at (x, y), y as it is up to the rule's own correction. Traced. With a `target`
        the rule may go on improving y by its own means."""

    @abc.abstractmethod
    def differentiable(self, inner, x, y0, work: Callable, *, throw: bool) -> tuple[PyTree, PyTree]:
        """`work(x, y0) -> (y, facts)` with y differentiable in x and in what the inner problem closes over."""


def near(inner, x, y, step: jax.Array, share: float = NEAR) -> jax.Array:
    """Whether y, from which this Newton step is still to go, is as near to the solution as its `length_scale` asks."""
    scale = inner.length_scale(x, y)
    return jnp.asarray(True) if scale is None else jnp.linalg.norm(step) <= share * scale
