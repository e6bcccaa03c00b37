"""Testing gradients by properties: for the library's problems and for everybody's.

The checks take `(problem, x, y0, …)` and raise an AssertionError that says which property failed, at which leaf and
index, with both numbers and the likely cause. The strategies (for hypothesis, which is imported when the first of
them is asked for) draw cases with `.problem .x .y0 .hypergradient`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ._derivatives import check_adjoint_identity, check_operator, check_transforms
from ._gradients import check_hypergradient, taylor_order
from ._orders import check_error_estimate, check_reparametrization, efficiency_order
from ._suite import check_problem

if TYPE_CHECKING:
    from ._strategies import (
        Case,
        couplings,
        fixed_points,
        glm_problems,
        lasso_problems,
        measures,
        pytrees,
        quadratic_problems,
        reparametrizations,
        spd_operators,
    )

__all__ = [
    "Case", "check_adjoint_identity", "check_error_estimate", "check_hypergradient", "check_operator",
    "check_problem", "check_reparametrization", "check_transforms", "couplings", "efficiency_order", "fixed_points",
    "glm_problems", "lasso_problems", "measures", "pytrees", "quadratic_problems", "reparametrizations",
    "spd_operators", "taylor_order",
]  # fmt: skip

_STRATEGIES = (
    "Case", "couplings", "fixed_points", "glm_problems", "lasso_problems", "measures", "pytrees", "quadratic_problems",
    "reparametrizations", "spd_operators",
)  # fmt: skip


def __getattr__(name: str):
    if name in _STRATEGIES:
        return getattr(importlib.import_module("._strategies", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
