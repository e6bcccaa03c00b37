"""Central differences with Richardson extrapolation that choose their step and say how wrong they are.

Ridders 1982 (Advances in Engineering Software 4): a tableau of extrapolated central differences over falling steps;
the entry whose neighbours agree best is taken, and by how much they disagree is its error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

RATIO = 4.0
LEVELS = 8
_KINK = 1e-3  # a relative jump of the one-sided slopes below this is no kink that anyone could tell from curvature


class Difference(NamedTuple):
    """A derivative `value` with its own `error` (of a norm), the `steps` tried, the one-sided slopes at the smallest
    step, and whether these say that there is a `kink`."""

    value: np.ndarray
    error: float
    steps: tuple[float, ...]
    left: np.ndarray
    right: np.ndarray
    kink: bool

    @property
    def tried(self) -> str:
        """The steps, for a message."""
        return "steps " + ", ".join(f"{h:.1e}" for h in self.steps)


def difference(
    function: Callable[[float], Any], *, target: float = 0.0, scale: float = 1.0, eps: float = 2.2e-16
) -> Difference:
    """The derivative at 0 of a function of a float, scalar or array valued.

    Stops at an error of `target`. `scale`: ten times the first step. `eps`: the precision of the function's values.
    Steps at which it is not finite are left out.
    """
    center = np.asarray(function(0.0), np.float64)
    first = scale * (0.1 if eps < 1e-10 else 0.3)
    best, best_error = np.full(center.shape, np.nan), np.inf
    previous: list[np.ndarray] = []
    steps, gaps, slopes = [], [], (best, best)
    for k in range(LEVELS):
        h = first / RATIO**k
        plus, minus = (np.asarray(function(t), np.float64) for t in (h, -h))
        if not (np.all(np.isfinite(plus)) and np.all(np.isfinite(minus))):
            previous, gaps = [], []
            continue
        noise = 2 * eps * max(_size(plus), _size(minus)) / h
        steps.append(h)
        slopes = (center - minus) / h, (plus - center) / h
        gaps.append((_size(slopes[1] - slopes[0]), _size(slopes[0]) + _size(slopes[1]), noise))
        row = [(plus - minus) / (2 * h)]
        for i, old in enumerate(previous):
            new = row[i] + (row[i] - old) / (RATIO ** (2 * (i + 1)) - 1)
            error = max(_size(new - row[i]), _size(new - old)) + noise
            if error < best_error:
                best, best_error = new, error
            row.append(new)
        previous = row
        if len(row) > 2 and best_error <= target and not _is_kink(gaps[:-1]):
            break
    return Difference(best, float(best_error), tuple(steps), *slopes, _is_kink(gaps))


def _size(a) -> float:
    return float(np.linalg.norm(np.ravel(a)))


def _is_kink(gaps: list[tuple[float, float, float]]) -> bool:
    """Whether the one-sided slopes stay apart while the step falls by 16; of a smooth function they close in by 16."""
    if len(gaps) < 3:
        return False
    for (first, _, _), _, (last, size, noise) in zip(gaps[:-2], gaps[1:-1], gaps[2:], strict=True):
        if last < 0.6 * first or first < 0.6 * last or last <= _KINK * size or last <= 100 * noise:
            return False
    return True
