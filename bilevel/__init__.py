"""Bilevel optimization on JAX: problems inside problems, and hypergradients that carry their error."""

from . import linear, prox, solvers
from .adjoint import (
    ImplicitAdjoint,
    JacobianFreeAdjoint,
    LinearizedAdjoint,
    NeumannAdjoint,
    OneStepAdjoint,
    UnrolledAdjoint,
)
from .bounds import ErrorBound
from .composite import Composite
from .constrained import Constrained, Multipliers
from .correct import Jacobi, Newton, Preconditioner
from .efficiency import EfficiencyConstant, efficiency_constant, hessian_vector_product
from .errors import NotConverged, Status
from .hypergradient import Hypergradient, estimate, hypergradient
from .linear import ConjugateGradient, Direct, Krylov, Neumann
from .minimize import Result, State, minimize
from .preconditioners import FrozenHessian, Nystrom, ScaledIdentity, SecantInverse
from .problem import (
    AbstractBilevelProblem,
    AbstractInner,
    AbstractMinimization,
    BilevelProblem,
    FixedPoint,
    Minimization,
    Root,
)
from .reparametrize import Exp, GradientCoordinates, JacobiScaling, Reparametrization, Softplus, reparametrize
from .solve import Solution, solve

__all__ = [
    "AbstractBilevelProblem",
    "AbstractInner",
    "AbstractMinimization",
    "BilevelProblem",
    "Composite",
    "ConjugateGradient",
    "Constrained",
    "Direct",
    "EfficiencyConstant",
    "Exp",
    "FixedPoint",
    "GradientCoordinates",
    "Hypergradient",
    "ImplicitAdjoint",
    "Jacobi",
    "JacobiScaling",
    "JacobianFreeAdjoint",
    "Krylov",
    "LinearizedAdjoint",
    "Minimization",
    "Multipliers",
    "Neumann",
    "NeumannAdjoint",
    "Newton",
    "NotConverged",
    "OneStepAdjoint",
    "Preconditioner",
    "Reparametrization",
    "Result",
    "Root",
    "Softplus",
    "Solution",
    "State",
    "Status",
    "UnrolledAdjoint",
    "ErrorBound",
    "FrozenHessian",
    "Nystrom",
    "ScaledIdentity",
    "SecantInverse",
    "efficiency_constant",
    "estimate",
    "hessian_vector_product",
    "hypergradient",
    "linear",
    "minimize",
    "prox",
    "reparametrize",
    "solve",
    "solvers",
]
