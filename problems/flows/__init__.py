"""JKO flows: the step as an inner problem, and the potential that drives a population, from its snapshots."""

from . import gaussian
from ._examples import examples
from ._penalties import L1
from .compare import Comparison, compare
from .features import Fourier, Neural, Polynomials, Quadratic, RadialBasis
from .inverse import InverseJKO
from .quadratic import QuadraticJKO
from .scores import earth_mover, mmd
from .simulate import simulate
from .step import JKOStep
from .tuning import LeaveOneOut

__all__ = [
    "Comparison",
    "Fourier",
    "InverseJKO",
    "JKOStep",
    "L1",
    "LeaveOneOut",
    "Neural",
    "Polynomials",
    "Quadratic",
    "QuadraticJKO",
    "RadialBasis",
    "compare",
    "earth_mover",
    "examples",
    "gaussian",
    "mmd",
    "simulate",
]
