"""Hard cases for hypergradients, each with its true answer: what `tests/test_never_silently_wrong.py` runs.

A case says what is true (a closed form, or differences of solutions found by NumPy alone), how ours is called, what
may come out (the right number, a refusal, or either), and how a user of each peer would write it, at the peer's own
defaults or, where a peer has none, at tolerances of 1e-8.
"""

from . import _trust_composite, _trust_hessians, _trust_roots, _trust_various
from ._trust_case import CASES, Case, outcome

TABLE = (_trust_composite, _trust_hessians, _trust_roots, _trust_various)  # importing them lists their cases, in order

__all__ = ["CASES", "TABLE", "Case", "outcome"]
