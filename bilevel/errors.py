"""What is said when an answer cannot be given: one exception, one status, and their words."""

from __future__ import annotations

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

__all__ = ["NotConverged", "Status"]


class NotConverged(RuntimeError):
    """The accuracy asked for was not reached, or there is no usable solution.

    The message says which function, what was reached and what to try. `.result` is the
    `Solution`, `Hypergradient` or `Result` that was reached (what `throw=False` would have
    returned), or None.
    """

    def __init__(self, message: str, result: Any = None):
        super().__init__(message)
        self.result = result


_MEANINGS = {
    "converged": "the accuracy asked for was reached",
    "max_steps": (
        "the accuracy asked for was not reached within max_steps: raise max_steps, loosen rtol, start closer, "
        "name another solver, or set atol (where the solution is zero a relative accuracy is out of reach)"
    ),
    "round_off": (
        "the accuracy asked for is below what this floating-point precision can reach here: use float64, "
        "loosen rtol, or set atol (at a stationary point of the outer problem a relative accuracy is out of reach)"
    ),
    "correction_rejected": (
        "the correction raised the residual of the inner problem, so it was not used: the point is too far from "
        "the inner solution; solve the inner problem further first"
    ),
    "estimate_untrusted": (
        "the error estimate cannot be trusted here (the residual does not contract): the point is too far from the "
        "inner solution, or the inner problem is not smooth there"
    ),
    "linear_solve": (
        "the linear solve with dF/dy stopped before its tolerance: "
        "give it more steps or a preconditioner, or use Direct()"
    ),
    "singular": (
        "dF/dy is numerically singular: the inner solution is not unique or not differentiable; add regularization, "
        "or declare gauge= if the solution may slide along known directions"
    ),
    "not_a_minimum": (
        "the Hessian of the inner objective is indefinite: the point is a saddle or a maximum, not a minimum"
    ),
    "non_finite": "the inner problem gives NaN or infinite values: check the data, x, and y0",
    "gauge_dependent": (
        "the outer objective changes along the declared gauge, along which the inner solution is arbitrary: "
        "its hypergradient does not exist; make the outer objective gauge-invariant"
    ),
    "not_a_gauge": (
        "dF/dy does not vanish along the declared gauge: the inner solution does not slide there; correct gauge= or "
        "leave it out"
    ),
    "degenerate_active_set": (
        "an inequality of the inner problem is active with a multiplier of zero: the solution has no derivative there"
    ),
}


def _is_concrete(x) -> bool:
    return not isinstance(x, jax.core.Tracer)


class Status(eqx.Module):
    """Why a computation ended, as data: `.code` is an integer array (one entry per batch element).

    `str(status)` is the word (`"converged"`, `"singular"`, …), `status == "singular"` compares, elementwise
    under `vmap`; `status.meaning` is the sentence. The words are those of `Status.words`.
    """

    code: jax.Array

    words: ClassVar[tuple[str, ...]] = tuple(_MEANINGS)

    def __init__(self, word_or_code: Any = "converged"):
        if isinstance(word_or_code, str):
            self.code = jnp.asarray(self.words.index(word_or_code), jnp.int32)
        else:
            self.code = word_or_code

    @property
    def word(self) -> str:
        """The word of a single, concrete status."""
        return self.words[int(self.code)]

    @property
    def meaning(self) -> str:
        """The sentence of a single, concrete status."""
        return _MEANINGS[self.word]

    @staticmethod
    def where(condition, yes: Status, no: Status) -> Status:
        """Elementwise choice between two statuses."""
        return Status(jnp.where(condition, yes.code, no.code))

    def then(self, other: Status) -> Status:
        """This status, or the other one where this one is `converged`: the first trouble is the one reported."""
        return Status.where(self.code == 0, other, self)

    def __eq__(self, other):  # pyright: ignore[reportIncompatibleMethodOverride]
        if isinstance(other, str):
            if other not in self.words:
                return False
            other = Status(other)
        if not isinstance(other, Status):
            return NotImplemented
        equal = self.code == other.code
        return bool(equal) if _is_concrete(equal) and jnp.ndim(equal) == 0 else equal

    def __ne__(self, other):
        equal = self.__eq__(other)
        if equal is NotImplemented:
            return equal
        return not equal if isinstance(equal, bool) else ~equal

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __str__(self):
        if not _is_concrete(self.code) or isinstance(self.code, jax.ShapeDtypeStruct):
            return "<traced>"
        codes = np.asarray(self.code)
        if codes.dtype.kind not in "iu":
            return "<no status>"
        words = [self.words[c] for c in codes.ravel()]
        return words[0] if codes.ndim == 0 else "[" + ", ".join(words) + "]"

    def __repr__(self):
        return f"Status({self})"


def meanings() -> tuple[str, ...]:
    """The sentences, in the order of `Status.words`."""
    return tuple(_MEANINGS.values())
