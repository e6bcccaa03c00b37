"""How the error falls with the distance to y*, and whether the error reported is the error there is."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

import bilevel

from .. import _trees as trees
from ._session import Session, name_of


class Sample(NamedTuple):
    """The estimate at distance t of y*: its true error, the error it reports, whether it says that it is good."""

    t: float
    true: float
    said: float
    status: str


class Samples(NamedTuple):
    """`rows`: one list of samples for each direction, falling in t; `floor`: below it all is round-off."""

    rows: list[list[Sample]]
    floor: float


def _samples(session: Session, adjoint: Any, key: str, count: int = 3) -> Samples:
    """Estimates along random directions from y*, t over six decades; shared by the checks of one call."""
    if key in session.cache:
        return session.cache[key]
    truth = _truth(session)
    n = session.flat_y.size
    scale = session.y_scale * np.sqrt(n)
    times = 10.0 ** np.arange(0.0, -6.1, -0.5) if not session.single else 10.0 ** np.arange(0.0, -3.1, -0.25)
    noise = 0.0
    rows = []

    def look(direction, t):
        y = session.move_y(direction, t * scale)
        found = session.ask("estimate", session.problem, session.x, y, adjoint)
        wrong = float(np.linalg.norm(session.numbers(found.gradient) - truth))
        return Sample(t, wrong, float(found.error), str(found.status))

    for direction in session.directions(n, count):
        noise = max(noise, look(direction, 10 * session.eps).true)
        rows.append([look(direction, t) for t in times])
    g_x = session.numbers(jax.grad(session.problem.outer)(session.x, session.y))
    floor = 10 * noise + 50 * session.eps * (float(np.linalg.norm(truth)) + float(np.linalg.norm(g_x)))
    session.cache[key] = Samples(rows, floor)
    return session.cache[key]


def _truth(session: Session) -> np.ndarray:
    """The hypergradient to round-off: the estimate at y* itself."""
    if "truth" not in session.cache:
        found = session.ask("estimate", session.problem, session.x, session.y, None)
        gradient = session.numbers(found.gradient)
        if not np.all(np.isfinite(gradient)):
            session.fail(f"bilevel.estimate at y* is not finite; its status is {found.status}.")
        session.cache["truth"] = gradient
    return session.cache["truth"]


def _agree_at_the_solution(session: Session, gradient: np.ndarray) -> None:
    asked = session.numbers(session.found.gradient)
    size = float(np.linalg.norm(asked))
    allowed = max(session.rtol * size, session.atol) + (3 * float(session.found.error) if session.single else 0)
    gap = np.abs(gradient - asked)
    if gap.size and np.max(gap) > 2 * allowed:
        i = int(np.argmax(gap))
        session.fail(
            f"bilevel.estimate at y* and bilevel.hypergradient disagree in {name_of(session.x, 'x', i)}: "
            f"{gradient[i]:.10g} and {asked[i]:.10g}, though {allowed:.1e} was asked for.",
            ["inner solver not converged", "an error estimate that is too small"],
        )


_REFUSED = ("correction_rejected", "singular", "not_a_minimum", "non_finite")


def efficiency_order(problem: Any, x: Any, y0: Any, adjoint: Any = None) -> float:
    """The order p in |estimate at y - gradient| = O(|y - y*|^p): 1.0 for plain implicit differentiation, 2.0 where it
    is super-efficient (theory, section 10, laws 1 and 2), infinity where the error is round-off at every distance
    (Newton on a quadratic inner problem).

    **Arguments:** `adjoint`: the derivative rule, None: the default one.
    """
    return order_of_estimate(Session(problem, x, y0, check="efficiency_order"), adjoint, "adjoint")


def order_of_estimate(session: Session, adjoint: Any, key: str) -> float:
    samples = _samples(session, adjoint, key)
    orders = []
    for row in samples.rows:
        near = [s for s in row if s.t <= 1e-2 or s.status not in _REFUSED]  # far away a refusal is no failure
        kept = [s for s in near if np.isfinite(s.true) and s.true > samples.floor]
        window = 3 if not session.single else 4
        if len(kept) < window:
            continue
        t, wrong = np.log([(s.t, s.true) for s in kept[-window:]]).T
        orders.append(float(np.polyfit(t, wrong, 1)[0]))
    return float(np.median(orders)) if orders else float("inf")


def order_is_two(session: Session) -> None:
    """Newton's order, at least 1.9, where the error is not round-off from the start."""
    order = order_of_estimate(session, None, "newton")
    if not order >= (1.6 if session.single else 1.9):
        pairs = ", ".join(f"{s.t:.0e}: {s.true:.2e}" for s in _samples(session, None, "newton").rows[0][::2])
        session.fail(
            f"efficiency_order of the default rule (Newton) is {order:.3g}, it should be at least 1.9: halving the "
            f"error of y should quarter that of the hypergradient (relative distance to y*: error: {pairs}).",
            [
                "the engine does not correct y, or not with dF/dy",
                "the objective is not twice differentiable near y*",
            ],
        )


def check_error_estimate(problem: Any, x: Any, y0: Any, *, solver: Any = None) -> None:
    """Checks that the error reported is the error there is: `estimate` at points around y* (with the default rule and
    with plain implicit differentiation) and `hypergradient` at loose tolerances must not be further from the gradient
    than 3 times `.error`, and half of the errors that plain estimates report must be within ten times the true one.

    **Raises:** AssertionError with both numbers.
    """
    error_estimate_is_honest(Session(problem, x, y0, solver=solver, check="check_error_estimate"))


def error_estimate_is_honest(session: Session) -> None:
    if session.flat_x.size == 0:
        return
    truth = _truth(session)
    _agree_at_the_solution(session, truth)
    plain = bilevel.ImplicitAdjoint(correction=None)
    for name, adjoint, key in (("default", None, "newton"), ("plain", plain, "plain")):
        samples = _samples(session, adjoint, key)
        ratios = []
        for row in samples.rows:
            for s in row:
                if s.status != "converged" or s.true <= samples.floor or s.t > 1e-2:
                    continue
                ratios.append((s.said / s.true, s))
        if not ratios:
            continue
        ratio, s = min(ratios, key=lambda pair: pair[0])
        if ratio < 1 / 3:
            session.fail(
                f"the {name} estimate at a relative distance {s.t:.1e} from y* reports an error of {s.said:.4g}, the "
                f"true error is {s.true:.4g} (floor of round-off {samples.floor:.1e}).",
                ["the error estimate is too small", "the objective is not twice differentiable near y*"],
            )
        middle = float(np.median([ratio for ratio, _ in ratios]))
        if key == "plain" and middle > 10:
            session.fail(
                f"the {name} estimates report {middle:.3g} times the true error in the median: for instance "
                f"{s.said:.4g} where it is {s.true:.4g}.",
                ["the error estimate is too large"],
            )
    size = float(np.linalg.norm(truth))
    floor = _samples(session, None, "newton").floor
    for rtol in (0.1, 1e-3):
        found = session.hypergradient(rtol=rtol, throw=False)
        wrong = float(np.linalg.norm(session.numbers(found.gradient) - truth))
        said = float(found.error)
        residual = float(trees.norm(session.problem.inner.optimality(session.x, found.y)))
        told = float(found.inner_residual)
        if np.isfinite(told) and abs(told - residual) > 1e-2 * residual + 1e3 * session.eps * (1 + size):
            session.fail(f"`.inner_residual` is {told:.6g}, but |F(x, .y)| = {residual:.6g}.")
        if str(found.status) in _REFUSED or not np.isfinite(wrong):
            continue
        if wrong > 3 * said + floor or (bool(found.converged) and wrong > max(rtol * size, session.atol) + floor):
            session.fail(
                f"bilevel.hypergradient with rtol={rtol:g} reports an error of {said:.4g}, the true error is "
                f"{wrong:.4g} (|gradient| = {size:.4g}, converged={bool(found.converged)}).",
                ["the error estimate is too small"],
            )


def check_reparametrization(problem: Any, x: Any, y0: Any, reparametrization: Any) -> None:
    """Checks a reparametrization y = phi(x, z): its inverse at y*, and that plain implicit differentiation in the
    coordinates z gives the same hypergradient at y*.

    **Raises:** AssertionError: which property, leaf and index, both numbers.
    """
    session = Session(problem, x, y0, check="check_reparametrization")
    reparametrization_agrees(session, reparametrization)


def reparametrization_agrees(session: Session, phi: Any) -> None:
    local = phi.at(session.problem.inner, session.x, session.y) if hasattr(phi, "at") else phi
    tolerance = 1e-3 if session.single else 1e-8
    z = local.inverse(session.x, session.y)
    back = local.forward(session.x, z)
    again = local.inverse(session.x, back)
    for what, got, want, letter in (
        ("forward(x, inverse(x, y))", back, session.y, "y"),
        ("inverse(x, forward(x, z))", again, z, "z"),
    ):
        if jax.tree.structure(got) != jax.tree.structure(want):
            session.fail(f"{what} has the structure {jax.tree.structure(got)}, expected {jax.tree.structure(want)}.")
        got, want_flat = session.numbers(got), session.numbers(want)
        gap = np.abs(got - want_flat)
        gap = np.where(np.isfinite(gap), gap, np.inf)
        if np.max(gap) > tolerance * (float(np.max(np.abs(want_flat))) + 1e-6):
            i = int(np.argmax(gap))
            session.fail(
                f"{what} should be {letter}, but in {name_of(want, letter, i)} it is {got[i]:.10g} instead of "
                f"{want_flat[i]:.10g}.",
                ["inverse is not the inverse of forward (at this x), or y* lies outside its domain"],
            )
    rule = bilevel.ImplicitAdjoint(correction=None, reparametrization=phi)
    found = session.ask("estimate", session.problem, session.x, session.y, rule)
    truth = _truth(session)
    gap = np.abs(session.numbers(found.gradient) - truth)
    gap = np.where(np.isfinite(gap), gap, np.inf)
    size = float(np.linalg.norm(truth)) + float(trees.norm(jax.grad(session.problem.outer)(session.x, session.y)))
    if gap.size and np.max(gap) > (1e-2 if session.single else 1e-6) * size + session.atol:
        i = int(np.argmax(gap))
        session.fail(
            f"at y* the hypergradient in the coordinates of the reparametrization is "
            f"{session.numbers(found.gradient)[i]:.10g} in {name_of(session.x, 'x', i)}, without it {truth[i]:.10g}.",
            [
                "a stop_gradient in forward, a map that is singular at y*, or one that depends on y in a way that is "
                "not held constant"
            ],
        )
