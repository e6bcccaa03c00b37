"""After a failure: what is wrong with the costs. Looked for only then, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

_FLOW_LIMIT = 40_000  # allowed pairs up to which a flow is looked for


def trouble_with_costs(C: Any, a: Any, b: Any, kept: tuple[bool, bool]) -> str | None:
    """A sentence about NaN, minus infinity, or forbidden pairs that leave mass nowhere to go; None otherwise.

    `kept`: which marginals are kept exactly.
    """
    C, a, b = (np.asarray(v, np.float64) for v in (C, a, b))
    for name, bad in (("NaN", np.isnan(C)), ("minus infinity", C == -np.inf)):
        if bad.any():
            i, j = np.argwhere(bad)[0]
            return (
                f"the cost is {name} for {bad.sum()} pairs, the first is ({i}, {j}); costs are numbers, or infinity "
                f"for a pair that is forbidden."
            )
    allowed = (C < np.inf) & (a > 0)[:, None] & (b > 0)[None, :]
    if allowed.sum() == np.sum(a > 0) * np.sum(b > 0):
        return None
    for name, axis, weights, exact in (("a", 1, a, kept[0]), ("b", 0, b, kept[1])):
        shut = (weights > 0) & ~allowed.any(axis=axis)
        if exact and shut.any():
            return (
                f"all pairs of point {np.flatnonzero(shut)[0]} of `{name}` are forbidden (infinite costs), so its mass "
                f"has nowhere to go: infeasible; allow a pair, set its weight to zero, or pass a finite `tau`."
            )
    if all(kept) and allowed.sum() <= _FLOW_LIMIT and _largest_flow(allowed, a, b) < a.sum() * (1 - 1e-9):
        return (
            "no coupling with these marginals avoids the forbidden pairs (infinite costs): infeasible; allow more "
            "pairs, or use UnbalancedOT."
        )
    if all(kept):
        return (
            "the forbidden pairs (infinite costs) may force further entries of the coupling to zero, or split it into "
            "parts with potentials of their own; then the potentials do not exist or are not unique. Forbid those "
            "pairs too, solve the parts apart, or use UnbalancedOT."
        )
    return None


def _largest_flow(allowed: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    from scipy.optimize import linprog
    from scipy.sparse import coo_matrix, vstack

    i, j = np.nonzero(allowed)
    columns, ones = np.arange(len(i)), np.ones(len(i))
    rows = coo_matrix((ones, (i, columns)), shape=(len(a), len(i)))
    below = coo_matrix((ones, (j, columns)), shape=(len(b), len(i)))
    out = linprog(-ones, A_ub=vstack([rows, below]), b_ub=np.concatenate([a, b]), bounds=(0, None), method="highs")
    return -float(out.fun) if out.status == 0 else float("inf")
