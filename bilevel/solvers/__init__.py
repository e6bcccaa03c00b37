"""Who finds y: one adapter a file. A solver may be loose; the correction repairs what it leaves."""

from ._base import AbstractSolver, Found, resolve
from .closed_form import ClosedForm
from .fista import Fista
from .host import Host
from .jaxopt import Jaxopt
from .optimistix import Optimistix
from .scipy import Scipy

__all__ = ["AbstractSolver", "ClosedForm", "Fista", "Found", "Host", "Jaxopt", "Optimistix", "Scipy", "resolve"]
