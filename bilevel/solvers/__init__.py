"""Who finds y: one adapter a file. A solver may be loose; the correction repairs what it leaves."""

from ._base import AbstractSolver, Found, resolve
from .anderson import Anderson
from .closed_form import ClosedForm
from .fista import Fista
from .host import Host
from .jaxopt import Jaxopt
from .newton import DampedNewton
from .optimistix import Optimistix
from .scipy import Scipy

__all__ = [
    "AbstractSolver", "Anderson", "ClosedForm", "DampedNewton", "Fista", "Found", "Host", "Jaxopt", "Optimistix",
    "Scipy", "resolve",
]  # fmt: skip
