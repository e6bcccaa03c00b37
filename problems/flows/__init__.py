"""JKO flows: the step as an inner problem, and the potential that drives a population, from its snapshots."""

from . import gaussian
from ._penalties import L1
from .features import Fourier, Neural, Polynomials, Quadratic, RadialBasis
from .inverse import InverseJKO
from .quadratic import QuadraticJKO
from .scores import earth_mover, mmd
from .simulate import simulate
from .step import JKOStep

__all__ = [
    "Fourier",
    "InverseJKO",
    "JKOStep",
    "L1",
    "Neural",
    "Polynomials",
    "Quadratic",
    "QuadraticJKO",
    "RadialBasis",
    "earth_mover",
    "gaussian",
    "mmd",
    "simulate",
]
