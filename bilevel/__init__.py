"""Bilevel optimization on JAX: problems inside problems, and hypergradients that carry their error."""

from . import linear, solvers
from .adjoint import ImplicitAdjoint
from .correct import Jacobi, Newton, Preconditioner
from .errors import NotConverged, Status
from .hypergradient import Hypergradient, estimate, hypergradient
from .linear import ConjugateGradient, Direct, Krylov, Neumann
from .minimize import Result, State, minimize
from .problem import (
    AbstractBilevelProblem,
    AbstractInner,
    BilevelProblem,
    FixedPoint,
    Minimization,
    Root,
)
from .reparametrize import Reparametrization, reparametrize
from .solve import Solution, solve

__all__ = [
    "AbstractBilevelProblem", "AbstractInner", "BilevelProblem", "ConjugateGradient", "Direct", "FixedPoint",
    "Hypergradient", "ImplicitAdjoint", "Jacobi", "Krylov", "Minimization", "Neumann", "Newton", "NotConverged",
    "Preconditioner", "Reparametrization", "Result", "Root", "Solution", "State", "Status", "estimate", "hypergradient", "linear",
    "minimize", "reparametrize", "solve", "solvers",
]  # fmt: skip
