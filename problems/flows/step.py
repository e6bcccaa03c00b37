"""One JKO step as an inner problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

import bilevel
from bilevel.problem import as_given, as_node

from . import _inputs as inputs
from ._kernel import Kernel, log_weights
from ._solver import Identity, StepSolver

OWNER = "flows.JKOStep"


class JKOStep(bilevel.AbstractInner):
    """The entropic JKO step from `source`, on the points of `support`:

        min over couplings p with row sums a of  <|x - z|^2 / 2 + step_size V(z), p> + epsilon KL(p | a x b)
                                                 + (kappa - epsilon) KL(columns of p | b),

    a the source weights, b the support weights, V = `potential(x, ·)`. The column sums are the next weights. With b
    the cell volumes of a grid this is equation (5.1) of docs/theory/flows.md with W_epsilon and an internal energy
    kappa ∫ mu log mu.

    **Arguments:** `source`: (n, d); `support`: (m, d); `potential(x, z) -> scalar` at one point z of shape (d,), x any
    tree or None; `step_size` > 0; `epsilon` > 0. `source_weights`, `support_weights`: (n,), (m,), not negative,
    default 1/n and 1/m; they may span any range. `internal`: kappa, the *whole* weight of the internal energy; None
    means kappa = epsilon, the explicit step (a softmax for each source point). kappa > epsilon is transport with a
    soft second marginal; kappa < epsilon, 0 included, is the fixed point of the theory page. In floating point the
    smallest kappa is 1e-6 epsilon (float32: 2e-3 epsilon): a smaller one is taken as that, which moves the result by
    about as much. `interaction(x, r) -> scalar`, r = z - z' of shape (d,): adds
    step_size / 2 times the integral of U(z - z') under mu and mu; its odd part is no energy and is left out.

    y is the potential f of the source, shape (n,), where it has a closed form (kappa = epsilon); otherwise u, the log
    of the next weights over b, shape (m,); with an interaction (u, mean field), both (m,). All arrays, epsilon, kappa
    and the step size are leaves and may be traced; `bilevel.solve` is differentiable in all of them.

    **Raises:** ValueError, TypeError naming the argument: empty or non-finite points, other dimensions, weights that
    are negative or too few, numbers that are not positive; when used, a potential that is NaN or -inf on the support.
    """

    source: Float[Array, "n d"]
    support: Float[Array, "m d"]
    _potential: Any
    step_size: Float[Array, ""]
    epsilon: Float[Array, ""]
    source_weights: Float[Array, " n"]
    support_weights: Float[Array, " m"]
    internal: Float[Array, ""] | None
    _interaction: Any

    def __init__(
        self,
        source: Any,
        support: Any,
        potential: Any,
        step_size: Any,
        epsilon: Any,
        *,
        source_weights: Any = None,
        support_weights: Any = None,
        internal: Any = None,
        interaction: Any = None,
    ):
        source = inputs.points(OWNER, "`source`", source)
        support = inputs.points(OWNER, "`support`", support, dimension=source.shape[1], like="`source`")
        dtype = inputs.common_dtype(source, support)
        for name, function in (("potential", potential), ("interaction", interaction)):
            if not callable(function) and not (name == "interaction" and function is None):
                raise TypeError(f"{OWNER}: `{name}` must be a function (x, z) -> scalar, found {function!r}.")
        self.source, self.support = source.astype(dtype), support.astype(dtype)
        self._potential, self._interaction = as_node(potential), as_node(interaction)
        self.step_size = inputs.number(OWNER, "`step_size`", step_size, dtype)
        self.epsilon = inputs.number(OWNER, "`epsilon`", epsilon, dtype)
        self.source_weights = inputs.weights(OWNER, "`source_weights`", source_weights, len(source), dtype)
        self.support_weights = inputs.weights(OWNER, "`support_weights`", support_weights, len(support), dtype)
        self.internal = None if internal is None else inputs.number(OWNER, "`internal`", internal, dtype, zero=True)

    # ------------------------------------------------------------------------------------------------ the model

    @property
    def potential(self) -> Callable:
        return as_given(self._potential)

    @property
    def interaction(self) -> Callable | None:
        return as_given(self._interaction)

    @property
    def kernel(self) -> Kernel:
        """Points, weights and numbers of the reduced step."""
        floor = 1e-6 if jnp.finfo(self.epsilon.dtype).bits >= 64 else 2e-3
        one = jnp.ones_like(self.epsilon)
        ratio = one if self.internal is None else 1 / jnp.maximum(self.internal / self.epsilon, floor)
        a, b = log_weights(self.source_weights), log_weights(self.support_weights)
        return Kernel(self.source, self.support, a, b, self.epsilon, ratio)

    @property
    def closed(self) -> bool:
        """Whether f has a closed form."""
        return self.internal is None and self._interaction is None

    def values(self, x: PyTree) -> Float[Array, " m"]:
        """V on the support, shape (m,)."""
        return jax.vmap(lambda z: self._potential(x, z))(self.support).astype(self.epsilon.dtype)

    def work(self, x: PyTree, field: Array | None = None) -> Float[Array, " m"]:
        """step_size times (V + mean field) on the support."""
        values = self.values(x)
        return self.step_size * (values if field is None else values + field)

    def optimality(self, x: PyTree, y: PyTree) -> PyTree:
        """f: epsilon log(row sums of the coupling / a); u: (kappa / epsilon) u less the log-sums that it should be;
        with an interaction also field - U * mu."""
        if self.closed:
            return self.kernel.residual(self.work(x), y)
        u, field = self._parts(y)
        rest = self.kernel.density_residual(self.work(x, field), u)
        return rest if field is None else (rest, field - self._field(x, self._weights(u)))

    def _parts(self, y):
        return (y, None) if self._interaction is None else y

    def _weights(self, u):
        return jnp.exp(self.kernel.log_b + u)

    def _field(self, x, mu):
        pairs = jax.vmap(lambda z: jax.vmap(lambda other: self._interaction(x, z - other))(self.support))(self.support)
        return (pairs + pairs.T).astype(mu.dtype) @ mu / 2

    # ------------------------------------------------------------------------------------------------ what it gives

    def initial(self) -> PyTree:
        """Zeros of y's structure."""
        if self.closed:
            return jnp.zeros_like(self.source_weights)
        u = jnp.zeros_like(self.support_weights)
        return u if self._interaction is None else (u, u)

    def coupling(self, x: PyTree, y: PyTree) -> Float[Array, "n m"]:
        """The coupling of source and support, shape (n, m)."""
        if self.closed:
            return self.kernel.coupling(self.work(x), y)
        u, field = self._parts(y)
        return self.kernel.density_coupling(self.work(x, field), u)

    def next_weights(self, x: PyTree, y: PyTree) -> Float[Array, " m"]:
        """The weights after the step, shape (m,): the column sums of `coupling`."""
        return self.kernel.weights(self.work(x), y) if self.closed else self._weights(self._parts(y)[0])

    # ------------------------------------------------------------------------------------------------ for the engine

    @property
    def linear_solver(self):
        return Identity() if self.closed else None

    @property
    def default_solver(self):
        return StepSolver() if self._interaction is None else None

    def size_of_error(self, x, y, residual, step):
        """The step in u where there is mass: elsewhere u is as large as epsilon / kappa, and nobody needs it. Round-off
        is allowed for: for kappa < epsilon it grows."""
        if self.closed or self._interaction is not None:
            return None
        roots = jnp.sqrt(self._weights(y))
        grows = jnp.sqrt(jnp.maximum(self.kernel.ratio, 1)) * jnp.linalg.norm(roots)
        return jnp.linalg.norm(roots * step), jnp.maximum(jnp.linalg.norm(roots * y), grows)

    def check(self, x, y):
        """Raises ValueError where the potential is no scalar, or NaN or -inf on the support."""
        shape = jax.eval_shape(lambda z: self._potential(x, z), self.support[0])
        leaves = jax.tree.leaves(shape)
        if len(leaves) != 1 or leaves[0].shape != ():
            raise ValueError(
                f"bilevel.JKOStep: `potential(x, z)` must return one scalar at a point z of shape "
                f"{self.support.shape[1:]}, found shape(s) {[leaf.shape for leaf in leaves]}."
            )
        super().check(x, y)
        values = self.values(x)
        if inputs.concrete(values):
            bad_potential("bilevel.JKOStep: `potential`", np.asarray(values), np.asarray(self.support), "the support")

    def __repr__(self):
        kappa = "epsilon" if self.internal is None else _shown(self.internal)
        return (
            f"JKOStep({len(self.source)} -> {len(self.support)} points in dimension {self.source.shape[1]}, "
            f"step_size={_shown(self.step_size)}, epsilon={_shown(self.epsilon)}, internal={kappa})"
        )


def bad_potential(what: str, values: np.ndarray, at: np.ndarray, where: str) -> None:
    """Raises ValueError at the first point where a potential is NaN or -inf."""
    bad = np.isnan(values) | np.isneginf(values)
    if bad.any():
        j = int(np.argmax(bad))
        kind = "NaN" if np.isnan(values[j]) else "-inf, unbounded below"
        raise ValueError(f"{what} is {kind} on {where}, at point {j}: {np.array2string(at[j], precision=4)}.")


def _shown(value: Any) -> str:
    return f"{float(value):g}" if inputs.concrete(value) and isinstance(value, jax.Array) else "…"
