"""JKO flows: the step as an inner problem, and the potential that drives a population, from its snapshots."""

from . import gaussian
from .step import JKOStep

__all__ = ["JKOStep", "gaussian"]
