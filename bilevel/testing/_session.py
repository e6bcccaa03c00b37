"""One problem under test: its solution, re-solves near it, and random directions; nothing of it outlives a check."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel

from .. import _trees as trees
from ..errors import NotConverged
from ..problem import AbstractBilevelProblem
from ._differences import difference

SEED = 20240216


def stay(x, y0):
    """A solver that returns where it starts: what remains is the engine's own Newton steps, warm-started."""
    return y0


class Session:
    """`(problem, x, y0)` with what several checks need, computed once.

    All engine calls are `bilevel.solve`, `bilevel.estimate` and `bilevel.hypergradient`, looked up when they are made.
    """

    def __init__(self, problem: Any, x: Any, y0: Any, *, solver: Any = None, check: str):
        if not isinstance(problem, AbstractBilevelProblem):
            raise TypeError(
                f"bilevel.testing.{check}: `problem` must be a BilevelProblem(inner, outer), found "
                f"{type(problem).__name__}."
            )
        self.check, self.problem, self.solver = check, problem, solver
        self.x = trees.float_tree(x, f"testing.{check}", "x", empty=True)
        self.y0 = trees.float_tree(y0, f"testing.{check}", "y0")
        self.flat_x, self.unravel_x = trees.ravel(self.x)
        self.flat_y0, self.unravel_y = trees.ravel(self.y0)
        dtypes = [a.dtype for a in jax.tree.leaves((self.x, self.y0))]
        self.eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
        self.single = self.eps > 1e-10
        self.rtol = 1e-3 if self.single else 1e-8
        self.cache: dict[str, Any] = {}
        self.random = np.random.default_rng(SEED)
        self._check_call()

    # ------------------------------------------------------------------------------------------------ failing

    def fail(self, what: str, causes: list[str] | None = None) -> None:
        """Raises the AssertionError."""
        text = f"bilevel.testing.{self.check}: {what}"
        if causes:
            text += " Likely cause: " + "; or ".join(causes) + "."
        raise AssertionError(text)

    def _check_call(self) -> None:
        from ._diagnosis import explain_shapes, explain_signatures

        named = explain_signatures(self)
        if named:
            self.fail(named)
        try:
            self.problem.check(self.x, self.y0)
        except (TypeError, ValueError) as error:
            raise AssertionError(f"bilevel.testing.{self.check}: {explain_shapes(self, error)}") from error

    def ask(self, function: str, *args, **kwargs):
        """A call of the engine; its NotConverged becomes an AssertionError with a diagnosis."""
        from ._diagnosis import explain_refusal

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not enter the inner problem.*")
            try:
                return getattr(bilevel, function)(*args, **kwargs)
            except NotConverged as error:
                if self.single and getattr(error.result, "status", None) == "round_off":
                    return error.result
                what, causes = explain_refusal(self, error)
                text = f"bilevel.testing.{self.check}: {what}"
                if causes:
                    text += " Likely cause: " + "; or ".join(causes) + "."
                raise AssertionError(text) from error

    # ------------------------------------------------------------------------------------------------ the solution

    def hypergradient(self, x=None, y0=None, *, rtol=None, throw=True):
        """The engine's hypergradient at x, by the solver under test."""
        x, y0 = self.x if x is None else x, self.y0 if y0 is None else y0
        return self.ask(
            "hypergradient", self.problem, x, y0, rtol=self.rtol if rtol is None else rtol, atol=self.atol,
            solver=self.solver, throw=throw,
        )  # fmt: skip

    @functools.cached_property
    def atol(self) -> float:
        """A gradient this small is a zero that round-off has touched."""
        g_x, g_y = jax.grad(self.problem.outer, argnums=(0, 1))(self.x, self.y0)
        size = float(trees.norm(g_x)) + float(trees.norm(g_y))
        return (1e-4 if self.single else 1e-9) * (size if np.isfinite(size) and size > 0 else 1.0)

    @functools.cached_property
    def found(self):
        """The engine's hypergradient at x."""
        return self.hypergradient()

    @functools.cached_property
    def y(self):
        """y*(x) to round-off, from the hypergradient's y where one was asked for, else from y0."""
        y = self.resolve(self.x, self.found.y if "found" in self.__dict__ else self.y0)
        if y is None and "found" not in self.__dict__:
            y = self.resolve(self.x, self.found.y)
        if y is None:
            self.fail(
                f"bilevel.solve does not converge from the point that bilevel.hypergradient returned as solved "
                f"(|F| = {float(self.found.inner_residual):.3g} there).",
                ["inner solver not converged"],
            )
        self._solves(y)
        return y

    def _solves(self, y) -> None:
        """Fails where F is as large at y as a hundredth of y beside it, whatever the engine says."""
        flat = self.numbers(y)
        away = 1e-2 * max(float(np.linalg.norm(flat)), 1e-2 * np.sqrt(flat.size))
        beside = self._moved(y, self.directions(flat.size, 1)[0], away)
        here, there = (float(trees.norm(self.problem.inner.optimality(self.x, v))) for v in (y, beside))
        if here > (0.1 if self.single else 1e-3) * there:
            self.fail(
                f"bilevel.solve says that it converged, but |F(x, y)| = {here:.4g} there (a hundredth of |y| beside it "
                f"{there:.4g}).",
                ["inner solver not converged"],
            )

    @functools.cached_property
    def flat_y(self) -> np.ndarray:
        return self.numbers(self.y)

    @functools.cached_property
    def y_scale(self) -> float:
        """A length on which y may be moved."""
        return max(float(np.sqrt(np.mean(self.flat_y**2))), 1e-2)

    def resolve(self, x, start, solvers: tuple | None = None):
        """y*(x) to round-off, warm-started; None where it is not found."""
        rtol = 2e-6 if self.single else 1e-13
        for solver in (stay, self.solver, None) if solvers is None else solvers:
            out = self.ask("solve", self.problem.inner, x, start, rtol=rtol, solver=solver, throw=False)
            if bool(out.converged) or out.status == "round_off":
                return out.y
            if solver is None:
                break
        return None

    def y_at(self, x) -> np.ndarray:
        """y*(x), flat, warm-started at y*; NaN where it is not found."""
        y = self.resolve(x, self.y)
        return np.full(self.flat_y.shape, np.nan) if y is None else self.numbers(y)

    def h_at(self, x) -> float:
        """h(x) by a re-solve, warm-started at y*; NaN where it is not found."""
        y = self.resolve(x, self.y)
        return np.nan if y is None else float(self.problem.outer(x, y))

    # ------------------------------------------------------------------------------------------------ coordinates

    def numbers(self, tree) -> np.ndarray:
        """A tree as one vector in float64."""
        leaves = [np.asarray(a, np.float64).ravel() for a in jax.tree.leaves(tree)]
        return np.concatenate(leaves) if leaves else np.zeros(0)

    def move_x(self, direction: np.ndarray, t: float):
        """x + t direction."""
        return self._moved(self.x, direction, t)

    def move_y(self, direction: np.ndarray, t: float):
        """y* + t direction."""
        return self._moved(self.y, direction, t)

    def _moved(self, tree, direction: np.ndarray, t: float):
        flat, unravel = trees.ravel(tree)
        return unravel(flat + jnp.asarray(t * direction, flat.dtype))

    def directions(self, n: int, count: int) -> np.ndarray:
        """Random unit vectors without small entries, the same in every run: (count, n)."""
        random = np.random.default_rng(SEED + n)
        d = random.choice([-1.0, 1.0], size=(count, n)) * random.uniform(0.5, 1.5, size=(count, n))
        return d / np.maximum(np.linalg.norm(d, axis=1, keepdims=True), 1e-30)

    def x_scale(self, direction: np.ndarray) -> float:
        """How far x may be moved along a unit vector: about the size of the entries that move."""
        flat = self.numbers(self.x)
        return max(float(np.linalg.norm(flat * direction) / max(np.linalg.norm(direction), 1e-30)), 1.0)

    def slope_of_h(self, direction: np.ndarray, target: float):
        """dh along a direction, by differences of re-solves."""
        along = lambda t: self.h_at(self.move_x(direction, t))
        found = difference(along, target=target, scale=self.x_scale(direction), eps=self.eps)
        small = float(np.linalg.norm(self.numbers(self.x) * direction))
        if not np.isfinite(found.error) and 0 < small < 1:  # h may exist only very close by: an x near its bound
            found = difference(along, target=target, scale=small, eps=self.eps)
        return found


def name_of(tree: Any, argument: str, index: int) -> str:
    """Where the flat index of a tree sits, as a person writes it: `x['a'][2]`."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if index < np.size(leaf):
            where = np.unravel_index(index, np.shape(leaf))
            inside = "[" + ", ".join(str(int(i)) for i in where) + "]" if where else ""
            return f"{argument}{jax.tree_util.keystr(path)}{inside}"
        index -= int(np.size(leaf))
    raise IndexError(index)
