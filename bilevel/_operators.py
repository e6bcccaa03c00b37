"""What lineax asks of a structured operator that is symmetric positive definite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lineax as lx


def register_definite(operator: type, *, materialise: Callable[[Any], Any], diagonal: Callable[[Any], Any]) -> None:
    """Answers lineax's questions for a class of linear, symmetric positive definite operators on real arrays."""
    for ask, answer in (
        (lx.is_symmetric, True), (lx.is_positive_semidefinite, True), (lx.is_negative_semidefinite, False),
        (lx.is_diagonal, False), (lx.is_tridiagonal, False), (lx.is_lower_triangular, False),
        (lx.is_upper_triangular, False), (lx.has_unit_diagonal, False),
    ):  # fmt: skip
        ask.register(operator)(lambda _, answer=answer: answer)
    lx.linearise.register(operator)(lambda a: a)
    lx.conj.register(operator)(lambda a: a)
    lx.materialise.register(operator)(materialise)
    lx.diagonal.register(operator)(diagonal)
