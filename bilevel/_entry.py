"""What every entry point does before and after: arguments a person can be told about, and how failure is said."""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax
import jax.core
import numpy as np
from jax import lax
from jaxtyping import PyTree

from . import _trees as trees
from .errors import NotConverged, Status, meanings
from .problem import AbstractBilevelProblem, AbstractInner, Minimization, as_given


def prepare_inner(function: str, inner: Any, x: PyTree, y0: PyTree):
    """The inner problem, x and y0 with array leaves, after all checks that need shapes only."""
    if not isinstance(inner, AbstractInner):
        if isinstance(inner, AbstractBilevelProblem):
            raise TypeError(f"bilevel.{function}: expected an inner problem, found a bilevel one; pass problem.inner.")
        inner = Minimization(inner)
    x = trees.float_tree(x, function, "x", empty=True)
    y0 = trees.float_tree(y0, function, "y0")
    _evaluate_shapes(function, inner.check, inner, x, y0)
    return inner, x, y0


def prepare_problem(function: str, problem: Any, x: PyTree, y: PyTree, y_name: str):
    """The same for a bilevel problem."""
    if not isinstance(problem, AbstractBilevelProblem):
        raise TypeError(
            f"bilevel.{function}: `problem` must be a BilevelProblem(inner, outer), found {type(problem).__name__}."
        )
    x = trees.float_tree(x, function, "x", empty=True)
    y = trees.float_tree(y, function, y_name)
    _evaluate_shapes(function, problem.check, problem.inner, x, y)
    return x, y


def _evaluate_shapes(function: str, check, inner, x, y) -> None:
    """Runs the shape checks; an error out of the user's own function is told apart from ours."""
    try:
        check(x, y)
        expected = _own_shape(inner)
        if expected is not None:
            trees.check_like(y, expected, function, "argument `y0`", "this problem's y")
    except (TypeError, ValueError) as error:
        if str(error).startswith("bilevel."):
            raise
        shapes = {"x": eqx.tree_pformat(x), "y0": eqx.tree_pformat(y)}
        raise ValueError(
            f"bilevel.{function}: the problem's functions cannot be evaluated at x = {shapes['x']} and "
            f"y0 = {shapes['y0']} (do their shapes and dtypes fit?): {error}"
        ) from error


def _own_shape(inner) -> PyTree | None:
    """The shapes of the inner problem's own starting point, where it knows one."""
    try:
        return trees.shapes_of(inner.initial)
    except ValueError:
        return None


def check_tolerance(function: str, rtol: Any, atol: Any, max_steps: Any = 0) -> None:
    """Raises ValueError unless the concrete tolerances are numbers, rtol positive and atol not negative, and max_steps
    is an integer of at least 0."""
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 0:
        raise ValueError(f"bilevel.{function}: max_steps must be an integer of at least 0, found {max_steps!r}.")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if isinstance(value, jax.core.Tracer):
            continue
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"bilevel.{function}: {name} must be a number, found {value!r}.") from error
        fine = number > 0 if name == "rtol" else number >= 0
        if math.isnan(number) or not fine:
            bound = "positive" if name == "rtol" else "at least 0"
            raise ValueError(f"bilevel.{function}: {name} must be {bound}, found {number}.")


def finish(function: str, result: PyTree, converged, status: Status, throw: bool, problem, x, y0):
    """The result, or the exception that says what was reached and what to try; `problem`: an inner or a bilevel one."""
    if not throw:
        return result
    if trees.is_traced(converged):
        texts = [f"bilevel.{function}: {sentence}." for sentence in meanings()]
        bad = ~jax.numpy.all(converged)
        worst = jax.numpy.max(jax.numpy.where(converged, 0, status.code))
        return eqx.internal.branched_error_if(result, bad, worst, texts)
    if bool(np.all(np.asarray(converged))):
        return result
    # differentiated outside jit, results are concrete and arguments are not: look through the derivative
    still = lambda tree: jax.tree.map(lambda a: jax.numpy.asarray(lax.stop_gradient(a)) if eqx.is_array(a) else a, tree)
    try:
        text = explain(function, *still((result, status, problem, x, y0)))
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):  # a closure over a tracer
        text = f"bilevel.{function}: {still(status).meaning}."
    raise NotConverged(text, result)


def explain(function: str, result: Any, status: Status, problem, x, y0) -> str:
    """One paragraph: what happened, the numbers, the leaf at fault where there is one, what to do."""
    inner = problem.inner if isinstance(problem, AbstractBilevelProblem) else problem
    text = f"bilevel.{function}: {status.meaning}."
    own = None if trees.is_traced((inner, x, y0)) else inner.trouble_at(x, y0)
    if own is not None:
        return f"bilevel.{function}: {own}"
    if status.word in ("non_finite", "singular", "not_a_minimum", "max_steps", "linear_solve"):
        culprit = find_non_finite(inner, x, y0)
        if culprit:
            return f"bilevel.{function}: {culprit}; nothing can be computed from it."
        outer = outer_non_finite(problem, x, result.y) if status.word == "non_finite" and inner is not problem else None
        if outer:
            return f"bilevel.{function}: {outer}"
        runaway = unbounded_below(inner, x, y0, getattr(result, "y", None))
        if runaway:
            text = f"bilevel.{function}: {runaway}"
    numbers = []
    for name, label in (
        ("error", "error"),
        ("inner_residual", "inner residual"),
        ("residual", "residual"),
        ("adjoint_residual", "adjoint residual"),
        ("steps", "inner steps"),
    ):
        value = getattr(result, name, None)
        if value is not None and np.ndim(value) == 0:
            numbers.append(f"{label} {float(value):.3g}")
    gradient = getattr(result, "gradient", None)
    if gradient is not None:
        numbers.append(f"|gradient| {float(trees.norm(gradient)):.3g}")
    return f"{text} Reached: {', '.join(numbers)}." if numbers else text


def find_non_finite(inner, x, y0) -> str | None:
    """Says where NaN or infinity sits in x, y0, or the data of the problem."""
    for name, tree in (("x", x), ("y0", y0)):
        found = trees.non_finite(tree)
        if found:
            return f"argument `{name}`: {found}"
    found = trees.non_finite(inner)
    if found:
        return f"the problem's data: {found}"
    for holder in ("objective", "residual", "step", "smooth"):
        given = as_given(getattr(inner, holder, None))
        for name, value in trees.closed_over(given).items():
            found = trees.non_finite([value])
            if found:
                return f"`{name}`, which the inner {holder} closes over: {found.replace('leaf [0]', 'it')}"
    return None


def outer_non_finite(problem, x, y) -> str | None:
    """Says that it is the outer function that gives NaN or infinity, where the inner solution is fine."""
    if not bool(trees.all_finite((y, problem.inner.optimality(x, y)))):
        return None
    value, slopes = jax.value_and_grad(problem.outer, argnums=(0, 1))(x, y)
    for what, tree in (("value", value), ("derivative in x", slopes[0]), ("derivative in y", slopes[1])):
        if not bool(trees.all_finite(tree)):
            return (
                f"the outer function has NaN or an infinity as its {what} at an x of length {float(trees.norm(x)):.3g} "
                "and the inner solution there: keep x where it is defined (minimize takes bounds), or change it."
            )
    return None


def unbounded_below(inner, x, y0, y) -> str | None:
    """Looks for a ray along which the inner objective falls without end; a message, or None."""
    starts = [y0] if y is None else [y0, y]
    for start in starts:
        flat, unravel = trees.ravel(start)
        if not bool(trees.all_finite(start)) or inner.objective_at(x, start) is None or flat.size > 2000:
            continue
        gradient = trees.ravel_like(inner.optimality(x, start), flat.dtype)
        directions = [-np.asarray(gradient, np.float64)]  # whose square float32 may not hold
        hessian = np.asarray(jax.hessian(lambda p, u=unravel: inner.objective_at(x, u(p)))(flat), np.float64)
        if np.all(np.isfinite(hessian)):
            values, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
            directions += [vectors[:, 0], -vectors[:, 0]]
        for d in directions:
            size = np.linalg.norm(d)
            if not np.isfinite(size) or size == 0:
                continue
            lengths = [10.0**k for k in range(0, 13, 2)]
            values = [float(inner.objective_at(x, unravel(flat + (t * d / size).astype(flat.dtype)))) for t in lengths]
            begin = float(inner.objective_at(x, start))
            falls = all(b < a for a, b in zip([begin, *values[:-1]], values, strict=True) if np.isfinite(b))
            if falls and (values[-1] == -np.inf or values[-1] < begin - 1e3 * (1 + abs(begin))):
                return (
                    f"the inner objective is unbounded below: along a ray from the starting point it falls from "
                    f"{begin:.3g} to {values[-1]:.3g} at distance 1e12. Add a penalty or constraints."
                )
    return None
