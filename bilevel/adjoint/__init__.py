"""The derivative rules: the only file that knows the implicit function theorem.

Formulas and their laws: docs/theory/hypergradients. In short, with F(x, y) = 0 the inner optimality, G the outer
function and F_y' v = G_y,

    Omega(x, y) = G_x - F_x' v,     dy*/dx = -F_y^-1 F_x,

and with l(x, y) = G - v'F (v frozen) the derivative of Omega in y along p is g_x - F_x' F_y^-T g_y, where
(g_x, g_y) is the tangent of grad l along (0, p).
"""

from __future__ import annotations

from ._base import NEARER, AbstractAdjoint, Estimate, Target, near, usable
from ._implicit import ImplicitAdjoint, LinearizedAdjoint
from ._others import JacobianFreeAdjoint, NeumannAdjoint, OneStepAdjoint, UnrolledAdjoint
from ._rule import differentiable_estimate, implicit, solve_linear
from ._second import hessian_product, moved_point, parts_at

__all__ = [
    "NEARER",
    "AbstractAdjoint",
    "Estimate",
    "ImplicitAdjoint",
    "JacobianFreeAdjoint",
    "LinearizedAdjoint",
    "NeumannAdjoint",
    "OneStepAdjoint",
    "Target",
    "UnrolledAdjoint",
    "differentiable_estimate",
    "hessian_product",
    "implicit",
    "moved_point",
    "near",
    "parts_at",
    "solve_linear",
    "usable",
]
