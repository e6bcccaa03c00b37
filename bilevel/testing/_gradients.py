"""The hypergradient against differences of re-solves."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._diagnosis import faulty_derivative, kink, two_minimisers, why_gradient
from ._session import Session, name_of, stay

_ALL = 12  # so many entries of x are compared one by one; of more, some and random directions


def check_hypergradient(
    problem: Any, x: Any, y0: Any, *, rtol: float = 1e-5, solver: Any = None, unique: bool = True
) -> None:
    """Checks the hypergradient at x against central differences of h(x) = G(x, y*(x)).

    **Arguments:** `problem`: a `BilevelProblem`; `x`, `y0`: trees of floating arrays, y0 where the inner solver
    starts. `rtol`: how far a component may be from its difference, relative to the norm of the gradient; the error
    that the differences report of themselves comes on top. `solver`: as for `bilevel.hypergradient`. `unique`:
    whether solves of a minimization from other starting points must end at the same y.

    **Raises:** AssertionError: which property, leaf and index, both numbers, the steps tried, the likely cause.
    """
    hypergradient_agrees(Session(problem, x, y0, solver=solver, check="check_hypergradient"), rtol, unique=unique)


def hypergradient_agrees(session: Session, rtol: float = 1e-5, *, unique: bool = True) -> None:
    session.rtol = min(session.rtol, rtol) if not session.single else max(rtol, 1e-5)
    early = session.resolve(session.x, session.y0, solvers=(stay,))  # the cheap solve first: it finds most faults
    if early is not None:
        functions_are_smooth(session, early)
    found = session.found
    if early is None or np.linalg.norm(session.numbers(early) - session.flat_y) > 1e-3 * session.y_scale:
        functions_are_smooth(session, session.y)
    gradient = session.numbers(found.gradient)
    m = gradient.size
    if not np.all(np.isfinite(gradient)):
        i = int(np.flatnonzero(~np.isfinite(gradient))[0])
        session.fail(f"the hypergradient in {name_of(session.x, 'x', i)} is {gradient[i]}.")
    size = float(np.linalg.norm(gradient))
    allowed = max(rtol * size, session.atol)
    if session.single:
        allowed = max(allowed, 3 * float(found.error))
    if m <= _ALL:
        chosen, directions = list(range(m)), np.eye(m)
    else:
        largest = np.argsort(-np.abs(gradient))[: _ALL // 2]
        chosen = [*largest.tolist(), *([-1] * (_ALL // 2))]
        directions = np.concatenate([np.eye(m)[largest], session.directions(m, _ALL // 2)])
    worst: tuple = (0.0,)
    seen = []
    for i, direction in zip(chosen, directions, strict=True):
        slope = session.slope_of_h(direction, 0.1 * allowed)
        mine, measured = float(gradient @ direction), float(slope.value)
        seen.append((mine, measured))
        if slope.kink:
            session.fail(
                f"h is not smooth {_place(session, i)}: its one-sided slopes are {float(slope.left):.8g} and "
                f"{float(slope.right):.8g}, the hypergradient says {mine:.8g} ({slope.tried}).",
                ["the objective is not smooth here: y* sits on a kink, or jumps to another minimiser"],
            )
        excess = abs(mine - measured) - allowed - 3 * slope.error
        if np.isfinite(excess) and excess > worst[0]:
            worst = (excess, i, direction, mine, slope)
    if worst[0] > 0:
        _, i, direction, mine, slope = worst
        if i < 0:
            i, mine, slope = _locate(session, gradient, allowed, direction, mine, slope)
        causes = []
        if unique:
            second = two_minimisers(session)
            causes = [second] if second else []
        pairs = np.asarray(seen)
        causes += why_gradient(session, pairs[:, 0], pairs[:, 1], found.y)
        session.fail(
            f"the hypergradient {_place(session, i)} is {mine:.10g}, differences of re-solves give "
            f"{float(slope.value):.10g} (they differ by {abs(mine - float(slope.value)):.3g}, {allowed:.1e} is "
            f"allowed; "
            f"error of the differences {slope.error:.1e}, {slope.tried}; |hypergradient| = {size:.6g}).",
            causes,
        )
    value, again = float(found.value), session.h_at(session.x)
    if not abs(value - again) <= max(1e-3, 10 * rtol) * (abs(again) + 1e-3):
        session.fail(f"the value of the hypergradient is {value:.10g}, a re-solve gives h(x) = {again:.10g}.")
    if unique:
        second = two_minimisers(session)
        if second:
            session.fail(f"{second}.")


def functions_are_smooth(session: Session, y: Any) -> None:
    """Fails where the user's own functions and their derivatives disagree at y*."""
    jumps = kink(session, y)
    if jumps:
        session.fail(f"{jumps}.", ["the objective is not smooth here"])
    fault = faulty_derivative(session, y)
    if fault:
        session.fail(fault.text, [fault.cause])


def _place(session: Session, i: int) -> str:
    return "along a random direction of x" if i < 0 else f"in {name_of(session.x, 'x', i)}"


def _locate(session: Session, gradient, allowed, direction, mine, slope):
    """The entry of x at fault in a direction, by halving it."""
    inside = np.flatnonzero(direction)
    while inside.size > 1:
        halves = []
        for half in np.array_split(inside, 2):
            part = np.zeros_like(direction)
            part[half] = direction[half]
            found = session.slope_of_h(part, 0.1 * allowed)
            halves.append((abs(float(gradient @ part) - float(found.value)), half))
        inside = max(halves, key=lambda pair: pair[0])[1]
    unit = np.zeros_like(direction)
    unit[inside] = 1.0
    found = session.slope_of_h(unit, 0.1 * allowed)
    i = int(inside[0])
    if not abs(float(gradient[i]) - float(found.value)) > allowed / 10:
        return -1, mine, slope
    return i, float(gradient[i]), found


def taylor_order(problem: Any, x: Any, y0: Any, *, solver: Any = None) -> float:
    """The order p of h(x + t w) - h(x) - t <gradient, w> = O(t^p): 2.0 where the hypergradient is right, 1.0 where it
    is wrong (theory, section 10, law 14). More than two (h affine, or no curvature along w) is given as 2.0.
    """
    return order_of_taylor(Session(problem, x, y0, solver=solver, check="taylor_order"))


def order_of_taylor(session: Session) -> float:
    gradient = session.numbers(session.found.gradient)
    if gradient.size == 0:
        return 2.0
    center = session.h_at(session.x)
    times = 10.0 ** np.arange(-1.0, -4.6, -0.5) * (3 if session.single else 1)
    orders = []
    for direction in session.directions(gradient.size, 3):
        scale = session.x_scale(direction)
        kept = []
        for t in times * scale:
            value = session.h_at(session.move_x(direction, t))
            rest = abs(value - center - t * float(gradient @ direction))
            size = abs(value) + abs(center) + t * float(np.linalg.norm(gradient))
            floor = 200 * session.eps * size + 3 * t * float(session.found.error)
            if np.isfinite(rest) and rest > floor:
                kept.append((t, rest))
        if len(kept) >= 3:
            t, rest = np.log(np.asarray(kept[-3:])).T
            orders.append(float(np.polyfit(t, rest, 1)[0]))
    return min(2.0, float(np.median(orders))) if orders else 2.0
