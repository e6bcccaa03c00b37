"""The outer loop: minimize h(x) = G(x, y*(x))."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from . import _checkpoint as checkpoints
from . import _outer as outer
from . import _trees as trees
from ._entry import prepare_problem
from ._oracle import Evaluation, Oracle, length
from ._precision import full_products
from ._trees import ravel, ravel_like
from ._trust_region import trust_region
from .adjoint import AbstractAdjoint, ImplicitAdjoint
from .efficiency import hessian_vector_product
from .hypergradient import hypergradient
from .problem import AbstractBilevelProblem
from .prox import AbstractProx

__all__ = ["Result", "State", "minimize"]

_WORDS = ("l-bfgs-b", "trust-region", "newton-cg", "proximal-gradient")


class State(eqx.Module):
    """One outer step, as the callback gets it: `step` (0 is the start), `x`, `y`, `value` of h (plus the penalty
    where there is one), `gradient` of h, and `error`, the estimate of the gradient's error (Euclidean)."""

    step: int
    x: PyTree
    y: PyTree
    value: float
    gradient: PyTree
    error: float


class Result(eqx.Module):
    """Where `minimize` ended: x, y, value, gradient and its error there, `history` (a list of `State`s), `converged`
    and a `message`; and what it took: outer `steps`, `hypergradients`, and inner `evaluations` (gradients of the inner
    objective) and `products` (Hessian-vector products, n for each dense matrix). A resumed run counts from the
    resumption."""

    x: PyTree
    y: PyTree
    value: float
    gradient: PyTree
    error: float
    history: list
    converged: bool
    message: str
    steps: int
    hypergradients: int
    evaluations: int
    products: int

    def __repr__(self):
        size = float(trees.norm(self.gradient))
        return (
            f"Result(value={self.value:.6g}, |gradient|={size:.3g}, error={self.error:.2g}, steps={self.steps}, "
            f"hypergradients={self.hypergradients}, converged={self.converged}: {self.message})"
        )

    def plot(self, ax: Any = None):
        """Draws value, gradient norm and hypergradient error per step; returns the matplotlib axes."""
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        steps = [s.step for s in self.history]
        ax.semilogy(steps, [float(trees.norm(s.gradient)) for s in self.history], label="|gradient|")
        ax.semilogy(steps, [s.error for s in self.history], label="its error")
        ax.set_xlabel("outer step")
        ax.legend(loc="upper left")
        twin = ax.twinx()
        twin.plot(steps, [s.value for s in self.history], color="black", linestyle=":", label="outer value")
        twin.set_ylabel("outer value")
        return ax


@full_products()
def minimize(
    problem: AbstractBilevelProblem,
    x0: PyTree,
    y0: PyTree,
    *,
    method: Any = "l-bfgs-b",
    bounds: tuple[PyTree, PyTree] | None = None,
    prox: Callable | None = None,
    tol: float = 1e-6,
    max_steps: int = 200,
    rtol: float | None = None,
    ftol: float = 0.0,
    callback: Callable[[State], Any] | None = None,
    progress: bool = False,
    checkpoint: str | Path | None = None,
    solver: Any = None,
    adjoint: AbstractAdjoint | None = None,
    max_inner_steps: int = 2000,
) -> Result:
    """Minimizes h(x) = G(x, y*(x)), plus a proximable penalty where there is one.

    **Arguments:** `problem`; `x0`, `y0`: trees of floating arrays. `method`: "l-bfgs-b" (SciPy's), "trust-region" (BFGS
    in a box that each entry of x moves in: often fewer hypergradients where x has tens or hundreds of entries, or h is
    not convex; not for an h with kinks), "newton-cg" (truncated Newton in a trust region, with
    `hessian_vector_product`; no bounds) or an optax optimizer; with a prox it is proximal gradient. `bounds`: (lower,
    upper), each like x or a number; not with a prox. `prox`: `prox(x, t)` of t times a penalty, like x, or one of
    `bilevel.prox` (default: the problem's own). `tol`: converged means that the largest entry of the projected gradient
    is at most tol · max(1, the first one's). `max_steps`: outer steps. `rtol`: accuracy of each hypergradient; None:
    what the outer step needs. `ftol` ("l-bfgs-b"): end where eight evaluations in a row lowered the value by less than
    this, relatively; where h has kinks its gradient need not vanish, and line searches close in on kinks in ever
    smaller steps. `callback(state)`: called after each step; it may raise `StopIteration` to end here. `progress`: a
    bar with value, gradient norm, hypergradient error and time left. `checkpoint`: a file; the same call made again
    goes on from there. `solver`, `adjoint`, `max_inner_steps`: as for `hypergradient`.

    **Returns:** a `Result`; reaching `max_steps` or round-off gives `converged=False` and a message.

    **Raises:** TypeError, ValueError for arguments that do not fit or a checkpoint of something else;
    `NotConverged` when a hypergradient fails.
    """
    x0, y0 = prepare_problem("minimize", problem, x0, y0, "y0")
    problem.before_minimizing(x0, y0)
    prox = problem.prox if prox is None else prox
    if isinstance(prox, AbstractProx):  # one of `bilevel.prox`, which are made for an inner problem
        ready = prox
        prox = lambda x, t: ready(x, x, t)
    method = _check_method(method, prox)
    _check_numbers(tol, max_steps, rtol)
    if not 0 <= float(ftol) < 1 or (ftol > 0 and method != "l-bfgs-b"):
        raise ValueError(
            f"bilevel.minimize: ftol must be a number in [0, 1), and 0 unless the method is 'l-bfgs-b', found {ftol!r}."
        )
    adjoint = ImplicitAdjoint() if adjoint is None else adjoint
    lower, upper = _flat_bounds(bounds, x0)
    if prox is not None and (np.isfinite(lower).any() or np.isfinite(upper).any()):
        raise ValueError(
            "bilevel.minimize: `bounds` and a prox do not go together: the prox of both is another function. Pass it "
            "as `prox` (for an l1 penalty: soft thresholding, then clipping), without bounds."
        )
    if method == "newton-cg" and (np.isfinite(lower).any() or np.isfinite(upper).any()):
        raise ValueError("bilevel.minimize: method 'newton-cg' takes no bounds; use 'l-bfgs-b'.")
    mark, path, recorded = "", None, []
    if checkpoint is not None:
        path = Path(checkpoint)
        mark = checkpoints.fingerprint(problem, x0, y0, (lower, upper), method)
        recorded = checkpoints.read(path, mark)
    oracle = Oracle(
        problem, x0, y0, rtol=rtol, tol=tol, solver=solver, adjoint=adjoint, max_inner_steps=max_inner_steps,
        recorded=recorded,
    )  # fmt: skip
    setting = outer.Setting(
        lower, upper, _flat_prox(prox, oracle), _flat_penalty(problem, prox, oracle), tol, max_steps, ftol
    )
    loop = _Loop(oracle, setting, callback, path, mark, progress)
    with loop:
        if prox is not None:
            end = outer.proximal_gradient(oracle, setting, loop.on_step)
        elif method == "newton-cg":

            def product(x, v):
                at, along = (oracle.unravel_x(jnp.asarray(a, oracle.dtype)) for a in (x, v))
                y = oracle.unravel_y(jnp.asarray(oracle(x).y))
                return np.asarray(ravel_like(hessian_vector_product(problem, at, y, along), oracle.dtype), np.float64)

            end = outer.newton_cg(oracle, setting, loop.on_step, product)
        elif method == "trust-region":
            end = trust_region(oracle, setting, loop.on_step)
        elif isinstance(method, str):
            end = outer.lbfgsb(oracle, setting, loop.on_step)
        else:

            def value_fn(x):
                y = oracle.unravel_y(oracle.y)
                return hypergradient(problem, x, y, solver=solver, adjoint=adjoint).value

            end = outer.optax_steps(method, oracle, setting, loop.on_step, value_fn)
    return loop.result(end)


class _Loop:
    """What happens after every outer step: judge, tell, write, draw the bar."""

    def __init__(self, oracle: Oracle, setting: outer.Setting, callback, path, mark: str, progress: bool):
        self.oracle, self.setting, self.callback = oracle, setting, callback
        self.path, self.mark, self.progress = path, mark, progress
        self.history: list[State] = []
        self.last: Evaluation | None = None
        self.converged = self.stopped = False
        self.bar: Any = None

    def __enter__(self):
        if self.progress:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=self.setting.max_steps, desc="minimize", unit="step", dynamic_ncols=True)
        return self

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()

    def on_step(self, found: Evaluation) -> bool:
        """Takes note of an accepted point; whether to go on."""
        setting, oracle = self.setting, self.oracle
        projected = setting.projected(found)
        size = outer.largest(projected)
        oracle.wants(length(projected), oracle.scale if self.history else max(1.0, size))
        # nothing smaller than the gradient's own error can be told from zero
        self.converged = size <= setting.tol * oracle.scale and not (found.error > setting.tol * oracle.scale)
        penalty = setting.penalty(found.x) if setting.penalty is not None else 0.0
        x, y, gradient = jax.device_put(
            (oracle.unravel_x(found.x), oracle.unravel_y(found.y), oracle.unravel_x(found.gradient))
        )
        state = State(len(self.history), x, y, found.value + penalty, gradient, found.error)
        self.history.append(state)
        self.last = found
        if not oracle.replaying or oracle.replayed == 0:
            if self.path is not None:
                checkpoints.write(self.path, self.mark, oracle.recorded)
            if self.callback is not None:
                try:
                    self.callback(state)
                except StopIteration:
                    self.stopped = True
        if self.bar is not None:
            self.bar.n = state.step
            self.bar.set_postfix_str(f"value {state.value:.6g}, |g| {size:.2e}, error {found.error:.1e}")
        return not (self.converged or self.stopped) and state.step < setting.max_steps

    def result(self, end: outer.Ending) -> Result:
        """The `Result` of the last accepted point."""
        oracle, setting, state, last = self.oracle, self.setting, self.history[-1], self.last
        assert last is not None
        size = setting.optimality(last)
        bound = setting.tol * oracle.scale
        if self.converged:
            message = f"the projected gradient fell to {size:.2e}, below {bound:.2e}"
        elif self.stopped:
            message = f"the callback ended it with a projected gradient of {size:.2e} (wanted {bound:.2e})"
        elif state.step >= setting.max_steps:
            message = (
                f"max_steps = {setting.max_steps} reached with a projected gradient of {size:.2e} (wanted {bound:.2e})"
            )
        else:
            floor = end.round_off and (last.at_floor or last.error > 0.1 * size)
            message = (
                f"{'the round-off floor' if floor else end.cause} ended it with a projected gradient of {size:.2e} "
                f"(wanted {bound:.2e}) and a hypergradient error of {last.error:.1e}: {end.said.strip().rstrip('.')}"
            )
        return Result(
            state.x, state.y, state.value, state.gradient, state.error, self.history, self.converged, message,
            state.step, oracle.count, oracle.evaluations, oracle.products,
        )  # fmt: skip


def _check_method(method: Any, prox: Any) -> Any:
    if isinstance(method, str):
        word = method.lower()
        if word not in _WORDS:
            raise ValueError(
                f"bilevel.minimize: unknown method {method!r}; choose one of {_WORDS} or an optax optimizer."
            )
        if word == "proximal-gradient" and prox is None:
            raise ValueError("bilevel.minimize: method 'proximal-gradient' needs a prox.")
        return "proximal-gradient" if prox is not None else word
    if not (callable(getattr(method, "init", None)) and callable(getattr(method, "update", None))):
        raise TypeError(f"bilevel.minimize: method must be a word of {_WORDS} or an optax optimizer, found {method!r}.")
    if prox is not None:
        raise ValueError(
            "bilevel.minimize: an optax optimizer does not know its step size, which a prox needs; leave method alone."
        )
    return method


def _check_numbers(tol: Any, max_steps: Any, rtol: Any) -> None:
    if not (isinstance(max_steps, int) and max_steps >= 0):
        raise ValueError(f"bilevel.minimize: max_steps must be an integer of at least 0, found {max_steps!r}.")
    for name, value in (("tol", tol), ("rtol", rtol)):
        if value is not None and not float(value) > 0:
            raise ValueError(f"bilevel.minimize: {name} must be positive, found {value!r}.")


def _flat_bounds(bounds: Any, x0: PyTree) -> tuple[np.ndarray, np.ndarray]:
    flat, _ = ravel(x0)
    sides = []
    if bounds is not None and not (isinstance(bounds, (tuple, list)) and len(bounds) == 2):
        raise ValueError("bilevel.minimize: bounds must be a pair (lower, upper), each like x.")
    for name, side, free in zip(("lower", "upper"), bounds or (None, None), (-np.inf, np.inf), strict=True):
        if side is None:
            sides.append(np.full(flat.shape, free))
        elif isinstance(side, (int, float)):
            sides.append(np.full(flat.shape, float(side)))
        else:
            trees.check_like(side, x0, "minimize", f"bounds, {name}", "x0")
            sides.append(np.asarray(ravel_like(side, flat.dtype), np.float64))
    if np.isnan(sides[0]).any() or np.isnan(sides[1]).any() or (sides[0] > sides[1]).any():
        raise ValueError("bilevel.minimize: bounds must be numbers with lower <= upper in every entry.")
    return sides[0], sides[1]


def _flat_prox(prox: Callable | None, oracle: Oracle):
    if prox is None:
        return None

    def flat_prox(x: np.ndarray, t: float) -> np.ndarray:
        tree = oracle.unravel_x(jnp.asarray(x, oracle.dtype))
        moved = prox(tree, jnp.asarray(t, oracle.dtype))
        trees.check_like(moved, tree, "minimize", "the value of prox(x, t)", "x")
        return np.asarray(ravel_like(moved, oracle.dtype), np.float64)

    return flat_prox


def _flat_penalty(problem: AbstractBilevelProblem, prox, oracle: Oracle):
    """The penalty's value, where the problem knows it (a user's own prox comes without one)."""
    if prox is None or problem.penalty(oracle.unravel_x(jnp.asarray(oracle.x0, oracle.dtype))) is None:
        return None
    return lambda x: float(problem.penalty(oracle.unravel_x(jnp.asarray(x, oracle.dtype))))  # type: ignore[arg-type]
