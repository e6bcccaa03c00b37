"""Newton's method for the loss of all steps, with a penalty or without.

Each step's Hessian comes with the derivative of its potential in theta, so that the next inner solve starts close.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import lax
from jaxtyping import Array, Float

import bilevel

from . import _potentials as potentials
from ._penalties import L1
from ._snapshots import CLOSED, LIMIT, Steps


class Point(NamedTuple):
    """The loss, its gradient and the inner potentials at one theta; `sides`: of `_potentials.find`, for each step;
    `error`: about what is wrong in the gradient."""

    theta: np.ndarray
    y: Any
    sides: tuple
    value: float
    gradient: np.ndarray
    error: float
    sweeps: int


# ------------------------------------------------------------------------------------------------ one step


class Piece(NamedTuple):
    """One step; what is small is left to NumPy, which compiles nothing."""

    kernel: Any
    design: np.ndarray
    offset: np.ndarray
    tau: float
    b: np.ndarray
    constant: float
    balanced: np.ndarray
    mode: str

    def work(self, theta: np.ndarray) -> np.ndarray:
        return self.tau * (self.design @ theta) + self.offset


def pieces(steps: Steps) -> list[Piece]:
    """The steps, with their features as arrays of float64."""
    assert steps.designs is not None
    wide = lambda a: np.asarray(a, np.float64)
    offsets = steps.offsets or [0.0] * steps.count
    rows = zip(steps.designs, offsets, steps.step_sizes, steps.weights, steps.values, steps.balanced, strict=True)
    return [
        Piece(steps.kernel(t), wide(design), wide(offset), float(tau), wide(b), float(value), wide(g), steps.mode)
        for t, (design, offset, tau, b, value, g) in enumerate(rows)
    ]


def _value(piece: Piece, theta: np.ndarray, y, tol: float) -> tuple:
    """For one step: potential, how many steps it took, loss, gradient, what round-off or tol leave wrong in that, and
    what `_curvature` wants to know of this point."""
    kernel, tau, b, w = piece.kernel, piece.tau, piece.b, piece.work(theta)
    centred = piece.design - b @ piece.design
    if piece.mode == LIMIT:
        h = piece.balanced + w
        mean = b @ h
        return (
            jnp.asarray(mean, kernel.epsilon.dtype),
            0,
            0.5 * b @ (h - mean) ** 2,
            tau * ((b * (h - mean)) @ centred),
            0.0,
            None,
        )
    at, epsilon = jnp.asarray(w, kernel.epsilon.dtype), float(kernel.epsilon)
    if piece.mode == CLOSED:
        (f, sides), size, count = potentials.explicit(kernel, at), 0.0, 1
    else:  # compiled once, also for the balanced potentials
        goal = jnp.asarray(tol * epsilon / tau, at.dtype)
        f, size, sides, count = potentials.find(kernel, at, y, goal)
    p = b * np.exp(float(kernel.ratio) * (np.asarray(sides.columns, np.float64) - w / epsilon))
    a, there = np.exp(np.asarray(kernel.log_a, np.float64)), np.asarray(f, np.float64)
    dual = there[a > 0] @ a[a > 0] - epsilon / float(kernel.ratio) * (p.sum() - a.sum())
    slope = tau * ((b - p / p.sum()) @ centred)
    wrong = float(size) * tau * np.sqrt((b @ centred**2).max()) / epsilon
    return f, int(count), b @ w + piece.constant - dual, slope, wrong, sides


@eqx.filter_jit
def _curvature(kernel, w, sides, directions, rtol, guess, closed) -> tuple:
    return potentials.curvature(kernel, w, sides, directions, rtol, guess, closed)


def _second_of(piece: Piece, theta: np.ndarray, sides, rtol: float, guess) -> tuple:
    """Hessian and the derivative of the potential, for one step."""
    if piece.mode == LIMIT:
        return piece.tau**2 * _covariance(piece.design, piece.b), piece.tau * (piece.b @ piece.design)
    cast = lambda a: jnp.asarray(a, piece.kernel.epsilon.dtype)
    guess = jnp.zeros((len(piece.kernel.log_a), len(theta)), cast(0).dtype) if guess is None else guess
    w, directions = cast(piece.work(theta)), cast(piece.tau * piece.design)
    H, df = _curvature(piece.kernel, w, sides, directions, cast(rtol), guess, piece.mode == CLOSED)
    return np.asarray(H, np.float64), df


def gram(steps: Steps) -> np.ndarray:
    """The features' covariances under the snapshots, summed: singular where the data cannot tell features apart."""
    wide = lambda a: np.asarray(a, np.float64)
    rows = zip(steps.designs or (), steps.weights, strict=True)
    return np.asarray(sum(_covariance(wide(design), wide(b)) for design, b in rows))


def _covariance(design: np.ndarray, b: np.ndarray) -> np.ndarray:
    centred = np.sqrt(b)[:, None] * (design - b @ design)
    return centred.T @ centred


def _parts(steps: Steps, y: Any) -> list:
    return [y[t] for t in range(steps.count)]


def _joined(steps: Steps, parts: list) -> Any:
    return jnp.stack(parts) if steps.mode == LIMIT else tuple(parts)


def evaluate(steps: Steps, parts: list[Piece], theta: np.ndarray, y: Any, tol: float) -> Point:
    """The loss at theta, its potentials found from y on, its gradient right to about tol where round-off allows."""
    theta = np.asarray(theta, np.float64)
    found, counts, values, slopes, errors, sides = zip(
        *(_value(piece, theta, at, tol) for piece, at in zip(parts, _parts(steps, y), strict=True)), strict=True
    )
    gradient = np.asarray(sum(slopes))
    error = sum(errors) + float(jnp.finfo(steps.epsilon.dtype).eps) * float(np.linalg.norm(gradient))
    return Point(theta, _joined(steps, list(found)), sides, float(sum(values)), gradient, error, sum(counts))


def hessian(steps: Steps, theta: Array) -> Float[Array, "K K"]:
    """The Hessian at theta, to round-off."""
    parts = pieces(steps)
    return jnp.asarray(
        _second(parts, evaluate(steps, parts, np.asarray(theta), steps.initial(), 0.0), 1e-8)[0], steps.epsilon.dtype
    )


def _second(parts: list[Piece], point: Point, rtol: float, guess: list | None = None) -> tuple:
    """The Hessian, and the derivatives of the potentials; `guess`: those of a point nearby."""
    near = [None] * len(parts) if guess is None else guess
    found = [_second_of(one, point.theta, at, rtol, g) for one, at, g in zip(parts, point.sides, near, strict=True)]
    return sum(part[0] for part in found), [part[1] for part in found]


@eqx.filter_jit
def _ahead(y, slopes, move):
    return [f + s @ move for f, s in zip(y, slopes, strict=True)]


# ------------------------------------------------------------------------------------------------ all steps


def minimize(owner: str, steps: Steps, penalty: Any, theta: Array, tol: float, max_steps: int) -> bilevel.Result:
    """Newton's steps, the line search on the loss or, where round-off hides its fall, on the optimality residual."""
    if not float(tol) > 0:
        raise ValueError(f"{owner}: `tol` must be positive, found {tol!r}.")
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 0:
        raise ValueError(f"{owner}: `max_steps` must be an integer of at least 0, found {max_steps!r}.")
    dtype = steps.epsilon.dtype
    if penalty is None:
        check_identified(owner, gram(steps), float(jnp.finfo(dtype).eps))
    value_of = lambda p: p.value + (0.0 if penalty is None else float(penalty.value(jnp.asarray(p.theta, dtype))))
    size_of = lambda p: _optimality(p, penalty, dtype)
    finest = 1e-2 * tol  # of a gradient; far from the minimum less will do
    parts = pieces(steps)
    here = evaluate(steps, parts, np.asarray(theta), steps.initial(), finest)
    history, evaluations, stuck, slopes, rtol = [_state(0, here, value_of(here), dtype)], here.sweeps, False, None, 0.1
    while size_of(here) > tol and len(history) <= max_steps and not stuck:
        H, slopes = _second(parts, here, rtol, slopes)
        goal = _newton_point(H, here.gradient, penalty) if penalty is None else _proximal_point(here, H, penalty)
        move = goal - (0.0 if penalty is None else here.theta)
        decrease = here.gradient @ move
        if penalty is not None:
            decrease += float(penalty.value(jnp.asarray(goal, dtype))) - (value_of(here) - here.value)
        t, old, new = 1.0, value_of(here), None
        while t > 1e-9:
            start = _ahead(_parts(steps, here.y), slopes, jnp.asarray(t * move, dtype))
            new = evaluate(
                steps, parts, here.theta + t * move, _joined(steps, start), max(finest, 1e-4 * size_of(here))
            )
            evaluations += new.sweeps
            if new.error > max(finest, 0.1 * size_of(new)):  # closer than expected
                new = evaluate(steps, parts, new.theta, new.y, max(finest, 1e-2 * size_of(new)))
                evaluations += new.sweeps
            better = value_of(new) <= old + 1e-4 * t * decrease
            if np.isfinite(new.value) and (better or size_of(new) < 0.9 * size_of(here)):
                break
            t, new = t / 2, None
        stuck = new is None
        if new is not None:
            # a Hessian that is too large makes steps too short
            rtol = max(0.03 * rtol, 1e-8) if size_of(new) > 0.1 * size_of(here) else max(0.3 * rtol, min(rtol, 0.01))
            here = new
            history.append(_state(len(history), here, value_of(here), dtype))
    return _result(here, history, size_of(here), tol, max_steps, evaluations, steps)


def _newton_point(H: np.ndarray, gradient: np.ndarray, penalty: Any) -> np.ndarray:
    """-H^-1 gradient, in the scale in which H has a unit diagonal; a little damped where H is not definite."""
    scale = 1 / np.sqrt(np.maximum(np.diag(H), np.finfo(float).tiny))
    scaled = H * scale[:, None] * scale[None, :]
    for damping in (0.0, 1e-12, 1e-9, 1e-6, 1e-3, 1.0):
        try:
            factor = scipy.linalg.cho_factor(scaled + damping * np.eye(len(H)))
        except scipy.linalg.LinAlgError:
            continue
        return -scale * scipy.linalg.cho_solve(factor, scale * gradient)
    return -gradient * scale**2


def _proximal_point(here: Point, H: np.ndarray, penalty: Any) -> np.ndarray:
    """The minimizer of the quadratic model plus the penalty: accelerated proximal gradients, then, for l1, Newton on
    the support they find."""
    model = jnp.asarray(H), jnp.asarray(here.gradient), jnp.asarray(here.theta)
    z = np.asarray(_fista(*model, penalty), np.float64)
    if not isinstance(penalty, L1):
        return z
    weight = np.broadcast_to(np.asarray(penalty.weight, np.float64), z.shape)
    support = (z != 0) | (weight == 0)
    if support.any():
        S = np.flatnonzero(support)
        rhs = H[S] @ here.theta - here.gradient[S] - weight[S] * np.sign(z[S])
        polished = np.zeros_like(z)
        polished[S] = np.linalg.lstsq(H[np.ix_(S, S)], rhs, rcond=None)[0]
        if np.all(np.sign(polished[S]) * np.sign(z[S]) >= 0):
            return polished
    return z


@eqx.filter_jit
def _fista(H, gradient, theta, penalty):
    step = 1 / jnp.linalg.eigvalsh(H)[-1]
    forward = lambda v: penalty.prox(v - step * (gradient + H @ (v - theta)), step)

    def unfinished(carry):
        z, last, _, count = carry
        size = jnp.max(jnp.abs(z - last))
        return (count < 20000) & ((size > 1e-14 * (1 + jnp.max(jnp.abs(z)))) | (count < 2))

    def body(carry):
        z, last, momentum, count = carry
        larger = (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2
        ahead = z + (momentum - 1) / larger * (z - last)
        new = forward(ahead)
        restart = jnp.vdot(ahead - new, new - z) > 0
        return new, z, jnp.where(restart, 1.0, larger).astype(z.dtype), count + 1

    return lax.while_loop(unfinished, body, (theta, theta, jnp.ones((), theta.dtype), 0))[0]


def _optimality(point: Point, penalty: Any, dtype: Any) -> float:
    if penalty is None:
        return float(np.abs(point.gradient).max())
    moved = np.asarray(penalty.prox(jnp.asarray(point.theta - point.gradient, dtype), 1.0), np.float64)
    return float(np.abs(point.theta - moved).max())


def check_identified(owner: str, H: np.ndarray, eps: float) -> None:
    """Raises ValueError where a Hessian or Gram matrix is numerically singular, with the flat direction of theta."""
    size = np.sqrt(np.maximum(np.diag(H), 0))
    dead = size <= 1e3 * eps * size.max() if size.max() > 0 else np.ones(len(size), bool)
    if dead.any():
        k = int(np.argmax(dead))
        raise ValueError(
            f"{owner}: the features are not identified by the data: number {k} is constant on the snapshots, so that "
            f"the flat direction is theta = e_{k}. Leave it out, or give a `penalty`."
        )
    values, vectors = np.linalg.eigh(H / size[:, None] / size[None, :])
    if values[0] <= 100 * len(H) * eps * values[-1]:
        flat = vectors[:, 0] / size
        flat = flat / flat[np.argmax(np.abs(flat))]
        order = [k for k in np.argsort(-np.abs(flat)) if abs(flat[k]) > 1e-6][:8]
        words = " ".join(f"{flat[k]:+.3g} e_{k}" for k in order)
        raise ValueError(
            f"{owner}: the features are not identified by the data, they are collinear on the snapshots: the loss does "
            f"not change along the flat direction theta = {words}. Leave one out, or give a `penalty`."
        )


def _state(step: int, point: Point, value: float, dtype: Any) -> bilevel.State:
    theta, gradient = jnp.asarray(point.theta, dtype), jnp.asarray(point.gradient, dtype)
    return bilevel.State(step, theta, point.y, value, gradient, point.error)


def _result(here, history, size, tol, max_steps, evaluations, steps) -> bilevel.Result:
    state, done = history[-1], size <= tol and not here.error > 10 * tol
    taken = len(history) - 1
    if done:
        message = f"the optimality residual fell to {size:.2e}, below {tol:.2e}"
    elif taken >= max_steps:
        message = f"max_steps = {max_steps} reached with an optimality residual of {size:.2e} (wanted {tol:.2e})"
    else:
        message = (
            f"the round-off floor ended it with an optimality residual of {size:.2e} (wanted {tol:.2e}) and a gradient "
            f"error of about {here.error:.1e}"
        )
    return bilevel.Result(
        state.x, state.y, state.value, state.gradient, state.error, history, bool(done), message, taken, len(history),
        evaluations, taken * len(here.theta) * steps.count,
    )  # fmt: skip
