"""All checks that apply."""

from __future__ import annotations

from typing import Any

from ._derivatives import operator_agrees, transforms_agree
from ._gradients import hypergradient_agrees, order_of_taylor
from ._orders import error_estimate_is_honest, order_is_two, reparametrization_agrees
from ._session import Session


def check_problem(
    problem: Any, x: Any, y0: Any, *, rtol: float = 1e-5, solver: Any = None, unique: bool = True,
    reparametrization: Any = None,
) -> None:  # fmt: skip
    """Runs every check that applies to a bilevel problem at x: the hypergradient against differences of re-solves,
    its Taylor order, the declared operator and gauge, forward against reverse mode, transforms and second derivatives,
    the order of the error (at least 1.9 with the default rule) and the error reported.

    **Arguments:** as for `check_hypergradient`; `reparametrization`: one to check as well.

    **Raises:** AssertionError: which property, leaf and index, both numbers, the likely cause.
    """
    session = Session(problem, x, y0, solver=solver, check="check_problem")
    hypergradient_agrees(session, rtol, unique=unique)
    order = order_of_taylor(session)
    if not order >= (1.5 if session.single else 1.8):
        session.fail(f"taylor_order is {order:.3g}, it should be 2: the hypergradient is not the derivative of h.")
    operator_agrees(session)
    order_is_two(session)
    error_estimate_is_honest(session)
    transforms_agree(session)
    if reparametrization is not None:
        reparametrization_agrees(session, reparametrization)
