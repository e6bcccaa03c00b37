"""BFGS in a box-shaped trust region: few evaluations where h is curved differently in many directions, or not convex.

A line search shortens all entries of a step together, and L-BFGS takes directions that it has not seen for as curved
as the last one it has. Here each entry moves by up to the radius on its own, and directions not seen yet have the
curvature of the first step, until a step falls short of what they promised: then that of this step. Matrices are dense:
for up to some hundred entries of x.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from ._oracle import Evaluation, Oracle, length
from ._outer import DONE, TRUST_REGION, Ending, Setting, largest
from .errors import NotConverged

_ACCEPTED, _POOR, _GOOD = 1e-4, 0.1, 0.7  # decrease against the model's: of steps taken, and of radii changed
_SHORT, _STEEPER = 0.5, 1.3  # decrease below which directions not seen get steeper, where they would by this factor


_ROUNDS, _FACE = 50, 1e-2  # of faces tried for one step; share of a slope that a move along it must gain
_SMALL, _INSIDE = 1e-9, 1e-10  # of the gradient that the step's minimum, and that on one face, leave


def trust_region(oracle: Oracle, setting: Setting, on_step: Callable[[Evaluation], bool]) -> Ending:
    """Damped BFGS (Powell 1978), each step the minimum of the model in the box of bounds and radius (Conn, Gould,
    Toint 1988); refused points count as well, for the matrix, and a point without a hypergradient is refused.
    `on_step` is told each accepted point and says whether to go on. Raises `NotConverged` where no radius leads to a
    point with a hypergradient."""
    found = oracle(setting.project(oracle.x0))
    if not on_step(found):
        return DONE
    eps = float(jnp.finfo(oracle.dtype).eps)
    identity = np.eye(found.x.size)
    matrix = identity * max(length(found.gradient), np.finfo(float).tiny)  # a first step of length one
    unseen, seen = 0.0, np.zeros((found.x.size, 0))
    radius, fresh = 1.0, True
    failure: NotConverged | None = None
    for _ in range(20 * setting.max_steps):
        lower, upper = (np.clip(side - found.x, -radius, radius) for side in (setting.lower, setting.upper))
        with np.errstate(over="ignore", invalid="ignore"):
            x = oracle.rounded(found.x + box_minimum(found.gradient, matrix, lower, upper))
            move = x - found.x
            fall = -float(found.gradient @ move + 0.5 * move @ matrix @ move)
            steepness = float(found.gradient @ found.gradient)
        if not np.isfinite(fall) or not np.isfinite(steepness):
            said = "it met values too large to compute with; is h unbounded below"
            return Ending(TRUST_REGION, said, round_off=False)
        size = largest(move)
        if size <= eps * max(1.0, largest(found.x)) or not fall > 0:
            if failure is not None:
                raise failure
            return Ending(TRUST_REGION, "it shrank to nothing")
        try:
            new = oracle(x)
        except NotConverged as error:
            failure, radius = error, size / 4
            continue
        turn = new.gradient - found.gradient
        with np.errstate(over="ignore", invalid="ignore"):
            bend = float(move @ turn)
            if fresh and bend > 0:
                fresh, unseen, seen = False, bend / float(move @ move), seen[:, :0]
                matrix = identity * unseen
            matrix, seen = damped_bfgs(matrix, move, turn), with_directions(seen, move, turn)
        ratio = (found.value - new.value) / fall
        if fall <= 10 * eps * abs(found.value):  # round-off of values, in which gradients still tell
            ratio = 1.0 if setting.optimality(new) <= 0.9 * setting.optimality(found) else 0.0
        steeper = float(turn @ turn) / bend if bend > 0 else 0.0
        if not fresh and not ratio >= _SHORT and _STEEPER * unseen < steeper < np.inf:
            matrix = matrix + (steeper - unseen) * (identity - seen @ seen.T)
            unseen = steeper
        if not ratio >= _POOR:
            radius = size / (2 if ratio > 0 else 4)
        elif ratio > _GOOD and size > 0.8 * radius:
            radius *= 2
        if ratio > _ACCEPTED:
            found, failure = new, None
            if not on_step(found):
                return DONE
    return Ending(TRUST_REGION, "it took its most evaluations")


def with_directions(basis: np.ndarray, *vectors: np.ndarray) -> np.ndarray:
    """An orthonormal basis, shape (n, k), of what a basis and further vectors span."""
    for v in vectors:
        rest, size = v, np.linalg.norm(v)
        for _ in range(2):  # once more, against round-off
            rest = rest - basis @ (basis.T @ rest)
        if np.linalg.norm(rest) > 1e-8 * size and basis.shape[1] < v.size:
            basis = np.concatenate([basis, (rest / np.linalg.norm(rest))[:, None]], axis=1)
    return basis


def damped_bfgs(matrix: np.ndarray, move: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """The BFGS update of a positive definite matrix by a gradient that turned by `turn` along `move`; where h is not
    convex there, `turn` is mixed with what the matrix says, so that it stays positive definite (Powell 1978)."""
    there = matrix @ move
    bend, known = float(move @ turn), float(move @ there)
    share = 1.0 if bend >= 0.2 * known else 0.8 * known / (known - bend)
    mixed = share * turn + (1 - share) * there
    return matrix - np.outer(there, there) / known + np.outer(mixed, mixed) / float(move @ mixed)


def box_minimum(gradient: np.ndarray, matrix: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """The minimum of g'p + p'Bp/2 over lower <= p <= upper, B positive definite and the box around zero: projected
    gradient steps, which choose a face, and conjugate gradients inside it (Moré and Toraldo 1991)."""
    p = np.zeros_like(gradient)
    slope = gradient.copy()
    small = _SMALL * float(np.linalg.norm(gradient))
    for _ in range(_ROUNDS):
        down = np.where(((p <= lower) & (slope > 0)) | ((p >= upper) & (slope < 0)), 0.0, -slope)
        if np.linalg.norm(down) <= small:
            break
        t = float(down @ down / (down @ matrix @ down))
        for _ in range(60):
            trial = np.clip(p + t * down, lower, upper)
            step = trial - p
            if slope @ step + 0.5 * step @ matrix @ step <= _FACE * (slope @ step):
                break
            t /= 2
        p = np.clip(trial + _in_face(slope + matrix @ step, matrix, lower - trial, upper - trial), lower, upper)
        slope = gradient + matrix @ p
    return p


def _in_face(slope: np.ndarray, matrix: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Conjugate gradients on the entries inside the box, until converged or at its boundary."""
    free = (lower < 0) & (upper > 0)
    rest = np.where(free, -slope, 0.0)
    way, total, square = rest, np.zeros_like(rest), float(rest @ rest)
    enough = _INSIDE**2 * square
    for _ in range(2 * len(rest)):
        if square <= enough:
            break
        along = np.where(free, matrix @ way, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            room = np.where(way > 0, (upper - total) / way, np.where(way < 0, (lower - total) / way, np.inf))
        t, most = square / float(way @ along), float(np.min(room))
        if t >= most:
            return total + most * way
        total, rest = total + t * way, rest - t * along
        square, last = float(rest @ rest), square
        way = rest + square / last * way
    return total
