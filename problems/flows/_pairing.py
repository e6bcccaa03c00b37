"""Optimal transport without entropy between weighted points, exact: assignments, and linear programs on few pairs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse

import bilevel

_ALL = 30_000  # number of pairs up to which the linear program gets all of them


class Pairs(NamedTuple):
    """The pairs of an optimal coupling: rows, columns, masses (which sum to one), and its cost."""

    rows: np.ndarray
    columns: np.ndarray
    masses: np.ndarray
    cost: float


def optimal_pairs(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> Pairs:
    """An optimal coupling of probabilities a, shape (n,), and b, (m,), for the costs, (n, m).

    Equal numbers of equal weights are an assignment. Otherwise a linear program on the cheapest pairs, to which pairs
    are added until the dual prices allow no better one: then it is optimal among all pairs.
    """
    if len(a) == len(b) and np.ptp(a) <= 1e-12 * a[0] and np.ptp(b) <= 1e-12 * b[0]:
        rows, columns = scipy.optimize.linear_sum_assignment(cost)
        return Pairs(rows, columns, np.full(len(a), 1 / len(a)), float(cost[rows, columns].mean()))
    here, there = np.flatnonzero(a > 0), np.flatnonzero(b > 0)
    found = _program(cost[np.ix_(here, there)], a[here] / a.sum(), b[there] / b.sum())
    return Pairs(here[found.rows], there[found.columns], found.masses, found.cost)


def _program(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> Pairs:
    n, m = cost.shape
    scale = max(float(np.abs(cost).max()), np.finfo(float).tiny)
    chosen = np.ones((n, m), bool) if n * m <= _ALL else _start(cost, a, b)
    for _ in range(50):
        rows, columns = np.nonzero(chosen)
        ones, k = np.ones(len(rows)), np.arange(len(rows))
        matrix = scipy.sparse.vstack(
            [
                scipy.sparse.csr_matrix((ones, (rows, k)), (n, len(k))),
                scipy.sparse.csr_matrix((ones, (columns, k)), (m, len(k))),
            ]
        ).tocsr()[:-1]  # the last equation follows from the others
        out = scipy.optimize.linprog(
            cost[rows, columns] / scale, A_eq=matrix, b_eq=np.concatenate([a, b])[:-1], method="highs"
        )
        if out.status != 0:
            raise bilevel.NotConverged(f"flows: the linear program of a pairing failed: {out.message}")
        prices = np.append(out.eqlin.marginals, 0.0)
        reduced = cost / scale - prices[:n, None] - prices[None, n:]
        missing = (reduced < -1e-9) & ~chosen
        if not missing.any():
            used = out.x > 0
            masses = out.x[used] / out.x[used].sum()
            return Pairs(rows[used], columns[used], masses, float(out.fun * scale))
        order = np.argsort(np.where(missing, reduced, np.inf), axis=1)[:, :10]
        extra = np.zeros_like(chosen)
        np.put_along_axis(extra, order, True, axis=1)
        chosen |= extra & missing
    raise bilevel.NotConverged("flows: the linear program of a pairing did not end; use fewer particles.")


def _start(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The pairs that are cheap after a rough entropic solve, and a feasible corner."""
    epsilon = 0.01 * float(np.median(cost)) + np.finfo(float).tiny
    f, g = np.zeros(len(a)), np.zeros(len(b))
    for _ in range(30):
        f = -epsilon * _log_sums((g - cost) / epsilon + np.log(b))
        g = -epsilon * _log_sums(((f[:, None] - cost) / epsilon).T + np.log(a))
    reduced = cost - f[:, None] - g[None, :]
    chosen = np.zeros(cost.shape, bool)
    np.put_along_axis(chosen, np.argpartition(reduced, 12, axis=1)[:, :12], True, axis=1)
    np.put_along_axis(chosen, np.argpartition(reduced, 12, axis=0)[:12], True, axis=0)
    i = j = 0  # the north-west corner rule: feasible for any masses
    left, right = a.copy(), b.copy()
    while i < len(a) and j < len(b):
        chosen[i, j] = True
        moved = min(left[i], right[j])
        left[i], right[j] = left[i] - moved, right[j] - moved
        i, j = (i + 1, j) if left[i] <= right[j] else (i, j + 1)
    chosen[i:, -1] = True
    chosen[-1, j:] = True
    return chosen


def _log_sums(z: np.ndarray) -> np.ndarray:
    top = z.max(1)
    return np.log(np.exp(z - top[:, None]).sum(1)) + top
