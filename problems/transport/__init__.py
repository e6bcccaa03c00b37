"""Entropic optimal transport, balanced and unbalanced, as an inner problem; inverse optimal transport over it."""

from . import gaussian
from ._estimation import estimation
from ._examples import examples
from ._solvers import Automatic, SchurNewton, Sinkhorn
from .clouds import PointCloudCost
from .entropic import EntropicOT, UnbalancedOT
from .inverse import InverseOT
from .penalties import L1, Box, Group, NuclearNorm, Sign

__all__ = [
    "L1",
    "Automatic",
    "Box",
    "EntropicOT",
    "Group",
    "InverseOT",
    "NuclearNorm",
    "PointCloudCost",
    "SchurNewton",
    "Sign",
    "Sinkhorn",
    "UnbalancedOT",
    "estimation",
    "examples",
    "gaussian",
]
