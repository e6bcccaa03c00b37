"""What an outer method asks: value, gradient and error at x, each solve warm-started by the one before."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ._compiling import asked_quickly, compiled, one_thread, quickly
from ._entry import explain
from ._precision import kept_copies
from ._trees import on_host, ravel
from .errors import NotConverged
from .hypergradient import search
from .linear import DENSE_LIMIT

_MARGIN = 0.15  # of the error allowed (a third is), at which the first evaluation at a new x aims
_FIRST = 1e-3  # relative accuracy of the first hypergradient, before anything is known
_SHARE = 1e-1  # afterwards: error against the projected gradient, which is all that an outer step sees (both Euclidean)


_ASIDE = (-1e-6, 1e-6, -1e-4, 1e-4)  # relative steps off a kink of h


class Evaluation(NamedTuple):
    """One evaluation on the host: everything a step, a callback or a checkpoint needs. Flat NumPy arrays."""

    x: np.ndarray
    value: float
    gradient: np.ndarray
    error: float
    y: np.ndarray
    adjoint: np.ndarray
    at_floor: bool
    slope: float = float("nan")  # the gradient's error per length of the Newton step in y still to go, where known


def length(v: np.ndarray) -> float:
    """|v|, infinite where its square is too large a number."""
    with np.errstate(over="ignore"):
        return float(np.linalg.norm(v))


class Oracle:
    """Evaluates h and its gradient on flat NumPy vectors, remembers, records, and replays.

    The accuracy of each hypergradient is `rtol` where the user gives one; otherwise a share of the last projected
    gradient (told by `wants`), and never more than a tenth of what the outer tolerance needs. y starts where the last
    one ended, and the first Newton step at the new x is, to first order, the tangent step dy/dx Δx; the adjoint
    starts from the last one.
    """

    def __init__(self, problem, x0: PyTree, y0: PyTree, *, rtol, tol, solver, adjoint, max_inner_steps, recorded=()):
        self.problem, self.solver, self.adjoint = problem, solver, adjoint
        self.rtol, self.tol, self.max_inner_steps = rtol, tol, max_inner_steps
        flat, self.unravel_x = ravel(x0)
        self.dtype = flat.dtype
        self.x0 = np.asarray(flat, np.float64)
        flat_y, self.unravel_y = ravel(y0)
        self.y = np.asarray(flat_y)
        self.guess: Any = None
        self.scale = 1.0
        self.size: float | None = None
        self.length = 0.0
        self.slope = float("nan")
        self.recorded = list(recorded)
        self.replayed = len(self.recorded)
        self.count = 0
        self.inner_steps = self.evaluations = self.products = 0
        self._memory: dict[bytes, Evaluation] = {}

    def wants(self, size: float, scale: float) -> None:
        """Takes note of the length of the projected gradient at the last accepted point, and of what the outer
        tolerance is relative to."""
        self.size, self.scale = size, scale

    @property
    def replaying(self) -> bool:
        """Whether the evaluations so far all came from a checkpoint."""
        return self.count <= self.replayed

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """x as it is evaluated, in the dtype of x0."""
        return np.asarray(x, self.dtype).astype(np.float64)

    def __call__(self, x: np.ndarray) -> Evaluation:
        x = self.rounded(x)
        key = x.tobytes()
        if key not in self._memory:
            self._memory[key] = self._next(x)
        return self._memory[key]

    def _next(self, x: np.ndarray) -> Evaluation:
        if self.count < len(self.recorded):
            found = self.recorded[self.count]
            if not np.array_equal(found.x, x):
                raise ValueError(
                    "bilevel.minimize: the checkpoint's evaluations do not follow from these arguments (evaluation "
                    f"{self.count} was at another x); use another path, or remove the file to start afresh."
                )
        else:
            found = self._compute(x)
            self.recorded.append(found)
        self.count += 1
        self.y = np.asarray(found.y, self.y.dtype)
        self.guess = np.asarray(found.adjoint, self.y.dtype)
        self.length, self.slope = length(found.gradient), found.slope
        return found

    def _compute(self, x: np.ndarray) -> Evaluation:
        tree, y = self.unravel_x(x), self.unravel_y(self.y)
        least = 0.3 * self.tol * self.scale
        if self.rtol is not None:
            rtol, atol = self.rtol, least
        elif self.size is None:
            rtol, atol = _FIRST, least
        else:
            rtol, atol = float(jnp.finfo(self.dtype).tiny), max(least, _SHARE * self.size)
        guess = np.zeros_like(self.y) if self.guess is None else self.guess
        aim = max(rtol, 0.3 * atol / self.length) if self.length > 0 else rtol
        step = _MARGIN * max(rtol * self.length, atol) / self.slope if self.slope > 0 else np.inf
        goals = tuple(np.asarray(goal, self.dtype) for goal in (rtol, atol, aim, step))
        copies = kept_copies((self.problem.inner, self.problem.outer))
        settings = (self.solver, self.adjoint, self.max_inner_steps, guess, copies)

        def evaluate(tree):
            with (
                quickly(asked_quickly() or self.problem.inner.compiles_quickly),
                one_thread(self.y.size <= DENSE_LIMIT),
            ):
                return jax.block_until_ready(_evaluate(self.problem, tree, y, goals, *settings))

        result, extras = evaluate(tree)
        # A line search that closes in on a kink of h ends up on it, where h has a value but no gradient. Beside it
        # there is one, and the value is the same to the length of the step aside.
        for aside in _ASIDE:
            if result.status.word != "degenerate_active_set":
                break
            near = x + aside * np.maximum(1.0, np.abs(x))
            tree = self.unravel_x(near)
            result, extras = evaluate(tree)
        word = result.status.word
        if word not in ("converged", "round_off"):
            message = explain("minimize", result, result.status, self.problem, *jax.device_put((tree, y)))
            raise NotConverged(f"{message} (At evaluation {self.count}; the hypergradient there failed.)", result)
        self.inner_steps += int(result.steps)
        self.evaluations += int(result.evaluations)
        self.products += int(result.products)
        value, adjoint, step = extras
        error = float(result.error)
        return Evaluation(
            x, float(value), on_host(result.gradient, np.float64), error, on_host(result.y, self.y.dtype),
            np.asarray(adjoint), word == "round_off", error / float(step) if step > 0 else float("nan"),
        )  # fmt: skip


@compiled
def _evaluate(problem, x, y, goals, solver, adjoint, max_steps, guess, copies):
    rtol, atol, aim, step = goals
    result, _, (v, value, left) = search(
        problem, x, y, rtol, atol, solver, adjoint, max_steps, True, guess, aim, step, copies, differentiable=False
    )
    return result, (value, v, left)  # not `result.value`: line searches must see what the gradient promises
