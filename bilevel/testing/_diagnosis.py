"""Why a check failed: what can be seen in the user's own functions, in words a person can act on."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bilevel

from .. import _trees as trees
from ._differences import Difference, difference
from ._session import Session, name_of

_INNER_NAMES = {"y", "y0", "params", "parameters", "theta", "w", "weights"}
_OUTER_NAMES = {"x", "x0", "hyper", "hyperparameters", "lam", "lambda_", "hparams"}


def _functions(problem) -> list[tuple[str, Callable]]:
    """The user's own functions, with the names of the arguments they were given as."""
    given = []
    for name in ("objective", "residual", "step", "smooth"):
        function = getattr(problem.inner, name, None)
        if callable(function):
            given.append((f"the inner {name}", function))
    given.append(("the outer function", problem.outer))
    return given


# ------------------------------------------------------------------------------------------------ arguments


def explain_signatures(session: Session) -> str | None:
    """Says which function names its arguments the other way round."""
    for name, function in _functions(session.problem):
        try:
            names = list(inspect.signature(function).parameters)[:2]
        except (TypeError, ValueError):
            continue
        if len(names) == 2 and names[0] in _INNER_NAMES and names[1] in _OUTER_NAMES:
            return (
                f"swapped arguments: {name} is written as a function of ({names[0]}, {names[1]}), but it is called as "
                f"(x, y): the outer variable first, the inner one second. Swap them (or rename them if "
                "that is meant)."
            )
    return None


def explain_shapes(session: Session, error: Exception) -> str:
    """Why the problem cannot be evaluated at all."""
    x, y = session.x, session.y0
    for name, function in _functions(session.problem):
        if not _evaluates(function, x, y) and _evaluates(function, y, x):
            return (
                f"swapped arguments: {name} cannot be evaluated at (x, y), but at (y, x) it can; it must take the "
                f"outer variable first and the inner one second. (As it is: {error})"
            )
    return str(error)


def _evaluates(function, *arguments) -> bool:
    try:
        jax.eval_shape(function, *arguments)
    except Exception:  # a user's function may fail in any way it likes: that is an answer
        return False
    return True


# ------------------------------------------------------------------------------------------------ their derivatives


class Fault(NamedTuple):
    """A derivative of a user's function that differences contradict."""

    text: str
    cause: str


def points(session: Session, y) -> list[tuple[str, Any]]:
    """Where the user's functions are looked at: at y, and beside it, where nothing is stationary."""
    flat = session.numbers(y)
    scale = max(float(np.sqrt(np.mean(flat**2))), 1e-2)
    direction = session.directions(flat.size, 1)[0]
    for size in (0.3, 0.03, 0.003):
        beside = session._moved(y, direction, size * scale * np.sqrt(flat.size))
        if bool(trees.all_finite(session.problem.inner.optimality(session.x, beside))):
            return [("at y*", y), ("beside y*", beside)]
    return [("at y*", y)]


def faulty_derivative(session: Session, y) -> Fault | None:
    """The first derivative of a user's function that differences contradict: a stop_gradient, a hand-written rule,
    a kink."""
    inner, outer = session.problem.inner, session.problem.outer
    weights = np.random.default_rng(1).uniform(0.5, 1.5, size=session.flat_y0.size)

    def optimality(x, y):
        return jnp.vdot(jnp.asarray(weights, session.flat_y0.dtype), trees.ravel(inner.optimality(x, y))[0])

    places = points(session, y)
    for where, at in reversed(places):
        if inner.objective_at(session.x, at) is not None:
            fault = _compare(session, "the inner objective", inner.objective_at, at, where, 1)
            if fault:
                return fault
    # other kinds hold constants (a step length, a local map) that F does not depend on at y* only
    plain = isinstance(inner, bilevel.Minimization | bilevel.Root | bilevel.FixedPoint)
    for where, at in places if plain else places[:1]:
        for name, function in (("the optimality F of the inner problem", optimality), ("the outer function", outer)):
            for argument in (0, 1):
                fault = _compare(session, name, function, at, where, argument)
                if fault:
                    return fault
    return None


def _compare(session: Session, name: str, function, y, where: str, argument: int) -> Fault | None:
    letter = "xy"[argument]
    arguments = [session.x, y]
    flat, unravel = trees.ravel(arguments[argument])
    if flat.size == 0:
        return None
    gradient = session.numbers(jax.grad(function, argnums=argument)(session.x, y))
    if not np.all(np.isfinite(gradient)):
        return None

    def along(direction) -> Difference:
        def value(t):
            moved = [*arguments]
            moved[argument] = unravel(flat + jnp.asarray(t * direction, flat.dtype))
            return function(*moved)

        size = float(np.linalg.norm(session.numbers(arguments[argument]) * direction))
        scale = max(size, 1.0 if argument == 0 else 1e-2)
        return difference(value, target=1e-7 * float(np.linalg.norm(gradient)), scale=scale, eps=session.eps)

    def wrong(direction):
        found = along(direction)
        exact = float(gradient @ direction)
        size = max(float(np.linalg.norm(gradient)) / np.sqrt(flat.size), abs(float(found.value)))
        tolerance = (2e-2 if session.single else 1e-5) * size + 5 * found.error
        if found.kink:
            return found, exact, np.inf
        gap = abs(exact - float(found.value))
        return found, exact, gap if np.isfinite(gap) and gap > tolerance else 0.0

    for direction in session.directions(flat.size, 2):
        found, exact, gap = wrong(direction)
        if gap:
            break
    else:
        return None
    worst = (gap, "along a random direction", found, exact)
    for i in range(min(flat.size, 24)):
        unit = np.zeros(flat.size)
        unit[i] = 1.0
        found, exact, gap = wrong(unit)
        if gap >= worst[0] or (gap and worst[1].startswith("along")):
            worst = (gap, f"in {name_of(arguments[argument], letter, i)}", found, exact)
            if gap == np.inf:
                break
    _, place, found, exact = worst
    if found.kink:
        return Fault(
            f"{name} is not smooth {where} {place}: its one-sided slopes are {float(found.left):.6g} and "
            f"{float(found.right):.6g} ({found.tried}).",
            "the objective is not smooth here (a kink)",
        )
    text = (
        f"the derivative of {name} {place} is {exact:.8g} by autodiff but {float(found.value):.8g} by differences "
        f"{where} (error of the differences {found.error:.1e}, {found.tried})."
    )
    return Fault(text, _why_wrong(session, function, y, exact, float(found.value)))


def _why_wrong(session: Session, function, y, exact: float, measured: float) -> str:
    try:
        program = str(jax.make_jaxpr(lambda x, y: function(x, y))(session.x, y))
    except Exception:  # only a hint is lost
        program = ""
    stops = "stop_gradient" in program
    custom = sorted(set(re.findall(r"custom_[jv][vj]p_call\[\s*name=(\w+)", program)))
    if custom and exact != 0 and not stops:
        off = f" (it is off by {100 * abs(exact / measured - 1):.3g} %)" if measured else ""
        return f"a hand-written derivative rule is wrong: custom_jvp or custom_vjp of {', '.join(custom)}{off}"
    if stops or exact == 0:
        return (
            "a stop_gradient (or a rounding, a cast to integers, a callback) hides this dependence: the value moves "
            "and its derivative does not"
        )
    return "a hand-written derivative rule, or an operation whose derivative JAX gets wrong here"


# ------------------------------------------------------------------------------------------------ kinks


def kink(session: Session, y) -> str | None:
    """Says where F jumps as y passes, for some entry of y: the inner objective has a kink there."""
    inner = session.problem.inner
    flat, unravel = trees.ravel(y)
    n = flat.size
    size = max(float(np.max(np.abs(session.numbers(y)))), 1e-2)
    chosen = np.eye(n)[:64]
    for i, unit in enumerate(chosen):
        jumps = []
        for h in (1e-1, 1e-2, 1e-3, 1e-4) if not session.single else (1e-1, 1e-2, 1e-3):
            step = jnp.asarray(h * size * unit, flat.dtype)
            ahead, back = (
                session.numbers(inner.optimality(session.x, unravel(flat + sign * step))) for sign in (1, -1)
            )
            jumps.append((ahead - back, h * size))
        sizes = [float(np.linalg.norm(jump)) for jump, _ in jumps]
        scale = float(np.linalg.norm(session.numbers(inner.optimality(session.x, unravel(flat)))))
        for first, last in ((1, 3), (1, 2)):
            if last >= len(sizes) or (last == 2 and last + 1 < len(sizes)):
                continue
            if sizes[last] > 0.6 * sizes[first] and sizes[last] > 1e-3 * max(scale, 1e-6):
                where = name_of(y, "y", i)
                value = float(flat[i])
                return (
                    f"F jumps by {sizes[last]:.4g} as {where} passes {value:.4g} (its change over a step of "
                    f"{2 * jumps[last][1]:.1e} is {sizes[last]:.4g}, over {2 * jumps[first][1]:.1e} "
                    f"{sizes[first]:.4g}): "
                    f"the inner objective is not smooth here, it has a kink in {where}"
                )
    return None


# ------------------------------------------------------------------------------------------------ refusals


def explain_refusal(session: Session, error) -> tuple[str, list[str]]:
    """What to say when the engine raised NotConverged: its words, and what can be seen in the functions."""
    reached = getattr(error.result, "y", None)
    tried = [y for y in (reached, session.y0) if y is not None and bool(trees.all_finite(y))]
    causes: list[str] = []
    text = f"the engine refused: {error}"
    if str(getattr(error.result, "status", "")) == "round_off" and session.single:
        causes.append("float32: the accuracy asked for is out of its reach (see jax_enable_x64)")
    for y in tried:
        found = kink(session, y)
        if found:
            return f"{text} {found}.", ["the objective is not smooth here (a kink at y*)"]
    for y in tried:
        fault = faulty_derivative(session, y)
        if fault:
            return f"{text} Moreover {fault.text}", [fault.cause]
    if session.solver is not None:
        causes.append(_judge_solver(session))
    else:
        swapped = _works_swapped(session)
        if swapped:
            causes.append(swapped)
    if not causes:
        causes.append("inner solver not converged: see the engine's words above")
    return text, causes


def _works_swapped(session: Session) -> str | None:
    inner = session.problem.inner
    if inner.objective_at(session.x, session.y0) is None or not _evaluates(inner.objective_at, session.y0, session.x):
        return None
    swapped = bilevel.Minimization(lambda x, y: inner.objective_at(y, x))
    try:
        out = bilevel.solve(swapped, session.x, session.y0, throw=False)
    except Exception:  # only a hint is lost
        return None
    if not bool(out.converged):
        return None
    return (
        f"swapped arguments: with x and y exchanged in the inner objective it has a minimum "
        f"(|F| = {float(out.residual):.2g}); functions take (x, y), the outer variable first"
    )


def _judge_solver(session: Session) -> str:
    out = bilevel.solve(session.problem.inner, session.x, session.y0, throw=False)
    if bool(out.converged):
        return (
            "the inner solver you passed did not converge (inner solver not converged): the default one reaches "
            f"|F| = {float(out.residual):.2g}"
        )
    return "inner solver not converged: neither yours nor the default one gets there"


def two_minimisers(session: Session) -> str | None:
    """Says so if solves from other starting points end at another solution."""
    inner, y = session.problem.inner, session.flat_y
    if not inner.minimizes:
        return None
    n = y.size
    size = max(float(np.max(np.abs(y))), 0.1)
    signs = np.sign(session.directions(n, 1)[0])
    starts = [-y, *(y + t * size * d for t in (1.5, -1.5, 4.0, -4.0) for d in (np.ones(n), signs))]
    dtype = session.flat_y0.dtype
    for start in starts:
        begin = session.unravel_y(jnp.asarray(start, dtype))
        with_solver = session.hypergradient(y0=begin, throw=False)
        if not bool(with_solver.converged):
            continue
        other = session.resolve(session.x, with_solver.y)
        if other is None:
            continue
        gap = jnp.asarray(session.numbers(other) - y, dtype)
        along = inner.gauge_part(session.x, session.unravel_y(gap))
        moved = session.numbers(session.unravel_y(gap)) - (0 if along is None else session.numbers(along))
        if not np.all(np.isfinite(moved)) or np.max(np.abs(moved)) < 1e-3 * size:
            continue
        i = int(np.argmax(np.abs(moved)))
        here, there = (float(inner.objective_at(session.x, v)) for v in (session.y, other))  # pyright: ignore[reportArgumentType]
        return (
            f"the inner problem has two minimisers: {name_of(session.y, 'y', i)} is {y[i]:.6g} at one and "
            f"{session.numbers(other)[i]:.6g} at the other (inner objective {here:.6g} and {there:.6g}), depending on "
            f"where the solver starts, so y*(x) is no function of x. Add a penalty or constraints that leave one, or "
            f"pass unique=False if a local minimum is meant"
        )
    return None


# ------------------------------------------------------------------------------------------------ hypergradients


def why_gradient(session: Session, gradient: np.ndarray, measured: np.ndarray, y) -> list[str]:
    """Likely causes of a hypergradient that differs from differences, both along the same entries."""
    causes = []
    off = float(np.linalg.norm(session.numbers(y) - session.flat_y))
    size = float(np.linalg.norm(session.flat_y))
    if off > 1e-3 * max(size, 1e-12):
        residual = float(trees.norm(session.problem.inner.optimality(session.x, y)))
        causes.append(
            f"inner solver not converged: the y it was computed at is {off:.3g} away from y* (|y*| = {size:.3g}), "
            f"|F| = {residual:.3g} there"
        )
    ratio = float(gradient @ measured) / max(float(measured @ measured), 1e-300)
    rest = float(np.linalg.norm(gradient - ratio * measured))
    if rest <= 1e-3 * max(float(np.linalg.norm(gradient)), 1e-300) and len(gradient) > 0:
        if abs(ratio + 1) < 1e-2:
            causes.append("wrong sign")
        elif abs(ratio - 1) > 1e-6:
            causes.append(f"a factor: the hypergradient is {ratio:.6g} times what differences give")
    missing = np.flatnonzero((gradient == 0) & (np.abs(measured) > 1e-6 * np.max(np.abs(measured), initial=0)))
    if missing.size and missing.size < gradient.size:
        causes.append("a component of the hypergradient is missing (exactly zero)")
    if not _touches(session):
        causes.append("x missing from the inner problem: dF/dx is zero there")
    if session.single:
        causes.append("float32: differences and solves are noisy, use float64 (jax_enable_x64)")
    if not causes:
        causes.append("the engine's derivative rule, a hand-written derivative rule, or a second minimiser nearby")
    return causes


def _touches(session: Session) -> bool:
    y = session.y
    tangent = session.unravel_x(jnp.asarray(session.directions(session.flat_x.size, 1)[0], session.flat_x.dtype))
    moved = jax.jvp(lambda x: session.problem.inner.optimality(x, y), (session.x,), (tangent,))[1]
    return float(trees.norm(moved)) > 0
