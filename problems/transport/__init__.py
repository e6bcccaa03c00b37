"""Entropic optimal transport, balanced and unbalanced, as an inner problem; inverse optimal transport over it."""

from . import gaussian
from ._solvers import Automatic, SchurNewton, Sinkhorn
from .entropic import EntropicOT, UnbalancedOT

__all__ = ["Automatic", "EntropicOT", "SchurNewton", "Sinkhorn", "UnbalancedOT", "gaussian"]
